"""Whether the paths of dispatch train the same model: python -m benchmarks.agree [--scale small] [OVERRIDES]

Runs of run.py, one after the other: balanced hash by each path, the first one twice; then each of --arms plainly, and
twice with deterministic=true. A row a pair: how far its training losses lie apart, in nats, whether its final weights
have the same bits, and which paths ran. Two runs of one path are the measure of what rounding in another order does.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.timing import Row, command, device_of, names, parser, report, with_overrides
from training.provenance import ROOT

PATHS = {"auto": [], "auto again": ["repeat=1"]}
PATHS |= {path: [f"model.dispatch={path}"] for path in ("grouped_mm", "loop")}


def main(words: list[str] | None = None) -> None:
    args = options(words)
    device = device_of(args.device)
    scale = args.scale or ("small" if device.type == "cuda" else "smoke")
    with tempfile.TemporaryDirectory() as folder:
        record = [f"train.steps={args.steps}", "record.log_every=10", f"record.evaluate_every={args.steps}"]
        record += ["record.keep_weights=true", "record.validation_windows=64", "record.checkpoint_every=0"]
        common = [f"scale={scale}", f"device={device.type}", "wandb.mode=disabled", *record, *args.overrides]
        found: dict[str, Path] = {}

        def make(name: str, words: list[str]) -> None:
            found[name] = train(Path(folder) / str(len(found)), [*words, *common])

        for name, words_of in PATHS.items():
            make(name, ["router=hash_balanced", *words_of])
        rows = [compared("auto", name, found) for name in found if name != "auto"]
        for arm in args.arms:
            twice = f"{arm}, deterministic", f"{arm}, deterministic, again"
            for repeat, name in enumerate(twice):
                make(name, [f"router={arm}", "deterministic=true", f"repeat={repeat}"])
            plain = "auto" if arm == "hash_balanced" else f"{arm}, plain"
            if plain not in found:
                make(plain, [f"router={arm}"])
            row = compared(*twice, found)
            rows.append(row | {"of plain": row["tokens/s"] / result_of(found[plain])["tokens_per_second"]})
        losses = {name: dict(curve(run)) for name, run in found.items()}
    report("agree", rows, args, device, losses=losses)


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__, rounds=False)
    made.add_argument("--scale", help="default: small on a GPU, else smoke")
    made.add_argument(
        "--arms", type=names, default=("hash_balanced", "switch", "base"), help="to train twice, deterministically"
    )
    made.add_argument("--steps", type=int, default=200)
    return with_overrides(made, words)


def train(runs: Path, words: list[str]) -> Path:
    """The folder of a run that is made here; its weights go once they have a digest. Exits as run.py does."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), *words, f"runs={runs}"], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    (result,) = runs.glob("*/result.json")
    for weights in result.parent.glob("checkpoints/*/model.safetensors"):
        weights.unlink()
    return result.parent


def curve(run: Path) -> list[tuple[int, float]]:
    """Step and training loss of each line that has one."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["train/ce"]) for line in lines if "train/ce" in line]


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def digest(run: Path) -> str:
    """sha256 of the final weights."""
    (manifest,) = run.glob("checkpoints/*/manifest.json")
    return json.loads(manifest.read_text())["model.safetensors"]


def compared(first: str, second: str, found: dict[str, Path]) -> Row:
    runs = found[first], found[second]
    apart = [abs(a - b) for (_, a), (_, b) in zip(*map(curve, runs), strict=True)]
    results = [result_of(run) for run in runs]
    paths = [json.loads((run / "provenance.json").read_text())["dispatch"] for run in runs]
    validation = abs(results[0]["val/ce"] - results[1]["val/ce"])
    row = {"run": first, "and": second, "mean, nats": statistics.mean(apart), "largest": max(apart)}
    row |= {"validation": validation, "same bits": digest(runs[0]) == digest(runs[1])}
    row |= {"tokens/s": results[0]["tokens_per_second"], "and its": results[1]["tokens_per_second"]}
    return row | {"paths": " and ".join(dict.fromkeys(paths))}


if __name__ == "__main__":
    command(main)
