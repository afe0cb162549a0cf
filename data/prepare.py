"""A corpus becomes token files: once, under a lock, whole or not at all, verified whenever it is opened."""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch

from data.corpora import SPLITS, StandardLibrary, TextFiles, digest_of, file_digest
from data.tokenizer import END, cut, train_tokenizer

Corpus = StandardLibrary | TextFiles
BATCH = 32  # pieces encoded at a time; the encodings of a batch of long ones take some hundred megabytes
FILES = (*(f"{split}.npy" for split in SPLITS), "counts.npy", "tokenizer.json")


class Prepared(NamedTuple):
    """A corpus on disk. `tokens` are read-only memory maps of a split's documents, each followed by END."""

    folder: Path
    fingerprint: str  # equal if and only if tokens and tokenizer are
    vocab_size: int
    token_counts: torch.Tensor  # (V,) int64, how often each id is in the training split
    tokens: dict[str, np.ndarray]  # split -> (tokens,) uint16 or uint32
    splits: dict[str, dict]  # split -> documents, tokens, bytes (of UTF-8), unigram_entropy (nats a token)


def prepare(corpus: Corpus, vocab_size: int, cache: Path, say: Callable[[str], None] = print) -> Prepared:
    """Open the corpus's folder in `cache`, made first if it is not there or damaged; `say` hears of work only.

    Processes may call this at once: one works, the others wait and open what it made.
    ValueError if the corpus cannot be read, is too short or has an empty split, or if the cache cannot be written.
    """
    try:
        # Another source, option, tokenizer library or code: another folder.
        code = [file_digest(Path(__file__).with_name(n)) for n in ("corpora.py", "tokenizer.py", "prepare.py")]
        source = corpus.digest()
        folder = cache / digest_of([source, vocab_size, tokenizers.__version__, code])[:32]
        cache.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                try:
                    return open_prepared(folder)
                except (ValueError, OSError) as error:
                    say(f"the prepared corpus in {folder} is broken and is made again: {error}")
            _build(corpus, source, vocab_size, folder, say)
            return open_prepared(folder)
    except OSError as error:
        raise ValueError(f"the corpus cannot be prepared in {cache}: {error}") from error


def open_prepared(folder: Path) -> Prepared:
    """Verify a prepared folder, every byte of it, and map it. ValueError or OSError if anything is off."""
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta.pop("sha256", None) != digest_of(meta):
        raise ValueError("meta.json is damaged")
    for name, digest in meta["files"].items():
        if file_digest(folder / name) != digest:
            raise ValueError(f"{name} is damaged")
    tokens = {s: np.load(folder / f"{s}.npy", mmap_mode="r", allow_pickle=False) for s in SPLITS}
    counts = torch.from_numpy(np.load(folder / "counts.npy", allow_pickle=False))
    return Prepared(folder, digest_of(meta["files"]), len(counts), counts, tokens, meta["splits"])


def _build(corpus: Corpus, source: str, vocab_size: int, folder: Path, say: Callable[[str], None]) -> None:
    """Write into a temporary folder, then rename it: a kill at any moment leaves no half-made `folder`."""
    began = time.monotonic()
    partial = folder.with_suffix(".partial")
    partial.mkdir(exist_ok=True)  # what a killed process left in it is written over
    try:
        say(f"preparing the corpus: training a tokenizer of {vocab_size} entries")
        tokenizer = train_tokenizer(corpus.documents("train"), vocab_size)
        (partial / "tokenizer.json").write_text(tokenizer.to_str())
        splits, counts = {}, {}
        for split in reversed(SPLITS):  # the long one last, so that an empty one is found at once
            splits[split], counts[split] = _write_split(partial / f"{split}.npy", corpus.documents(split), tokenizer)
            if not splits[split]["documents"]:
                remedy = "it needs more documents, or other data.corpus shares"
                raise ValueError(f"the {split} split of the corpus is empty: {remedy}")
            figures = "{documents:,} documents, {bytes:,} bytes, {tokens:,} tokens".format(**splits[split])
            say(f"preparing the corpus: {split}: {figures}")
        np.save(partial / "counts.npy", counts["train"])
        if corpus.digest() != source:
            raise ValueError("the corpus changed while it was being prepared; start again")
        meta = {"splits": splits, "files": {name: file_digest(partial / name) for name in FILES}}
        (partial / "meta.json").write_text(json.dumps({**meta, "sha256": digest_of(meta)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"prepared the corpus in {time.monotonic() - began:.0f} s: {folder}")


def _write_split(path: Path, texts: Iterable[str], tokenizer: tokenizers.Tokenizer) -> tuple[dict, np.ndarray]:
    """Stream a split's tokens into a .npy file; returns its figures and token counts (V,)."""
    vocab_size = tokenizer.get_vocab_size()
    header = {"descr": "<u2" if vocab_size <= 1 << 16 else "<u4", "fortran_order": False}
    counts, size = np.zeros(vocab_size, np.int64), 0
    pieces = (piece for text in texts if text.strip() for piece in (*cut(text), ""))  # "" encodes to nothing: END
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (0,)})
        while batch := list(islice(pieces, BATCH)):
            encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.concatenate([encoding.ids or [END] for encoding in encodings])
            file.write(ids.astype(header["descr"]).data)
            counts += np.bincount(ids, minlength=vocab_size)
            size += sum(len(piece.encode()) for piece in batch)
        file.seek(0)  # numpy pads its header so that it keeps its length while the first axis grows
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (int(counts.sum()),)})
    share = counts[counts > 0] / counts.sum()
    figures = {"documents": int(counts[END]), "tokens": int(counts.sum()), "bytes": size}
    return {**figures, "unigram_entropy": float(-(share * np.log(share)).sum())}, counts
