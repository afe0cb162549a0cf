"""Everything that can be known to be wrong before any work is done."""

import glob
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.build import make_dictionary, make_router
from training.folder import is_finished
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
    settings.model.scaled().check()
    target(settings.data.corpus)
    target({key: value for key, value in settings.experts.items() if key != "num_shared"}, skip=4)
    shared = settings.experts.get("num_shared")
    if not isinstance(shared, int) or shared < 0:
        raise ValueError(f"experts.num_shared must be a whole number of at least 0; got {shared}")
    vocab_size = make_dictionary(settings.tokenizer).size()
    if settings.router.get("baseline") is not None:
        _find_baseline(settings)
    check_routers(settings, vocab_size)
    return settings


def _find_baseline(settings: Settings) -> None:
    """router.baseline, a folder or a glob, becomes the run that it names."""
    pattern = settings.router["baseline"]
    found = [Path(folder) for folder in glob.glob(str(Path(pattern).expanduser().absolute()))]
    kept = [run for run in found if is_finished(run) and any(run.glob("checkpoints/*/model.safetensors"))]
    if len(kept) != 1:
        made_by = Path(pattern).name.partition("-")[0].strip("*") or "NAME"
        rule = f"must name one finished run that kept its weights; python run.py router={made_by} makes one,"
        rule += " with record.keep_weights=true and the same seed, data and scale"
        names = ", ".join(sorted(run.name for run in kept)) or "none"
        raise ValueError(f"router.baseline={pattern} {rule}; found {names}")
    settings.router["baseline"] = str(kept[0])


def check_routers(settings: Settings, vocab_size: int | None) -> None:
    """Every layer's router takes its options. vocab_size: None while the text has not said how large a dictionary is;
    then what depends on it is to be checked again."""
    if settings.router.get("_target_") is None or (vocab_size is None and settings.router.get("file")):
        return
    if vocab_size is not None and settings.num_experts > vocab_size:
        raise ValueError(f"num_experts must be at most the dictionary's {vocab_size:,}; got {settings.num_experts}")
    stand_in = torch.nn.Identity() if settings.router.get("baseline") else None
    counts = torch.ones(vocab_size or max(settings.num_experts, 258), dtype=torch.int64)
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
