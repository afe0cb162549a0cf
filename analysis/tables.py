"""A study as a table: one row an arm, what stands under it, and the runs behind it."""

import numpy as np
import pandas as pd
from tabulate import tabulate

from analysis.runs import Study
from analysis.statistics import paired_difference, summarise

NOT_SEPARATED = "†"


def labels(study: Study, style: dict) -> dict[str, str]:
    """What each arm of the study is called, in the order of its jobs."""
    named = style["arms"]
    arms = study.runs.loc[:, "arm"].unique()
    return {arm: named[arm]["label"] if arm in named else arm.replace("_", " ") for arm in arms}


def table(study: Study, style: dict, reference: str) -> pd.DataFrame:
    """One row an arm, numbers in full: what table.csv holds and every printed table is made from."""
    base = study.counted.loc[study.counted["arm"] == reference]
    frame = pd.DataFrame([_row(study, arm, label, base) for arm, label in labels(study, style).items()])
    return frame.assign(reference=frame["arm"] == reference)


def _row(study: Study, arm: str, label: str, base: pd.DataFrame) -> dict:
    planned = study.runs.loc[study.runs["arm"] == arm].set_index("seed")
    runs = planned.loc[planned["counted"]]
    diverged = int((planned["outcome"] == "diverged").sum())
    row = {"arm": arm, "label": label, "planned": len(planned), "diverged": diverged, "n": len(runs)}
    for kind in ("active", "total"):
        row[f"{kind}_parameters"] = _one(runs.loc[:, f"parameters/{kind}"], arm)
    for split in ("test", "val"):
        perplexity = summarise(runs.loc[:, f"{split}/perplexity"])
        row |= {f"{split}_perplexity": perplexity.mean, f"{split}_perplexity_deviation": perplexity.deviation}
    difference = paired_difference(runs.loc[:, "test/ce"], base.set_index("seed").loc[:, "test/ce"])
    row |= {f"difference_{key}": value for key, value in difference._asdict().items()}
    row |= {"separated": difference.separated}
    row["below_unigram"] = summarise(runs.loc[:, "val/unigram_entropy"] - runs.loc[:, "val/ce"]).mean
    speeds = runs.loc[:, "tokens_per_second"].astype(float)  # none of a run too short to measure
    row["tokens_per_second"] = float(speeds.mean(skipna=False))
    return row


def _one(values: pd.Series, arm: str) -> int | None:
    found = sorted(set(values))
    if len(found) > 1:
        raise ValueError(f"runs of {arm!r} differ in {values.name}: {found}; they are not one arm")
    return int(found[0]) if found else None


def printed(frame: pd.DataFrame, reference_label: str, form: str) -> str:
    """The table for a reader. `form` is tabulate's: "simple" for a terminal, "pipe" for markdown."""
    headers = ["method", "params\nactive / total", "test\nperplexity", "validation\nperplexity", "n"]
    headers += [
        f"test: difference to\n{reference_label}, nats [95 %]",
        "nats below\nunigram",
        "tokens\nper s",
    ]
    rows = [_cells(row) for row in frame.to_dict("records")]
    if form == "pipe":  # a cell of markdown is one line
        headers, *rows = [[cell.replace("\n", " ") for cell in cells] for cells in (headers, *rows)]
    align = ("left", *["right"] * 4, "left", "right", "right")
    return tabulate(rows, headers=headers, tablefmt=form, colalign=align, disable_numparse=True)


def _cells(row: dict) -> list[str]:
    diverged = f"\n{row['diverged']} diverged" if row["diverged"] else ""
    n = (f"{row['n']}" if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}") + diverged
    if not row["n"]:
        return [row["label"], "", "", "", n, "", "", ""]
    params = f"{human(row['active_parameters'])} / {human(row['total_parameters'])}"
    test, validation = (_perplexity(row, split) for split in ("test", "val"))
    gain, speed = f"{row['below_unigram']:.3f}", f"{row['tokens_per_second']:,.0f}".replace("nan", "")
    return [row["label"], params, test, validation, n, _difference(row), gain, speed]


def _perplexity(row: dict, split: str) -> str:
    deviation = row[f"{split}_perplexity_deviation"]
    return f"{row[f'{split}_perplexity']:.2f}" + ("" if np.isnan(deviation) else f" ± {deviation:.2f}")


def _difference(row: dict) -> str:
    if row["reference"]:
        return "reference"
    if not row["difference_pairs"]:
        return "no pair"
    text = _signed(row["difference_mean"])
    if row["difference_pairs"] > 1:
        text += f" [{_signed(row['difference_low'])}, {_signed(row['difference_high'])}]"
        text += "" if row["separated"] else f" {NOT_SEPARATED}"
    return text + ("" if row["difference_pairs"] == row["n"] else f" ({row['difference_pairs']} pairs)")


def _signed(x: float) -> str:
    return f"{x:+.3f}"


def human(count: float) -> str:
    """1234567 -> "1.2M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1}f}{name}"
    return f"{count:.0f}"


def header(study: Study, style: dict) -> str:
    """One line: which comparison, on what text, how much of it, which seeds, on what device."""
    corpus = study.config["data"]["corpus"]
    text = style["corpora"].get(corpus["_target_"], corpus["_target_"]).format(**corpus)
    counted = study.counted
    steps, tokens = (int(counted.loc[:, column].iloc[0]) for column in ("step", "tokens"))
    amount = f"{steps:,} steps, {human(tokens)} tokens"
    seeds = ", ".join(str(seed) for seed in sorted(set(counted.loc[:, "seed"])))
    devices = " and ".join(counted.loc[:, "device"].unique())
    return " · ".join([study.name, text, f"scale {study.scale}", amount, f"seeds {seeds}", devices])


def notes(study: Study, frame: pd.DataFrame, reference_label: str) -> list[str]:
    """What the columns are, what is not separated, and every run that is in no mean."""
    lines = [
        "params: those that one token passes through / all of them (k, M, B: thousand, million, billion)",
        "perplexity: exp(cross-entropy per token) at the final state; mean ± standard deviation over n seeds",
        f"difference: mean over pairs of runs of one seed; below 0 is better than {reference_label}",
        "[95 %]: interval of the paired t-test, each for itself (not widened for the number of methods)",
        "nats below unigram: how far validation loss is below the entropy of the split's token frequencies",
        "tokens per s: as trained here, whatever else the machine did; not a benchmark",
    ]
    others = frame.loc[~frame["reference"]]
    if (others.loc[:, "difference_pairs"] == 1).any():
        lines.append("no interval: it takes two pairs or more")
    unclear = others.loc[(others["difference_pairs"] > 1) & ~others["separated"]]
    for pairs in sorted(set(unclear.loc[:, "difference_pairs"])):
        arms = unclear.loc[unclear["difference_pairs"] == pairs, "label"]
        lines.append(f"{NOT_SEPARATED} not separated from {reference_label} at n = {pairs}: {'; '.join(arms)}")
    return lines + _left_out(study)


def _left_out(study: Study) -> list[str]:
    left = study.runs.loc[~study.runs["counted"]]
    if left.empty:
        return [f"all {len(study.runs)} runs of the sweep are counted"]
    lines = [f"{len(left)} of {len(study.runs)} runs are in no mean:"]
    for outcome in left.loc[:, "outcome"].unique():
        rows = left.loc[left["outcome"] == outcome]
        lines.append(f"  {len(rows)} {outcome}:")
        for run, why in zip(rows.loc[:, "id"], rows.loc[:, "why"], strict=True):
            lines.append(f"    {run}" + (f" ({_short(why)})" if why else ""))
    again = "  to complete or repeat them (a run that came to its end only once its folder is gone):"
    return [*lines, again, f"    {study.command}"]


def _short(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def behind(study: Study) -> pd.DataFrame:
    """Every run of the sweep with its outcome and figures: what runs.csv holds."""
    first = ["id", "arm", "seed", "outcome", "why", "counted"]
    rest = [column for column in study.runs.columns if column not in first]
    return study.runs.loc[:, first + rest]
