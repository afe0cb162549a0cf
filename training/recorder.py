"""The record of a run: lines for people, metrics.jsonl, and wandb as a mirror that may fail without harm."""

import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from data.prepare import Prepared
from models.transformer import Transformer
from training.loop import Progress
from training.settings import Settings


class Recorder:
    """Writes into the run folder. Use as a context: leaving it closes files and mirror, whatever happened."""

    def __init__(self, settings: Settings, folder: Path, resume_step: int):
        self.settings, self.folder = settings, folder
        self.console = open(folder / "console.log", "a")
        self.shared = os.path.sameopenfile(1, self.console.fileno())  # in a sweep a job's output is console.log itself
        self.metrics = _cut_metrics(folder / "metrics.jsonl", resume_step)
        self.since = time.perf_counter()
        columns = (TextColumn("  step"), MofNCompleteColumn(), BarColumn(30), TextColumn("{task.description}"))
        self.bar = Bar(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty(), transient=True)
        self.task = self.bar.add_task("", total=settings.train.steps)
        self.mirror = Mirror(settings, folder, self.say)

    def __enter__(self) -> "Recorder":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.stop()
        self.mirror.finish(failed=kind is not None)
        self.metrics.close()
        self.console.close()

    def start(self, model: Transformer, prepared: Prepared, device: torch.device, step: int) -> None:
        """Say what is trained on what, and where the record goes."""
        train, counts = self.settings.train, model.parameter_counts()
        tokens = train.steps * train.batch_size * self.settings.data.sequence_length
        self.say(f"{self.settings.arm}, seed {self.settings.seed}: {self.folder}")
        self.say(
            f"  {counts['active']:,} active of {counts['total']:,} parameters on {device}; {tokens:,} tokens in "
            f"{train.steps} steps, {tokens / prepared.splits['train']['tokens']:.2f} epochs"
        )
        if step:
            self.say(f"  resuming after step {step}")

    def say(self, line: str) -> None:
        """One line for people, kept in console.log."""
        self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        sys.stdout.flush()
        if not self.shared:
            print(line, file=self.console, flush=True)

    def log(self, at: Progress, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its mirror."""
        train = self.settings.train
        tokens = at.step * train.batch_size * self.settings.data.sequence_length
        line = {"step": at.step, "steps": train.steps, "tokens": tokens, "seconds": at.seconds} | values
        print(json.dumps(line), file=self.metrics, flush=True)
        self.mirror.log(line)
        if "train/ce" in values:
            text = f"loss {values['train/ce']:.3f}, {values['tokens_per_second']:,.0f} tokens/s"
            self.bar.update(self.task, completed=at.step, description=text)
            if self.bar.disable:
                left = (train.steps - at.step) * at.seconds / at.step
                self.say(f"  step {at.step}/{train.steps}, {text}, {left:.0f} s to go")
        elif "val/ce" in values:
            self.say(f"  step {at.step}/{train.steps}, validation {values['val/ce']:.4f} nats per token")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl so far."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def seconds(self) -> float:
        """Since this process opened the run."""
        return time.perf_counter() - self.since

    def summarise(self, result: dict[str, Any]) -> None:
        """The result, mirrored."""
        self.mirror.summarise(result)


class Mirror:
    """wandb. The first failure is one warning and the end of mirroring; nothing here delays or harms a run."""

    def __init__(self, settings: Settings, folder: Path, say: Any):
        self.say, self.run = say, None
        if settings.wandb.mode == "disabled":
            return
        with self.guarded():
            import wandb  # a second, and not needed when disabled

            quiet = wandb.Settings(silent=True, console="off", init_timeout=5, x_disable_stats=True, disable_git=True)
            self.run = wandb.init(
                id=folder.name,
                name=folder.name,
                dir=folder,
                mode=settings.wandb.mode,  # type: ignore[arg-type]
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                group=settings.sweep,
                tags=[tag for tag in (settings.sweep, settings.scale, settings.arm) if tag],
                job_type=settings.arm,
                config=asdict(settings),
                resume="allow" if settings.wandb.mode == "online" else None,
                reinit="finish_previous",
                settings=quiet,
            )

    def log(self, line: dict[str, Any]) -> None:
        if self.run is not None:
            with self.guarded():
                self.run.log(line, step=line["step"])

    def summarise(self, result: dict[str, Any]) -> None:
        if self.run is not None:
            with self.guarded():
                self.run.summary.update(result)

    def finish(self, failed: bool) -> None:
        if self.run is not None:
            with self.guarded():
                self.run.finish(exit_code=int(failed))

    @contextmanager
    def guarded(self):
        try:
            yield
        except Exception as error:  # whatever wandb does wrong, the files are the record
            self.run = None
            self.say(
                f"warning: wandb failed and is off for this run ({type(error).__name__}: {str(error).splitlines()[0]})"
            )


def _cut_metrics(path: Path, step: int):
    """Open metrics.jsonl for appending, without what came after the checkpoint that the run goes on from."""
    kept = []
    if path.exists() and step > 0:
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):  # a line cut by a kill
                continue
    path.write_text("".join(line + "\n" for line in kept))
    return open(path, "a")
