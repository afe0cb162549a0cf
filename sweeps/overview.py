"""All sweeps: how many jobs each has, how they stand, and the time that is still needed."""

from collections import Counter
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from tabulate import tabulate

from sweeps.composing import jobs_of
from sweeps.dry_run import counted
from sweeps.estimate import Cost, Pace, cost
from sweeps.job import duration
from sweeps.plan import Plan
from sweeps.standing import standing
from training.build import find_data
from training.compose import ROOT
from training.identity import provisional_id
from training.targets import one_line

STATES = ("done", "running", "failed", "left")


class Overview:
    """words: overrides for every sweep (scale=small). A run that several sweeps need counts once in the last row."""

    def __init__(self, words: list[str]):
        self.words, self.rows, self.wrong = words, [], []
        self.everything: dict[str, tuple[str, float]] = {}  # run -> how it stands, seconds still needed
        self.costs: dict[str, Cost] = {}
        self.paces: dict[str, Pace] = {}

    def add(self, name: str) -> None:
        try:
            compose, jobs = jobs_of([f"sweeps={name}", *self.words])
            plan = Plan(compose, find_data)
            for words in jobs:
                plan.check(words)
            plan.open()
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            self.wrong.append(f"{name}: {one_line(error)}")
            return
        runs = {}
        for job in plan.jobs:
            if job.settings is None:
                continue
            state = standing(job.run.folder) if job.run else "left"
            key = str(job.run.folder) if job.run else provisional_id(job.settings)
            runs[key] = state, 0.0 if state == "done" else self.seconds(job)
        self.rows.append(row(name, runs))
        self.everything |= runs
        if errors := plan.errors():
            self.wrong.append(f"{name}: {len(errors)} of {len(plan.jobs)} jobs are invalid: {errors[0]}")

    def seconds(self, job) -> float:
        settings = job.settings
        if settings.runs not in self.paces:
            self.paces[settings.runs] = Pace(Path(settings.runs))
        key = counted(settings)
        if key not in self.costs:
            self.costs[key] = cost(settings, job.run)
        return self.paces[settings.runs].seconds(settings, self.costs[key])[0]

    def table(self) -> str:
        headers = ["sweep", "jobs", *STATES, "time needed"]
        last = row("all, shared runs once", self.everything)
        table = tabulate([*self.rows, last], headers, colalign=("left", *["right"] * 6), disable_numparse=True)
        note = (
            "Time: estimated, of jobs one after the other, without preparing text. dry_run=true tells a sweep's jobs."
        )
        return "\n".join([table, note, *self.wrong])


def row(name: str, runs: dict[str, tuple[str, float]]) -> list[str | int]:
    states = Counter(state for state, _ in runs.values())
    needed = sum(seconds for _, seconds in runs.values())
    return [name, len(runs), *(states[state] for state in STATES), duration(needed) if needed else ""]


def overview(words: list[str]) -> str:
    """The table, for these overrides."""
    every = Overview(words)
    for path in sorted((ROOT / "sweeps").glob("*.yaml")):
        every.add(path.stem)
    return every.table()
