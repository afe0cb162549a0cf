"""What an arm's label says: its method, its place (64 of NAME_64), its name, look and reference."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import yaml


class Arm(NamedTuple):
    """method: the longest name of style.yaml that the label is, or begins with before an underscore; else the label."""

    name: str
    method: str
    place: str  # what follows, "" if nothing does
    label: str
    look: dict[str, Any]  # color, dashes, marker

    @property
    def x(self) -> float:
        """The first number in the place; NaN if there is none."""
        found = re.search(r"\d+(\.\d+)?(e-?\d+)?", self.place)
        return float(found[0]) if found else float("nan")


def plural(noun: str, number: int) -> str:
    """For a label or a line: the noun, with an s unless there is one."""
    return noun + "s" * (number != 1)


def load(name: str) -> dict[str, Any]:
    """analysis/<name>.yaml."""
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text())


def declared(sweep: str) -> dict[str, Any]:
    """What declared.yaml says of this sweep, which may be NAME_tuned of a NAME there, over its default."""
    known, own = load("declared"), sweep.removesuffix("_tuned")
    return {"margin": known["margin"]} | known["default"] | known["sweeps"].get(own, {})


def described(names: Iterable[str], style: dict) -> dict[str, Arm]:
    """name -> Arm, in order; those of no known method get one look each."""
    found, spare, looks = {}, cycle(style["others"]), {}
    for name in dict.fromkeys(names):
        method, place = method_of(name, style["arms"]), place_of(name, style)
        known, shown = style["arms"].get(method), place.replace("_", " ")
        label = known["label"] if known else method.replace("_", " ")
        label = label.format(place=shown or "K") if "{place}" in label else ", ".join(filter(None, [label, shown]))
        if method not in looks:
            looks[method] = known or next(spare)
            look = looks[method]
        else:  # a further arm of the method keeps its colour; no other of it has its marker, while there are any left
            taken = {arm.look["marker"] for arm in found.values() if arm.method == method}
            look = next((each for each in style["others"] if each["marker"] not in taken), None) or next(spare)
            look = look | {"color": looks[method]["color"]}
        found[name] = Arm(name, method, place, label, look)
    return found


def method_of(name: str, known: Iterable[str]) -> str:
    return max((each for each in known if name == each or name.startswith(f"{each}_")), key=len, default=name)


def repeated(cells: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Which (arm, seed) occur more than once, in order: a table takes a seed of an arm once."""
    return [cell for cell, times in Counter(cells).items() if times > 1]


def place_of(name: str, style: dict) -> str:
    return name.removeprefix(method_of(name, style["arms"])).removeprefix("_")


def with_groups(asked: dict[str, Any], runs: Any) -> dict[str, Any]:
    """asked, with the group of each arm as the sweep's record has it, if it has any. runs: Study.runs or runs.csv."""
    return asked | {"group_of": dict(zip(runs["arm"], runs["group"]))} if "group" in runs else asked


def group_of(arm: Arm, asked: dict[str, Any]) -> str:
    """What names those that share text and budget: by the sweep's record, else the place if so declared; "" for all."""
    return asked["group_of"][arm.name] if "group_of" in asked else arm.place if asked.get("groups") else ""


def grouping(style: dict, asked: dict) -> Callable[[str], str]:
    """arm -> what names those that must share data and budget, where the sweep's record does not say."""
    return (lambda arm: place_of(arm, style)) if asked.get("groups") else (lambda arm: "")


def references(arms: dict[str, Arm], asked: dict[str, Any]) -> dict[str, str]:
    """arm -> the arm it is compared with. With same_place the one of the reference's method at the arm's own place, or
    without a place; else the one arm that declared.yaml names, or the first of the table if that is not in it. With
    recorded groups each group is a table of its own, whose reference may be any arm of the named one's method."""
    wanted = asked["reference"]
    if "group_of" in asked:
        one = {}
        for arm in sorted(arms.values(), key=lambda arm: (arm.name != wanted, arm.method != wanted)):
            one.setdefault(group_of(arm, asked), arm.name)
        pairs = {name: one[group_of(arm, asked)] for name, arm in arms.items()}
        return {name: reference for name, reference in pairs.items() if name != reference}
    at_place = {arm.place: arm.name for arm in arms.values() if arm.method == wanted}
    if not asked.get("same_place") or not at_place:
        one = wanted if wanted in arms else next(iter(arms))
        return {name: one for name in arms if name != one}
    pairs = {arm.name: at_place.get(arm.place, at_place.get("", arm.name)) for arm in arms.values()}
    return {name: reference for name, reference in pairs.items() if name != reference}


def timed_against(arms: dict[str, Arm], asked: dict[str, Any]) -> dict[str, str]:
    """arm -> the arm to whose loss its time is counted, that one with itself: of the method that declared.yaml
    names; where the table has none, the reference."""
    named = [name for name, arm in arms.items() if arm.method == asked["seconds_to"]]
    pairs = references(arms, asked | {"reference": asked["seconds_to"], "same_place": True} if named else asked)
    return {name: name for name in named or pairs.values()} | pairs
