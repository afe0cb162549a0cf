"""A study's table for readers, in several small ones: result, published numbers, text, costs and statistics.

`form` is tabulate's: "simple" for a terminal, "pipe" for markdown, "latex_booktabs" for a paper.
"""

from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from analysis.published import ABSENT, by_arm, difference
from analysis.summary import LEAKS, TEXT_FIGURES

UNSEPARATED, EQUIVALENT, ALONE, FLOOR, UNKNOWN = "†", "≈", "◊", "~", "§"
WIDTH = 118  # of what is printed
REPLACED = {  # by LaTeX
    "±": r"$\pm$",
    "†": r"\dag{}",
    "‡": r"\ddag{}",
    "≈": r"$\approx$",
    "◊": r"$\diamond$",
    "§": r"\S{}",
    "–": "--",
}


def of_columns(
    rows: list[list[str]], headers: list[str], form: str, left: tuple[int, ...] = (0,), texts: int = 1
) -> str:
    """Cells as given; a header's line breaks stay for a terminal alone, where the first `texts` columns wrap too."""
    if form == "simple":
        return in_terminal(rows, headers, left, texts)
    headers = [header.replace("\n", " ") for header in headers]
    align = ["left" if place in left else "right" for place in range(len(headers))]
    return tabulate(rows, headers, form, colalign=align, disable_numparse=True)


def in_terminal(rows: list[list[str]], headers: list[str], left: tuple[int, ...], texts: int) -> str:
    """No line longer than WIDTH: headers break at blanks where they are wider than their cells, and then the first
    `texts` columns."""
    widest = [max(len(row[place]) for row in rows) for place in range(len(headers))]
    heads = [
        [line for part in header.split("\n") for line in wrap(part, max(width, 11), break_long_words=False) or [""]]
        for header, width in zip(headers, widest)
    ]
    heads = [[""] * (max(map(len, heads)) - len(head)) + head for head in heads]
    widths = [max(width, *map(len, head)) for width, head in zip(widest, heads)]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH and max(widths[:texts]) > 12:
        widths[widths.index(max(widths[:texts]))] -= 1
    lines = []
    for cells in (heads, ["-" * width for width in widths], *rows):
        parts = [
            cell if isinstance(cell, list) else wrap(cell, width, subsequent_indent="  ") if place < texts else [cell]
            for place, (cell, width) in enumerate(zip(cells, widths))
        ]
        for number in range(max(map(len, parts))):
            shown = [part[number] if number < len(part) else "" for part in parts]
            placed = [
                text.ljust(width) if place in left else text.rjust(width)
                for place, (text, width) in enumerate(zip(shown, widths))
            ]
            lines.append("  ".join(placed).rstrip())
    return "\n".join(lines)


def reference_of(frame: pd.DataFrame, column: str = "reference_arm") -> str:
    """What the differences are to, for a header: one arm's label, or that of the method at each place.

    column: timed_arm is to whose loss time is counted."""
    references = frame.loc[frame["arm"].isin(frame[column])]
    references = references if len(references) else frame  # each arm beside itself alone
    if len(references) == 1:
        return references["label"].iloc[0]
    methods = [
        label.removesuffix(", " + place.replace("_", " "))
        for label, place in zip(references["label"], references["place"])
    ]
    return " or ".join(dict.fromkeys(methods))


def result(frame: pd.DataFrame, form: str) -> str:
    """What a reader looks for first."""
    headers = ["method", "test\nperplexity", "validation\nperplexity", "n"]
    headers += [f"difference to {reference_of(frame)}\n[95 % interval]", "below\nunigram", "tokens\nper s"]
    rows = []
    for row in frame.to_dict("records"):
        n = f"{row['n']}" if row["n"] == row["planned"] else f"{row['n']} of {row['planned']}"
        if not row["n"]:
            rows.append([row["label"], "", "", n, "", "", ""])
            continue
        both = [spread(row[f"{split}_perplexity"], row[f"{split}_perplexity_deviation"]) for split in ("test", "val")]
        below = f"{row['below_unigram']:.3f}"
        rows.append([row["label"], *both, n, difference_of(row), below, given(row["tokens_per_second"], ",.0f")])
    return of_columns(rows, headers, form, left=(0, 4))


def difference_of(row: dict[str, Any]) -> str:
    if row["reference"]:
        return "reference"
    if row["difference_mean"] != row["difference_mean"]:
        return "no pair" if row["reference_arm"] else ""
    return " ".join([interval(row, "difference"), *marks(row)])


def marks(row: dict[str, Any]) -> list[str]:
    """After a difference, what is to be known of it."""
    told = row["difference_low"] == row["difference_low"]
    found = [ALONE] if row["alone"] else []
    if told and not row["separated"]:
        found.append(UNSEPARATED)
    if told and row["equivalent"] is True:
        found.append(EQUIVALENT)
    return found + ([FLOOR] if row["below_floor"] else [])


def statistics(frame: pd.DataFrame, form: str) -> str:
    """What stands behind the intervals, and how references scatter; "" if there are none."""
    rows = []
    for row in frame.to_dict("records"):
        compared = row["difference_low"] == row["difference_low"]
        if not compared and row["arm"] not in set(frame["reference_arm"]) & set(frame.loc[frame["n"] > 0, "arm"]):
            continue
        pair = interval(row, "paired") if row["difference_pairs"] > 1 else "" if compared else "reference"
        documents = interval(row, "documents", mean=False) if compared else ""
        cells = [row["label"], p_value(row["p"]), pair, p_value(row["equivalence_p"]), documents]
        seeds = given(row["seeds_to_separate"], ".0f") or "> 10000" if compared and not row["separated"] else ""
        rows.append([*cells, given(row["residual_deviation"], ".4f"), given(row["variance_ratio"], ".2g"), seeds])
    headers = ["method", "p, all\ntogether", "paired t alone\n[95 % interval]", "p of\nequivalence"]
    headers += ["over documents\n[95 % interval]", "residual\ndeviation", "variance\nratio", "seeds to\nseparate"]
    return of_columns(rows, headers, form, left=(0, 2, 4)) if frame["difference_low"].notna().to_numpy().any() else ""


def costs(frame: pd.DataFrame, form: str) -> str:
    """What each method costs, beside the reference."""
    reference, timed = reference_of(frame), reference_of(frame, "timed_arm")
    headers = ["method", "parameters\nactive / total", f"total over\n{reference}", "FLOPs\nper token"]
    headers += [
        f"FLOPs over\n{reference}",
        "peak\nmemory",
        "training\nseconds",
        f"seconds to\nloss of {timed}",
    ]
    rows = []
    for row in frame.loc[frame["n"] > 0].to_dict("records"):
        over = [given(row[f"{what}_over_reference"], ".2f") for what in ("total_parameters", "flops_per_token")]
        parameters = f"{human(row['active_parameters'])} / {human(row['total_parameters'])}"
        cells = [row["label"], parameters, over[0], human(row["flops_per_token"]), over[1]]
        cells.append(f"{row['peak_memory_bytes'] / 1e9:.2f} GB")
        until = given(row["seconds_to_reference"], ",.0f") or ("never" if row["timed"] else "")
        until += f" ({row['reached']} of {row['timed']})" if 0 < row["reached"] < row["timed"] else ""
        rows.append([*cells, given(row["train_seconds"], ",.0f"), until])
    return of_columns(rows, headers, form)


def by_text(frame: pd.DataFrame, form: str) -> str:
    """Figures that do not depend on how text is cut into tokens; "" if no run has them."""
    rows = [row for row in frame.to_dict("records") if row["test_bits_per_byte"] >= 0]
    if not rows:
        return ""
    mark = f" {UNKNOWN}" if unknown_share(frame) > 0 else ""
    headers = ["method", f"test bits\nper byte{mark}", f"validation{mark}", "test word\nperplexity", "validation"]
    keys = [f"{split}_{key}" for key in TEXT_FIGURES[:2] for split in ("test", "val")]
    return of_columns([[row["label"], *(readable(row[key]) for key in keys)] for row in rows], headers, form)


def beside_published(frame: pd.DataFrame, tables: list[dict[str, Any]], form: str) -> str:
    """The paper's perplexities and differences with their status beside ours; "" if the table has no counterpart.

    Ours stand in rows whose setting is ours, and in one of their own if all rows of an arm are of other settings."""
    tables = [table for table in tables if "lines" not in table]
    if not tables:
        return ""
    rows, cells = by_arm(tables), []
    several = len({table["short"] for table in tables if table["rows"]}) > 1
    for own in frame.to_dict("records"):
        known = rows.get(own["arm"], [])
        for theirs in [*([] if any(row["alike"] for row in known) else [{}]), *known]:
            corpus = [table["short"] for table in tables if several and theirs and table["name"] == theirs["table"]]
            where = ", ".join([*corpus, *filter(None, [theirs.get("configuration")])])
            apart = difference(theirs, tables, own["reference_arm"]) if theirs and own["reference_arm"] else None
            ours = own if theirs.get("alike", True) else {}
            cell = [own["label"], where, given(ours.get("test_perplexity"), ".2f"), of_paper(theirs, "test")]
            cell += [given(ours.get("val_perplexity"), ".2f"), of_paper(theirs, "valid")]
            published = ABSENT if apart is None else f"{apart[0]:+.3f} {apart[1]}"
            both = [given(ours.get("difference_mean"), "+.3f"), published]
            cells.append([*cell, *(both if own["reference_arm"] else ["", ""])])
    headers = ["method", "published for", "test\nours", "published", "validation\nours", "published"]
    headers += [f"nats to {reference_of(frame)}\nours", "published"]
    if not any(cell[1] for cell in cells):
        headers, cells = headers[:1] + headers[2:], [cell[:1] + cell[2:] for cell in cells]
    return of_columns(cells, headers, form, (0, 1) if "published for" in headers else (0,), headers.index("test\nours"))


def of_paper(row: dict[str, Any], split: str) -> str:
    return f"{row[split]:.2f} {row[f'{split}_status']}" if row.get(split) else ABSENT


def unknown_share(frame: pd.DataFrame) -> float:
    """The largest share of unknown words in the test tokens."""
    return max((share for share in frame["test_unknown_share"] if share > 0), default=0)


def leaky(frame: pd.DataFrame) -> pd.Series:
    return frame["label"].str.endswith(LEAKS)


def interval(row: dict[str, Any], what: str, mean: bool = True) -> str:
    """-0.010 [-0.035, +0.015], or without ends that are not known."""
    ends = "[{:+.3f}, {:+.3f}]".format(row[f"{what}_low"], row[f"{what}_high"]).replace("[+nan, +nan]", "")
    return f"{row[f'{what}_mean']:+.3f} {ends}".strip() if mean else ends


def spread(mean: float, deviation: float) -> str:
    return f"{mean:.2f} ± {deviation:.2f}".removesuffix(" ± nan")


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else given(p, ".3f")


def given(value: float | None, form: str) -> str:
    """The number, or nothing for NaN."""
    return "" if value is None or value != value else format(value, form)


def readable(value: float) -> str:
    """Four digits; of a hardly trained model's perplexity its logarithm."""
    return f"exp({np.log(value):.2f})" if value >= 1e6 else given(value, ".4g")


def human(count: float) -> str:
    """1234567 -> "1.2M"."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 100 * unit else 1}f}{name}"
    return f"{count:.0f}"


def in_latex(head: str, body: str, lines: str) -> str:
    """A fragment for \\input, which needs the package booktabs; the notes are comments."""
    for sign, written in REPLACED.items():
        body = body.replace(sign, written)
    commented = "\n".join(f"% {line}" for line in [*head.split("\n"), "", *lines.split("\n")])
    return f"{commented}\n{body}\n"
