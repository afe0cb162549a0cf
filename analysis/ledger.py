"""`python -m analysis.ledger`: what sweeps=tune tried of each arm, and what won on the validation split."""

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLUMNS: tuple[str, ...] = ("arm", "trial", "lr", "knob", "value", "seed", "val_ce", "run", "chosen")
MOST = 12  # trials of an arm and seed, those beyond the edges of its space included


def beyond(results: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
    """The places next to the best one, beyond the edges of what was tried. results: place -> validation loss."""
    best = min(results, key=lambda place: results[place])
    if math.isinf(results[best]):
        return []
    further = []
    for axis, at in enumerate(best):
        tried = [place[axis] for place in results]
        steps = [1] * (at == max(tried)) + [-1] * (at == min(tried))
        further += [(*best[:axis], at + step, *best[axis + 1 :]) for step in steps]
    return further[: max(0, MOST - len(results))]


def ledger(runs: Path, sweep: str) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The scale, a row a trial as in COLUMNS, and what is open. An arm's best trial is chosen once all have ended and
    it does not lie at an edge, or MOST have been tried. ValueError if the sweep has no record or no trials."""
    path = runs / "sweeps" / f"{sweep}.json"
    if not path.exists():
        raise ValueError(f"no sweep {sweep!r} was run into {runs}; python run.py -m sweeps={sweep} does it")
    record = json.loads(path.read_text())
    arms: dict[str, list[dict[str, Any]]] = {}
    for cell in record["cells"]:
        if cell.get("place"):
            arms.setdefault(cell["tuned"], []).append(cell | {"val_ce": _validation(runs / cell["run"])})
    if not arms:
        raise ValueError(f"{path} has no trials: it is no sweep of trial=all")
    rows, left = [], []
    for arm, cells in arms.items():
        best, why = choose(cells)
        left += [f"{arm}: {why}"] if why else []
        for number, cell in enumerate(cells):
            row = {"arm": arm, "trial": number, **{key: cell[key] for key in ("lr", "knob", "value", "seed", "run")}}
            chosen = best == tuple(cell["place"])
            rows.append({key: (row | {"val_ce": cell["val_ce"], "chosen": chosen})[key] for key in COLUMNS})
    return record["scale"], rows, left


def choose(cells: list[dict[str, Any]]) -> tuple[tuple[int, ...] | None, str]:
    """The place of the lowest mean validation loss over seeds, or None and why nothing is chosen yet."""
    losses: dict[tuple[int, ...], list[float]] = {}
    for cell in cells:
        if cell["val_ce"] is None:
            left = sum(each["val_ce"] is None for each in cells)
            return None, f"{left} of {len(cells)} trials have not ended"
        losses.setdefault(tuple(cell["place"]), []).append(cell["val_ce"])
    means = {place: sum(each) / len(each) for place, each in losses.items()}
    best = min(means, key=lambda place: means[place])
    if math.isinf(means[best]):
        return None, "no trial finished"
    if further := beyond(means):
        return None, f"the best of {len(means)} lies at an edge, {len(further)} more to try"
    return best, ""


def _validation(folder: Path) -> float | None:
    """A run's validation loss, infinite if it diverged; None while it has no result."""
    path = folder / "result.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return None if result is None else result["val/ce"] if result["outcome"] == "finished" else math.inf


def notes(results: Path, scale: str, arms: list[str]) -> list[str]:
    """What a report prints under its table, a line an arm: how it was tuned. [] if there is no ledger.

    arms: labels; the ledger's arm is the longest that a label begins with (that of NAME_64 is NAME).
    """
    path = results / scale / "tune" / "ledger.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = {}
    for arm in arms:
        known = [name for name in {row["arm"] for row in rows} if arm == name or arm.startswith(f"{name}_")]
        name = max(known, key=len, default=None)
        lines[name or arm] = _note([row for row in rows if row["arm"] == name], name or arm)
    return list(lines.values())


def _note(rows: list[dict[str, str]], arm: str) -> str:
    chosen = next((row for row in rows if row["chosen"] == "True"), None)
    if not rows:
        return f"{arm}: not tuned"
    tried = f"{len(rows)} trials on the validation split, seeds {', '.join(sorted({row['seed'] for row in rows}))}"
    if chosen is None:
        return f"{arm}: {tried}, nothing chosen yet"
    knob = f", {chosen['knob']}={float(chosen['value']):g}" if chosen["knob"] else ""
    return f"{arm}: train.lr={float(chosen['lr']):g}{knob} is the best of {tried} (validation {chosen['val_ce']} nats)"


def write(runs: Path, results: Path, sweep: str) -> str:
    """Write results/<scale>/<sweep>/ledger.csv; return what to print. ValueError as ledger."""
    scale, rows, left = ledger(runs, sweep)
    for row in rows:
        row["val_ce"] = "" if row["val_ce"] is None else f"{row['val_ce']:.6f}"
    folder = results / scale / sweep
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ledger.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = [{key: row[key] for key in COLUMNS if key != "run"} | {"chosen": "*" * row["chosen"]} for row in rows]
    lines = [tabulate(shown, headers="keys", disable_numparse=True, missingval="")]
    if left:
        lines += ["not chosen yet; the same sweep again goes on:", *(f"  {line}" for line in left)]
    return "\n".join([*lines, f"{folder / 'ledger.csv'}: tuned={folder / 'ledger.csv'} uses it in any sweep"])


def main() -> None:
    """Print the ledger, or leave with status 2 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m analysis.ledger", description=__doc__)
    parser.add_argument("sweep", nargs="?", default="tune", help="a sweep of trials")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the ledger goes")
    try:
        print(write(**vars(parser.parse_args())))
    except (ValueError, OSError) as error:
        parser.exit(2, f"analysis.ledger: {error}\n")


if __name__ == "__main__":
    main()
