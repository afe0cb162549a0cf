"""Classes named by _target_: which are allowed, and their options typed by their own annotations."""

import dataclasses
import functools
import importlib
import inspect
import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

PACKAGES = ("routers", "models", "data")
SIMPLE = [kind for plain in (bool, int, float, str) for kind in (plain, plain | None)]


def target(node: dict[str, Any], skip: int = 0, place: str = "") -> tuple[type, dict[str, Any]]:
    """The class that node's _target_ names and node's other keys, typed by the class's own annotations.

    skip: how many of its first parameters come from the caller, and cannot come from node. place: the key of the config
    that node stands at. A key that is a node with a _target_ of its own becomes that class with its options given, as a
    function of the same first parameters.
    Raises ValueError for a class that does not exist and for keys or types that its constructor does not take.
    """
    path, given = node["_target_"], {key: value for key, value in node.items() if key != "_target_"}
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_ {path} does not exist: {error}") from error
    if not inspect.isclass(found):
        raise ValueError(f"_target_ must name a class; {path} is none")
    parameters = dict(list(inspect.signature(found, eval_str=True).parameters.items())[skip:])
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in given:
            raise ValueError(f"{path} needs the option {key}")
    for key in given:
        if key not in parameters:
            raise ValueError(f"{path} has no option {key}; it takes {', '.join(parameters) or 'none'}")
    kinds = [(key, parameters[key].annotation) for key in given]
    typed = [(key, kind if kind in SIMPLE else Any) for key, kind in kinds]  # the class checks the rest itself
    schema = OmegaConf.structured(dataclasses.make_dataclass(name, typed))
    try:
        options = OmegaConf.to_container(OmegaConf.merge(schema, given))
    except OmegaConfBaseException as error:
        raise ValueError(f"{place or path}.{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(options, dict)
    for key, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{place or path}.{key} must be finite; got {value}")
    return found, {str(key): _with_classes(value, skip, f"{place or path}.{key}") for key, value in options.items()}


def classes(node: Any) -> Iterator[type]:
    """Of all _target_s in the node, however deep."""
    if isinstance(node, dict):
        if node.get("_target_") is not None:
            module, _, name = node["_target_"].rpartition(".")
            yield getattr(importlib.import_module(module), name)
        for value in node.values():
            yield from classes(value)


def _with_classes(value: Any, skip: int, place: str) -> Any:
    """Nodes with a _target_ as functions, however deep in dictionaries."""
    if not isinstance(value, dict):
        return value
    if "_target_" in value:
        inner, options = target(value, skip, place)
        return functools.partial(inner, **options)
    return {key: _with_classes(each, skip, f"{place}.{key}") for key, each in value.items()}


def check_targets(node: Any, place: str, packages: tuple[str, ...]) -> None:
    """Only classes of these packages may be named, wherever _target_ stands."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "_target_" and value is not None and str(value).split(".")[0] not in packages:
            rule = f"must be a class of {', '.join(packages)} (see extra_packages)"
            raise ValueError(f"{place}_target_ {rule}; got {value}")
        check_targets(value, f"{place}{key}.", packages)


def one_line(error: Exception) -> str:
    """An error of Hydra or OmegaConf as one line: the key first, then what is wrong with it. Others say all themselves,
    whatever caused them."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as key=value, nor with -m as key=a,b (a value with blanks needs quotes)"
        )
    if said := _unknown(error):
        return said
    theirs = isinstance(error, HydraException | OmegaConfBaseException)
    text = f"{error}\n{(theirs and error.__cause__) or ''}".split("Config search path:")[0]
    lines: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if not any(line in earlier for earlier in lines):  # the cause often says the same again
            lines.append(line)
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        name = missing[1] if "resolving interpolation" in text else key or missing[1]
        return f"{name} has no default and must be given: {name}=..."
    noise = ("full_key:", "object_type=", "reference_type=", "To append to your config", "Set the environment")
    lines = [line for line in lines if not line.startswith(noise)]
    text = " ".join(lines) if lines else type(error).__name__
    return f"{key}: {text}" if key and key not in text else text


def _unknown(error: Exception) -> str:
    """Of a setting or an option that is not there the one that is most like it, or all beside it. "" for what is
    another error."""
    inner = error.__cause__ if str(error).startswith("Could not override") else error  # which says it of an added key
    parent, key = getattr(inner, "parent_node", None), str(getattr(inner, "full_key", ""))
    if isinstance(inner, ConfigAttributeError | ConfigKeyError) and isinstance(parent, DictConfig):
        place, dot, name = key.rpartition(".")
        known = [str(each) for each in parent if each != "_target_"]
        near = [f"{place}{dot}{each}" for each in get_close_matches(name, known, 2, 0.7)]
        there = f"there are {', '.join(known)}" if known else f"{place}, as chosen here, has none"
        how = f"did you mean {' or '.join(near)}?" if near else there
        return f"there is no setting {key}; {how}"
    option = re.search(r"Could not find '([^']+)/([^'/]*)'", str(error))
    known = re.findall(r"^\t(\S+)$", str(error), re.MULTILINE)
    if option is None or f"options in '{option[1]}'" not in str(error):  # of a folder in a group Hydra lists the group
        return ""
    near = get_close_matches(option[2], known, 1)
    how = f"did you mean {option[1]}={near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{option[1]}={option[2]} is not there; {how}"
