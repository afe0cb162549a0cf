"""Hydra launcher that runs the jobs of a sweep on this machine: `python run.py -m sweeps=NAME`."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from sweeps.job import Job
from sweeps.job_queue import Queue
from training.folder import write_atomically
from training.job import DIVERGED, FINISHED, open_run, run
from training.preflight import read
from training.settings import Settings

# What a job imports only on its way, in about 3 s: run.py's part, the optimizer's, and wandb's.
PRELOAD = ("hydra", "torch._dynamo", "wandb", "wandb.sdk.launch.inputs.internal")


class LocalQueue(Launcher):
    """One fresh process a job: jobs_per_gpu at once on each GPU, or cpu_slots; finished runs are skipped."""

    def __init__(self, jobs_per_gpu: int, cpu_slots: int, grace_seconds: float) -> None:
        if min(jobs_per_gpu, cpu_slots) < 1:
            raise ValueError(f"jobs_per_gpu={jobs_per_gpu} and cpu_slots={cpu_slots} must be at least 1")
        self.jobs_per_gpu, self.cpu_slots, self.grace_seconds = jobs_per_gpu, cpu_slots, grace_seconds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        checked: list[Settings] = []
        for overrides in job_overrides:
            checked.append(self.check(overrides, checked))
        jobs: dict[Path, Job] = {}  # by folder: two overrides may compose to one run, which is then one job
        planned: dict[Path, Path] = {}
        for settings in checked:
            opened = open_run(settings, planned)
            planned[opened.folder] = opened.prepared.folder
            start = Path(opened.settings.train.init_from or "")
            job = Job(opened.folder, DictConfig(asdict(opened.settings)), after=jobs.get(start))
            if result := job.result():  # a diverged run is not tried again, and never counts as finished
                job.status = FINISHED if result["outcome"] == "finished" else DIVERGED
            jobs.setdefault(job.folder, job)
        record(checked[0], list(jobs.values()))
        queue = Queue(list(jobs.values()), self.slots(checked[0].device), run, PRELOAD, self.grace_seconds)
        if status := queue.run():
            raise SystemExit(status)
        return [JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=0) for overrides in job_overrides]

    def check(self, overrides: Sequence[str], earlier: Sequence[Settings]) -> Settings:
        """The settings that the overrides compose to; earlier: those of the jobs before it, one of which may make the
        run that it starts from. Raises ValueError that names the job and the rule."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(composed)  # for ${hydra:...}
        with open_dict(composed):
            del composed["hydra"]
        try:
            return read(composed, earlier)
        except ValueError as error:
            raise ValueError(f"{' '.join(filter_overrides(overrides))}: {error}") from error

    def slots(self, device: str) -> list[dict[str, str]]:
        """The environment of each slot's jobs. Counting GPUs does not initialise CUDA."""
        gpus = [str(index) for index in range(0 if device == "cpu" else torch.cuda.device_count())]
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * self.jobs_per_gpu] or [{}] * self.cpu_slots


class LocalSweeper(BasicSweeper):
    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing, where Hydra's composes each job to see that it composes: the launcher does that with all."""


def record(settings: Settings, jobs: list[Job]) -> None:
    """Writes <runs>/sweeps/<name>.json: which runs the sweep compares, and which were made for these to start from."""
    first = {job.after.folder.name for job in jobs if job.after is not None}
    runs = [job.folder.name for job in jobs if job.folder.name not in first]
    content = {"sweep": settings.sweep or "sweep", "scale": settings.scale, "command": ["python", *sys.argv]}
    content |= {"runs": runs, "started_from": sorted(first)}
    path = jobs[0].folder.parent / "sweeps" / f"{content['sweep']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and set(json.loads(path.read_text())["runs"]) != set(runs):
        print(f"{path} listed other runs and is written over; sweep=NAME gives this sweep a name of its own")
    write_atomically(path, json.dumps(content, indent=1))
