"""Whether the paths of dispatch train the same model: python -m benchmarks.agree [--scale small] [OVERRIDES]

Runs of run.py's queue: balanced hash --repeats times by each path; then each of --arms plainly, and twice with
deterministic=true. Of a path the mean of its training losses less that of auto's, and as much of the validation loss
after the last step: exit status 1 if that is above TOLERANCE, or if two deterministic runs have not the same bits. How
far single runs of one path lie apart is the measure of what rounding in another order does.
"""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import yaml

from benchmarks.timing import Row, command, count, device_of, names, parser, report, with_overrides
from training.provenance import ROOT

PATHS = ("auto", "grouped_mm", "loop")
TOLERANCE = 0.02  # nats, of means of three: twice what two runs of one path, apart by 0.010 on average, leave to chance


def main(words: list[str] | None = None) -> None:
    args = options(words)
    device = device_of(args.device)
    scale = args.scale or ("small" if device.type == "cuda" else "smoke")
    record = [f"train.steps={args.steps}", "record.log_every=10", f"record.evaluate_every={args.steps}"]
    record += ["record.keep_weights=true", "record.validation_windows=64", "record.checkpoint_every=0"]
    common = [f"scale={scale}", f"device={device.type}", "wandb.mode=disabled", *record, *args.overrides]
    with tempfile.TemporaryDirectory() as folder:
        plain = [
            "router=hash_balanced",
            f"model.dispatch={','.join(PATHS)}",
            f"repeat={','.join(map(str, range(args.repeats)))}",
            "arm=${model.dispatch}_${repeat}",
        ]
        by_path = grouped(trained(Path(folder) / "paths", [*plain, *common]), "model", "dispatch")
        arms = f"router={','.join(args.arms)}"
        two = [arms, "deterministic=true", "repeat=0,1", "arm=${hydra:runtime.choices.router}_${repeat}"]
        twice = grouped(trained(Path(folder) / "twice", [*two, *common]), "space")
        once = grouped(trained(Path(folder) / "once", [arms, *common]), "space")
        rows = [scatter(path, runs) for path, runs in by_path.items() if args.repeats > 1]
        rows += [compared(path, by_path[path], by_path["auto"]) for path in PATHS[1:]]
        rows += [repeated(arm, runs, once[arm][0]) for arm, runs in twice.items()]
        losses = {f"{path}, {n}": dict(curve(run)) for path, runs in by_path.items() for n, run in enumerate(runs)}
    report("agree", rows, args, device, tolerance=TOLERANCE, losses=losses)
    if off := [row["runs"] for row in rows if row["agrees"] is False]:
        print(f"not the same: {', '.join(off)}", file=sys.stderr)
        sys.exit(1)


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__, rounds=False)
    made.add_argument("--scale", help="default: small on a GPU, else smoke")
    made.add_argument(
        "--arms", type=names, default=("hash_balanced", "switch", "base"), help="to train twice, deterministically"
    )
    made.add_argument("--repeats", type=count, default=3, help="runs of each path")
    made.add_argument("--steps", type=count, default=200)
    return with_overrides(made, words)


def trained(runs: Path, words: list[str]) -> list[Path]:
    """The folders of the sweep's runs; their weights go once they have a digest. Exits as run.py does."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), "-m", *words, f"runs={runs}"], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    for weights in runs.glob("*/checkpoints/*/model.safetensors"):
        weights.unlink()
    return sorted(result.parent for result in runs.glob("*/result.json"))


def grouped(runs: list[Path], *keys: str) -> dict[str, list[Path]]:
    """Runs by what their config has under these keys, one in the other."""
    found: dict[str, list[Path]] = {}
    for run in runs:
        value = yaml.safe_load((run / "config.yaml").read_text())
        for key in keys:
            value = value[key]
        found.setdefault(value, []).append(run)
    return found


def curve(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of each line that has one."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/ce"]) for line in lines if "train/ce" in line]


def mean_curve(runs: Sequence[Path]) -> np.ndarray:
    return np.mean([[loss for _, loss in curve(run)] for run in runs], axis=0)


def mean_of(key: str, runs: Sequence[Path]) -> float:
    return mean(json.loads((run / "result.json").read_text())[key] for run in runs)


def path_of(run: Path) -> str:
    return json.loads((run / "provenance.json").read_text())["dispatch"]


def digest(run: Path) -> str:
    """sha256 of the final weights."""
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    return json.loads(manifest.read_text())["model.safetensors"]


def apart(ours: Sequence[Path], others: Sequence[Path]) -> Row:
    """How far the mean curves and validation losses of two sets of runs lie apart."""
    distance = np.abs(mean_curve(ours) - mean_curve(others))
    validation = mean_of("val/ce", ours) - mean_of("val/ce", others)
    return {"mean, nats": float(distance.mean()), "largest": float(distance.max()), "validation": validation}


def scatter(path: str, runs: list[Path]) -> Row:
    """Of single runs of one path: means over all pairs, the largest of any."""
    pairs = [apart([one], [other]) for one, other in combinations(runs, 2)]
    found: dict[str, Any] = {"mean, nats": mean(pair["mean, nats"] for pair in pairs)}
    found |= {"largest": max(pair["largest"] for pair in pairs)}
    found |= {"validation": mean(abs(pair["validation"]) for pair in pairs)}
    rate = mean_of("tokens_per_second", runs)
    about = {"runs": f"{path}, one and another", "n": len(runs), "path": path_of(runs[0])}
    return about | found | {"tokens/s": rate, "of plain": None, "agrees": None}


def compared(path: str, runs: list[Path], auto: list[Path]) -> Row:
    found, rate = apart(runs, auto), mean_of("tokens_per_second", runs)
    within = max(found["mean, nats"], abs(found["validation"])) <= TOLERANCE
    about = {"runs": f"{path} and auto, means", "n": len(runs), "path": path_of(runs[0])}
    of_plain = rate / mean_of("tokens_per_second", auto)
    return about | found | {"tokens/s": rate, "of plain": of_plain, "agrees": within}


def repeated(arm: str, runs: list[Path], plain: Path) -> Row:
    """Two deterministic runs, and their speed over that of a plain one."""
    rate = mean_of("tokens_per_second", runs)
    about = {"runs": f"{arm}, deterministic, twice", "n": len(runs), "path": path_of(runs[0])}
    same = digest(runs[0]) == digest(runs[1])
    of_plain = rate / mean_of("tokens_per_second", [plain])
    return about | apart(runs[:1], runs[1:]) | {"tokens/s": rate, "of plain": of_plain, "agrees": same}


if __name__ == "__main__":
    command(main)
