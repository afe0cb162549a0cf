"""Hash layer: expert = table[feature(tokens)] (Hash Layers For Large Sparse Models, section 3)."""

import torch
from torch import Tensor

from data.batches import Tokens
from routers.features import FEATURES
from routers.routing import Plan, Router, Routing, Site, make_plan, one_each
from routers.tables import TABLES


class Hash(Router):
    """A fixed table from a feature of the text to experts: no gate value, no parameters, no loss.

    feature: a name in routers.features; table: a name in routers.tables. Raises ValueError for other names.
    """

    table: Tensor

    def __init__(self, site: Site, feature: str, table: str):
        super().__init__(site)
        if feature not in FEATURES:
            raise ValueError(f"router.feature must be one of {', '.join(FEATURES)}; got {feature}")
        if table not in TABLES:
            raise ValueError(f"router.table must be one of {', '.join(TABLES)}; got {table}")
        self.feature = FEATURES[feature]
        counts = self.feature.counts(site.token_counts)
        self.register_buffer("table", TABLES[table](counts, site.num_experts, site.generator("table")))

    def experts(self, tokens: Tokens) -> Tensor:
        """(B, S) the expert of each token."""
        keys = self.feature.keys(tokens)
        return self.table.index_select(0, keys.reshape(-1)).view(keys.shape)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        return one_each(self.experts(tokens), tokens.real)

    @torch.no_grad()
    def plan(self, tokens: Tokens) -> Plan:
        return make_plan(self.experts(tokens).reshape(-1), self.site.num_experts)
