"""A part of a claim as claims.yaml declares it: the contrast in words, the arms it names, their weights and figures."""

import re
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import slope_weights

CE = "test/ce"
TIMES = "times"  # the unit of a logarithm of a ratio

Part = dict[str, Any]


def line(part: Part) -> str:
    """The contrast, its sweep and what is expected, in words."""
    if "range" in part:
        what = f"the worst less the best of {part['range'][0]} to {part['range'][-1]}"
    else:
        terms = [
            f"{'+' if w > 0 else '-'} {f'{abs(w):g} ' if abs(w) != 1 else ''}{arm}"
            for arm, w in part["weights"].items()
        ]
        what = " ".join(terms).removeprefix("+ ")
    slope = {"along": "slope of ", "ratio": "log ratio of "}
    prefix = next((text for key, text in slope.items() if key in part), "") if part["expect"] != "told" else "where "
    on = (" on log2 x" if part["along"].get("log") else " on x") if "along" in part else ""
    metric = f" in {part['metric']}" if "metric" in part else ""
    bound = f"-{part['by']:g}" if "by" in part else "0"
    expect = {"below": f"< {bound}", "above": "> 0", "within": "= 0 within the margin", "not_above": "<= the margin"}
    expect |= {"told": "is 0; decides nothing"}
    return f"{part['sweep']}: {prefix}{what}{on}{metric} {expect[part['expect']]}"


def unit_of(part: Part) -> str:
    if part.get("ratio"):
        return TIMES
    along = part.get("along")
    return "nats" if along is None else "nats a doubling" if along.get("log") == 2 else "nats a step"


def at_scale(part: Part, runs: pd.DataFrame) -> Part:
    """With `at`, the {x} of arms' names is a number that the scale decides."""
    if "at" not in part or "scale" not in runs or (x := part["at"].get(runs["scale"].iloc[0])) is None:
        return part
    return part | {"weights": {placed(name, x): weight for name, weight in part["weights"].items()}}


def places_of(part: Part, runs: pd.DataFrame) -> list[float]:
    """Of {x}: those declared and all that the sweep has for any of the names, whether or not they have finished, for a
    slope over what is left would be another claim. [] without {x}, or of fewer than two."""
    if "along" not in part:
        return []
    declared = part["along"].get("places", [])
    if isinstance(declared, dict):
        declared = declared.get(runs["scale"].iloc[0], []) if "scale" in runs else []
    patterns = [re.escape(name).replace(re.escape("{x}"), r"(\d+)") for name in part["weights"] if "{x}" in name]
    found = [re.fullmatch(pattern, str(arm)) for pattern in patterns for arm in runs["arm"].unique()]
    places = {float(x) for x in declared} | {float(match[1]) for match in found if match}
    return sorted(places) if len(places) > 1 else []


def placed(name: str, place: float) -> str:
    return name.replace("{x}", f"{place:g}")


def axis_of(part: Part, places: list[float]) -> np.ndarray:
    """(places,), or their logarithms."""
    return np.log(places) / np.log(part["along"]["log"]) if "log" in part["along"] else np.array(places)


def weights_of(part: Part, places: list[float]) -> dict[Hashable, float]:
    """Of arms: those above 0 sum to 1; along {x} those of the slope."""
    given = part["weights"]
    if not places:
        return {arm: weight / sum(w for w in given.values() if w > 0) for arm, weight in given.items()}
    slope = slope_weights(axis_of(part, places))
    return {placed(name, place): w * s for name, w in given.items() for place, s in zip(places, slope)}


def figures(part: Part, runs: pd.DataFrame) -> pd.Series:
    """The part's metric, or its logarithm; NaN where a run has none."""
    metric = part.get("metric", CE)
    found: Any = runs[metric].astype(float) if metric in runs else pd.Series(np.nan, runs.index)
    return np.log(found.where(found > 0)) if part.get("ratio") else found


def unlike(part: Part, runs: pd.DataFrame) -> str:
    """Of the columns that must have one value over these runs those that do not; "" if there are none."""
    values = {key: list(dict.fromkeys(runs[key].astype(str))) if key in runs else [] for key in part.get("alike", [])}
    return "; ".join(f"{key} is {' and '.join(each) or 'unknown'}" for key, each in values.items() if len(each) != 1)
