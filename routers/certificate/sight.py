"""Checks of what routing may see: the future, and batch mates. Declared leaks must be found.

B batch, S sequence, T = B*S tokens, D width, E experts, N segments
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import Batch
from routers.certificate.findings import (
    CONFIRMED,
    FAILED,
    MODES,
    OK,
    ROUNDING,
    TRIES,
    Finding,
    distance,
    layers,
    logits,
    route,
)
from routers.certificate.trial import GROUP, LENGTH, Case, batch_of, window_of

# Of a probe's hidden values and of its tokens: how much all have in common, so that experts overflow at any capacity.
ALIKE, SAME = (0.0, 2.0, 0.0, 30.0), (0.0, 0.0, 0.0, 0.97)


def leak(case: Case, what: str, mode: str) -> Finding:
    """Change the future of all rows, or a row's batch mates and their order: does what must stay the same move?

    Measured on the routing of a layer and on the model's output. What is declared must be found, and nothing else.
    """
    probe, name = {"future": change_future, "mates": change_mates}[what], f"{what} in {mode}"
    hidden_leak, confirmed = 0.0, {}
    for seed in range(2 * TRIES):
        model = case.model(seed // 2, MODES[mode])
        batch, changed = probe(case, seed)
        moved: dict[str, tuple[float, bool]] = {}
        for layer, ffn in layers(model):
            hidden = case.hidden(seed, alike=ALIKE[seed % 4])
            seen = [model.prepare(batch)[0], model.prepare(changed.batch)[0]]
            pair = [route(ffn, h, b)[1] for h, b in zip((hidden, changed.hidden(hidden)), seen)]
            moved[f"layer {layer}"] = (changed.compare(*pair), name in ffn.router.leaks)
        any_declared = any(name in router.leaks for router in model.routers.values())
        pair = logits(model, batch), logits(model, changed.batch)
        moved["the output"] = (changed.compare(*pair), any_declared)
        hidden_leak = max([hidden_leak, *(by for by, known in moved.values() if not known)])
        confirmed |= {place: max(by, confirmed.get(place, 0.0)) for place, (by, known) in moved.items() if known}
        if len(confirmed) == len(moved) and min(confirmed.values()) > ROUNDING:
            break  # everything is declared and found
    text = f"largest movement {max([hidden_leak, *confirmed.values()]):.1e}"
    unfounded = [str(place) for place, by in confirmed.items() if by <= ROUNDING]
    if hidden_leak > ROUNDING:
        return Finding(FAILED, f"{text}, and {name} is not declared")
    if unfounded:
        return Finding(FAILED, f"{text}, but {name} is declared and not found in {', '.join(unfounded)}")
    return Finding(CONFIRMED if confirmed else OK, text)


class Changed(NamedTuple):
    """Another batch, its hidden from the first one's, and how far the part moved that must not move."""

    batch: Batch
    hidden: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], float]


def change_future(case: Case, seed: int) -> tuple[Batch, Changed]:
    """Other tokens and hidden values after a position, in all rows."""
    batch, cut = case.batch(seed, same=SAME[seed % 4]), 3 + 3 * seed % (LENGTH - 4)
    window = window_of(batch)
    window[:, cut + 1 :] = window_of(case.batch(("other", seed)))[:, cut + 1 :]
    other = batch_of(window, batch.tokens.real, batch.tokens.key)

    def hidden(before: Tensor) -> Tensor:
        return torch.cat([before[:, : cut + 1], case.hidden(("other", seed))[:, cut + 1 :]], 1)

    return batch, Changed(other, hidden, lambda a, b: distance(a[:, : cut + 1], b[:, : cut + 1]))


def change_mates(case: Case, seed: int) -> tuple[Batch, Changed]:
    """Another order of the rows, and others in place of all but one of them."""
    batch, kept = case.batch(seed, same=SAME[seed % 4]), seed % (2 * GROUP)
    order = (torch.arange(2 * GROUP) + 1 + seed % 3).remainder(2 * GROUP)
    place = int((order == kept).nonzero())
    others = case.batch(("other", seed))
    window = window_of(others)
    window[place] = window_of(batch)[kept]
    key = others.tokens.key.clone()
    key[place] = batch.tokens.key[kept]

    def hidden(before: Tensor) -> Tensor:
        other = 2 * case.hidden(("other", seed))
        other[place] = before[kept]
        return other

    def compare(a: Tensor, b: Tensor) -> float:
        return distance(a[kept], b[place])

    return batch, Changed(batch_of(window, batch.tokens.real, key), hidden, compare)
