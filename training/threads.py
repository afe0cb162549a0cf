"""How many cores there are, and how long OpenMP's threads wait for work before they sleep, which counts where it is set
before torch is imported."""

import os
import sys
from pathlib import Path

# Threads that spin for long make a busy machine 5 times slower; those that never do, a quiet one by a third (LOG.md).
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"}
SHARE = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of the cores' time in a period, and the period


def cores() -> int:
    """That this process may use: those it may run on, or a container's share of them if that is less."""
    allowed = len(os.sched_getaffinity(0))
    share, period = SHARE.read_text().split() if SHARE.exists() else ("max", "")
    return allowed if share == "max" else max(1, min(allowed, int(share) // int(period)))


def wait_briefly() -> bool:
    """Sets in the environment what is not set there; whether anything was."""
    missing = {name: value for name, value in WAITING.items() if name not in os.environ}
    os.environ.update(missing)
    return bool(missing)


def start_again_to_wait_briefly() -> None:
    """For a program that has imported torch: begins it anew if what it should have been started with was not set."""
    if wait_briefly():
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
