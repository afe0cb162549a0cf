"""What a table does to text, in figures: loads, collisions, and what two tables have in common.

E experts, K keys, k experts a key, V vocabulary
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from data.batches import Batch, Tokens
from routers.hash import Lookup
from routers.routing import count

FREQUENT, RARE = 100, 0.01  # how many keys are frequent; below which share of the mean frequency a key is rare


class Part(NamedTuple):
    """One table: a layer's, or that of one segment of a layer with several hashes."""

    lookup: Lookup
    columns: slice

    @property
    def table(self) -> Tensor:
        """(K, k) int64"""
        return self.lookup.table[:, self.columns]

    @property
    def sizes(self) -> tuple[int, int]:
        """E and k"""
        return self.lookup.site.num_experts, self.table.shape[1]


class Seen(NamedTuple):
    """Counts over a split as it was routed, padding left out."""

    tokens: Tensor  # (V,) int64, of input token ids
    keys: Tensor  # (K,) int64
    loads: dict[str, Tensor]  # name of a part -> (E,) int64


def parts_of(lookups: dict[int, Lookup]) -> dict[str, Part]:
    """Layer -> router as name -> part."""
    whole = {f"{layer}": Part(router, slice(None)) for layer, router in lookups.items() if router.segments == 1}
    return whole | {
        f"{layer}, segment {n}": Part(router, slice(n, n + 1))
        for layer, router in lookups.items()
        for n in range(router.segments if router.segments > 1 else 0)
    }


@torch.no_grad()
def route(parts: dict[str, Part], batches_of: Callable[[int], Iterable[Batch]]) -> Seen:
    """Route a whole split, of which batches_of gives batches of so many windows. All parts look at one feature."""
    lookup = next(iter(parts.values())).lookup
    feature, experts = lookup.feature, lookup.site.num_experts
    tokens, keys = (torch.zeros(size, dtype=torch.int64) for size in (lookup.site.vocab_size, feature.size))
    loads = {name: torch.zeros(experts, dtype=torch.int64) for name in parts}
    for batch in batches_of(lookup.site.routing_group if lookup.uses_prediction else 64):
        text = with_prediction(lookup, batch)
        real = text.real.reshape(-1).long()
        tokens += count(text.id.reshape(-1), len(tokens), real)
        keys += count(feature(text).reshape(-1), len(keys), real)
        for name, part in parts.items():
            chosen = part.lookup.experts(text)[..., part.columns]
            loads[name] += count(chosen.reshape(-1), experts, real.repeat_interleave(chosen.shape[-1]))
    return Seen(tokens, keys, loads)


def with_prediction(lookup: Lookup, batch: Batch) -> Tokens:
    """The batch's tokens, with the baseline's prediction if the router reads it (as Transformer.prepare does)."""
    if not lookup.uses_prediction:
        return batch.routed(lookup.site.in_encoder)
    assert lookup.site.baseline is not None
    predicted = lookup.site.baseline(batch.tokens, None, batch.document, batch.source).logits.argmax(-1)
    return batch.tokens._replace(predicted=predicted)


def entropy(weight: Tensor) -> float:
    """In nats, of the distribution that these weights are in proportion to."""
    return float(torch.special.entr(weight.double() / weight.sum()).sum())


def chance(num_experts: int, k: int, taken: int) -> float:
    """The probability that k different experts drawn at random hold one of `taken` given ones."""
    return 1 - math.comb(num_experts - taken, k) / math.comb(num_experts, k)


def frequent_collisions(table: Tensor, counts: Tensor, num_experts: int) -> tuple[float, int]:
    """(share of the pairs of the FREQUENT most frequent keys that have an expert in common, number of pairs)."""
    order = counts.argsort(descending=True, stable=True)[: min(FREQUENT, int((counts > 0).sum()))]
    member = torch.zeros(len(order), num_experts).scatter_(1, table[order], 1.0)
    common = (member @ member.T > 0).triu(1)
    pairs = len(order) * (len(order) - 1) // 2
    return (float(common.sum()) / pairs if pairs else math.nan), pairs


def rare_and_heavy(counts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(K,) bool twice: keys below RARE of the mean frequency, unseen ones too; keys of p > 1 / (2 E)."""
    return counts < RARE * counts.double().mean(), counts * 2 * num_experts > counts.sum()


def rare_beside_heavy(table: Tensor, counts: Tensor, num_experts: int) -> tuple[float, float]:
    """(share of rare keys that have an expert in common with a heavy one, what it would be if rare keys had random
    experts); nan if no key is rare or none is heavy."""
    rare, heavy = rare_and_heavy(counts, num_experts)
    if not (rare.any() and heavy.any()):
        return math.nan, math.nan
    taken = torch.zeros(num_experts, dtype=torch.bool)
    taken[table[heavy].reshape(-1)] = True
    share = float(taken[table[rare]].any(1).double().mean())
    return share, chance(num_experts, table.shape[1], int(taken.sum()))


def mutual_information(one: Tensor, other: Tensor, counts: Tensor, num_experts: int) -> tuple[float, float]:
    """(nats, share of the smaller of both entropies) between the experts that two tables (K, k) give a token of the
    text. With k > 1 it is one of the token's k experts, drawn at random in each table."""
    joint = torch.zeros(num_experts**2, dtype=torch.int64)
    for a in one.T:
        for b in other.T:
            joint += count(a * num_experts + b, len(joint), counts)
    both = joint.view(num_experts, num_experts)
    alone = entropy(both.sum(1)), entropy(both.sum(0))
    nats = max(0.0, sum(alone) - entropy(joint))
    return nats, nats / min(alone) if min(alone) > 0 else 0.0
