"""Where a run's numbers come from: command, code, versions, device, data, model."""

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data.prepare import Prepared
from models.transformer import Transformer

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "numpy", "hydra-core", "wandb", "tokenizers", "safetensors")


def provenance(prepared: Prepared, model: Transformer, device: torch.device, precision: str) -> dict[str, Any]:
    """What provenance.json holds."""
    return {
        "command": sys.argv,
        "git": GIT | {"own": own_files(model, GIT["new"])},
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


def own_files(model: torch.nn.Module, new: dict[str, str]) -> str | None:
    """A digest of the new files that parts of the model are written in; None if all are the commit's."""
    named = {f"{base.__module__.replace('.', '/')}.py" for part in model.modules() for base in type(part).__mro__}
    return _digest("".join(f"{name}\n{new[name]}" for name in sorted(named & new.keys())))


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
