"""Run folders as data frames, and which of them may stand in one mean."""

import fcntl
import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

# What runs must share to be averaged or compared, and what to call it when they do not.
COMPARABLE = {"data_fingerprint": "other data", "tokens": "other token budget", "code": "other commit"}


@dataclass(frozen=True)
class Study:
    """One sweep as found on disk.

    runs: a row for each run of the sweep, in job order: id, arm, seed, outcome (finished, diverged, failed,
    running, stopped, missing, unreadable, repeated or one of COMPARABLE's), why, counted, code, device, and
    what result.json holds. curves: a row a validation of a counted run: arm, seed, step, tokens, val/ce.
    """

    name: str
    scale: str
    command: str  # that started the sweep
    runs: pd.DataFrame
    curves: pd.DataFrame
    config: dict  # of the first counted run

    @property
    def counted(self) -> pd.DataFrame:
        """The rows that enter means."""
        return self.runs.loc[self.runs["counted"]]


def read_study(name: str, folder: Path) -> Study:
    """Read `folder/sweeps/name.json` and the runs it lists. ValueError if none is there or finished."""
    record = _read_record(name, folder)
    rows = compare([read_run(folder / run) for run in record["runs"]])
    counted = [row for row in rows if row["counted"]]
    if not counted:
        outcomes = Counter(row["outcome"] for row in rows)
        listed = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.items())
        raise ValueError(f"nothing to report yet: no run of {name!r} has finished ({listed})")
    runs = pd.DataFrame([{key: value for key, value in row.items() if key != "curve"} for row in rows])
    curves = pd.concat([row["curve"] for row in counted], ignore_index=True)
    config = yaml.safe_load((folder / counted[0]["id"] / "config.yaml").read_text())
    return Study(name, record["scale"], shlex.join(record["command"]), runs, curves, config)


def _read_record(name: str, folder: Path) -> dict:
    sweeps = folder / "sweeps"
    known = sorted(path.stem for path in sweeps.glob("*.json"))
    if name not in known:
        there = f"there: {', '.join(known)}" if known else "none there"
        raise ValueError(f"no sweep {name!r} in {sweeps} ({there}); python run.py -m sweeps={name} makes it")
    record = json.loads((sweeps / f"{name}.json").read_text())
    runs = list(dict.fromkeys(record["runs"]))
    if not runs or any(Path(part).name != part for part in [record["scale"], *runs]):
        raise ValueError(f"{sweeps / name}.json must list names of folders in {folder}, not {runs}")
    return record | {"runs": runs}


def read_run(folder: Path) -> dict:
    """One row: what the folder's name says, what became of the run, and its figures and curve, if any."""
    arm, seed = _name(folder.name)
    row = {"id": folder.name, "arm": arm, "seed": seed, "why": ""}
    if not folder.is_dir():
        return row | {"outcome": "missing"}
    try:
        if (folder / "result.json").exists():
            curve = read_metrics(folder, "val/ce").reindex(columns=["step", "tokens", "val/ce"])
            return row | _result(folder) | {"curve": curve.assign(arm=arm, seed=seed)}
        return row | _unfinished(folder)
    except (ValueError, KeyError, OSError) as error:
        return row | {"outcome": "unreadable", "why": str(error)}


def _name(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)-s(\d+)-[0-9a-f]+", name)
    if match is None:
        raise ValueError(f"a run folder is called <arm>-s<seed>-<id>, not {name!r}")
    return match[1], int(match[2])


def _result(folder: Path) -> dict:
    """The figures of a run that came to an end. "Finished" with a loss that is not finite is diverged."""
    result = json.loads((folder / "result.json").read_text())
    if lacking := {"outcome", "step", "tokens", "data_fingerprint"} - result.keys():
        raise ValueError(f"result.json lacks {', '.join(sorted(lacking))}")
    provenance = json.loads((folder / "provenance.json").read_text())
    losses = [result.get("test/ce", np.nan), result.get("val/ce", np.nan)]
    finished = result["outcome"] == "finished" and bool(np.isfinite(losses).all())
    result |= {"outcome": "finished"} if finished else {"outcome": "diverged", "why": f"at step {result['step']}"}
    return result | {"code": _code(provenance["git"]), "device": provenance["device"]}


def _code(git: dict) -> str:
    """The commit, and a digest of what differed from it."""
    return git["commit"][:10] + (f"+{git['dirty']}" if git["dirty"] else "")


def _unfinished(folder: Path) -> dict:
    if _locked(folder / "lock"):
        return {"outcome": "running", "why": _progress(folder)}
    if (folder / "error.txt").exists():
        lines = (folder / "error.txt").read_text(errors="replace").strip().split("\n")
        return {"outcome": "failed", "why": lines[-1].strip()}
    return {"outcome": "stopped", "why": _progress(folder)}


def _locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _progress(folder: Path) -> str:
    metrics = read_metrics(folder)
    return f"at step {metrics['step'].iloc[-1]}" if len(metrics) else "before its first step"


def read_metrics(folder: Path, key: str = "step") -> pd.DataFrame:
    """The lines of metrics.jsonl that have `key`, one row a step; of a step there twice, the last.

    A last line without its end, as a kill or a running job leaves it, is left out. ValueError if another is.
    """
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    try:
        rows = [json.loads(line) for line in text.split("\n")[:-1] if f'"{key}"' in line]
    except json.JSONDecodeError as error:
        raise ValueError(f"metrics.jsonl holds a line that is not JSON: {error.doc[:40]!r}") from error
    frame = pd.DataFrame(rows, columns=None if rows else ["step"])
    return frame.drop_duplicates("step", keep="last").sort_values("step")


def compare(rows: list[dict]) -> list[dict]:
    """Mark as `counted` the largest set of finished runs with equal data, token budget and code.

    The others get an outcome that says why, and so does a second run of one arm and seed. Of sets equally
    large the first in job order is kept.
    """
    shared = Counter(_shared(row) for row in rows if row["outcome"] == "finished")
    kept = shared.most_common(1)[0][0] if shared else ()
    marked, seen = [], set()
    for row in rows:
        if row["outcome"] == "finished":
            row = row | _differing(_shared(row), kept)
        if row["outcome"] == "finished" and (row["arm"], row["seed"]) in seen:
            row = row | {"outcome": "repeated", "why": "another run of this arm and seed is counted"}
        counted = row["outcome"] == "finished"
        seen |= {(row["arm"], row["seed"])} if counted else set()
        marked.append(row | {"counted": counted})
    return marked


def _shared(row: dict) -> tuple:
    return tuple(row[key] for key in COMPARABLE)


def _differing(mine: tuple, kept: tuple) -> dict:
    """The outcome of a finished run that must not be averaged with the others; nothing if it may be."""
    pairs = [
        (outcome, f"{str(this)[:24]}, not {str(that)[:24]}")
        for outcome, this, that in zip(COMPARABLE.values(), mine, kept, strict=True)
        if this != that
    ]
    return {"outcome": pairs[0][0], "why": "; ".join(why for _, why in pairs)} if pairs else {}
