"""Train a finished run once more and compare: python -m training.again RUN [--into again] [OVERRIDES]

From its config.yaml, into a folder of its own under --into. Overrides are keys of that file, for what lies elsewhere on
this machine: data.cache=..., data.folder=... (with which the files of data.corpus go) or 'data.corpus.files=...'.
Says what differs in its origin, and how far the losses lie apart: exit status 1 if by more than --tolerance, which on
one kind of GPU should be that of a run and its repeat (the noise floor that reports print); on a CPU with as many
threads the same commit gives the same bits.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from training.arguments import number
from training.folder import is_finished
from training.job import open_run, run
from training.preflight import read
from training.targets import one_line
from training.threads import start_again_to_wait_briefly

TOLERANCE = 0.015  # nats: of pairs of a run and its repeat at scale=small on an H200, 95 % differ by less

# Of provenance.json, beside the commit and the versions.
ORIGIN = ("device", "python", "threads", "precision", "deterministic", "dispatch")


def main(words: list[str] | None = None) -> int:
    args = options(words)
    before = args.run.expanduser()
    if not is_finished(before):
        raise ValueError(f"{before} is no finished run: there is nothing to compare with")
    said = json.loads((before / "provenance.json").read_text())
    config = config_of(before, args.overrides, args.into)
    opened = open_run(read(config))
    if opened.folder.resolve() == before.resolve():
        raise ValueError(f"--into must be another folder than the run's own; got {args.into}")
    if opened.prepared.fingerprint != said["data"]["fingerprint"]:
        short = opened.prepared.fingerprint[:12], said["data"]["fingerprint"][:12]
        raise ValueError(f"the text is another one: its fingerprint is {short[0]}..., that of the run {short[1]}...")
    torch.set_num_threads(said.get("threads") or torch.get_num_threads())  # on which bits depend
    if status := run(config):
        return status
    for line in differing(said, json.loads((opened.folder / "provenance.json").read_text())):
        print(line)
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (before, opened.folder))
    apart = {split: second[f"{split}/ce"] - first[f"{split}/ce"] for split in ("val", "test")}
    for split, nats in apart.items():
        print(f"{split}: {first[f'{split}/ce']:.4f} then, {second[f'{split}/ce']:.4f} now, {nats:+.2g} nats")
    within = max(map(abs, apart.values())) <= args.tolerance
    print(f"{'within' if within else 'NOT within'} the tolerance of {args.tolerance:g} nats")
    return 0 if within else 1


def options(words: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("run", type=Path, metavar="RUN", help="a run folder, or one unpacked from a pack")
    made.add_argument("--into", default="again", help="the folder of runs that it is trained into")
    made.add_argument("--tolerance", type=number(float, 0), default=TOLERANCE, help="nats (default: %(default)s)")
    args, args.overrides = made.parse_known_args(words)
    if strange := [word for word in args.overrides if "=" not in word or word.startswith("-")]:
        made.error(f"unknown: {' '.join(strange)}")
    return args


def config_of(folder: Path, overrides: list[str], into: str) -> DictConfig:
    """The run's config with these keys changed. Raises ValueError for one that it does not have."""
    config = OmegaConf.create(yaml.safe_load((folder / "config.yaml").read_text()))
    for word in overrides:
        key = word.partition("=")[0]
        if OmegaConf.select(config, key, throw_on_missing=False, default=config) is config:
            raise ValueError(f"{folder / 'config.yaml'} has no key {key}")
    given = OmegaConf.from_dotlist([*overrides, f"runs={into}", "wandb.mode=disabled"])
    before, after = (str(OmegaConf.select(each, "data.folder") or "") for each in (config, given))
    if before and after:
        config.data.corpus = moved(OmegaConf.to_container(config.data.corpus), before, after)
    changed = OmegaConf.merge(config, given)
    assert isinstance(changed, DictConfig)
    return changed


def moved(node: Any, before: str, after: str) -> Any:
    """A corpus with its files in another folder: where the config was composed they took it from data.folder."""
    if isinstance(node, dict):
        return {key: moved(each, before, after) for key, each in node.items()}
    if isinstance(node, list):
        return [moved(each, before, after) for each in node]
    inside = isinstance(node, str) and (Path(node) == Path(before) or Path(before) in Path(node).parents)
    return str(Path(after) / Path(node).relative_to(before)) if inside else node


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines of what is another in two runs' origins, and may move bits."""
    one, other = (
        {"commit": said["git"]["commit"][:10]} | {key: said.get(key) for key in ORIGIN} | said["versions"]
        for said in (then, now)
    )
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    lines = [f"another {key}: {one.get(key)} then, {other.get(key)} now" for key in keys]
    return lines + ["the code is not its commit's"] * (now["git"]["dirty"] is not None)


if __name__ == "__main__":
    start_again_to_wait_briefly()
    try:
        sys.exit(main())
    except (ValueError, OSError, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
