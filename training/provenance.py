"""Where a run's numbers come from: command, code, versions, device, data, model."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.prepare import Prepared
from models.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "numpy", "hydra-core", "wandb", "tokenizers", "safetensors")


def provenance(
    prepared: Prepared, model: Transformer, device: torch.device, precision: str, packages: Iterable[str] = ()
) -> dict[str, Any]:
    """What provenance.json holds. packages: of routers that stand outside this repository."""
    new = new_files(packages)
    return {
        "command": sys.argv,
        "git": GIT | {"new": new, "own": own_files(model, new)},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "dispatch": model.path if model.routers else "none",
        "data": {
            "fingerprint": prepared.fingerprint,
            "cache_key": prepared.folder.name,
            "vocab_size": prepared.vocab_size,
            "splits": prepared.splits,
            "parts": {
                part.name: {
                    "share": part.share,
                    "fingerprint": part.prepared.fingerprint,
                    "splits": part.prepared.splits,
                }
                for part in prepared.parts
            },
        },
        "parameters": model.parameter_counts(),
        "train_flops_per_token": model.train_flops_per_token(),
    }


def git_state() -> dict[str, Any]:
    """The commit, a digest of what differs from it in the files that it has (committed results aside, which no run
    reads), that difference, and the new files: name -> text. Only a run that names a new file can use one."""
    commit, difference = _git("rev-parse", "HEAD"), _git("diff", "HEAD", "--", ".", ":!results", ":!*.md")
    names = _git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml").splitlines()
    new = {name: (ROOT / name).read_text() for name in names}
    return {"commit": commit or "unknown", "dirty": _digest(difference), "diff": difference or None, "new": new}


def new_files(packages: Iterable[str] = ()) -> dict[str, str]:
    """The files that no commit has and that a run might be of, name -> text: git_state's, and those of the packages, as
    far as they are loaded."""
    loaded = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
    own = {name: file for name, file in loaded.items() if name.partition(".")[0] in packages and file.endswith(".py")}
    return GIT["new"] | {f"{name.replace('.', '/')}.py": Path(file).read_text() for name, file in own.items()}


def written_in(classes: Iterable[type]) -> set[str]:
    """The files of classes and of what they inherit from, as their modules name them."""
    return {f"{base.__module__.replace('.', '/')}.py" for each in classes for base in each.__mro__}


def own_files(model: torch.nn.Module, new: dict[str, str]) -> str | None:
    """A digest of the new files that parts of the model are written in; None if all are the commit's."""
    named = written_in(type(part) for part in model.modules())
    return _digest("".join(f"{name}\n{new[name]}" for name in sorted(named & new.keys())))


def require_same_files(folder: Path, classes: Iterable[type], packages: Iterable[str]) -> None:
    """ValueError if the folder's run was begun with another text of a new file that these classes are written in."""
    if not (folder / "provenance.json").exists():
        return
    then, now = json.loads((folder / "provenance.json").read_text())["git"].get("new", {}), new_files(packages)
    for name in sorted(written_in(classes) & then.keys() & now.keys()):
        if then[name] != now[name]:
            keep = "remove that folder to train it again, or keep it and name another one for runs="
            raise ValueError(f"{name} has changed since {folder} was begun: {keep}")


def _digest(text: str) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest()[:12] if text else None


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


GIT = git_state()  # of the code as it was loaded: a tree edited later did not run


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
