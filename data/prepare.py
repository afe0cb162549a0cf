"""A corpus becomes token files: once, under a lock, whole or not at all, verified whenever it is opened."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.corpora import SPLITS, Corpus, digest_of, file_digest
from data.tokenizer import END, cut, train_tokenizer

BATCH = 1 << 21  # characters encoded at a time; the encodings of a batch take some hundred megabytes
FILES = (*(f"{split}.npy" for split in SPLITS), "counts.npy", "tokenizer.json")


@dataclass(frozen=True)
class Prepared:
    """A corpus on disk. `tokens` are read-only memory maps of a split's documents, each followed by END."""

    folder: Path
    fingerprint: str  # equal if and only if tokens and tokenizer are
    vocab_size: int
    token_counts: Tensor  # (V,) int64, how often each id is in the training split
    tokens: dict[str, np.ndarray]  # split -> (tokens,) uint16 or uint32
    splits: dict[str, dict]  # split -> documents, tokens, bytes (of UTF-8), unigram_entropy (nats a token)


def prepare(corpus: Corpus, vocab_size: int, cache: Path, say: Callable[[str], None] = print) -> Prepared:
    """Open the corpus's folder in `cache`; make it first if it is not there, again if it is damaged.

    Any number of processes may call this at once: one works, the others wait and open what it made. `say`
    hears of work only. ValueError if the corpus cannot be read, is too short or has an empty split, or if the
    cache cannot be written.
    """
    cache = Path(cache).expanduser()
    try:
        source = corpus.digest()
        folder = cache / _key(source, vocab_size)
        if prepared := _open_if_sound(folder, say=lambda line: None):
            return prepared
        with _locked(folder.with_suffix(".lock"), say):
            if prepared := _open_if_sound(folder, say):  # another process was faster
                return prepared
            _build(corpus, source, vocab_size, folder, say)
        return open_prepared(folder)
    except OSError as error:
        raise ValueError(f"the corpus cannot be prepared in {cache}: {error}") from error


def open_prepared(folder: Path) -> Prepared:
    """Verify a prepared folder, every byte of it, and map it. ValueError or OSError if anything is off."""
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta.pop("sha256", None) != digest_of(meta):
        raise ValueError("meta.json is damaged")
    for name in FILES:
        if (size := (folder / name).stat().st_size) != (expected := meta["files"][name]["bytes"]):
            raise ValueError(f"{name} has {size} bytes, not {expected}")
        if file_digest(folder / name) != meta["files"][name]["sha256"]:
            raise ValueError(f"{name} is damaged")
    vocab_size = meta["vocab_size"]
    tokens = {s: np.load(folder / f"{s}.npy", mmap_mode="r", allow_pickle=False) for s in SPLITS}
    for split, ids in tokens.items():
        described = ids.dtype == _dtype(vocab_size) and ids.shape == (meta["splits"][split]["tokens"],)
        if not described or ids.max() >= vocab_size:
            raise ValueError(f"{split}.npy does not hold the ids that meta.json describes")
    counts = torch.from_numpy(np.load(folder / "counts.npy", allow_pickle=False))
    return Prepared(folder, digest_of(meta["files"]), vocab_size, counts, tokens, meta["splits"])


def _open_if_sound(folder: Path, say: Callable[[str], None]) -> Prepared | None:
    if not folder.exists():
        return None
    try:
        return open_prepared(folder)
    except (ValueError, OSError) as error:
        say(f"the prepared corpus in {folder} is broken and is made again: {error}")
        return None


def _build(corpus: Corpus, source: str, vocab_size: int, folder: Path, say: Callable[[str], None]) -> None:
    """Write into a temporary folder, then rename it: a kill at any moment leaves no half-made `folder`."""
    began = time.monotonic()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        say(f"preparing the corpus: training a tokenizer of {vocab_size} entries")
        tokenizer = train_tokenizer(corpus.documents("train"), vocab_size)
        (partial / "tokenizer.json").write_text(tokenizer.to_str())
        splits, counts = {}, {}
        for split in reversed(SPLITS):  # the long one last, so that an empty one is found at once
            texts, path = corpus.documents(split), partial / f"{split}.npy"
            splits[split], counts[split] = _write_split(path, texts, tokenizer)
            if not splits[split]["documents"]:
                raise ValueError(f"the {split} split of the corpus is empty: it needs other files or shares")
            figures = "{documents:,} documents, {bytes:,} bytes, {tokens:,} tokens".format(**splits[split])
            say(f"preparing the corpus: {split}: {figures}")
        np.save(partial / "counts.npy", counts["train"])
        if corpus.digest() != source:
            raise ValueError("the corpus changed while it was being prepared; start again")
        _write_meta(partial, vocab_size, splits)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"prepared the corpus in {time.monotonic() - began:.0f} s: {folder}")


def _write_split(path: Path, texts: Iterable[str], tokenizer: Tokenizer) -> tuple[dict, np.ndarray]:
    """Stream a split's tokens into a .npy file; returns its figures and token counts (V,)."""
    vocab_size = tokenizer.get_vocab_size()
    dtype = _dtype(vocab_size)
    documents = size = 0
    counts = np.zeros(vocab_size, np.int64)
    with path.open("w+b") as file:
        _write_header(file, dtype, 0)
        for batch in _batches(texts):
            encodings = tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            rows = (e.ids + [END] if last else e.ids for e, (_, last) in zip(encodings, batch, strict=True))
            ids = np.concatenate([np.array(row, np.int64) for row in rows])
            if ids.max() >= vocab_size:
                raise ValueError(f"the tokenizer gave id {ids.max()}, vocab_size is {vocab_size}")
            file.write(ids.astype(dtype).data)
            counts += np.bincount(ids, minlength=vocab_size)
            documents += sum(last for _, last in batch)
            size += sum(len(piece.encode()) for piece, _ in batch)
        _write_header(file, dtype, int(counts.sum()))
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * np.log(share)).sum())
    figures = {"documents": documents, "tokens": int(counts.sum()), "bytes": size, "unigram_entropy": entropy}
    return figures, counts


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece of a document, whether it is its last), of about BATCH characters; drops blank ones."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        pieces = [] if text.isspace() else list(cut(text))
        for left, piece in zip(reversed(range(len(pieces))), pieces, strict=True):
            batch.append((piece, left == 0))
            size += len(piece)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write_header(file, dtype: np.dtype, tokens: int) -> None:
    """numpy pads its header so that it keeps its length while the first axis grows: it is written twice."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_meta(folder: Path, vocab_size: int, splits: dict[str, dict]) -> None:
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": file_digest(folder / n)} for n in FILES}
    meta = {"vocab_size": vocab_size, "splits": splits, "files": files}
    (folder / "meta.json").write_text(json.dumps({**meta, "sha256": digest_of(meta)}, indent=1))
    for path in (*(folder / name for name in FILES), folder / "meta.json", folder):
        _sync(path)


def _key(source: str, vocab_size: int) -> str:
    """Another source, option, tokenizer library or code: another folder."""
    code = [file_digest(Path(__file__).with_name(n)) for n in ("corpora.py", "tokenizer.py", "prepare.py")]
    return digest_of([source, vocab_size, tokenizers.__version__, code])[:32]


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)  # a folder too
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is preparing this corpus; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
