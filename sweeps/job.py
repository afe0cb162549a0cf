"""One job of a sweep, and what its run folder tells about it."""

import json
import signal
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

INTERRUPTED = 75  # exit status of a job that has saved a checkpoint upon SIGTERM


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
    kill_at: float = 0.0  # time.time(); 0 while nobody has asked it to stop

    @property
    def waiting(self) -> bool:
        return self.process is None and self.status is None

    @property
    def running(self) -> bool:
        return self.process is not None and self.status is None

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
        took, path = duration(self.seconds), self.folder / "result.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        if self.status == 0:
            return f"finished in {took}" + (f": validation ce {result['val/ce']:.2f}, {rate(result)}" if result else "")
        if self.status == INTERRUPTED:
            return f"interrupted after {took}"
        if result.get("outcome") == "diverged":
            return f"diverged at step {result['step']} after {took}"
        status = self.status or 0
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        said = tail(self.folder / "error.txt") or tail(self.folder / "console.log")
        return f"{how} after {took}: {(said.decode(errors='replace').strip().splitlines() or ['no output'])[-1]}"


def tail(path: Path, size: int = 65536) -> bytes:
    """The last bytes of a file; b"" if there is no file."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read()


def duration(seconds: float) -> str:
    """14 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate(metrics: dict[str, Any]) -> str:
    return f"{(metrics['tokens_per_second'] or 0) / 1000:.1f}k tokens/s"
