"""A run's identity: a digest of all that can change its result. Labels, sweeps and places are no part of it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from data import corpora
from training.settings import Settings

# What cannot change a run's result; all else is in its id. The data's fingerprint stands for corpus and tokenizer.
NOT_IN_ID = ("arm", "scale", "sweep", "device", "runs", "extra_packages", "record", "wandb", "tokenizer")
NOT_IN_ID += ("space", "trial", "tuned", "dry_run")  # what they choose stands in train.lr and the router's options

# Options that came later, and the value that changes nothing: runs from before them keep their ids.
ADDED = {"encoder_layers": 0, "sparse_in": "decoder", "biases": False, "num_positions": None}
ADDED_TO_ROUTERS = {"solver": "auto"}

SPARSE = ("sparse_layers", "sparse_in", "dispatch")  # of the model; a dense one has no use for them


def digest_of(settings: Settings, data_fingerprint: str) -> str:
    """The run's id: eight hexadecimal digits of all that can change the result."""
    content = without_unused(dataclasses.asdict(settings))
    content = {key: value for key, value in content.items() if key not in NOT_IN_ID}
    for group, key in (("router", "baseline"), ("train", "init_from")):
        if content[group].get(key):
            content[group][key] = id_in(content[group][key])  # which run, wherever it lies and however it is called
    for key, usual in (("table_seed", (None, settings.seed)), ("repeat", (0,)), ("deterministic", (False,))):
        if content.get(key) in usual:
            content.pop(key, None)
    for key in ("epochs", "horizon"):  # steps follow from them
        content["train"].pop(key)
    if settings.train.patience is not None:  # validations decide when to stop
        content["train"]["evaluate_every"] = settings.record.evaluate_every
        if settings.record.validation_windows is not None:
            content["train"]["validation_windows"] = settings.record.validation_windows
    windows = {key: content["data"][key] for key in ("sequence_length", "packing", "mask_documents")}
    if content["model"]["encoder_layers"]:
        windows["source_length"] = content["data"]["source_length"]
    content["model"] = {key: v for key, v in content["model"].items() if ADDED.get(key, ...) != v}
    content["router"] = {key: v for key, v in content["router"].items() if ADDED_TO_ROUTERS.get(key, ...) != v}
    content["data"] = windows | {"fingerprint": data_fingerprint}
    return corpora.digest_of(content)[:8]


def provisional_id(settings: Settings) -> str:
    """As digest_of, while the text is not prepared: equal for runs that will be equal."""
    epochs = settings.train.epochs  # from which steps will follow
    if epochs is not None:
        settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=0))
    return digest_of(settings, repr((settings.data.corpus, settings.tokenizer, epochs)))


def without_unused(content: dict[str, Any]) -> dict[str, Any]:
    """Settings as a dictionary, without what a dense model does not use: it is trained once for all numbers of experts
    and places of sparse layers. With placement=insert its extra layer stands there and is an expert."""
    if content["router"].get("_target_") is not None:
        return content
    inserted, train = content["model"]["placement"] == "insert", content["train"]
    unused = {"num_experts", "table_seed"} | (set() if inserted else {"experts"})
    # which FFNs are trained goes by them too
    options = {"dispatch"} if inserted or train["update"] != "all" else set(SPARSE)
    kept = {key: value for key, value in content.items() if key not in unused}
    kept["model"] = {key: value for key, value in content["model"].items() if key not in options}
    return kept | {"train": {key: value for key, value in train.items() if key != "routing_group"}}


def id_in(folder: str) -> str:
    """The id in a run folder's name; the name if it has none."""
    name = Path(folder).name
    return match[1] if (match := re.fullmatch(r".+-s\d+-([0-9a-f]{8})", name)) else name
