"""Top-k: the k best experts of a learned gate (Shazeer et al., arXiv 1701.06538, section 2.1, without the noise).

B batch, S sequence, E experts, k choices a token
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from data.batches import Tokens
from routers.gates import balance_loss, choices, gate_parameter, gate_scores, top, z_loss
from routers.routing import Balancing, Router, Routing, Site, some_each

LOG_SCORES = {"softmax": lambda scores: torch.log_softmax(scores, -1), "sigmoid": logsigmoid}


class TopK(Router):
    """experts = the k highest of s = W h; weight = score(s), divided by its sum over the k if renormalise.

    score: softmax (over all E) or sigmoid. load_balance_coef: of E * sum_i f_i P_i (Switch, eq. 4), which is 1 at
    uniform: f_i the share of all k choices that are i, P_i the mean of i's score as a share of all experts' scores.
    z_loss_coef: of logsumexp(s) squared. With k = 1 a renormalised weight would be 1 and the gate would learn nothing:
    refused. Raises ValueError for that, for k that is not in 1..E, an unknown score and negative coefficients.
    """

    def __init__(self, site: Site, k: int, score: str, renormalise: bool, load_balance_coef: float, z_loss_coef: float):
        super().__init__(site)
        if not 1 <= k <= site.num_experts:
            raise ValueError(f"router.k must be in 1..num_experts = {site.num_experts}; got {k}")
        if score not in LOG_SCORES:
            raise ValueError(f"router.score must be one of {', '.join(LOG_SCORES)}; got {score}")
        if renormalise and k == 1:
            raise ValueError("router.renormalise needs router.k above 1, or the gate would learn nothing; got k = 1")
        for name, coef in (("load_balance_coef", load_balance_coef), ("z_loss_coef", z_loss_coef)):
            if coef < 0:
                raise ValueError(f"router.{name} must not be negative; got {coef}")
        self.experts_per_token, self.forward_flops = k, 2 * site.d_model * site.num_experts
        self.log_score, self.renormalise = LOG_SCORES[score], renormalise
        self.load_balance_coef, self.z_loss_coef = load_balance_coef, z_loss_coef
        self.gate = gate_parameter(site)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        scores = gate_scores(hidden, self.gate)  # (B, S, E)
        expert = top(scores, self.experts_per_token)  # of the scores: sigmoids of high ones are equal in float32
        log_score = self.log_score(scores)
        chosen = log_score.gather(-1, expert)
        # in logarithms a quotient of sigmoids stays finite where each of them is 0
        weight = chosen.softmax(-1) if self.renormalise else chosen.exp()
        choice = choices(expert, tokens, self.site)
        aux_loss = self.load_balance_coef * balance_loss(choice, log_score.softmax(-1))
        if self.z_loss_coef > 0:
            aux_loss = aux_loss + self.z_loss_coef * z_loss(scores, tokens, self.site.routing_group)
        return some_each(expert, weight * tokens.real[..., None], aux_loss)

    def balancing(self, hidden: Tensor, tokens: Tokens) -> Balancing:
        scores = gate_scores(hidden, self.gate)
        probability = self.log_score(scores).softmax(-1)
        return Balancing(scores, probability, self.load_balance_coef, self.experts_per_token, self.z_loss_coef)
