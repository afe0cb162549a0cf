"""The resolved configuration as typed values, and the id that it gives a run. Defaults live in conf/ alone."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from models.transformer import ModelSettings


@dataclass
class DataSettings:
    corpus: dict[str, Any]
    vocab_size: int
    sequence_length: int
    mask_documents: bool
    cache: str


@dataclass
class TrainSettings:
    steps: int
    batch_size: int
    micro_batch: int | None
    routing_group: int
    lr: float
    min_lr_share: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    beta1: float
    beta2: float
    grad_clip: float
    precision: str
    compile: bool


@dataclass
class RecordSettings:
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    keep_weights: bool
    keep_optimizer: bool


@dataclass
class WandbSettings:
    mode: str
    project: str
    entity: str | None


@dataclass
class Settings:
    arm: str
    scale: str
    sweep: str | None
    seed: int
    num_experts: int
    device: str
    runs: str
    extra_packages: list[str]
    model: ModelSettings
    experts: dict[str, Any]
    router: dict[str, Any]
    data: DataSettings
    train: TrainSettings
    record: RecordSettings
    wandb: WandbSettings


# What cannot change a run's result; all else is in its id. Of the data, the fingerprint stands for corpus and cache.
NOT_IN_ID = ("arm", "scale", "sweep", "device", "runs", "extra_packages", "record", "wandb")


def digest_of(settings: Settings, data_fingerprint: str) -> str:
    """The run's id: eight hexadecimal digits of all that can change the result."""
    content = {key: value for key, value in dataclasses.asdict(settings).items() if key not in NOT_IN_ID}
    content["data"] = {
        "fingerprint": data_fingerprint,
        "sequence_length": settings.data.sequence_length,
        "mask_documents": settings.data.mask_documents,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
