"""The numbers of a table: one row an arm, from the runs behind it alone."""

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from analysis.additive_model import (
    AdditiveModel,
    Comparison,
    compare,
    fit,
    noisy_arms,
    paired,
    residual_deviations,
    settled,
)
from analysis.arms import described, group_of, references, timed_against
from analysis.dunnett import seeds_to_separate
from analysis.statistics import mean_and_deviation
from analysis.variation import floor_of_means

TEXT_FIGURES = ("bits_per_byte", "word_perplexity", "unknown_share", "priced_share")
LEAKS = "‡"  # ends the label of an arm that sees the future in evaluation
UNKNOWN = (
    "difference_mean",
    "difference_low",
    "difference_high",
    "p",
    "paired_mean",
    "paired_low",
    "paired_high",
    "paired_p",
    "equivalence_p",
    "seeds_to_separate",
)
WITHIN = {"active_parameters": "parameters/active", "total_parameters": "parameters/total"}
WITHIN |= {"flops_per_token": "train_flops_per_token", "peak_memory_bytes": "peak_memory_bytes"}
SPEEDS = ("tokens_per_second", "train_seconds")
WITHIN |= {key: key for key in ("tokens_per_second", "seconds_to_reference", "documents_low", "documents_high")}
WITHIN |= {"train_seconds": "steady_seconds"}


def summary(runs: pd.DataFrame, style: dict, asked: dict[str, Any]) -> pd.DataFrame:
    """One row an arm, in job order, numbers in full (losses in nats per token): table.csv, and what is printed."""
    counted = runs.loc[runs["outcome"] == "finished"]
    arms = described(runs["arm"], style)
    pairs, timed = references(arms, asked), timed_against(arms, asked)
    model = settled(model_of(counted, arms, asked))
    compared, scatter, noisy = compare(model, {**pairs}), residual_deviations(model), noisy_arms(model)
    shared = len({pairs[str(arm)] for arm in compared}) == 1
    design = {"comparisons": len(compared), "degrees": model.degrees, "rho": 0.5 if shared else 0.0}
    rows = []
    for name, arm in arms.items():
        own: Any = counted.loc[counted["arm"] == name]
        leaks = own["leaks"].astype(str).str.contains("evaluation").any() if "leaks" in own else False
        label = arm.label + (f" {LEAKS}" if leaks else "")
        row = {"arm": name, "method": arm.method, "place": arm.place, "x": arm.x, "label": label}
        row |= {
            "planned": list(runs["arm"]).count(name),
            "n": len(own),
            "reference": name in pairs.values() and name not in pairs,
        }
        row |= {"reference_arm": pairs.get(name, ""), "timed_arm": timed.get(name, ""), **losses(own), **costs(own)}
        row |= differences(model, compared.get(name), name, pairs.get(name), asked["margin"], design)
        row["residual_deviation"] = scatter.get(name, np.nan)
        row["variance_ratio"], row["noisy"] = noisy.get(name, (np.nan, False))
        rows.append(row)
    frame = beside_references(pd.DataFrame(rows))
    frame["below_floor"] = frame["difference_mean"].abs() < floors(frame, runs["noise_floor"].iloc[0])
    return frame


def floors(frame: pd.DataFrame, floor: float) -> list[float]:
    """Of each row's difference the noise floor, of means over as many runs; NaN without one. floor: of single runs."""
    n: dict[str, int] = dict(zip(frame["arm"], frame["n"]))
    return [
        floor_of_means(floor, [1, -1], [n[arm], n[reference]]) if n[arm] and n.get(reference) else np.nan
        for arm, reference in zip(frame["arm"], frame["reference_arm"])
    ]


def model_of(
    counted: pd.DataFrame,
    arms: dict[str, Any],
    asked: dict[str, Any],
    column: str = "test/ce",
    apart: Iterable[Hashable] = (),
) -> AdditiveModel:
    """arm + seed over the table; with groups, whose text or budget differ, a seed is another one in each of them.
    apart: of fit."""
    seeds = counted["seed"].astype(str)
    if asked.get("groups") or "group_of" in asked:
        seeds = seeds + " of " + pd.Series([group_of(arms[arm], asked) for arm in counted["arm"]], index=counted.index)
    return fit(counted["arm"].to_numpy(), seeds.to_numpy(), counted[column].to_numpy(), apart)


def within_groups(frame: pd.DataFrame, asked: dict[str, Any]) -> list[str]:
    """Lines on which arms share text and budget, if the sweep's record has several; else []."""
    found: dict[str, list[str]] = {}
    for arm, group in asked.get("group_of", {}).items():
        found.setdefault(group, []).append(frame.loc[frame["arm"] == arm, "label"].iloc[0])
    lines = [
        "compared only with others of the same text, dictionary and token budget, as this sweep has several, by the",
        "  scatter of all of them:",
    ]
    return lines * bool(found) + [f"  {'; '.join(labels)}" for labels in found.values()]


def further_pairs(model: AdditiveModel, arms: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Lines on declared.yaml's pairs, the first less the second: as the table compares arms with its reference, but
    with intervals that hold for these pairs together, and by the paired t-test; [] if there are none."""
    pairs = {arm: other for arm, other in asked.get("pairs", []) if {arm, other} <= set(model.arms)}
    found = compare(model, {**pairs})
    lines = ["further pairs, in nats: intervals that hold for all of them at once; and the paired t alone"] * bool(
        found
    )
    for arm, other in pairs.items():
        if arm in found:
            each, alone = found[arm], paired(model, arm, other)
            row = f"  {arms[arm].label} less {arms[other].label}: {each.estimate.value:+.3f}"
            row += "" if np.isnan(each.low) else f" [{each.low:+.3f}, {each.high:+.3f}] p {each.p:.2g}"
            row += " (tested alone)" if each.alone else ""
            low, high = alone.interval()
            lines.append(row + ("" if np.isnan(low) else f"; [{low:+.3f}, {high:+.3f}] p {alone.p:.2g}, n = {alone.n}"))
    return lines


def losses(runs: Any) -> dict[str, float]:
    row: dict[str, float] = {}
    for split in ("test", "val"):
        mean, deviation = mean_and_deviation(runs[f"{split}/perplexity"])
        row |= {f"{split}_perplexity": mean, f"{split}_perplexity_deviation": deviation}
        row[f"{split}_ce"], row[f"{split}_ce_deviation"] = mean_and_deviation(runs[f"{split}/ce"])
        for key in TEXT_FIGURES:
            row[f"{split}_{key}"] = mean_of_all(runs, f"{split}/{key}")
    return row | {"below_unigram": (runs["val/unigram_entropy"] - runs["val/ce"]).mean()}


def costs(runs: Any) -> dict[str, float]:
    """Means, of speeds over the runs that had their GPU to themselves; of the time to the reference's loss over those
    of them that came to it, how many those are, and of how many it is known."""
    alone = runs.loc[~sharing(runs)].assign(steady_seconds=lambda own: own["tokens"] / own["tokens_per_second"])
    row = {name: mean_of_all(alone if name in SPEEDS else runs, column) for name, column in WITHIN.items()}
    waited = alone["seconds_to_reference"].astype(float)
    reached = waited[np.isfinite(waited)]
    return row | {"seconds_to_reference": reached.mean(), "reached": len(reached), "timed": int(waited.notna().sum())}


def sharing(runs: pd.DataFrame) -> Any:
    """Which runs shared their GPU with other jobs of their sweep, so that their speed is not their own."""
    return runs["run_command"].fillna("").astype(str).str.contains(r"jobs_per_gpu=(?:[2-9]|\d\d)")


def mean_of_all(runs: Any, column: str) -> float:
    """NaN if a run lacks the figure, as a short run its speed."""
    return float(runs[column].astype(float).mean(skipna=False)) if column in runs and len(runs) else np.nan


def differences(
    model: AdditiveModel,
    found: Comparison | None,
    name: str,
    reference: str | None,
    margin: float,
    design: dict[str, Any],
) -> dict[str, Any]:
    """Of the test loss to the reference's: the pooled fit's, the paired t-test's, equivalence, seeds to separate.
    design: of the comparisons together, as power takes it."""
    row: dict[str, Any] = {"difference_pairs": 0, "separated": False, "alone": False, "equivalent": False}
    row |= dict.fromkeys(UNKNOWN, np.nan)
    if found is None or reference is None:
        return row
    single = paired(model, name, reference)
    row |= {"difference_pairs": single.n, "difference_mean": found.estimate.value, "alone": found.alone}
    row |= {"difference_low": found.low, "difference_high": found.high, "p": found.p, "separated": found.separated}
    row |= {"paired_mean": single.value, "paired_p": single.p}
    row["paired_low"], row["paired_high"] = single.interval()
    row["equivalence_p"] = found.estimate.p_within(margin)
    row["equivalent"] = bool(row["equivalence_p"] < 0.05)
    deviation = single.error * (single.n / 2) ** 0.5 if found.alone else float(model.variance) ** 0.5
    if found.alone:
        design = {"level": 1 - 0.05 / design["comparisons"]}
    if not found.separated and np.isfinite(found.low):
        row["seeds_to_separate"] = seeds_to_separate(found.estimate.value, deviation, **design)
    return row


def beside_references(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds FLOPs and parameters over the reference's."""
    own = [row["reference_arm"] or row["arm"] for row in frame.to_dict("records")]
    for what in ("flops_per_token", "total_parameters"):
        by_arm = dict(zip(frame["arm"], frame[what]))
        frame[f"{what}_over_reference"] = frame[what] / [by_arm[arm] for arm in own]
    return frame
