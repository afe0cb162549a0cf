"""Dictionaries of bytes and byte pairs: decode(encode(text)) is the text, whatever it is; and what all have in common.

All of them keep ids 0 and 1 for the end and the begin of a document, and no text can spell these.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.dictionary_files import read_dictionary
from data.records import digest_of

END, BEGIN = 0, 1  # after every document; before the first token where a router looks back
SPECIAL = ["<|end|>", "<|begin|>"]
TRAIN_BYTES = 50_000_000  # merges hardly change with more text, time and memory do
PIECE = 1 << 16  # characters

# Pre-tokenization never joins a visible character and the space after it, so cutting here changes no token.
_SEAM = re.compile(r"(?<=\S)(?=[ \n])")
_WIDE = re.compile(r"\s ")  # a space that is not after a visible character
_BETWEEN_SEAMS = re.compile(r"\s*\S+(?:[^\S \n]\s*\S+)*(?:[^\S \n]\s*\Z)?|\s+")


class Dictionary(Protocol):
    """What a yaml of the group `tokenizer` describes. Raises ValueError, when made, for what cannot be."""

    def digest(self) -> str:
        """Of all that decides the tokenizer, beside the text and the library."""
        ...

    def size(self) -> int | None:
        """Its entries; None if that is known only from the text."""
        ...

    def make(self, texts: Iterable[str]) -> Tokenizer:
        """Trained on these texts, or loaded. Raises ValueError if they are too short."""
        ...


def is_trained(dictionary: Dictionary) -> bool:
    """On the text; else it is loaded, or the same for every text."""
    return getattr(dictionary, "file", "none needed") is None


@dataclass
class BytePairs:
    """Byte-level BPE of exactly vocab_size entries, from the first TRAIN_BYTES of the text; or that of a file."""

    vocab_size: int
    file: str | None

    def __post_init__(self):
        if self.vocab_size < 258:
            rule = "must be at least 258, for 256 bytes and 2 special ids"
            raise ValueError(f"data.vocab_size {rule}; got {self.vocab_size}")
        self.loaded = read_dictionary(self.file, SPECIAL, [_byte_level(models.BPE())]) if self.file else None

    def digest(self) -> str:
        return digest_of(["byte pairs", self.loaded.to_str() if self.loaded else self.vocab_size])

    def size(self) -> int:
        return self.loaded.get_vocab_size() if self.loaded else self.vocab_size

    def make(self, texts: Iterable[str]) -> Tokenizer:
        return self.loaded or train_tokenizer(texts, self.vocab_size)


@dataclass
class Bytes:
    """A token is a byte of UTF-8, and byte b is id b + 2."""

    def digest(self) -> str:
        return digest_of("bytes")

    def size(self) -> int:
        return 258

    def make(self, texts: Iterable[str]) -> Tokenizer:
        """The texts are not looked at."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()  # visible bytes stand for themselves, others in order from 256
        others = iter(range(256, 512))
        letters = [chr(byte) if chr(byte) in alphabet else chr(next(others)) for byte in range(256)]
        return _byte_level(models.BPE({name: place for place, name in enumerate(SPECIAL + letters)}, []))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE of exactly `vocab_size` entries from the first TRAIN_BYTES of the text; ValueError if they cannot be had."""
    tokenizer = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **options)
    tokenizer.train_from_iterator(_first_pieces(texts), trainer)
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"data.vocab_size={vocab_size}: the training text is too short, it yields {reached} entries")
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared corpus."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # the file does not keep it
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def cut(text: str) -> Iterator[str]:
    """Pieces of PIECE to 2 * PIECE characters that encode as the whole does: memory stays bounded, all cores busy."""
    start = 0
    while start < len(text):
        seam = _SEAM.search(text, start + PIECE, start + 2 * PIECE)
        end = seam.start() if seam else start + 2 * PIECE  # a text without a space to cut at may get a token more
        yield text[start:end]
        start = end


def units(text: str) -> list[str]:
    """The text, cut where that changes no token: mostly words with the space before them."""
    if _WIDE.search(text):
        return _BETWEEN_SEAMS.findall(text)
    first, *rest = text.split(" ")  # the same but for line ends, which stay inside, and several times as fast
    return [*([first] if first else []), *[" " + word for word in rest]]


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True  # text that spells "<|end|>" must not become id 0
    return tokenizer


def _first_pieces(texts: Iterable[str]) -> Iterator[str]:
    left = TRAIN_BYTES
    for piece in chain.from_iterable(map(cut, texts)):
        left -= len(piece.encode())
        if left < 0:
            return
        yield piece
