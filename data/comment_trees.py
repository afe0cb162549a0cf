"""Comments that answer each other (as in the pushshift dumps of Reddit) become the dialogues of their threads."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator

from data.dialogue import Turn

COLUMNS = ["id", "parent_id", "link_id", "author", "body"]
GONE = ("[deleted]", "[removed]")
PART = 1 << 28  # characters of comments whose trees are in memory at once: below 1 GB


def dialogues(rows: Callable[[], Iterable[dict]]) -> Iterator[tuple[str, list[Turn]]]:
    """(thread, path) for each path from a root to a leaf, thread by thread, in the order of the rows.

    rows: gives all comments, each time it is called: `id`, `parent_id` (of a comment: t1_<id>), `link_id` (the thread),
    `author` and `body`. A root answers no comment that is there: deleted ones are left out, and what answers them
    begins a path. A comment on several paths is marked as said before on all but the first: each counts once at most.
    """
    size = sum(len(row["body"] or "") for row in rows())
    parts = size // PART + 1
    for part in range(parts):
        threads: dict[str, list[dict]] = {}
        for row in rows():
            if zlib.crc32(row["link_id"].encode()) % parts == part and (row["body"] or "").strip() not in ("", *GONE):
                threads.setdefault(row["link_id"], []).append(row)
        for thread, comments in threads.items():
            yield from ((thread, path) for path in paths(comments))


def paths(comments: list[dict]) -> Iterator[list[Turn]]:
    """The paths of one thread, depth first, answers in the order of the comments."""
    known = {comment["id"] for comment in comments}
    answers: dict[str | None, list[dict]] = {}
    for comment in comments:
        parent = comment["parent_id"].removeprefix("t1_")
        answers.setdefault(parent if parent in known else None, []).append(comment)
    path: list[Turn] = []
    to_visit = [(0, comment) for comment in reversed(answers.get(None, []))]
    while to_visit:
        depth, comment = to_visit.pop()
        path[depth:] = [Turn(_speaker(comment), comment["body"])]
        below = answers.get(comment["id"], [])
        to_visit += [(depth + 1, answer) for answer in reversed(below)]
        if not below:
            yield list(path)
            path = [turn._replace(again=True) for turn in path]


def _speaker(comment: dict) -> str:
    """The author; nobody knows whether two deleted authors are one, so each is somebody else."""
    return json.dumps(comment["id"]) if comment["author"] in (None, *GONE) else comment["author"]
