"""A sweep before it runs: its jobs checked and named, none of them started."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from analysis.arms import plural
from analysis.ledger import beyond
from data.prepare import NotPrepared, Prepared
from sweeps.job import Job
from sweeps.standing import standing
from training.folder import has_weights
from training.identity import provisional_id
from training.job import DIVERGED, FINISHED, open_run
from training.preflight import read, read_like
from training.run import Run
from training.settings import Settings
from training.start import is_called
from training.targets import one_line
from training.tuning import settle, space_of


@dataclass(eq=False)
class Planned:
    """A job of a sweep. It has settings unless it is invalid, and a run unless its data is not prepared."""

    words: Sequence[str]  # its overrides
    config: dict[str, Any] | None = None  # resolved
    settings: Settings | None = None
    run: Run | None = None
    error: str = ""
    place: list[int] | None = None  # of a trial

    @property
    def name(self) -> str:
        """Of its run folder; equal for equal runs, too, while that is not known. It must have settings."""
        assert self.settings is not None
        return self.run.folder.name if self.run else f"(id {provisional_id(self.settings)})"


class Plan:
    """compose: overrides -> config; open_data: as training.job.open_run takes it."""

    def __init__(self, compose: Callable[[Sequence[str]], dict[str, Any]], open_data: Callable[[Settings], Prepared]):
        self.compose, self.open_data = compose, open_data
        self.jobs: list[Planned] = []
        self.alike: dict[Any, tuple[dict[str, Any], Settings]] = {}  # arms as they were read

    def check(self, words: Sequence[str]) -> None:
        """Compose and check the job that the words describe, and those of all its trials."""
        try:
            config = self.compose(words)
            places = space_of(config["space"]).places() if config["trial"] == "all" else [None]
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            self.jobs.append(Planned(words, error=one_line(error)))
            return
        for place in places:
            self.jobs.append(self.checked(words, config, place))

    def checked(self, words: Sequence[str], config: dict[str, Any], place: tuple[int, ...] | None) -> Planned:
        job = Planned(words, config)
        config = deepcopy(config)
        try:
            if place is not None:
                config["trial"] = job.place = list(place)
            settle(config, words)
            earlier = [each.settings for each in self.jobs if each.settings]
            key = tuple(word for word in words if not word.startswith(("seed=", "table_seed=", "repeat=")))
            if key in self.alike:
                job.settings = read_like(config, self.alike[key], earlier)
            job.settings = job.settings or read(config, earlier)
            self.alike[key] = config, deepcopy(job.settings)
        except (OmegaConfBaseException, ValueError, OSError) as error:
            job.error = one_line(error)
        return job

    def open(self) -> None:
        """Name the runs of all that is valid, then those of the trials that finished ones call for."""
        for job in self.jobs:
            self.name(job)
        while more := list(self.further()):
            for job in more:
                self.jobs.append(job)
                self.name(job)

    def name(self, job: Planned) -> None:
        if job.settings is None:
            return
        first, earlier = needed(job.settings), self.jobs[: self.jobs.index(job)]
        if first and any(each.settings and not each.run and is_called(each.settings, first) for each in earlier):
            return  # what it starts from has no name yet, for want of its data
        try:
            job.run = open_run(job.settings, [each.run for each in self.jobs if each.run], self.open_data)
        except NotPrepared:
            return
        except (ValueError, OSError) as error:
            job.settings, job.error = None, one_line(error)

    def further(self) -> Iterator[Planned]:
        """Trials beyond the edge of an arm's space, of arms whose trials have all ended with the best one there."""
        arms: dict[tuple[str, ...], list[Planned]] = {}
        for job in self.jobs:
            if job.place is not None:
                arms.setdefault(tuple(job.words), []).append(job)
        for words, jobs in arms.items():
            results = {tuple(job.place or ()): ended_with(job) for job in jobs}
            if None not in results.values():
                for place in beyond({place: ce for place, ce in results.items() if ce is not None}):
                    yield self.checked(words, jobs[0].config or {}, place)

    def errors(self) -> list[str]:
        return errors(self.jobs)

    def require_valid(self) -> None:
        """ValueError with the first job's error."""
        if errors := self.errors():
            more = f" (and {len(errors) - 1} more of the grid's {len(self.jobs)} combinations; dry_run=true names all)"
            raise ValueError(errors[0] + more * (len(errors) > 1))


def errors(planned: Sequence[Planned]) -> list[str]:
    """A line an invalid job: the overrides that set it apart, and what is wrong, where the line before does not say it
    already; one alone if that is wrong of all."""
    if len(said := {job.error for job in planned}) < 2:
        return [*filter(None, said)]
    common = set.intersection(*(set(job.words) for job in planned))
    lines, before = [], ""
    for job in [job for job in planned if job.error]:
        own = (word for word in filter_overrides(job.words) if word not in common)
        apart = [word for word in own if not job.error.startswith(f"{word} ")]  # what the error says itself
        apart += [f"trial={job.place}"] if job.place else []
        lines.append(": ".join(filter(None, [" ".join(apart), "the same" if job.error == before else job.error])))
        before = job.error
    return lines


def merged(combinations: int, runs: int) -> list[str]:
    """The line that says so if a grid has fewer runs than combinations, as of seed=1,1."""
    some = f"The grid's {combinations} combinations come to {runs} {plural('run', runs)}, as some are one and the same."
    return [some] if combinations > runs else []


def needed(settings: Settings) -> str:
    """The run that this one starts from or reads; "" if there is none."""
    return settings.train.init_from or settings.router.get("baseline") or ""


def ended_with(job: Planned) -> float | None:
    """A trial's validation loss in nats per token, infinite if it diverged or is invalid; None without a result."""
    if job.run is None:
        return math.inf if job.error else None
    path = job.run.folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return None if result is None else result["val/ce"] if result["outcome"] == "finished" else math.inf


def states(planned: Sequence[Planned]) -> dict[Path, str]:
    """How the runs stand, by folder. One that is done but has kept no weights, which one that is not done starts from
    or reads, is left: jobs_to_run trains it again."""
    found = {each.run.folder: standing(each.run.folder) for each in planned if each.run}
    for each in planned:
        if each.settings and each.run and found[each.run.folder] != "done":
            first = Path(needed(each.settings))
            if found.get(first) == "done" and not has_weights(first):
                found[first] = "left"
    return found


def jobs_to_run(planned: Sequence[Planned]) -> list[Job]:
    """A job a run folder, in order; one that others start from or read keeps its weights, and is trained again if it
    has kept none."""
    jobs: dict[Path, Job] = {}
    for each in planned:
        assert each.settings is not None and each.run is not None
        job = Job(each.run.folder, DictConfig(asdict(each.settings)), after=jobs.get(Path(needed(each.settings))))
        if result := job.result():  # a diverged run is not tried again, and never counts as finished
            job.status = FINISHED if result["outcome"] == "finished" else DIVERGED
        jobs.setdefault(job.folder, job)
    for first in {job.after for job in jobs.values() if job.after is not None and job.status is None}:
        first.config.record.keep_weights = True
        if first.status == FINISHED and not has_weights(first.folder):
            print(f"{first.folder.name} is finished but has kept no weights, which others need: it is trained again")
            (first.folder / "result.json").unlink()
            first.status = None
    return list(jobs.values())
