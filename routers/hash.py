"""Hash layer: expert = table[feature(tokens)] (Hash Layers For Large Sparse Models, section 3).

B batch, S sequence, K keys, N hashes or experts a token
"""

import torch
from torch import Tensor

from data.batches import Tokens
from data.randomness import generator
from routers import cluster_tables, tables
from routers.features import FEATURES
from routers.routing import Plan, Router, Routing, Site, count, make_plan, some_each

TABLES = {
    "random": tables.random_table,
    "modulo": tables.modulo_table,
    "balanced": tables.balanced_table,
    "clustered": cluster_tables.clustered_table,
    "clustered_balanced": cluster_tables.clustered_balanced_table,
    "dispersed": cluster_tables.dispersed_table,
    "dispersed_unbalanced": cluster_tables.dispersed_unbalanced_table,
    "distilled": tables.distilled_table,
    "file": tables.file_table,
}
OF_EMBEDDINGS = [name for name, draw in TABLES.items() if draw.__module__ == cluster_tables.__name__]


class Lookup(Router):
    """A fixed table (K, N) from a feature of the text to experts, a buffer; the plan is made with the batch.

    feature: a name in FEATURES; table: in TABLES. per_layer: each sparse layer draws its own, else all have one.
    buckets: number of keys of the features that need it. baseline: of clustered, dispersed, distilled and predicted, a
    run folder, which arrives as site.baseline. file: of table=file. Raises ValueError for what is unknown or missing.
    """

    table: Tensor

    def __init__(self, site: Site, feature: str, table: str, per_layer: bool, buckets: int, file: str | None):
        super().__init__(site)
        for name, value, known in (("feature", feature, FEATURES), ("table", table, TABLES)):
            if value not in known:
                raise ValueError(f"router.{name} must be one of {', '.join(known)}; got {value}")
        if (file is None) == (table == "file"):
            raise ValueError(f"router.file goes with router.table=file, and that with it; got {file} and {table}")
        if buckets < 1:
            raise ValueError(f"router.buckets must be at least 1; got {buckets}")
        if site.num_experts > site.vocab_size:
            raise ValueError(f"num_experts must be at most the vocabulary's {site.vocab_size}; got {site.num_experts}")
        self.feature = FEATURES[feature](site, buckets)
        self.leaks, self.uses_prediction = self.feature.leaks, self.feature.uses_prediction
        for need, wanted in (
            (f"router.table={table}", table in (*OF_EMBEDDINGS, "distilled")),
            (f"router.feature={feature}", self.uses_prediction),
        ):
            if wanted and site.baseline is None:
                how = "a learned router" if table == "distilled" else "router=dense"
                command = f"python run.py {how} record.keep_weights=true at the same scale and data makes one"
                raise ValueError(f"{need} needs router.baseline=<run folder>; {command}")
        if table in (*OF_EMBEDDINGS, "distilled") and not self.feature.is_token:
            raise ValueError(f"router.table={table} needs a feature whose keys are tokens; got {feature}")
        self.imitates = table == "distilled"
        self.feature_name, self.name, self.per_layer, self.file = feature, table, per_layer, file

    def draw(self, column: int, k: int) -> Tensor:
        """(K, k) one draw of the table; zeros while options are only checked."""
        sized = self.name == "file" and self.feature.size_is_fixed
        if self.site.training_text is None and not sized:
            return torch.zeros(self.feature.size, k, dtype=torch.int64)
        place = self.site.layer if self.per_layer else "every layer"
        draws = generator(self.site.draws, "router", place, "table", column)
        uncounted = self.name in tables.UNCOUNTED  # counting reads the whole training text
        counts = torch.ones(self.feature.size, dtype=torch.int64) if uncounted else self.feature.counts()
        table = TABLES[self.name](tables.Keys(counts, self.site, draws, k, self.file))
        tables.check_table(table, self.site.num_experts)
        if self.name == "balanced" and not self.feature.uses_prediction:
            self.load_bound = tables.balance_bound(counts, self.site.num_experts, k)
        return table

    def hold(self, table: Tensor) -> None:
        """Make it the buffer, checked again whenever it is loaded."""
        self.register_buffer("table", table)
        num_experts = self.site.num_experts
        self.register_load_state_dict_post_hook(lambda module, _: tables.check_table(module.table, num_experts))

    def experts(self, tokens: Tokens) -> Tensor:
        """(B, S, N) the experts of each token."""
        keys = self.feature(tokens)
        return self.table.index_select(0, keys.reshape(-1)).view(*keys.shape, -1)

    @torch.no_grad()
    def plan(self, tokens: Tokens) -> Plan:
        return make_plan(self.experts(tokens).reshape(-1), self.site.num_experts, self.segments)


class Hash(Lookup):
    """No gate value, no parameters, no loss: weight 1. With num_hashes N > 1, multi-hash (section 3.2): N independent
    draws, the n-th for the n-th segment of experts=segmented; the report then holds each segment's load.
    """

    def __init__(
        self, site: Site, feature: str, table: str, num_hashes: int, per_layer: bool, buckets: int, file: str | None
    ):
        super().__init__(site, feature, table, per_layer, buckets, file)
        if num_hashes < 1:
            raise ValueError(f"router.num_hashes must be at least 1; got {num_hashes}")
        if table == "modulo" and num_hashes > 1:
            raise ValueError(f"router.table=modulo has no draw: router.num_hashes must be 1; got {num_hashes}")
        self.experts_per_token = self.segments = num_hashes
        drawn = table != "file"  # a file holds all N
        self.hold(torch.cat([self.draw(n, 1) for n in range(num_hashes)], 1) if drawn else self.draw(0, num_hashes))

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        expert, real = self.experts(tokens), tokens.real[..., None].expand(-1, -1, self.segments)
        report = {}
        for n in range(self.segments if self.segments > 1 else 0):
            load = count(expert[..., n].reshape(-1), self.site.num_experts, tokens.real.reshape(-1).long())
            report[f"segment_{n}/max_over_mean"] = load.max() * self.site.num_experts / load.sum().clamp(min=1)
        return some_each(expert, real, report=report)
