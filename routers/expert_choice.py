"""Expert choice: experts take tokens (Zhou et al., arXiv 2202.09368, section 3).

B batch, S sequence, G routing groups, N tokens a group, E experts, C tokens an expert
"""

import torch
from torch import Tensor

from data.batches import Tokens
from routers.gates import gate_parameter, gate_scores, top
from routers.routing import Router, Routing, Site, count, some_each


class ExpertChoice(Router):
    """In training each expert takes the C = ceil(capacity_factor * N / E) of a group's N real tokens with the highest
    p = softmax(W h), softmax over experts; weight = p. A token may be taken by none or by several.

    This sees the future and the other sequences of the group. In evaluation, which may not, a token goes to its
    capacity_factor most probable experts. capacity_factor is whole: the experts that a token sees on average, hence
    the FLOPs. report: unchosen, the share of real tokens that no expert took (in training). Raises ValueError for
    capacity_factor that is not in 1..E.
    """

    trains_differently = True
    leaks = frozenset({"future in training", "mates in training"})

    def __init__(self, site: Site, capacity_factor: int):
        super().__init__(site)
        if not 1 <= capacity_factor <= site.num_experts:
            rule = f"must be in 1..num_experts = {site.num_experts}"
            raise ValueError(f"router.capacity_factor {rule}; got {capacity_factor}")
        self.experts_per_token, self.forward_flops = capacity_factor, 2 * site.d_model * site.num_experts
        self.gate = gate_parameter(site)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        probability = gate_scores(hidden, self.gate).softmax(-1)  # (B, S, E)
        if self.training:
            return self.chosen_by_experts(probability, tokens)
        expert = top(probability, self.experts_per_token)
        return some_each(expert, probability.gather(-1, expert) * tokens.real[..., None])

    def chosen_by_experts(self, probability: Tensor, tokens: Tokens) -> Routing:
        num_experts, factor = self.site.num_experts, self.experts_per_token
        real = tokens.real.view(-1, 1, self.site.routing_group * tokens.real.shape[1])  # (G, 1, N)
        groups, _, size = real.shape
        wanted = probability.view(groups, size, num_experts).transpose(1, 2)  # (G, E, N)
        most = -(-factor * size // num_experts)  # C without padding: shapes know nothing of the text
        # padding comes last, and of equal tokens the first in the group is first
        picked = top(wanted.detach().where(real, -1.0), most)  # (G, E, C)
        room = (factor * real.sum((1, 2)) + num_experts - 1) // num_experts  # (G,) C of the real tokens
        place = torch.arange(most, device=real.device)
        served = (place < room[:, None, None]).expand_as(picked)
        first = torch.arange(groups, device=real.device)[:, None, None] * size
        token = (picked + first).flatten()
        expert = torch.arange(num_experts, device=real.device)[:, None].expand_as(picked).flatten()
        weight = (wanted.gather(-1, picked) * served).flatten()
        taken = count(token, real.numel(), served.long().flatten()) > 0
        unchosen = 1 - taken.sum() / real.sum().clamp(min=1)
        return Routing(token, expert, weight, weight.new_zeros(()), {"unchosen": unchosen})
