"""A whole training step of the real model and loop, side by side: python -m benchmarks.step [--scale small] [OVERRIDES]

tokens/s and its ratio to the first arm, the share of peak, host syncs and graph breaks of a step, how much longer it
takes than one whose batch and plan lie ready, and of a solver the largest gap. An arm is a router, or router:dispatch.
Blocks of --block steps of each arm, in turn, once the losses and gradients of a step are seen to be those of the plain
loop. Overrides are run.py's; --curve layers or length changes the number of sparse layers or the sequence length (at
equal tokens a step) and draws tokens/s over the first arm's.
"""

import tempfile
import time
import warnings
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch._dynamo.utils import counters

from benchmarks.timing import (
    Row,
    command,
    count,
    device_of,
    in_milliseconds,
    in_turn,
    names,
    numbers,
    parser,
    report_curve,
    with_overrides,
)
from data.mixed_batches import training_batches
from models.feedforward import SparseFeedForward
from routers.routing import Router
from training.build import is_compiled, make_losses
from training.compose import composed
from training.job import open_run
from training.loop import Micro, Trainer
from training.optimizer import learning_rate, step
from training.preflight import read
from training.session import open_session

ARMS = ("dense", "hash_balanced", "switch", "base", "hash_balanced:grouped_mm", "hash_balanced:loop")
CURVES = ("layers", "length")
PEAK = 790e12  # an H200's 8192^3 bf16 product, FLOP/s
# Of gradients, by norm: where a choice is learned, rounding moves tokens that stand between two experts.
BOUNDS = {"by tokens alone": 2e-2, "learned": 0.1}


class Arm:
    """One arm's run in memory, stepped by the loop's own parts; batches are made ahead as there."""

    def __init__(self, name: str, overrides: list[str], runs: str):
        router, _, path = name.partition(":")
        words = [f"router={router}", f"runs={runs}", "wandb.mode=disabled", *overrides]
        settings = read(composed([*words, f"model.dispatch={path}"] if path else words))
        run = open_run(settings)
        run.folder.mkdir(parents=True, exist_ok=True)
        session = open_session(run)
        batches = training_batches(run.splits["train"], settings.train.batch_size, settings.seed)
        parts = session.model, session.losses, session.optimizer, batches, session.progress
        nothing = lambda *_: None  # noqa: E731
        self.name = name
        self.trainer = Trainer(settings, *parts, nothing, nothing, nothing, [])
        self.flops, self.settings, self.device = session.model.train_flops_per_token(), settings, session.device
        self.path = session.model.path if session.model.routers else None
        self.tokens = settings.train.batch_size * settings.data.sequence_length
        self.ahead = ThreadPoolExecutor(1)
        self.gaps: list[torch.Tensor] = []
        self.upcoming: Future[list[Micro]] = self.ahead.submit(self.trainer.micro_batches, 0)

    def step(self, again: bool = False) -> None:
        """again: with the batch and plans that lie ready, so that none are made."""
        trainer, options = self.trainer, self.settings.train
        micros = trainer.taken(self.upcoming.result())
        if not again:
            self.upcoming = self.ahead.submit(trainer.micro_batches, trainer.progress.step + 1)
        ce, routings, _ = trainer.forward_backward(micros)
        self.gaps += [r.report["assignment_gap"] for r in routings.values() if "assignment_gap" in r.report]
        step(trainer.optimizer, learning_rate(trainer.progress.step, options), ce, options.grad_clip)
        trainer.progress.step += 1
        trainer.after_step(routings)

    def check(self) -> float:
        """How far the gradients of the next step are, by norm, from those of the plain loop over experts without a
        compiler, in the same precision. Raises RuntimeError if that is over BOUNDS, or the loss more than 2e-2 off."""
        model = self.trainer.model
        sparse = [part for part in model.modules() if isinstance(part, SparseFeedForward)]
        loss, gradients = self.gradients()
        plainly = replace(self.settings, train=replace(self.settings.train, compile=False))
        kept, self.trainer.losses = self.trainer.losses, make_losses(plainly, model, self.device)
        for part in sparse:
            part.path = "loop"
        exact_loss, exact = self.gradients()
        for part in sparse:
            part.path = model.path
        self.trainer.losses = kept
        if not abs(loss - exact_loss) <= 2e-2 * exact_loss:
            raise RuntimeError(f"router={self.name}: the loss is {loss:.4g}, that of the loop {exact_loss:.4g}")
        apart = float((gradients - exact).norm() / exact.norm())
        by_tokens = all(type(router).plan is not Router.plan for router in model.routers.values())
        bound = BOUNDS["by tokens alone" if by_tokens else "learned"]
        if not apart <= bound:
            rule = f"by norm, and may be {bound}"
            raise RuntimeError(f"router={self.name}: gradients are {apart:.2g} off those of the loop, {rule}")
        return apart

    def gradients(self) -> tuple[float, torch.Tensor]:
        """Loss and all gradients, in a row, of the step that lies ready, which is not taken."""
        loss = self.trainer.forward_backward(self.trainer.taken(self.upcoming.result()))[0]
        found = [p.grad.flatten().float() for p in self.trainer.model.parameters() if p.grad is not None]
        self.trainer.model.zero_grad(set_to_none=True)
        return float(loss), torch.cat(found)

    def seconds(self, steps: int, again: bool = False) -> float:
        """Of one step, over so many."""
        wait(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step(again)
        wait(self.device)
        return (time.perf_counter() - began) / steps

    def syncs(self) -> int | None:
        """Times that the host waited for the device in a step; None without a GPU."""
        if self.device.type != "cuda":
            return None
        wait(self.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(words: list[str] | None = None) -> None:
    args = options(words)
    device = device_of(args.device)
    scale = args.scale or ("small" if device.type == "cuda" else "smoke")
    words = [f"scale={scale}", f"device={device.type}", *args.overrides]
    rows = []
    with tempfile.TemporaryDirectory() as runs:
        for about, more in points(args, words):
            rows += [about | row for row in side_by_side(args, words + more, runs)]
    report_curve(f"step-{scale}", rows, args, device, y="over the first", label="arm")


def options(words: list[str] | None) -> Namespace:
    made = parser(__doc__)
    made.add_argument("--scale", help="default: small on a GPU, else smoke")
    made.add_argument("--arms", type=names, default=ARMS, help="names with commas between")
    made.add_argument("--block", type=count, default=10, help="steps of an arm in a row")
    made.add_argument("--curve", choices=CURVES)
    made.add_argument("--values", type=numbers, help="of the curve; default: 1,2,4,8 as far as there are; 128 to 2048")
    return with_overrides(made, words)


def points(args: Namespace, words: list[str]) -> list[tuple[Row, list[str]]]:
    """What each point of the curve is called, and what it overrides."""
    if args.curve is None:
        return [({}, [])]
    settings = read(composed([*words, "router=dense", "wandb.mode=disabled"]))
    if args.curve == "layers":
        layers = settings.model.scaled().num_layers
        values = args.values or [n for n in (1, 2, 4, 8, 16) if n <= layers]
        if max(values) > layers:
            raise ValueError(f"--values of --curve layers must be at most model.num_layers = {layers}; got {values}")
        spread = {n: [layers * (2 * i + 1) // (2 * n) for i in range(n)] for n in values}
        return [({"layers": n}, [f"model.sparse_layers=[{','.join(map(str, spread[n]))}]"]) for n in values]
    tokens = settings.train.batch_size * settings.data.sequence_length
    found = []
    for length in args.values or [128, 256, 512, 1024, 2048]:
        rows = max(1, tokens // length)
        words = [f"data.sequence_length={length}", f"train.batch_size={rows}", f"train.routing_group={rows}"]
        found.append(({"length": length}, words))
    return found


def side_by_side(args: Namespace, words: list[str], runs: str) -> list[Row]:
    """A row for each arm, timed in turn after three steps of warm-up each."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # every arm compiles the same function for a model of its own
    arms, breaks, apart, began = {}, {}, {}, time.perf_counter()
    for name in args.arms:
        before = sum(counters["graph_break"].values())
        arms[name] = Arm(name, words, runs)
        for _ in range(3):
            arms[name].step()
        breaks[name] = sum(counters["graph_break"].values()) - before
        apart[name] = arms[name].check()
        print(f"{name}: ready, and checked after {time.perf_counter() - began:.0f} s", flush=True)
    syncs, seconds = {name: arm.syncs() for name, arm in arms.items()}, {name: [] for name in arms}
    again = {name: [] for name in arms}
    print(f"timing {2 * args.rounds} blocks of {args.block} steps of each", flush=True)
    for name in in_turn(arms, args.rounds):
        seconds[name].append(arms[name].seconds(args.block))
        again[name].append(arms[name].seconds(args.block, again=True))
    rows, first = [], None
    for name, arm in arms.items():
        row = {"arm": name} | in_milliseconds(seconds[name])
        rate = arm.tokens / row["ms"] * 1e3
        first = first or rate
        share = rate * arm.flops / PEAK if arm.device.type == "cuda" else None
        row |= {"tokens/s": rate, "over the first": rate / first, "share of 790 TFLOP/s": share, "syncs": syncs[name]}
        row["ms for batch and plan"] = row["ms"] - in_milliseconds(again[name])["ms"]
        compiled = is_compiled(arm.settings, arm.trainer.model, arm.device)
        row |= {"graph breaks": breaks[name] if compiled else None}
        row |= {"gap": max(map(float, arm.gaps), default=None), "gradients off": apart[name]}
        rows.append(row | {"path": arm.path})
        arm.ahead.shutdown()
    return rows


if __name__ == "__main__":
    command(main)
