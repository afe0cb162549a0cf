"""What a check says, and what checks measure with.

B batch, S sequence, T = B*S tokens, D width, E experts, N segments
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import Batch
from models.feedforward import SparseFeedForward
from models.transformer import Transformer
from routers.certificate.trial import Case, gates
from routers.routing import Routing

OK, CONFIRMED, FAILED, NOT_APPLICABLE = "ok", "declared leak confirmed", "FAILED", "not applicable"
ROUNDING, EXACT, TRIES = 1e-9, 1e-12, 4
MODES = {"training": True, "evaluation": False}


class Finding(NamedTuple):
    status: str
    text: str  # what was measured


Check = Callable[[Case], Finding]


def judged(good: bool, text: str) -> Finding:
    return Finding(OK if good else FAILED, text)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, over the largest value if that is above 1; infinite if a value is not finite."""
    one, other = one.detach(), other.detach()
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp(min=1)) if one.numel() else 0.0


def layers(model: Transformer) -> Iterator[tuple[int, SparseFeedForward]]:
    """The first sparse layer and the last: a router may differ by layer."""
    for layer in sorted({min(model.sparse), max(model.sparse)}):
        yield layer, model.sparse[layer]


def route(ffn: SparseFeedForward, hidden: Tensor, batch: Batch) -> tuple[Routing, Tensor]:
    """The routing and its gates (B, S, N, E), without gradient."""
    with torch.no_grad():
        routing = ffn.router(hidden, batch.tokens)
    return routing, gates(routing, batch.target.numel(), ffn.router).unflatten(0, batch.target.shape)


def logits(model: Transformer, batch: Batch) -> Tensor:
    with torch.no_grad():
        batch, plans = model.prepare(batch)
        return model(batch.tokens, plans).logits


def listed(what: str, names: set[str]) -> str:
    return f"; {what}: {', '.join(sorted(names)[:3])}" if names else ""


def projected(y: Tensor, aux_loss: Tensor) -> Tensor:
    """A loss in which every output has its own share."""
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).cos()).sum() / len(y) + aux_loss


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True) if inputs else []
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs)]
