"""A declared contrast on the runs of a sweep: its figure, and how well the runs bear it out or speak against it."""

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import studentized_range

from analysis.additive_model import fit
from analysis.statistics import Estimate, slope_weights


class Outcome(NamedTuple):
    """What became of one part of a claim. Without runs `lacks` says which, and nothing else is there."""

    part: str  # the contrast in one line
    lacks: str
    estimate: Estimate | None = None
    unit: str = ""
    p_for: float = np.nan  # one-sided: small if what is expected holds
    p_against: float = np.nan  # one-sided: small if its opposite does
    runs: tuple[str, ...] = ()  # by id


def examine(part: dict[str, Any], runs: pd.DataFrame, margin: float) -> Outcome:
    """runs: those of the part's sweep that count: id, arm, seed and the metric. margin in nats.

    By the additive model arm + seed over the arms that the contrast names. ValueError for an unknown expectation.
    """
    weights = _weights(part, list(runs["arm"].unique()))
    named = list(part.get("range") or weights or part["weights"])
    if lacks := [arm for arm in named if arm not in set(runs["arm"])]:
        return Outcome(_line(part), f"{part['sweep']} has no finished run of {', '.join(lacks)}")
    own = runs.loc[runs["arm"].isin(named)]
    figures = own[part.get("metric", "test/ce")].astype(float)
    model = fit(own["arm"], own["seed"], np.log(figures) if part.get("ratio") else figures)
    means = own.assign(figure=figures).groupby("arm")["figure"].mean() if "range" in part else pd.Series(dtype=float)
    chosen = {means.idxmax(): 1.0, means.idxmin(): -1.0} if "range" in part else weights
    estimate = model.contrast(chosen)
    p_for, p_against = _p(part["expect"], estimate, margin)
    if "range" in part:  # the worst and the best were chosen by the data: Tukey's range test
        p_for = float(studentized_range.sf(abs(estimate.t) * 2**0.5, len(named), model.dof)) if model.dof else np.nan
        p_against = estimate.p_within(margin)
    return Outcome(_line(part), "", estimate, _unit(part), float(p_for), float(p_against), tuple(own["id"]))


def _weights(part: dict[str, Any], arms: list[str]) -> dict[str, float]:
    """Of arms, those above 0 summing to 1. Along {x} of each place that all names have; {} of fewer than two places."""
    if "along" not in part:
        given = part.get("weights", {})
        return {arm: weight / sum(w for w in given.values() if w > 0) for arm, weight in given.items()}
    places = {name: _places(name, arms) for name in part["weights"]}
    common = sorted(set.intersection(*(set(found) for found in places.values())))
    if len(common) < 2:
        return {}
    of = part["along"].get("log")
    slope = slope_weights(np.log(common) / np.log(of) if of else common)
    return {
        found[x]: w * s
        for name, found in places.items()
        for w in [part["weights"][name]]
        for x, s in zip(common, slope)
    }


def _places(name: str, arms: list[str]) -> dict[float, str]:
    """x -> arm."""
    pattern = re.escape(name).replace(re.escape("{x}"), r"(\d+)")
    return {float(match[1]): arm for arm in arms if (match := re.fullmatch(pattern, arm))}


def _p(expect: str, estimate: Estimate, margin: float) -> tuple[float, float]:
    """p of what is expected, and p of its opposite, each one-sided."""
    opposite = estimate._replace(value=-estimate.value)
    match expect:
        case "below":
            return estimate.p_below(0.0), opposite.p_below(0.0)
        case "above":
            return opposite.p_below(0.0), estimate.p_below(0.0)
        case "not_above":
            return estimate.p_below(margin), opposite.p_below(-margin)
        case "within":  # either side may speak against it
            return estimate.p_within(margin), min(1.0, 2 * min(estimate.p_below(-margin), opposite.p_below(-margin)))
    raise ValueError(f"expect must be below, above, within or not_above; got {expect}")


def _unit(part: dict[str, Any]) -> str:
    if part.get("ratio"):
        return "of the logarithm"
    along = part.get("along")
    return "nats" if along is None else "nats a doubling" if along.get("log") == 2 else "nats a step"


def _line(part: dict[str, Any]) -> str:
    if "range" in part:
        what = f"the worst less the best of {part['range'][0]} to {part['range'][-1]}"
    else:
        terms = [
            f"{'+' if w > 0 else '-'} {f'{abs(w):g} ' if abs(w) != 1 else ''}{arm}"
            for arm, w in part["weights"].items()
        ]
        what = " ".join(terms).removeprefix("+ ")
    slope = {"along": "slope of ", "ratio": "log ratio of "}
    prefix = next((text for key, text in slope.items() if key in part), "")
    on = (" on log2 x" if part["along"].get("log") else " on x") if "along" in part else ""
    metric = f" in {part['metric']}" if "metric" in part else ""
    expect = {"below": "< 0", "above": "> 0", "within": "= 0 within the margin", "not_above": "<= the margin"}
    return f"{part['sweep']}: {prefix}{what}{on}{metric} {expect[part['expect']]}"
