"""All sweeps: how many jobs each has, how they stand, and the time that is still needed."""

import functools
import json
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track
from tabulate import tabulate

from sweeps.cells import require_apart
from sweeps.composing import jobs_of
from sweeps.dry_run import counted
from sweeps.estimate import Pace, cost
from sweeps.job import duration
from sweeps.plan import Plan, states
from sweeps.standing import standing
from training.build import find_data
from training.compose import ROOT, composed
from training.identity import provisional_id
from training.targets import one_line
from training.threads import cores

STATES = ("done", "running", "failed", "left")


class Standing(NamedTuple):
    """Of one sweep. runs: run -> how it stands, and seconds still needed if they can be told; wrong: lines on what is
    invalid."""

    name: str
    runs: dict[str, tuple[str, float | None]]
    wrong: list[str]


def standing_of(name: str, words: list[str]) -> Standing:
    """In a process that does this for several sweeps."""
    try:
        compose, jobs = jobs_of([f"sweeps={name}", *words])
        plan = Plan(compose, find_data)
        for each in jobs:
            plan.check(each)
        if not plan.errors():
            require_apart(plan.jobs, compose)
        plan.open()
        valid = [(job.settings, job.run) for job in plan.jobs if job.settings]
        pace = pace_of(valid[0][0].runs) if valid else None
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        return Standing(name, {}, [f"{name}: {one_line(error)}"])
    runs, costs, stand = {}, {}, states(plan.jobs)
    for settings, run in valid:
        key, state = (str(run.folder), stand[run.folder]) if run else (provisional_id(settings), "left")
        runs[key] = state, 0.0
        if state != "done":
            alike = counted(settings)
            costs[alike] = costs.get(alike) or cost(settings, run)
            assert pace is not None
            runs[key] = state, pace.seconds(settings, costs[alike])[0]
    errors = plan.errors()
    some = f"{len(errors)} of the grid's {len(plan.jobs)} combinations are invalid: " if valid else ""
    wrong = [f"{name}: {some}{errors[0]}"] if errors else []
    return Standing(name, runs, wrong)


@functools.cache
def pace_of(runs: str) -> Pace:
    return Pace(Path(runs))


def recorded(runs: Path, scale: str) -> list[Standing]:
    """Sweeps of one's own, of this scale: what their records list, with no estimate of what is not done."""
    found = []
    for path in sorted((runs / "sweeps").glob("*.json")):
        record = json.loads(path.read_text())
        shipped = (ROOT / "sweeps" / f"{path.stem}.yaml").exists()
        if (record["sweep"], record["scale"]) == (path.stem, scale) and not shipped:  # and no earlier list, NAME.SCALE
            stand = {str(runs / run): standing(runs / run) for run in record["runs"]}
            found.append(Standing(path.stem, {run: (s, 0.0 if s == "done" else None) for run, s in stand.items()}, []))
    return found


def row(name: str, runs: dict[str, tuple[str, float | None]]) -> list[str | int]:
    states = Counter(state for state, _ in runs.values())
    needed = sum(seconds or 0.0 for _, seconds in runs.values())
    unknown = sum(seconds is None for _, seconds in runs.values())
    parts = [duration(needed)] * (needed > 0) + [f"{unknown} of unknown length"] * (unknown > 0)
    return [name, len(runs), *(states[state] for state in STATES), " and ".join(parts)]


def overview(words: list[str], names: Sequence[str] = ()) -> str:
    """The table of all sweeps, or of these, and of one's own. words: overrides for every one (scale=small). A run that
    several sweeps need counts once in the last row. Composing takes the time; it is shared out over the cores.
    ValueError for a word that no sweep takes, and for one that names a sweep."""
    if named := [word for word in words if word.lstrip("+").partition("=")[0] == "sweeps"]:
        raise ValueError(f"{named[0]} names one sweep, where all are counted; dry_run=true counts the jobs of one")
    names = names or sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
    first = standing_of(names[0], words)
    if first.wrong and not first.runs:  # by a wrong word, which no other sweep would take either
        raise ValueError(first.wrong[0].removeprefix(f"{first.name}: "))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(cores(), context) as pool:
        backwards, terminal = list(reversed(names)), Console(stderr=True)  # tune, the longest, first
        found, quiet = pool.map(standing_of, backwards, [words] * len(names)), not terminal.is_terminal
        every = list(track(found, "counting jobs", len(names), console=terminal, transient=True, disable=quiet))[::-1]
    config, chosen = composed([]), HydraConfig.get().runtime.choices
    of = {"scale": config.scale, "data": chosen["data"], "runs": config.runs}
    of |= {key: value for key, _, value in (word.partition("=") for word in words) if key in of}
    own = recorded(Path(of["runs"]).expanduser().absolute(), of["scale"])
    every += own
    together = {run: state for each in every for run, state in each.runs.items()}
    rows = [*(row(each.name, each.runs) for each in every), row("all, shared runs once", together)]
    headers = ["sweep", "jobs", *STATES, "time needed"]
    table = tabulate(rows, headers, colalign=("left", *["right"] * 6), disable_numparse=True)
    head = f"Of {' '.join(f'{key}={value}' for key, value in of.items())}; other words count others."
    note = "Time: estimated, of jobs one after the other, without preparing text. dry_run=true tells a sweep's jobs."
    note += (
        f"\nAs {of['runs']}/sweeps/ lists them, whatever their text: {', '.join(each.name for each in own)}."
        * bool(own)
    )
    return "\n".join([head, table, note, *(line for each in every for line in each.wrong)])
