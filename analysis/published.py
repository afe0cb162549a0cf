"""Published numbers beside ours, each with its status; and public curves that the user has as a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.arms import Arm, load

ABSENT = "–"  # not published here, as notes.of_publications says
STATUSES = ("seen", "read off", "unverified")  # from the surest
ROUTING_COLUMNS = ["hyper_id", "step", "router_type", "num_experts", "k", "routing_frequency", "seed"]
ROUTING_COLUMNS += ["model_size_label", "dense_parameter_count", "loss_validation"]


def published(
    names: list[str], arms: dict[str, Arm], used: dict[str, dict[str, str]] | None = None
) -> list[dict[str, Any]]:
    """The tables of published.yaml with these names; a row that one of our arms corresponds to has its name as ours.

    used: arm -> values, as text, of the settings that rows name; a row is alike if ours has all that it names.
    """
    known = load("published")["tables"]
    tables = []
    for name in names:
        rows = [row | {"ours": _ours(row, arms), "table": name} for row in known[name].get("rows", [])]
        for row in rows:
            ours = (used or {}).get(row["ours"], {})
            row["alike"] = all(ours.get(key) == json.dumps(value) for key, value in row.get("setting", {}).items())
        tables.append(known[name] | {"name": name, "rows": rows})
    return tables


def settings(names: list[str]) -> list[str]:
    """The settings that rows of these tables name."""
    known = load("published")["tables"]
    return list(
        dict.fromkeys(key for name in names for row in known[name].get("rows", []) for key in row.get("setting", {}))
    )


def _ours(row: dict[str, Any], arms: dict[str, Arm]) -> str:
    own = [arm for arm in arms.values() if arm.method == row["arm"]]
    if "smallest" in row:
        sizes = [arm for arm in own if arm.place.startswith(f"{row['smallest']}_")]
        return min(sizes, key=lambda arm: arm.x).name if sizes else ""
    return next((arm.name for arm in own if arm.place == str(row.get("at", ""))), "")


def by_arm(tables: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """arm -> the rows that correspond to it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        for row in table["rows"]:
            if row["ours"]:
                found.setdefault(row["ours"], []).append(row)
    return found


def differences(tables: list[dict[str, Any]], pairs: dict[str, str]) -> dict[str, tuple[float, str]]:
    """arm -> what `difference` gives for the first of its rows that has one."""
    rows = by_arm(tables)
    found = {arm: [difference(row, tables, pairs[arm]) for row in rows.get(arm, [])] for arm in pairs}
    return {arm: known[0] for arm, each in found.items() if (known := [one for one in each if one is not None])}


def difference(row: dict[str, Any], tables: list[dict[str, Any]], reference: str) -> tuple[float, str] | None:
    """Nats of a row's perplexity less those of the reference's first row in the same table, with the less sure status
    of the two: the logarithm of their ratio. Of the split where that status is surer, of test where both are as sure;
    None if no split has both."""
    beside = by_arm([table for table in tables if table["name"] == row["table"]]).get(reference)
    splits = [split for split in ("test", "valid") if beside and row.get(split) and beside[0].get(split)]
    if not beside or not splits:
        return None
    status = {
        split: max((each[f"{split}_status"] for each in (row, beside[0])), key=STATUSES.index) for split in splits
    }
    split = min(splits, key=lambda split: STATUSES.index(status[split]))
    return float(np.log(row[split] / beside[0][split])), status[split]


def curves(tables: list[dict[str, Any]], pairs: dict[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """arm -> shares of the published training, and nats of its validation perplexity less those of its reference's."""
    found = {}
    for table in tables:
        known = table.get("curves", {})
        for arm, reference in pairs.items():
            if {arm, reference} <= set(known):
                share = np.array(table["updates"]) / table["updates"][-1]
                found[arm] = share, np.log(np.array(known[arm]) / np.array(known[reference]))
    return found


def routing_curves(path: Path) -> pd.DataFrame:
    """DeepMind's public curves: a row a router, model size and number of experts, with its last validation loss.

    path: curves.csv.gz (or unpacked) of github.com/google-deepmind/scaling_laws_for_routing, whose README describes the
    columns. As in its example.ipynb: each hyper_id's last step, k = 1, every other block routed, seed 42. Columns of
    the result: router_type, size, num_experts, loss. ValueError if a column or every such row is missing. The columns
    and names are from that README and notebook; the reader was never run on the file itself.
    """
    table = pd.read_csv(path)
    if missing := [column for column in ROUTING_COLUMNS if column not in table]:
        raise ValueError(f"{path} has no column {missing[0]}; needed are {', '.join(ROUTING_COLUMNS)}")
    last = table.sort_values("step").groupby("hyper_id").tail(1)
    kept = last.loc[(last["routing_frequency"] == 0.5) & (last["k"] == 1) & (last["seed"] == 42)]
    kept = kept.loc[kept["num_experts"] > 1].sort_values(["router_type", "dense_parameter_count", "num_experts"])
    if kept.empty:
        raise ValueError(f"{path} has no row of routing_frequency 0.5, k 1 and seed 42 with more than one expert")
    columns = {"model_size_label": "size", "loss_validation": "loss"}
    return kept.rename(columns=columns).loc[:, ["router_type", "size", "num_experts", "loss"]].reset_index(drop=True)
