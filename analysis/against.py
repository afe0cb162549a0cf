"""Losses against a number in the arms' labels: experts, hashes, depth, a coefficient, a budget."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from analysis.arms import Arm, plural
from analysis.layout import arrows, broken, far_off, held, legend_above, numbers, numbers_at_the_ends, span
from analysis.tables import reference_of


def against_place(
    figure: Figure,
    frame: pd.DataFrame,
    arms: dict[str, Arm],
    asked: dict[str, Any],
    papers: dict[str, tuple[float, str]],
    public: pd.DataFrame | None,
    style: dict,
) -> None:
    """Test loss of each method over the place; below it, less the reference, with the paper's differences as hollow
    marks; below that the public curves, if there are any. Arms without a place are level lines.

    asked["joins"]: method -> arms of others that stand in its line, and where: the ends of what it mixes."""
    count = 2 if public is None else 3
    figure.set_size_inches(3.4, 1.9 * count + 0.3)
    figure.subplots(count, sharex=True)
    upper, lower, *below = figure.axes
    rows = frame.loc[frame["n"] > 0].assign(x=frame["x"].astype(float))
    for joined, ends in asked.get("joins", {}).items():
        own = rows["arm"].isin(list(ends))
        rows.loc[own, "x"], rows.loc[own, "method"] = rows.loc[own, "arm"].map(ends).astype(float), joined
    out = far_off(rows)
    below_drawn = rows.loc[rows["difference_mean"].notna() & rows["x"].notna()]
    low, high = span(below_drawn, *(papers[arm][0] for arm in rows.loc[~out, "arm"] if arm in papers))
    limits, cut = (low - 0.08 * (high - low), high + 0.08 * (high - low)), False
    places = sorted(set(rows["x"].dropna()))
    methods = rows["method"].unique()
    for number, (method, own) in enumerate(rows.groupby("method", sort=False)):
        own = own.assign(x=beside(own["x"], number - (len(methods) - 1) / 2, places, asked["scale"]))
        look = style["arms"].get(method, arms[own["arm"].iloc[0]].look)
        losses(upper, own, look, style["arms"].get(method, {}).get("label", method).format(place="K"))
        cut |= compared(lower, own.loc[own["difference_mean"].notna()], look, papers, limits)
    upper.set_ylabel("test cross-entropy\n(nats per token)")
    lower.set_ylabel(f"test loss minus\n{broken(reference_of(frame), 20)}'s (nats)")
    if high > low:
        lower.set_ylim(*limits)
    lower.axhline(0, color="0.35", linewidth=0.7, linestyle=":")
    for axes in below:
        public_curves(axes, public, style)
    theirs = [] if public is None else public["num_experts"].tolist()
    scale_x(figure.axes[-1], sorted({*places, *theirs}), asked["scale"])
    off_the_axes(upper, lower, rows, out)
    figure.axes[-1].set_xlabel(asked["axis"])
    figure.supxlabel(told(rows, bool(cut or out.any()), any(arm in papers for arm in rows["arm"])), fontsize=6)
    legend_above(figure, upper)
    figure.align_ylabels()


def told(rows: Any, beyond: bool, hollow: bool) -> str:
    """n, and what is drawn besides lines and marks."""
    spread = rows.loc[rows["test_ce_deviation"].notna(), "x"]
    above = ["bars (where longer than marks)"] * bool(spread.notna().any()) + ["bands"] * bool(spread.isna().any())
    parts = [f"n = {numbers(rows['n'])} {plural('seed', int(rows['n'].max()))}"]
    below = rows.loc[rows["x"].notna() & rows["difference_low"].notna()]
    parts += [f"bars below: 95 % intervals, {held(below, '◊ in the table')}"] * bool(len(below))
    parts += ["arrows: beyond the axis"] * beyond + ["hollow: published"] * hollow
    parts += [f"{' and '.join(above)} above: ± 1 standard deviation"] * bool(above)
    return broken("; ".join(part.replace(" ", "\u00a0") for part in parts), 80)


def losses(axes: Axes, own: pd.DataFrame, look: dict[str, Any], label: str) -> None:
    placed = own.loc[own["x"].notna()].sort_values("x")
    line: dict[str, Any] = {"color": look["color"], "linewidth": 1.1}
    if placed.empty:
        mean, deviation = own["test_ce"].iloc[0], own["test_ce_deviation"].fillna(0).iloc[0]
        axes.axhspan(mean - deviation, mean + deviation, color=look["color"], alpha=0.15, linewidth=0)
        axes.axhline(mean, dashes=look["dashes"] or (None, None), label=label, **line)
        return
    bars = placed["test_ce_deviation"].fillna(0)
    mark = {"marker": look["marker"], "markersize": 3, "elinewidth": 0.9}
    drawn = axes.errorbar(placed["x"], placed["test_ce"], yerr=bars, label=label, **line, **mark)
    drawn[0].set_dashes(look["dashes"])


def off_the_axes(upper: Axes, lower: Axes, rows: pd.DataFrame, out: pd.Series) -> None:
    """Where arms are far off: an upper axis that shows the others, and the numbers of these at the ends of both."""
    if not out.any():
        return
    mean, deviation = rows.loc[~out, "test_ce"], rows.loc[~out, "test_ce_deviation"].fillna(0)
    low, high = (mean - deviation).min(), (mean + deviation).max()
    upper.set_ylim(low - 0.08 * (high - low), high + 0.2 * (high - low))
    for axes, figure, form in ((upper, "test_ce", ".2f"), (lower, "difference_mean", "+.3g")):
        points = []
        for x, y, label in rows.loc[out, ["x", figure, "label"]].itertuples(index=False):
            placed = x == x  # else a level line
            text = f"{f'at {x:g}:' if placed else label} {format(y, form)}"
            points.append((x if placed else axes.get_xlim()[0], y, text))
        numbers_at_the_ends(axes, points)


def compared(
    axes: Axes,
    own: pd.DataFrame,
    look: dict[str, Any],
    papers: dict[str, tuple[float, str]],
    limits: tuple[float, float],
) -> bool:
    """Whether an interval passes the limits; arrows say where."""
    placed = own.loc[own["x"].notna()].sort_values("x")
    known = placed["difference_low"].notna().all()
    reach = placed["difference_high"] - placed["difference_mean"] if known else None
    if len(placed):
        line = {"color": look["color"], "linewidth": 1.1, "marker": look["marker"], "markersize": 3, "elinewidth": 0.9}
        axes.errorbar(placed["x"], placed["difference_mean"], yerr=reach, **line)[0].set_dashes(look["dashes"])
    for x, arm in zip(placed["x"], placed["arm"]):
        if arm in papers:
            axes.plot(x, papers[arm][0], look["marker"], color=look["color"], fillstyle="none", markersize=5.5)
    cut = False
    for x, low, high in placed.loc[:, ["x", "difference_low", "difference_high"]].itertuples(index=False):
        cut |= known and arrows(axes, x, (low, high), limits, look["color"], True)
    return bool(cut)


def public_curves(axes: Axes, public: pd.DataFrame | None, style: dict) -> None:
    """A line a router and model size; the names in the file are matched with ours by style.yaml."""
    assert public is not None
    axes.set_ylabel("Unified Scaling Laws:\nvalidation loss (nats)")
    named = style["public_curves"]
    for router, own in public.groupby("router_type", sort=False):
        look = style["arms"].get(named.get(router), None) or style["others"][0]
        for size, curve in own.groupby("size", sort=False):
            first = size == own["size"].iloc[0]
            line = {"color": look["color"], "dashes": look["dashes"], "marker": look["marker"], "markersize": 2}
            axes.plot(curve["num_experts"], curve["loss"], linewidth=0.8, label=router if first else None, **line)
            axes.annotate(
                f" {size}",
                (curve["num_experts"].iloc[-1], curve["loss"].iloc[-1]),
                fontsize=5.5,
                va="center",
                color="0.35",
            )
    axes.legend()


def beside(x: pd.Series, step: float, places: list[float], scale: str) -> pd.Series:
    """x, moved by a hundredth of the axis a step: so the bars of several methods at one place can be told apart."""
    if len(places) < 2 or scale == "symlog":
        return x
    low, high = places[0], places[-1]
    return x * (high / low) ** (0.01 * step) if scale == "log" else x + 0.01 * step * (high - low)


def scale_x(axes: Axes, places: list[float], scale: str) -> None:
    """Ticks where the runs are; symlog starts at the least place above 0."""
    least = min((place for place in places if place > 0), default=1.0)
    options = {"linthresh": least, "linscale": 0.5} if scale == "symlog" else {"base": 2} if scale == "log" else {}
    axes.set_xscale(scale, **options)
    low, high = places[0], places[-1]
    pad = 0.06 * (high - low) or 0.5
    room = (low - pad, high + pad) if scale == "linear" else (low * 0.85 or -0.3 * least, high * 1.18)
    axes.set_xlim(*room)
    axes.xaxis.set_major_locator(FixedLocator([*np.unique(places)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
