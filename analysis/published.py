"""Published numbers beside ours, each with its status; and public curves that the user has as a file."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.arms import Arm, load

ABSENT = "not published here"
STATUSES = ("seen", "read off", "unverified")  # from the surest
ROUTING_COLUMNS = ["hyper_id", "step", "router_type", "num_experts", "k", "routing_frequency", "seed"]
ROUTING_COLUMNS += ["model_size_label", "dense_parameter_count", "loss_validation"]


def published(names: list[str], arms: dict[str, Arm]) -> list[dict[str, Any]]:
    """The tables of published.yaml with these names; a row that one of our arms corresponds to has its name as ours."""
    known = load("published")["tables"]
    tables = []
    for name in names:
        rows = [row | {"ours": _ours(row, arms), "table": name} for row in known[name].get("rows", [])]
        tables.append(known[name] | {"name": name, "rows": rows})
    return tables


def _ours(row: dict[str, Any], arms: dict[str, Arm]) -> str:
    place = str(row.get("at", ""))
    return next((name for name, arm in arms.items() if arm.method == row["arm"] and arm.place == place), "")


def by_arm(tables: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """arm -> the rows that correspond to it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for table in tables:
        for row in table["rows"]:
            if row["ours"]:
                found.setdefault(row["ours"], []).append(row)
    return found


def differences(tables: list[dict[str, Any]], pairs: dict[str, str]) -> dict[str, tuple[float, str]]:
    """arm -> nats of its published perplexity less those of its reference's, with the less sure status of the two.

    Of test where both are published, else of validation, of the first table that has both, and of its first row for
    the arm; the logarithm of a ratio of perplexities.
    """
    found = {}
    for arm, reference in pairs.items():
        for split, table in ((split, table) for split in ("valid", "test") for table in reversed(tables)):
            rows = by_arm([table])
            both = [row for name in (arm, reference) for row in rows.get(name, [])[:1] if row.get(split)]
            if len(both) == 2:
                status = max((row[f"{split}_status"] for row in both), key=STATUSES.index)
                found[arm] = float(np.log(both[0][split] / both[1][split])), status
    return found


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
