"""Where text comes from: a corpus gives a digest of its source and, for each split, a stream of documents."""

import codecs
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

SPLITS = ("train", "validation", "test")


class Corpus(Protocol):
    """digest() covers what decides the documents: bytes and options, not paths. documents() repeats."""

    def digest(self) -> str: ...
    def documents(self, split: str) -> Iterator[str]: ...


class StandardLibrary:
    """The source text of the running Python's own standard library. A file is one document, in one split.

    Left out, so that it is text that people wrote, the same wherever this version of Python is installed:
    what was installed beside it (site-packages, sitecustomize), tests (half of it, and much of that data),
    what the build wrote (_sysconfigdata, config-*, lib-dynload, __pycache__), and generated tables (the code
    pages of encodings, pydoc_data, html/entities, stringprep, re/_casefix, token, keyword, _opcode_metadata).
    """

    left_out = re.compile(
        r"(.*/)?((site|dist)-packages|tests?|idle_test|__pycache__|lib-dynload|config-[^/]*|encodings|pydoc_data)"
        r"|(.*/)?_sysconfigdata[^/]*|(site|user)customize\.py|html/entities\.py|stringprep\.py|re/_casefix\.py"
        r"|(token|keyword|_opcode_metadata)\.py"
    )

    def __init__(self, validation_share: float, test_share: float):
        self.shares = _checked_shares(validation_share, test_share)
        self.root = Path(sysconfig.get_path("stdlib"))
        self.files = sorted(path for path in self._walk("") if path.endswith(".py"))
        if not self.files:
            raise ValueError(f"the standard library in {self.root} holds no source text")

    def digest(self) -> str:
        return digest_of([self.shares, [(name, file_digest(self.root / name)) for name in self.files]])

    def documents(self, split: str) -> Iterator[str]:
        for name in self.files:
            if _draw_split(name, self.shares) == split:
                yield "".join(line for _, line in _read_lines(self.root / name))

    def _walk(self, folder: str) -> Iterator[str]:
        for entry in os.scandir(self.root / folder):
            path = f"{folder}{entry.name}"
            if not self.left_out.fullmatch(path):
                yield from self._walk(f"{path}/") if entry.is_dir(follow_symlinks=False) else [path]


class TextFiles:
    """The user's files: plain text or .jsonl (an object a line, its text in `text_field`), also .gz or .xz.

    `files` is a glob or a list of them (`**` and `~` work); they are read by path, "part 2" before "part 10".
    A plain file is one document or, given the regular expression `document_start`, has one begin at each line
    that it matches. Validation and test documents come from their own files where those are named, else they
    are their share of the documents of `files`, drawn by a hash.
    ValueError for a glob without files, a file in two splits, and text that is not what its name promises.
    """

    def __init__(
        self,
        files: str | Iterable[str],
        validation_files: str | Iterable[str] | None,
        test_files: str | Iterable[str] | None,
        validation_share: float,
        test_share: float,
        document_start: str | None,
        text_field: str,
    ):
        globs = {"train": files, "validation": validation_files, "test": test_files}
        self.files = {split: _find_files(globs[split]) for split in SPLITS}
        validation, test = _checked_shares(validation_share, test_share)
        self.shares = (0.0 if self.files["validation"] else validation, 0.0 if self.files["test"] else test)
        self.document_start, self.text_field = document_start, text_field
        try:
            self._starts = re.compile(str(document_start)) if document_start is not None else None
        except re.error as error:
            raise ValueError(f"document_start={document_start!r} is no regular expression: {error}") from error
        split_of: dict[Path, str] = {}
        for split, paths in self.files.items():
            for path in paths:
                if (other := split_of.setdefault(path.resolve(), split)) != split:
                    raise ValueError(f"{path} is named in two splits, {other} and {split}")

    def digest(self) -> str:
        files = {split: [(_kind(path), file_digest(path)) for path in self.files[split]] for split in SPLITS}
        return digest_of([self.shares, self.document_start, self.text_field, files])

    def documents(self, split: str) -> Iterator[str]:
        if split != "train" and self.files[split]:
            yield from self._read(split)
            return
        for index, text in enumerate(self._read("train")):
            if _draw_split(f"{index} {text[:64]}", self.shares) == split:
                yield text

    def _read(self, split: str) -> Iterator[str]:
        for path in self.files[split]:
            yield from self._json_documents(path) if ".jsonl" in _kind(path) else self._plain_documents(path)

    def _plain_documents(self, path: Path) -> Iterator[str]:
        document: list[str] = []
        for _, line in _read_lines(path):
            if document and self._starts and self._starts.search(line.rstrip("\r\n")):
                yield "".join(document)
                document = []
            document.append(line)
        yield "".join(document)

    def _json_documents(self, path: Path) -> Iterator[str]:
        for number, line in _read_lines(path):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[self.text_field]
                text.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 holds
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                rule = f"must be a JSON object with a string {self.text_field!r}"
                raise ValueError(f"{path}, line {number}: {rule}: {type(error).__name__}: {error}") from error
            yield text


def digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kind(path: Path) -> str:
    """The end of a name that decides how the file is read: "", ".gz", ".jsonl", ".jsonl.xz" and so on."""
    stem = path.name.removesuffix(".gz").removesuffix(".xz").removesuffix(".jsonl")
    return path.name.removeprefix(stem)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Streams (number from 1, line) of a UTF-8 file; line ends stay as they are, a byte order mark goes."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path}, after line {number}: damaged {path.suffix} file: {error}") from error


def _find_files(globs: str | Iterable[str] | None) -> list[Path]:
    """Every file that one of the globs names, once, numbers in the path in numeric order."""
    found: dict[str, str] = {}
    for pattern in [globs] if isinstance(globs, str) else globs or []:
        name = os.path.expanduser(pattern)
        matches = [name] if os.path.isfile(name) else filter(os.path.isfile, glob.glob(name, recursive=True))
        if not (named := {os.path.realpath(path): path for path in sorted(matches, reverse=True)}):
            raise ValueError(f"no file matches {pattern!r}")
        found = named | found
    return sorted(map(Path, found.values()), key=_natural_order)


def _natural_order(path: Path) -> tuple[list[str | int], str]:
    parts = re.split("([0-9]+)", str(path))
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], str(path)


def _checked_shares(validation: float, test: float) -> tuple[float, float]:
    numbers = all(isinstance(share, int | float) and share >= 0 for share in (validation, test))
    if not numbers or not validation + test < 1:
        named = f"validation_share={validation!r} and test_share={test!r}"
        raise ValueError(f"{named} must be numbers of at least 0 that leave something to train on")
    return float(validation), float(test)


def _draw_split(name: str, shares: tuple[float, float]) -> str:
    uniform = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    return "validation" if uniform < shares[0] else "test" if uniform < sum(shares) else "train"
