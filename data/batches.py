"""Token streams -> batches of B windows, S tokens long. batch(step) is a pure function of (data, seed, step)."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.prepare import Prepared
from data.randomness import generator, mix
from data.tokenizer import BEGIN, END


class Tokens(NamedTuple):
    """What a router may know of the text."""

    id: Tensor  # (B, S) int64, the input token
    previous: Tensor  # (B, S) int64, the begin id where a document starts
    next: Tensor  # (B, S) int64, the target; the end id where a document ends (for the oracle alone)
    position: Tensor  # (B, S) int64, index in the window
    real: Tensor  # (B, S) bool, False on padding
    key: Tensor  # (B,) int64, from (seed, step, row of the step's batch): the source of all noise
    predicted: Tensor | None = None  # (B, S) a frozen baseline's argmax of next, only if a router reads it


class Batch(NamedTuple):
    """One step's input: tokens for the model, targets for the loss, documents for masks and for evaluation."""

    tokens: Tokens
    target: Tensor  # (B, S) int64, the next token of the stream
    document: Tensor  # (B, S) int64, the number of the input token's document in its split
    counted: Tensor  # (B, S) bool, whether the target enters the loss: never on padding

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed: sliced, pinned or moved."""
        tokens = Tokens(*(None if tensor is None else change(tensor) for tensor in self.tokens))  # type: ignore[arg-type]
        return Batch(tokens, change(self.target), change(self.document), change(self.counted))


def make_batch(window: Tensor, document: Tensor, real: Tensor, key: Tensor) -> Batch:
    """window, document (B, S+1) int64; real (B, S) bool; key (B,) int64. Nothing looks across a document border."""
    token, target = window[:, :-1], window[:, 1:]
    ends = document[:, 1:] != document[:, :-1]  # (B, S), the last token of a document
    previous = torch.nn.functional.pad(torch.where(ends, BEGIN, token)[:, :-1], (1, 0), value=BEGIN)
    following = torch.where(ends, END, target)
    position = torch.arange(token.shape[1]).expand_as(token)
    tokens = Tokens(token, previous, following, position, real, key)
    return Batch(tokens, target, document[:, :-1], real).apply(Tensor.contiguous)


class Split:
    """Windows of S+1 tokens at stride S: every token but the first is a target once. ValueError if not one fits."""

    def __init__(self, prepared: Prepared, split: str, sequence_length: int):
        self.stream, self.length = prepared.tokens[split], sequence_length
        self.ends = np.flatnonzero(np.asarray(self.stream) == END)
        self.full = (len(self.stream) - 1) // sequence_length  # windows without padding
        if self.full < 1:
            window = f"one window of data.sequence_length + 1 = {sequence_length + 1}"
            raise ValueError(f"the {split} split has {len(self.stream)} tokens, fewer than {window}")

    def windows(self, numbers: Tensor, key: Tensor) -> Batch:
        """The windows of these numbers (B,); a number past the last full window is padded, or all padding."""
        index = numbers.numpy()[:, None] * self.length + np.arange(self.length + 1)  # (B, S+1)
        inside = index < len(self.stream)
        index = np.minimum(index, len(self.stream) - 1)
        window = np.where(inside, self.stream[index], END).astype(np.int64)
        document = np.searchsorted(self.ends, index)
        real = torch.from_numpy(inside[:, 1:])  # a position counts if its target exists
        return make_batch(torch.from_numpy(window), torch.from_numpy(document), real, key)

    def __len__(self) -> int:
        """Windows in evaluation, the last partial one included."""
        return -(-(len(self.stream) - 1) // self.length)


class TrainingBatches:
    """Steps of B windows; an epoch is one permutation of all full windows, drawn from (seed, epoch)."""

    def __init__(self, split: Split, batch_size: int, seed: int):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.permutation = lru_cache(maxsize=2)(  # a batch may end one epoch and begin the next
            lambda epoch: torch.randperm(split.full, generator=generator(seed, "epoch", epoch))
        )

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        numbers = torch.stack([self.permutation(p // self.split.full)[p % self.split.full] for p in places])
        return self.split.windows(numbers, mix(self.seed, step, torch.arange(self.batch_size)))


def evaluation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """The whole split in order, in batches of batch_size windows; the last batch is filled with padding."""
    for first in range(0, len(split), batch_size):
        numbers = torch.arange(first, first + batch_size)
        yield split.windows(numbers, mix(numbers))
