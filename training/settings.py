"""The resolved configuration as typed values with their rules. Defaults live in conf/ alone."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from os.path import expanduser, isdir
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf

from models.settings import ModelSettings


def dense_ff_factor(experts: int, sparse: list[int], layers: int, encoders: int, d_ff: int) -> float:
    """F' / F of L F' = (n_sparse E + L - n_sparse) F, F' the nearest multiple of 8."""
    return round(d_ff * (1 + len(sparse) * (experts - 1) / (layers + encoders)) / 8) * 8 / d_ff


def spread(count: int, layers: int) -> list[int]:
    """count layers at even distances, all of them if there are fewer: 5 of 11 are 1, 3, 5, 7, 9."""
    return [(2 * place + 1) * layers // (2 * count) for place in range(count)] if count < layers else [*range(layers)]


def if_routed(text: str, *, _root_: DictConfig) -> str:
    """The end of an arm's label that says nothing of a dense model."""
    return text if _root_.router["_target_"] else ""


# What yamls compute: F of a dense model with as many parameters as a sparse one, and what sweeps need of a scale.
OmegaConf.register_new_resolver("dense_ff_factor", dense_ff_factor, replace=True)
OmegaConf.register_new_resolver("spread", spread, replace=True)
OmegaConf.register_new_resolver("each_layer", lambda layers: ",".join(f"[{n}]" for n in range(layers)), replace=True)
OmegaConf.register_new_resolver("times", lambda value, factor: round(value * factor), replace=True)
OmegaConf.register_new_resolver("if_routed", if_routed, replace=True)

Rule = tuple[str, Callable[[Any], bool]]  # what preflight asks of a value besides its type: in words, and as a test


def within(least: float, most: float = inf) -> Rule:
    text = f"at least {least}" if most == inf else f"between {least} and {most}"
    return text, lambda value: least <= value <= most


def one_of(*known: str) -> Rule:
    return f"one of {', '.join(known)}", lambda value: value in known


Count = Annotated[int, within(1)]
NAME: Rule = "a name without /, which begins with no dot", lambda text: text and "/" not in text and text[0] != "."
FOLDER: Rule = "a folder that is there", lambda path: isdir(expanduser(path))


@dataclass
class DataSettings:
    corpus: dict[str, Any]
    vocab_size: Count
    sequence_length: Count
    packing: Annotated[str, one_of("stream", "documents")]
    mask_documents: bool
    cache: str
    source_length: Annotated[int | None, within(1)]
    folder: Annotated[str | None, FOLDER] = None  # of the yamls whose corpus names its files by it


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
    horizon: Annotated[float, within(1e-6)] = 1


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
    arm: Annotated[str, NAME]
    scale: str
    sweep: Annotated[str | None, NAME]
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
    # later than the rest, with what they were in runs from before them
    table_seed: Annotated[int | None, within(0)] = None
    repeat: Annotated[int, within(0)] = 0
    trial: list[int] | None = None
    tuned: str | None = None
    space: str | None = None
    dry_run: bool = False
    deterministic: bool = False
