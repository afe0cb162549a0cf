"""Runs as data frames, and which of them may stand in one mean."""

import fcntl
import functools
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml

from analysis.metrics import Metrics, parsed, read_metrics

# What runs must share to be averaged or compared, and the outcome of those that do not: the code over the whole sweep,
# as contrasts may cross its groups, the others in each group.
COMPARABLE = {"data_fingerprint": "other data", "token_budget": "other token budget", "code": "other commit"}
COMPARABLE["own_files"] = "other version"  # of the files that a router of one's own is written in
UNLISTED = (
    "sweeps/{}.json is not there: the runs are those whose config names this sweep; cells that were first trained"
    " for another sweep are missing"
)
# Commits whose runs count as of one code, by declaration, for studies of many days: [{commits: [...], why: ...}]
SAME_CODE = Path(__file__).resolve().parents[1] / "results" / "same_code.yaml"
SHORT = 10  # digits of a commit that Study.runs has
ENDED = ("finished", "diverged")  # the outcomes of runs that have a result


class Found(NamedTuple):
    """One run as it was found in one place."""

    row: dict[str, Any]  # of Study.runs
    metrics: Metrics
    config: Callable[[], dict[str, Any]]
    origin: Callable[[], dict[str, Any]]  # what provenance.json says, as far as the place has it
    mirrored: bool = False  # found elsewhere than in a run folder


Mirror = Mapping[str, Callable[[], Found]]  # of another place than run folders, by run id, read when it is asked for


class Study(NamedTuple):
    """One sweep as it was found."""

    name: str
    scale: str
    command: str  # that started the sweep
    # A row a run, in job order: id, arm, seed, outcome (finished, diverged, failed, running, stopped, missing,
    # unreadable or one of COMPARABLE's), why, flaws, then what result.json holds, code, device and metrics.routing's.
    runs: pd.DataFrame
    counted: pd.DataFrame  # the rows of runs that enter means: the finished
    curves: pd.DataFrame  # a row a validation of a counted run: arm, seed, and metrics.CURVE (nats per token)
    config: dict  # of the first finished run
    listed: str  # where the list of runs is from, if not from the sweep's own record
    found: dict[str, Found]  # by run id


class Record(NamedTuple):
    """Which runs a sweep compares, in job order."""

    scale: str
    command: str
    # run: its folder's name; arm, seed and so on: what it is in this sweep; group: of those that share data and budget
    cells: list[dict[str, Any]]
    listed: str = ""  # of Study


def read_study(
    name: str, folder: Path, mirrors: Sequence[Mirror] = (), group: Callable[[str], str] = lambda arm: ""
) -> Study:
    """The runs that folder/sweeps/name.json lists, from their folders and from mirrors; a run found in several places
    counts once. Without that file, the runs of mirrors that were made for this sweep. group: arm -> what names those
    that must share data and budget, if the file does not say.

    ValueError if there is neither, or if no run has finished.
    """
    record = read_record(name, folder, mirrors)
    runs, found = read_runs(record, folder, mirrors, group)
    if "finished" not in set(runs["outcome"]):
        outcomes = Counter(runs["outcome"]).items()
        listed = ", ".join(f"{n} {outcome}" for outcome, n in outcomes) or "none listed"
        raise ValueError(f"nothing to report yet: no run of {name!r} has finished ({listed})")
    logged = [
        found[run].metrics.routing() if kind == "finished" else {} for run, kind in zip(runs["id"], runs["outcome"])
    ]
    runs = pd.concat([runs, pd.DataFrame(logged, index=runs.index)], axis="columns")
    counted = runs.loc[runs["outcome"] == "finished"]
    identity = counted.loc[:, ["id", "arm", "seed"]].itertuples(index=False)
    every = [found[run].metrics.curve().assign(arm=arm, seed=seed) for run, arm, seed in identity]
    curves = pd.concat([curve for curve in every if len(curve)] or every[:1])
    config = found[counted["id"].iloc[0]].config()
    return Study(name, record.scale, record.command, runs, counted, curves, config, record.listed, found)


def read_runs(
    record: Record, folder: Path, mirrors: Sequence[Mirror] = (), group: Callable[[str], str] = lambda arm: ""
) -> tuple[pd.DataFrame, dict[str, Found]]:
    """Study.runs of a record, also if none has finished, and by id what was found of each run."""
    found = {run: find_run(folder, run, mirrors) for run in dict.fromkeys(cell["run"] for cell in record.cells)}
    rows = [found[cell["run"]].row | {key: cell[key] for key in cell if key != "run"} for cell in record.cells]
    _set_apart(rows, group)
    return pd.DataFrame(rows, columns=None if rows else ["id", "arm", "seed", "outcome"]), found


def read_record(name: str, folder: Path, mirrors: Sequence[Mirror] = ()) -> Record:
    """What folder/sweeps/name.json says; without it, what the configs of mirrored runs say of their sweep."""
    path = folder / "sweeps" / f"{name}.json"
    if path.exists():
        record = parsed(path.read_text(), str(path))
        # a run may stand in many sweeps, in each under a label of its own; records from before that have names alone
        cells = record.get("cells") or [{"run": run} for run in dict.fromkeys(record["runs"])]
        return Record(record["scale"], shlex.join(record["command"]), cells)
    runs = {run: find().config() for mirror in mirrors for run, find in mirror.items()}
    runs = {run: config for run, config in runs.items() if config.get("sweep") == name}
    if not runs:
        raise ValueError(f"no sweep {name!r} was run into {folder}; {_instead(name, folder)}")
    scale = Counter(config["scale"] for config in runs.values()).most_common(1)[0][0]
    command = f"python run.py -m sweeps={name} scale={scale}"
    return Record(scale, command, [{"run": run} for run in sorted(runs)], UNLISTED.format(name))


def _instead(name: str, folder: Path) -> str:
    """What to do about a sweep that was not run."""
    if Path(name).name != name:
        made = Path(name) / "runs.csv"
        rule = "a sweep is given by its name alone, and a report that was made by its runs.csv"
        return rule + f": {made}" * made.exists()
    if (Path(__file__).parents[1] / "sweeps" / f"{name}.yaml").exists():
        return f"python run.py -m sweeps={name} does it"
    known = ", ".join(sorted(path.stem for path in (folder / "sweeps").glob("*.json")))
    return f"sweeps/ has none of that name either; run were {known or 'none'}"


def find_run(folder: Path, name: str, mirrors: Sequence[Mirror] = ()) -> Found:
    """Of all places the one that knows most of the run: its result, or else its last step; of equals the first."""
    here = read_run(folder, name)
    if here.row["outcome"] in ENDED:
        return here
    places = [here, *(mirror[name]() for mirror in mirrors if name in mirror)]
    return max(places, key=lambda found: (found.row["outcome"] in ENDED, found.metrics.last_step))


def read_run(folder: Path, name: str) -> Found:
    """The run folder/name. ValueError if no run can be called so."""
    path, metrics = folder / name, Metrics([], [])
    row = identity(name)
    try:
        if path.is_dir():
            metrics = read_metrics(path)
            row |= {"flaws": "; ".join(metrics.flaws)} | _outcome(path, metrics)
        else:
            row["outcome"] = "missing"
    except (ValueError, KeyError, OSError) as error:
        row |= {"outcome": "unreadable", "why": f"{type(error).__name__}: {error}"}
    config = functools.cache(lambda: yaml.safe_load((path / "config.yaml").read_text()))
    return Found(row, metrics, config, lambda: _parsed_file(path / "provenance.json"))


def _parsed_file(path: Path) -> dict[str, Any]:
    """{} if it is not there."""
    return parsed(path.read_text(), path.name) if path.exists() else {}


def identity(name: str) -> dict[str, Any]:
    """What a run's name says, and the columns that every row has. ValueError if no run can be called so."""
    match = re.fullmatch(r"([^/]+)-s(\d+)-[0-9a-f]+", name)
    if match is None:
        raise ValueError(f"a run folder is called <arm>-s<seed>-<id>, not {name!r}")
    return {"id": name, "arm": match[1], "seed": int(match[2]), "outcome": "", "why": "", "flaws": ""}


def declared_same() -> list[dict[str, Any]]:
    """What SAME_CODE says, its commits as Study.runs has them. ValueError if it is not a list of commits and why."""
    said = yaml.safe_load(SAME_CODE.read_text()) if SAME_CODE.exists() else []
    if not all(isinstance(each, dict) and each.get("commits") and each.get("why") for each in said or []):
        raise ValueError(f"{SAME_CODE} must be a list of {{commits: [...], why: ...}}")
    return [{"commits": [str(commit)[:SHORT] for commit in each["commits"]], "why": each["why"]} for each in said or []]


def _set_apart(rows: list[dict[str, Any]], group: Callable[[str], str]) -> None:
    """Who differs from most finished runs gets an outcome that says so."""
    same = {commit: each["commits"][0] for each in declared_same() for commit in each["commits"]}

    def shared(row: dict[str, Any], key: str) -> Any:
        value = row.get(key)
        return same.get(value, value) if key == "code" else value

    for key, outcome in COMPARABLE.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["outcome"] == "finished":
                alike = {"code": "", "own_files": row["arm"]}.get(key, row.get("group") or group(row["arm"]))
                groups.setdefault(alike, []).append(row)
        for finished in groups.values():
            kept = Counter(shared(row, key) for row in finished).most_common(1)[0][0]  # of equally many, the first
            for row in finished:
                if shared(row, key) != kept:
                    row.update(outcome=outcome, why=f"{str(row.get(key))[:23]}, not {str(kept)[:23]}")


def _outcome(folder: Path, metrics: Metrics) -> dict[str, Any]:
    """What became of a run, and its figures."""
    if (folder / "result.json").exists():
        result, origin = (parsed((folder / file).read_text(), file) for file in ("result.json", "provenance.json"))
        return judged(result, origin)
    progress = metrics.progress()
    if (folder / "lock").exists():
        with (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # a process holds it, and works on this run
                return {"outcome": "running", "why": progress}
    if (folder / "error.txt").exists():
        return {"outcome": "failed", "why": (folder / "error.txt").read_text().strip().split("\n")[-1]}
    return {"outcome": "stopped", "why": progress}


def judged(result: dict[str, Any], origin: dict[str, Any]) -> dict[str, Any]:
    """result.json's figures, code and device. A loss that is not finite is diverged, whatever the run says."""
    code = "+".join(part for part in (origin["git"]["commit"][:SHORT], origin["git"]["dirty"]) if part)
    if result["outcome"] != "finished" or not np.isfinite([result["test/ce"], result["val/ce"]]).all():
        result = result | {"outcome": "diverged", "why": f"at step {result['step']}"}
    budget = result.get("token_budget", result["tokens"])  # without early stopping they are the same
    own = origin["git"].get("own") or ""
    return result | {"token_budget": budget, "code": code, "own_files": own, "device": origin["device"]}
