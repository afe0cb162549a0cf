"""A control: a learned router that never learns. Consistency and content, without training."""

from torch import Tensor

from data.batches import Tokens
from routers.gates import gate_parameter, gate_scores
from routers.routing import Router, Routing, Site, one_each


class FrozenRandom(Router):
    """expert = argmax W_0 h, W_0 the first values of a learned router's gate, a buffer; weight 1. No loss.

    h still learns, so a token's expert may change in training, but nothing learns to choose it.
    """

    gate: Tensor

    def __init__(self, site: Site):
        super().__init__(site)
        self.fixed_flops = 2 * site.d_model * site.num_experts
        self.register_buffer("gate", gate_parameter(site).detach())

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        return one_each(gate_scores(hidden.detach(), self.gate).argmax(-1), tokens.real)
