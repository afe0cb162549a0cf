"""A top-1 expert FFN, forward and backward, beside the dense FFN of equal FLOPs: python -m benchmarks.layer [--size 1]

Sizes 1, 2, 3 are an H200's (T 65,536, d 1,024, F 4,096, E 64; T 65,536, d 512, F 2,048, E 128; T 8,192, d 512, F 2,048,
E 64), tiny a CPU's. --curve T or E changes one of them and draws time over dense. Expert ids are given; each way is
checked against float32 first, and one that is not installed or does not run is in the table with the reason.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.ffns import Problem, Way, error_of, gradients, liger_experts, reference, transformers_experts
from benchmarks.timing import (
    GRAPH,
    Row,
    command,
    device_of,
    in_milliseconds,
    interleaved,
    measured,
    parser,
    report_curve,
    saved_bytes,
)
from routers.routing import make_plan

SIZES = {"1": (65536, 1024, 4096, 64), "2": (65536, 512, 2048, 128), "3": (8192, 512, 2048, 64)}
SIZES["tiny"] = (256, 32, 64, 4)
CURVES = {"T": [2**n for n in range(10, 19)], "E": [2**n for n in range(9)]}
TINY_CURVES = {"T": [64, 256], "E": [1, 4]}
DENSE, OURS = "dense", "ours, plan ahead"


def main(words: list[str] | None = None) -> None:
    args = options(words)
    device = device_of(args.device)
    size = args.size or ("1" if device.type == "cuda" else "tiny")
    curve = (TINY_CURVES if size == "tiny" else CURVES).get(args.curve, [None])
    if device.type == "cpu" and size != "tiny":
        print(f"--size {size} is a GPU's: without one it takes hours, and much memory; --size tiny seconds", flush=True)
    rows = []
    for value in curve:
        sizes = dict(zip("TDFE", SIZES[size])) | ({args.curve: value} if value else {})
        rows += [sizes | row for row in one_size(sizes, args, device)]
    report_curve(f"layer-{size}-{args.activation}", rows, args, device, y="x dense", label="way")


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__)
    made.add_argument("--size", choices=SIZES, help="default: 1 on a GPU, else tiny")
    made.add_argument("--activation", default="relu", choices=("relu", "gelu", "swiglu"))
    made.add_argument("--curve", choices=CURVES, help="time against T or E")
    made.add_argument("--no-loop", action="store_true", help="leave the loop over experts out, the slowest")
    return made.parse_args(words)


def one_size(sizes: dict[str, int], args: Namespace, device: torch.device) -> list[Row]:
    """A row for each way, all timed in turn."""
    torch.compiler.reset()
    problem = Problem(sizes["T"], sizes["D"], sizes["F"], sizes["E"], args.activation, device)
    wanted = {dense: reference(problem, dense) for dense in (True, False)}
    made, errors, absent, steps = {}, {}, {}, {}
    for name, make in ways(problem, args).items():
        try:
            made[name] = make()
            steps[name] = partial(gradients, problem, made[name])
            errors[name] = error_of(problem, made[name], steps[name](), wanted[name == DENSE])
        except (ImportError, ValueError, RuntimeError, TypeError, AttributeError) as reason:
            if name in (DENSE, OURS):
                raise
            steps.pop(name, None)
            absent[name] = f"not run: {type(reason).__name__}: {str(reason).splitlines()[0][:60]}"
    if device.type == "cuda":  # without launches, which dominate small sizes
        for name in [name for name in steps if name == DENSE or name.endswith("plan ahead")]:
            replay, found = recorded(steps[name])
            replay()
            errors[name + GRAPH] = error_of(problem, made[name], found, wanted[name == DENSE])
            steps[name + GRAPH] = replay
    steps["making the plan"] = lambda: make_plan(problem.routing.expert, sizes["E"])
    inner = max(1, min(20, int(0.1 / measured(steps[DENSE], device, 5))))
    seconds = interleaved(steps, device, args.rounds, inner=inner)
    memory = {name: kept_bytes(problem, ways(problem, args)[name]()) for name in (DENSE, OURS)}
    rows = []
    for name, each in seconds.items():
        row: Row = {"way": name} | in_milliseconds(each)
        if name in errors:
            floor = in_milliseconds(seconds[DENSE + GRAPH * name.endswith(GRAPH)])["ms"]  # like over like
            row |= {"x dense": row["ms"] / floor, "TFLOP/s": problem.flops / row["ms"] / 1e9, "error": errors[name]}
        row |= {"path": problem.path} if name.startswith("ours") else {}
        rows.append(row | ({"kept MB": memory[name] / 1e6} if name in memory else {}))
    return rows + [{"way": name, "note": reason} for name, reason in absent.items()]


def recorded(step: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """What replays a step that has run once already, and where it leaves its results."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph.replay, found


def kept_bytes(problem: Problem, way: Way) -> int:
    """What the forward pass keeps for the backward pass, besides x, the parameters and what is made with the batch."""
    made = [problem.routing.token, problem.routing.expert, problem.routing.weight, *problem.plan]
    return saved_bytes(lambda: way.forward(problem.x), [problem.x, *way.parameters, *made])


def ways(problem: Problem, args: Namespace) -> dict[str, Callable[[], Way]]:
    """Name -> what makes it. On a GPU the floor and ours are compiled, as in a run."""
    compiled = torch.compile if problem.device.type == "cuda" else lambda f: f
    parameters = list(problem.experts.parameters())
    another = "grouped_mm" if problem.path == "fused" else "fused"

    def ahead(x: Tensor) -> Tensor:
        return problem.ours(x, problem.plan)

    def in_step(x: Tensor) -> Tensor:
        return problem.ours(x, None)

    def other(x: Tensor) -> Tensor:
        return problem.ours(x, problem.plan, another)

    found = {
        DENSE: lambda: Way(compiled(problem.dense), list(problem.floor.parameters())),
        OURS: lambda: Way(compiled(ahead), parameters),
        "ours, plan ahead, eager": lambda: Way(ahead, parameters),
        "ours, plan in the step": lambda: Way(compiled(in_step), parameters),
        f"{another}, plan ahead": lambda: Way(compiled(other), parameters),
        "grouped_mm, sorted in the step": lambda: Way(problem.grouped, parameters),
        "loop over experts": lambda: Way(problem.loop, parameters),
        "transformers, grouped_mm": lambda: transformers_experts(problem),
        "Liger": lambda: liger_experts(problem),
    }
    if problem.device.type == "cpu":  # where fused is plain torch
        del found[f"{another}, plan ahead"]
    if args.no_loop:
        del found["loop over experts"]
    return found


if __name__ == "__main__":
    command(main)
