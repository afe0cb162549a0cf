"""What stands above and under a table: what was compared, what the marks mean, and every run that is in no mean."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd

from analysis.additive_model import ALONE as VARIANCES
from analysis.additive_model import DOUBT, settled
from analysis.arms import described, plural
from analysis.behind import SETTING
from analysis.published import ABSENT
from analysis.summary import LEAKS, further_pairs, model_of, sharing
from analysis.tables import (
    ALONE,
    EQUIVALENT,
    FLOOR,
    UNKNOWN,
    UNSEPARATED,
    WIDTH,
    human,
    leaky,
    reference_of,
    unknown_share,
)
from analysis.variation import split_variance

WITHOUT_RESULT = ("stopped", "failed", "missing")
OF_EXPERTS = ("num_experts", "experts.num_shared", "model.sparse_layers")  # of no use to an arm without experts
FEW_DOCUMENTS, FEW = 30, "; so few say little of other text"  # losses differ more by document than by arm
LAST = "in training's last logged step, mean over runs"
LOGGED = {  # figure of metrics.routing: what it is, its form, how the runs of an arm make one, and what goes unsaid
    "assignment_gap": (
        "certified gap of the assignment, over tokens times the scores' deviation, at most",
        ".1e",
        "max",
        None,
    ),
    "dropped": ("assignments dropped for want of capacity, in a logged step at most", ".1%", "max", 0),
    "max_over_mean": (f"tokens of the fullest expert over the mean, {LAST}", ".1f", "mean", None),
    "weight": (f"weight of experts' outputs in the layer where it is least, {LAST}", ".2g", "mean", None),
}


def header(runs: pd.DataFrame) -> str:
    """Which comparison, on what text, how much of it, which seeds, on what device."""
    counted = runs.loc[runs["outcome"] == "finished"]
    first = counted.iloc[0]
    budgets, steps = sorted(set(counted["token_budget"])), sorted(set(counted["step"]))
    stopped = bool((counted["tokens"] < counted["token_budget"]).any())
    amount = f"at most {several(budgets)} tokens" if stopped else f"{several(budgets)} tokens"
    amount += "" if stopped else f" in {' to '.join(f'{step:,.0f}' for step in {steps[0]: 0, steps[-1]: 0})} steps"
    seeds = [str(seed) for seed in sorted(counted["seed"].unique())]
    devices = " and ".join(counted["device"].unique())
    return "\n".join(
        [
            f"{first['sweep']} at scale {first['scale']}: {first['corpus']}",
            f"trained on {amount}, {plural('seed', len(seeds))} {', '.join(seeds)}, on {devices}",
        ]
    )


def several(counts: list[float]) -> str:
    return human(counts[0]) if len(counts) == 1 else f"{human(counts[0])} to {human(counts[-1])}"


def columns(runs: pd.DataFrame, frame: pd.DataFrame) -> list[str]:
    """What the columns are."""
    reference, early = reference_of(frame), "best_step" in runs and runs["best_step"].notna().to_numpy().any()
    timed = reference_of(frame, "timed_arm")
    when = "of the best validation's weights" if early else "after the last step"
    lines = [
        f"perplexity: exp(cross-entropy per token) {when}; mean ± standard deviation over n runs (seeds)",
        f"difference: of test cross-entropy, in nats (natural log) per token; below 0 is better than {reference};",
        "  from the model arm + seed over the whole table; the intervals (Dunnett's) hold for all arms at once",
        "below unigram: nats by which validation cross-entropy is under that of guessing by token frequency alone",
        "tokens per s: trained per second, whatever else the machine did; not a benchmark",
        "parameters: active are those that one token passes through; k thousand, M million, B billion",
        "FLOPs: of matrix products in training a token, router and baseline included; memory is of the whole process",
        f"seconds: of training, mean over runs; and until the validation loss was {timed}'s last of the same seed;",
        "  at each run's tokens per s, without what is compiled at first",
    ]
    counted = runs.loc[runs["outcome"] == "finished"]
    if shared := int(sharing(counted).sum()):
        whose = f"  {shared} of {len(counted)} runs shared their GPU with other jobs"
        lines.insert(5, f"{whose}: no speed or seconds of theirs")
    if ((frame["reached"] > 0) & (frame["reached"] < frame["timed"])).to_numpy().any():
        lines.append("  (k of n): mean over the k runs that came to it")
    if frame["test_bits_per_byte"].notna().to_numpy().any():
        lines.append(
            "bits per byte of UTF-8, and perplexity per word between blanks: the same tokens' loss over other counts"
        )
    if (share := float(np.min(frame["test_priced_share"].to_numpy()))) < 0.99:
        lines.append(f"  of {share:.1%} of the test tokens, which stand for all: the others are no targets")
    lines += tested_on(counted)
    if {"curve_tokens", "val/tokens"} <= set(runs):
        read, whole = (float(np.nanmax([0, *runs[key]])) for key in ("curve_tokens", "val/tokens"))
        if read < whole:
            lines.append(f"learning curves: over {read:,.0f} of {whole:,.0f} validation tokens, the same at every step")
    return lines


def tested_on(counted: pd.DataFrame) -> list[str]:
    """How much text the test losses are of, if that is known, and whether that is too little."""
    if "test_documents" not in counted:
        return []
    least = counted.dropna(subset=["test_documents"]).sort_values("test_documents").head(1)
    return [
        f"test split: {n:,.0f} {plural('document', n)}, {tokens:,.0f} tokens{FEW * (n < FEW_DOCUMENTS)}"
        for n, tokens in zip(least["test_documents"], least["test/tokens"])
    ]


def marks(frame: pd.DataFrame, asked: dict[str, Any], floor: float) -> list[str]:
    """What the marks mean that this table has."""
    reference, told = reference_of(frame), frame.loc[frame["difference_low"].notna()]
    n = " or ".join(str(n) for n in sorted(set(told.loc[~told["separated"], "n"])))
    lines = []
    if n:
        lines.append(f"{UNSEPARATED} not separated from {reference} at n = {n}: the interval contains 0")
    few = frame.loc[(frame["difference_pairs"] > 0) & (frame["difference_pairs"] < frame["n"])].to_dict("records")
    for row in few:
        lines.append(f"{row['label']}: {row['difference_pairs']} of its {row['n']} runs have a pair of the same seed")
    if told["equivalent"].to_numpy().any():
        lines.append(
            f"{EQUIVALENT} equivalent to {reference}: within {asked['margin']} nats, by two one-sided tests at 5 %"
        )
    if told["alone"].to_numpy().any():
        lines.append(
            f"{ALONE} tested alone, by its own pairs and Bonferroni's correction: it or {reference} scatters unlike"
        )
        lines.append("  the other arms (three times their variance, F-test at 5 %)")
    for row in frame.loc[(frame["variance_ratio"] >= VARIANCES) & ~frame["noisy"]].to_dict("records"):
        what = f"{row['label']} has {row['variance_ratio']:.2g} times the others' variance"
        lines += [f"{what}, which an F-test does not tell from chance:"]
        lines += ["  it is not tested alone; see what the paired t makes of its differences"]
    if floor == floor:
        mark = f"{FLOOR} below the " if frame["below_floor"].to_numpy().any() else ""
        lines.append(f"{mark}noise floor: one run repeated with one seed differs by up to {floor:.4f} nats")
        lines.append("  in 95 % of such pairs, and a difference of means over n runs each by that over the root of n")
    else:
        lines.append("noise floor: unknown; run sweeps=noise_floor at this scale and report on it")
    if leaky(frame).to_numpy().any():
        lines.append(f"{LEAKS} routes by what comes after a token, in evaluation too: a bound, no language model")
    if (share := unknown_share(frame)) > 0:
        lines.append(
            f"{UNKNOWN} of the test tokens {share:.2%} are the unknown word, whose text is not priced: bits per"
        )
        lines.append("  byte and word perplexity can be compared with no other dictionary's")
    return lines


def of_statistics(runs: pd.DataFrame, frame: pd.DataFrame, style: dict, asked: dict[str, Any]) -> list[str]:
    """What the table of statistics is, the pooled residual, and what its rows cannot say."""
    counted = runs.loc[runs["outcome"] == "finished"]
    arms = described(runs["arm"], style)
    model = settled(model_of(counted, arms, asked))
    lines = []
    if model.dof and frame["difference_low"].notna().to_numpy().any():
        pooled = float(model.variance) ** 0.5
        dof = f"{model.dof} {plural('degree', model.dof)} of freedom"
        lines.append(f"residual of the model arm + seed: {pooled:.4f} nats, pooled on {dof};")
        lines.append("  by arm beside it, with each arm's variance over that of the others")
        for arm in sorted(model.apart, key=model.arms.index):
            lines.append(f"  {arms[str(arm)].label}, whose variance is another (p < {DOUBT:g}), has no part in it")
        lines.append(
            f"p of equivalence: two one-sided tests at {asked['margin']} nats, fixed beforehand; over documents: the"
        )
        lines.append("  bootstrap of test documents for these trained models, which says nothing of other seeds")
        lines.append("seeds to separate: with a power of 80 %, if the difference and the scatter are those seen here")
    return lines + further_pairs(model, arms, asked) + draws(counted, arms)


def draws(counted: pd.DataFrame, arms: dict[str, Any]) -> list[str]:
    """Of each method whose places are draws, crossed with seeds: what of the variance is whose."""
    lines = []
    places = {name: arm.place for name, arm in arms.items() if arm.place.startswith("draw")}
    for method in dict.fromkeys(arms[name].method for name in places):
        own = counted.loc[counted["arm"].isin([name for name in places if arms[name].method == method])]
        block = own.assign(draw=own["arm"].map(places)).pivot(index="seed", columns="draw", values="test/ce")
        if min(block.shape) > 1 and block.notna().to_numpy().all():
            parts = split_variance(block)
            shown = [f"{np.sqrt(max(0, part)):.4f}" for part in parts[:3]]
            lines.append(
                f"{style_label(arms, method)}: deviation {shown[0]} nats by training seed (p {parts.seed_p:.3f}),"
            )
            lines.append(f"  {shown[1]} by table draw (p {parts.table_p:.3f}), {shown[2]} by neither")
    return lines


def style_label(arms: dict[str, Any], method: str) -> str:
    """A method's label without a place."""
    arm = next(arm for arm in arms.values() if arm.method == method)
    return arm.label.removesuffix(", " + arm.place.replace("_", " "))


def conditions(runs: pd.DataFrame, frame: pd.DataFrame, asked: dict[str, Any]) -> list[str]:
    """What arms declare about themselves, and every setting that is not the same for all."""
    counted, labels = runs.loc[runs["outcome"] == "finished"], dict(zip(frame["arm"], frame["label"]))
    declared: dict[str, list[str]] = {}
    for arm, own in counted.groupby("arm", sort=False):
        if "leaks" in own and own["leaks"].iloc[0]:
            declared.setdefault(own["leaks"].iloc[0], []).append(labels[arm].removesuffix(f" {LEAKS}"))
    lines = [f"leak, declared by the router ({leak}): {'; '.join(names)}" for leak, names in declared.items()]
    if declared:
        lines.append("  (python -m routers.certify router=NAME checks what a router declares; a report does not)")
    lines += logged(counted, labels)
    for column in [column for column in runs if column.startswith(SETTING)]:
        key = column.removeprefix(SETTING)
        if key in asked.get("varies", []):
            continue
        values = {
            arm: " and ".join(dict.fromkeys(value for value in own[column] if value))
            for arm, own in counted.groupby("arm", sort=False)
            if key not in OF_EXPERTS or not without_experts(own)
        }
        if not values:
            continue
        most = max(values.values(), key=list(values.values()).count)
        others = [f"{value} of {labels[arm]}" for arm, value in values.items() if value not in (most, "")]
        lines += [f"not equal: {key} is {most}, but " + "; ".join(others)] if others else []
    return lines


def logged(counted: pd.DataFrame, labels: dict[str, str]) -> list[str]:
    """What the runs' own steps said of assignments and loads: an arm's largest gap and share dropped, its mean load."""
    lines = []
    for key, (said, form, how, usual) in LOGGED.items():
        if f"route/{key}" in counted:
            of_arm: Any = counted.groupby("arm", sort=False)[f"route/{key}"].agg(how).dropna()
            of_arm = of_arm[of_arm != usual]
            shown = [f"{labels[arm]} {format(value, form) if value else 0}" for arm, value in of_arm.items()]
            lines += [f"{said}: {'; '.join(shown)}"] if shown else []
    return lines


def without_experts(own: pd.DataFrame) -> bool:
    """Whether each token passes through all parameters of the replaced layers of these runs; an inserted layer's place
    is of use without experts too."""
    placed = own.get(f"{SETTING}model.placement")
    inserted = placed is not None and (placed == "insert").to_numpy().any()
    return bool((own["parameters/active"] == own["parameters/total"]).all()) and not inserted


def bad_runs(runs: pd.DataFrame, folder: Path | str) -> list[str]:
    """Every run that is in no mean, by name, and how to complete or repeat it. folder: where the runs are."""
    left_out = runs.loc[runs["outcome"] != "finished"].to_dict("records")
    counted = len(runs) - len(left_out)
    lines = [f"{counted} of {len(runs)} runs are counted" + ("; in no mean:" if left_out else "")]
    lines += [f"  {run['id']}: {run['outcome']}" + (f" ({run['why'][:64]})" if run["why"] else "") for run in left_out]
    for column in ("listed", "same_code", "unlogged"):
        lines += folded(runs[column].iloc[0].split("\n")) if column in runs else []
    command = runs["sweep_command"].iloc[0]
    again = [run for run in left_out if run["outcome"] in WITHOUT_RESULT]
    if again:
        lines += [f"to complete {len(again)} of them (stopped, failed or missing):", f"  {command}"]
    repeat = [run for run in left_out if run["outcome"] not in (*WITHOUT_RESULT, "running")]
    if repeat:
        lines.append(f"to repeat {len(repeat)} of them, which have a result (of this tree and its data then):")
        lines += [f"  rm -r {shlex.quote(str(Path(folder, run['id'])))}" for run in repeat] + [f"  {command}"]
    flawed = runs.loc[runs["flaws"] != ""] if "flaws" in runs else runs.iloc[:0]
    lines += ["records with flaws that move no figure:"] if len(flawed) else []
    return lines + [f"  {run}: {flaw}" for run, flaw in zip(flawed["id"], flawed["flaws"])]


def of_publications(tables: list[dict[str, Any]]) -> list[str]:
    """Where the published numbers are from, and other papers' lines."""
    lines = []
    for table in tables:
        shown = "" if table.get("lines") or table["rows"] else " (no figures found: not published here)"
        lines += folded([f"published: {table['source']}{shown}"])
        lines += folded(
            f"  {line}" for line in [*table.get("lines", []), *([table["also"]] if "also" in table else [])]
        )
    if any("lines" not in table for table in tables):
        lines.append(f"  {ABSENT}: not published here")
    if rows := [row for table in tables for row in table["rows"]]:
        lines.append(
            "  seen: in a transcription or the authors' own figure; read off: digitised from it; unverified: recalled."
        )
        lines += [
            "  Its differences are logarithms of ratios of these perplexities, to the reference of the same corpus;"
        ]
        lines.append("  of validation where its values are the surer ones, else of test where that is known")
        if any(row["ours"] and not row["alike"] for row in rows):
            lines.append("  A row without ours is of a setting that our runs do not have")
    return lines


def folded(lines: Iterable[str]) -> list[str]:
    """Lines of WIDTH at most, what is folded set in."""
    return [
        part
        for line in lines
        for part in wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    ]
