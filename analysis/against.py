"""Losses against a number in the arms' labels: experts, hashes, depth, a coefficient, a budget."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from analysis.arms import Arm
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
    marks; below that the public curves, if there are any. Arms without a place are level lines."""
    count = 2 if public is None else 3
    figure.set_size_inches(3.4, 1.9 * count + 0.3)
    figure.subplots(count, sharex=True)
    upper, lower, *below = figure.axes
    rows = frame.loc[frame["n"] > 0].assign(x=frame["x"].astype(float))
    for method, own in rows.groupby("method", sort=False):
        look, label = arms[own["arm"].iloc[0]].look, style["arms"].get(method, {}).get("label", method)
        losses(upper, own, look, label)
        compared(lower, own.loc[own["difference_mean"].notna()], look, papers)
    upper.set_ylabel("test cross-entropy\n(nats per token)")
    lower.set_ylabel(f"less {reference_of(frame)}\n(nats per token)")
    lower.axhline(0, color="0.35", linewidth=0.7, linestyle=":")
    for axes in below:
        public_curves(axes, public, style)
    theirs = [] if public is None else public["num_experts"].tolist()
    scale_x(figure.axes[-1], sorted({*rows["x"].dropna(), *theirs}), asked["scale"])
    n = " to ".join(str(each) for each in {rows["n"].min(): 0, rows["n"].max(): 0})
    told = "; below: 95 %, all at once" if rows["difference_low"].notna().any() else ""
    told += "; hollow: published" if any(arm in papers for arm in rows["arm"]) else ""
    figure.axes[-1].set_xlabel(asked["axis"])
    figure.supxlabel(f"n = {n}; bars above: ± 1 standard deviation{told}", fontsize=6)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.align_ylabels()


def losses(axes: Axes, own: pd.DataFrame, look: dict[str, Any], label: str) -> None:
    placed = own.loc[own["x"].notna()].sort_values("x")
    line: dict[str, Any] = {"color": look["color"], "linewidth": 1.1}
    if placed.empty:
        axes.axhline(own["test_ce"].iloc[0], dashes=look["dashes"] or (None, None), label=label, **line)
        return
    bars = placed["test_ce_deviation"].fillna(0)
    mark = {"marker": look["marker"], "markersize": 3, "elinewidth": 0.9}
    drawn = axes.errorbar(placed["x"], placed["test_ce"], yerr=bars, label=label, **line, **mark)
    drawn[0].set_dashes(look["dashes"])


def compared(axes: Axes, own: pd.DataFrame, look: dict[str, Any], papers: dict[str, tuple[float, str]]) -> None:
    placed = own.loc[own["x"].notna()].sort_values("x")
    known = placed["difference_low"].notna().all()
    reach = placed["difference_high"] - placed["difference_mean"] if known else None
    if len(placed):
        line = {"color": look["color"], "linewidth": 1.1, "marker": look["marker"], "markersize": 3, "elinewidth": 0.9}
        axes.errorbar(placed["x"], placed["difference_mean"], yerr=reach, **line)[0].set_dashes(look["dashes"])
    for x, arm in zip(placed["x"], placed["arm"]):
        if arm in papers:
            axes.plot(x, papers[arm][0], look["marker"], color=look["color"], fillstyle="none", markersize=5.5)


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


def scale_x(axes: Axes, places: list[float], scale: str) -> None:
    """Ticks where the runs are; symlog starts at the least place above 0."""
    least = min((place for place in places if place > 0), default=1.0)
    options = {"linthresh": least, "linscale": 0.5} if scale == "symlog" else {"base": 2} if scale == "log" else {}
    axes.set_xscale(scale, **options)
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(FixedLocator([*np.unique(places)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
