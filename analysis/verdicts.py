"""`python -m analysis.verdicts [SCALE]`: the paper's twelve claims, and what the runs at that scale say of each.

Claims and their contrasts are declared in claims.yaml. A claim's p is twice the smaller of two: that of its parts taken
together (the largest, for all must hold) and that of the strongest speaking against it (times the number of parts).
Holm's correction is over all claims, also those that no runs are there for. What is past its bound by less than the
noise floor, the spread of the sweep noise_floor in the same metric, of as many runs as the figure is made of, counts
neither for nor against; where the floor is above the margin, that two arms are equal cannot be told.
"""

import argparse
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from analysis.arms import declared, grouping, load
from analysis.behind import origin, read
from analysis.claims import TIMES, line
from analysis.contrasts import Outcome, examine, figure
from analysis.runs import read_record, read_runs
from analysis.statistics import holm

REPEATS = "noise_floor"  # the sweep of one run repeated
FLOOR = """the noise floor: how far a figure may differ where the same runs are repeated (sweeps=noise_floor, 95 %).
(below noise floor): a figure is past its bound by less; (floor above margin): that two methods are
equal cannot be told"""
FIGURES = """[low, high]: the 95 % t-interval of that figure alone (of a range, of the arms found worst and best), by
the scatter that its line names; those of tables hold for all at once. p for it, against it: one-sided, of what the part
expects and of its opposite (of a range by Tukey's test, and that all are within the margin), corrected for no other
part; 1 unless the figure is past its bound by the noise floor. A claim's p, before Holm's correction: twice its largest
p for it, or its smallest p against it times its parts if that is less"""
COLUMNS = ["id", "arm", "seed", "outcome"]


class Verdict(NamedTuple):
    claim: str
    says: str
    verdict: str  # supported, contradicted, not separated or not run; of these, what for in brackets
    p: float  # after Holm's correction
    parts: list[Outcome]


def judge(claims: dict[str, Any], runs: Callable[[str], pd.DataFrame]) -> list[Verdict]:
    """claims: what claims.yaml holds; runs(sweep): its runs, empty where there are none."""
    once = cache(runs)
    parts = {
        name: [_examined(part, once, claims["margin"]) for part in claim["parts"]]
        for name, claim in claims["claims"].items()
    }
    deciding = {
        name: [each for part, each in zip(claims["claims"][name]["parts"], outcomes) if part["expect"] != "told"]
        for name, outcomes in parts.items()
    }
    sides = [_sides(outcomes) for outcomes in deciding.values()]
    corrected = holm([min(1.0, 2 * min(both)) if not np.isnan(both).any() else np.nan for both in sides])
    judged = zip(parts.items(), sides, corrected)
    return [
        Verdict(
            name, claims["claims"][name]["says"], _verdict(deciding[name], both, p, claims["level"]), float(p), outcomes
        )
        for (name, outcomes), both, p in judged
    ]


def _examined(part: dict[str, Any], runs: Callable[[str], pd.DataFrame], margin: float) -> Outcome:
    """A sweep that cannot be read is that of this part alone."""
    try:
        repeats = runs(REPEATS)
    except (ValueError, KeyError, OSError):
        repeats = None
    try:
        own = runs(part["sweep"])
    except (ValueError, KeyError, OSError) as error:
        return Outcome(line(part), f"{part['sweep']} cannot be read: {type(error).__name__}: {error}")
    return examine(part, own, margin, repeats)


def _sides(outcomes: list[Outcome]) -> tuple[float, float]:
    """p for the claim and p against it; NaN where a part has none. What no figure could bear out has no p for it, but
    speaks against the claim as all do."""
    support = [1.0 if each.blind else each.p_for for each in outcomes]
    against = [each.p_against for each in outcomes]
    return float(np.max(support)), min(1.0, len(outcomes) * float(np.min(against)))


def _verdict(outcomes: list[Outcome], sides: tuple[float, float], p: float, level: float) -> str:
    if any(each.lacks for each in outcomes):
        return "not run" + (" (diverged)" if any(each.diverged for each in outcomes) else "")
    if not p < level:
        if any(each.blind for each in outcomes):
            return "not separated (floor above margin)"
        return "not separated" + (" (below noise floor)" if any(each.below_floor for each in outcomes) else "")
    return "supported" if sides[0] < sides[1] else "contradicted"


def runs_of(sweep: str, scale: str, runs: Path, results: Path) -> pd.DataFrame:
    """A row a run of a sweep at this scale, with its outcome, origin, the scale and where it was read: by the record
    among the run folders, or else results/<scale>/<sweep>/runs.csv. Empty if there is neither, ValueError if it is
    damaged.
    """
    record, committed = runs / "sweeps" / f"{sweep}.json", results / scale / sweep / "runs.csv"
    if record.exists() and (known := read_record(sweep, runs)).scale == scale:
        found, places = read_runs(known, runs, group=grouping(load("style"), declared(sweep)))
        origins = pd.DataFrame([origin(places[run].origin()) for run in found["id"]], index=found.index)
        return pd.concat([found, origins], axis="columns").assign(scale=scale, read=str(record))
    if committed.exists():
        return read(committed).assign(read=str(committed))
    return pd.DataFrame(columns=COLUMNS)


def printed(verdicts: list[Verdict], scale: str, level: float, margin: float) -> str:
    """The verdicts; each part that runs are there for, with its figure and these runs; what was not run; and what the
    words of the parts mean."""
    rows = [[each.claim, each.verdict, _number(each.p), each.says] for each in verdicts]
    lines = [
        f"The claims at scale {scale}; p is two-sided, Holm's over {len(verdicts)}; a verdict needs p < {level:g}",
        "",
    ]
    widths = [None, 19, None, 80]
    lines += [tabulate(rows, ["", "verdict", "p", "claim"], "simple", disable_numparse=True, maxcolwidths=widths), ""]
    for each in verdicts:
        found, absent = [part for part in each.parts if not part.unrun], _unrun([each])
        head = f"{each.claim} {each.verdict}" + (f", for want of {', '.join(absent)}" if absent else "")
        lines += [head] * bool(found) + [line for part in found for line in _part(part)]
    if unrun := _unrun(verdicts):
        asked = [f"{sweep} ({', '.join(claims)})" for sweep, claims in unrun.items()]
        lines += wrap(f"not run at scale {scale}: {', '.join(asked)}", 116, subsequent_indent="  ")
        lines.append(f"  python run.py -m sweeps=NAME scale={scale}")
    if any(not part.unrun for each in verdicts for part in each.parts):
        lines += wrap(FIGURES, 116, break_on_hyphens=False)
        lines += wrap(f"the margin: {margin:g} nats, within which two methods are called equivalent; {FLOOR}", 116)
    return "\n".join(lines)


def _unrun(verdicts: list[Verdict]) -> dict[str, list[str]]:
    """Each sweep that is not there, and the claims that ask for it."""
    claims: dict[str, list[str]] = {}
    for each in verdicts:
        for sweep in dict.fromkeys(part.unrun for part in each.parts if part.unrun):
            claims.setdefault(sweep, []).append(each.claim)
    return claims


def _part(part: Outcome) -> list[str]:
    said = part.lacks or part.told
    if part.estimate is not None:
        floor = "unknown" if np.isnan(part.floor) else f"{part.floor:.4f}" + " of the logarithm" * (part.unit == TIMES)
        told = "cannot be told, the noise floor is above the margin" if part.blind else _number(part.p_for)
        said = f"{figure(part.estimate, part.unit)} {part.unit}, n = {part.estimate.n}; "
        said += f"p for it: {told}, against it: {_number(part.p_against)}; noise floor {floor}"
    said += f"; {part.scatter}" if part.scatter else ""
    read = f"{part.read}: " if part.read else ""
    runs = _wrapped(read + " ".join(part.runs)) if part.runs else []
    left_out = _wrapped("not counted: " + ", ".join(part.left_out)) if part.left_out else []
    return [f"  {part.part}", *_wrapped(said), *runs, *left_out]


def _wrapped(text: str) -> list[str]:
    return wrap(text, 116, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _number(p: float) -> str:
    return "" if np.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def read_claims() -> dict[str, Any]:
    """claims.yaml, with the margin of equivalence that holds for all tables."""
    return {"margin": load("declared")["margin"]} | load("claims")


def main() -> None:
    """Print the verdicts, or leave with status 2 and one line on stderr."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m analysis.verdicts", description=about, allow_abbrev=False)
    parser.add_argument("scale", nargs="?", default="smoke", help="of the runs, for example small")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders are")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where committed results are")
    given = parser.parse_args()
    claims = read_claims()
    known = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "scale").glob("*.yaml"))
    if given.scale not in known and not (given.results / given.scale).is_dir():
        parser.exit(2, f"analysis.verdicts: there is no scale {given.scale}; there are {', '.join(known)}\n")
    try:
        verdicts = judge(claims, lambda sweep: runs_of(sweep, given.scale, given.runs, given.results))
    except (ValueError, KeyError, OSError) as error:
        parser.exit(2, f"analysis.verdicts: {error}\n")
    print(printed(verdicts, given.scale, claims["level"], claims["margin"]))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    main()
