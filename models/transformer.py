"""The shared Transformer: decoder-only, pre-norm, tied embeddings. Which FFNs are routed is all that changes.

B batch, S sequence, D width, F hidden width, E experts, V vocabulary, L layers
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from data.batches import Tokens
from data.randomness import generator
from models.attention import Attention, rotary_angles
from models.dispatch import PATHS
from models.experts import ACTIVATIONS, Experts
from models.feedforward import FeedForward, SparseFeedForward
from routers.routing import Plan, Router, Routing

NORMS = {"layernorm": partial(nn.LayerNorm, bias=False), "rmsnorm": partial(nn.RMSNorm, eps=1e-6)}
POSITIONS = ("learned", "rotary")


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
    dispatch: str

    def check(self) -> None:
        for name in ("num_layers", "d_model", "d_ff", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1; got {getattr(self, name)}")
        choices = {"norm": NORMS, "positions": POSITIONS, "activation": ACTIVATIONS, "dispatch": PATHS}
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


class Transformer(nn.Module):
    """make_router gives the router of a layer, None for plain FFNs everywhere; make_experts(E) gives E experts.

    seed: every first value depends on (seed, the parameter's name) alone, one expert after the other, so trunks are
    equal across routers and a plain FFN equals expert 0. path: see models.dispatch.
    """

    rotation: Tensor | None

    def __init__(
        self,
        settings: ModelSettings,
        vocab_size: int,
        sequence_length: int,
        num_experts: int,
        make_router: Callable[[int], Router] | None,
        make_experts: Callable[[int], Experts],
        seed: int,
        path: str,
    ):
        super().__init__()
        self.settings, self.num_experts, self.sequence_length, self.path = settings, num_experts, sequence_length, path
        self.embedding = nn.Parameter(torch.empty(vocab_size, settings.d_model))
        learned = settings.positions == "learned"
        self.positions = nn.Parameter(torch.empty(sequence_length, settings.d_model)) if learned else None
        angles = None if learned else rotary_angles(sequence_length, settings.d_model // settings.num_heads)
        self.register_buffer("rotation", angles, persistent=False)
        self.blocks = nn.ModuleList()
        for layer in range(settings.num_layers):
            if make_router is not None and layer in settings.sparse_layers:
                ffn = SparseFeedForward(make_experts(num_experts), make_router(layer), path)
            else:
                ffn = FeedForward(make_experts(1))
            self.blocks.append(Block(settings, ffn))
        self.norm = NORMS[settings.norm](settings.d_model)
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Normal(0, 0.02), what feeds the residual stream over sqrt(2 L) (GPT-2); norms 1; routers draw their own."""
        residual = 0.02 / (2 * self.settings.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if ".router." in name or parameter.dim() == 1:
                continue
            deviation = residual if name.endswith(("attention.out", "w_out")) else 0.02
            for index, part in enumerate(parameter if parameter.dim() == 3 else [parameter]):
                part.normal_(0.0, deviation, generator=generator(seed, name, index))

    @property
    def routers(self) -> dict[int, Router]:
        """Sparse layer -> its router."""
        ffns = {layer: block.ffn for layer, block in enumerate(self.blocks)}
        return {layer: ffn.router for layer, ffn in ffns.items() if isinstance(ffn, SparseFeedForward)}

    def plan(self, tokens: Tokens) -> dict[int, Plan]:
        """The plans of the routers that need tokens alone. Made with the batch, on the batch's device."""
        plans = {layer: router.plan(tokens) for layer, router in self.routers.items()}
        return {layer: plan for layer, plan in plans.items() if plan is not None}

    def forward(self, tokens: Tokens, plans: dict[int, Plan] | None = None, document: Tensor | None = None) -> Output:
        """document (B, S): attention stays within equal numbers; None lets it see the whole window."""
        plans = plans or {}
        x = embedding(tokens.id, self.embedding)  # (B, S, D)
        if self.positions is not None:
            x = x + self.positions[: x.shape[1]]
        mask = None if document is None else document_mask(document)
        routings: dict[int, Routing] = {}
        for layer, block in enumerate(self.blocks):
            x, routing = block(x, tokens, plans.get(layer), self.rotation, mask)
            if routing is not None:
                routings[layer] = routing
        aux_loss = sum((r.aux_loss for r in routings.values()), torch.zeros((), device=x.device))
        return Output(self.norm(x) @ self.embedding.T, routings, aux_loss)

    def parameter_counts(self) -> dict[str, int]:
        """active: parameters that touch one token's output; total: all of them."""
        total = active = sum(p.numel() for p in self.parameters())
        for ffn in self.modules():
            if isinstance(ffn, SparseFeedForward):
                expert = sum(p.numel() for p in ffn.experts.parameters()) // self.num_experts
                active -= expert * (self.num_experts - ffn.router.experts_per_token)
        return {"active": active, "total": total}

    def train_flops_per_token(self) -> int:
        """Matrix-product FLOPs of forward and backward, 3 times the forward's; attention over the whole window.

        The router's products count; norms, activations and the softmax do not.
        """
        s = self.settings
        matrices = 3 if s.activation == "swiglu" else 2
        attention = 2 * 4 * s.d_model**2 + 2 * 2 * self.sequence_length * s.d_model
        per_ffn = 2 * matrices * s.d_model * s.d_ff
        forward = s.num_layers * (attention + per_ffn) + 2 * s.d_model * len(self.embedding)
        for router in self.routers.values():
            forward += per_ffn * (router.experts_per_token - 1) + router.forward_flops
        return 3 * forward


def document_mask(document: Tensor) -> Tensor:
    """(B, 1, S, S) bool: a query looks at itself and what stands before it in its own document."""
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]
