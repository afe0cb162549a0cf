"""The record of a run: lines for people, metrics.jsonl, and wandb as a mirror that may fail without harm."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from training.folder import write_atomically
from training.loop import Progress
from training.settings import Settings

PATIENCE = 20.0  # seconds without a line, then an evaluation says how far it is


class Recorder:
    """Writes into the run folder. Use as a context: leaving it closes files and mirror, whatever happened."""

    def __init__(self, settings: Settings, folder: Path, progress: Progress):
        self.settings, self.progress = settings, progress
        self.console = open(folder / "console.log", "a")
        self.metrics = _cut_metrics(folder / "metrics.jsonl", progress.step)
        self.wandb: Any = None
        self.said = time.monotonic()
        if settings.wandb.mode != "disabled":
            with self.warning():
                self.wandb = _start_wandb(settings, folder)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.mirror(lambda run: run.finish(exit_code=int(kind is not None)))
        self.metrics.close()
        self.console.close()

    def say(self, line: str) -> None:
        """One line for people, kept in console.log; in a sweep a job's output is that file already."""
        self.said = time.monotonic()
        print(line, flush=True)
        if not os.path.sameopenfile(1, self.console.fileno()):
            print(line, file=self.console, flush=True)

    def log(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, its mirror, and a line for people."""
        at, train = self.progress, self.settings.train
        tokens = at.step * train.batch_size * self.settings.data.sequence_length
        line = {"step": at.step, "steps": train.steps, "tokens": tokens, "seconds": at.seconds} | values
        print(json.dumps(line), file=self.metrics, flush=True)
        self.mirror(lambda run: run.log(line, step=at.step))
        if "train/ce" in values:
            left = (train.steps - at.step) * at.seconds / at.step
            rest = f"{left:.0f} s to go" if at.step < train.steps else "evaluating"
            figures = f"loss {values['train/ce']:.3f}, {values['tokens_per_second']:,.0f} tokens/s, {rest}"
        else:
            figures = f"validation {values['val/ce']:.4f} nats per token"
        self.say(f"  step {at.step}/{train.steps}, {figures}")

    def watch(self, what: str) -> None:
        """A line about what takes long, if there was none for a while."""
        if time.monotonic() - self.said > PATIENCE:
            self.say(f"  {what}")

    def conclude(self, result: dict[str, Any], origin: dict[str, Any]) -> None:
        """The mirror of result.json, and of what analysis reads in provenance.json."""
        code = {key: origin["git"][key] for key in ("commit", "dirty", "own")}
        summary = result | {"result": result, "origin": {"git": code, "device": origin["device"]}}
        self.mirror(lambda run: run.summary.update(summary))

    def mirror(self, action: Callable[[Any], Any]) -> None:
        """action(wandb run), if there is one."""
        if self.wandb is not None:
            with self.warning():
                action(self.wandb)

    @contextmanager
    def warning(self) -> Iterator[None]:
        """wandb's first failure is one warning and the end of mirroring."""
        try:
            yield
        except Exception as error:  # whatever wandb does wrong, the files are the record
            self.wandb, why = None, (str(error).splitlines() or [""])[0]
            self.say(f"warning: wandb failed and is off for this run ({type(error).__name__}: {why})")


def _start_wandb(settings: Settings, folder: Path) -> Any:
    import wandb  # takes a second, and is not needed when disabled

    about: dict[str, Any] = {"id": folder.name, "name": folder.name, "dir": folder, "config": asdict(settings)}
    about |= {"group": settings.sweep, "job_type": settings.arm, **asdict(settings.wandb)}
    about["tags"] = [tag for tag in (settings.sweep, settings.scale, settings.arm) if tag]
    about["resume"] = "allow" if settings.wandb.mode == "online" else None
    quiet = wandb.Settings(silent=True, console="off", init_timeout=5, x_disable_stats=True, disable_git=True)
    return wandb.init(**about, reinit="finish_previous", settings=quiet)


def _cut_metrics(path: Path, step: int) -> IO[str]:
    """Open metrics.jsonl for appending, without what came after the checkpoint that the run goes on from."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() and step > 0 else []:
        with suppress(ValueError, KeyError):  # a line cut by a kill
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(path, "".join(kept))
    return open(path, "a")
