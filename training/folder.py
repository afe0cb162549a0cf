"""A run's folder: claimed by one process at a time, found to be writable before any work."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def is_finished(folder: Path) -> bool:
    """result.json is there, which is written last."""
    return (folder / "result.json").exists()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, hold its lock (which ends with the process) and try a real save in it.

    Raises ValueError if the folder cannot be made or written, or if another process works on it.
    """
    probe, written = folder / "probe.safetensors", torch.arange(2**17)  # 1 MiB
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(folder / "lock", "w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            save_file({"probe": written}, probe)
            same = torch.equal(load_file(probe)["probe"], written)
            probe.unlink()
        except BlockingIOError as error:
            raise ValueError(f"another process is working on {folder}") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot write to the run folder {folder}: {error}") from error
        if not same:
            raise ValueError(f"what is written to {folder} reads back differently")
        yield


def require_space(folder: Path, needed: int) -> None:
    """Raises ValueError if the disk has fewer than needed bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} needs {needed / 1e9:.2f} GB free for checkpoints; the disk has {free / 1e9:.2f} GB")
