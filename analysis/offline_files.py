"""wandb's offline files, runs/<run>/wandb/offline-run-<time>-<run>/run-<run>.wandb, also of a process that was killed.

The file is LevelDB's log with another magic word and checksum: 7 bytes of header, then blocks of 32 KiB that hold
chunks of (CRC-32 of kind and content, length, kind), little-endian, and a record is one whole chunk, or a first, some
middle and a last one. wandb 0.30 reads it in Go alone, so the chunks are read here and their content, protocol buffers,
by wandb's own classes. What a killed process had not yet written is lost, and a cut record ends the reading.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAGIC, FILE_HEADER, BLOCK, CHUNK_HEADER = b":W&B", 7, 32768, struct.Struct("<IHB")
WHOLE, LAST = 1, 4  # kinds of chunk that end a record


@dataclass
class Logged:
    """What one process logged of a run, or several processes in turn."""

    id: str
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # a row a step
    summary: dict[str, Any] = field(default_factory=dict)
    state: str = "stopped"  # as wandb's API calls it, and stopped where no process has said how it ended
    flaws: list[str] = field(default_factory=list)


def read_offline(paths: list[Path]) -> Logged:
    """One run from its files, in order of time: a run that was resumed has a file of each process.

    What the later one logged replaces the earlier one's rows from its first step on. ValueError for other files.
    """
    run = Logged(paths[0].stem.removeprefix("run-"))
    for path in paths:
        part = read_file(path)
        first = part.history[0]["_step"] if part.history else float("inf")
        run.history = [row for row in run.history if row["_step"] < first] + part.history
        run.config, run.summary, run.state = part.config or run.config, part.summary, part.state
        run.flaws += part.flaws
    return run


def read_file(path: Path) -> Logged:
    """What one process logged. ValueError if it is no wandb file."""
    # takes a second, and run folders can be analysed without; pyright sees no names in generated code
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    run, content = Logged(path.stem.removeprefix("run-")), path.read_bytes()
    if content and not content.startswith(MAGIC):
        raise ValueError(f"{path} is no wandb file: it begins with {content[:4]!r}, not {MAGIC!r}")
    for chunk in _records(content):
        if chunk is None:
            run.flaws.append(f"{path.parent.name} is cut")
            break
        record = Record.FromString(chunk)
        match record.WhichOneof("record_type"):
            case "run":
                _update(run.config, record.run.config.update)
            case "config":
                _update(run.config, record.config.update)
            case "history":
                row = {"_step": record.history.step.num}
                _update(row, record.history.item)
                run.history.append(row)
            case "summary":
                _update(run.summary, record.summary.update)
            case "exit":
                run.state = "failed" if record.exit.exit_code else "finished"
    return run


def _update(values: dict[str, Any], items: Any) -> None:
    """A key is a name or a path of names."""
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = values
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)


def _records(content: bytes) -> Iterator[bytes | None]:
    """The whole records in order, and None where the file is cut or damaged."""
    place, record = FILE_HEADER, b""
    while place < len(content):
        if BLOCK - place % BLOCK < CHUNK_HEADER.size:  # too little for a header: zeros
            place += BLOCK - place % BLOCK
            continue
        begin = place + CHUNK_HEADER.size
        if begin > len(content):
            break
        checksum, length, kind = CHUNK_HEADER.unpack(content[place:begin])
        chunk = content[begin : begin + length]
        if len(chunk) < length or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            break
        place, record = begin + length, record + chunk
        if kind in (WHOLE, LAST):
            yield record
            record = b""
    if place < len(content) or record:
        yield None
