"""Gated hash: a table picks k experts, a learned gate weighs them, as in DeepSeek-V4's first layers.

B batch, S sequence, E experts, k experts a token
"""

from torch import Tensor
from torch.nn.functional import softplus

from data.batches import Tokens
from routers.gates import gate_parameter, gate_scores
from routers.hash import Lookup
from routers.routing import Routing, Site, some_each

GATES = {
    "sqrt_softplus": lambda scores: softplus(scores).clamp(min=1e-20).sqrt(),  # the root has no gradient at 0
    "sigmoid": lambda scores: scores.sigmoid(),
    "softmax": lambda scores: scores.softmax(-1),  # Switch's probability, of an expert that the table picks
}


class GatedHash(Lookup):
    """weight = gate(W h)[table[feature(tokens)]], divided by its sum over the token's k experts if k > 1.

    k different experts a key. With k = 1 weights are not divided: they would be 1 and the gate would learn nothing.
    Raises ValueError for an unknown gate, and for k that is not in 1..E.
    """

    def __init__(
        self, site: Site, feature: str, table: str, k: int, gate: str, per_layer: bool, buckets: int, file: str | None
    ):
        super().__init__(site, feature, table, per_layer, buckets, file)
        if not 1 <= k <= site.num_experts:
            raise ValueError(f"router.k must be in 1..num_experts = {site.num_experts}; got {k}")
        if gate not in GATES:
            raise ValueError(f"router.gate must be one of {', '.join(GATES)}; got {gate}")
        if k > 1 and table not in ("random", "modulo", "balanced", "file"):
            raise ValueError(f"router.table={table} gives each key one expert; router.k must be 1, got {k}")
        self.experts_per_token, self.forward_flops = k, 2 * site.d_model * site.num_experts
        self.weigh = GATES[gate]
        self.gate = gate_parameter(site)
        drawn = self.draw(0, k)
        if file is not None and any(len(set(row)) < k for row in drawn.tolist()):
            raise ValueError(f"router.file={file}: a key's {k} experts must be different")
        self.hold(drawn)

    def forward(self, hidden: Tensor, tokens: Tokens) -> Routing:
        expert = self.experts(tokens)  # (B, S, k)
        weight = self.weigh(gate_scores(hidden, self.gate)).gather(-1, expert)
        if self.experts_per_token > 1:
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-20)
        return some_each(expert, weight * tokens.real[..., None])
