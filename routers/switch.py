"""Switch: learned top-1 routing with capacity and a load-balancing loss (Fedus et al., arXiv 2101.03961, section 2).

B batch, S sequence, E experts
"""

import torch
from torch import Tensor, nn

from data.batches import Tokens
from routers.gates import balance_loss, choices, gate_parameter, gate_scores, jittered, within_capacity, z_loss
from routers.routing import LEAKS, Balancing, Router, Routing, Site, at_least_float32, one_each


class Switch(Router):
    """expert = argmax p, weight = its p, p = softmax(W h) in float32; over capacity the weight is 0.

    gate: hidden, or token for p = softmax(G[x_t]), an embedding of the token. weight: probability, or straight_through
    for p / stop_gradient(p), 1 with p's gradient. capacity_factor: in training an expert takes ceil(capacity_factor *
    N / E) of a group's N real tokens, in order of position; None for no limit; eval_capacity_factor: in evaluation.
    load_balance_coef: of E * sum_i f_i P_i, which is 1 at uniform. z_loss_coef: of logsumexp squared. jitter: eps of
    the factor U(1 - eps, 1 + eps) on the router's input, in training only. Raises ValueError for values out of range.
    """

    def __init__(
        self,
        site: Site,
        gate: str,
        weight: str,
        capacity_factor: float | None,
        eval_capacity_factor: float | None,
        load_balance_coef: float,
        z_loss_coef: float,
        jitter: float,
    ):
        super().__init__(site)
        for name, value, known in (
            ("gate", gate, ("hidden", "token")),
            ("weight", weight, ("probability", "straight_through")),
        ):
            if value not in known:
                raise ValueError(f"router.{name} must be one of {', '.join(known)}; got {value}")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and not 0 < factor < float("inf"):
                raise ValueError(f"router.{name} must be above 0, or null for no limit; got {factor}")
        for name, coef in (("load_balance_coef", load_balance_coef), ("z_loss_coef", z_loss_coef)):
            if coef < 0:
                raise ValueError(f"router.{name} must not be negative; got {coef}")
        if not 0 <= jitter < 1:
            raise ValueError(f"router.jitter must be in [0, 1); got {jitter}")
        self.capacity_factors = {True: capacity_factor, False: eval_capacity_factor}  # by self.training
        self.load_balance_coef, self.z_loss_coef, self.jitter = load_balance_coef, z_loss_coef, jitter
        self.straight_through, self.by_token = weight == "straight_through", gate == "token"
        self.trains_differently = jitter > 0 or capacity_factor != eval_capacity_factor
        never = float("inf")  # and a factor of E or more, where all tokens find room in one expert
        limited = {"training": capacity_factor or never, "evaluation": eval_capacity_factor or never}
        self.leaks = frozenset(leak for leak in LEAKS if limited[leak.split()[-1]] < site.num_experts)
        if self.by_token:
            self.gate = nn.Parameter(torch.empty(site.vocab_size, site.num_experts))
            with torch.no_grad():
                self.gate.normal_(0.0, 0.1**0.5, generator=site.generator("gate"))  # scores as a hidden gate's at first
        else:
            self.gate = gate_parameter(site)
            self.forward_flops = 2 * site.d_model * site.num_experts

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        scores = self.scores(hidden, tokens)  # (B, S, E)
        probability = scores.softmax(-1)
        weight, expert = probability.max(-1)  # the lowest expert id wins a tie
        choice = choices(expert[..., None], tokens, self.site)
        aux_loss = self.load_balance_coef * balance_loss(choice, probability)
        if self.z_loss_coef > 0:
            aux_loss = aux_loss + self.z_loss_coef * z_loss(scores, tokens, self.site.routing_group)
        if self.straight_through:
            weight = weight / weight.detach()
        kept, capacity_factor = tokens.real, self.capacity_factors[self.training]
        if capacity_factor is not None:
            kept = within_capacity(choice, capacity_factor).any(-1).view(kept.shape)
        return one_each(expert, weight * kept, aux_loss)

    def balancing(self, hidden: Tensor, tokens: Tokens) -> Balancing:
        scores = self.scores(hidden, tokens)
        return Balancing(scores, scores.softmax(-1), self.load_balance_coef, z_coef=self.z_loss_coef)

    def scores(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """(B, S, E) in at least float32."""
        if self.by_token:
            return at_least_float32(torch.nn.functional.embedding(tokens.id, self.gate))
        if self.training and self.jitter > 0:
            hidden = jittered(hidden, tokens, self.site.layer, self.jitter)
        return gate_scores(hidden, self.gate)
