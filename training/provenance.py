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
        "git": GIT,
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


def git_state() -> dict[str, str | None]:
    """The commit, and a digest of what differs from it; committed results aside, which no run reads."""
    commit = _git("rev-parse", "HEAD")
    difference = _git("diff", "HEAD", "--", ".", ":!results", ":!*.md")
    for name in _git("ls-files", "--others", "--exclude-standard", "--", "*.py", "*.yaml").splitlines():
        difference += f"\nnew file {name}\n{(ROOT / name).read_text()}"
    dirty = hashlib.sha256(difference.encode()).hexdigest()[:12] if difference else None
    return {"commit": commit or "unknown", "dirty": dirty, "diff": difference or None}


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
