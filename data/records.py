"""Digests, and a record: a JSON file that vouches for the files beside it and for itself."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: Path, content: dict[str, Any], names: Iterable[str]) -> None:
    """content, and the digests of these files of the same folder. Written last, it says that they are whole."""
    record = content | {"files": {name: file_digest(path.parent / name) for name in names}}
    path.write_text(json.dumps(record | {"sha256": digest_of(record)}, indent=1))


def read_record(path: Path) -> dict[str, Any]:
    """Its content and `files`, every byte of them verified. ValueError or OSError if anything is off."""
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict) or record.pop("sha256", None) != digest_of(record):
        raise ValueError(f"{path.name} is damaged")
    for name, digest in record["files"].items():
        if file_digest(path.parent / name) != digest:
            raise ValueError(f"{name} is damaged")
    return record
