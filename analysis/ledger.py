"""`python -m analysis.ledger`: what sweeps=tune tried of each arm, and what won on the validation split."""

import argparse
import csv
import math
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLUMNS: tuple[str, ...] = ("scale", "arm", "trial", "lr", "knob", "value", "seed", "val_ce", "run")
COLUMNS += ("chosen", "at_edge", "outcome", "unchanged", "tokens", "data_fingerprint")
SHOWN = ("arm", "trial", "lr", "knob", "value", "seed", "val_ce", "chosen")
MOST = 12  # trials of an arm and seed, those beyond the edges of its space included


def beyond(results: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
    """What is to be tried yet: edges, while no more than MOST are tried. results: place -> validation loss."""
    return edges(results)[: max(0, MOST - len(results))]


def edges(results: dict[tuple[int, ...], float]) -> list[tuple[int, ...]]:
    """The places next to the best one, beyond the edges of what was tried."""
    best = min(results, key=lambda place: results[place])
    if math.isinf(results[best]):
        return []
    further = []
    for axis, at in enumerate(best):
        tried = [place[axis] for place in results]
        steps = [1] * (at == max(tried)) + [-1] * (at == min(tried))
        further += [(*best[:axis], at + step, *best[axis + 1 :]) for step in steps]
    return further


def ledger(runs: Path, sweep: str) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The scale, a row a trial as in COLUMNS, and what is open. An arm's best trial is chosen once all have ended and
    no seed's best lies at an edge with fewer than MOST tried; one of other code, data or budget than most does not
    count. ValueError if the sweep has no record or no trials."""
    from analysis.runs import read_record, read_runs  # pandas, of which planning a sweep has no need

    record, arms = read_record(sweep, runs), {}
    for cell, run in zip(record.cells, read_runs(record, runs)[0].to_dict("records")):
        if cell.get("place"):
            loss = {"finished": run.get("val/ce"), "diverged": math.inf}.get(run["outcome"])
            plain = not cell["arm"].endswith("_".join(["_trial", *map(str, cell["place"])]))
            own = {"val_ce": loss, "outcome": run["outcome"], "unchanged": plain}
            if loss is not None:
                own |= {key: run[key] for key in ("tokens", "data_fingerprint")}
            arms.setdefault(cell["tuned"], []).append(cell | own)
    if not arms:
        raise ValueError(f"the sweep {sweep!r} has no trials: it is no sweep of trial=all")
    rows, left = [], []
    for arm, cells in arms.items():
        best, at_edge, why = choose(cells)
        left += [f"{arm}: {why}"] if why else []
        for number, cell in enumerate(cells):
            own = {key: cell.get(key) for key in COLUMNS}
            own |= {"scale": record.scale, "arm": arm, "trial": number, "chosen": best == tuple(cell["place"])}
            rows.append({key: (own | {"at_edge": own["chosen"] and at_edge})[key] for key in COLUMNS})
    return record.scale, rows, left


def choose(cells: list[dict[str, Any]]) -> tuple[tuple[int, ...] | None, bool, str]:
    """Of the places that all seeds have tried the one of the lowest mean validation loss, or None; whether it lies at
    an edge of them; and why nothing is chosen yet."""
    losses: dict[int, dict[tuple[int, ...], float]] = {}
    for cell in cells:
        if cell["val_ce"] is None:
            left = sum(each["val_ce"] is None for each in cells)
            return None, False, f"{left} of {len(cells)} trials have not ended, or do not count"
        losses.setdefault(cell["seed"], {})[tuple(cell["place"])] = cell["val_ce"]
    if further := sum(len(beyond(own)) for own in losses.values()):  # each seed goes on by itself, as sweeps.plan does
        return None, False, f"the best of {len(cells)} lies at an edge, {further} more to try"
    common = set.intersection(*(set(own) for own in losses.values()))
    means = {place: sum(own[place] for own in losses.values()) / len(losses) for place in sorted(common)}
    best = min(means, key=lambda place: means[place])
    if math.isinf(means[best]):
        return None, False, "no trial finished"
    return best, bool(edges(means)), ""


def written(row: dict[str, Any]) -> dict[str, Any]:
    """A row as ledger.csv has it."""
    empty = {key: "" for key, value in row.items() if value is None}
    losses = {} if row["val_ce"] is None else {"val_ce": f"{row['val_ce']:.6f}", "tokens": f"{row['tokens']:.0f}"}
    return row | empty | losses


def ended(outcomes: Iterable[str]) -> str:
    """How many trials there are, or how many of how many have ended and count."""
    found = [outcome in ("finished", "diverged") for outcome in outcomes]
    return str(len(found)) if all(found) else f"{sum(found)} of {len(found)}"


def write(runs: Path, results: Path, sweep: str) -> tuple[str, str]:
    """Write results/<scale>/<sweep>/ledger.csv; return its rows to print, and what is open. ValueError as ledger."""
    scale, rows, left = ledger(runs, sweep)
    rows = [written(row) for row in rows]
    folder = results / scale / sweep
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ledger.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = [{key: row[key] for key in SHOWN} | {"chosen": "*" * row["chosen"]} for row in rows]
    edge = dict.fromkeys(row["arm"] for row in rows if row["at_edge"])
    lines = ["not chosen yet; the same sweep again goes on:", *(f"  {line}" for line in left)] if left else []
    lines += [f"{arm}: the best lies at an edge still, and no more are tried" for arm in edge]
    usable = sorted({row["arm"] for row in rows if row["chosen"]})
    few = f" of {', '.join(usable)}" if left and usable else ""
    path = folder / "ledger.csv"
    use = f"tuned={path} uses it{few} in any sweep of this scale" if usable else "nothing is chosen in it yet"
    lines += [f"{path}: {use}"]
    return tabulate(shown, headers="keys", disable_numparse=True, missingval=""), "\n".join(lines)


def main() -> None:
    """Print the ledger, or leave with status 2 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m analysis.ledger", description=__doc__, allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", default="tune", help="a sweep of trials")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where the ledger goes")
    try:
        print(*write(**vars(parser.parse_args())), sep="\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"analysis.ledger: {error}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
