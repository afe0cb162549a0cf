"""What a sweep of short jobs spends on anything but training: python -m benchmarks.sweep [--scale small] [OVERRIDES]

Four methods with three seeds each, by run.py's own queue, into a folder of their own. Training is counted as tokens
over the median of the logged rates, so that compiling a step is no training (compiling an evaluation is evaluating);
from one job's result to the next is its time, which is told where one job runs after the other. With
hydra.launcher.jobs_per_gpu=2, or on several GPUs, only what each job took and what all together did.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch

from benchmarks.timing import Row, command, count, device_of, names, parser, report, with_overrides
from training.provenance import ROOT

SLOTS = ("jobs_per_gpu", "cpu_slots")


def main(words: list[str] | None = None) -> None:
    args = options(words)
    device = device_of(args.device)
    scale = args.scale or ("small" if device.type == "cuda" else "smoke")
    with tempfile.TemporaryDirectory() as runs:
        jobs = [f"router={','.join(args.arms)}", f"seed={','.join(map(str, range(args.seeds)))}"]
        chosen = [f"scale={scale}", f"device={device.type}", "hydra.launcher.cpu_slots=1", "wandb.mode=disabled"]
        chosen += [*args.overrides, f"runs={runs}"]
        began = time.time()
        done = subprocess.run([sys.executable, str(ROOT / "run.py"), "-m", *jobs, *chosen], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        seconds, rows = time.time() - began, jobs_of(Path(runs), began, alone(args.overrides, device))
    rest = [row["in the job, s"] for row in rows if row["of its kind"] > 1]
    print(
        f"all jobs: {seconds:.1f} s; in a job but not training, median after the first of a kind: {median(rest):.2f} s"
    )
    report("sweep", rows, args, device, seconds=seconds)


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__, rounds=False)
    made.add_argument("--scale", help="default: small on a GPU, else smoke")
    made.add_argument("--arms", type=names, default=("dense", "hash_balanced", "switch", "base"))
    made.add_argument("--seeds", type=count, default=3, help="at least 2: the first job of a kind compiles")
    args = with_overrides(made, words)
    if args.seeds < 2:
        made.error(f"--seeds must be at least 2, as the first job of a kind is apart; got {args.seeds}")
    return args


def alone(overrides: list[str], device: torch.device) -> bool:
    """Whether the queue runs one job after the other."""
    at_once = {key: value for key, _, value in (word.partition("=") for word in overrides) if key.endswith(SLOTS)}
    one = {slot: at_once.get(f"hydra.launcher.{slot}", "1") == "1" for slot in SLOTS}
    return one["jobs_per_gpu"] and torch.cuda.device_count() == 1 if device.type == "cuda" else one["cpu_slots"]


def jobs_of(runs: Path, began: float, one_by_one: bool) -> list[Row]:
    """A row for each finished job in the order in which they finished; the first also starts the queue."""
    finished = sorted(runs.glob("*/result.json"), key=lambda path: path.stat().st_mtime)
    rows, before, seen = [], began, {}
    for path in finished:
        result, arm = json.loads(path.read_text()), path.parent.name.rsplit("-s", 1)[0]
        seen[arm] = seen.get(arm, 0) + 1
        whole, before = path.stat().st_mtime - before, path.stat().st_mtime
        training = result["tokens"] / result["tokens_per_second"]
        row = {"arm": arm, "of its kind": seen[arm], "training, s": training}
        row |= {"whole, s": whole, "not training, s": whole - training} if one_by_one else {}
        parts = {"compiling its steps, s": max(0.0, result["train_seconds"] - training)}
        parts |= {"evaluating, s": result["evaluate_seconds"]}
        parts["start and finish, s"] = max(0.0, result["seconds"] - training - sum(parts.values()))
        rows.append(row | {"in the job, s": result["seconds"] - training} | parts)
    return rows


if __name__ == "__main__":
    command(main)
