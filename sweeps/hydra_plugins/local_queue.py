"""Hydra launcher that runs the jobs of a sweep on this machine: `python run.py -m sweeps=NAME`."""

import json
import os
import shlex
import sys
from collections.abc import Sequence

import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from sweeps import dry_run
from sweeps.cells import cells_of, groups_of, require_apart
from sweeps.composing import Composer
from sweeps.job_queue import Queue
from sweeps.plan import Plan, Planned, jobs_to_run, merged
from training.build import find_data, open_data
from training.folder import write_atomically
from training.job import run
from training.threads import cores
from training.tuning import described, tuned_elsewhere

# What a job imports only on its way, in about 3 s: run.py's part, the optimizer's, and wandb's.
PRELOAD = ("hydra", "torch._dynamo", "wandb", "wandb.sdk.launch.inputs.internal")
COMPILER = ("torch._inductor.compile_fx",)  # another 3 s, of jobs with train.compile


class LocalQueue(Launcher):
    """One fresh process a job: jobs_per_gpu at once on each GPU, or cpu_slots (None: one a core of scale=smoke, whose
    jobs are too small for several threads, else one); finished runs are skipped."""

    def __init__(self, jobs_per_gpu: int, cpu_slots: int | None, grace_seconds: float) -> None:
        if min(jobs_per_gpu, 1 if cpu_slots is None else cpu_slots) < 1:
            raise ValueError(f"jobs_per_gpu={jobs_per_gpu} and cpu_slots={cpu_slots} must be at least 1")
        self.jobs_per_gpu, self.cpu_slots, self.grace_seconds = jobs_per_gpu, cpu_slots, grace_seconds

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if not job_overrides:
            raise ValueError("the sweep has no job: one of the choices that it is made of is empty")
        compose = Composer(self.hydra_context.config_loader, self.config.hydra.overrides.hydra)
        plan = Plan(compose, find_data if self.config.dry_run else open_data)
        for words in job_overrides:
            plan.check(words)
        if not plan.errors():
            require_apart(plan.jobs, compose)
        if self.config.dry_run:
            plan.open()
            raise SystemExit(dry_run.report(plan.jobs))
        plan.require_valid()  # before any text is prepared
        plan.open()
        plan.require_valid()
        jobs = jobs_to_run(plan.jobs)
        record(plan.jobs)
        opened = [job.run for job in plan.jobs if job.run]
        lines = merged(len(plan.jobs), len(jobs))
        lines.append(dry_run.patience([job for job in plan.jobs if job.settings and dry_run.for_gpus(job.settings)]))
        lines += dict.fromkeys(tuned_elsewhere(each.settings, each.prepared.fingerprint) for each in opened)
        for line in filter(None, lines):
            print(line)
        settings = [job.settings for job in plan.jobs if job.settings]
        slots = self.slots(settings[0].device, cores() if {each.scale for each in settings} == {"smoke"} else 1)
        preload = (*PRELOAD, *(COMPILER if any(job.config.train.compile for job in jobs) else ()))
        queue = Queue(jobs, slots, run, preload, self.grace_seconds)
        if status := queue.run():
            raise SystemExit(status)
        if beyond := len([*plan.further()]):
            print(f"the best of an arm's trials lies at an edge: the same command makes {beyond} more beyond it")
        return [JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=0) for overrides in job_overrides]

    def slots(self, device: str, on_cpu: int) -> list[dict[str, str]]:
        """The environment of each slot's jobs. on_cpu: slots where cpu_slots does not say. Counting GPUs does not
        initialise CUDA."""
        gpus = [str(index) for index in range(0 if device == "cpu" else torch.cuda.device_count())]
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(gpus)]
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus * self.jobs_per_gpu] or [{}] * (self.cpu_slots or on_cpu)


class LocalSweeper(BasicSweeper):
    """Hydra's own, but it writes nothing, and does not compose each job to see that it composes: the launcher does."""

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        assert self.hydra_context is not None and self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        return [self.launcher.launch(batch, 0) for batch in self.split_arguments(overrides, self.max_batch_size)]


def record(planned: Sequence[Planned]) -> None:
    """Writes <runs>/sweeps/<name>.json: which runs the sweep compares, under which arm's label and seed, and which were
    made for these to start from. Trials of further arms are added to those that are there; a list of other runs becomes
    <name>.<its scale>.json."""
    compared, cells = cells_of(planned), []
    groups = groups_of(compared)
    for (arm, seed, name), job in compared.items():
        assert job.settings is not None
        drawn = {"table_seed": job.settings.table_seed, "repeat": job.settings.repeat}
        cells.append({"arm": arm, "seed": seed, "run": name} | drawn | described(job.settings))
        cells[-1] |= {"group": groups[arm]} if groups else {}
    settings, folder = next((job.settings, job.run.folder) for job in planned if job.settings and job.run)
    name = settings.sweep or "sweep"
    path = folder.parent / "sweeps" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {"runs": [], "scale": settings.scale}
    tuned = {cell.get("tuned") for cell in cells} | {None}  # of a run that is no trial
    if before["scale"] == settings.scale and all("tuned" in cell for cell in cells):
        cells = [cell for cell in before.get("cells", []) if cell.get("tuned") not in tuned] + cells
    runs = list(dict.fromkeys(cell["run"] for cell in cells))
    content = {"sweep": name, "scale": settings.scale, "command": ["python", *sys.argv]}
    content |= {"cells": cells, "runs": runs, "started_from": sorted({job.name for job in planned} - set(runs))}
    if not set(before["runs"]) <= set(runs):
        kept = path.with_name(f"{name}.{before['scale']}.json")
        path.replace(kept)
        print(f"{path} listed other runs: that list is {kept.name} now; sweep=NAME gives this sweep a name of its own")
        print(f"  what makes it again: {shlex.join(before['command'])}")
    write_atomically(path, json.dumps(content, indent=1))
