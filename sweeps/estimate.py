"""What a run will cost: counted on the meta device, and its time and memory estimated.

T tokens of a micro-batch, L layers, V vocabulary
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from training.build import choose_device, make_dictionary, outline, precision
from training.provenance import device_name
from training.run import Run
from training.settings import Settings

# Where no run of the scale has finished: FLOPs a second, and seconds to start, compile and evaluate. Of an H200 some
# three quarters of what scale=small reaches there (LOG.md), of a CPU what scale=smoke reaches on two cores.
ASSUMED = {"cuda": (2.5e14, 60.0), "cpu": (8e10, 10.0)}


class Cost(NamedTuple):
    active: int  # parameters
    total: int
    flops: int  # matrix products of a training token
    tokens: int | None  # of training; None of epochs of a text that is not prepared
    memory: float  # bytes, estimated


def cost(settings: Settings, run: Run | None) -> Cost:
    """Raises ValueError as the model's parts do. run: None while the data is not prepared; then a dictionary of words
    counts as one of 65,536 entries."""
    vocab_size = run.prepared.vocab_size if run else make_dictionary(settings.tokenizer).size() or 65_536
    data, train, sizes = settings.data, settings.train, settings.model.scaled()
    source = (data.source_length or data.sequence_length // 2) if settings.model.encoder_layers else None
    model = outline(settings, vocab_size, source)
    counts = model.parameter_counts()
    each = 2 if precision(settings, choose_device(settings)) == "bf16" else 4  # bytes of an activation
    rows = (train.micro_batch or train.batch_size) * data.sequence_length
    # weights, gradients and two moments; per layer what attention and FFN keep for the backward pass; logits twice.
    # Within a tenth of the 6.2 GB and 8.0 GB that dense and hash took at scale=small on an H200 (LOG.md).
    layers = sizes.num_layers + sizes.encoder_layers
    memory = 16 * counts["total"] + rows * (layers * each * (6 * sizes.d_model + 2 * sizes.d_ff) + 8 * vocab_size)
    known = run is not None or train.epochs is None  # opening a run turns epochs into steps
    tokens = train.steps * train.batch_size * data.sequence_length if known else None
    return Cost(counts["active"], counts["total"], model.train_flops_per_token(), tokens, memory)


@dataclass
class Pace:
    """Seconds of runs to come, from those that have finished in a folder: of a run on a CPU those on one like this, of
    one on a GPU all others."""

    runs: Path
    seen: dict[tuple[str, str | None, bool], list[tuple[float, float]]] = field(default_factory=dict)  # FLOPs, seconds

    def __post_init__(self) -> None:
        cpu = device_name(torch.device("cpu"))
        for path in self.runs.expanduser().glob("*/result.json"):
            result = json.loads(path.read_text())
            if result.get("outcome") != "finished" or not (path.parent / "config.yaml").exists():
                continue
            config = yaml.safe_load((path.parent / "config.yaml").read_text())
            origin = path.parent / "provenance.json"
            device = json.loads(origin.read_text()).get("device") if origin.exists() else ""
            kind = config["scale"], config["router"]["_target_"], device == cpu
            flops = result["train_flops_per_token"] * result["tokens"]
            self.seen.setdefault(kind, []).append((flops, result["seconds"]))

    def seconds(self, settings: Settings, cost: Cost) -> tuple[float | None, str]:
        """And on what they rest: runs of this scale and router, of this scale, or nothing but ASSUMED."""
        if cost.tokens is None:
            return None, ""
        scale, router = settings.scale, settings.router["_target_"]
        here = choose_device(settings).type == "cpu"
        alike = self.seen.get((scale, router, here))
        of_scale = [each for (name, _, cpu), runs in self.seen.items() if (name, cpu) == (scale, here) for each in runs]
        flops = cost.flops * cost.tokens
        if known := alike or of_scale:
            rate = sum(seconds for _, seconds in known) / sum(flops for flops, _ in known)
            return rate * flops, "finished runs of the router" if alike else "finished runs of the scale"
        speed, fixed = ASSUMED[choose_device(settings).type]
        return fixed + flops / speed, "an assumed speed"
