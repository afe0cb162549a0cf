"""Balanced assignment: time and certified gap of the fast and the exact solver: python -m benchmarks.assignment

Over kinds of scores, --tokens and --experts; --run adds the hidden states of a run folder. The exact solver, which
takes up to seconds a call, runs up to --exact tokens, three times at most. Loads are checked before anything is timed.
The plot is of the slowest kind.
"""

from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.scores import KINDS, drawn, of_a_run, routed_run
from benchmarks.timing import (
    Row,
    command,
    count,
    device_of,
    folder_of,
    in_milliseconds,
    interleaved,
    parser,
    plot,
    report,
)
from routers.assignment import balanced_assignment
from routers.fast_assignment import replayed_assignment
from training.provenance import device_name

TIME = "ms, of the slowest kind of scores"


def main(words: list[str] | None = None) -> None:
    args = options(words)
    device = device_of(args.device)
    run, rows = routed_run(args.run) if args.run else None, []
    for tokens in args.tokens:
        for experts in args.experts:
            scores = {kind: drawn(kind, tokens, experts) for kind in args.kinds}
            if run:
                scores["of a run"] = of_a_run(run, tokens, experts)
            for kind, each in scores.items():
                rows += one_kind(kind, each.to(device), args, device)
    report("assignment", rows, args, device)
    if len(args.tokens) > 1:
        draw(rows, folder_of(args, device) / "assignment.png", device_name(device))


def draw(rows: list[Row], path: Path, device: str) -> None:
    """The slowest kind's time over tokens, a line for each solver and number of experts."""
    slowest: dict[tuple[str, int, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["ms"]):
        which = {"which": f"BASE's {row['solver']} solver, {row['E']} experts", TIME: row["ms"]}
        slowest[row["solver"], row["E"], row["T"]] = row | which
    plot([slowest[key] for key in sorted(slowest)], "T", TIME, "which", path, device=device)


def options(words: list[str] | None) -> Namespace:
    on_gpu = torch.cuda.is_available()
    made = parser(__doc__)
    made.add_argument("--tokens", type=count, nargs="+", default=[4096, 8192, 16384, 32768] if on_gpu else [4096])
    made.add_argument("--experts", type=count, nargs="+", default=[16, 64, 128] if on_gpu else [16])
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help=", ".join(KINDS))
    made.add_argument("--exact", type=int, default=4096, help="most tokens for the exact solver, which is slow")
    made.add_argument("--run", type=Path, help="a run folder: also on what its first sparse layer reads")
    return made.parse_args(words)


def one_kind(kind: str, scores: Tensor, args: Namespace, device: torch.device) -> list[Row]:
    """scores (1, T, E) -> a row for each solver. Raises RuntimeError if loads are not even."""
    _, tokens, experts = scores.shape
    real = torch.ones(1, tokens, dtype=torch.bool, device=device)
    expert, gap = replayed_assignment(scores, real)
    load = torch.bincount(expert[0], minlength=experts)
    if int(load.max() - load.min()) > (tokens % experts > 0):
        raise RuntimeError(f"{kind}, T {tokens}, E {experts}: loads from {int(load.min())} to {int(load.max())}")
    gaps, fast = {"fast": float(gap)}, lambda: replayed_assignment(scores, real)
    seconds = interleaved({"fast": fast}, device, args.rounds, warm_up=1)
    if tokens <= args.exact:
        gaps["exact"] = balanced_assignment(scores[0]).gap
        exact = {"exact": lambda: balanced_assignment(scores[0])}
        seconds |= interleaved(exact, device, min(args.rounds, 3), warm_up=0)
    rows = [{"kind": kind, "T": tokens, "E": experts, "solver": name, "gap": gap} for name, gap in gaps.items()]
    rows = [row | in_milliseconds(seconds[row["solver"]]) for row in rows]
    return [row | ({"over exact": row["ms"] / rows[-1]["ms"]} if "exact" in gaps else {}) for row in rows]


if __name__ == "__main__":
    command(main)
