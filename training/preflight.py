"""Everything that can be known to be wrong before any work is done."""

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.build import make_router
from training.settings import Settings
from training.targets import PACKAGES, check_targets, one_line, target


def read(config: DictConfig) -> Settings:
    """Typed and checked settings of one run. Raises ValueError with one line that names the key and the rule."""
    plain = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        OmegaConf.resolve(plain)
        merged = OmegaConf.merge(OmegaConf.structured(Settings), plain)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    assert isinstance(settings, Settings)
    check_targets(OmegaConf.to_container(plain), "", (*PACKAGES, *settings.extra_packages))
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    train, record = settings.train, settings.record
    positive = {
        "num_experts": settings.num_experts,
        "data.sequence_length": settings.data.sequence_length,
        "train.steps": train.steps,
        "train.batch_size": train.batch_size,
        "train.routing_group": train.routing_group,
        "train.lr": train.lr,
        "record.log_every": record.log_every,
        "record.evaluate_every": record.evaluate_every,
    }
    for name, value in positive.items():
        if not value > 0 or value == float("inf"):
            raise ValueError(f"{name} must be at least 1 (lr: above 0); got {value}")
    for name in ("weight_decay", "grad_clip", "warmup_steps", "min_lr_share"):
        if not getattr(train, name) >= 0:
            raise ValueError(f"train.{name} must not be negative; got {getattr(train, name)}")
    choices = (
        ("device", settings.device, ("auto", "cpu", "cuda")),
        ("train.schedule", train.schedule, ("cosine", "linear")),
        ("train.precision", train.precision, ("auto", "bf16", "float32")),
        ("wandb.mode", settings.wandb.mode, ("offline", "online", "disabled")),
    )
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(train, name) < 1:
            raise ValueError(f"train.{name} must be in [0, 1); got {getattr(train, name)}")
    micro = train.micro_batch or train.batch_size
    if train.batch_size % micro or micro % train.routing_group:
        raise ValueError(
            "train.batch_size must be a multiple of train.micro_batch, and that of train.routing_group; "
            f"got {train.batch_size}, {micro} and {train.routing_group}"
        )
    if settings.seed < 0:
        raise ValueError(f"seed must not be negative; got {settings.seed}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU")
    settings.model.check()
    if settings.data.vocab_size < 1:
        raise ValueError(f"data.vocab_size must be at least 1; got {settings.data.vocab_size}")
    target(settings.data.corpus)
    target(settings.experts)
    if settings.router.get("_target_") is not None:
        make_router(settings, 0, torch.ones(settings.data.vocab_size, dtype=torch.int64))
