"""Windows and batches of a mixture, where a corpus alone has Split and TrainingBatches.

B batch, S sequence, C corpora, P period of the schedule
"""

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch, Split, Tokens, TrainingBatches
from data.mixture import schedule
from data.prepare import Prepared
from data.randomness import mix


class MixedSplit:
    """A split of each corpus, one after the other: windows, and documents, are numbered through."""

    def __init__(self, parts: dict[str, Split], shares: list[int]):
        self.parts, self.shares = list(parts.values()), shares
        self.length = self.parts[0].length
        self.first = np.cumsum([0, *map(len, self.parts)])  # window of each corpus, and the end
        documents = np.cumsum([0, *(len(part.ends) for part in self.parts)])
        self.documents = dict(zip(parts, map(slice, documents[:-1], documents[1:])))  # name -> numbers of its documents
        tokens = np.cumsum([0, *(len(part.stream) for part in self.parts)])
        self.ends = np.concatenate([part.ends + start for part, start in zip(self.parts, tokens)])
        self.full = sum(part.full for part in self.parts)

    def windows(self, numbers: Tensor, key: Tensor) -> Batch:
        """As Split.windows; a window past the last one is the last corpus's, and all padding."""
        corpus = np.minimum(np.searchsorted(self.first, numbers.numpy(), "right") - 1, len(self.parts) - 1)
        batches, rows = [], []
        for place, (part, documents) in enumerate(zip(self.parts, self.documents.values())):
            row = torch.from_numpy(np.flatnonzero(corpus == place))
            if len(row):
                batch = part.windows(numbers[row] - int(self.first[place]), key[row])
                batches.append(batch._replace(document=batch.document + documents.start))
                rows.append(row)
        return _stacked(batches, torch.cat(rows).argsort())

    @property
    def tokens_per_epoch(self) -> int:
        return sum(part.tokens_per_epoch for part in self.parts)

    def epochs(self, windows: int) -> dict[str, float]:
        """name -> how often training on so many windows sees each of a corpus's."""
        each = windows / sum(self.shares)
        return {n: each * share / part.full for n, share, part in zip(self.documents, self.shares, self.parts)}

    def spread(self, windows: int) -> Tensor:
        """As Split.spread, of each corpus as large a share, and one window at least."""
        shares = [-(-windows * len(part) // len(self)) for part in self.parts]
        return torch.cat([start + part.spread(n) for start, part, n in zip(self.first.tolist(), self.parts, shares)])

    def __len__(self) -> int:
        return int(self.first[-1])


def _stacked(batches: list[Batch], order: Tensor) -> Batch:
    """The rows of all batches, in this order."""
    cells = zip(*((*batch.tokens, *batch[1:]) for batch in batches))
    rows = [None if column[0] is None else torch.cat(column).index_select(0, order) for column in cells]
    width = len(Tokens._fields)
    return Batch(Tokens(*rows[:width]), *rows[width:])  # type: ignore[arg-type]


class MixedBatches:
    """TrainingBatches of a mixture: which corpus a row is of follows from the schedule alone, which window of it from
    (seed, its epoch); every window of a corpus comes once in an epoch of that corpus."""

    def __init__(self, split: MixedSplit, batch_size: int, seed: int):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.parts = [TrainingBatches(part, batch_size, seed) for part in split.parts]
        self.order = schedule(split.shares)
        ones = self.order[:, None] == np.arange(len(split.shares))  # (P, C)
        self.before = (np.cumsum(ones, 0) - ones)[np.arange(len(ones)), self.order]  # (P,) of the same corpus

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        numbers = torch.tensor([self.number(place) for place in places])
        return self.split.windows(numbers, mix(self.seed, step, torch.arange(self.batch_size)))

    def number(self, place: int) -> int:
        """The window of a place (from 0) in the order of training."""
        periods, at = divmod(place, len(self.order))
        corpus = self.order[at]
        within = periods * self.split.shares[corpus] + int(self.before[at])
        return int(self.split.first[corpus]) + self.parts[corpus].number(within)


def open_split(prepared: Prepared, split: str, sequence_length: int, packing: str) -> Split | MixedSplit:
    """A split of a corpus or of a mixture. Raises ValueError as Split does."""
    if not prepared.parts:
        return Split(prepared, split, sequence_length, packing)
    parts = {part.name: Split(part.prepared, split, sequence_length, packing) for part in prepared.parts}
    return MixedSplit(parts, [part.share for part in prepared.parts])


def training_batches(split: Split | MixedSplit, batch_size: int, seed: int) -> TrainingBatches | MixedBatches:
    """The steps of a training split."""
    kind = MixedBatches if isinstance(split, MixedSplit) else TrainingBatches
    return kind(split, batch_size, seed)  # type: ignore[arg-type]
