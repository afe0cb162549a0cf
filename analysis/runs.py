"""Run folders as data frames, and which of the runs may stand in one mean."""

import fcntl
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

# What runs must share to be averaged or compared, and the outcome of those that do not.
COMPARABLE = {"data_fingerprint": "other data", "token_budget": "other token budget", "code": "other commit"}


class Study(NamedTuple):
    """One sweep as found on disk."""

    name: str
    scale: str
    command: str  # that started the sweep
    # A row a run, in job order: id, arm, seed, outcome (finished, diverged, failed, running, stopped, missing,
    # unreadable or one of COMPARABLE's), why, then what result.json holds, code and device.
    runs: pd.DataFrame
    counted: pd.DataFrame  # the rows of runs that enter means: the finished
    curves: pd.DataFrame  # a row a validation of a counted run: arm, seed, tokens, val/ce (nats per token), val/tokens
    config: dict  # of the first finished run


def read_study(name: str, folder: Path) -> Study:
    """Read folder/sweeps/name.json and the runs it lists. ValueError if it is not there or no run has finished."""
    path = folder / "sweeps" / f"{name}.json"
    if not path.exists():
        raise ValueError(f"no sweep {name!r} was run into {folder}; python run.py -m sweeps={name} does it")
    record = _parse(path.read_text(), str(path))
    rows = [read_run(folder, run) for run in dict.fromkeys(record["runs"])]
    outcomes = Counter(row["outcome"] for row in rows)
    if "finished" not in outcomes:
        listed = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()) or "none listed"
        raise ValueError(f"nothing to report yet: no run of {name!r} has finished ({listed})")
    for key, outcome in COMPARABLE.items():  # who differs from most gets an outcome that says so
        finished = [row for row in rows if row["outcome"] == "finished"]
        kept = Counter(row.get(key) for row in finished).most_common(1)[0][0]  # of equally many, the first in job order
        for row in finished:
            if row.get(key) != kept:
                row.update(outcome=outcome, why=f"{str(row.get(key))[:23]}, not {str(kept)[:23]}")
    runs = pd.DataFrame(rows)
    counted = runs.loc[runs["outcome"] == "finished"]
    identity = counted.loc[:, ["id", "arm", "seed"]].itertuples(index=False)
    metrics = [read_metrics(folder / run).assign(arm=arm, seed=seed) for run, arm, seed in identity]
    curves = pd.concat(metrics).reindex(columns=["arm", "seed", "tokens", "val/ce", "val/tokens"])
    curves = curves.dropna(subset="val/ce")
    config = yaml.safe_load((folder / counted["id"].iloc[0] / "config.yaml").read_text())
    return Study(name, record["scale"], shlex.join(record["command"]), runs, counted, curves, config)


def read_run(folder: Path, name: str) -> dict:
    """One row of Study.runs, for the run folder/name. ValueError if no run can be called so."""
    match = re.fullmatch(r"([^/]+)-s(\d+)-[0-9a-f]+", name)
    if match is None:
        raise ValueError(f"a run folder is called <arm>-s<seed>-<id>, not {name!r}")
    try:
        found = _outcome(folder / name)
    except (ValueError, KeyError, OSError) as error:
        found = {"outcome": "unreadable", "why": f"{type(error).__name__}: {error}"}
    return {"id": name, "arm": match[1], "seed": int(match[2]), "outcome": "", "why": ""} | found


def _outcome(folder: Path) -> dict:
    """What became of a run, and its figures. A loss that is not finite is diverged, whatever the run says."""
    if not folder.is_dir():
        return {"outcome": "missing"}
    metrics = read_metrics(folder)
    if (folder / "result.json").exists():
        result, provenance = (_parse((folder / file).read_text(), file) for file in ("result.json", "provenance.json"))
        git = provenance["git"]
        code = "+".join(part for part in (git["commit"][:10], git["dirty"]) if part)
        if result["outcome"] != "finished" or not np.isfinite([result["test/ce"], result["val/ce"]]).all():
            result |= {"outcome": "diverged", "why": f"at step {result['step']}"}
        result.setdefault("token_budget", result["tokens"])  # without early stopping they are the same
        return result | {"code": code, "device": provenance["device"]}
    progress = f"at step {metrics['step'].iloc[-1]}" if len(metrics) else "before its first step"
    if (folder / "lock").exists():
        with (folder / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # a process holds it, and works on this run
                return {"outcome": "running", "why": progress}
    if (folder / "error.txt").exists():
        return {"outcome": "failed", "why": (folder / "error.txt").read_text().strip().split("\n")[-1]}
    return {"outcome": "stopped", "why": progress}


def read_metrics(folder: Path) -> pd.DataFrame:
    """metrics.jsonl, a row a line; a last line cut short by a kill is left out. ValueError if another is no JSON."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return pd.DataFrame([_parse(line, "metrics.jsonl") for line in lines])


def _parse(text: str, file: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
