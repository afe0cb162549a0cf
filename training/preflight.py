"""Everything that can be known to be wrong before any work is done."""

from collections.abc import Iterable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.build import make_router
from training.settings import Settings
from training.start import check_start, find_run
from training.targets import PACKAGES, check_targets, one_line, target


def read(config: DictConfig, planned: Iterable[Settings] = ()) -> Settings:
    """Typed and checked settings of one run. planned: of the sweep's earlier jobs, one of which may be the run that
    train.init_from names. Raises ValueError with one line that names the key and the rule."""
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
    settings.model.scaled().check()
    target(settings.data.corpus)
    target({key: value for key, value in settings.experts.items() if key != "num_shared"}, skip=4)
    shared = settings.experts.get("num_shared")
    if not isinstance(shared, int) or shared < 0:
        raise ValueError(f"experts.num_shared must be a whole number of at least 0; got {shared}")
    if settings.router.get("_target_") is not None:
        _check_router(settings)
    check_start(settings, planned)
    return settings


def _check_router(settings: Settings) -> None:
    """Every layer's router takes its options. router.baseline, a folder or a glob, becomes the run that it names."""
    pattern, stand_in = settings.router.get("baseline"), None
    if pattern is not None:
        made_by = Path(pattern).name.partition("-")[0].strip("*") or "NAME"
        remedy = (
            f"python run.py router={made_by} makes one, with record.keep_weights=true and the same seed, data and scale"
        )
        settings.router["baseline"] = str(find_run("router.baseline", pattern, remedy))
        stand_in = torch.nn.Identity()
    if settings.num_experts > settings.data.vocab_size:
        limit = f"at most data.vocab_size = {settings.data.vocab_size}"
        raise ValueError(f"num_experts must be {limit}; got {settings.num_experts}")
    counts = torch.ones(settings.data.vocab_size, dtype=torch.int64)
    for layer in settings.model.sparse_layers:
        make_router(settings, layer, counts, baseline=stand_in)


def _check_rules(group: Any, place: str) -> None:
    """Every Rule in the annotations of group and of the groups in it."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        value = getattr(group, name)
        if is_dataclass(value):
            _check_rules(value, f"{place}{name}.")
        for rule, holds in getattr(hint, "__metadata__", ()):
            if value is not None and not holds(value):
                raise ValueError(f"{place}{name} must be {rule}; got {value}")
