"""Switch: learned top-1 routing with capacity and a load-balancing loss (Fedus et al., arXiv 2101.03961, section 2).

G routing groups, N tokens a group, E experts
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from data.batches import Tokens
from data.randomness import uniform
from routers.routing import Router, Routing, Site, at_least_float32, one_each


class Switch(Router):
    """expert = argmax p, weight = its p, p = softmax(W h) in float32; over capacity the weight is 0.

    capacity_factor: an expert takes ceil(capacity_factor * N / E) of a group's N real tokens, in order of position;
    None for no limit. load_balance_coef: of E * sum_i f_i P_i, which is 1 at uniform. jitter: eps of the factor
    U(1 - eps, 1 + eps) on the router's input, in training only. Raises ValueError for values out of range.
    """

    def __init__(self, site: Site, capacity_factor: float | None, load_balance_coef: float, jitter: float):
        super().__init__(site)
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"router.capacity_factor must be above 0, or null for no limit; got {capacity_factor}")
        if load_balance_coef < 0:
            raise ValueError(f"router.load_balance_coef must not be negative; got {load_balance_coef}")
        if not 0 <= jitter < 1:
            raise ValueError(f"router.jitter must be in [0, 1); got {jitter}")
        self.capacity_factor, self.load_balance_coef, self.jitter = capacity_factor, load_balance_coef, jitter
        self.trains_differently = jitter > 0
        self.gate = nn.Parameter(torch.empty(site.num_experts, site.d_model))
        deviation = (0.1 / site.d_model) ** 0.5  # section 2.4: truncated at two deviations
        with torch.no_grad():
            nn.init.trunc_normal_(self.gate, 0, deviation, -2 * deviation, 2 * deviation, site.generator("gate"))
        self.forward_flops = 2 * site.d_model * site.num_experts

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        with torch.autocast(hidden.device.type, enabled=False):
            probability = self.scores(hidden, tokens).softmax(-1)  # (B, S, E)
        weight, expert = probability.max(-1)  # the lowest expert id wins a tie
        group = self.site.routing_group * tokens.id.shape[1]
        choice = one_hot(expert, self.site.num_experts) * tokens.real[..., None]
        choice = choice.view(-1, group, self.site.num_experts)  # (G, N, E)
        aux_loss = self.load_balance_coef * balance_loss(choice, probability.view(choice.shape))
        kept = tokens.real
        if self.capacity_factor is not None:
            kept = within_capacity(choice, self.capacity_factor).view(kept.shape)
        return one_each(expert, weight * kept, aux_loss)

    def scores(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """W h in at least float32, (B, S, E)."""
        hidden = at_least_float32(hidden)
        if self.training and self.jitter > 0:
            position, column = tokens.position[..., None], torch.arange(hidden.shape[-1], device=hidden.device)
            draw = uniform(tokens.key[:, None, None], self.site.layer, position, column)
            hidden = hidden * (1 + self.jitter * (2 * draw - 1))
        return hidden @ self.gate.to(hidden.dtype).T


def balance_loss(choice: Tensor, probability: Tensor) -> Tensor:
    """E * sum_i f_i P_i (eq. 4), the mean over groups. choice (G, N, E) one-hot, 0 on padding; probability (G, N, E).

    f_i: share of tokens whose argmax is i, before dropping, without gradient. P_i: mean probability of i.
    """
    real = choice.sum(-1, keepdim=True)  # (G, N, 1)
    tokens = real.sum(1).clamp(min=1)  # (G, 1)
    share = choice.sum(1) / tokens
    mean_probability = (probability * real).sum(1) / tokens
    return choice.shape[-1] * (share * mean_probability).sum(-1).mean()


def within_capacity(choice: Tensor, capacity_factor: float) -> Tensor:
    """(G, N) bool: the tokens that find room, in order of position. choice (G, N, E) one-hot, 0 on padding."""
    tokens = choice.sum((1, 2))  # (G,)
    capacity = torch.ceil(tokens.double() * capacity_factor / choice.shape[-1])
    place = (choice.cumsum(1) * choice).sum(-1)  # (G, N), from 1; 0 on padding
    return (place > 0) & (place <= capacity[:, None])
