"""Documents -> token ids and which of them count, piece by piece: bounded memory, all cores."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer

from data.corpora import Document, segments
from data.tokenizer import END, cut

BATCH = 1 << 21  # characters encoded at a time; their encodings take some hundred megabytes
Item = TypeVar("Item")


class Encoded(NamedTuple):
    ids: np.ndarray  # (tokens,) int64
    counted: np.ndarray  # (tokens,) bool
    words: int  # of the counted text, as whitespace parts them
    bytes: int  # of the counted text, in UTF-8
    read: int  # bytes of all the text


class Piece(NamedTuple):
    text: str  # "" is the end of a document
    counted: bool
    words: int


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Each document's tokens, then END. ValueError if the tokenizer gives an id that is not in its dictionary."""
    size = tokenizer.get_vocab_size()
    for batch in ahead(batches(pieces(documents))):
        found = tokenizer.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        parts = [encoding.ids if piece.text else [END] for piece, encoding in zip(batch, found)]
        ids = np.concatenate([np.asarray(part, np.int64) for part in parts])
        if len(ids) and not 0 <= ids.min() <= ids.max() < size:
            raise ValueError(f"token ids must be in 0..{size - 1}; the tokenizer gives {ids.min()} to {ids.max()}")
        counted = np.repeat([piece.counted for piece in batch], [len(part) for part in parts])
        lengths = [len(piece.text.encode()) for piece in batch]
        priced = [(piece.words, length) for piece, length in zip(batch, lengths) if piece.counted]
        words, count = (sum(column) for column in zip(*priced)) if priced else (0, 0)
        yield Encoded(ids, counted, words, count, sum(lengths))


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
