"""A declared contrast on the runs of a sweep: its figure, and how well the runs bear it out or speak against it."""

from collections import Counter
from collections.abc import Hashable
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import studentized_range

from analysis import claims
from analysis.additive_model import CHANCE, AdditiveModel, by_seed, nested, noisy_arms, settled
from analysis.arms import declared, described, load, plural
from analysis.claims import CE, TIMES, Part, line
from analysis.statistics import Estimate, mean_of
from analysis.summary import model_of
from analysis.variation import floor_of_means, noise_floor

FIGURE = "figure"


class Outcome(NamedTuple):
    """What became of one part of a claim. If it cannot be told, `lacks` says why, and there is no estimate. A part that
    expects nothing has `told` instead."""

    part: str  # the contrast in one line
    lacks: str
    estimate: Estimate | None = None
    unit: str = ""
    p_for: float = np.nan  # one-sided: small if what is expected holds
    p_against: float = np.nan  # one-sided: small if its opposite does
    runs: tuple[str, ...] = ()  # by id
    left_out: tuple[str, ...] = ()  # those of the same arms that have not finished, and what became of them
    scatter: str = ""  # which runs' scatter the interval is by
    floor: float = np.nan  # of noise, in the estimate's unit; NaN if nothing is known of it
    below_floor: bool = False  # the figure is nearer than that to the bound that it was to pass
    blind: bool = False  # equality is expected within a margin below the floor: no figure can bear it out
    diverged: bool = False  # what is lacking has diverged
    told: str = ""
    read: str = ""  # where the runs stood, if they say
    unrun: str = ""  # the sweep, if nothing of it was found


def examine(part: Part, runs: pd.DataFrame, margin: float, repeats: pd.DataFrame | None = None) -> Outcome:
    """runs: those of the part's sweep: id, arm, seed, the metric and, unless all have finished, outcome; with `scale`,
    places that are declared by scale are known. margin in nats. repeats: runs of one configuration and seed.

    By the table's additive model over all finished arms of the sweep (_fitted). ValueError for an unknown expectation.
    """
    if runs.empty:
        return Outcome(line(part), f"{part['sweep']} was not run", unrun=part["sweep"])
    part = claims.at_scale(part, runs)
    places, weights = claims.places_of(part, runs), part.get("weights", {})
    at_places = dict.fromkeys(claims.placed(name, x) for name in weights for x in places)
    named = part.get("range") or list(at_places or weights)
    planned = runs.loc[runs["arm"].isin(named)]
    own = _finished(planned)
    if lacking := [arm for arm in named if arm not in set(own["arm"])]:
        standing = ", ".join(_standing(arm, planned) for arm in lacking)
        lacks = f"{part['sweep']} has no finished run of {standing}"
        return Outcome(line(part), lacks, diverged=" diverged" in standing)
    if differing := claims.unlike(part, own):
        return Outcome(line(part), f"{part['sweep']} was not measured in one way: {differing}")
    whole = _finished(runs).assign(**{FIGURE: claims.figures(part, _finished(runs))})
    if unknown := list(own["id"][~np.isfinite(whole.loc[own.index, FIGURE])]):
        return Outcome(line(part), f"{part['sweep']} has no figure of {part.get('metric', CE)} in {', '.join(unknown)}")
    try:
        model, noisy = _fitted(part, whole.loc[np.isfinite(whole[FIGURE])], named)
    except ValueError as error:
        return Outcome(line(part), f"{part['sweep']}: {error}")
    behind: dict[str, Any] = {"runs": tuple(own["id"]), "left_out": _left_out(planned)}
    behind |= {
        "scatter": _scatter(part, model, noisy, named),
        "read": str(runs["read"].iloc[0]) if "read" in runs else "",
    }
    apart = Outcome(line(part), f"{part['sweep']} has no seeds that {', '.join(named)} share")
    if part["expect"] == "told":
        told = _crossing(part, model, noisy, places)
        return Outcome(line(part), "", told=told, **behind) if told else apart
    settling = [arm for arm in named if arm not in model.apart]
    if "range" in part and len(settling) < 2:
        return apart
    contrast = _range(model, settling) if "range" in part else claims.weights_of(part, places)
    estimate = _apart(model, contrast) if "alike" in part else _contrast(model, noisy, contrast)
    if np.isnan(estimate.value):
        return apart
    floor = np.nan if repeats is None or repeats.empty else _floor(part, _finished(repeats))
    n = [min(estimate.n, list(own["arm"]).count(arm)) for arm in contrast]
    floor, estimate = floor_of_means(floor, [*contrast.values()], n), estimate._replace(n=min(n))
    told = Outcome(line(part), "", estimate, claims.unit_of(part), floor=floor, **behind)
    if "range" in part:  # the worst and the best were chosen by the data: Tukey's range test
        p_for = studentized_range.sf(abs(estimate.t) * 2**0.5, len(settling), model.dof) if model.dof else np.nan
        return _above_floor(told, (float(p_for), estimate.p_within(margin)), (estimate.value, margin - estimate.value))
    told = told._replace(blind=part["expect"] == "within" and bool(margin < floor))
    shifted = estimate._replace(value=estimate.value + part.get("by", 0.0))
    return _above_floor(told, *_sides(part["expect"], shifted, margin))


def _fitted(part: Part, whole: pd.DataFrame, named: list[str]) -> tuple[AdditiveModel, set[Hashable]]:
    """The table's model, arm + seed over all its arms, and those of `named` that scatter unlike the others.

    A contrast within one of the table's groups takes a seed as another one in each of them, as the table does. One
    that crosses groups needs it to be the same, and is fitted on its own arms if a seed then is seen not to be (F-test
    of seed by group at CHANCE, of the arms that are not apart). So is a range one of whose arms scatters unlike the
    others, and what is measured alike. Of a range those arms count that are not apart: it is at least as wide.
    """
    style, asked = _declared(part["sweep"])
    arms = described(whole["arm"], style)
    own = whole.loc[whole["arm"].isin(named)]
    if "alike" in part:
        return model_of(own, arms, asked | {"groups": False}, FIGURE), set()
    model = settled(model_of(whole, arms, asked, FIGURE))
    if asked.get("groups") and len({arms[arm].place for arm in named}) > 1:
        linked = model_of(whole, arms, asked | {"groups": False}, FIGURE, model.apart)
        seen = nested(linked, model) < CHANCE
        model = settled(model_of(own, arms, asked | {"groups": False}, FIGURE) if seen else linked)
    noisy = {arm for arm, (_, beyond_chance) in noisy_arms(model).items() if beyond_chance} & set(named) - model.apart
    apart = model.apart & set(named)
    if "range" in part:
        return model_of(own, arms, asked, FIGURE, apart) if noisy else model, set()
    return model, noisy | apart


@cache
def _declared(sweep: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The looks of all arms, and what the sweep's table asks."""
    return load("style"), declared(sweep)


def _contrast(model: AdditiveModel, noisy: set[Hashable], weights: dict[Hashable, float]) -> Estimate:
    """By the pooled residual; of an arm that scatters unlike the others by the contrast's own seeds alone."""
    return model.contrast(weights) if noisy.isdisjoint(weights) else by_seed(model, weights)


def _apart(model: AdditiveModel, weights: dict[Hashable, float]) -> Estimate:
    """Of runs that a seed does not pair, each arm with a variance of its own, on the degrees of freedom of the arm that
    has fewest: seeds of one arm run next to each other and share what else the machine did."""
    each = {arm: mean_of(pd.Series(model.losses[model.arm == model.arms.index(arm)])) for arm in weights}
    value = sum(weights[arm] * each[arm].value for arm in weights)
    error = sum((weights[arm] * each[arm].error) ** 2 for arm in weights) ** 0.5
    n = min(estimate.n for estimate in each.values())
    return Estimate(n, value, error, n - 1)


def _scatter(part: Part, model: AdditiveModel, noisy: set[Hashable], named: list[str]) -> str:
    """Which runs' scatter the interval is by, in words."""
    if "alike" in part:
        return "by the scatter of each arm's own runs"
    if noisy:
        return f"by its own runs alone, for {', '.join(sorted(map(str, noisy)))} scatters unlike the other arms"
    own = set(model.arms) == set(named)
    arms = f"{'its own' if own else 'all'} {len(model.arms)} arms"
    arms += f" but {', '.join(sorted(map(str, model.apart)))}, set apart," if model.apart else ""
    return f"by the residual of {arms} on {model.dof} {plural('degree', model.dof)} of freedom"


def _finished(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.loc[runs["outcome"] == "finished"] if "outcome" in runs else runs


def _left_out(runs: pd.DataFrame) -> tuple[str, ...]:
    outcomes = zip(runs["id"], runs["outcome"]) if "outcome" in runs else ()
    return tuple(f"{run} ({outcome})" for run, outcome in outcomes if outcome != "finished")


def _floor(part: Part, repeats: pd.DataFrame) -> float:
    """Of the part's metric; NaN if these are no repeats, being of several seeds."""
    return noise_floor(claims.figures(part, repeats)) if len(set(repeats["seed"])) == 1 else np.nan


def _standing(arm: str, runs: pd.DataFrame) -> str:
    """An arm, and what became of its runs."""
    outcomes = Counter(runs.loc[runs["arm"] == arm, "outcome"]) if "outcome" in runs else Counter()
    return arm + (f" ({', '.join(f'{n} {outcome}' for outcome, n in outcomes.items())})" if outcomes else "")


def _range(model: AdditiveModel, arms: list[str]) -> dict[Hashable, float]:
    """The worst less the best, as weights; two whose difference cannot be told, if there are such."""
    each: list[dict[Hashable, float]] = [{worst: 1.0, best: -1.0} for worst, best in permutations(arms, 2)]
    return max(each, key=lambda weights: np.nan_to_num(model.contrast(weights).value, nan=np.inf))


def _crossing(part: Part, model: AdditiveModel, noisy: set[Hashable], places: list[float]) -> str:
    """The figure at each x, and the first x at which it is 0, by straight lines on the axis; "" if one is not known."""
    each = [_contrast(model, noisy, {claims.placed(name, x): w for name, w in part["weights"].items()}) for x in places]
    values, axis = [float(estimate.value) for estimate in each], claims.axis_of(part, places)
    if np.isnan(values).any():
        return ""
    told = [f"{figure(estimate)} at x = {x:g}" for x, estimate in zip(places, each)]
    crossed = next((i for i in range(1, len(values)) if values[i - 1] * values[i] <= 0), None)
    if crossed is None:
        return "; ".join([*told, "0 nowhere between"])
    before, after = values[crossed - 1], values[crossed]
    share = before / (before - after) if before != after else 0.0
    at = axis[crossed - 1] + share * (axis[crossed] - axis[crossed - 1])
    return "; ".join([*told, f"0 at x = {part['along']['log'] ** at if 'log' in part['along'] else at:.3g}"])


def figure(estimate: Estimate, unit: str = "") -> str:
    """The value and, if there is one, its 95 % interval; of a logarithm that of the ratio."""
    ends = [estimate.value, *estimate.interval()]
    value, low, high = [f"{np.exp(end):.3f}" if unit == TIMES else f"{end:+.4f}" for end in ends]
    return value + ("" if np.isnan(ends[1]) else f" [{low}, {high}]")


def _sides(expect: str, estimate: Estimate, margin: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """p of what is expected and of its opposite, each one-sided; and how far the value is past the bound of each."""
    opposite, value = estimate._replace(value=-estimate.value), estimate.value
    match expect:
        case "below":
            return (estimate.p_below(0.0), opposite.p_below(0.0)), (-value, value)
        case "above":
            return (opposite.p_below(0.0), estimate.p_below(0.0)), (value, -value)
        case "not_above":
            return (estimate.p_below(margin), opposite.p_below(-margin)), (margin - value, value - margin)
        case "within":  # either side may speak against it
            either = min(1.0, 2 * min(estimate.p_below(-margin), opposite.p_below(-margin)))
            return (estimate.p_within(margin), either), (margin - abs(value), abs(value) - margin)
    raise ValueError(f"expect must be below, above, within, not_above or told; got {expect}")


def _above_floor(told: Outcome, p: tuple[float, float], past: tuple[float, float]) -> Outcome:
    """With both p, where what is past its bound by less than the noise floor has a p of 1."""
    raised = [1.0 if distance < told.floor and not np.isnan(each) else float(each) for each, distance in zip(p, past)]
    return told._replace(p_for=raised[0], p_against=raised[1], below_floor=max(past) < told.floor)
