"""A study as a picture."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context as style_context

from analysis.runs import Study

LOOK: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
COLUMN = (3.4, 3.9)  # inches: one column of a two-column paper


def learning_curves(study: Study, style: dict, labels: dict[str, str], reference: str) -> Figure:
    """Validation loss against training tokens; below it, the same less the reference arm, seed by seed.

    Lines are means over seeds and bands one standard deviation each way.
    """
    points = study.curves.set_index(["seed", "tokens"])
    losses = {arm: points.loc[points["arm"] == arm, "val/ce"] for arm in study.counted.loc[:, "arm"].unique()}
    curves = {arm: over_seeds(loss) for arm, loss in losses.items()}
    worst_first = sorted(curves, key=lambda arm: curves[arm]["mean"].iloc[-1], reverse=True)
    look = _looks(list(labels), style)
    with _own_settings():
        figure = Figure(figsize=COLUMN, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2 if reference in losses else 1, 1, sharex=True, squeeze=False)[:, 0]
        for arm in worst_first:
            _line(panels[0], curves[arm], look[arm], labels[arm])
        _unigram(panels[0], float(study.counted.loc[:, "val/unigram_entropy"].mean()))
        panels[0].legend(handlelength=3.2, borderaxespad=0.2, labelspacing=0.3)
        panels[0].set_ylabel("validation cross-entropy\n(nats per token)")
        panels[0].margins(x=0.01)
        if reference in losses:
            for arm in worst_first:
                _line(panels[1], over_seeds((losses[arm] - losses[reference]).dropna()), look[arm])
            panels[1].set_ylabel(f"difference to {labels[reference]}\n(nats per token)")
        panels[-1].set_xlabel("training tokens (millions)")
        figure.align_ylabels()
    return figure


def over_seeds(losses: pd.Series) -> pd.DataFrame:
    """Mean and deviation of `losses`, indexed by (seed, tokens), where all seeds have one."""
    grouped = losses.groupby(level="tokens")
    curve = pd.DataFrame({"mean": grouped.mean(), "deviation": grouped.std(ddof=1).fillna(0.0)})
    return curve.loc[grouped.size() == losses.index.get_level_values("seed").nunique()]


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write name.png and name.pdf, without dates or versions: the same figure is the same bytes."""
    with _own_settings():
        figure.savefig(folder / f"{name}.png", dpi=300, metadata={"Software": None})
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def _own_settings() -> AbstractContextManager:
    """LOOK over matplotlib's defaults: a reader's own matplotlibrc changes nothing."""
    return style_context(["default", LOOK])


def _looks(arms: list[str], style: dict) -> dict[str, dict]:
    """Colour and dashes of each arm: its own, or the next of style's others."""
    unknown = [arm for arm in arms if arm not in style["arms"]]
    others = style["others"]
    return {arm: style["arms"].get(arm) or others[unknown.index(arm) % len(others)] for arm in arms}


def _line(axes: Axes, curve: pd.DataFrame, look: dict, label: str | None = None) -> None:
    millions = curve.index.to_numpy() / 1e6
    low, high = curve["mean"] - curve["deviation"], curve["mean"] + curve["deviation"]
    axes.fill_between(millions, low, high, color=look["color"], alpha=0.2, linewidth=0)
    linestyle = (0, look["dashes"]) if look["dashes"] else "solid"
    axes.plot(millions, curve["mean"], color=look["color"], linewidth=1.1, linestyle=linestyle, label=label)


def _unigram(axes: Axes, entropy: float) -> None:
    axes.axhline(entropy, color="0.35", linewidth=0.7, linestyle=":")
    left = {"xy": (0, entropy), "xycoords": ("axes fraction", "data"), "ha": "left"}  # curves come from above
    under = {"xytext": (3, -2), "textcoords": "offset points", "va": "top"}
    axes.annotate("unigram entropy", **left, **under, color="0.35", fontsize=6.5)
