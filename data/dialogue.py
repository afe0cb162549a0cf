"""Dialogues of the user's own files become context and response: marked turns, of which the responses count."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from data.corpora import BAD_LINE, Document, Segment, find_files, parsed, paths_digest, read_lines, reason, split_paths
from data.records import digest_of
from data.splits import Division, hash_of, shares_to_draw, text_key

RESPONSES = ("last", "others", "all")


class Turn(NamedTuple):
    """What one speaker says before another one speaks."""

    speaker: str
    text: str
    again: bool = False  # an earlier document of the same corpus counts it already


@dataclass
class Form:
    """How turns become a document.

    Speakers are numbered from 1 in the order of their first words; a turn is `mark` with that number in place of {}, a
    space, the text, and a line end unless it is the last. White space within a turn becomes single spaces, and what a
    speaker says in a row is one turn. Counted are the text and the line end of a response, never a mark.
    responses: "last": the last turn; "others": the turns of all speakers but the first one; "all": all turns but the
    first.
    max_turns: longer dialogues are cut into even parts of at most so many turns; None leaves them whole.
    """

    responses: str
    max_turns: int | None
    mark: str

    def __post_init__(self):
        if self.responses not in RESPONSES:
            raise ValueError(f"data.corpus.responses must be one of {', '.join(RESPONSES)}; got {self.responses}")
        if self.max_turns is not None and self.max_turns < 3:  # of 3 turns in parts of 2 one would be alone
            raise ValueError(f"data.corpus.max_turns must be at least 3 or null; got {self.max_turns}")
        if self.mark.count("{}") != 1:
            raise ValueError(f"data.corpus.mark must hold one {{}} for the speaker's number; got {self.mark!r}")

    def documents(self, turns: Iterable[Turn]) -> Iterator[Document]:
        """The documents of a dialogue: none if fewer than two turns are left of it, so that no response could be."""
        merged = [_join(list(said)) for _, said in groupby(turns, key=lambda turn: turn.speaker)]
        parts = max(-(-len(merged) // (self.max_turns or len(merged) or 1)), 1)
        borders = [part * len(merged) // parts for part in range(parts + 1)]
        for first, last in zip(borders, borders[1:]):
            if last - first > 1:
                yield self._segments(merged[first:last])

    def _segments(self, turns: list[Turn]) -> tuple[Segment, ...]:
        number = {speaker: place for place, speaker in enumerate(dict.fromkeys(turn.speaker for turn in turns), 1)}
        pieces: list[Segment] = []
        for place, (speaker, text, again) in enumerate(turns):
            last = place == len(turns) - 1
            is_response = {"last": last, "others": number[speaker] > 1, "all": place > 0}[self.responses]
            pieces.append(Segment(self.mark.replace("{}", str(number[speaker])), False))
            pieces.append(Segment(f" {text}" if last else f" {text}\n", is_response and not again))
        runs = groupby(pieces, key=lambda piece: piece.counted)
        return tuple(Segment("".join(piece.text for piece in run), counted) for counted, run in runs)


@dataclass
class Dialogues:
    """The user's dialogues, by a glob or several: plain, .gz or .xz; held out are files of their own or drawn shares.

    format, of a file: "turns": each line a JSON object with "turns", lists that begin with the speaker and end with the
    text; "eou": each line a dialogue of two, whose turns end with __eou__; "utterances": a JSON list of objects with
    "dialogue", the utterances of two, and "response", the last one. A share is drawn by a hash of the whole dialogue,
    before it is cut, from the files of `draw_from` alone if that is given. What stands in the files of two splits is
    left out of one (see Division), what is drawn for one also of the training files that are not drawn from.
    What only one speaker says is left out. ValueError with file and line for what is damaged, no UTF-8 or no dialogue.
    """

    files: str | Iterable[str]
    format: str
    validation_files: str | Iterable[str] | None
    test_files: str | Iterable[str] | None
    validation_share: float
    test_share: float
    draw_from: str | Iterable[str] | None
    responses: str
    max_turns: int | None
    mark: str

    def __post_init__(self):
        if self.format not in READERS:
            raise ValueError(f"data.corpus.format must be one of {', '.join(READERS)}; got {self.format}")
        self.form = Form(self.responses, self.max_turns, self.mark)
        self.paths = split_paths(self.files, self.validation_files, self.test_files)
        self.shares = shares_to_draw(self.validation_share, self.test_share, self.paths.get)
        self.division = Division(self.shares, lambda split: map(key_of, self._dialogues(self.paths[split])))
        self.drawn_from = self.paths["train"] if self.draw_from is None else find_files(self.draw_from)
        if strange := set(self.drawn_from) - set(self.paths["train"]):
            raise ValueError(f"data.corpus.draw_from must name training files alone; got {min(strange)}")

    def digest(self) -> str:
        drawn = [self.paths["train"].index(path) for path in self.drawn_from]
        options = [self.format, self.responses, self.max_turns, self.mark]
        return digest_of([self.shares, drawn, options, paths_digest(self.paths)])

    def documents(self, split: str) -> Iterator[Document]:
        part = split if self.paths[split] else "train"
        for path in self.paths[part]:
            for turns in self._read(path):
                if self._split_of(turns, path, part) == split:
                    yield from self.form.documents(turns)

    def _split_of(self, turns: list[Turn], path: Path, part: str) -> str | None:
        key = key_of(turns)
        split = self.division.split_of(key, part)
        if part == "train" and split != "train" and path not in self.drawn_from:
            return None if hash_of(key) in self._drawn else split and "train"
        return split

    @cached_property
    def _drawn(self) -> set[int]:
        """Hashes of the dialogues that shares are drawn from."""
        return {hash_of(key_of(turns)) for turns in self._dialogues(self.drawn_from)}

    def _dialogues(self, paths: list[Path]) -> Iterator[list[Turn]]:
        return (turns for path in paths for turns in self._read(path))

    def _read(self, path: Path) -> Iterator[list[Turn]]:
        """The dialogues of a file, each checked."""
        empty = True
        for place, found in READERS[self.format](path):
            try:
                turns = found()
                check(turns)
            except BAD_LINE as error:
                raise ValueError(f"{path}, {place}: no dialogue of format={self.format}: {reason(error)}") from error
            if len({turn.speaker for turn in turns}) > 1:  # else nothing in it is a response
                empty = False
                yield turns
        if empty:
            raise ValueError(f"{path} holds no dialogue of two speakers or more")


def _join(said: list[Turn]) -> Turn:
    text = " ".join(word for turn in said for word in turn.text.split())
    return Turn(said[0].speaker, text, all(turn.again for turn in said))


def key_of(turns: Iterable[Turn]) -> str:
    """Equal for dialogues of the same words in the same turns, whoever speaks."""
    return "\n".join(text_key(turn.text) for turn in turns)


def alternate(utterances: Iterable[Any]) -> list[Turn]:
    """The turns of two speakers by turns."""
    return [Turn(str(place % 2), text) for place, text in enumerate(utterances)]


def check(turns: list[Turn]) -> None:
    """ValueError unless these are turns with text."""
    if not turns:
        raise ValueError("it is empty")
    for place, (_, text, _) in enumerate(turns, 1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"turn {place} must be a text; got {str(text)[:40]!r}")
        text.encode()  # JSON can spell half of a surrogate pair, which no UTF-8 holds


def _read_turns(path: Path) -> "Places":
    def turns(line: str) -> list[Turn]:
        found = parsed(line)["turns"]
        if not isinstance(found, list):
            raise ValueError(f"turns must be a list; got {str(found)[:40]!r}")
        for place, turn in enumerate(found, 1):
            if not isinstance(turn, list) or len(turn) < 2:
                raise ValueError(f"turn {place} must be a list of a speaker and a text; got {str(turn)[:40]!r}")
        return [Turn(str(turn[0]), turn[-1]) for turn in found]

    for number, line in read_lines(path):
        if not line.isspace():
            yield f"line {number}", lambda line=line: turns(line)


def _read_eou(path: Path) -> "Places":
    def turns(line: str) -> list[Turn]:
        *texts, rest = line.split("__eou__")
        if rest.strip():
            raise ValueError(f"its last turn must end with __eou__; got {rest.strip()[-40:]!r}")
        return alternate(texts)

    for number, line in read_lines(path):
        if not line.isspace():
            yield f"line {number}", lambda line=line: turns(line)


def _read_utterances(path: Path) -> "Places":
    def turns(item: dict) -> list[Turn]:
        if not isinstance(item["dialogue"], list):
            raise ValueError(f"dialogue must be a list; got {str(item['dialogue'])[:40]!r}")
        return alternate([*item["dialogue"], item["response"]])

    try:
        items = json.loads("".join(line for _, line in read_lines(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {getattr(error, 'lineno', 1)}: no JSON: {error}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}, line 1: must hold a JSON list of dialogues; got {str(items)[:40]!r}")
    for number, item in enumerate(items, 1):
        yield f"dialogue {number}", lambda item=item: turns(item)


Places = Iterator[tuple[str, Callable[[], list[Turn]]]]  # where a dialogue stands in its file, and what makes its turns
READERS = {"turns": _read_turns, "eou": _read_eou, "utterances": _read_utterances}
