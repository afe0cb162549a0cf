"""A study as a picture."""

from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.style import context

from analysis.runs import Study


def save_learning_curves(study: Study, style: dict, labels: dict[str, str], reference: str, folder: Path) -> None:
    """Draw folder/figure.png and figure.pdf: validation loss over training tokens; below it, less the reference.

    Lines are means over seeds, bands one standard deviation each way; differences are made seed by seed. The same
    study is the same bytes: no dates, and style's settings over matplotlib's own instead of the reader's.
    """
    points = study.curves.set_index(["seed", "tokens"])
    losses = {arm: points.loc[points["arm"] == arm, "val/ce"] for arm in points["arm"].unique()}
    worst_first = sorted(losses, key=lambda arm: over_seeds(losses[arm])["mean"].iloc[-1], reverse=True)
    unlisted = [arm for arm in labels if arm not in style["arms"]]
    looks = style["arms"] | dict(zip(unlisted, cycle(style["others"])))
    with context(["default", style["matplotlib"]]):
        figure = Figure()
        upper, *lower = figure.subplots(2 if reference in losses else 1, 1, sharex=True, squeeze=False)[:, 0]
        for arm in worst_first:
            _line(upper, over_seeds(losses[arm]), looks[arm], labels[arm])
            for axes in lower:
                _line(axes, over_seeds((losses[arm] - losses[reference]).dropna()), looks[arm], labels[arm])
        unigram = study.counted.loc[:, "val/unigram_entropy"].mean()
        upper.axhline(unigram, color="0.35", linewidth=0.7, linestyle=":")
        right = upper.get_yaxis_transform()  # x in axes, y in data: the curves are far below the line there
        upper.text(1, unigram, "unigram entropy ", transform=right, ha="right", va="top", color="0.35", fontsize=6.5)
        upper.legend()
        upper.set_ylabel("validation cross-entropy\n(nats per token)")
        for axes in lower:
            axes.set_ylabel(f"difference to {labels[reference]}\n(nats per token)")
        figure.axes[-1].set_xlabel("training tokens (millions)")
        figure.align_ylabels()
        figure.savefig(folder / "figure.png", metadata={"Software": None})
        figure.savefig(folder / "figure.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def over_seeds(losses: pd.Series) -> pd.DataFrame:
    """Mean and deviation of `losses`, indexed by (seed, tokens), where all seeds have one."""
    grouped = losses.groupby(level="tokens")
    curve = pd.DataFrame({"mean": grouped.mean(), "deviation": grouped.std(ddof=1).fillna(0.0)})
    return curve.loc[grouped.size() == losses.index.get_level_values("seed").nunique()]


def _line(axes: Axes, curve: pd.DataFrame, look: dict, label: str) -> None:
    millions, mean, deviation = curve.index.to_numpy() / 1e6, curve["mean"], curve["deviation"]
    axes.fill_between(millions, mean - deviation, mean + deviation, color=look["color"], alpha=0.2, linewidth=0)
    linestyle = (0, look["dashes"]) if look["dashes"] else "solid"
    axes.plot(millions, mean, color=look["color"], linewidth=1.1, linestyle=linestyle, label=label)
