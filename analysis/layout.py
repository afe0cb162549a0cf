"""What figures of several kinds share: where legends go, how far axes reach, where words break."""

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_INSIDE = 4  # entries of a legend that leave room for curves
LETTER, HANDLE = 0.047, 0.45  # inches: about a letter's width in such a legend, and all that stands beside its text


def numbers(counts: pd.Series) -> str:
    """3, or 2 to 3."""
    return " to ".join(str(count) for count in {int(counts.min()): 0, int(counts.max()): 0})


def held(rows: pd.DataFrame, mark: str) -> str:
    """Of what the intervals of these rows hold: of all arms at once, or each alone, or of which what. mark: how the
    figure shows an arm that is tested alone."""
    alone = set(rows["alone"])
    return "each alone" if alone == {True} else f"all at once ({mark}: alone)" if True in alone else "all at once"


def save(figure: Figure, folder: Path, name: str) -> None:
    """folder/<name>.png and .pdf, the same bytes each time."""
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def legend_above(figure: Figure, axes: Axes) -> None:
    """The legend of axes over the whole figure, centred, in as many columns as its longest label allows."""
    handles = axes.get_legend_handles_labels()[0]
    labels = legend_labels(axes)
    shape: dict[str, Any] = {"fontsize": 6.5, "columnspacing": 1, "handlelength": 2.8}
    figure.legend(handles, labels, loc="outside upper center", ncols=columns(figure, labels), **shape)


def legend_inside_or_above(figure: Figure, axes: Axes) -> None:
    """Above where it would lie over the curves."""
    if len(legend_labels(axes)) <= MOST_INSIDE:
        axes.legend()
    else:
        legend_over(figure, axes)


def legend_over(figure: Figure, axes: Axes) -> None:
    """Above, and the figure that much higher."""
    labels = legend_labels(axes)
    lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-lines // columns(figure, labels)))
    legend_above(figure, axes)


def legend_labels(axes: Axes) -> list[str]:
    return [broken(label) for label in axes.get_legend_handles_labels()[1]]


def columns(figure: Figure, labels: list[str]) -> int:
    longest = max(len(line) for label in labels for line in label.split("\n"))
    return max(1, int(figure.get_figwidth() / (HANDLE + LETTER * longest)))


def broken(text: str, width: int = 24) -> str:
    """With line breaks at blanks."""
    return fill(text, width, break_long_words=False, break_on_hyphens=False)


def span(rows: pd.DataFrame, *further: float) -> tuple[float, float]:
    """What an axis of differences has to show: 0, `further`, all means but those far off, and all intervals but those
    of arms tested alone that are more than three times as wide as the median of the others'; all, if such are a third
    or more."""
    wide: Any = rows["difference_high"] - rows["difference_low"]
    alone, out = rows["alone"].astype(bool), far_off(rows)
    cut = alone & (wide > 3 * wide[~alone & wide.notna()].median())  # none, if all are tested alone
    cut &= 3 * cut.sum() < len(rows)
    ends = [rows.loc[~out, "difference_mean"]]
    ends += [rows.loc[~cut & ~out, end] for end in ("difference_low", "difference_high")]
    values = [0.0, *further, *pd.concat(ends).dropna()]
    return min(values), max(values)


def far_off(rows: pd.DataFrame) -> Any:
    """Of each row whether it is an arm tested alone, further from 0 and the others' intervals than these reach: what
    collapsed would press all else flat, so that its number stands at the axis' end instead. None, if all are."""
    alone, mean = rows["alone"].astype(bool), rows["difference_mean"]
    ends = rows.loc[~alone, ["difference_low", "difference_mean", "difference_high"]].to_numpy(float)
    if np.isnan(ends).all():
        return alone & False
    low, high = min(0.0, np.nanmin(ends)), max(0.0, np.nanmax(ends))
    return alone & ((mean < 2 * low - high) | (mean > 2 * high - low))


def numbers_at_the_ends(axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Of the points (x, y, text) that lie beyond the y axis the texts, with arrows, one below the other: left of x, or
    right of it in the left half."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    across = axes.transData + axes.transAxes.inverted()
    beyond = [each for each in points if not low <= each[1] <= high]
    for number, (x, y, text) in enumerate(beyond):
        up, at = y > high, across.transform((min(max(x, left), right), low))[0]
        place: dict[str, Any] = {"xytext": (3 if at < 0.5 else -3, (-1 if up else 1) * (1 + 8 * number))}
        place |= {"xy": (at, 1.0 if up else 0.0), "xycoords": "axes fraction", "textcoords": "offset points"}
        place |= {"ha": "left" if at < 0.5 else "right", "va": "top" if up else "bottom", "fontsize": 6.5}
        axes.annotate(f"{text} {'↑' if up else '↓'}", **place)


def arrows(
    axes: Axes, at: float, ends: tuple[float, float], limits: tuple[float, float], color: Any, upright: bool
) -> bool:
    """An arrow at each limit that an interval at place `at` passes; whether there is any. upright: the axis of
    differences is y."""
    passed = [
        (limit, mark) for limit, mark, out in zip(limits, "v^" if upright else "<>", _beyond(ends, limits)) if out
    ]
    for limit, mark in passed:
        x, y = (at, limit) if upright else (limit, at)
        axes.plot(x, y, mark, color=color, markersize=3, clip_on=False)
    return bool(passed)


def _beyond(ends: tuple[float, float], limits: tuple[float, float]) -> tuple[bool, bool]:
    return bool(np.less(ends[0], limits[0])), bool(np.greater(ends[1], limits[1]))
