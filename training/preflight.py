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
    train, record, inf = settings.train, settings.record, float("inf")
    micro = train.micro_batch or train.batch_size
    ranges = {  # name: value, least, most
        "seed": (settings.seed, 0, inf),
        "num_experts": (settings.num_experts, 1, inf),
        "data.vocab_size": (settings.data.vocab_size, 1, inf),
        "data.sequence_length": (settings.data.sequence_length, 1, inf),
        "train.steps": (train.steps, 1, inf),
        "train.batch_size": (train.batch_size, 1, inf),
        "train.routing_group": (train.routing_group, 1, inf),
        "train.micro_batch": (micro, 1, inf),
        "train.lr": (train.lr, 1e-12, 1e3),
        "train.min_lr_share": (train.min_lr_share, 0, 1),
        "train.warmup_steps": (train.warmup_steps, 0, inf),
        "train.weight_decay": (train.weight_decay, 0, 1e3),
        "train.beta1": (train.beta1, 0, 0.999999),
        "train.beta2": (train.beta2, 0, 0.999999),
        "train.grad_clip": (train.grad_clip, 0, inf),
        "record.log_every": (record.log_every, 1, inf),
        "record.evaluate_every": (record.evaluate_every, 1, inf),
        "record.checkpoint_every": (record.checkpoint_every, 0, inf),
    }
    for name, (value, least, most) in ranges.items():
        if not least <= value <= most:
            limit = f"at least {least}" if most == inf else f"between {least} and {most}"
            raise ValueError(f"{name} must be {limit}; got {value}")
    choices = {
        "device": (settings.device, ("auto", "cpu", "cuda")),
        "train.schedule": (train.schedule, ("cosine", "linear")),
        "train.precision": (train.precision, ("auto", "bf16", "float32")),
        "wandb.mode": (settings.wandb.mode, ("offline", "online", "disabled")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value}")
    if train.batch_size % micro or micro % train.routing_group:
        rule = "train.batch_size must be a multiple of train.micro_batch, and that of train.routing_group"
        raise ValueError(f"{rule}; got {train.batch_size}, {micro} and {train.routing_group}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU")
    settings.model.check()
    target(settings.data.corpus)
    target(settings.experts, skip=4)
    if settings.router.get("_target_") is not None:
        make_router(settings, 0, torch.ones(settings.data.vocab_size, dtype=torch.int64))
