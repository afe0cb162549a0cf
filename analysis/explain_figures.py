"""The pictures of --explain: where the loss is won, how full experts are, how fast routers settle, who goes where."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context

from analysis.arms import Arm
from analysis.figures import explain, of_bands, token_unit
from analysis.inside import Evaluation
from analysis.layout import broken, legend_over, numbers, save

MOST_CURVES, MOST_BANDS, MOST_MAPS, MOST_TOKENS = 10, 4, 8, 16
NAME = 9  # letters of a token in a map


def save_figures(
    figures: pd.DataFrame,
    evaluations: dict[str, Evaluation],
    arms: dict[str, Arm],
    pairs: dict[str, str],
    style: dict,
    folder: Path,
) -> list[str]:
    """Draw folder/explain_<name>.png and .pdf and return the names. Curves are of the first MOST_CURVES arms with
    experts, maps of the first MOST_MAPS, one of each method before a second; evaluations: of one run an arm."""
    every = _methods_first(list(figures.loc[figures["quantity"] == "load", "arm"].unique()), arms)
    routed = every[:MOST_CURVES]
    few = f"\n{len(routed)} of {len(every)} arms with experts" if len(routed) < len(every) else ""
    bands = len(routed) <= MOST_BANDS  # of more, one hides the other
    lines = {arm: {**arms[arm].look, "label": arms[arm].label, "band": bands} for arm in routed}
    seeds = figures.loc[figures["arm"].isin(routed)].groupby("arm")["seed"].nunique()
    said = f"lines: mean over seeds (n = {numbers(seeds)}){of_bands(seeds.max()) if bands else ''}"
    draw = {"frequency": _frequency, "load": _load, "settling": _settling}
    drawn = []
    with context(["default", style["matplotlib"]]):
        for name, plot in draw.items():
            figure = Figure(figsize=(3.4, 2.5))
            axes = figure.subplots()
            if plot(axes, figures, lines, pairs):
                legend_over(figure, axes)
                under = f"\nreference: {_named(pairs, lines, arms)}" if name == "frequency" else ""
                explain(figure, f"{said}{under}{few}")
                save(figure, folder, f"explain_{name}")
                drawn.append(name)
        save(_maps({arm: evaluations[arm] for arm in every[:MOST_MAPS]}, arms, len(every)), folder, "explain_map")
    return [*drawn, "map"]


def _methods_first(names: list[str], arms: dict[str, Arm]) -> list[str]:
    """In their order, but what is a method's second, third, ... behind all that are a first, second, ..."""
    methods = [arms[name].method for name in names]
    return sorted(names, key=lambda name: methods[: names.index(name)].count(arms[name].method))


def _named(pairs: dict[str, str], lines: dict, arms: dict[str, Arm]) -> str:
    """Labels of the references of what is drawn."""
    return " or ".join(dict.fromkeys(arms[pairs[arm]].label for arm in lines if arm in pairs))


def _frequency(axes: Axes, figures: pd.DataFrame, lines: dict, pairs: dict[str, str]) -> bool:
    losses = figures.loc[figures["quantity"] == "decile_ce"].pivot_table("value", ["seed", "place"], "arm")
    lines = {arm: look for arm, look in lines.items() if pairs.get(arm) in losses}
    axes.axhline(0, color="0.35", linewidth=0.7, linestyle=":")
    for arm, look in lines.items():
        _line(axes, losses[arm] - losses[pairs[arm]], look, shift=1)
    axes.set_xticks(range(1, 11))
    axes.set_xlabel("about tenths of the text, frequent targets first")
    axes.set_ylabel("test loss minus that of\nthe reference (nats per token)")
    return bool(lines)


def _load(axes: Axes, figures: pd.DataFrame, lines: dict, pairs: dict[str, str]) -> bool:
    loads = figures.loc[figures["quantity"] == "load"]
    for arm, look in lines.items():
        own = loads.loc[loads["arm"] == arm].groupby(["seed", "place"])["value"].mean()  # over layers
        own.index = own.index.set_levels((own.index.levels[1] + 0.5) / (own.index.levels[1].max() + 1), level=1)
        _line(axes, own, look)
    bounds = figures.loc[figures["quantity"] == "bound", "value"]
    if bounds.max() - bounds.min() < 0.005:  # else arms have different numbers of experts, and the text says each one's
        axes.axhline(
            bounds.min(), color="0.35", linewidth=0.7, linestyle=":", label="least for a token table's fullest"
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("share of experts, from the fullest on")
    axes.set_ylabel("load over the mean load")
    return True


def _settling(axes: Axes, figures: pd.DataFrame, lines: dict, pairs: dict[str, str]) -> bool:
    settled = figures.loc[figures["quantity"] == "settled"]
    if settled["place"].nunique() < 2:  # a lone point is no curve
        return False
    unit, per = token_unit(settled["place"].max())
    for arm, look in lines.items():
        own = settled.loc[settled["arm"] == arm].groupby(["seed", "place"])["value"].mean()
        if len(own):
            own.index = own.index.set_levels(own.index.levels[1] / per, level=1)
            _line(axes, own, look)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(f"training tokens ({unit})")
    axes.set_ylabel("share of assignments that are\nas at the validation before")
    return True


def _line(axes: Axes, values: pd.Series, look: dict[str, Any], shift: int = 0) -> None:
    """Mean over seeds and, if look says so, a band of one standard deviation of values, indexed by (seed, place)."""
    by_seed = values.unstack("seed").dropna()
    mean, deviation, x = by_seed.mean(axis=1), by_seed.std(axis=1).fillna(0.0), by_seed.index.to_numpy() + shift
    if look["band"]:
        axes.fill_between(x, mean - deviation, mean + deviation, color=look["color"], alpha=0.2, linewidth=0)
    shape = {key: look[key] for key in ("color", "dashes", "label", "marker")}
    axes.plot(x, mean, linewidth=1.1, markersize=2.8, markevery=max(1, len(x) // 8), **shape)


def _maps(evaluations: dict[str, Evaluation], arms: dict[str, Arm], count: int) -> Figure:
    """Tokens by experts, a map an arm, of its last sparse layer; experts in the order of the tokens that they serve.
    count: of all arms with experts."""
    rows = -(-len(evaluations) // 2)
    figure = Figure(figsize=(3.4, 0.5 + 2.4 * rows))
    grid = figure.subplots(rows, min(2, len(evaluations)), squeeze=False)
    for axes in grid.flat[len(evaluations) :]:
        axes.set_visible(False)
    for place, (axes, (arm, evaluation)) in enumerate(zip(grid.flat, evaluations.items())):
        layer = evaluation.layers[-1]
        share, names = _shares(evaluation, layer)
        axes.imshow(share, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        named = arms[arm].label + (f", layer {layer}" if len(evaluation.layers) > 1 else "")
        axes.set_title(broken(named), fontsize=7)
        axes.set_xticks([])
        axes.set_yticks(
            range(len(names)), names if place % 2 == 0 else [""] * len(names), fontsize=6, family="DejaVu Sans Mono"
        )
        axes.tick_params(length=0)
        axes.set_xlabel(f"{share.shape[1]} experts", fontsize=6.5)
    figure.supylabel("most frequent tokens", fontsize=7)
    few = f"{len(evaluations)} of {count} arms with experts; " if len(evaluations) < count else ""
    explain(figure, f"{few}one run each, the last sparse layer")
    figure.colorbar(
        grid[0, 0].images[0], ax=grid, location="bottom", shrink=0.6, aspect=30, label="share of a token's assignments"
    )
    return figure


def _shares(evaluation: Evaluation, layer: int) -> tuple[np.ndarray, list[str]]:
    table = evaluation.sums[f"token_expert/{layer}"]
    ids = [token for token in evaluation.names if table[token].sum() > 0][:MOST_TOKENS]
    share = table[ids] / table[ids].sum(1, keepdims=True)
    order = np.lexsort((-share.max(0), share.argmax(0)))  # by the token that they serve most
    return share[:, order], _visible([evaluation.names[token] for token in ids])


def _visible(texts: list[str]) -> list[str]:
    """Spaces and ends of lines as marks, and of each no more than the first that tells all apart, but NAME at least."""
    shown = [
        "".join(each if each.isprintable() else "\\n" if each == "\n" else "·" for each in text.replace(" ", "␣"))
        for text in texts
    ]
    room = next((room for room in range(NAME, 24) if len({_cut(text, room) for text in shown}) == len(shown)), 24)
    return [_cut(text, room).replace("$", r"\$") for text in shown]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"
