"""Where text comes from: a corpus streams the documents of a split, and digests all that decides them."""

import glob
import gzip
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data.records import digest_of, file_digest
from data.splits import SPLITS, Division, checked_shares, draw_split, hash_of, shares_to_draw, text_key


class Segment(NamedTuple):
    """A part of a document: what is encoded, and whether its tokens enter the loss."""

    text: str
    counted: bool


Document = str | tuple[Segment, ...]  # of a plain text every token counts


class Corpus(Protocol):
    def documents(self, split: str) -> Iterator[Document]:
        """Streams the documents of "train", "validation" or "test", every time the same."""
        ...

    def digest(self) -> str:
        """Of all that decides the documents, beside the code of the class."""
        ...


def segments(document: Document) -> tuple[Segment, ...]:
    return (Segment(document, True),) if isinstance(document, str) else document


@dataclass
class StandardLibrary:
    """The source text of the running Python's own standard library. A file is one document, in one split; equal files
    are in that of the first."""

    validation_share: float
    test_share: float

    left_out = re.compile(  # packages installed beside it, tests, what the build wrote, and generated tables
        r"(.*/)?((site|dist)-packages|tests?|idle_test|__pycache__|lib-dynload|config-[^/]*|encodings|pydoc_data)"
        r"|(.*/)?_sysconfigdata[^/]*|(site|user)customize\.py|html/entities\.py|stringprep\.py|re/_casefix\.py"
        r"|(token|keyword|_opcode_metadata)\.py"
    )

    def __post_init__(self):
        self.shares = checked_shares(self.validation_share, self.test_share)
        self.root = Path(sysconfig.get_path("stdlib"))
        self.paths = sorted(path for path in self._walk("") if path.endswith(".py"))
        if not self.paths:
            raise ValueError(f"the standard library in {self.root} holds no source text")

    def digest(self) -> str:
        return digest_of([self.shares, [(name, file_digest(self.root / name)) for name in self.paths]])

    def documents(self, split: str) -> Iterator[str]:
        splits: dict[int, str] = {}
        for name in self.paths:
            text = (self.root / name).read_bytes().decode()
            if splits.setdefault(hash_of(text_key(text)), draw_split(name, self.shares)) == split:
                yield text

    def _walk(self, folder: str) -> Iterator[str]:
        for entry in os.scandir(self.root / folder):
            path = f"{folder}{entry.name}"
            if not self.left_out.fullmatch(path):
                yield from self._walk(f"{path}/") if entry.is_dir(follow_symlinks=False) else [path]


@dataclass
class TextFiles:
    """The user's files, by a glob or several, in the order of their paths: plain or .jsonl, also .gz or .xz.

    A plain file is one document; with the regular expression `document_start`, one begins at each line it matches.
    A line of .jsonl is an object with one in `text_field`. Held out are files of their own or shares drawn by a hash of
    the text; validation_more, test_more: besides, so many titles of the training files, those with the lowest hashes.
    A document's title is its first line that is not blank. What stands in the files of two splits is left out of one
    (see Division): texts of the same words or, with validation_more or test_more, documents of one title.
    Raises ValueError for what cannot be read or drawn.
    """

    files: str | Iterable[str]
    validation_files: str | Iterable[str] | None
    test_files: str | Iterable[str] | None
    validation_share: float
    test_share: float
    document_start: str | None
    text_field: str
    validation_more: int
    test_more: int

    def __post_init__(self):
        if min(self.validation_more, self.test_more) < 0:
            named = f"validation_more={self.validation_more} and test_more={self.test_more}"
            raise ValueError(f"data.corpus.{named} must not be negative")
        self.paths = split_paths(self.files, self.validation_files, self.test_files)
        self.shares = shares_to_draw(self.validation_share, self.test_share, self.paths.get)
        self.starts = compiled(document_start=self.document_start)
        self.division = Division(self.shares, lambda split: map(self._key, self._texts(split)))

    def digest(self) -> str:
        more = [self.validation_more, self.test_more]
        return digest_of([self.shares, more, self.document_start, self.text_field, paths_digest(self.paths)])

    def documents(self, split: str) -> Iterator[str]:
        only_own = self.paths[split] and split not in self.drawn.values()
        for part in dict.fromkeys([split] if only_own else [split, "train"]):
            for text in self._texts(part):
                if self._split_of(text, part) == split:
                    yield text

    @cached_property
    def drawn(self) -> dict[int, str]:
        """Title's hash -> the held-out split that its documents of the training files go to."""
        wanted, lowest = self.validation_more + self.test_more, set()
        for text in self._texts("train") if wanted else ():
            if text and not text.isspace() and (title := hash_of(self._key(text))) not in self.division.held_out:
                lowest.add(title)
            if len(lowest) > 2 * wanted + 1000:  # however long the corpus is
                lowest = set(nsmallest(wanted, lowest))
        if len(lowest) < wanted:
            named = f"validation_more={self.validation_more} and test_more={self.test_more}"
            raise ValueError(f"data.corpus.{named}: the training files have but {len(lowest)} titles")
        splits = ["validation"] * self.validation_more + ["test"] * self.test_more
        return dict(zip(sorted(lowest), splits))

    def _split_of(self, text: str, part: str) -> str | None:
        key = self._key(text)
        drawn = self.drawn.get(hash_of(key)) if part == "train" else None
        return drawn or self.division.split_of(key, part)

    def _key(self, text: str) -> str:
        """What decides the split of a text: its title, or all of it."""
        return text_key(text.strip().partition("\n")[0] if self.validation_more + self.test_more else text)

    def _texts(self, part: str) -> Iterator[str]:
        return (text for path in self.paths[part] for text in self._read(path))

    def _read(self, path: Path) -> Iterator[str]:
        if path.name.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
            yield from (self._text_in(line, path, number) for number, line in read_lines(path) if not line.isspace())
            return
        yield from join_lines((line for _, line in read_lines(path)), self.starts)

    def _text_in(self, line: str, path: Path, number: int) -> str:
        try:
            text = parsed(line)[self.text_field]
            text.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 holds
            return text
        except BAD_LINE as error:
            rule = f"must be a JSON object with a string {self.text_field!r}"
            raise ValueError(f"{path}, line {number}: {rule}: {reason(error)}") from error


BAD_LINE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what reading a line can raise


def parsed(line: str) -> Any:
    """What a line of JSON holds. ValueError if it is none."""
    try:
        return json.loads(line.strip())
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" starting at")
        raise ValueError(f"it is no JSON, or cut off: {what} at character {error.pos + 1}") from error


def reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def compiled(**option: str | None) -> re.Pattern[str] | None:
    """The regular expression that an option gives, if it gives one."""
    [(name, pattern)] = option.items()
    try:
        return re.compile(pattern) if pattern is not None else None
    except re.error as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from error


def join_lines(lines: Iterable[str], start: re.Pattern[str] | None) -> Iterator[str]:
    """Documents of lines: one begins at each line that `start` matches."""
    document: list[str] = []
    for line in lines:
        if document and start and start.search(line.rstrip("\r\n")):
            yield "".join(document)
            document = []
        document.append(line)
    yield "".join(document)


def paths_digest(paths: dict[str, list[Path]]) -> dict:
    """What files hold and how they are read, wherever they lie."""
    return {split: [(path.suffixes[-2:], file_digest(path)) for path in paths[split]] for split in SPLITS}


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Streams (number from 1, line) of a UTF-8 file; line ends stay as they are, a byte order mark goes."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}, line {number}: damaged, or not UTF-8: {error}") from error


def split_paths(*globs: str | Iterable[str] | None) -> dict[str, list[Path]]:
    """The files of training, validation and test, none of them in two splits."""
    paths = {split: find_files(patterns) for split, patterns in zip(SPLITS, globs, strict=True)}
    for path, count in Counter(path for found in paths.values() for path in found).items():
        if count > 1:
            raise ValueError(f"{path} is named in two splits")
    return paths


def find_files(globs: str | Iterable[str] | None) -> list[Path]:
    found: set[str] = set()
    for pattern in [] if globs is None else globs if isinstance(globs, list | tuple) else [globs]:
        if not isinstance(pattern, str):
            raise ValueError(f"data.corpus files must be globs; got {pattern!r}")
        names = list(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))
        if not names:
            raise ValueError(f"no file matches {pattern!r}")
        found.update(map(os.path.abspath, names))
    # Part 9 before part 10; what numbers do not order (a1, a01) stays in the order of the text.
    parts = {name: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", name)] for name in sorted(found)}
    return [Path(name) for name in sorted(parts, key=parts.__getitem__)]
