"""The shared Transformer: decoder-only, pre-norm, tied embeddings. Which FFNs are routed is all that changes.

B batch, S sequence, D width, F hidden width, E experts, V vocabulary, L layers
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from data.batches import Batch, Tokens
from data.randomness import generator
from models.attention import Attention, rotary_angles
from models.dispatch import PATHS
from models.experts import ACTIVATIONS, ExpertLayer, Experts
from models.feedforward import FeedForward, SparseFeedForward
from routers.routing import Plan, Router, Routing

NORMS = {"layernorm": partial(nn.LayerNorm, bias=False), "rmsnorm": partial(nn.RMSNorm, eps=1e-6)}
POSITIONS = ("learned", "rotary")
PLACEMENTS = ("replace", "insert")


@dataclass
class ModelSettings:
    """How big the model is and what it is made of. Raises ValueError for sizes that do not fit."""

    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    norm: str
    positions: str
    activation: str
    sparse_layers: list[int]
    placement: str  # replace the FFN of the sparse layers, or insert a layer of experts alone after them
    dispatch: str
    depth_factor: int = 1  # times num_layers; what the factors give is in scaled()
    width_factor: float = 1.0  # times d_model and num_heads
    ff_factor: float = 1.0  # times d_ff

    def scaled(self) -> "ModelSettings":
        """The sizes with their factors applied, which are 1 then. Raises ValueError if a size is no longer whole."""
        factors = {"num_layers": "depth_factor", "d_model": "width_factor", "d_ff": "ff_factor"}
        factors["num_heads"] = "width_factor"
        sizes = {}
        for name, factor in factors.items():
            size, by = getattr(self, name), getattr(self, factor)
            scaled = size * by
            if not (0 < by < inf) or abs(scaled - round(scaled)) > 1e-9 * scaled:  # 640 * 1.1 is whole but for rounding
                raise ValueError(f"model.{name} times model.{factor} must be a whole number above 0; got {size} * {by}")
            sizes[name] = round(scaled)
        ones = {"depth_factor": 1, "width_factor": 1.0, "ff_factor": 1.0}
        return replace(self, **sizes, **ones)

    def check(self) -> None:
        for name in ("num_layers", "d_model", "d_ff", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1; got {getattr(self, name)}")
        choices = {"norm": NORMS, "positions": POSITIONS, "activation": ACTIVATIONS, "dispatch": PATHS}
        choices["placement"] = PLACEMENTS
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} must be one of {', '.join(known)}; got {getattr(self, name)}")
        if self.d_model % (self.num_heads * (2 if self.positions == "rotary" else 1)):
            rule = "must be divisible by model.num_heads, to an even width of each head with rotary positions"
            raise ValueError(f"model.d_model {rule}; got {self.d_model} and {self.num_heads}")
        if self.d_model % 8 or self.d_ff % 8:
            raise ValueError(f"model.d_model and model.d_ff must be multiples of 8; got {self.d_model} and {self.d_ff}")
        unused = set(range(self.num_layers)) - set(self.sparse_layers)
        if len(unused) + len(self.sparse_layers) != self.num_layers:
            rule = f"must be different layers in 0..{self.num_layers - 1}"
            raise ValueError(f"model.sparse_layers {rule} (model.num_layers - 1); got {self.sparse_layers}")


class Output(NamedTuple):
    logits: Tensor  # (B, S, V)
    routings: dict[int, Routing]  # sparse layer -> its routing
    aux_loss: Tensor  # () float32, summed over layers


class Block(nn.Module):
    def __init__(self, settings: ModelSettings, ffn: FeedForward | SparseFeedForward):
        super().__init__()
        self.attention_norm = NORMS[settings.norm](settings.d_model)
        self.attention = Attention(settings.d_model, settings.num_heads)
        self.ffn_norm = NORMS[settings.norm](settings.d_model)
        self.ffn = ffn

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None, rotation: Tensor | None, mask: Tensor | None):
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        y, routing = self.ffn(self.ffn_norm(x), tokens, plan)
        return x + y, routing


class Inserted(nn.Module):
    """A layer of experts on the raw residual stream, without attention."""

    def __init__(self, ffn: FeedForward | SparseFeedForward):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None) -> tuple[Tensor, Routing | None]:
        y, routing = self.ffn(x, tokens, plan)
        return x + y, routing


class Transformer(nn.Module):
    """make_router gives the router of a layer, None for plain FFNs everywhere; make_experts(E, F) gives E experts.

    Experts are narrower by as many as a token sees, shared ones included, so that FLOPs are those of one FFN.
    seed: every first value depends on (seed, the parameter's name) alone, one expert after the other, so trunks are
    equal across routers and a plain FFN equals expert 0. path: see models.dispatch. mask_documents: attention stays
    within a document, else it sees the whole window. baseline: a trained model, no part of this one, whose prediction
    of the next token routers may read. Raises ValueError for sizes that do not fit.
    """

    rotation: Tensor | None
    blocks: nn.ModuleList

    def __init__(
        self,
        settings: ModelSettings,
        vocab_size: int,
        sequence_length: int,
        num_experts: int,
        make_router: Callable[[int], Router] | None,
        make_experts: Callable[[int, int], ExpertLayer],
        seed: int,
        path: str,
        num_shared: int = 0,
        mask_documents: bool = False,
        baseline: "Transformer | None" = None,
    ):
        super().__init__()
        self.settings, self.num_experts, self.sequence_length, self.path = settings, num_experts, sequence_length, path
        self.mask_documents, self.unregistered = mask_documents, (baseline,)  # in a tuple: it is no part of this model
        self.embedding = nn.Parameter(torch.empty(vocab_size, settings.d_model))
        learned = settings.positions == "learned"
        self.positions = nn.Parameter(torch.empty(sequence_length, settings.d_model)) if learned else None
        angles = None if learned else rotary_angles(sequence_length, settings.d_model // settings.num_heads)
        self.register_buffer("rotation", angles, persistent=False)
        inserted, width, activation = settings.placement == "insert", settings.d_model, settings.activation

        def plain(width_ff: int) -> Experts:
            return Experts(1, width, width_ff, activation)

        def routed(layer: int) -> FeedForward | SparseFeedForward:
            if make_router is None:
                return FeedForward(make_experts(1, settings.d_ff) if inserted else plain(settings.d_ff))
            router = make_router(layer)
            seen = router.experts_per_token // router.segments + num_shared
            if settings.d_ff % (8 * seen):
                rule = f"must split into {seen} experts of a width that is a multiple of 8"
                raise ValueError(f"model.d_ff {rule}; got {settings.d_ff}")
            each = settings.d_ff // seen
            shared = plain(num_shared * each) if num_shared else None
            return SparseFeedForward(make_experts(num_experts, each), router, shared, path)

        sparse = {layer: routed(layer) for layer in settings.sparse_layers}
        instead = {} if inserted else sparse
        ffns = [instead.get(layer) or FeedForward(plain(settings.d_ff)) for layer in range(settings.num_layers)]
        self.blocks = nn.ModuleList(Block(settings, ffn) for ffn in ffns)
        self.inserted = nn.ModuleDict({str(k): Inserted(ffn) for k, ffn in sparse.items()} if inserted else {})
        self.norm = NORMS[settings.norm](width)
        self.at_sparse_layers = sparse  # the same in a dense model, where they are plain
        self.sparse = {layer: ffn for layer, ffn in sparse.items() if isinstance(ffn, SparseFeedForward)}
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal(0, 0.02), what feeds the residual stream over sqrt(2 L) (GPT-2); norms 1; routers draw their own."""
        residual = 0.02 / (2 * self.settings.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            module, own = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if ".router." in name or parameter.dim() == 1 or own in getattr(module, "own_first_values", ()):
                continue
            deviation = residual if name.endswith(("attention.out", "w_out")) else 0.02
            for index, part in enumerate(parameter if parameter.dim() > 2 else [parameter]):
                segments = part.unsqueeze(0) if part.dim() == 2 else part  # of an expert: cuts of its whole matrix
                whole = torch.empty(part.shape[-2], segments.shape[0] * part.shape[-1])
                whole.normal_(0.0, deviation, generator=generator(seed, name, index))
                segments.copy_(whole.unflatten(1, (segments.shape[0], -1)).transpose(0, 1))

    @property
    def routers(self) -> dict[int, Router]:
        """Sparse layer -> its router."""
        return {layer: ffn.router for layer, ffn in self.sparse.items()}

    @torch.no_grad()
    def prepare(self, batch: Batch) -> tuple[Batch, dict[int, Plan]]:
        """What tokens alone decide, made ahead on the batch's device: the baseline's prediction, and plans."""
        if any(router.uses_prediction for router in self.routers.values()):
            baseline = self.unregistered[0]
            assert baseline is not None, "a router reads predictions, but there is no baseline"
            predicted = baseline.infer(batch.tokens, batch.document).logits.argmax(-1)
            batch = batch._replace(tokens=batch.tokens._replace(predicted=predicted))
        plans = {layer: router.plan(batch.tokens) for layer, router in self.routers.items()}
        return batch, {layer: plan for layer, plan in plans.items() if plan is not None}

    def forward(self, tokens: Tokens, plans: dict[int, Plan] | None = None, document: Tensor | None = None) -> Output:
        """document (B, S): with mask_documents attention stays within equal numbers."""
        plans = plans or {}
        x = embedding(tokens.id, self.embedding)  # (B, S, D)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        mask = document_mask(document) if self.mask_documents and document is not None else None
        routings: dict[int, Routing] = {}
        for layer, block in enumerate(self.blocks):
            x, routing = block(x, tokens, plans.get(layer), self.rotation, mask)
            if str(layer) in self.inserted:
                x, routing = self.inserted[str(layer)](x, tokens, plans.get(layer))
            if routing is not None:
                routings[layer] = routing
        aux_loss = sum((r.aux_loss for r in routings.values()), torch.zeros((), device=x.device))
        return Output(self.norm(x) @ self.embedding.T, routings, aux_loss)

    @torch.no_grad()
    def infer(self, tokens: Tokens, document: Tensor | None = None) -> Output:
        """A forward pass of a trained model on its own device, there in bf16 if it is a GPU."""
        device = self.embedding.device
        tokens = Tokens(*(None if tensor is None else tensor.to(device) for tensor in tokens))  # type: ignore[arg-type]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return self(tokens, document=None if document is None else document.to(device))

    def parameter_counts(self) -> dict[str, int]:
        """active: parameters that touch one token's output; total: all of them, tables and baselines left out."""
        total = active = sum(p.numel() for p in self.parameters())
        for ffn in self.sparse.values():
            expert = sum(p.numel() for p in ffn.experts.parameters()) // self.num_experts
            active -= expert * (self.num_experts - ffn.router.experts_per_token // ffn.router.segments)
        return {"active": active, "total": total}

    def train_flops_per_token(self) -> int:
        """Matrix-product FLOPs of forward and backward, 3 times the forward's of what learns; attention over a window.

        The routers' products count, and a baseline's forward pass where a router reads its prediction; norms,
        activations and the softmax do not.
        """
        width, heads_and_scores = self.settings.d_model, 2 * 4 * self.settings.d_model + 2 * 2 * self.sequence_length
        forward, fixed = len(self.blocks) * heads_and_scores * width + 2 * width * len(self.embedding), 0
        for ffn in self.modules():
            if isinstance(ffn, FeedForward):
                forward += ffn.experts.flops()
            if isinstance(ffn, SparseFeedForward):
                router = ffn.router
                forward += ffn.experts.flops() * router.experts_per_token // router.segments + router.forward_flops
                forward += ffn.shared.flops() if ffn.shared is not None else 0
                fixed += router.fixed_flops
        if self.unregistered[0] is not None and any(router.uses_prediction for router in self.routers.values()):
            fixed += self.unregistered[0].train_flops_per_token() // 3
        return 3 * forward + fixed


def document_mask(document: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a query looks at itself and what stands before it in its own document."""
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]
