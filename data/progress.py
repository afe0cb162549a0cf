"""How far a preparation is: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from data.corpora import Document, segments

EVERY = 30.0  # seconds between two lines


class Meter:
    """Use as a context, one for a preparation. `say` takes a line."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.bar, self.what, self.task = say, None, "", None
        if sys.stderr.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
            self.bar = Progress(*columns, TransferSpeedColumn(), TimeElapsedColumn(), console=Console(stderr=True))

    def __enter__(self) -> "Meter":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, what: str) -> None:
        """The next part of the work; how many bytes it has nobody knows before the end."""
        self.what, self.done, self.began = what, 0, time.monotonic()
        self.said = self.began
        if self.bar:
            if self.task is not None:
                self.bar.remove_task(self.task)
            self.task = self.bar.add_task(what, total=None)

    def add(self, size: int) -> None:
        """So many bytes more are done."""
        self.done += size
        now = time.monotonic()
        if self.bar and self.task is not None:
            self.bar.advance(self.task, size)
        elif now - self.said >= EVERY:
            self.said = now
            rate = self.done / 1e6 / (now - self.began)
            self.say(f"preparing the corpus: {self.what}: {self.done / 1e6:,.0f} MB, {rate:.1f} MB/s")

    def texts(self, documents: Iterable[Document]) -> Iterator[str]:
        """The text of the documents' segments, counted as it is read."""
        for document in documents:
            for text, _ in segments(document):
                self.add(len(text.encode()))
                yield text
