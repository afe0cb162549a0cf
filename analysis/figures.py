"""A study as a picture."""

from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context

from analysis.runs import Study
from analysis.tables import LEAKS


def save_learning_curves(study: Study, frame: pd.DataFrame, style: dict, folder: Path) -> None:
    """Draw folder/figure.png and figure.pdf: validation loss over training tokens; below it, less frame's reference.

    Lines are means over seeds, bands one standard deviation each way; differences are made seed by seed. The same
    study is the same bytes: no dates, and style's settings over matplotlib's own instead of the reader's.
    """
    labels, reference = dict(zip(frame["arm"], frame["label"])), frame.loc[frame["reference"], "arm"].item()
    losses = study.curves.pivot(index=["seed", "tokens"], columns="arm", values="val/ce")
    in_job_order = [arm for arm in labels if arm in losses]
    panels = {"validation cross-entropy": losses}
    if reference in losses:
        panels[f"difference to {labels[reference]}"] = losses.sub(losses[reference], axis="index")
    worst_first = sorted(in_job_order, key=lambda arm: over_seeds(losses.loc[:, arm])["mean"].iloc[-1], reverse=True)
    unlisted = [arm for arm in labels if arm not in style["arms"]]
    looks = style["arms"] | dict(zip(unlisted, cycle(style["others"])))
    with context(["default", style["matplotlib"]]):
        figure = Figure()
        figure.subplots(len(panels), sharex=True)
        for axes, (quantity, values) in zip(figure.axes, panels.items()):
            axes.set_ylabel(f"{quantity}\n(nats per token)")
            for arm in worst_first:
                curve, color, dashes = over_seeds(values.loc[:, arm]), looks[arm]["color"], looks[arm]["dashes"]
                millions, mean, deviation = curve.index.to_numpy() / 1e6, curve["mean"], curve["deviation"]
                axes.fill_between(millions, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
                axes.plot(millions, mean, color=color, dashes=dashes, linewidth=1.1, label=labels[arm])
        upper, unigram = figure.axes[0], study.counted.loc[:, "val/unigram_entropy"].mean()
        upper.axhline(unigram, color="0.35", linewidth=0.7, linestyle=":")
        right = upper.get_yaxis_transform()  # x in axes, y in data: the curves are far below the line there
        upper.text(1, unigram, "unigram entropy ", transform=right, ha="right", va="top", color="0.35", fontsize=6.5)
        upper.legend()
        figure.axes[-1].set_xlabel("training tokens (millions)")
        figure.align_ylabels()
        _save(figure, folder)


def save_differences(study: Study, frame: pd.DataFrame, style: dict, folder: Path) -> None:
    """Draw folder/figure.png and figure.pdf: each arm's difference to the reference on test, the best on top.

    Bars are the intervals, where there is more than one pair. The axis spans the arms that see no future in evaluation;
    of others that lie outside stands the number. The same study is the same bytes, as in save_learning_curves.
    """
    reference = frame.loc[frame["reference"], "label"].item()
    rows = frame.loc[~frame["reference"] & (frame["difference_pairs"] > 0)]
    rows = rows.sort_values("difference_mean", ascending=False).reset_index(drop=True)
    ends = rows.loc[:, ["difference_mean", "difference_low", "difference_high"]]
    fair = ends.loc[~rows["label"].str.endswith(LEAKS)]
    low, high = min(float(fair.min().min()), 0.0), max(float(fair.max().max()), 0.0)
    with context(["default", style["matplotlib"]]):
        figure = Figure(figsize=(3.4, 0.8 + 0.14 * len(rows)))
        axes = figure.subplots()
        axes.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.axvline(0, color="0.35", linewidth=0.7, linestyle=":")
        for place, row in rows.iterrows():
            mean = row["difference_mean"]
            if mean < low:
                axes.text(low, place, f"← {mean:+.2f}", va="center", fontsize=6.5)
                continue
            reach = [[mean - row["difference_low"]], [row["difference_high"] - mean]]
            axes.errorbar(mean, place, xerr=reach if row["difference_pairs"] > 1 else None, **style["point"])
        axes.set_yticks(range(len(rows)), rows["label"])
        axes.set_ylim(-0.8, len(rows) - 0.2)
        axes.grid(axis="y", color="0.92", linewidth=0.5)
        axes.set_axisbelow(True)
        figure.supxlabel(
            f"test cross-entropy less that of {reference}\n(nats per token, n = {rows['n'].max()})", fontsize="medium"
        )
        _save(figure, folder)


def _save(figure: Figure, folder: Path) -> None:
    figure.savefig(folder / "figure.png", metadata={"Software": None})
    figure.savefig(folder / "figure.pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})


def over_seeds(losses: pd.Series) -> pd.DataFrame:
    """Mean and deviation of `losses`, indexed by (seed, tokens), where all seeds have one."""
    by_seed = losses.dropna().unstack("seed").dropna()
    return pd.DataFrame({"mean": by_seed.mean(axis=1), "deviation": by_seed.std(axis=1).fillna(0.0)})
