"""A study as a table: one row an arm, and what stands above and under it."""

import numpy as np
import pandas as pd
from tabulate import tabulate

from analysis.runs import Study
from analysis.statistics import mean_and_deviation, paired_difference

TEXT_FIGURES = ("bits_per_byte", "word_perplexity", "unknown_share", "priced_share")
LEAKS = "‡"  # ends the label of an arm that sees the future in evaluation


def table(study: Study, style: dict) -> pd.DataFrame:
    """One row an arm, in job order, numbers in full (losses in nats per token): table.csv, and what is printed."""
    arms = list(study.runs["arm"].unique())
    reference = style["reference"] if style["reference"] in arms else arms[0]
    counted = study.counted.set_index("seed")
    base = counted.loc[counted["arm"] == reference]
    rows = []
    for arm in arms:
        runs = counted.loc[counted["arm"] == arm]
        label = style["arms"].get(arm, {}).get("label") or style["labels"].get(arm, arm.replace("_", " "))
        if any("evaluation" in leak for leaks in runs.get("leaks", []) for leak in leaks):
            label += f" {LEAKS}"
        row = {"arm": arm, "label": label, "planned": (study.runs["arm"] == arm).sum(), "n": len(runs)}
        row |= {f"{kind}_parameters": runs[f"parameters/{kind}"].mean() for kind in ("active", "total")}
        for split in ("test", "val"):
            mean, deviation = mean_and_deviation(runs.loc[:, f"{split}/perplexity"])
            row |= {f"{split}_perplexity": mean, f"{split}_perplexity_deviation": deviation}
            for key in TEXT_FIGURES:  # of runs that have them
                figures = runs[f"{split}/{key}"] if f"{split}/{key}" in runs else pd.Series(dtype=float)
                row[f"{split}_{key}"] = figures.astype(float).mean(skipna=False)
        for what, column in (("flops", "train_flops_per_token"), ("parameters", "parameters/total")):
            row[f"{what}_over_reference"] = runs[column].mean() / base[column].mean()
        row["flops_per_token"], row["peak_memory_bytes"] = (
            runs[column].mean() for column in ("train_flops_per_token", "peak_memory_bytes")
        )
        difference = paired_difference(runs.loc[:, "test/ce"], base.loc[:, "test/ce"])
        row |= {f"difference_{key}": value for key, value in difference._asdict().items()}
        row |= {"separated": difference.separated, "reference": arm == reference}
        row["below_unigram"] = (runs["val/unigram_entropy"] - runs["val/ce"]).mean()
        row["tokens_per_second"] = runs["tokens_per_second"].astype(float).mean(skipna=False)  # a short run has none
        rows.append(row)
    return pd.DataFrame(rows)


def printed(frame: pd.DataFrame, form: str) -> str:
    """The table for a reader. `form` is tabulate's: "simple" for a terminal, "pipe" for markdown."""
    reference = frame.loc[frame["reference"], "label"].item()
    headers = ["method", "parameters\nactive / total", "test\nperplexity", "validation\nperplexity", "n"]
    headers += [f"difference to {reference}\n[95 % interval]", "below\nunigram", "tokens\nper s"]
    if form == "pipe":  # a cell of markdown is one line
        headers = [header.replace("\n", " ") for header in headers]
    rows = [_cells(row) for row in frame.to_dict("records")]
    align = ("left", *["right"] * 4, "left", "right", "right")
    return tabulate(rows, headers, form, colalign=align, disable_numparse=True)


def costs(frame: pd.DataFrame, form: str) -> str:
    """What each method costs, beside the reference. `form` as in printed()."""
    reference = frame.loc[frame["reference"], "label"].item()
    headers = ["method", "FLOPs per token", f"over {reference}", "parameters", f"over {reference}", "peak memory"]
    rows = []
    for row in frame.loc[frame["n"] > 0].to_dict("records"):
        cells = [row["label"], human(row["flops_per_token"]), row["flops_over_reference"]]
        cells += [human(row["total_parameters"]), row["parameters_over_reference"]]
        cells = [f"{cell:.2f}".replace("nan", "") if isinstance(cell, float) else cell for cell in cells]
        rows.append([*cells, f"{row['peak_memory_bytes'] / 1e9:.2f} GB"])
    align = ("left", *["right"] * 5)
    return tabulate(rows, headers, form, colalign=align, disable_numparse=True)


def by_text(frame: pd.DataFrame, form: str) -> str:
    """Figures that do not depend on how text is cut into tokens; "" if no run has them. `form` as in printed()."""
    rows = [row for row in frame.to_dict("records") if row["test_bits_per_byte"] >= 0]
    if not rows:
        return ""
    mark = " §" if _unknown(frame) > 0 else ""
    headers = ["method", f"test bits per byte{mark}", f"validation{mark}", "test word perplexity", "validation"]
    keys = [f"{split}_{key}" for key in TEXT_FIGURES[:2] for split in ("test", "val")]
    cells = [[row["label"], *(_figure(row[key]) for key in keys)] for row in rows]
    return tabulate(cells, headers, form, colalign=("left", *["right"] * 4), disable_numparse=True)


def _most(frame: pd.DataFrame, column: str) -> float:
    """The largest value; nan if one is missing."""
    return float(np.max(frame[column].to_numpy(float))) if column in frame else np.nan


def _unknown(frame: pd.DataFrame) -> float:
    """The largest share of unknown words in the test tokens."""
    return max(
        (row["test_unknown_share"] for row in frame.to_dict("records") if row["test_unknown_share"] > 0), default=0
    )


def _figure(value: float) -> str:
    """Four digits, however large."""
    return "" if value != value else f"{value:.4g}"


def _cells(row: dict) -> list[str]:
    n = str(row["n"]) if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
    if not row["n"]:
        return [row["label"], "", "", "", n, "", "", ""]
    parameters = f"{human(row['active_parameters'])} / {human(row['total_parameters'])}"
    test = "{test_perplexity:.2f} ± {test_perplexity_deviation:.2f}".format(**row).removesuffix(" ± nan")
    validation = "{val_perplexity:.2f} ± {val_perplexity_deviation:.2f}".format(**row).removesuffix(" ± nan")
    difference = "{difference_mean:+.3f} [{difference_low:+.3f}, {difference_high:+.3f}]".format(**row)
    difference = difference.removesuffix(" [+nan, +nan]")  # of one pair
    if row["reference"]:
        difference = "reference"
    elif not row["difference_pairs"]:
        difference = "no pair"
    elif row["difference_pairs"] > 1 and not row["separated"]:
        difference += " †"
    speed = f"{row['tokens_per_second']:,.0f}".replace("nan", "")
    below = f"{row['below_unigram']:.3f}"
    return [row["label"], parameters, test, validation, n, difference, below, speed]


def human(count: float) -> str:
    """1234567 -> "1.2M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1}f}{name}"
    return f"{count:.0f}"


def header(study: Study, style: dict) -> str:
    """Which comparison, on what text, how much of it, which seeds, on what device."""
    corpus = study.config["data"]["corpus"]
    text = style["corpora"].get(corpus["_target_"], corpus["_target_"]).format(**corpus)
    steps, tokens = (study.counted[column].iloc[0] for column in ("step", "token_budget"))
    stopped = (study.counted["tokens"] < study.counted["token_budget"]).to_numpy().any()
    amount = f"at most {human(tokens)} tokens" if stopped else f"{human(tokens)} tokens in {steps:,.0f} steps"
    seeds = ", ".join(str(seed) for seed in sorted(study.counted["seed"].unique()))
    devices = " and ".join(study.counted["device"].unique())
    trained = f"trained on {amount}, seeds {seeds}, on {devices}"
    return f"{study.name} at scale {study.scale}: {text}\n{trained}"


def notes(study: Study, frame: pd.DataFrame) -> str:
    """What the columns are, what is not separated, and every run that is in no mean."""
    reference = frame.loc[frame["reference"], "label"].item()
    when = "of the best validation's weights" if _most(study.counted, "best_step") >= 0 else "after the last step"
    lines = [
        "parameters: active are those that one token passes through; k thousand, M million, B billion",
        "FLOPs: of matrix products in training a token, router and baseline included; memory is of the whole process",
        f"perplexity: exp(cross-entropy per token) {when}; mean ± standard deviation over n runs (seeds)",
        "difference: of test cross-entropy, in nats (natural log) per token; mean over pairs of runs of one seed;",
        f"  below 0 is better than {reference}; the interval is that of a paired t-test, one method at a time",
        "below unigram: nats by which validation cross-entropy is under that of guessing by token frequency alone",
        "tokens per s: trained per second, whatever else the machine did; not a benchmark",
    ]
    if by_text(frame, "simple"):
        lines.append(
            "bits per byte of UTF-8, and perplexity per word between blanks: the same tokens' loss over other counts"
        )
    if (share := np.min(frame["test_priced_share"].to_numpy())) < 0.99:
        lines.append(f"  of {share:.1%} of the test tokens, which stand for all: the others are no targets")
    if (share := _unknown(frame)) > 0:
        lines.append(
            f"§ of the test tokens {share:.2%} are the unknown word, whose text is not priced: bits per byte and word"
        )
        lines.append("  perplexity can be compared with no other dictionary's")
    read, whole = (_most(part, "val/tokens") for part in (study.curves, study.counted))
    if read < whole:
        lines.append(f"learning curves: over {read:,.0f} of {whole:,.0f} validation tokens, the same at every step")
    if frame["label"].str.endswith(LEAKS).any():
        lines.append(f"{LEAKS} routes by what comes after a token, in evaluation too: a bound, not a language model")
    compared = frame.loc[~frame["reference"] & (frame["difference_pairs"] > 0)].to_dict("records")
    if any(row["difference_pairs"] > 1 and not row["separated"] for row in compared):
        lines.append(f"† not separated from {reference}: the interval contains 0")
    few = [row for row in compared if row["difference_pairs"] < row["n"]]
    lines += [f"{row['label']}: its difference is over {row['difference_pairs']} of {row['n']} runs" for row in few]
    left_out = study.runs.loc[study.runs["outcome"] != "finished"].to_dict("records")
    lines.append(f"{len(study.counted)} of {len(study.runs)} runs are counted" + ("; in no mean:" if left_out else ""))
    lines += [f"  {run['id']}: {run['outcome']}" + (f" ({run['why'][:64]})" if run["why"] else "") for run in left_out]
    if left_out:
        lines.append(f"to run them again (those with a result only once their folder is deleted):\n  {study.command}")
    return "\n".join(lines)
