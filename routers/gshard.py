"""GShard: top-2 gating, the second expert by chance (Lepikhin et al., arXiv 2006.16668, section 2.2 and algorithm 1).

B batch, S sequence, G routing groups, N tokens a group, E experts
"""

import torch
from torch import Tensor

from data.batches import Tokens
from data.randomness import uniform
from routers.gates import balance_loss, choices, gate_parameter, gate_scores, top
from routers.routing import LEAKS, Balancing, Router, Routing, Site, some_each


class GShard(Router):
    """experts = the two most probable, p = softmax(W h); weights p_1 / (p_1 + p_2) and p_2 / (p_1 + p_2).

    In training the second is kept with probability 2 p_2 / (p_1 + p_2), at most 1; in evaluation always. The first's
    weight is the same with and without it. load_balance_coef: of E * sum_i f_i P_i, f_i the share of first choices:
    1 at uniform (the paper's mean over experts is 1 / E^2 of it). capacity_factor: in training an expert takes
    ceil(capacity_factor * 2 N / E) choices of a group's N real tokens, in order of position, all first choices before
    the second ones that were kept; None for no limit; eval_capacity_factor: in evaluation. Raises ValueError for
    values out of range.
    """

    experts_per_token = 2
    trains_differently = True

    def __init__(
        self,
        site: Site,
        load_balance_coef: float,
        capacity_factor: float | None,
        eval_capacity_factor: float | None,
    ):
        super().__init__(site)
        if site.num_experts < 2:
            raise ValueError(f"num_experts must be at least 2 for two experts a token; got {site.num_experts}")
        if load_balance_coef < 0:
            raise ValueError(f"router.load_balance_coef must not be negative; got {load_balance_coef}")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and not 0 < factor < float("inf"):
                raise ValueError(f"router.{name} must be above 0, or null for no limit; got {factor}")
        self.load_balance_coef = load_balance_coef
        self.capacity_factors = {True: capacity_factor, False: eval_capacity_factor}  # by self.training
        never = float("inf")  # and a factor of E / 2 or more, where all tokens find room in one expert
        limited = {"training": capacity_factor or never, "evaluation": eval_capacity_factor or never}
        self.leaks = frozenset(leak for leak in LEAKS if 2 * limited[leak.split()[-1]] < site.num_experts)
        self.forward_flops = 2 * site.d_model * site.num_experts
        self.gate = gate_parameter(site)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        scores = gate_scores(hidden, self.gate)  # (B, S, E)
        expert = top(scores, 2)
        weight = scores.gather(-1, expert).softmax(-1)  # p_1 and p_2 over their sum
        first, second = (choices(expert[..., i : i + 1], tokens, self.site) for i in range(2))  # (G, N, E)
        kept = tokens.real[..., None].expand_as(expert)
        if self.training:
            draw = uniform(tokens.key[:, None], self.site.layer, tokens.position, 0)
            kept = kept & torch.stack([torch.ones_like(kept[..., 0]), draw < 2 * weight[..., 1].detach()], -1)
        capacity_factor = self.capacity_factors[self.training]
        if capacity_factor is not None:
            second = second * kept[..., 1].reshape(second.shape[:2])[..., None]
            kept = within_room(first, second, capacity_factor).view(kept.shape)
        return some_each(expert, weight * kept, self.load_balance_coef * balance_loss(first, scores.softmax(-1)))

    def balancing(self, hidden: Tensor, tokens: Tokens) -> Balancing:
        scores = gate_scores(hidden, self.gate)
        return Balancing(scores, scores.softmax(-1), self.load_balance_coef)


def within_room(first: Tensor, second: Tensor, capacity_factor: float) -> Tensor:
    """(G, N, 2) bool: which choices find room, all first ones before all second ones. first, second (G, N, E) 0 or 1.

    Room is ceil(capacity_factor * 2 N / E), N being the tokens that made a first choice.
    """
    room = torch.ceil(2 * first.sum((1, 2)).double() * capacity_factor / first.shape[-1])
    both = torch.cat([first, second], 1)
    fits = ((both > 0) & (both.cumsum(1) <= room[:, None, None])).any(-1)
    return torch.stack(fits.chunk(2, 1), -1)
