"""Everything that can be known to be wrong before any work is done."""

from dataclasses import is_dataclass
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.build import make_router
from training.settings import Settings
from training.targets import PACKAGES, check_targets, one_line, target


def read(config: DictConfig) -> Settings:
    """Typed and checked settings of one run. Raises ValueError with one line that names the key and the rule."""
    try:
        plain = OmegaConf.to_container(config, resolve=True)
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), plain))
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    assert isinstance(settings, Settings)
    check_targets(plain, "", (*PACKAGES, *settings.extra_packages))
    _check_rules(settings, "")
    train, micro = settings.train, settings.train.micro_batch or settings.train.batch_size
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
    return settings


def _check_rules(group: Any, place: str) -> None:
    """Every Rule in the annotations of group and of the groups in it."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, name)
        if is_dataclass(value):
            _check_rules(value, f"{place}{name}.")
        for rule, holds in getattr(hint, "__metadata__", ()):
            if value is not None and not holds(value):
                raise ValueError(f"{place}{name} must be {rule}; got {value}")
