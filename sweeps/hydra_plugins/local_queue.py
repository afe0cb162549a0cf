"""Hydra launcher that runs the jobs of a sweep on this machine: `python run.py -m sweeps=NAME`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from sweeps.job import Job
from sweeps.job_queue import Queue
from training import job
from training.checkpoint import write_atomically
from training.preflight import read
from training.settings import Settings

# What a job imports only on its way, in about 3 s: run.py's part, the optimizer's, and wandb's.
PRELOAD = ("hydra", "torch._dynamo", "wandb", "wandb.sdk.launch.inputs.internal")


class LocalQueue(Launcher):
    """One fresh process a job: jobs_per_gpu at once on each GPU, or cpu_slots; finished runs are skipped.

    Ends with exit status 1 if a job did not finish, 130 or 143 if it was stopped by SIGINT or SIGTERM.
    """

    def __init__(self, jobs_per_gpu: int, cpu_slots: int, grace_seconds: float) -> None:
        if min(jobs_per_gpu, cpu_slots) < 1:
            raise ValueError(f"jobs_per_gpu={jobs_per_gpu} and cpu_slots={cpu_slots} must be at least 1")
        self.jobs_per_gpu, self.cpu_slots, self.grace_seconds = jobs_per_gpu, cpu_slots, grace_seconds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        configs = [self.compose(overrides) for overrides in job_overrides]
        checked = [check(config, overrides) for config, overrides in zip(configs, job_overrides)]
        folders = [job.open_run(settings).folder for settings in checked]
        jobs = {}  # two overrides may compose to one run, which is then one job
        for folder, config in zip(folders, configs):
            jobs[folder] = Job(folder, OmegaConf.to_yaml(config), status=outcome(folder))
        record(configs[0], list(jobs))
        slots = self.slots(configs[0].device)
        queue = Queue(list(jobs.values()), slots, "training.job:run", PRELOAD, self.grace_seconds)
        if not queue.run():
            raise SystemExit(128 + queue.signals[0] if queue.signals else 1)
        return [
            JobReturn(overrides=overrides, cfg=config, status=JobStatus.COMPLETED, _return_value=0)
            for overrides, config in zip(job_overrides, configs)
        ]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The config of one job, its interpolations resolved, without Hydra's node."""
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        HydraConfig.instance().set_config(composed)  # for ${hydra:...}
        with open_dict(composed):
            del composed["hydra"]
        OmegaConf.resolve(composed)
        return composed

    def slots(self, device: str) -> list[dict[str, str]]:
        """The environment of each slot's jobs. Counting GPUs does not initialise CUDA."""
        gpus = [str(index) for index in range(0 if device == "cpu" else torch.cuda.device_count())]
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * self.jobs_per_gpu] or [{}] * self.cpu_slots


class LocalSweeper(BasicSweeper):
    """Hydra's sweeper, without composing each job only to see that it composes: the launcher does that with all."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        pass


def outcome(folder: Path) -> int | None:
    """The exit status of a run that has ended: a diverged one is not tried again, and never counts as finished."""
    if not job.is_finished(folder):
        return None
    ended = json.loads((folder / "result.json").read_text())["outcome"]
    return job.FINISHED if ended == "finished" else job.DIVERGED


def check(config: DictConfig, overrides: Sequence[str]) -> Settings:
    """The job's settings; ValueError that names the job and the rule."""
    try:
        return read(config)
    except ValueError as error:
        raise ValueError(f"{' '.join(filter_overrides(overrides))}: {error}") from error


def record(config: DictConfig, folders: list[Path]) -> None:
    """Writes <runs>/sweeps/<name>.json: which runs the sweep consists of."""
    name, runs = config.sweep or "sweep", [folder.name for folder in folders]
    content = {"sweep": name, "scale": config.scale, "command": ["python", *sys.argv], "runs": runs}
    path = folders[0].parent / "sweeps" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1))
