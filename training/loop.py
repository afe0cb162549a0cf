"""The training loop: forward and backward over the micro-batches, one update; now and then a line or a checkpoint."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batches import Batch, TrainingBatches
from data.mixed_batches import MixedBatches
from models.transformer import Transformer
from routers.routing import Plan, Router, Routing, load_metrics, load_of
from training.evaluation import Compute
from training.optimizer import learning_rate, step
from training.settings import Settings

Micro = tuple[Batch, dict[int, Plan]]


class Interrupted(Exception):
    """The run was asked to stop and has left a checkpoint, unless it was at step 0."""


class Diverged(Exception):
    """A loss or gradient was not finite at this step. No weight was changed by it."""

    def __init__(self, step: int):
        super().__init__(f"loss or gradient not finite at step {step}")
        self.step = step


@dataclass
class Progress:
    """What goes on from a checkpoint beside model and optimizer."""

    step: int = 0  # finished steps
    seconds: float = 0.0  # training alone, without evaluation and checkpoints
    clipped: int = 0  # steps whose gradient was clipped
    best_step: int | None = None  # of the best validation; this and the next two are of early stopping
    best_ce: float | None = None  # its cross-entropy in nats per token
    waited: int = 0  # validations since then


@dataclass
class Trainer:
    """The loop of one run. log, evaluate and checkpoint are called when they are due."""

    settings: Settings
    model: Transformer
    losses: Compute
    optimizer: torch.optim.AdamW
    batches: TrainingBatches | MixedBatches
    progress: Progress
    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[], None]
    checkpoint: Callable[[], None]
    stop: Sequence[int]  # filled by stop_requests

    def __post_init__(self) -> None:
        self.aside = torch.cuda.Stream() if self.device.type == "cuda" else None

    def train(self) -> None:
        """Train to the last step, or until validations no longer improve. The last step's checkpoint is left out where
        nothing of it would be kept.

        Raises Diverged, and Interrupted (after a checkpoint, but for step 0) once stop is filled.
        """
        options, record, progress = self.settings.train, self.settings.record, self.progress
        periods = record.log_every, record.evaluate_every, record.checkpoint_every
        clipped = torch.tensor(progress.clipped, device=self.device)
        alive = torch.tensor(True, device=self.device)  # all has been finite so far; if not, nothing moves any more
        died = torch.zeros((), dtype=torch.int64, device=self.device)  # the first step that was not
        with ThreadPoolExecutor(1) as ahead:
            if progress.step == 0:
                self.evaluate()
                if self.stop:
                    raise Interrupted
            clock, clock_step = time.perf_counter(), progress.step
            upcoming = ahead.submit(self.micro_batches, progress.step)
            while not self.ended():
                micros = self.taken(upcoming.result())
                upcoming = ahead.submit(self.micro_batches, progress.step + 1)
                ce, routings, real = self.forward_backward(micros)
                lr = learning_rate(progress.step, options)
                norm, finite = step(self.optimizer, lr, ce, options.grad_clip, alive)
                clipped += norm > (options.grad_clip or float("inf"))
                progress.step += 1
                self.after_step(routings)
                died = torch.where(alive & ~finite, progress.step, died)
                alive = alive & finite

                last = progress.step == options.steps
                log, evaluate, checkpoint = (last or (n > 0 and progress.step % n == 0) for n in periods)
                if not (log or evaluate or checkpoint or self.stop):
                    continue
                if not alive:  # the host waits for the device here alone
                    raise Diverged(int(died))
                seconds = time.perf_counter() - clock
                progress.seconds += seconds
                progress.clipped = int(clipped)
                if log:
                    rate = (progress.step - clock_step) * options.batch_size * self.batches.split.length / seconds
                    line = {"train/ce": float(ce), "lr": lr, "grad_norm": float(norm)}
                    line |= {"clipped": progress.clipped / progress.step, "tokens_per_second": rate}
                    self.log(line | self.route_metrics(routings, real))
                if evaluate:
                    self.evaluate()
                if self.stop or (self.keeps_last() if self.ended() else checkpoint):
                    self.checkpoint()
                if self.stop and not self.ended():
                    raise Interrupted
                clock, clock_step = time.perf_counter(), progress.step

    def ended(self) -> bool:
        """All steps are done, or train.patience is at its end."""
        train, progress = self.settings.train, self.progress
        return progress.step >= train.steps or (train.patience is not None and progress.waited >= train.patience)

    def keeps_last(self) -> bool:
        """A finished run keeps its weights; with train.patience the evaluation of the best ones can be gone on with."""
        record = self.settings.record
        return record.keep_weights or record.keep_optimizer or self.settings.train.patience is not None

    def after_step(self, routings: dict[int, Routing]) -> None:
        """Tells the routers their loads, unless they are frozen."""
        if self.settings.train.update == "all_but_sparse":
            return
        share = self.progress.step / self.settings.train.steps
        for layer, router in self.model.routers.items():
            if type(router).after_step is not Router.after_step:  # else nobody asks for the load
                router.after_step(load_of(routings[layer], self.model.num_experts), share)

    def micro_batches(self, step: int) -> list[Micro]:
        """The step's batch in micro-batches with their plans, made ahead in a thread and on a stream of their own."""
        if self.aside is None:
            return self._micro_batches(step)
        with torch.cuda.stream(self.aside):
            return self._micro_batches(step)

    def taken(self, micros: list[Micro]) -> list[Micro]:
        """Micro-batches for the training stream, which waits until they are made, and frees their memory after use."""
        if self.aside is not None:
            stream = torch.cuda.current_stream()
            stream.wait_stream(self.aside)  # the next batch is not begun yet
            for batch, plans in micros:
                batch.apply(lambda tensor: tensor.record_stream(stream) or tensor)
                for tensor in (tensor for plan in plans.values() for tensor in plan):
                    tensor.record_stream(stream)
        return micros

    def _micro_batches(self, step: int) -> list[Micro]:
        batch, size = self.batches.batch(step), self.settings.train.micro_batch or self.settings.train.batch_size
        firsts = range(0, len(batch.target), size)
        parts = [batch.apply(lambda tensor, first=first: tensor[first : first + size]) for first in firsts]
        return [self.model.prepare(part.to(self.device)) for part in parts]

    def forward_backward(self, micros: list[Micro]) -> tuple[Tensor, dict[int, Routing], Tensor]:
        """Gradients of the step's mean loss. Returns its cross-entropy () and routings over the whole batch, and which
        tokens are real (B, S)."""
        count = (
            torch.stack([batch.counted.sum() for batch, _ in micros]).sum().clamp(min=1)
        )  # a step may be all context
        ce, routings = torch.zeros((), device=self.device), []
        for batch, plans in micros:
            each, routed, aux_loss = self.losses(batch, plans)
            part = each.sum() / count
            (part + aux_loss / len(micros)).backward()
            ce += part.detach()
            routings.append(routed)
        real = torch.cat([batch.routed(self.model.in_encoder).real for batch, _ in micros])
        tokens = real.numel() // len(micros)
        return ce, {layer: joined([r[layer] for r in routings], tokens) for layer in routings[0]}, real

    def route_metrics(self, routings: dict[int, Routing], real: Tensor) -> dict[str, float]:
        """route/<layer>/<metric> for every sparse layer."""
        metrics = {layer: load_metrics(r, real, self.model.num_experts) for layer, r in routings.items()}
        return {f"route/{layer}/{name}": float(v) for layer, values in metrics.items() for name, v in values.items()}

    @property
    def device(self) -> torch.device:
        return self.model.embedding.device


def joined(routings: list[Routing], num_tokens: int) -> Routing:
    """The routing of a step from its micro-batches' of num_tokens each, detached. aux_loss and report: means."""

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value.detach().double() for value in values]).mean()

    return Routing(
        torch.cat([r.token + i * num_tokens for i, r in enumerate(routings)]),
        torch.cat([r.expert for r in routings]),
        torch.cat([r.weight.detach() for r in routings]),
        mean([r.aux_loss for r in routings]),
        {name: mean([r.report[name] for r in routings]) for name in routings[0].report},
        routings[0].fan_out,
    )


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM or SIGINT fills, so that the step in hand is finished; a second SIGINT stops at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
