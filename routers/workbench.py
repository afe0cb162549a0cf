"""The table workbench: python -m routers.tables build | audit | export OVERRIDES, which are those of run.py.

build --out FILE [--layer L]    draws the table of the first sparse layer, or of L; router.table=file reads it
audit [--layer L] [--all]       prints what the tables do to the corpus; --all: the load of every expert
export --out FILE [--layer L]   writes layers.<layer>.tid2eid (V, k) of all tables, or tid2eid of L: DeepSeek-V4's form
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.prepare import Prepared
from routers.audit import card
from routers.features import Token
from routers.hash import Lookup
from training.build import open_data, router_maker, whole_split
from training.checkpoint import CPU, load_baseline, require_same_data
from training.compose import composed
from training.preflight import read
from training.settings import Settings
from training.targets import one_line

USAGE = "python -m routers.tables build|audit|export router=NAME [overrides] [--out FILE] [--layer L] [--all]"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; usage: {USAGE}")


def main(words: list[str] | None = None) -> None:
    """Exit status 2, after one line on standard error, for bad input."""
    parser = Parser(
        usage=USAGE, description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("build", "audit", "export"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--all", action="store_true")
    try:
        run(parser.parse_intermixed_args(words))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (HydraException, OmegaConfBaseException, SafetensorError, ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def run(asked: argparse.Namespace) -> None:
    out: Path | None = asked.out
    if (out is None) != (asked.command == "audit"):
        raise ValueError("audit prints and takes no --out" if out else f"{asked.command} needs --out FILE")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ValueError(f"--out must be a file in a folder that exists; got {out}")
    if asked.all and asked.command != "audit":
        raise ValueError(f"--all is of audit; {asked.command} does not take it")
    settings = read(composed(asked.overrides))
    prepared, lookups = tables_of(settings, asked.layer, asked.command == "build")
    layer, lookup = next(iter(lookups.items()))
    if asked.command == "audit":
        batches_of = partial(whole_split, settings, prepared)
        print(card(settings.arm, prepared.fingerprint, lookups, asked.all, batches_of))
        return
    assert out is not None
    if asked.command == "build":
        write(out, {"tid2eid": lookup.table}, settings, prepared, lookup, str(layer))
        return
    if not isinstance(lookup.feature, Token):
        rule = "export needs router.feature=token: tid2eid is looked up by the id of the input token"
        raise ValueError(f"{rule}; got {lookup.feature_name}")
    if lookup.segments > 1:
        raise ValueError(f"export writes whole experts; router.num_hashes={lookup.segments} cuts them into segments")
    tensors = {f"layers.{layer}.tid2eid": lookup.table for layer, lookup in lookups.items()}
    if asked.layer is not None:
        tensors = {"tid2eid": lookup.table}
    write(out, tensors, settings, prepared, lookup, ",".join(str(layer) for layer in lookups))


def tables_of(settings: Settings, layer: int | None, first: bool) -> tuple[Prepared, dict[int, Lookup]]:
    """The data, and sparse layer -> its table's router: of this layer alone, of the first, or of all that have one.

    Raises ValueError if there is none, and as the data, the routers and the baseline do.
    """
    layers = sorted(settings.model.sparse_layers)
    if layer is not None and layer not in layers:
        raise ValueError(f"--layer must be one of model.sparse_layers = {layers}; got {layer}")
    if settings.router.get("_target_") is None:
        raise ValueError(f"router={settings.arm} has no table: its FFNs are plain")
    prepared = open_data(settings)
    if settings.router.get("baseline"):
        require_same_data(Path(settings.router["baseline"]), prepared)
    router, lookups = router_maker(settings, prepared, load_baseline(settings, CPU)), {}
    for place in layers if layer is None else [layer]:
        lookup = next((part for part in router(place).modules() if isinstance(part, Lookup)), None)
        if lookup is not None:
            lookups[place] = lookup
        if lookups and first:
            break
    if not lookups:
        raise ValueError(
            f"router={settings.arm} has no table in {'a sparse layer' if layer is None else f'layer {layer}'}"
        )
    return prepared, lookups


def write(
    out: Path, tensors: dict[str, Tensor], settings: Settings, prepared: Prepared, lookup: Lookup, layers: str
) -> None:
    """The whole file or nothing, with what it was drawn from as metadata."""
    metadata = {"feature": lookup.feature_name, "table": lookup.name, "layer": layers}
    metadata |= {"num_experts": str(settings.num_experts), "seed": str(settings.table_seed)}
    metadata |= {"data_fingerprint": prepared.fingerprint}
    partial = out.with_name(out.name + ".partial")
    try:
        save_file({name: table.contiguous() for name, table in tensors.items()}, partial, metadata)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    shape = " x ".join(f"{size:,}" for size in lookup.table.shape)
    print(f"{out}: {', '.join(tensors)}, {shape} (keys x experts of a key), {settings.num_experts} experts")
