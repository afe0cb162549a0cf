"""The two feed-forward layers: plain, and sparse with a router. B batch, S sequence, D width"""

from torch import Tensor, nn

from data.batches import Tokens
from models.dispatch import dispatch
from models.experts import Experts
from routers.routing import Plan, Router, Routing


class FeedForward(nn.Module):
    """A plain FFN: one expert, without dispatch."""

    def __init__(self, experts: Experts):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None) -> tuple[Tensor, None]:
        return self.experts.dense(x), None


class SparseFeedForward(nn.Module):
    """A router in front of experts. path: see models.dispatch."""

    def __init__(self, experts: Experts, router: Router, path: str):
        super().__init__()
        self.experts, self.router, self.path = experts, router, path

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None) -> tuple[Tensor, Routing]:
        """x (B, S, D) -> (B, S, D) and the routing that made it."""
        routing = self.router(x, tokens)
        return dispatch(x.reshape(-1, x.shape[-1]), routing, plan, self.experts, self.path).view(x.shape), routing
