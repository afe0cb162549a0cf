"""What happened inside the routers of a study, from the runs' evaluation.safetensors and metrics.jsonl.

V vocabulary, E experts. All figures are of the test split, but for settling, which is of the validation split.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from scipy.stats import random_table
from torch import from_numpy

from analysis.metrics import read_metrics
from analysis.runs import Study
from routers.tables import balance_bound

KINDS = ("heavy", "shared", "apart")  # of tokens, by what is in their expert: see token_kinds
Rows = Iterator[dict[str, Any]]


class Evaluation:
    """A run's evaluation.safetensors on test. ValueError if the run has none, or one of before these figures."""

    def __init__(self, folder: Path):
        if not (folder / "evaluation.safetensors").exists():
            raise ValueError(f"{folder} has no evaluation.safetensors, which wandb does not mirror: --explain needs it")
        with safe_open(folder / "evaluation.safetensors", "np") as file:
            self.sums = {key[5:]: file.get_tensor(key) for key in file.keys() if key.startswith("test/")}  # noqa: SIM118
            about = file.metadata() or {}
        if "packed" in about:
            raise ValueError(f"{folder} comes from analysis.pack, which leaves out what --explain needs")
        if "input_tokens" not in self.sums:
            raise ValueError(f"{folder} was evaluated before --explain was made; delete it and train it again")
        self.names = dict(json.loads(about["frequent_tokens"]))  # of frequent ids, in order
        self.layers = sorted(int(key.split("/")[1]) for key in self.sums if key.startswith("load/"))

    def ce(self, kind: np.ndarray) -> float:
        """Nats per counted token after the input tokens that kind (V,) bool picks; NaN if there is none."""
        tokens = self.sums["input_tokens"][kind].sum()
        return float(self.sums["input_ce_sum"][kind].sum() / tokens) if tokens else np.nan


def inside(study: Study, folder: Path, pairs: dict[str, str]) -> pd.DataFrame:
    """One row a figure: quantity, arm, seed, layer (-1: of the whole model), place, value. pairs: arm -> its reference.

    decile_ce: by tenth of the text, place 0 being the most frequent targets. difference_<kind>: cross-entropy after
    tokens of that kind less the reference's after the same tokens. load: over the mean, place 0 being the fullest
    expert; bound: the least that the fullest could have. explained: I(expert; token) / H(expert), and by_chance: the
    same if experts were dealt to tokens at random. settled: see training.session, place being the training tokens.
    """
    counted = study.counted.loc[:, ["id", "arm", "seed"]].to_dict("records")
    found = {run["id"]: Evaluation(folder / run["id"]) for run in counted}
    cells = {(run["arm"], run["seed"]): found[run["id"]] for run in counted}
    rows = []
    for run in counted:
        evaluation, who = found[run["id"]], {"arm": run["arm"], "seed": run["seed"]}
        beside = cells.get((pairs.get(run["arm"], ""), run["seed"]))
        figures = [*deciles(evaluation), *settling(folder / run["id"])]
        for layer in evaluation.layers:
            table = evaluation.sums[f"token_expert/{layer}"]
            figures += [{"layer": layer} | row for row in (*loads(evaluation, layer), *choices(table))]
            if beside is not None and study.config["model"].get("sparse_in") != "encoder":
                kinds = differences(evaluation, beside, table)
                figures += [{"layer": layer} | row for row in kinds]
        rows += [{**who, "layer": -1, "place": 0} | row for row in figures]
    return pd.DataFrame(rows, columns=["quantity", "arm", "seed", "layer", "place", "value"])


def deciles(evaluation: Evaluation) -> Rows:
    sums, tokens = evaluation.sums["decile_ce_sum"], evaluation.sums["decile_tokens"]
    for place in np.flatnonzero(tokens):
        yield {"quantity": "decile_ce", "place": int(place), "value": sums[place] / tokens[place]}


def loads(evaluation: Evaluation, layer: int) -> Rows:
    load, table = evaluation.sums[f"load/{layer}"].astype(float), evaluation.sums[f"token_expert/{layer}"]
    for place, value in enumerate(np.sort(load / max(load.mean(), 1e-9))[::-1]):
        yield {"quantity": "load", "place": place, "value": value}
    each = max(1, round(table.sum() / max(1, evaluation.sums["input_tokens"].sum())))  # experts of a token
    bound = balance_bound(from_numpy(table.sum(1)), len(load), each)
    yield {"quantity": "bound", "value": bound}


def choices(table: np.ndarray) -> Rows:
    """How much of the choice of expert the token id explains. table (V, E) counts."""
    yield {"quantity": "explained", "value": explained(table)}
    used = table[np.ix_(table.sum(1) > 0, table.sum(0) > 0)]
    dealt = random_table(used.sum(1), used.sum(0), seed=0).rvs() if used.size else used
    yield {"quantity": "by_chance", "value": explained(np.asarray(dealt))}


def explained(table: np.ndarray) -> float:
    """I(expert; token) / H(expert) of counts (V, E); NaN if all went to one expert."""
    joint = table / max(1, table.sum())
    token, expert = joint.sum(1), joint.sum(0)
    information = entropy(token) + entropy(expert) - entropy(joint.ravel())
    return float(information / entropy(expert)) if (expert > 0).sum() > 1 else np.nan


def entropy(share: np.ndarray) -> float:
    """In nats."""
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def differences(evaluation: Evaluation, beside: Evaluation, table: np.ndarray) -> Rows:
    for kind, tokens in token_kinds(table, evaluation.sums["input_tokens"]).items():
        yield {"quantity": f"difference_{kind}", "value": evaluation.ce(tokens) - beside.ce(tokens)}
        share = evaluation.sums["input_tokens"][tokens].sum() / evaluation.sums["input_tokens"].sum()
        yield {"quantity": f"share_{kind}", "value": float(share)}


def token_kinds(table: np.ndarray, frequency: np.ndarray) -> dict[str, np.ndarray]:
    """KINDS -> (V,) bool. table (V, E) counts, frequency (V,) of the tokens in the text.

    heavy: the most frequent tokens, which together make up the first tenth of the text. shared: others whose expert (of
    several the most frequent) is also that of a heavy token. apart: the rest.
    """
    order = np.argsort(-frequency, kind="stable")
    heavy = np.zeros(len(frequency), dtype=bool)
    heavy[order] = 10 * (np.cumsum(frequency[order]) - frequency[order]) < frequency.sum()
    main = table.argmax(1)
    company = np.isin(main, main[heavy]) & ~heavy
    return {"heavy": heavy, "shared": company, "apart": ~heavy & ~company}


def settling(folder: Path) -> Rows:
    for line in read_metrics(folder).lines("/settled"):
        for key in line:
            if key.endswith("/settled"):
                layer, place = int(key.split("/")[1]), line["tokens"]
                yield {"quantity": "settled", "layer": layer, "place": place, "value": line[key]}
