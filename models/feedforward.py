"""The two feed-forward layers: plain, and sparse with a router. B batch, S sequence, D width"""

from torch import Tensor, nn

from data.batches import Tokens
from models.dispatch import dispatch
from models.experts import ExpertLayer, Experts
from routers.routing import Plan, Router, Routing


class FeedForward(nn.Module):
    """A plain FFN: one expert, without dispatch."""

    def __init__(self, experts: ExpertLayer):
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None) -> tuple[Tensor, None]:
        return self.experts.dense(x), None


class SparseFeedForward(nn.Module):
    """A router in front of experts, beside a shared FFN that sees every token, if there is one.

    path: see models.dispatch. Raises ValueError if the router wants its experts cut otherwise than they are.
    """

    def __init__(self, experts: ExpertLayer, router: Router, shared: Experts | None, path: str):
        super().__init__()
        if experts.segments != router.segments:
            rule = "must be as many as the router asks for (experts=segmented)"
            raise ValueError(f"experts.segments {rule}: {router.segments}; got {experts.segments}")
        self.experts, self.router, self.shared, self.path = experts, router, shared, path

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None) -> tuple[Tensor, Routing]:
        """x (B, S, D) -> (B, S, D) and the routing that made it."""
        routing = self.router(x, tokens)
        y = dispatch(x.reshape(-1, x.shape[-1]), routing, plan, self.experts, self.path).view(x.shape)
        return y if self.shared is None else y + self.shared.dense(x), routing
