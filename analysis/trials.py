"""The report of a sweep of trials: each arm's best, and how much its learning rate matters; from its ledger alone."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import NullLocator

from analysis import behind, ledger, notes
from analysis.arms import Arm, described
from analysis.figures import MOST_CURVES, explain
from analysis.layout import legend_inside_or_above, save
from analysis.runs import ENDED, read_study
from analysis.tables import in_latex, of_columns

COLUMNS = {
    "method": "method",
    "trials": "trials",
    "lr": "learning rate",
    "knob": "knob",
    "value": "its value",
    "val_ce": "validation loss",
    "at_scale": "at the scale's rate",
    "state": "state",
}
LEFT = tuple(list(COLUMNS).index(key) for key in ("method", "knob", "state"))
FAR = 0.1  # nats above an arm's best that are drawn black; of curves twice as many are shown above the worst arm's best


def report_trials(runs: Path, results: Path, sweep: str, style: dict) -> str:
    """Write ledger, runs, table and figure to results/<scale>/<sweep>/; return what to print. ValueError if no trial
    has finished."""
    study = read_study(sweep, runs)
    folder = results / study.scale / sweep
    left = ledger.write(runs, results, sweep)[1]
    behind.write(behind.with_origin(study, runs, style).drop(columns="place"), folder / "runs.csv")
    printed, rows = write_table(folder, style)
    save_figure(rows, folder, style)
    where = f"table   {folder}/table.md, table.tex, table.csv\nfigure  {folder}/figure.png, figure.pdf"
    return f"{printed}\n\n{left}\n{where}"


def write_table(folder: Path, style: dict) -> tuple[str, pd.DataFrame]:
    """table.csv, table.md and table.tex from folder/ledger.csv, and what runs.csv says of its trials; what to print,
    and the ledger as a frame. ValueError if there is no runs.csv."""
    runs = behind.read(folder / "runs.csv")
    rows = pd.read_csv(folder / "ledger.csv", dtype={"run": str})
    table = best_trials(rows, style)
    table.to_csv(folder / "table.csv", index=False, float_format="%.15g", lineterminator="\n")
    head = f"{notes.header(runs)}\n{ledger.ended(rows['outcome'])} trials of {len(table)} arms have ended"
    lines = ["validation loss: nats per token, of the best trial that has ended, and of the one with nothing changed"]
    lines += ["state: chosen once all trials have ended, and those beyond an edge at which the best one lay"]
    apart = rows.loc[~rows["outcome"].isin([*ENDED, "missing"])]
    lines += [f"does not count: {run}, {outcome}" for run, outcome in zip(apart["run"], apart["outcome"])]
    lines += runs["same_code"].iloc[0].split("\n") if "same_code" in runs else []
    text = "\n".join(notes.folded(lines))
    headers, cells = [*COLUMNS.values()], [[_text(key, row[key]) for key in COLUMNS] for _, row in table.iterrows()]
    made = {form: of_columns(cells, headers, form, LEFT) for form in ("pipe", "latex_booktabs", "simple")}
    (folder / "table.md").write_text(f"{head}\n\n{made['pipe']}\n\n```text\n{text}\n```\n")
    (folder / "table.tex").write_text(in_latex(head, made["latex_booktabs"], text))
    return f"{head}\n\n{made['simple']}\n\n{text}", rows


def best_trials(rows: pd.DataFrame, style: dict) -> pd.DataFrame:
    """A row an arm. Losses are means over the seeds that tried a place."""
    arms, lines = described(rows["arm"], style), []
    for arm, found in rows.groupby("arm", sort=False):
        own: Any = found.assign(place=list(zip(found["lr"], found["value"].fillna(0.0))))
        losses = own.groupby("place")["val_ce"].mean().fillna(np.inf).to_dict()
        chosen = own.loc[own["chosen"], "place"].tolist()
        lr, value = place = chosen[0] if chosen else min(losses, key=lambda place: losses[place])
        if math.isinf(losses[place]):  # none has finished yet
            lr, value = None, None
        knob = own["knob"].iloc[0] if own["knob"].notna().any() else None
        left = (~own["outcome"].isin(ENDED)).sum()
        state = f"{left} to go" if left else "chosen" if chosen else "more to try"
        state += ", at an edge" if own["at_edge"].any() else ""
        line = {"method": arms[str(arm)].label, "trials": ledger.ended(own["outcome"]), "lr": lr, "knob": knob}
        line |= {
            "value": value if knob else None,
            "val_ce": losses[place] if lr else None,
            "at_scale": own.loc[own["unchanged"], "val_ce"].mean(),
            "state": state,
        }
        lines.append(line)
    return pd.DataFrame(lines)


def _text(key: str, cell: Any) -> str:
    if cell is None or cell != cell:
        return ""
    if key in ("val_ce", "at_scale"):
        return f"{cell:.3f}"
    return f"{cell:g}" if isinstance(cell, float) else str(cell)


def save_figure(rows: pd.DataFrame, folder: Path, style: dict) -> None:
    """Loss over learning rate, of few arms as curves, else of each arm in a row; the same trials are the same bytes."""
    arms = described(rows["arm"], style)
    losses = by_rate(rows)
    chosen = {*rows.loc[rows["chosen"], "arm"]}
    with context(["default", style["matplotlib"]]):
        figure = Figure()
        axes = figure.subplots()
        (curves if len(arms) <= MOST_CURVES else rows_of_dots)(figure, losses, arms, chosen)
        axes.set_xscale("log", base=2)
        axes.margins(x=0.06)
        usual = 1e3 * float(np.median(rows.loc[rows["unchanged"], "lr"]))
        steps = np.log2(1e3 * rows["lr"] / usual)
        axes.set_xticks(usual * 2.0 ** np.arange(np.ceil(steps.min() - 0.01), np.floor(steps.max() + 0.01) + 1))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("learning rate (thousandths)")
        save(figure, folder, "figure")


def by_rate(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """arm -> of each learning rate the lowest loss over the knob's values; a loss is the mean over the seeds that tried
    a place, of which none may have diverged."""
    places: Any = rows.assign(value=rows["value"].fillna(0.0)).dropna(subset="val_ce")
    means = places.groupby(["arm", "lr", "value"], sort=False)["val_ce"].mean()
    best = means[np.isfinite(means)].groupby(level=["arm", "lr"]).min()
    return {arm: best.loc[arm] for arm in dict.fromkeys(rows["arm"]) if arm in best.index}


def curves(figure: Figure, losses: dict[str, pd.Series], arms: dict[str, Arm], chosen: set[str]) -> None:
    """A line an arm of two rates and more: of each rate the best loss over the knob, to 2 * FAR above the worst
    arm's best, and a little."""
    axes, drawn = figure.axes[0], {arm: own for arm, own in losses.items() if len(own) > 1}
    figure.set_figheight(2.4)
    for arm, own in drawn.items():
        look = arms[arm].look
        line: dict[str, Any] = {key: look[key] for key in ("color", "dashes", "marker")}
        rates = own.index.to_numpy() * 1e3
        axes.plot(rates, own, label=arms[arm].label, linewidth=1.1, markersize=2.8, **line)
        _star(axes, own, own.min(), look["color"], arm in chosen)
    if drawn:
        bests = [own.min() for own in drawn.values()]
        axes.set_ylim(min(bests) - FAR / 4, max(bests) + 2.1 * FAR)
        legend_inside_or_above(figure, axes)
    axes.set_ylabel("validation loss\n(nats per token)")
    told = "star: the best" + " (hollow: so far)" * bool({*drawn} - chosen)
    told += "; with a knob, its best value at each rate\nlosses above the axis are cut off"
    bare = [arm.label for arm in arms.values() if arm.name not in drawn]
    explain(figure, told + f"\nnot drawn, with fewer than two rates: {', '.join(bare)}" * bool(bare))


def rows_of_dots(figure: Figure, losses: dict[str, pd.Series], arms: dict[str, Arm], chosen: set[str]) -> None:
    """Of each arm how far the best trial of each rate lies above its best, the best as a star."""
    axes = figure.axes[0]
    figure.set_size_inches(3.4, 1.2 + 0.15 * len(arms))
    for place, arm in enumerate(arms):
        if arm not in losses:
            continue
        own = losses[arm]
        grey = Normalize(-0.2 * FAR, FAR, clip=True)(own - own.min())
        look = {"cmap": "Greys", "vmin": 0, "vmax": 1, "edgecolors": "0.4", "linewidths": 0.4}
        axes.scatter(own.index * 1e3, [place] * len(own), 14, grey, **look)
        _star(axes, own, place, "#D55E00", arm in chosen)
    axes.set_yticks(range(len(arms)), [arm.label for arm in arms.values()])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    hollow = " (hollow: so far)" if {*losses} - chosen else ""
    explain(figure, f"star: the best{hollow}; dots: the darker, the further above it, black from {FAR:g} nats on")


def _star(axes: Axes, own: pd.Series, height: float, colour: str, chosen: bool) -> None:
    """At the best rate, hollow while nothing is chosen."""
    face = colour if chosen else "white"
    rate: Any = own.idxmin()
    axes.plot(rate * 1e3, height, "*", color=colour, markerfacecolor=face, markersize=7)
