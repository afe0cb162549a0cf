"""A corpus becomes token files: once, under a lock, whole or not at all, verified whenever it is opened."""

import fcntl
import inspect
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch

from data.corpora import Corpus
from data.progress import Meter
from data.records import digest_of, file_digest, read_record, write_record
from data.shards import token_counts, visible, write_split
from data.splits import SPLITS
from data.tokenizer import Dictionary, is_trained, load_tokenizer

# Together with those of the corpus and the dictionary: the code that decides what is prepared.
CODE = ("corpora.py", "encoding.py", "prepare.py", "shards.py", "splits.py", "tokenizer.py")


class Prepared(NamedTuple):
    """A corpus on disk. `tokens` are read-only memory maps of a split's documents, each followed by END."""

    folder: Path
    fingerprint: str  # equal if and only if tokens, what counts of them and tokenizer are
    vocab_size: int
    token_counts: torch.Tensor  # (V,) int64, how often each id is in the training split
    tokens: dict[str, np.ndarray]  # split -> (tokens,) uint16 or uint32
    # split -> documents and tokens; counted (tokens), unknown (of them), words and bytes (of UTF-8) of the text that
    # counts; unigram_entropy (nats a counted token)
    splits: dict[str, dict]
    counted: dict[str, np.ndarray] = {}  # split -> (tokens,) bool, which may enter the loss; of those where not all do
    parts: tuple["Part", ...] = ()  # of a mixture, which has no tokens but those of its parts


class Part(NamedTuple):
    """A corpus of a mixture. share: of every period of windows that training sees, a whole number."""

    name: str
    share: int
    prepared: Prepared


class NotPrepared(ValueError):
    """The corpus has not been prepared, and was not to be."""


def prepare(
    corpus: Corpus, dictionary: Dictionary, cache: Path, say: Callable[[str], None] = print, build: bool = True
) -> Prepared:
    """Open the corpus's folder in `cache`, made first if it is not there or damaged; `say` hears of work only.

    Processes may call this at once: one works, the others wait and open what it made. Killed, the next goes on.
    build=False: nothing is written; NotPrepared if it is not there, and ValueError if files here leave a split empty.
    ValueError if the corpus cannot be read, is too short or has an empty split, or if the cache cannot be written.
    """
    try:
        # Another source, option, tokenizer library or code: another folder.
        source = corpus.digest()
        key = [source, dictionary.digest(), tokenizers.__version__, code_digest(corpus, dictionary)]
        folder = cache / digest_of(key)[:32]
        if not build:
            if not folder.exists():
                foresee(corpus)
                raise NotPrepared(f"the corpus is not prepared in {cache}")
            return open_prepared(folder)
        cache.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                try:
                    return open_prepared(folder)
                except (ValueError, OSError) as error:
                    say(f"the prepared corpus in {folder} is broken and is made again: {error}")
            _build(corpus, dictionary, source, folder, say)
            return open_prepared(folder)
    except OSError as error:
        raise ValueError(f"the corpus cannot be prepared in {cache}: {error}") from error


def code_digest(*parts: Corpus | Dictionary) -> str:
    """Of the code that decides what is prepared with these corpora and dictionaries."""
    files = {Path(__file__).with_name(name) for name in CODE} | {Path(inspect.getfile(type(part))) for part in parts}
    return digest_of(sorted(map(file_digest, files)))


def open_prepared(folder: Path) -> Prepared:
    """Verify a prepared folder, every byte of it, and map it. ValueError or OSError if anything is off."""
    meta = read_record(folder / "meta.json")
    for name in ("dictionary", *SPLITS):  # records of the work
        (folder / f"{name}.json").unlink(missing_ok=True)
    maps = {s: np.load(folder / f"{s}.npy", mmap_mode="r", allow_pickle=False) for s in SPLITS}
    masked = [split for split in SPLITS if f"{split}.counted.npy" in meta["files"]]
    counted = {s: np.load(folder / f"{s}.counted.npy", mmap_mode="r", allow_pickle=False) for s in masked}
    counts = torch.from_numpy(np.load(folder / "counts.npy", allow_pickle=False))
    for split, tokens in maps.items():
        if tokens.max() >= len(counts):
            raise ValueError(f"{split}.npy must have ids below {len(counts)}; it has {tokens.max()}")
        if split in counted and (len(counted[split]) != len(tokens) or counted[split].dtype != bool):
            raise ValueError(f"{split}.counted.npy must have a bool for each of {len(tokens)} tokens")
    return Prepared(folder, digest_of(meta["files"]), len(counts), counts, maps, meta["splits"], counted)


def _build(corpus: Corpus, dictionary: Dictionary, source: str, folder: Path, say: Callable[[str], None]) -> None:
    """Write into a folder of its own, then rename it: a kill at any moment leaves no half-made `folder`.

    What a killed process has finished stays in that folder for the next; what failed is taken away.
    """
    began, partial = time.monotonic(), folder.with_suffix(".partial")
    require_documents(corpus)
    partial.mkdir(exist_ok=True)
    try:
        with Meter(say) as meter:
            _make_dictionary(corpus, dictionary, partial, say, meter)
            tokenizer, splits = load_tokenizer(partial), {}
            for split in reversed(SPLITS):  # the long one last, so that an empty one is found at once
                meter.begin(split)
                splits[split] = write_split(partial, split, corpus.documents(split), tokenizer, meter.add)
                if not splits[split]["counted"]:
                    raise ValueError(f"the {split} split of the corpus has no token that counts in the loss")
                say(f"preparing the corpus: {split}: {_described(splits[split])}")
        tokens = np.load(partial / "train.npy", mmap_mode="r", allow_pickle=False)
        np.save(partial / "counts.npy", token_counts(tokenizer.get_vocab_size(), tokens))
        if corpus.digest() != source:
            raise ValueError("the corpus changed while it was being prepared; start again")
        files = sorted([path.name for path in partial.glob("*.npy")] + ["tokenizer.json"])
        write_record(partial / "meta.json", {"splits": splits}, files)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    say(f"prepared the corpus in {time.monotonic() - began:.0f} s: {folder}")


def _make_dictionary(
    corpus: Corpus, dictionary: Dictionary, partial: Path, say: Callable[[str], None], meter: Meter
) -> None:
    """tokenizer.json, unless a killed process has left it whole."""
    record = partial / "dictionary.json"
    try:
        read_record(record)
    except (ValueError, OSError):
        size, trained = dictionary.size(), is_trained(dictionary)
        if trained:
            say(f"preparing the corpus: making a dictionary of {f'{size:,} entries' if size else 'words'}")
        meter.begin("dictionary")
        tokenizer = dictionary.make(meter.texts(corpus.documents("train")))
        (partial / "tokenizer.json").write_text(tokenizer.to_str())
        write_record(record, {}, ["tokenizer.json"])
        if not (trained and size):
            say(f"preparing the corpus: the dictionary has {tokenizer.get_vocab_size():,} entries")


def require_documents(corpus: Corpus) -> None:
    """ValueError, before any work, that names the splits without a document and what would fill them."""
    empty = [split for split in SPLITS if not any(map(visible, corpus.documents(split)))]
    if not empty:
        return
    counts = {split: sum(map(visible, corpus.documents(split))) for split in SPLITS}
    found = ", ".join(f"{count:,} in {split}" for split, count in counts.items())
    ways = {"raise": [f"{s}_share" for s in empty if not getattr(corpus, f"{s}_files", None)]}  # files overrule it
    ways |= {"name": [f"{split}_files" for split in empty], "give": ["document_start"]}
    remedies = []
    for verb, options in ways.items():
        given = [f"data.corpus.{o} (now {json.dumps(getattr(corpus, o))})" for o in options if hasattr(corpus, o)]
        remedies += [f"{verb} {' and '.join(given)}"] if given else []
    remedy = f"; {', or '.join(remedies)}" if remedies else ""
    names = " and ".join(filter(None, [", ".join(empty[:-1]), empty[-1]]))
    plural = "splits of the corpus are" if len(empty) > 1 else "split of the corpus is"
    raise ValueError(f"the {names} {plural} empty: it has documents with text: {found}{remedy}")


def foresee(corpus: Corpus) -> None:
    """ValueError as require_documents, of files that are here; other corpora would first copy or make their text."""
    if hasattr(corpus, "paths"):
        require_documents(corpus)


def _described(figures: dict) -> str:
    size = "{documents:,} documents, {bytes:,} bytes, {counted:,} tokens".format(**figures)
    context = figures["tokens"] - figures["counted"]
    return size + (f" that count, {context:,} tokens of context" if context else "")
