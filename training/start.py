"""The finished runs that a run builds on: router.baseline and train.init_from, found by folder or glob."""

import glob
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from data.dictionary_files import find_dictionary
from data.prepare import Prepared
from data.source import length_of_source
from training.build import outline, source_length
from training.compose import ROOT
from training.folder import has_weights, is_finished
from training.identity import without_unused
from training.run import Run
from training.settings import Settings

OF_THE_MODEL = ("num_experts", "experts", "model", "router")
OF_THE_DATA = ("sequence_length", "source_length")  # what tables and learned positions are sized by
MAY_DIFFER = ("dispatch", "baseline")  # how the same is computed, and what the tables were drawn from


def find_run(key: str, pattern: str, remedy: str, meant: Callable[[dict[str, Any]], bool]) -> Path:
    """The one finished run with weights that the folder or glob names; of several the one whose settings may be meant.
    ValueError if there is none, or are several."""
    found = [Path(folder) for folder in glob.glob(absolute(pattern))]
    kept = [run for run in found if is_finished(run) and has_weights(run)]
    if len(kept) > 1:
        kept = [run for run in kept if meant(config_of(run))] or kept
    if len(kept) > 1:
        remedy = "it fits several: name one"
    if len(kept) != 1:
        names = ", ".join(sorted(run.name for run in kept)) or "none"
        raise ValueError(f"{key}={pattern} must name one finished run that kept its weights; {remedy}; found {names}")
    return kept[0]


def absolute(pattern: str) -> str:
    return str(Path(pattern).expanduser().absolute())


def planned_run(key: str, pattern: str, planned: Sequence[Settings]) -> Settings | None:
    """Of the earlier jobs of a sweep, the one that makes the run which the key names: it comes before what lies on the
    disk. The ids are not known yet. ValueError if several do."""
    makers = {(each.arm, each.seed): each for each in reversed(planned) if is_called(each, pattern)}
    if len(makers) > 1:
        names = ", ".join(f"{arm}-s{seed}" for arm, seed in reversed(makers))
        raise ValueError(f"{key}={pattern} must name one run; of this sweep's earlier jobs it fits several: {names}")
    return next(iter(makers.values()), None)


def is_called(settings: Settings, pattern: str) -> bool:
    """The pattern fits a run of this arm and seed: an id is eight digits, of which it says nothing."""
    return fnmatch(f"{absolute(settings.runs)}/{settings.arm}-s{settings.seed}-{'0' * 8}", absolute(pattern))


def find_baseline(settings: Settings, planned: Sequence[Settings]) -> dict[str, Any] | None:
    """router.baseline becomes the run that it names, and stays a glob while an earlier job of the sweep has to make it.

    The settings of that run; None if no baseline is asked for. Raises ValueError, in one line, for no such run.
    """
    pattern = settings.router.get("baseline")
    if pattern is None:
        return None
    maker = planned_run("router.baseline", pattern, planned)
    if maker is not None:
        return asdict(maker)
    arm = Path(pattern).name.partition("-s")[0]  # of a run folder's name; else of a dense run, which most ask for
    made_by = arm if (ROOT / "conf" / "router" / f"{arm}.yaml").exists() else "dense"
    remedy = (
        f"python run.py router={made_by} makes one, with record.keep_weights=true and the same seed, data and scale"
    )

    def of_this_text(run: dict[str, Any]) -> bool:
        same = (run.get("data", {}).get("corpus"), run.get("tokenizer")) == (settings.data.corpus, settings.tokenizer)
        return same or settings.train.init_from is not None  # then it need only have this dictionary

    folder = find_run("router.baseline", pattern, remedy, of_this_text)
    settings.router["baseline"] = str(folder)
    return config_of(folder)


def check_start(settings: Settings, planned: Sequence[Settings]) -> None:
    """train.init_from becomes the run that it names, and stays a glob while an earlier job of the sweep has to make it.

    Raises ValueError, in one line, for no such run or another model than this one.
    """
    pattern = settings.train.init_from
    if pattern is None:
        return
    maker = planned_run("train.init_from", pattern, planned)
    if maker is not None:
        require_same_model(settings, asdict(maker), pattern)
        return
    remedy = "python run.py with record.keep_weights=true makes one"

    def begins(run: dict[str, Any]) -> bool:  # no run that such a start has made, as this one will be
        return not fnmatch(run.get("train", {}).get("init_from") or "", absolute(pattern))

    folder = find_run("train.init_from", pattern, remedy, begins)
    settings.train.init_from = str(folder)
    require_same_model(settings, config_of(folder), str(folder))


def config_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def require_same_model(settings: Settings, first: dict[str, Any], name: str) -> None:
    """first: the settings of the run called name. ValueError that names the key in which the models differ; of a
    router's options coefficients, factors and rates (what has a fraction, or is null) may."""
    mine = asdict(settings)
    # of a dense model the places of sparse layers say which FFNs are trained, and a start has trained all of them
    used = [without_unused(run | {"train": run["train"] | {"update": "all"}}) for run in (mine, first)]
    both = [(key, *(run.get(key) for run in used)) for key in OF_THE_MODEL]
    both += [("tokenizer._target_", mine["tokenizer"]["_target_"], first["tokenizer"]["_target_"])]
    both += [(f"data.{key}", mine["data"].get(key), first["data"].get(key)) for key in OF_THE_DATA]
    for key, here, there in both:
        for place, one, other in differences(key, here, there):
            free = key == "router" and all(isinstance(value, float | None) for value in (one, other))
            if not free and place.rpartition(".")[2] not in MAY_DIFFER:
                raise ValueError(f"{place} must be that of train.init_from={name}: {other}; got {one}")


def differences(place: str, one: Any, other: Any) -> Iterable[tuple[str, Any, Any]]:
    """(place, value here, value there) of all leaves that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):  # _target_ first
            yield from differences(f"{place}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield place, one, other


def take_dictionary(settings: Settings, planned: Sequence[Run]) -> None:
    """train.init_from becomes a folder, tokenizer.file the prepared data with that run's dictionary, and vocab_size is
    that dictionary's.

    planned: the sweep's earlier jobs, which need not have run. Raises ValueError if
    the dictionary is gone, or if tokenizer.file names another one.
    """
    folder, dictionary, vocab_size = _start_of(settings, planned)
    settings.train.init_from, settings.data.vocab_size = str(folder), vocab_size
    if "vocab_size" in settings.tokenizer:
        settings.tokenizer["vocab_size"] = vocab_size
    if not (dictionary / "tokenizer.json").exists():
        remedy = "the command that made the run makes it again"
        raise ValueError(f"the prepared data of train.init_from={folder} is gone: {dictionary}; {remedy}")
    if given := settings.tokenizer.get("file"):
        require_same_dictionary(find_dictionary(given), dictionary, f"tokenizer.file={given}")
    if "file" in settings.tokenizer:  # bytes are the same everywhere
        settings.tokenizer["file"] = str(dictionary)


def require_same_positions(settings: Settings, prepared: Prepared, planned: Sequence[Run]) -> None:
    """ValueError if something in train.init_from is sized by what its encoder and decoder read, and they read another
    part of the window here: an encoder has half of a plain text and the whole of a dialogue."""
    if settings.model.encoder_layers == 0:
        return
    maker, data = earlier(settings.train.init_from or "", planned), settings.data
    splits = maker.prepared.splits if maker else _provenance(settings.train.init_from or "")["splits"]
    of_dialogues = any(figures["counted"] < figures["tokens"] for figures in splits.values())
    theirs = length_of_source(data.source_length, data.sequence_length, of_dialogues)
    lengths = source_length(settings, prepared), theirs
    mine, other = (outline(settings, prepared.vocab_size, length).state_dict() for length in lengths)
    for name, tensor in mine.items():
        if tensor.shape != other[name].shape:
            kinds = ("plain text", "dialogues") if of_dialogues else ("dialogues", "plain text")
            rule = f"must have read {kinds[0]}, as this run does, for {name} has a place for each token that is read"
            raise ValueError(f"train.init_from={settings.train.init_from} {rule}; it has read {kinds[1]}")


def require_same_dictionary(file: Path, prepared: Path, name: str) -> None:
    """file: a tokenizer.json, of what is called name. ValueError if the prepared folder has another dictionary."""
    try:
        same = json.loads(file.read_bytes()) == json.loads((prepared / "tokenizer.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"the dictionary of {name} cannot be read: {error}") from error
    if not same:
        raise ValueError(f"{name} must have the dictionary of {prepared}; it has another one")


def _start_of(settings: Settings, planned: Sequence[Run]) -> tuple[Path, Path, int]:
    """The folder of train.init_from, the prepared data with its dictionary, and how many entries that has."""
    wanted = settings.train.init_from or ""
    if maker := earlier(wanted, planned):
        return maker.folder, maker.prepared.folder, maker.prepared.vocab_size
    return Path(absolute(wanted)), find_dictionary(wanted).parent, _provenance(wanted)["vocab_size"]


def _provenance(folder: str) -> dict[str, Any]:
    """What a run folder says of its data."""
    return json.loads((Path(folder).expanduser() / "provenance.json").read_text())["data"]


def earlier(name: str, planned: Sequence[Run]) -> Run | None:
    """Of the sweep's earlier jobs the one whose folder this is, or whose arm and seed the glob fits."""
    return next((run for run in planned if str(run.folder) == absolute(name) or is_called(run.settings, name)), None)
