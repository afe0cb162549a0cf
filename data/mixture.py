"""Several corpora with weights and one dictionary: prepared apart, trained on together in exactly these shares.

P period of the schedule
"""

import dataclasses
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import reduce
from math import ceil, gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from data.corpora import Corpus, Document, segments
from data.prepare import NotPrepared, Part, Prepared, code_digest, foresee, prepare, require_documents
from data.records import digest_of, read_record, write_record
from data.shards import token_counts
from data.splits import SPLITS
from data.tokenizer import Dictionary, is_trained

LONGEST_PERIOD = 100_000


class Mixture:
    """parts: name -> {corpus: a function that opens it}, as a yaml of conf/data has it; its other keys do not matter.
    weights: name -> weight, in exact proportion to the windows that training sees. Raises ValueError for weights that
    are not positive, of other names, or whose schedule would be longer than LONGEST_PERIOD windows.

    As a corpus, which is read for the dictionary alone, its documents come in turn as the weights say, until one is at
    its end.
    """

    def __init__(self, parts: dict[str, Any], weights: dict[str, Any]):
        if not parts or parts.keys() != weights.keys():
            rule = "must name the corpora of data.corpus.parts, of which there is at least one"
            raise ValueError(f"data.corpus.weights {rule}; got {list(weights)} and {list(parts)}")
        self.shares = dict(zip(parts, whole_shares(weights, list(parts))))
        self.corpora: dict[str, Corpus] = {name: _opened(name, part) for name, part in parts.items()}

    def documents(self, split: str) -> Iterator[Document]:
        streams = [corpus.documents(split) for corpus in self.corpora.values()]
        order = schedule(list(self.shares.values()))
        while True:
            for place in order.tolist():
                document = next(streams[place], None)
                if document is None:
                    return
                yield document

    def digest(self) -> str:
        return digest_of([list(self.shares.values()), [corpus.digest() for corpus in self.corpora.values()]])


def whole_shares(weights: dict[str, Any], names: list[str]) -> list[int]:
    """The smallest whole numbers in proportion to the weights. Raises ValueError as Mixture does."""
    try:
        exact = [Fraction(str(weights[name])) for name in names]
    except ValueError as error:
        raise ValueError(f"data.corpus.weights must be numbers; got {weights}") from error
    if min(exact) <= 0:
        raise ValueError(f"data.corpus.weights must be above 0; got {weights}")
    shares = [int(share * lcm(*(each.denominator for each in exact))) for share in exact]
    shares = [share // reduce(gcd, shares) for share in shares]
    if sum(shares) > LONGEST_PERIOD:
        rule = f"must be in the proportion of whole numbers that sum to at most {LONGEST_PERIOD:,}"
        raise ValueError(f"data.corpus.weights {rule}; got {weights}")
    return shares


def schedule(shares: list[int]) -> np.ndarray:
    """(P,) the corpus of each window of a period, P = sum(shares), all of which are above 0.

    After any number of windows every corpus is less than one window from its share: each of its windows comes after the
    place at which it would be one ahead and before that at which it would be one behind, and of those that may come now
    the most urgent does (earliest deadline first, which finds such an order since there is one).
    """
    period, counts, order = sum(shares), [0] * len(shares), []
    for place in range(period):
        may = [c for c, share in enumerate(shares) if counts[c] * period < share * (place + 1)]
        chosen = min(may, key=lambda c: (ceil(Fraction((counts[c] + 1) * period, shares[c])), c))
        counts[chosen] += 1
        order.append(chosen)
    return np.array(order)


def _opened(name: str, part: Any) -> Corpus:
    if not (isinstance(part, dict) and callable(part.get("corpus"))):
        raise ValueError(f"data.corpus.parts.{name} must be as a yaml of conf/data, with a corpus; got {part}")
    with _of_part(name):
        return part["corpus"]()


@contextmanager
def _of_part(name: str) -> Iterator[None]:
    """What is wrong is said to be this corpus's."""
    try:
        yield
    except NotPrepared:
        raise
    except ValueError as error:
        own = str(error).replace("data.corpus.", f"data.corpus.parts.{name}.corpus.")
        raise ValueError(f"data.corpus.parts.{name}: {own}") from error


def prepare_mixture(
    mixture: Mixture, dictionary: Dictionary, cache: Path, say: Callable[[str], None] = print, build: bool = True
) -> Prepared:
    """Each corpus prepared with the one dictionary. Raises ValueError as prepare does, and says of which corpus;
    build=False: as there.

    folder is the first corpus's, which has the dictionary; token_counts are scaled to the weights, as in training.
    """
    dictionary = _one_dictionary(mixture, dictionary, cache, say, build)
    parts = []
    for name, corpus in mixture.corpora.items():
        with _of_part(name):
            parts.append(Part(name, mixture.shares[name], prepare(corpus, dictionary, cache, say, build)))
    first, total = parts[0].prepared, sum(part.share for part in parts)
    sizes = [part.prepared.splits["train"]["tokens"] for part in parts]
    scaled = [part.prepared.token_counts * (sum(sizes) * part.share / total / size) for part, size in zip(parts, sizes)]
    counts = torch.stack(scaled).round().long().sum(0)
    fingerprint = digest_of([(part.name, part.share, part.prepared.fingerprint) for part in parts])
    splits = {split: _together(parts, split, first.vocab_size) for split in SPLITS}
    return Prepared(first.folder, fingerprint, first.vocab_size, counts, {}, splits, {}, tuple(parts))


def _one_dictionary(
    mixture: Mixture, dictionary: Dictionary, cache: Path, say: Callable[[str], None], build: bool
) -> Dictionary:
    """The dictionary, read from a file; it is trained on the mixture first if it is none that was made before."""
    if not is_trained(dictionary):
        return dictionary
    code = code_digest(mixture, *mixture.corpora.values(), dictionary)
    key = digest_of([mixture.digest(), dictionary.digest(), tokenizers.__version__, code])
    folder = cache / f"{key[:32]}.dictionary"
    if not build:
        if not (folder / "record.json").exists():
            for name, corpus in mixture.corpora.items():
                with _of_part(name):
                    foresee(corpus)
            raise NotPrepared(f"the mixture is not prepared in {cache}")
        return dataclasses.replace(dictionary, file=str(folder / "tokenizer.json"))  # type: ignore[type-var]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            read_record(folder / "record.json")
        except (ValueError, OSError):
            for name, corpus in mixture.corpora.items():
                with _of_part(name):
                    require_documents(corpus)
            say("preparing the mixture: making its dictionary")
            texts = (part.text for document in mixture.documents("train") for part in segments(document))
            (folder / "tokenizer.json").write_text(dictionary.make(texts).to_str())
            write_record(folder / "record.json", {}, ["tokenizer.json"])
    return dataclasses.replace(dictionary, file=str(folder / "tokenizer.json"))  # type: ignore[type-var]


def _together(parts: list[Part], split: str, vocab_size: int) -> dict[str, Any]:
    """The figures of a split of all corpora: sums, and the entropy of all tokens that count."""
    figures = [part.prepared.splits[split] for part in parts]
    sums = {key: sum(each[key] for each in figures) for key in figures[0] if key != "unigram_entropy"}
    counts = np.zeros(vocab_size, np.int64)
    for part in parts:
        tokens, mask = part.prepared.tokens[split], part.prepared.counted.get(split)
        counts += token_counts(vocab_size, tokens, mask)
    share = counts[counts > 0] / counts.sum()
    return sums | {"unigram_entropy": float(-(share * np.log(share)).sum())}
