"""How a run stands, by its folder alone."""

import fcntl
import json
from pathlib import Path


def standing(folder: Path) -> str:
    """done, failed (diverged included), running or left."""
    result = folder / "result.json"
    if result.exists():
        return "done" if json.loads(result.read_text())["outcome"] == "finished" else "failed"
    if (folder / "lock").exists():
        with (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # a process holds it, and works on this run
                return "running"
    return "failed" if (folder / "error.txt").exists() else "left"
