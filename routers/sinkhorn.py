"""S-BASE: BASE's balance by optimal transport with entropy (Clark et al., arXiv 2202.01169; Sinkhorn's iterations as
Cuturi, arXiv 1306.0895, section 4, in logarithms).

B batch, S sequence, G routing groups, N tokens a group, E experts
"""

import torch
from torch import Tensor

from data.batches import Tokens
from routers.gates import gate_parameter, gate_scores
from routers.routing import Router, Routing, Site, one_each


class Sinkhorn(Router):
    """In training expert = argmax of the plan P that maximises sum P s + temperature * entropy(P), s = W h, over a
    group's T real tokens, with sums 1 over each token and T / E over each expert; in evaluation expert = argmax s.

    Weight = softmax(s) of the expert, a choice of ours. No loss, and no gradient through the plan. The plan's sums are
    even, the loads after argmax nearly so, the lower the temperature the more (and the more iterations it takes).
    report: plan_violation, the largest relative deviation of the plan's sums. Raises ValueError for values out of
    range.
    """

    trains_differently = True
    leaks = frozenset({"future in training", "mates in training"})

    def __init__(self, site: Site, temperature: float, iterations: int):
        super().__init__(site)
        if temperature <= 0:
            raise ValueError(f"router.temperature must be above 0; got {temperature}")
        if iterations < 1:
            raise ValueError(f"router.iterations must be at least 1; got {iterations}")
        self.temperature, self.iterations = temperature, iterations
        self.forward_flops = 2 * site.d_model * site.num_experts
        self.gate = gate_parameter(site)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        scores = gate_scores(hidden, self.gate)  # (B, S, E)
        expert, report = scores.argmax(-1), {}
        if self.training:
            real = tokens.real.view(-1, self.site.routing_group * tokens.real.shape[1])  # (G, N)
            grouped = scores.detach().view(*real.shape, -1) / self.temperature
            plan, report["plan_violation"] = log_plan(grouped, real, self.iterations)
            expert = plan.argmax(-1).view(expert.shape)
        weight = scores.softmax(-1).gather(-1, expert[..., None]).squeeze(-1)
        return one_each(expert, weight * tokens.real, report=report)


@torch.library.custom_op(
    "switchyard::log_plan", mutates_args=()
)  # one opaque node for the compiler, not 2 an iteration
def log_plan(scores: Tensor, real: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Sinkhorn in log space: scores (G, N, E), real (G, N) -> log P (G, N, E), -inf on padding, and (), the largest
    relative deviation of the sums of P from 1 over a real token and n / E over an expert, n being the real tokens.

    The last half step fits the experts' sums, so what deviates is the tokens'. No host sync.
    """
    number, num_experts = real.sum(1, keepdim=True), scores.shape[-1]  # (G, 1)
    load = (number.clamp(min=1).to(scores.dtype) / num_experts).log()
    scores = scores.masked_fill(~real[..., None], -torch.inf)
    price = torch.zeros_like(load).expand(-1, num_experts)  # (G, E)
    share = torch.zeros_like(scores[..., 0])  # (G, N)
    for _ in range(iterations):
        share = -(scores + price[:, None]).logsumexp(-1).masked_fill(~real, 0)
        price = (load - (scores + share[..., None]).logsumexp(1)).where(number > 0, 0)
    plan = scores + share[..., None] + price[:, None]
    rows = (plan.logsumexp(-1).expm1().abs() * real).amax()
    columns = ((plan.logsumexp(1) - load).expm1().abs() * (number > 0)).amax()
    return plan, torch.maximum(rows, columns)


@log_plan.register_fake
def _(scores: Tensor, real: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scores), scores.new_empty(())
