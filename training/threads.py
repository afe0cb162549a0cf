"""How long OpenMP's threads wait for work before they sleep; it counts where it is set before torch is imported."""

import os
import sys

# Threads that spin for long make a busy machine 5 times slower; those that never do, a quiet one by a third (LOG.md).
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"}


def wait_briefly() -> bool:
    """Sets in the environment what is not set there; whether anything was."""
    missing = {name: value for name, value in WAITING.items() if name not in os.environ}
    os.environ.update(missing)
    return bool(missing)


def start_again_to_wait_briefly() -> None:
    """For a program that has imported torch: begins it anew if what it should have been started with was not set."""
    if wait_briefly():
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
