"""Checkpoints: new directories, complete or absent, and found to be damaged when they are.

A checkpoint is checkpoints/<step>/ with model.safetensors, optimizer.safetensors, with early stopping also
best.safetensors, of sparse models assigned.safetensors, with state.json, and a manifest of digests written last.
Nothing else follows training: tables are buffers, and noise and order are functions of (seed, step), so there is no
generator to save.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.prepare import Prepared
from data.records import file_digest
from models.transformer import Transformer
from training.build import make_model, open_data
from training.folder import WEIGHTS, is_finished, sync, write_atomically
from training.preflight import read
from training.settings import Settings

MANIFEST = "manifest.json"
KEPT = ("best", "assigned")  # what else a session goes on with: see session.Session
CPU = torch.device("cpu")


def save(checkpoints: Path, step: int, files: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write checkpoints/<step>/ and verify it, then drop the older ones. files: name -> tensors; state: JSON.

    An intact one of this step stays as it is: a run's steps have one outcome, and no moment is without a checkpoint.
    Raises OSError if it cannot be written (safetensors' and torch's own errors included) or reads back differently.
    """
    folder, partial = checkpoints / f"{step:08d}", checkpoints / f"{step:08d}.partial"
    if is_intact(folder):
        return folder
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, tensors in files.items():
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step} | state))
        manifest = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        for path in partial.iterdir():
            sync(path)
        write_atomically(partial / MANIFEST, json.dumps(manifest))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        sync(checkpoints)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"cannot write a checkpoint to {folder}: {error}") from error
    if not is_intact(folder):
        raise OSError(f"the checkpoint {folder} reads back differently from what was written")
    for older in checkpoints.iterdir():
        if older != folder:
            shutil.rmtree(older)
    return folder


def is_intact(folder: Path) -> bool:
    """Every file of the manifest is there with its digest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return bool(manifest) and all(file_digest(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def latest(checkpoints: Path, warn: Any = print) -> Path | None:
    """The newest intact checkpoint, None if there never was one. Raises ValueError if there are only damaged ones."""
    folders = sorted((p for p in checkpoints.glob("*") if p.is_dir() and p.name.isdigit()), reverse=True)
    for folder in folders:
        if is_intact(folder):
            return folder
        warn(f"warning: checkpoint {folder} is damaged and passed over")
    if folders:
        raise ValueError(f"every checkpoint in {checkpoints} is damaged; delete the folder to start the run anew")
    return None


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: <name>/<what>."""
    named = ((name, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state)
    return {f"{name}/{what}": value for name, state in named for what, value in state.items()}


def fit(model: nn.Module, path: Path) -> None:
    """Load these weights in place. Raises ValueError if they do not fit."""
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {' '.join(str(error).split())}") from error


def weights_of(folder: Path) -> Path:
    """The file of a run's last weights, router buffers included; with early stopping of its best ones. Raises
    ValueError if it has none, or if they are damaged."""
    last = latest(folder / "checkpoints")
    if last is not None:
        return next(last / name for name in WEIGHTS if (last / name).exists())
    if not is_finished(folder):
        remedy = "the command that began it goes on with it"
        raise ValueError(f"{folder} is not finished and has saved no weights yet; {remedy}")
    why = "it was made without record.keep_weights=true, or comes from a pack"
    remedy = f"python -m training.again {quote(str(folder))} record.keep_weights=true trains it once more, into again/"
    raise ValueError(f"{folder} has no weights, as {why}; {remedy}")


def restore(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Load model and optimizer in place; returns the state, and by name those of KEPT that are there. Raises
    ValueError if the tensors do not fit."""
    fit(model, folder / "model.safetensors")
    tensors = load_file(folder / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        parts = {key.removeprefix(f"{name}/"): v for key, v in tensors.items() if key.startswith(f"{name}/")}
        # fused AdamW keeps its step counter on the parameter's device
        optimizer.state[parameter] = {what: value.to(parameter.device) for what, value in parts.items()}
    files = {name: folder / f"{name}.safetensors" for name in KEPT}
    kept = {name: load_file(file) for name, file in files.items() if file.exists()}
    return json.loads((folder / "state.json").read_text()), kept


def prune(checkpoints: Path, keep_weights: bool, keep_optimizer: bool) -> None:
    """What stays of a finished run: everything, the weights (of the best validation, if they were kept), or nothing."""
    for folder in [] if keep_optimizer else checkpoints.glob("*"):
        if keep_weights:
            manifest = json.loads((folder / MANIFEST).read_text())
            last = {"model.safetensors"} if "best.safetensors" in manifest else set()
            goes = {"optimizer.safetensors", "assigned.safetensors"} | last
            kept = {name: digest for name, digest in manifest.items() if name not in goes}
            write_atomically(folder / MANIFEST, json.dumps(kept))
            for name in goes:
                (folder / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder)


class LoadedRun(NamedTuple):
    model: Transformer  # in evaluation mode, with the final weights
    settings: Settings
    prepared: Prepared  # data and tokenizer
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl
    result: dict[str, Any]  # {} if the run is not finished


def require_same_data(folder: Path, prepared: Prepared) -> None:
    """Raises ValueError if the run was trained on other tokens, and so with another dictionary."""
    require_same_tokens(folder, json.loads((folder / "provenance.json").read_text())["data"]["fingerprint"], prepared)


def require_same_tokens(folder: Path, trained_on: str, prepared: Prepared) -> None:
    """The same, of a run whose data has the fingerprint trained_on."""
    if trained_on != prepared.fingerprint:
        rule = "another corpus or dictionary than this one"
        raise ValueError(f"{folder} was trained on data {trained_on[:12]}, {rule}, {prepared.fingerprint[:12]}")


def load_baseline(settings: Settings, device: torch.device) -> Transformer | None:
    """The trained model that router.baseline names, frozen; None if there is none. Raises ValueError as load_run does,
    and if its sequences are shorter."""
    if not settings.router.get("baseline"):
        return None
    run = load_run(settings.router["baseline"], device)
    baseline = run.model.requires_grad_(False)
    reads = [(s.model.encoder_layers > 0, s.data.source_length) for s in (settings, run.settings)]
    if reads[0] != reads[1]:
        rule = "must read what this model reads (model.encoder_layers, data.source_length)"
        raise ValueError(f"router.baseline {rule}; {settings.router['baseline']} does not")
    if baseline.sequence_length < settings.data.sequence_length:
        rule = f"must see sequences of data.sequence_length = {settings.data.sequence_length}"
        raise ValueError(f"router.baseline {rule}; {settings.router['baseline']} sees {baseline.sequence_length}")
    return baseline


def load_run(folder: str | Path, device: torch.device = CPU) -> LoadedRun:
    """A run from its folder; of one that is not finished standard error says so, and of which step its weights are.

    Raises ValueError if it is no run, has no weights, or its data is another now.
    """
    folder = Path(folder)
    for name in ("config.yaml", "provenance.json", "metrics.jsonl"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is no run folder: it has no {name}")
    weights = weights_of(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["train"]["init_from"] = None  # where it started need not be there any more
    settings = read(DictConfig(config))
    prepared = open_data(settings)
    require_same_data(folder, prepared)
    model = make_model(settings, prepared, device, load_baseline(settings, device)).to(device)
    fit(model, weights)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text()) if is_finished(folder) else {}
    if not result:
        state = json.loads((weights.parent / "state.json").read_text())
        step = state["best_step" if weights.name == "best.safetensors" else "step"]
        print(f"{folder} is not finished: its weights are of step {step} of {settings.train.steps}", file=sys.stderr)
    return LoadedRun(model.eval(), settings, prepared, lines, result)
