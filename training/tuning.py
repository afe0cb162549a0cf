"""Tuning: an arm's space (conf/tuning/<arm>.yaml), its trials, and what a ledger has chosen.

A space is a log grid of learning rates, as factors of the scale's, alone or with a log grid of one knob. A trial is a
place in it, (i,) or (i, j); places beyond the grid go on in its ratio. Trials have seeds from 100 up.
"""

import csv
import functools
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig

from training.settings import Settings

SPACES = Path(__file__).resolve().parent.parent / "conf" / "tuning"
FIRST_SEED = 100


class Space(NamedTuple):
    """lr: factors of the scale's train.lr; knob: a key of the config, or None; values: of the knob."""

    lr: list[float]
    knob: str | None = None
    values: list[float] = []

    def places(self) -> list[tuple[int, ...]]:
        """The grid's."""
        return [*product(*(range(len(axis)) for axis in (self.lr, self.values) if axis))]


@functools.cache
def space_of(name: str) -> Space:
    """conf/tuning/<name>.yaml. ValueError if there is none, or if an axis is no log grid."""
    path = SPACES / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"space={name}: there is no conf/tuning/{name}.yaml, which says what to tune of this arm")
    space = Space(**yaml.safe_load(path.read_text()))
    for axis in filter(None, (space.lr, space.values)):
        ratios = [after / before for before, after in zip(axis, axis[1:])]
        if len(axis) < 2 or min(axis) <= 0 or min(ratios) <= 1 or max(ratios) > 1.02 * min(ratios):
            raise ValueError(f"conf/tuning/{name}.yaml must have rising log grids; got {axis}")
    return space


def value_at(axis: list[float], place: int) -> float:
    """The value there; beyond the grid in its ratio, to three digits."""
    if 0 <= place < len(axis):
        return axis[place]
    ratio = (axis[-1] / axis[0]) ** (1 / (len(axis) - 1))
    return float(f"{axis[0] * ratio**place:.3g}")


def settle(config: MutableMapping[str, Any] | DictConfig, words: Iterable[str]) -> None:
    """Set the rate and knob that `trial` or `tuned` stand for; of tuned not what words, the overrides, set themselves.

    A run that starts from another one, or with space=null, keeps what it has. Raises ValueError for a trial with a
    table's seed, and for an arm that the ledger has not.
    """
    train, space, chosen = config["train"], config["space"], {}
    if config["trial"] not in (None, "all"):
        chosen = tried(config)
        if any(_group(config, key)[key.rpartition(".")[2]] != value for key, value in chosen.items()):
            config["arm"] = "_".join([config["arm"], "trial", *map(str, config["trial"])])  # else it is the plain arm
    elif config["tuned"] is not None and space is not None and train["init_from"] is None:
        given = {word.lstrip("+").partition("=")[0] for word in words}
        known = from_ledger(config["tuned"], space, config["scale"])
        chosen = {key: value for key, value in known.items() if key not in given}
    for key, value in chosen.items():
        _group(config, key)[key.rpartition(".")[2]] = value


def tried(config: MutableMapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Key -> value of the config's trial."""
    if config["seed"] < FIRST_SEED:
        raise ValueError(f"seed must be at least {FIRST_SEED} for a trial; got {config['seed']}")
    space, place = space_of(config["space"]), config["trial"]
    axes = 2 if space.knob else 1
    if not isinstance(place, Sequence) or len(place) != axes or not all(isinstance(at, int) for at in place):
        of = f"a rate and a value of {space.knob}" if space.knob else "a rate"
        raise ValueError(
            f"trial must be 'all' or places on the grid of {of}, as [{', '.join('0' * axes)}] of "
            f"{' x '.join(str(len(axis)) for axis in (space.lr, space.values) if axis)}; got {place!r}"
        )
    rate = float(f"{config['train']['lr'] * value_at(space.lr, place[0]):.6g}")
    return {"train.lr": rate} | ({space.knob: value_at(space.values, place[1])} if space.knob else {})


def _group(config: MutableMapping[str, Any] | DictConfig, key: str) -> MutableMapping[str, Any]:
    """The group that holds the key's last part. ValueError if there is none."""
    try:
        return functools.reduce(lambda group, name: group[name], key.split(".")[:-1], config)  # type: ignore[arg-type]
    except KeyError as error:
        raise ValueError(f"{key}, which is to be tuned, is no key of this config") from error


def from_ledger(ledger: str, arm: str, scale: str) -> dict[str, Any]:
    """Key -> value that the ledger chose for an arm. ValueError if it has chosen none, or is of another scale."""
    try:
        with Path(ledger).expanduser().open(newline="") as file:
            rows = list(csv.DictReader(file))
            scales = {row["scale"] for row in rows} - {scale}
            chosen = {
                (row["lr"], row["knob"], row["value"]) for row in rows if row["arm"] == arm and row["chosen"] == "True"
            }
    except (OSError, KeyError) as error:
        what = f"it has no column {error}" if isinstance(error, KeyError) else error.strerror
        raise ValueError(f"tuned={ledger} is no ledger that can be read: {what}") from error
    if scales:
        raise ValueError(f"tuned={ledger} is of scale={scales.pop()}, whose rates are not those of scale={scale}")
    if len(chosen) != 1:
        others = sorted({row["arm"] for row in rows if row["chosen"] == "True"})
        why = "trials of it are still to come" if arm in {row["arm"] for row in rows} else "it was not tried"
        raise ValueError(
            f"tuned={ledger} has chosen nothing for {arm}, as {why} (it has for {', '.join(others) or 'no arm'}): "
            f"leave {arm} out, or go on by python run.py -m sweeps=tune router={arm} scale={scale}, with the text and "
            "budget that the other trials had, and python -m analysis.report tune"
        )
    ((lr, knob, value),) = chosen
    try:
        return {"train.lr": float(lr)} | ({knob: float(value)} if knob else {})
    except ValueError as error:
        raise ValueError(f"tuned={ledger} is no ledger that can be read: {error}, of {arm}") from error


def tuned_elsewhere(settings: Settings, data_fingerprint: str) -> str:
    """A line if the run has a rate that was chosen on another text or budget than its own; "" if not, or not known."""
    path = Path(settings.tuned or "").expanduser()
    if settings.space is None or settings.train.init_from is not None or not path.is_file():
        return ""  # path: a run that is trained again has its rate without the ledger
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] == settings.space and row["chosen"] == "True"]
    tokens = settings.train.steps * settings.train.batch_size * settings.data.sequence_length
    texts = {row.get("data_fingerprint") or data_fingerprint for row in rows} - {data_fingerprint}
    budgets = {float(row.get("tokens") or tokens) for row in rows} - {tokens}
    others = ["another text"] * bool(texts) + [f"{each:,.0f} tokens, not {tokens:,}" for each in budgets]
    return f"tuned={settings.tuned}: the trials of {settings.space} were of {' and '.join(others)}" if others else ""


def described(settings: Settings) -> dict[str, Any]:
    """What a sweep's record says of a trial: its arm, place, rate and knob. {} of a run that is none."""
    if settings.trial is None:
        return {}
    knob = space_of(settings.space or "").knob
    value = _group(asdict(settings), knob)[knob.rpartition(".")[2]] if knob else None
    return {"tuned": settings.space, "place": settings.trial, "lr": settings.train.lr, "knob": knob, "value": value}
