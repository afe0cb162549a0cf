"""Sets on the Hugging Face hub: their rows are streamed once into a local copy, which a stopped run goes on with."""

import fcntl
import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.records import digest_of, file_digest
from data.splits import SPLITS

SAVE_EVERY = 2000  # rows between two notes of how far the stream has come
TIMEOUT = 10  # seconds for the hub's first answer: offline is known at once


@dataclass
class HubFiles:
    """Files of one repository, their columns, and how much of them. Nothing of a repository is ever executed.

    repository: a data set's name on the hub, or a folder with the same files (a snapshot made by other means).
    revision: a full commit, or the name of a branch: then the copy is of one commit of it, which it notes.
    files: for each split a glob within the repository, or None. characters: no more rows of a split once these have so
    many characters of text, None for all. folder: where copies stand.
    """

    repository: str
    revision: str
    files: dict[str, str | None]
    columns: list[str]
    characters: int | None
    folder: Path

    def __post_init__(self):
        if set(self.files) != set(SPLITS) or not self.files["train"]:
            raise ValueError(
                f"data.corpus.files must name train, validation and test, train by a glob; got {self.files}"
            )
        if self.characters is not None and self.characters < 1:
            raise ValueError(f"data.corpus.characters must be at least 1 or null; got {self.characters}")

    def digest(self) -> str:
        """Of a set on the hub all that chooses its rows, not the text; of a folder the files themselves."""
        content = {key: value for key, value in asdict(self).items() if key != "folder"}
        if (local := Path(self.repository).expanduser()).is_dir():
            found = {s: sorted(local.glob(glob)) if glob else [] for s, glob in self.files.items()}
            content["repository"] = {s: [file_digest(path) for path in paths] for s, paths in found.items()}
        return digest_of(content)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split that has files, {column: value}; they are copied first if they are not there yet.

        ValueError, one line, if they cannot be had: without `datasets`, offline, or from no such set, file or column.
        """
        with self._copied(split).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def _copied(self, split: str) -> Path:
        folder = self.folder.expanduser() / "hub" / self.digest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        path, note = folder / f"{split}.jsonl", folder / f"{split}.json"
        with (folder / f"{split}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state = _read_note(note)
            if state.get("sha256") is not None:
                if path.exists() and file_digest(path) == state["sha256"]:
                    return path
                state = {}  # damaged: made anew
            self._copy(split, path, note, state)
        return path

    def _copy(self, split: str, path: Path, note: Path, state: dict) -> None:
        """Stream rows to `path`, from where `state` says, or from the start if that was another commit or library, or
        if the rows noted there are not those in `path`."""
        versions = {"commit": self._commit(), "datasets": _library().__version__}
        path.touch()
        written = _digest_of_first(path, state.get("bytes", 0))
        if versions | {"written": written.hexdigest()} != {key: state.get(key) for key in (*versions, "written")}:
            state, written = {**versions, "stream": None, "bytes": 0, "rows": 0, "characters": 0}, hashlib.sha256()
        print(f"copying the {split} rows of {self.repository} to {path}, from row {state['rows']:,} on")
        if versions["commit"] not in ("", self.revision):
            print(f"{self.revision} is a branch; the same rows elsewhere: data.corpus.revision={versions['commit']}")
        stream = self._stream(split, versions["commit"])
        if state["stream"] is not None:
            stream.load_state_dict(state["stream"])
        with path.open("r+b") as file:
            file.truncate(state["bytes"])
            file.seek(state["bytes"])
            try:
                self._write(stream, state, file, written, note)
            except Exception as error:  # of the network, the hub, a file format: many libraries' own
                reason = f"{type(error).__name__}: {_first_line(error)}"
                at = f"{self.repository}: the stream broke after {state['rows']:,} rows of {split}"
                raise ValueError(f"{at}; start again and it goes on: {reason}") from error
        _write_note(note, state | {"sha256": written.hexdigest()})

    def _write(self, stream: Any, state: dict, file: Any, written: Any, note: Path) -> None:
        """written: the sha256 of the file so far, which goes on with it."""
        limit = self.characters or float("inf")
        iterator = iter(stream)
        try:
            while state["characters"] < limit and (row := next(iterator, None)) is not None:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
                file.write(line)
                written.update(line)
                state["rows"] += 1
                state["characters"] += count_characters(row)
                if state["rows"] % SAVE_EVERY == 0:
                    file.flush()
                    os.fsync(file.fileno())
                    reached = {"stream": stream.state_dict(), "bytes": file.tell(), "written": written.hexdigest()}
                    _write_note(note, state | reached)
        finally:
            iterator.close()

    def _commit(self) -> str:
        """The commit that the revision is now; a folder has none."""
        if Path(self.repository).expanduser().is_dir():
            return ""
        _library()
        from huggingface_hub import HfApi

        try:
            return str(
                HfApi().repo_info(self.repository, repo_type="dataset", revision=self.revision, timeout=TIMEOUT).sha
            )
        except Exception as error:  # httpx's, huggingface_hub's and the system's own
            remedy = "go online, or name a folder that holds its files: data.corpus.repository=FOLDER"
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise ValueError(f"{self.repository} at {self.revision} cannot be had: {remedy} ({reason})") from error

    def _stream(self, split: str, commit: str) -> Any:
        where = str(Path(self.repository).expanduser()) if not commit else self.repository
        options = {"data_files": {split: self.files[split]}, "split": split, "streaming": True}
        try:
            stream = _library().load_dataset(where, revision=commit or None, **options)
            return stream.select_columns(self.columns)
        except Exception as error:
            rule = f"must have files {self.files[split]} with the columns {', '.join(self.columns)}"
            raise ValueError(f"{self.repository} {rule}: {type(error).__name__}: {_first_line(error)}") from error


def count_characters(value: Any) -> int:
    """The characters of all texts in a row."""
    if isinstance(value, dict | list):
        return sum(map(count_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _library() -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("a corpus of the hub needs the library datasets: .venv/bin/python -m pip install -e '.[hub]'")
    import datasets

    return datasets


def _digest_of_first(path: Path, size: int) -> Any:
    """The sha256 of so many bytes of a file, of all if it has fewer."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(min(size, 1 << 20)):
            digest.update(part)
            size -= len(part)
    return digest


def _read_note(note: Path) -> dict:
    try:
        return json.loads(note.read_bytes())
    except (OSError, ValueError):  # none yet, or damaged: the copy is made anew
        return {}


def _write_note(note: Path, state: dict) -> None:
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps(state))
    partial.replace(note)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
