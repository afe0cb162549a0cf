"""What a report says of tuning: the settings that trials chose for each arm, and whether the table's runs have them."""

import csv
import math
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

from analysis import ledger
from analysis.arms import plural

Row = dict[str, str]  # a trial as a ledger has it
Settings = dict[str, Any]  # of a run, flat, with tokens and data_fingerprint, as far as they are known
ROUTERS = Path(__file__).resolve().parent.parent / "conf" / "router"


def notes(results: Path, scale: str, arms: dict[str, list[Settings]], runs: Path | None = None) -> list[str]:
    """A line an arm: how it was tuned, and whether its runs are so; [] without any trials. ValueError as trials_of.

    arms: label -> its runs. The trials' arm is the longest, of their own and of all routers', that a label begins with
    (that of NAME_64 is NAME).
    """
    rows = trials_of(results, scale, [own for settings in arms.values() for own in settings], runs)
    if not rows:
        return []
    lines: dict[str, list[Settings]] = {}
    names = {row["arm"] for row in rows} | {path.stem for path in ROUTERS.glob("*.yaml")}
    for label, own in arms.items():
        known = [name for name in names if label == name or label.startswith(f"{name}_")]
        lines.setdefault(max(known, key=len, default=label), []).extend(own)
    return [f"{arm}: {_note([row for row in rows if row['arm'] == arm], own)}" for arm, own in lines.items()]


def trials_of(results: Path, scale: str, settings: list[Settings], runs: Path | None) -> list[Row]:
    """By the ledger that the runs of these settings were tuned= by, if it is one and still there, else by that of
    sweeps=tune in results, else of its trials in runs; [] if there is none. ValueError if a ledger lacks a column."""
    path = results / scale / "tune" / "ledger.csv"
    used = {Path(own["tuned"]) for own in settings if own.get("tuned")}
    path = used.pop() if len(used) == 1 and min(used).exists() else path
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if missing := {*ledger.COLUMNS} - {*(rows[0] if rows else ledger.COLUMNS)}:
            lacks = f"it has no column {min(missing)}"
            raise ValueError(f"{path} is no ledger that can be read: {lacks}; python -m analysis.report tune writes it")
        return rows
    if runs and (runs / "sweeps" / "tune.json").exists():
        with suppress(ValueError):  # no trials
            trained, found, _ = ledger.ledger(runs, "tune")
            return [
                {key: str(value) for key, value in ledger.written(row).items()} for row in found if trained == scale
            ]
    return []


def _note(rows: list[Row], runs: list[Settings]) -> str:
    """Of one arm."""
    if not rows:
        return "not tuned"
    seeds = sorted({row["seed"] for row in rows})
    tried = f"{ledger.ended(row['outcome'] for row in rows)} {plural('trial', len(rows))} of the plain arm"
    tried += f" (validation, {plural('seed', len(seeds))} {', '.join(seeds)})"
    chosen = next((row for row in rows if row["chosen"] == "True"), None)
    if chosen is None:
        return f"{tried} have ended, and nothing is chosen before all have"
    knob = f" {chosen['knob']}={float(chosen['value']):g}" if chosen["knob"] else ""
    edge = " and still at an edge" if chosen["at_edge"] == "True" else ""
    best = f"train.lr={float(chosen['lr']):g}{knob} is the best of {tried} with {chosen['val_ce']} nats{edge}"
    return ", ".join([best, *_use(rows, chosen, runs)])


def _use(rows: list[Row], chosen: Row, runs: list[Settings]) -> list[str]:
    """Whether the runs of the trials' text and budget have what was chosen, and how many are of others."""
    keys = ["train.lr", *filter(None, [chosen["knob"]])]
    known = [run for run in runs if {*keys, "tokens", "data_fingerprint"} <= run.keys()]
    if not known:
        return ["of these runs not known"]
    text_and_budget = (chosen["data_fingerprint"], float(chosen["tokens"]))
    alike = [run for run in known if (run["data_fingerprint"], run["tokens"]) == text_and_budget]
    best = _place(chosen)
    others = [place for place in (tuple(run[key] for key in keys) for run in alike) if place != best]
    said = ["used"] if alike else []
    if others:
        said = [f"NOT used here by {len(others)} of {len(known)} runs" + _behind(rows, best, {*others})]
    if unlike := len(known) - len(alike):
        said.append(f"{unlike} of {len(known)} runs are of another text or budget than the trials")
    return said


def _behind(rows: list[Row], best: tuple[float, ...], others: set[tuple[float, ...]]) -> str:
    """How much worse than the best these were in the trials, if they are one place, and one that was tried."""
    losses: dict[tuple[float, ...], list[float]] = {}
    for row in rows:
        losses.setdefault(_place(row), []).append(float(row["val_ce"]))  # where one is chosen, all have a loss
    if len(others) > 1 or not others <= losses.keys():
        return ""
    worse = mean(losses[min(others)]) - mean(losses[best])
    return f": theirs was {worse:.4f} nats worse" if worse < math.inf else ": theirs diverged"


def _place(row: Row) -> tuple[float, ...]:
    """Learning rate and, of an arm that has one, the knob's value."""
    return tuple(float(row[key]) for key in ("lr", "value")[: 1 + bool(row["knob"])])
