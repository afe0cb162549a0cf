"""Transformer blocks and how a stack of them runs: the same for encoder and decoder.

B batch, S positions, R positions of the source, D width
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from data.batches import Tokens
from models.attention import Attention, CrossAttention
from models.feedforward import FeedForward, SparseFeedForward
from models.settings import ModelSettings
from routers.routing import Plan, Routing

FFN = FeedForward | SparseFeedForward


def make_norm(settings: ModelSettings) -> nn.Module:
    """Over the model's width; RMSNorm has no bias."""
    if settings.norm == "rmsnorm":
        return nn.RMSNorm(settings.d_model, eps=1e-6)
    return nn.LayerNorm(settings.d_model, bias=settings.biases)


class Memory(NamedTuple):
    """What the decoder's blocks see of the encoder."""

    hidden: Tensor  # (B, R, D) its output
    mask: Tensor  # (B, 1, S or 1, R) bool, True where a query may look


class Block(nn.Module):
    """Pre-norm: self-attention, attention to the encoder's output if `cross`, FFN."""

    def __init__(self, settings: ModelSettings, ffn: FFN, cross: bool = False):
        super().__init__()
        sizes = settings.d_model, settings.num_heads, settings.biases
        self.attention_norm = make_norm(settings)
        self.attention = Attention(*sizes)
        self.cross_norm = make_norm(settings) if cross else None
        self.cross_attention = CrossAttention(*sizes) if cross else None
        self.ffn_norm = make_norm(settings)
        self.ffn = ffn

    def forward(
        self,
        x: Tensor,
        tokens: Tokens,
        plan: Plan | None,
        rotation: Tensor | None,
        mask: Tensor | None,
        memory: Memory | None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), rotation, mask)
        if self.cross_attention is not None:
            assert self.cross_norm is not None and memory is not None
            x = x + self.cross_attention(self.cross_norm(x), memory.hidden, memory.mask)
        y, routing = self.ffn(self.ffn_norm(x), tokens, plan)
        return x + y, routing


class Inserted(nn.Module):
    """A layer of experts on the raw residual stream, without attention."""

    def __init__(self, ffn: FFN):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor, tokens: Tokens, plan: Plan | None) -> tuple[Tensor, Routing | None]:
        y, routing = self.ffn(x, tokens, plan)
        return x + y, routing


def make_blocks(
    settings: ModelSettings, plain: Iterable[FFN], sparse: dict[int, FFN], cross: bool
) -> tuple[nn.ModuleList, nn.ModuleDict]:
    """Blocks with plain FFNs, one each, and what is inserted after them; of the layers in `sparse` their own FFN."""
    inserted = settings.placement == "insert"
    ffns = [ffn if inserted else sparse.get(layer, ffn) for layer, ffn in enumerate(plain)]
    blocks = nn.ModuleList(Block(settings, ffn, cross) for ffn in ffns)
    return blocks, nn.ModuleDict({str(k): Inserted(ffn) for k, ffn in sparse.items()} if inserted else {})


def run_blocks(
    blocks: nn.ModuleList,
    inserted: nn.ModuleDict,
    x: Tensor,
    tokens: Tokens,
    plans: dict[int, Plan],
    rotation: Tensor | None,
    mask: Tensor | None,
    memory: Memory | None = None,
) -> tuple[Tensor, dict[int, Routing]]:
    """x (B, S, D) through all layers; the routings of the sparse ones. mask (B, 1, S, S) bool; None is causal."""
    routings: dict[int, Routing] = {}
    for layer, block in enumerate(blocks):
        x, routing = block(x, tokens, plans.get(layer), rotation, mask, memory)
        if str(layer) in inserted:
            x, routing = inserted[str(layer)](x, tokens, plans.get(layer))
        if routing is not None:
            routings[layer] = routing
    return x, routings
