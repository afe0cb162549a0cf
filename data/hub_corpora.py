"""Corpora of the hub: rows become plain documents or dialogues, and splits are drawn where a set has none."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data import comment_trees
from data.corpora import Document, compiled, join_lines
from data.dialogue import Form, Turn, alternate, key_of
from data.hub import HubFiles
from data.records import digest_of, file_digest
from data.splits import Division, shares_to_draw, text_key


@dataclass
class HubText:
    """Plain text of the hub: a row is a document, or a line of one.

    A new document begins at each row that the regular expression `document_start` matches, or after each row that is
    blank if `blank_row_ends` is set; with neither, each row is one. An empty row stands for the text `empty_row`.
    The rest: see data/hub.py:HubFiles. A split without files is a share of training, drawn by a hash.
    """

    repository: str
    revision: str
    files: dict[str, Any]
    text_field: str
    document_start: str | None
    blank_row_ends: bool
    empty_row: str
    validation_share: float
    test_share: float
    characters: int | None
    cache: str

    def __post_init__(self):
        self.starts = compiled(document_start=self.document_start)
        if self.starts and self.blank_row_ends:
            raise ValueError("data.corpus.document_start and blank_row_ends exclude each other; got both")
        columns, cache = [self.text_field], Path(self.cache)
        self.source = HubFiles(self.repository, self.revision, dict(self.files), columns, self.characters, cache)
        self.shares = shares_to_draw(self.validation_share, self.test_share, self.files.get)
        self.division = Division(self.shares, lambda split: map(text_key, self._texts(split)))

    def digest(self) -> str:
        options = [self.document_start, self.blank_row_ends, self.empty_row, self.shares]
        return digest_of([self.source.digest(), options])

    def documents(self, split: str) -> Iterator[Document]:
        part = split if self.files[split] else "train"
        for text in self._texts(part):
            if text.strip() and self.division.split_of(text_key(text), part) == split:
                yield text

    def _texts(self, part: str) -> Iterator[str]:
        if not self.files[part]:
            return
        texts = (row[self.text_field] or self.empty_row for row in self.source.rows(part))
        if self.blank_row_ends:
            yield from ("".join(rows) for blank, rows in groupby(texts, key=str.isspace) if not blank)
        elif self.starts:
            yield from join_lines(texts, self.starts)
        else:
            yield from texts


@dataclass
class HubDialogues:
    """Dialogues of the hub, made documents by data/dialogue.py:Form; `format` names what a row holds (see FORMATS).

    A split without files is a share of training, drawn by a hash of the dialogue, or of what it shares with others:
    its thread, its first turn. What only one speaker says is left out. The rest: see data/hub.py:HubFiles.
    """

    repository: str
    revision: str
    files: dict[str, Any]
    format: str
    responses: str
    max_turns: int | None
    mark: str
    validation_share: float
    test_share: float
    characters: int | None
    cache: str

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"data.corpus.format must be one of {', '.join(FORMATS)}; got {self.format}")
        self.form = Form(self.responses, self.max_turns, self.mark)
        columns, self.dialogues_of = FORMATS[self.format]
        self.source = HubFiles(
            self.repository, self.revision, dict(self.files), columns, self.characters, Path(self.cache)
        )
        self.shares = shares_to_draw(self.validation_share, self.test_share, self.files.get)
        self.division = Division(self.shares, lambda split: (key for key, _ in self._dialogues(split)))

    def digest(self) -> str:
        code = [file_digest(Path(__file__).with_name(name)) for name in ("dialogue.py", "comment_trees.py")]
        options = [self.format, self.responses, self.max_turns, self.mark, self.shares]
        return digest_of([self.source.digest(), options, code])

    def documents(self, split: str) -> Iterator[Document]:
        part = split if self.files[split] else "train"
        for key, turns in self._dialogues(part):
            if self.division.split_of(key, part) == split:
                yield from self.form.documents(turn for turn in turns if turn.text.strip())

    def _dialogues(self, part: str) -> "Dialogues":
        return self.dialogues_of(lambda: self.source.rows(part)) if self.files[part] else iter(())


Rows = Callable[[], Iterable[dict]]
Dialogues = Iterator[tuple[str, list[Turn]]]  # what decides the split, and the turns


def _each(turns_of: Callable[[dict], list[Turn]]) -> Callable[[Rows], Dialogues]:
    """A dialogue a row."""

    def dialogues(rows: Rows) -> Dialogues:
        for row in rows():
            turns = turns_of(row)
            yield key_of(turns), turns

    return dialogues


def _blended(row: dict) -> list[Turn]:
    """Two utterances to go on from, then the free and the guided speaker by turns."""
    said = [*row["previous_utterance"]]
    for free, guided in zip(row["free_messages"], row["guided_messages"]):
        said += [free, guided]
    said += row["free_messages"][len(row["guided_messages"]) :]
    return alternate(said)


def _persona(row: dict) -> list[Turn]:
    """The last history is the whole dialogue but its last utterance, which is the last of the candidates."""
    last = row["utterances"][-1]
    return alternate([*last["history"], last["candidates"][-1]])


def _empathetic(rows: Rows) -> Dialogues:
    """An utterance a row; those of a conversation stand together, in order, with _comma_ for a comma."""
    for _, said in groupby(rows(), key=lambda row: row["conv_id"]):
        turns = [Turn(str(row["speaker_idx"]), row["utterance"].replace("_comma_", ",")) for row in said]
        yield key_of(turns), turns


def _knowledge(rows: Rows) -> Dialogues:
    """A response a row: `input` holds the turns before it, a line each; a dialogue has a row for each response."""
    for row in rows():
        said = [line for line in row["input"].split("\n") if line.strip()]
        answers = [answer for answer in _fields(row["output"], "answer") if answer]
        if said and answers:
            turns = alternate([*said, answers[0]])
            yield key_of(turns[:1]), turns


def _fields(items: Any, key: str) -> list:
    """A list of objects, which `datasets` may also hold as an object of lists."""
    return items[key] if isinstance(items, dict) else [item[key] for item in items]


FORMATS: dict[str, tuple[list[str], Callable[[Rows], Dialogues]]] = {
    "dialog": (["dialog"], _each(lambda row: alternate(row["dialog"]))),
    "blended": (["previous_utterance", "free_messages", "guided_messages"], _each(_blended)),
    "persona": (["utterances"], _each(_persona)),
    "empathetic": (["conv_id", "speaker_idx", "utterance"], _empathetic),
    "knowledge": (["input", "output"], _knowledge),
    "comments": (comment_trees.COLUMNS, comment_trees.dialogues),
}
