"""One router in the first K sparse layers, another above, as DeepSeek-V4 has hash routing in its first three."""

from collections.abc import Callable

from torch import Tensor

from data.batches import Tokens
from routers.routing import Balancing, Plan, Router, Routing, Site


class FirstK(Router):
    """`first` in the lowest k sparse layers, `rest` in the others; each is what it would be there alone.

    Raises ValueError if k leaves one of them without a layer.
    """

    def __init__(self, site: Site, k: int, first: Callable[[Site], Router], rest: Callable[[Site], Router]):
        super().__init__(site)
        layers = site.sparse_layers
        if not 1 <= k < len(layers):
            raise ValueError(f"router.k must be at least 1 and below the {len(layers)} of model.sparse_layers; got {k}")
        self.inner = first(site) if layers.index(site.layer) < k else rest(site)
        for name in Router.__annotations__:
            setattr(self, name, getattr(self.inner, name))

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        return self.inner(hidden, tokens)

    def plan(self, tokens: Tokens) -> Plan | None:
        return self.inner.plan(tokens)

    def balancing(self, hidden: Tensor, tokens: Tokens) -> Balancing | None:
        return self.inner.balancing(hidden, tokens)

    def after_step(self, load: Tensor, progress: float) -> None:
        self.inner.after_step(load, progress)
