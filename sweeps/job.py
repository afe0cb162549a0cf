"""One job of a sweep, and what its run folder tells about it."""

import json
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

INTERRUPTED = 75  # exit status of a job that has saved a checkpoint upon SIGTERM
SIGNALS = {number.value: number.name for number in signal.Signals}


@dataclass(eq=False)
class Job:
    """A run to make. It waits until it has a process, and has ended when it has a status."""

    folder: Path  # its run folder
    config: str  # its resolved config as yaml: all that travels to its process
    status: int | None = None  # exit status, -N if signal N has killed it; 0 from the start if the run is finished
    process: BaseProcess | None = None
    slot: dict[str, str] = field(default_factory=dict)  # its environment variables
    began: float = 0.0  # seconds, time.time()
    seconds: float = 0.0  # that it took
    log_start: int = 0  # bytes that earlier attempts left in console.log
    stopped: str = ""  # why the queue has stopped it
    kill_at: float = 0.0

    @property
    def waiting(self) -> bool:
        return self.process is None and self.status is None

    @property
    def running(self) -> bool:
        return self.process is not None and self.status is None

    @property
    def console(self) -> Path:
        return self.folder / "console.log"

    def begin(self, slot: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_start = self.console.stat().st_size if self.console.exists() else 0
        self.slot, self.began = slot, time.time()

    def finish(self, status: int) -> None:
        self.status, self.seconds = status, time.time() - self.began

    def progress(self) -> dict[str, float]:
        """The newest complete training line of metrics.jsonl; {} before the first."""
        lines = tail(self.folder / "metrics.jsonl").split(b"\n")[:-1]  # what follows the last newline is being written
        return next((json.loads(line) for line in reversed(lines) if b'"train/ce"' in line), {})

    def to_go(self) -> float | None:
        """Seconds until the end of its training; None before its first metrics."""
        now = self.progress()
        if not now.get("tokens_per_second"):
            return None
        return now["tokens"] * (now["steps"] / now["step"] - 1) / now["tokens_per_second"]

    def outcome(self) -> str:
        """What became of it, in a line."""
        took, result = duration(self.seconds), self.result()
        if self.status == 0:
            figures = f": validation ce {result['val/ce']:.2f}, {rate(result)}" if result else ""
            return f"finished in {took}{figures}"
        if self.stopped:
            return self.stopped + (
                ", killed because it did not end by itself" if self.status == -signal.SIGKILL else ""
            )
        if self.status == INTERRUPTED:
            return f"interrupted after {took}"
        if result.get("outcome") == "diverged":
            return f"diverged at step {result['step']} after {took}"
        if self.status is not None and self.status < 0:
            name = SIGNALS.get(-self.status, f"signal {-self.status}")
            return f"killed by {name} after {took}; its last line: {self.last_line()}"
        return f"failed with exit status {self.status} after {took}: {self.last_line()}"

    def result(self) -> dict[str, Any]:
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def last_line(self) -> str:
        """The last line that this attempt wrote into error.txt, or else into console.log."""
        error = self.folder / "error.txt"
        fresh = error.exists() and error.stat().st_mtime >= self.began
        text = tail(error) if fresh else tail(self.console, self.log_start)
        return (text.decode(errors="replace").strip().splitlines() or ["none"])[-1]


def tail(path: Path, start: int = 0, size: int = 65536) -> bytes:
    """The last bytes of a file, at most size of them, none before start; b"" if there is no file."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(max(start, path.stat().st_size - size))
        return file.read()


def duration(seconds: float) -> str:
    """14 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate(metrics: dict[str, Any]) -> str:
    return f"{(metrics['tokens_per_second'] or 0) / 1000:.1f}k tokens/s"
