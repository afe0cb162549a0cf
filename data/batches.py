"""Token streams -> batches. batch(step) is a pure function of (data, seed, step).

B sequences a step, S sequence length, N windows in a split.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
    predicted: Tensor | None = None  # (B, S) a frozen baseline's argmax of next, only if a table asks for it


class Batch(NamedTuple):
    """One step's input: tokens for the model, targets for the loss, documents for masks and for evaluation."""

    tokens: Tokens
    target: Tensor  # (B, S) int64, the next token of the stream
    document: Tensor  # (B, S) int64, the number of the input token's document in its split

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed: sliced, pinned or moved."""
        changed: dict[str, Any] = {k: None if t is None else change(t) for k, t in self.tokens._asdict().items()}
        return Batch(Tokens(**changed), change(self.target), change(self.document))


def make_batch(window: Tensor, document: Tensor, real: Tensor, key: Tensor) -> Batch:
    """What routers and the loss need, from windows of the stream.

    window, document (B, S+1) int64; real (B, S) bool; key (B,) int64. Nothing looks across a document border:
    a document's first token has the begin id before it, its end token has the end id after it.
    """
    token, target = window[:, :-1], window[:, 1:]
    begins = document[:, 1:-1] != document[:, :-2]  # (B, S-1), for positions 1..S-1
    previous = torch.full_like(token, BEGIN)
    previous[:, 1:] = torch.where(begins, BEGIN, token[:, :-1])
    following = torch.where(document[:, 1:] != document[:, :-1], END, target)
    position = torch.arange(token.shape[1]).expand_as(token)
    tokens = Tokens(token, previous, following, position, real, key)
    return Batch(tokens, target, document[:, :-1]).apply(Tensor.contiguous)


class Split:
    """Windows of S+1 tokens at stride S over one split: every token but the first is a target exactly once.

    Raises ValueError if the split is shorter than one window.
    """

    def __init__(self, prepared: Prepared, split: str, sequence_length: int):
        self.stream = prepared.tokens[split]
        self.length = sequence_length
        self.ends = np.flatnonzero(np.asarray(self.stream) == END)
        self.full = (len(self.stream) - 1) // sequence_length  # windows without padding
        if self.full < 1:
            raise ValueError(
                f"the {split} split has {len(self.stream)} tokens, fewer than one window of "
                f"data.sequence_length + 1 = {sequence_length + 1}"
            )

    def windows(self, numbers: Tensor, key: Tensor) -> Batch:
        """The windows of these numbers (B,); a number past the last full window is padded, or all padding."""
        start = numbers.numpy()[:, None] * self.length
        index = start + np.arange(self.length + 1)[None, :]
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
        self.order: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Tensor:
        if epoch not in self.order:
            drawn = torch.randperm(self.split.full, generator=generator(self.seed, "epoch", epoch))
            self.order = {e: p for e, p in self.order.items() if e == epoch - 1} | {epoch: drawn}
        return self.order[epoch]

    def batch(self, step: int) -> Batch:
        """The batch of this step (from 0)."""
        place = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = place // self.split.full
        number = torch.stack([self.permutation(int(e))[int(p % self.split.full)] for e, p in zip(epochs, place)])
        return self.split.windows(number, mix(torch.tensor(self.seed), step, torch.arange(self.batch_size)))


def evaluation_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """The whole split in order, in batches of batch_size windows; the last batch is filled with padding."""
    for first in range(0, len(split), batch_size):
        numbers = torch.arange(first, first + batch_size)
        yield split.windows(numbers, torch.zeros(batch_size, dtype=torch.int64))
