"""`python -m analysis.verdicts [SCALE]`: the paper's twelve claims, and what the runs at that scale say of each.

Claims and their contrasts are declared in claims.yaml. A claim's p is twice the smaller of two: that of its parts taken
together (the largest, for all must hold) and that of the strongest speaking against it (times the number of parts).
Holm's correction is over all claims, also those that no runs are there for.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from analysis.arms import load
from analysis.contrasts import Outcome, examine
from analysis.runs import read_study
from analysis.statistics import holm

COLUMNS = ["id", "arm", "seed"]


class Verdict(NamedTuple):
    claim: str
    says: str
    verdict: str  # supported, contradicted, not separated or not run
    p: float  # after Holm's correction
    parts: list[Outcome]


def judge(claims: dict[str, Any], runs: Callable[[str], pd.DataFrame]) -> list[Verdict]:
    """claims: what claims.yaml holds; runs(sweep): the runs of a sweep that count, empty where there are none."""
    parts = {
        name: [examine(part, runs(part["sweep"]), claims["margin"]) for part in claim["parts"]]
        for name, claim in claims["claims"].items()
    }
    sides = [_sides(outcomes) for outcomes in parts.values()]
    corrected = holm([min(1.0, 2 * min(both)) if not np.isnan(both).any() else np.nan for both in sides])
    judged = zip(parts.items(), sides, corrected)
    return [
        Verdict(name, claims["claims"][name]["says"], _verdict(outcomes, both, p, claims["level"]), float(p), outcomes)
        for (name, outcomes), both, p in judged
    ]


def _sides(outcomes: list[Outcome]) -> tuple[float, float]:
    """p for the claim and p against it; NaN where a part has none."""
    support, against = ([getattr(each, side) for each in outcomes] for side in ("p_for", "p_against"))
    return float(np.max(support)), min(1.0, len(outcomes) * float(np.min(against)))


def _verdict(outcomes: list[Outcome], sides: tuple[float, float], p: float, level: float) -> str:
    if any(each.lacks for each in outcomes):
        return "not run"
    if not p < level:
        return "not separated"
    return "supported" if sides[0] < sides[1] else "contradicted"


def runs_of(sweep: str, scale: str, runs: Path, results: Path) -> pd.DataFrame:
    """The counted runs of a sweep: of results/<scale>/<sweep>/runs.csv, or else of its record among the run folders."""
    committed = results / scale / sweep / "runs.csv"
    if committed.exists():
        frame = pd.read_csv(committed)
        return frame.loc[frame["outcome"] == "finished"]
    if (runs / "sweeps" / f"{sweep}.json").exists():
        try:
            study = read_study(sweep, runs)
        except ValueError:  # none has finished
            return pd.DataFrame(columns=COLUMNS)
        if study.scale == scale:
            return study.counted
    return pd.DataFrame(columns=COLUMNS)


def printed(verdicts: list[Verdict], scale: str, level: float) -> str:
    """The verdicts, then each part with its figure and the runs behind it."""
    rows = [[each.claim, each.verdict, _number(each.p), each.says] for each in verdicts]
    lines = [f"The claims at scale {scale}; p is Holm's over {len(verdicts)}, a verdict needs p < {level:g}", ""]
    lines += [tabulate(rows, ["", "verdict", "p", "claim"], "simple", disable_numparse=True), ""]
    for each in verdicts:
        lines += [f"{each.claim} {each.verdict}: {each.says}", *(line for part in each.parts for line in _part(part))]
    return "\n".join(lines)


def _part(part: Outcome) -> list[str]:
    if part.estimate is None:
        return [f"  {part.part}", *_wrapped(part.lacks)]
    low, high = part.estimate.interval()
    interval = "" if np.isnan(low) else f" [{low:+.4f}, {high:+.4f}]"
    figure = f"{part.estimate.value:+.4f}{interval} {part.unit}, n = {part.estimate.n}"
    p = f"p for {_number(part.p_for)}, against {_number(part.p_against)}"
    return [f"  {part.part}", f"    {figure}; {p}", *_wrapped(" ".join(part.runs))]


def _wrapped(text: str) -> list[str]:
    return wrap(text, 116, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _number(p: float) -> str:
    return "" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def read_claims() -> dict[str, Any]:
    """claims.yaml, with the margin of equivalence that holds for all tables."""
    return {"margin": load("declared")["margin"]} | load("claims")


def main() -> None:
    """Print the verdicts, or leave with status 2 and one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m analysis.verdicts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scale", nargs="?", default="smoke", help="of the runs, for example small")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where committed results are")
    given = parser.parse_args()
    claims = read_claims()
    try:
        verdicts = judge(claims, lambda sweep: runs_of(sweep, given.scale, given.runs, given.results))
    except (ValueError, KeyError, OSError) as error:
        parser.exit(2, f"analysis.verdicts: {error}\n")
    print(printed(verdicts, given.scale, claims["level"]))


if __name__ == "__main__":
    main()
