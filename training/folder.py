"""A run's folder: claimed by one process at a time, found to be writable before any work, written whole or not."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

WEIGHTS = ("best.safetensors", "model.safetensors")  # of a checkpoint; with early stopping the best ones count


class Busy(ValueError):
    """Another process works on the run."""


def is_finished(folder: Path) -> bool:
    """result.json is there, which is written last."""
    return (folder / "result.json").exists()


def has_weights(folder: Path) -> bool:
    """A checkpoint is there; whether it is intact is found when it is read."""
    return any(weights.name in WEIGHTS for weights in folder.glob("checkpoints/*/*.safetensors"))


def write_atomically(path: Path, text: str) -> None:
    """The whole text or nothing, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, hold its lock (which ends with the process) and try a real save in it.

    Raises ValueError if the folder cannot be made or written, and Busy if another process works on it.
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
            raise Busy(f"another process is working on {folder}") from error
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
