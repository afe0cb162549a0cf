"""The resolved configuration as typed values with their rules, and a run's id. Defaults live in conf/ alone."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf

from data import corpora
from models.settings import ModelSettings


def dense_ff_factor(experts: int, sparse: list[int], layers: int, encoders: int, d_ff: int) -> float:
    """F' / F of L F' = (n_sparse E + L - n_sparse) F, F' the nearest multiple of 8."""
    return round(d_ff * (1 + len(sparse) * (experts - 1) / (layers + encoders)) / 8) * 8 / d_ff


# F of a dense model over F of a sparse one with as many parameters (conf/router/dense_equal_parameters.yaml).
OmegaConf.register_new_resolver("dense_ff_factor", dense_ff_factor, replace=True)

Rule = tuple[str, Callable[[Any], bool]]  # what preflight asks of a value besides its type: in words, and as a test


def within(least: float, most: float = inf) -> Rule:
    text = f"at least {least}" if most == inf else f"between {least} and {most}"
    return text, lambda value: least <= value <= most


def one_of(*known: str) -> Rule:
    return f"one of {', '.join(known)}", lambda value: value in known


Count = Annotated[int, within(1)]


@dataclass
class DataSettings:
    corpus: dict[str, Any]
    vocab_size: Count
    sequence_length: Count
    packing: Annotated[str, one_of("stream", "documents")]
    mask_documents: bool
    cache: str
    source_length: Annotated[int | None, within(1)]
    folder: str | None = None  # of the yamls whose corpus names its files by it


@dataclass
class TrainSettings:
    steps: Count
    batch_size: Count
    micro_batch: Annotated[int | None, within(0)]  # None or 0: the whole batch
    routing_group: Count
    lr: Annotated[float, within(1e-12, 1e3)]
    min_lr_share: Annotated[float, within(0, 1)]
    warmup_steps: Annotated[int, within(0)]
    schedule: Annotated[str, one_of("cosine", "linear")]
    weight_decay: Annotated[float, within(0, 1e3)]
    beta1: Annotated[float, within(0, 0.999999)]
    beta2: Annotated[float, within(0, 0.999999)]
    grad_clip: Annotated[float, within(0)]
    precision: Annotated[str, one_of("auto", "bf16", "float32")]
    compile: bool
    init_from: str | None
    update: Annotated[str, one_of("all", "sparse", "all_but_sparse")]
    epochs: Annotated[float | None, within(1e-6)]
    patience: Annotated[int | None, within(1)]


@dataclass
class RecordSettings:
    log_every: Count
    evaluate_every: Count
    validation_windows: Annotated[int | None, within(1)]
    checkpoint_every: Annotated[int, within(0)]
    keep_weights: bool
    keep_optimizer: bool


@dataclass
class WandbSettings:
    mode: Annotated[str, one_of("offline", "online", "disabled")]
    project: str
    entity: str | None


@dataclass
class Settings:
    arm: str
    scale: str
    sweep: str | None
    seed: Annotated[int, within(0)]
    num_experts: Count
    device: Annotated[str, one_of("auto", "cpu", "cuda")]
    runs: str
    extra_packages: list[str]
    model: ModelSettings
    experts: dict[str, Any]
    router: dict[str, Any]
    data: DataSettings
    tokenizer: dict[str, Any]
    train: TrainSettings
    record: RecordSettings
    wandb: WandbSettings


# What cannot change a run's result; all else is in its id. The data's fingerprint stands for corpus and tokenizer.
NOT_IN_ID = ("arm", "scale", "sweep", "device", "runs", "extra_packages", "record", "wandb", "tokenizer")

# Options that came later, and the value that changes nothing: runs from before them keep their ids.
ADDED = {"encoder_layers": 0, "sparse_in": "decoder", "biases": False, "num_positions": None}


def digest_of(settings: Settings, data_fingerprint: str) -> str:
    """The run's id: eight hexadecimal digits of all that can change the result."""
    content = {key: value for key, value in dataclasses.asdict(settings).items() if key not in NOT_IN_ID}
    for group, key in (("router", "baseline"), ("train", "init_from")):
        if content[group].get(key):
            content[group][key] = Path(content[group][key]).name  # which run, wherever it lies
    content["train"].pop("epochs")  # steps follow from it
    if settings.train.patience is not None:  # validations decide when to stop
        content["train"]["evaluate_every"] = settings.record.evaluate_every
        if settings.record.validation_windows is not None:
            content["train"]["validation_windows"] = settings.record.validation_windows
    windows = {key: content["data"][key] for key in ("sequence_length", "packing", "mask_documents")}
    if content["model"]["encoder_layers"]:
        windows["source_length"] = content["data"]["source_length"]
    content["model"] = {key: v for key, v in content["model"].items() if ADDED.get(key, ...) != v}
    content["data"] = windows | {"fingerprint": data_fingerprint}
    return corpora.digest_of(content)[:8]
