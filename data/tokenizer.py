"""Byte-level BPE: decode(encode(text)) is the text, whatever it is, and ids 0 and 1 never come from text."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END, BEGIN = 0, 1  # after every document; before the first token where a router looks back
SPECIAL = ["<|end|>", "<|begin|>"]
SMALLEST = 256 + len(SPECIAL)  # every byte must have an id
TRAIN_BYTES = 50_000_000  # merges hardly change with more text, time and memory do
PIECE = 1 << 16  # characters

# Pre-tokenization never joins a visible character and the space after it, so cutting here changes no token.
_SEAM = re.compile(r"(?<=\S)(?=[ \n])")


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """BPE of exactly `vocab_size` entries, trained on at most TRAIN_BYTES of the text, evenly taken.

    ValueError if vocab_size is below 258 or the text has too few repeated pairs to fill it.
    """
    if not isinstance(vocab_size, int) or vocab_size < SMALLEST:
        rule = f"at least {SMALLEST}: 256 bytes and {len(SPECIAL)} special ids"
        raise ValueError(f"vocab_size={vocab_size!r} must be {rule}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = sample_evenly((piece for text in documents for piece in cut(text)), TRAIN_BYTES)
    tokenizer.train_from_iterator(sample, trainer)
    if (reached := tokenizer.get_vocab_size()) != vocab_size:
        rule = f"the training text is too short for it, it yields {reached} entries"
        raise ValueError(f"vocab_size={vocab_size}: {rule}")
    return _keep_text_text(tokenizer)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a prepared corpus, from its tokenizer.json."""
    return _keep_text_text(Tokenizer.from_file(str(folder / "tokenizer.json")))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def cut(text: str) -> Iterator[str]:
    """Pieces of PIECE to 2 * PIECE characters (the last one shorter) that encode as the whole text does.

    They keep memory bounded and all cores busy when one document is as long as a corpus. Only a text without
    a space for PIECE characters is cut elsewhere: it may get a token more, and still decodes to itself.
    """
    start = 0
    while start < len(text):
        seam = _SEAM.search(text, start + PIECE, start + 2 * PIECE)
        end = seam.start() if seam else start + 2 * PIECE
        yield text[start:end]
        start = end


def sample_evenly(texts: Iterable[str], limit: int) -> list[str]:
    """Every text, every 2nd, every 4th, ...: the most that stays within `limit` UTF-8 bytes, in one pass."""
    kept: list[str] = []
    size, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        size += len(text.encode())
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(len(text.encode()) for text in kept)
    return kept


def _keep_text_text(tokenizer: Tokenizer) -> Tokenizer:
    """Text that spells "<|end|>" must not become id 0; tokenizer.json does not keep this setting."""
    tokenizer.encode_special_tokens = True
    return tokenizer
