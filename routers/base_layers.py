"""BASE: balanced assignment in training, greedy in evaluation (Lewis et al., arXiv 2103.16716, section 3)."""

import torch
from torch import Tensor, nn

from data.batches import Tokens
from routers.assignment import balanced_assignment
from routers.fast_assignment import replayed_assignment
from routers.routing import Router, Routing, Site, at_least_float32, one_each

SOLVERS = ("auto", "exact", "fast")
EXACT_UP_TO = 2048  # tokens a routing group: auto is exact up to there


class BalancedAssignment(Router):
    """Training: maximise sum_t h_t . w_{a(t)} with equal loads over each routing group; evaluation: argmax. Weight
    sigmoid(h_t . w_{a(t)}), so that x + weight * f(x) is the published mixture. No loss, no capacity.

    In the place of an FFN it reads that one's normed input, a deviation from the paper; as published, on the raw
    residual stream, with model.placement=insert and experts=stack. report: assignment_gap, the certified distance to
    the optimum. Where a score in training is not finite, the exact solver raises FloatingPointError, and the fast one's
    gap is not a number.
    """

    trains_differently = True
    even_loads = True
    leaks = frozenset({"future in training", "mates in training"})

    def __init__(self, site: Site, solver: str = "auto"):  # runs from before the option lack it
        super().__init__(site)
        if solver not in SOLVERS:
            raise ValueError(f"router.solver must be one of {', '.join(SOLVERS)}; got {solver}")
        self.solver = solver
        self.centroids = nn.Parameter(torch.empty(site.num_experts, site.d_model))
        with torch.no_grad():
            nn.init.orthogonal_(self.centroids, gain=0.1, generator=site.generator("centroids"))
        self.forward_flops = 2 * site.d_model * site.num_experts

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = at_least_float32(hidden)
            scores = hidden @ self.centroids.to(hidden.dtype).T  # (B, S, E)
        report = {}
        if self.training:
            group = self.site.routing_group
            exact = self.solver == "exact" or (self.solver == "auto" and group * scores.shape[1] <= EXACT_UP_TO)
            expert, report["assignment_gap"] = assign_groups(scores.detach(), tokens.real, group, exact)
            report["assignment_exact"] = torch.full_like(report["assignment_gap"], exact)
        else:
            expert = scores.argmax(-1)
        weight = scores.gather(-1, expert[..., None]).squeeze(-1).sigmoid()
        return one_each(expert, weight * tokens.real, report=report)


@torch.library.custom_op("switchyard::assign_groups", mutates_args=())  # one opaque node for the compiler
def assign_groups(scores: Tensor, real: Tensor, group: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Assign the real tokens of every `group` sequences on their own. scores (B, S, E), real (B, S).

    Returns experts (B, S) int64, 0 on padding, and the largest certified gap of the groups, float32.
    """
    if not exact:
        with torch.autocast(scores.device.type, enabled=False):
            groups = real.view(-1, group * real.shape[1])  # (G, N)
            expert, gaps = replayed_assignment(scores.reshape(*groups.shape, -1), groups)
        return expert.view(real.shape), gaps.amax().float()
    expert = torch.zeros(real.shape, dtype=torch.int64, device=scores.device)
    gaps = [0.0]
    for first in range(0, len(real), group):
        rows = slice(first, first + group)
        solved = balanced_assignment(scores[rows][real[rows]])
        expert[rows] = expert[rows].masked_scatter(real[rows], solved.expert)
        gaps.append(solved.gap)
    return expert, torch.tensor(max(gaps), device=scores.device)


@assign_groups.register_fake
def _(scores: Tensor, real: Tensor, group: int, exact: bool) -> tuple[Tensor, Tensor]:
    return real.new_empty(real.shape, dtype=torch.int64), scores.new_empty((), dtype=torch.float32)
