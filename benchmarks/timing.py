"""Times side by side in one process: interleaved rounds, medians and quartiles, JSON with provenance, tables, plots."""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
from omegaconf.errors import OmegaConfBaseException
from tabulate import tabulate

from training.arguments import number
from training.provenance import GIT, ROOT, device_name
from training.targets import one_line
from training.threads import start_again_to_wait_briefly

LIBRARIES = ("torch", "triton", "transformers", "liger-kernel", "numpy", "scipy")
AXES = {"T": "tokens", "E": "experts", "x dense": "time over dense", "layers": "sparse layers"}
AXES |= {
    "length": "sequence length in tokens, at equal tokens a step",
    "over the first": "tokens/s over those of {first}",
}
SIZES = ("T", "D", "F", "E")
# Ways that have one colour in every figure, in the order of matplotlib's; others follow.
WAYS = ("ours, plan ahead", "ours, plan ahead, eager", "ours, plan in the step", "grouped_mm, plan ahead")
WAYS += ("grouped_mm, sorted in the step", "transformers, grouped_mm", "fused, plan ahead", "Liger")
GRAPH = ", CUDA graph"  # ends the name of a candidate that is replayed as one
Row = dict[str, Any]
count = number(int, 1)  # of an option


def parser(description: str | None, rounds: bool = True) -> argparse.ArgumentParser:
    """What every benchmark takes. rounds: it measures each of its candidates several times."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the GPU if there is one")
    if rounds:
        made.add_argument(
            "--rounds", type=count, default=20, help="times that each is measured, in turn with the others"
        )
    made.add_argument("--out", type=Path, help="where JSON and plots go; default: results/speed, or results/speed/cpu")
    return made


def with_overrides(made: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The options, and as overrides what is left of the words, key=value of run.py. Leaves with status 2 for others."""
    args, args.overrides = made.parse_known_args(words)
    if strange := [word for word in args.overrides if "=" not in word]:
        made.error(f"unknown: {' '.join(strange)}")
    return args


def names(text: str) -> list[str]:
    """Of an option a,b,c: words after it are overrides."""
    return text.split(",")


def numbers(text: str) -> list[int]:
    """Of an option a,b,c: whole numbers of at least 1."""
    return [count(each) for each in text.split(",")]


def command(main: Callable[[], None]) -> None:
    """Run a benchmark from the command line: what is wrong with its input is one line and exit status 2."""
    start_again_to_wait_briefly()
    try:
        main()
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def device_of(wanted: str) -> torch.device:
    """Raises ValueError for a GPU that is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda, but torch sees no GPU")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def folder_of(args: argparse.Namespace, device: torch.device) -> Path:
    """Where JSON and plots go: what a GPU gave is not written over by a machine without one."""
    speed = ROOT / "results" / "speed"
    return args.out or (speed if device.type == "cuda" else speed / "cpu")


def interleaved(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, warm_up: int = 3, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds of one call, `rounds` times each, in_turn; every measure is the mean of `inner` calls.

    On a GPU between events on its stream, else by the clock. The warm-up also compiles and tunes.
    """
    for run in candidates.values():
        for _ in range(warm_up):
            run()
    seconds = {name: [] for name in candidates}
    for name in in_turn(candidates, rounds):
        seconds[name].append(measured(candidates[name], device, inner) / inner)
    return seconds


def in_turn(candidates: Iterable[str], rounds: int) -> Iterator[str]:
    """Each of them so many times, every round in another order: none always follows the same one."""
    order, draws = list(candidates), random.Random(0)
    for _ in range(rounds):
        draws.shuffle(order)
        yield from order


def measured(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of so many calls in a row, the device idle before and after."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def in_milliseconds(seconds: Sequence[float]) -> Row:
    """median, low and high quartile."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"ms": 1e3 * median, "low": 1e3 * low, "high": 1e3 * high}


def saved_bytes(run: Callable[[], object], kept: Sequence[torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, besides `kept` (parameters, input)."""
    known, sizes = {tensor.untyped_storage().data_ptr() for tensor in kept}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def report(name: str, rows: list[Row], args: argparse.Namespace, device: torch.device, **more: Any) -> Path:
    """Print the rows as a table, without columns that are empty, and write them to <name>.json in folder_of, with where
    they come from."""
    known = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    print(tabulate([{key: row.get(key) for key in known} for row in rows], headers="keys", floatfmt=".4g"))
    options = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "out"
    }
    origin = {
        "command": ["python", "-m", f"benchmarks.{name.partition('-')[0]}", *sys.argv[1:]],
        "options": options,
        "commit": GIT["commit"],
        "dirty": GIT["dirty"],
        "python": platform.python_version(),
        "versions": {library: found for library in LIBRARIES if (found := installed(library))},
        "device": device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    path = folder_of(args, device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": origin, "rows": rows} | more, indent=1))
    print(f"written: {path}")
    return path


def report_curve(
    stem: str, rows: list[Row], args: argparse.Namespace, device: torch.device, y: str, label: str
) -> None:
    """report; with --curve also y over what it changes, a line for each label."""
    name = stem + (f"-over-{args.curve}" if args.curve else "")
    report(name, rows, args, device)
    if args.curve:
        path = folder_of(args, device) / f"{name}.png"
        plot(rows, args.curve, y, label, path, level=1, device=device_name(device))


def installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def plain(name: str) -> str:
    """Of a candidate, not as a CUDA graph."""
    return name.removesuffix(GRAPH)


def path_changes(rows: list[Row], x: str, label: str) -> list[tuple[tuple[float, str], ...]]:
    """(x, path) on both sides of each place where a label's rows change theirs, once for all labels."""
    own: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if row.get("path"):
            own.setdefault(row[label], []).append((row[x], row["path"]))
    pairs = (pair for points in own.values() for pair in pairwise(sorted(points)))
    return [*dict.fromkeys((one, other) for one, other in pairs if one[1] != other[1])]


def title_of(rows: list[Row], x: str, device: str) -> str:
    """The device, and the sizes that all rows have in common."""
    sizes = {size: {row.get(size) for row in rows} for size in SIZES if size != x}
    same = [f"{size} {values.pop():,}" for size, values in sizes.items() if len(values) == 1 and None not in values]
    return ", ".join(filter(None, [device, *same]))


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """A colour for each: of WAYS always the same one."""
    names = list(dict.fromkeys(map(plain, names)))
    known = [*WAYS, *(name for name in names if name not in WAYS)] if set(WAYS) & set(names) else names
    return {name: f"C{known.index(name)}" for name in names}


def plot(rows: list[Row], x: str, y: str, label: str, path: Path, level: float | None = None, device: str = "") -> None:
    """Lines of y over x, one for each label, dashed in the same colour as a CUDA graph; x is logarithmic, y where it
    spans a decade. level: a dotted line, in the place of what lies on it everywhere. Where the path that a label's rows
    name becomes another stands an upright line."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes, values, lines = figure.subplots(), [row[y] for row in rows if y in row], {}
    for row in rows:
        if y in row:
            lines.setdefault(row[label], []).append((row[x], row[y]))
    shown = {name: sorted(points) for name, points in lines.items() if {at for _, at in points} != {level}}
    colours = colours_of(shown)
    for name, points in shown.items():
        look = {"color": colours[plain(name)], "linestyle": "-" if name == plain(name) else "--", "label": name}
        axes.plot(*zip(*points), marker="o", markersize=3, linewidth=1.1, **look)
    if level is not None:
        axes.axhline(level, color="0.35", linewidth=0.7, linestyle=":")
    for (low, before), (high, after) in path_changes(rows, x, label):
        told = f"auto (ours): {before} left, {after} right"
        axes.axvline((low * high) ** 0.5, color="0.35", linewidth=0.9, linestyle="-.", label=told)
    axes.set_title(title_of(rows, x, device), fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set(xlabel=AXES.get(x, x), ylabel=AXES.get(y, y).format(first=rows[0][label]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row[x] for row in rows})))
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    print(f"written: {path}")
