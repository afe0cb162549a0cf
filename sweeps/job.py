"""One job of a sweep, and what its run folder tells about it."""

import json
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig


@dataclass(eq=False)
class Job:
    """A run to make. It runs once it has begun, and has ended when it has a status."""

    folder: Path  # its run folder
    config: DictConfig  # without interpolations
    status: int | None = None  # exit status, -N if signal N has killed it; 0 from the start if the run is finished
    slot: dict[str, str] = field(default_factory=dict)  # its environment variables
    began: float = 0.0  # seconds, time.time(); 0 if nobody has started it
    seconds: float = 0.0  # that it took
    kill_at: float = 0.0  # time.time(); 0 while nobody has asked it to stop
    after: "Job | None" = None  # the job that makes the run which this one starts from

    def result(self) -> dict[str, Any]:
        """What result.json says, which is written last; {} before."""
        return json.loads(tail(self.folder / "result.json") or b"{}")

    def doing(self) -> str:
        """How far its training is, by the newest complete training line of metrics.jsonl."""
        lines = tail(self.folder / "metrics.jsonl").split(b"\n")[:-1]  # what follows the last newline is being written
        now = next((json.loads(line) for line in reversed(lines) if b'"train/ce"' in line), {})
        if not now.get("tokens_per_second"):
            return f"starting, {duration(time.time() - self.began)}"
        to_go = now["tokens"] * (now["steps"] / now["step"] - 1) / now["tokens_per_second"]
        rest = f"{duration(to_go)} to go" if now["step"] < now["steps"] else "evaluating"
        return f"step {now['step']}/{now['steps']}, ce {now['train/ce']:.2f}, {rate(now)}, {rest}"

    def outcome(self) -> str:
        """What became of it, in a line."""
        if self.status and not self.began and self.after is not None:
            return f"not started: it starts from {self.after.folder.name}, which is not finished"
        took, status, result = duration(self.seconds), self.status or 0, self.result()
        if status == 0:
            return f"finished in {took}" + (f": validation ce {result['val/ce']:.2f}, {rate(result)}" if result else "")
        if status == 75:  # training.job.INTERRUPTED: it has saved a checkpoint upon SIGTERM
            return f"interrupted after {took}"
        if result.get("outcome") == "diverged":
            return f"diverged at step {result['step']} after {took}"
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        said = tail(self.folder / "error.txt") or tail(self.folder / "console.log")
        return f"{how} after {took}: {(said.decode(errors='replace').strip().splitlines() or ['no output'])[-1]}"


def tail(path: Path) -> bytes:
    """The last 64 KiB of a file; b"" if there is no file."""
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return file.read()


def duration(seconds: float) -> str:
    """14 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate(metrics: dict[str, Any]) -> str:
    return f"{(metrics['tokens_per_second'] or 0) / 1000:.1f}k tokens/s"
