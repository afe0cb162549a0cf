"""Which split a document belongs to: one alone, whatever files it stands in."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

SPLITS = ("train", "validation", "test")


@dataclass
class Division:
    """Of all documents with one key no two are in different splits. The key is text_key of the text, a title, a
    thread, ...

    shares: of the training documents, drawn for validation and test by a hash of the key. keys_of: streams the keys of
    the documents in a split's own files, none if it has no files. What stands in the files of two splits is in test
    before it is in validation, and in training last.
    """

    shares: tuple[float, float]
    keys_of: Callable[[str], Iterable[str]]

    @cached_property
    def held_out(self) -> dict[int, str]:
        """Hash of a key -> the split in whose own files it is held out."""
        return {hash_of(key): split for split in ("validation", "test") for key in self.keys_of(split)}

    def split_of(self, key: str, part: str) -> str | None:
        """The split of a document in the files of `part`; None: it is left out, for another split has it."""
        owner = self.held_out.get(hash_of(key))
        if part != "train":
            return part if owner == part else None
        return draw_split(key, self.shares) if owner is None else None


def text_key(text: str) -> str:
    """Equal for texts of the same words, whatever blanks and line ends stand between these."""
    lines = (" ".join(line.split()) for line in text.splitlines())  # a document of a whole file has many words
    return " ".join(filter(None, lines))


def hash_of(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])


def draw_split(key: str, shares: tuple[float, float]) -> str:
    """The split that a document goes to, by its key's hash alone."""
    uniform = hash_of(key) / 2**64 if any(shares) else 1.0
    return "validation" if uniform < shares[0] else "test" if uniform < sum(shares) else "train"


def checked_shares(validation: float, test: float) -> tuple[float, float]:
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        named = f"validation_share={validation} and test_share={test}"
        raise ValueError(f"{named} must be at least 0 and leave something to train on")
    return float(validation), float(test)


def shares_to_draw(validation: float, test: float, has_files: Callable[[str], object]) -> tuple[float, float]:
    """The shares to draw from training: none for a split that has files of its own. Raises ValueError for bad ones."""
    validation, test = checked_shares(validation, test)
    return 0.0 if has_files("validation") else validation, 0.0 if has_files("test") else test
