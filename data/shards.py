"""A split on disk: written shard by shard, so that a killed preparation goes on, then joined to token files.

The files are the same wherever the cuts are.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data.corpora import Document, segments
from data.encoding import Encoder, encoded
from data.records import read_record, write_record
from data.tokenizer import END

SHARD = 1 << 25  # characters, and the rest of the document that fills it: what a kill costs at most
BLOCK = 1 << 22  # tokens looked at at a time
SUMS = ("documents", "tokens", "counted", "words", "bytes")


def write_split(
    folder: Path, split: str, documents: Iterable[Document], tokenizer: Tokenizer, read: Callable[[int], None]
) -> dict[str, Any]:
    """<split>.npy (tokens,) uint16 or uint32 and, if not every token counts, <split>.counted.npy (tokens,) bool.

    Returns the split's figures. What an earlier call finished in `folder` is verified and kept. `read` hears of bytes.
    """
    record = folder / f"{split}.json"
    try:
        figures = read_record(record)
    except (ValueError, OSError):
        shards = _write_shards(folder, split, documents, tokenizer, read)
        figures = {key: sum(shard[key] for shard in shards) for key in SUMS}
        names = [f"{split}.npy"]
        _join([folder / _name(split, n, "tokens") for n in range(len(shards))], folder / names[0], _kind(tokenizer))
        if figures["counted"] < figures["tokens"]:
            names.append(f"{split}.counted.npy")
            _join([folder / _name(split, n, "counted") for n in range(len(shards))], folder / names[1], np.dtype(bool))
        maps = [np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in names]
        write_record(record, figures | statistics(tokenizer, *maps), names)
        figures = read_record(record)
    for left in folder.glob(f"{split}.[0-9]*"):
        left.unlink()
    return {key: value for key, value in figures.items() if key != "files"}


def token_counts(size: int, tokens: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """(size,) int64: how often each id is there, or is there and counted. ValueError for an id out of range."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(tokens), BLOCK):
        part = tokens[start : start + BLOCK]
        if part.max() >= size:
            raise ValueError(f"token ids must be below {size}; got {part.max()}")
        counts += np.bincount(part if counted is None else part[counted[start : start + BLOCK]], minlength=size)
    return counts


def statistics(tokenizer: Tokenizer, tokens: np.ndarray, counted: np.ndarray | None = None) -> dict[str, Any]:
    """Of the counted tokens: their entropy in nats, and how many are the unknown word (0 where there is none)."""
    counts = token_counts(tokenizer.get_vocab_size(), tokens, counted)
    share = counts[counts > 0] / max(counts.sum(), 1)
    unknown = getattr(tokenizer.model, "unk_token", None)
    unknowns = int(counts[tokenizer.token_to_id(unknown)]) if unknown is not None else 0
    return {"unknown": unknowns, "unigram_entropy": float(-(share * np.log(share)).sum())}


def _write_shards(
    folder: Path, split: str, documents: Iterable[Document], tokenizer: Tokenizer, read: Callable[[int], None]
) -> list[dict[str, Any]]:
    """The shards' records. Those that are whole stay, and their documents are passed over."""
    encoder = Encoder(tokenizer)
    rest, shards = (document for document in documents if visible(document)), []
    for number in count():
        record = folder / _name(split, number, "json")
        try:
            shard = read_record(record)
            next(islice(rest, shard["documents"] - 1, shard["documents"]), None)
        except (ValueError, OSError):
            shard = _write_shard(record, _portion(rest, SHARD), encoder, read)
        if not shard["documents"]:
            return shards
        shards.append(shard)
    raise AssertionError


def _write_shard(
    record: Path, documents: Iterator[Document], encoder: Encoder, read: Callable[[int], None]
) -> dict[str, Any]:
    paths, kind = [record.with_suffix(end) for end in (".tokens", ".counted")], _kind(encoder.tokenizer)
    sums: dict[str, Any] = dict.fromkeys(SUMS, 0)
    with paths[0].open("wb") as tokens, paths[1].open("wb") as counted:
        for part in encoded(documents, encoder):
            tokens.write(part.ids.astype(kind).data)
            counted.write(part.counted.data)
            found = (part.ids == END).sum(), len(part.ids), part.counted.sum(), part.words, part.bytes
            sums = {key: sums[key] + int(value) for key, value in zip(SUMS, found)}
            read(part.read)
    if sums["documents"]:
        write_record(record, sums, [path.name for path in paths])
    return sums


def _join(parts: list[Path], path: Path, kind: np.dtype) -> None:
    """The parts' bytes, one after the other, as one .npy file."""
    size = sum(part.stat().st_size for part in parts) // kind.itemsize
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, BLOCK)


def _portion(documents: Iterator[Document], size: int) -> Iterator[Document]:
    """Documents until they have this many characters."""
    for document in documents:
        yield document
        size -= sum(len(segment.text) for segment in segments(document))
        if size <= 0:
            return


def visible(document: Document) -> bool:
    """A text of nothing but blanks is no document."""
    return any(not segment.text.isspace() and segment.text for segment in segments(document))


def _kind(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.get_vocab_size() <= 1 << 16 else "<u4")


def _name(split: str, number: int, kind: str) -> str:
    return f"{split}.{number}.{kind}"
