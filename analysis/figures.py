"""A study as a picture: which kind declared.yaml says, saved as the same bytes each time."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import MaxNLocator

from analysis.against import against_place
from analysis.arms import Arm, described, references
from analysis.layout import arrows, broken, far_off, held, legend_inside_or_above, numbers, save, span
from analysis.published import curves, differences, published
from analysis.runs import Study
from analysis.summary import LEAKS, floors, sharing
from analysis.tables import ALONE, leaky, reference_of

MOST_CURVES = 8
SHOWS = {
    "curves": "learning curves, mean over seeds",
    "differences": "differences to the reference",
    "against": "losses and differences against their place",
    "rates": "tokens trained per second, every run",
}


def save_figure(
    study: Study,
    frame: pd.DataFrame,
    style: dict,
    asked: dict[str, Any],
    folder: Path,
    public: pd.DataFrame | None,
    found: pd.DataFrame,
) -> str:
    """Draw folder/figure.png and figure.pdf; say what they show. public: curves to lay under an `against` figure;
    found: the study's runs as runs.csv has them.

    The same study is the same bytes: no dates, and style's settings over matplotlib's own instead of the reader's.
    """
    arms = described(frame["arm"], style)
    tables = published(asked.get("published", []), arms)
    papers = differences(tables, references(arms, asked))
    kind = kind_of(frame, asked)
    with context(["default", style["matplotlib"]]):
        figure = Figure()
        if kind == "curves":
            learning_curves(figure, study, frame, arms, curves(tables, references(arms, asked)))
        elif kind == "differences":
            points(figure, frame, arms, papers, found["noise_floor"].iloc[0])
        elif kind == "rates":
            rates(figure, found.loc[found["id"].isin(study.counted["id"]) & ~sharing(found)], frame, arms)
        else:
            against_place(figure, frame, arms, asked, papers, public, style)
        save(figure, folder, "figure")
    return SHOWS[kind]


def kind_of(frame: pd.DataFrame, asked: dict[str, Any]) -> str:
    """What the sweep declares, as far as there is something to draw it of: of the reference alone, curves."""
    kind, compared = asked["figure"], frame.loc[~frame["reference"] & frame["difference_mean"].notna()]
    joined = [arm for ends in asked.get("joins", {}).values() for arm in ends]
    placed = frame.loc[(frame["n"] > 0) & (frame["x"].notna() | frame["arm"].isin(joined))]
    if kind == "against" and (placed.empty or compared.empty):
        kind = "differences"
    if kind == "rates" and bool(frame["tokens_per_second"].isna().any()):  # of runs that shared their GPU
        kind = "differences"
    if kind == "curves" and (len(frame) > MOST_CURVES or len(references_of(frame)) > 1):  # more than can be told apart
        kind = "differences"
    return "curves" if kind == "differences" and compared.empty else kind


def references_of(frame: pd.DataFrame) -> set[str]:
    return {*frame["reference_arm"]} - {""}


def learning_curves(
    figure: Figure, study: Study, frame: pd.DataFrame, arms: dict[str, Arm], papers: dict[str, tuple[Any, Any]]
) -> None:
    """Validation loss over training tokens; below it, less the reference, seed by seed; the paper's hollow.

    papers: as published.curves has them."""
    losses = study.curves.pivot(index=["seed", "tokens"], columns="arm", values="val/ce")
    drawn = [arm for arm in arms if arm in losses]
    reference = next((arm for arm in references_of(frame) if arm in losses), None)
    panels = {"validation cross-entropy": losses}
    if len(references_of(frame)) > 1:  # none of which is that of all curves
        reference = None
    if reference is not None:
        panels[f"validation loss minus\n{broken(arms[reference].label, 30)}'s"] = losses.sub(
            losses[reference], axis="index"
        )
    unit, per = token_unit(float(study.curves["tokens"].to_numpy().max()))
    worst_first = sorted(drawn, key=lambda arm: over_seeds(losses.loc[:, arm])["mean"].iloc[-1], reverse=True)
    figure.subplots(len(panels), sharex=True)
    for axes, (quantity, values) in zip(figure.axes, panels.items()):
        axes.set_ylabel(f"{quantity} (nats)" if "\n" in quantity else f"{quantity}\n(nats per token)")
        for place, arm in enumerate(worst_first):
            curve, look = over_seeds(values.loc[:, arm]), arms[arm].look
            x, mean, deviation = curve.index.to_numpy() / per, curve["mean"], curve["deviation"]
            band = {"color": look["color"], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(x, mean - deviation, mean + deviation, **band)
            every = (place % 3 + 1, 4) if len(curve) > 6 else 1
            marks = {"marker": look["marker"], "markevery": every, "markersize": 2.8}
            line = {"color": look["color"], "dashes": look["dashes"], "linewidth": 1.1}
            axes.plot(x, mean, label=arms[arm].label, **line, **marks)
    theirs = [arm for arm in drawn if arm in papers and reference is not None]
    for arm in theirs:
        share, apart = papers[arm]
        last = study.curves["tokens"].max() / per
        hollow: dict[str, Any] = {key: arms[arm].look[key] for key in ("color", "marker")}
        hollow |= {"fillstyle": "none", "linestyle": "none", "clip_on": False, "markersize": 4, "markeredgewidth": 0.8}
        figure.axes[-1].plot(share * last, apart, **hollow)
    upper = figure.axes[0]
    right = upper.get_yaxis_transform()  # x in axes, y in data: the curves are far from the line there
    for unigram in study.counted["val/unigram_entropy"].unique():  # of each text
        upper.axhline(unigram, color="0.35", linewidth=0.7, linestyle=":")
        beneath = unigram > losses.iloc[-len(drawn) :].min().min()
        note: dict[str, Any] = {"ha": "right", "va": "top" if beneath else "bottom", "color": "0.35", "fontsize": 6.5}
        upper.text(1, unigram, "unigram entropy ", transform=right, **note)
    legend_inside_or_above(figure, upper)
    n = numbers(frame.loc[frame["n"] > 0, "n"])
    figure.axes[-1].set_xlabel(f"training tokens ({unit})")
    figure.axes[-1].xaxis.set_major_locator(MaxNLocator(5))
    of_paper = "\nhollow: published, at the same share of its training" if theirs else ""
    explain(figure, f"lines: mean over seeds (n = {n}){of_bands(int(frame['n'].to_numpy().max()))}{of_paper}")
    figure.align_ylabels()


def token_unit(most: float) -> tuple[str, float]:
    """In which as many tokens are no long row of zeros, and how many one of it is."""
    return ("millions", 1e6) if most >= 1e6 else ("thousands", 1e3)


def explain(figure: Figure, text: str) -> None:
    """What bars, bands and n are, under the picture, in lines that it has room for."""
    room = int(figure.get_figwidth() / 0.041)  # inches, about a letter's width
    figure.supxlabel("\n".join(broken(line, room) for line in text.split("\n")), fontsize=6)


def of_bands(n: int) -> str:
    """That bands stand about lines, if n, the most seeds of one, is more than 1."""
    return "; bands: ± 1 standard deviation" if n > 1 else ""


def points(
    figure: Figure, frame: pd.DataFrame, arms: dict[str, Arm], papers: dict[str, tuple[float, str]], floor: float
) -> None:
    """Each arm's difference to its reference on test, the best on top, with interval, and the paper's as a hollow mark;
    about 0 in grey the noise floor of those below it.

    The axis is layout.span's of the arms that see no future in evaluation; of others that lie outside stands the
    number, and arrows where an interval goes on.
    """
    rows = frame.assign(floor=floors(frame, floor)).loc[~frame["reference"] & frame["difference_mean"].notna()]
    rows = rows.sort_values("difference_mean", ascending=False).reset_index(drop=True)
    fewer = rows["n"] < rows["n"].max()
    labels = [broken(f"{row.label} (n = {row.n})" if few else row.label) for row, few in zip(rows.itertuples(), fewer)]
    labels = [f"{label} {ALONE}" if alone else label for label, alone in zip(labels, rows["alone"])]
    figure.set_size_inches(3.4, 1.2 + (0.2 if any("\n" in label for label in labels) else 0.15) * len(rows))
    ends = rows.loc[~leaky(rows)]
    theirs = [papers[arm][0] for arm in ends.loc[~far_off(ends), "arm"] if arm in papers]
    noise = rows.loc[rows["below_floor"], "floor"]
    low, high = span(ends, *theirs, *noise, *-noise)
    limits, cut = (low - 0.05 * (high - low), high + 0.05 * (high - low)), False
    axes = figure.subplots()
    axes.set_xlim(*limits)
    axes.axvline(0, color="0.35", linewidth=0.7, linestyle=":")
    axes.barh(noise.index, 2 * noise, left=-noise, height=0.6, color="0.88")
    for place, row in rows.iterrows():
        mean, look = row["difference_mean"], arms[row["arm"]].look
        if not low <= mean <= high:
            note: dict[str, Any] = {"va": "center", "fontsize": 6.5, "ha": "left" if mean < low else "right"}
            note["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # clear of the line at 0
            axes.text(low if mean < low else high, place, f"← {mean:+.3g}" if mean < low else f"{mean:+.3g} →", **note)
            cut = True
            continue
        if row["arm"] in papers:
            axes.plot(papers[row["arm"]][0], place, "o", color="0.2", fillstyle="none", markersize=5.5)
        reach = [[mean - row["difference_low"]], [row["difference_high"] - mean]]
        known = row["difference_low"] == row["difference_low"]
        axes.errorbar(
            mean,
            place,
            xerr=reach if known else None,
            fmt=look["marker"],
            color=look["color"],
            markersize=3,
            elinewidth=0.9,
        )
        if known:
            cut |= arrows(axes, place, (row["difference_low"], row["difference_high"]), limits, look["color"], False)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.grid(axis="y", color="0.92", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlabel(broken(f"test loss minus that of {reference_of(frame)} (nats\u00a0per\u00a0token)", 26))
    with_bars = rows.loc[rows["difference_low"].notna()]
    bars = f"bars: 95 % intervals, {held(with_bars, ALONE)}; " if len(with_bars) else ""
    told = ("; arrows: beyond the axis" if cut else "") + ("\nhollow: published, in its own setting" if theirs else "")
    told += f"\ngrey: below the noise floor (of two single runs {floor:.4f} nats, 95 %)" if len(noise) else ""
    told += f"\n{LEAKS} sees the future in evaluation" if any(LEAKS in label for label in labels) else ""
    explain(figure, f"{bars}n = {numbers(rows['n'])}{told}")


def rates(figure: Figure, counted: Any, frame: pd.DataFrame, arms: dict[str, Arm]) -> None:
    """Tokens trained per second: a bar to each arm's mean, the fastest on top, its runs on it, and what it is of the
    reference's mean."""
    per_second = counted.groupby("arm")["tokens_per_second"]
    means = per_second.mean().sort_values()
    reference = next((arm for arm in frame["reference_arm"] if arm in means), None)
    unit, per = token_unit(means.max())
    figure.set_size_inches(3.4, 1.2 + 0.2 * len(means))
    axes = figure.subplots()
    for place, (arm, mean) in enumerate(means.items()):
        axes.barh(place, mean / per, height=0.55, color=arms[arm].look["color"], alpha=0.35)
        runs = per_second.get_group(arm) / per
        axes.plot(runs, [place] * len(runs), ".", color="0.15", markersize=3)
        if reference not in (None, arm):
            axes.text(
                0.02 * means.max() / per, place, f"{mean / means[reference]:.2f} times", va="center", fontsize=6.5
            )
    axes.set_yticks(range(len(means)), [broken(arms[arm].label) for arm in means.index])
    axes.set_xlabel(f"tokens trained per second ({unit})")
    beside = f" (times: of {arms[reference].label}'s mean)" if reference else ""
    explain(figure, f"bars: means{beside}; dots: runs, n = {numbers(per_second.count())}")


def over_seeds(losses: pd.Series) -> pd.DataFrame:
    """Mean and deviation of `losses`, indexed by (seed, tokens), where all seeds have one."""
    by_seed = losses.dropna().unstack("seed").dropna()
    return pd.DataFrame({"mean": by_seed.mean(axis=1), "deviation": by_seed.std(axis=1).fillna(0.0)})
