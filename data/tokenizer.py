"""Byte-level BPE: decode(encode(text)) is the text, whatever it is, and ids 0 and 1 never come from text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END, BEGIN = 0, 1  # after every document; before the first token where a router looks back
SPECIAL = ["<|end|>", "<|begin|>"]
TRAIN_BYTES = 50_000_000  # merges hardly change with more text, time and memory do
PIECE = 1 << 16  # characters

# Pre-tokenization never joins a visible character and the space after it, so cutting here changes no token.
_SEAM = re.compile(r"(?<=\S)(?=[ \n])")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE of exactly `vocab_size` entries from the first TRAIN_BYTES of the text; ValueError if they cannot be had."""
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size} must be at least 258: 256 bytes and 2 special ids")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **options)
    tokenizer.train_from_iterator(_first_pieces(documents), trainer)
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(f"data.vocab_size={vocab_size}: the training text is too short, it yields {reached} entries")
    tokenizer.encode_special_tokens = True  # text that spells "<|end|>" must not become id 0
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


def _first_pieces(documents: Iterable[str]) -> Iterator[str]:
    left = TRAIN_BYTES
    for piece in chain.from_iterable(map(cut, documents)):
        left -= len(piece.encode())
        if left < 0:
            return
        yield piece
