"""Token streams -> batches of B windows, S tokens long. batch(step) is a pure function of (data, seed, step)."""

from collections.abc import Callable, Iterator
from functools import lru_cache
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
    predicted: Tensor | None = None  # (B, S) a frozen baseline's argmax of next, only if a router reads it


class Source(NamedTuple):
    """What the encoder of an encoder-decoder reads (data.source): (B, R) tokens that are no target of the batch."""

    tokens: Tokens
    document: Tensor  # (B, R) int64, numbered as the batch's

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Source":
        return Source(_changed(self.tokens, change), change(self.document))


class Batch(NamedTuple):
    """One step's input: tokens for the model, targets for the loss, documents for masks and for evaluation."""

    tokens: Tokens
    target: Tensor  # (B, S) int64, the next token of the stream
    document: Tensor  # (B, S) int64, the number of the input token's document in its split
    counted: Tensor  # (B, S) bool, whether the target enters the loss: never on padding
    source: Source | None = None  # of an encoder-decoder, once it is made ready

    @property
    def target_document(self) -> Tensor:
        """(B, S) int64, the number of the target's document: after an end, the next one."""
        return self.document + (self.tokens.id == END)

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Every tensor changed: sliced, pinned or moved."""
        source = None if self.source is None else self.source.apply(change)
        tokens = _changed(self.tokens, change)
        return Batch(tokens, change(self.target), change(self.document), change(self.counted), source)

    def to(self, device: torch.device) -> "Batch":
        """On this device; a GPU takes it from pinned memory, so that the host need not wait."""
        if device.type == "cuda" and self.target.device.type == "cpu":
            return self.apply(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return self.apply(lambda tensor: tensor.to(device))

    def routed(self, in_encoder: bool) -> Tokens:
        """The tokens that sparse layers of this side see."""
        if not in_encoder:
            return self.tokens
        assert self.source is not None, "there is no source to route"
        return self.source.tokens


def _changed(tokens: Tokens, change: Callable[[Tensor], Tensor]) -> Tokens:
    return Tokens(*(None if tensor is None else change(tensor) for tensor in tokens))  # type: ignore[arg-type]


def make_batch(window: Tensor, document: Tensor, real: Tensor, key: Tensor, counted: Tensor | None = None) -> Batch:
    """window, document (B, S+1) int64; real, counted (B, S) bool; key (B,) int64. None: every real target counts.

    Nothing that a router may know looks across a document border.
    """
    token, target = window[:, :-1], window[:, 1:]
    ends = document[:, 1:] != document[:, :-1]  # (B, S), the last token of a document
    previous = torch.nn.functional.pad(torch.where(ends, BEGIN, token)[:, :-1], (1, 0), value=BEGIN)
    following = torch.where(ends, END, target)
    position = torch.arange(token.shape[1]).expand_as(token)
    tokens = Tokens(token, previous, following, position, real, key)
    counted = real if counted is None else real & counted
    return Batch(tokens, target, document[:, :-1], counted).apply(Tensor.contiguous)


class Split:
    """Windows of up to S+1 tokens, the rest of a window padding. ValueError if not one fits.

    packing stream: they are full, the last one aside, and a window begins with the last token of the one before, so
    that every token but the first is a target once. documents: a window holds whole documents; one that is longer than
    a window begins in one of its own and goes on in the next as in a stream. There a document's first token is no
    target that counts: what stands before it is another document, or nothing.
    """

    def __init__(self, prepared: Prepared, split: str, sequence_length: int, packing: str = "stream"):
        self.stream, self.length = prepared.tokens[split], sequence_length
        self.mask, self.apart = prepared.counted.get(split), packing == "documents"
        self.ends = np.flatnonzero(np.asarray(self.stream) == END)
        edges = documents_packed(self.ends, sequence_length) if self.apart else self._in_stream()
        self.starts, self.stops = edges  # (windows,) int64 each: the tokens of a window
        # windows that training sees: without padding, if they need none
        self.full = len(self.starts) if self.apart else (len(self.stream) - 1) // sequence_length
        if self.full < 1:
            window = f"one window of data.sequence_length + 1 = {sequence_length + 1}"
            raise ValueError(f"the {split} split has {len(self.stream)} tokens, fewer than {window}")

    def _in_stream(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.arange(0, len(self.stream) - 1, self.length)
        return starts, np.minimum(starts + self.length + 1, len(self.stream))

    def windows(self, numbers: Tensor, key: Tensor) -> Batch:
        """The windows of these numbers (B,); past the last one all is padding."""
        within = np.minimum(numbers.numpy(), len(self) - 1)
        stops = np.where(numbers.numpy() < len(self), self.stops[within], 0)[:, None]
        index = self.starts[within][:, None] + np.arange(self.length + 1)  # (B, S+1)
        inside = index < stops
        index = np.minimum(index, self.stops[within][:, None] - 1)
        window = np.where(inside, self.stream[index], END).astype(np.int64)
        document = np.searchsorted(self.ends, index)
        counted = np.ones_like(inside) if self.mask is None else self.mask[index]
        if self.apart:
            counted[:, 1:] &= document[:, 1:] == document[:, :-1]
        tensors = [torch.from_numpy(array) for array in (window, document, inside[:, 1:], counted[:, 1:])]
        return make_batch(tensors[0], tensors[1], tensors[2], key, tensors[3])  # a position is real if its target is

    @property
    def tokens_per_epoch(self) -> int:
        """Positions of an epoch that are not padding."""
        return int((self.stops - self.starts - 1)[: self.full].sum())

    def spread(self, windows: int) -> Tensor:
        """The numbers of so many windows at even distances, or of all if there are no more."""
        return torch.arange(min(windows, len(self))) * len(self) // min(windows, len(self))

    def __len__(self) -> int:
        """Windows in evaluation, those with padding included."""
        return len(self.starts)


def documents_packed(ends: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """(windows,) starts and stops of windows that hold whole documents, in stream order. ends (documents,): of END."""
    starts, stops, start, stop = [], [], 0, 0
    for after in (ends + 1).tolist():
        if after - start > sequence_length + 1 and stop > start:  # it does not fit beside those before it
            starts.append(start)
            stops.append(stop)
            start = stop
        while after - start > sequence_length + 1:
            starts.append(start)
            stops.append(start + sequence_length + 1)
            start += sequence_length
        stop = after
    return np.array([*starts, start]), np.array([*stops, stop])


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
        numbers = torch.tensor([self.number(place) for place in places])
        return self.split.windows(numbers, mix(self.seed, step, torch.arange(self.batch_size)))

    def number(self, place: int) -> int:
        """The window of a place (from 0) in the order of training."""
        return int(self.permutation(place // self.split.full)[place % self.split.full])


def evaluation_batches(split: Any, batch_size: int, windows: int | None = None) -> Iterator[Batch]:
    """The split in order, in batches of batch_size windows; the last batch is filled with padding.

    split: a Split, or what is like it. windows: only so many of it, always the same; None: all.
    """
    chosen = torch.arange(len(split)) if windows is None else split.spread(windows)
    numbers = torch.cat([chosen, len(split) + torch.arange(-len(chosen) % batch_size)])
    for part in numbers.split(batch_size):
        yield split.windows(part, mix(part))
