"""Loss-free balancing: a bias on the scores in place of a loss (Wang et al., arXiv 2408.15664, algorithm 1, and
DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

B batch, S sequence, E experts, k choices a token
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from data.batches import Tokens
from routers.gates import gate_parameter, gate_scores, top
from routers.routing import Router, Routing, Site, some_each


class LossFree(Router):
    """experts = the k highest of sigmoid(s) + b, s = W h; weight = sigmoid(s), without b, over its sum if k > 1.

    Once an optimizer step b += update_rate * sign(mean load - load), over the step's real tokens; never in evaluation.
    No loss. report: bias_norm, the length of b. Raises ValueError for k that is not in 1..E and a negative update_rate.
    """

    bias: Tensor

    def __init__(self, site: Site, k: int, update_rate: float):
        super().__init__(site)
        if not 1 <= k <= site.num_experts:
            raise ValueError(f"router.k must be in 1..num_experts = {site.num_experts}; got {k}")
        if update_rate < 0:
            raise ValueError(f"router.update_rate must not be negative; got {update_rate}")
        self.update_rate, self.follows_load = update_rate, update_rate > 0
        self.experts_per_token, self.forward_flops = k, 2 * site.d_model * site.num_experts
        self.gate = gate_parameter(site)
        self.register_buffer("bias", torch.zeros(site.num_experts))

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        scores = gate_scores(hidden, self.gate)  # (B, S, E)
        expert = top(scores.sigmoid() + self.bias.to(scores.dtype), self.experts_per_token)
        chosen = logsigmoid(scores.gather(-1, expert))
        # in logarithms a quotient of sigmoids stays finite where each of them is 0
        weight = chosen.softmax(-1) if self.experts_per_token > 1 else chosen.exp()
        return some_each(expert, weight * tokens.real[..., None], report={"bias_norm": self.bias.norm()})

    @torch.no_grad()
    def after_step(self, load: Tensor, progress: float) -> None:
        # load (E,) is whole numbers: times E, mean and load compare exactly
        self.bias += self.update_rate * (load.sum() - load * len(load)).sign().to(self.bias.dtype)
