"""Documents -> token ids and which of them count, piece by piece: bounded memory, all cores."""

from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from data.corpora import Document, segments
from data.tokenizer import END, cut, units

BATCH = 1 << 21  # characters encoded at a time; their encodings take some hundred megabytes at most
REMEMBERED = 1 << 20  # units, in some hundred megabytes
Item = TypeVar("Item")


class Encoded(NamedTuple):
    ids: np.ndarray  # (tokens,) uint32
    counted: np.ndarray  # (tokens,) bool
    words: int  # of the counted text, as whitespace parts them
    bytes: int  # of the counted text, in UTF-8
    read: int  # bytes of all the text


class Piece(NamedTuple):
    text: str  # "" is the end of a document
    counted: bool
    words: int


class Encoder:
    """Token ids of texts. Each unit is encoded once, by all cores, and remembered: text is made of few units."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.size = tokenizer, tokenizer.get_vocab_size()
        self.known: dict[str, bytes] = {}  # unit -> its ids as uint32

    def __call__(self, texts: Iterable[str]) -> list[np.ndarray]:
        """(tokens,) uint32 each. ValueError if the tokenizer gives an id that is not in its dictionary."""
        parts = [units(text) for text in texts]
        new = list(set().union(*parts).difference(self.known))
        if len(self.known) + len(new) > REMEMBERED:
            self.known.clear()
            new = list(set().union(*parts))
        for unit, found in zip(new, self.tokenizer.encode_batch_fast(new, add_special_tokens=False)):
            self.known[unit] = array("I", found.ids).tobytes()
        joined = [np.frombuffer(b"".join(map(self.known.__getitem__, part)), np.uint32) for part in parts]
        highest = max((int(ids.max()) for ids in joined if len(ids)), default=0)
        if highest >= self.size:
            raise ValueError(f"token ids must be below {self.size}; the tokenizer gives {highest}")
        return joined


def encoded(documents: Iterable[Document], encode: Encoder) -> Iterator[Encoded]:
    """Each document's tokens, then END. Raises ValueError as Encoder does."""
    end = np.array([END], np.uint32)
    for batch in ahead(batches(pieces(documents))):
        found = encode(piece.text for piece in batch)
        parts = [ids if piece.text else end for piece, ids in zip(batch, found)]
        counted = np.repeat([piece.counted for piece in batch], [len(part) for part in parts])
        lengths = [len(piece.text.encode()) for piece in batch]
        priced = [(piece.words, length) for piece, length in zip(batch, lengths) if piece.counted]
        words, count = (sum(column) for column in zip(*priced)) if priced else (0, 0)
        yield Encoded(np.concatenate(parts), counted, words, count, sum(lengths))


def pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """What is encoded at once. A word that had to be cut counts in its first piece."""
    for document in documents:
        parts = segments(document)
        for text, counted in parts:
            inside = False
            for piece in cut(text):
                yield Piece(piece, counted, len(piece.split()) - (inside and not piece[0].isspace()))
                inside = not piece[-1].isspace()
        yield Piece("", parts[-1].counted, 0)


def batches(parts: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in parts:
        batch.append(piece)
        size += len(piece.text) + 16  # so that a batch of nothing but short ones ends as well
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same, the next one read in a thread of its own while one is used."""
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = reader.submit(next, items, None)
            yield item
