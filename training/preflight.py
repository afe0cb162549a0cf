"""Everything that can be known to be wrong before any work is done."""

import functools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.source import length_of_source
from models.dispatch import choose_path
from training.build import choose_device, make_dictionary, outline, precision
from training.settings import Settings
from training.start import check_start, differences, find_baseline
from training.targets import PACKAGES, check_targets, one_line, target

SCHEMA = OmegaConf.structured(Settings)


def read(config: DictConfig | dict[str, Any], planned: Sequence[Settings] = ()) -> Settings:
    """Typed and checked settings of one run. planned: of the sweep's earlier jobs, one of which may be the run that
    train.init_from or router.baseline names. Raises ValueError with one line that names the key and the rule."""
    try:
        plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
        settings = OmegaConf.to_object(OmegaConf.merge(SCHEMA, plain))
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from error
    assert isinstance(settings, Settings)
    check_targets(plain, "", (*PACKAGES, *settings.extra_packages))
    _check_rules(settings, "")
    settings.train.steps, settings.train.horizon = round(settings.train.steps * settings.train.horizon), 1
    train, micro = settings.train, settings.train.micro_batch or settings.train.batch_size
    if train.batch_size % micro or micro % train.routing_group:
        rule = "train.batch_size must be a multiple of train.micro_batch, and that of train.routing_group"
        raise ValueError(f"{rule}; got {train.batch_size}, {micro} and {train.routing_group}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU")
    settings.model.scaled().check()
    device = choose_device(settings)
    if device.type == "cpu":  # of a GPU the job finds out, for asking it would start CUDA here
        dtype = torch.bfloat16 if precision(settings, device) == "bf16" else torch.float32
        choose_path(settings.model.dispatch, device, dtype)
    _check_encoder(settings)
    target(settings.data.corpus, place="data.corpus")
    experts = {key: value for key, value in settings.experts.items() if key != "num_shared"}
    target(experts | ({"biases": True} if settings.model.biases else {}), skip=4, place="experts")
    shared = settings.experts.get("num_shared")
    if not isinstance(shared, int) or shared < 0:
        raise ValueError(f"experts.num_shared must be a whole number of at least 0; got {shared}")
    vocab_size = make_dictionary(settings.tokenizer).size()
    check_model(settings, vocab_size, find_baseline(settings, planned))
    check_start(settings, planned)
    return settings


# What another seed or trial of an arm changes of its config, beside options of the router.
CHANGED = (".seed", ".table_seed", ".repeat", ".arm", ".trial", ".train.lr", ".train.init_from")


def read_like(
    config: dict[str, Any], like: tuple[dict[str, Any], Settings], planned: Sequence[Settings] = ()
) -> Settings | None:
    """What read gives, ten times as fast, of a config that differs from another one by its seeds or as a trial does;
    None if by more.

    like: the other one and its settings, as it was read. Raises ValueError as read does.
    """
    other, settings = like
    changes = list(differences("", config, other))
    options = {place for place, _, _ in changes if place.startswith(".router.")}
    if ".router._target_" in options or any(place not in CHANGED for place, _, _ in changes if place not in options):
        return None
    settings = deepcopy(settings)
    for place, value, _ in changes:
        *groups, name = place.split(".")[1:]
        group: Any = settings
        for each in groups:
            group = group[each] if isinstance(group, dict) else getattr(group, each)
        if isinstance(group, dict):
            group[name] = value
        else:
            setattr(group, name, value)
    _check_rules(settings, "")
    baseline = find_baseline(settings, planned)
    if options - {".router.baseline"}:
        check_model(settings, make_dictionary(settings.tokenizer).size(), baseline)
    check_start(settings, planned)
    return settings


def _check_encoder(settings: Settings) -> None:
    """What an encoder reads, and learned positions, fit the window."""
    model, data = settings.model, settings.data
    if model.num_positions is not None and model.num_positions < data.sequence_length:
        rule = f"must be at least data.sequence_length = {data.sequence_length}"
        raise ValueError(f"model.num_positions {rule}; got {model.num_positions}")
    if model.encoder_layers == 0:
        if data.source_length is not None:
            rule = "must be null for a decoder-only model (model.encoder_layers=0)"
            raise ValueError(f"data.source_length {rule}; got {data.source_length}")
        return
    source = length_of_source(data.source_length, data.sequence_length, of_dialogues=False)
    if source is None or not 0 < source < data.sequence_length:
        rule = f"must leave both sides some of data.sequence_length = {data.sequence_length}"
        raise ValueError(f"data.source_length {rule}; got {source}")


def check_model(settings: Settings, vocab_size: int | None, first: dict[str, Any] | None = None) -> None:
    """Every layer's router takes its options, and all sizes fit: the model is made, without values. vocab_size: None
    while the text has not said how large a dictionary is; then what depends on it is to be checked again. first: the
    settings of the run that router.baseline names."""
    routed = settings.router.get("_target_") is not None
    if routed and vocab_size is None and settings.router.get("file"):
        return
    if routed and vocab_size is not None and settings.num_experts > vocab_size:
        raise ValueError(f"num_experts must be at most the dictionary's {vocab_size:,}; got {settings.num_experts}")
    source = length_of_source(settings.data.source_length, settings.data.sequence_length, of_dialogues=False)
    model = outline(settings, vocab_size or max(settings.num_experts, 258), source)
    for layer, router in model.routers.items():
        if router.imitates and first is not None and not _routed(first, layer, settings.num_experts):
            wanted = f"a routed layer {layer} with {settings.num_experts} experts"
            raise ValueError(f"router.baseline must be a run with {wanted}; got {settings.router['baseline']}")


def _routed(run: dict[str, Any], layer: int, num_experts: int) -> bool:
    """The run has a router in that layer, with so many experts."""
    routed = run["router"]["_target_"] is not None and layer in run["model"]["sparse_layers"]
    return routed and run["num_experts"] == num_experts


@functools.cache
def _hints(group: type) -> dict[str, Any]:
    return get_type_hints(group, include_extras=True)


def _check_rules(group: Any, place: str) -> None:
    """Every Rule in the annotations of group and of the groups in it."""
    for name, hint in _hints(type(group)).items():
        value = getattr(group, name)
        if is_dataclass(value):
            _check_rules(value, f"{place}{name}.")
        for rule, holds in getattr(hint, "__metadata__", ()):
            if value is not None and not holds(value):
                raise ValueError(f"{place}{name} must be {rule}; got {value}")
