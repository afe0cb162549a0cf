"""One job: name its folder, train or resume, evaluate, write the result."""

import json
import math
import resource
import statistics
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from data.batches import Split, TrainingBatches
from data.prepare import Prepared
from training import checkpoint
from training.build import choose_device, make_losses, make_model, open_data, precision
from training.evaluation import evaluate, mean_ce
from training.folder import held, is_finished, require_space
from training.loop import Diverged, Interrupted, Progress, Trainer, stop_requests
from training.optimizer import make_optimizer
from training.preflight import read
from training.provenance import provenance
from training.recorder import Recorder
from training.settings import Settings, digest_of

FINISHED, FAILED, DIVERGED, INTERRUPTED = 0, 1, 3, 75  # exit statuses; 75: it has left a checkpoint and can go on


@dataclass(frozen=True)
class Run:
    """A run as settings and data, with the folder that belongs to it."""

    settings: Settings
    prepared: Prepared
    splits: dict[str, Split]
    folder: Path


def open_run(settings: Settings) -> Run:
    """Prepare the data if need be and name the folder. Raises ValueError for unusable data."""
    prepared = open_data(settings)
    splits = {name: Split(prepared, name, settings.data.sequence_length) for name in prepared.tokens}
    name = f"{settings.arm}-s{settings.seed}-{digest_of(settings, prepared.fingerprint)}"
    return Run(settings, prepared, splits, Path(settings.runs).expanduser().absolute() / name)


def run(config: DictConfig) -> int:
    """Do one job and return its exit status; a failure's traceback is in the folder's error.txt.

    Raises ValueError, before any training, for what is wrong with settings, data or folders.
    """
    opened = open_run(read(config))
    if is_finished(opened.folder):
        print(f"{opened.folder} is finished already: nothing to do")
        return FINISHED
    with held(opened.folder):
        (opened.folder / "error.txt").unlink(missing_ok=True)
        try:
            return _train(opened)
        except Interrupted:
            print(f"stopped; the same command goes on with {opened.folder}")
            return INTERRUPTED
        except Exception:  # whatever failed, its traceback is kept and the exit status says so
            trace = traceback.format_exc()
            (opened.folder / "error.txt").write_text(trace)
            print(f"failed: {trace.splitlines()[-1]} (traceback: {opened.folder / 'error.txt'})")
            return FAILED


def _train(opened: Run) -> int:
    settings, prepared, folder = opened.settings, opened.prepared, opened.folder
    began, device = time.perf_counter(), choose_device(settings)
    model = make_model(settings, prepared, device).to(device)
    optimizer = make_optimizer(model, settings.train)
    checkpoints = folder / "checkpoints"
    require_space(
        folder, 7 * sum(p.numel() * p.element_size() for p in model.parameters())
    )  # two, three times as large
    last = checkpoint.latest(checkpoints)
    progress = Progress(**checkpoint.restore(last, model, optimizer)) if last else Progress()
    origin = provenance(prepared, model, device, precision(settings, device))
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    checkpoint.write_atomically(folder / "provenance.json", json.dumps(origin, indent=1))
    losses = make_losses(settings, model, device)
    micro = settings.train.micro_batch or settings.train.batch_size
    sums: dict[str, dict[str, Tensor]] = {}  # of the latest evaluation of each split

    def measure(split: str, as_in_training: bool = False) -> float:
        measured = evaluate(model, losses, opened.splits[split], micro, prepared.token_counts, as_in_training)
        if not math.isfinite(mean_ce(measured)):
            raise Diverged(progress.step)
        sums.setdefault(split, {}).update({} if as_in_training else measured)
        return mean_ce(measured)

    def save() -> None:
        files = {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(model, optimizer)}
        checkpoint.save(checkpoints, progress.step, files, asdict(progress))

    with stop_requests() as stop, Recorder(settings, folder, progress.step) as recorder:
        recorder.say(f"{settings.arm}, seed {settings.seed}: {folder}")
        tokens = settings.train.steps * settings.train.batch_size * settings.data.sequence_length
        counts, path = origin["parameters"], origin["dispatch"]
        recorder.say(
            f"  {counts['active']:,} active of {counts['total']:,} parameters on {device}, dispatch {path}; "
            f"{tokens:,} tokens, {tokens / prepared.splits['train']['tokens']:.2f} epochs"
            + (f"; going on after step {progress.step}" if progress.step else "")
        )
        trainer = Trainer(
            settings,
            model,
            losses,
            optimizer,
            batches=TrainingBatches(opened.splits["train"], settings.train.batch_size, settings.seed),
            progress=progress,
            log=lambda values: recorder.log(progress, values),
            evaluate=lambda: recorder.log(progress, {"val/ce": measure("validation")}),
            checkpoint=save,
            stop=stop,
        )
        result: dict[str, Any] = {"outcome": "finished"}
        try:
            trainer.train()
            for name, split in (("val", "validation"), ("test", "test")):
                ce = measure(split)
                result |= {
                    f"{name}/ce": ce,
                    f"{name}/perplexity": math.exp(ce),
                    f"{name}/tokens": int(sums[split]["tokens"]),
                }
                result[f"{name}/unigram_entropy"] = prepared.splits[split]["unigram_entropy"]
                if any(router.trains_differently for router in model.routers.values()):
                    result[f"{name}/ce_as_in_training"] = measure(split, as_in_training=True)
            tensors = {f"{split}/{name}": value for split, values in sums.items() for name, value in values.items()}
            save_file(tensors, folder / "evaluation.safetensors")
        except (Diverged, FloatingPointError) as diverged:
            recorder.say(f"diverged: {diverged}")
            result, progress.step = {"outcome": "diverged"}, getattr(diverged, "step", progress.step + 1)
        lines = [line for line in recorder.lines() if "tokens_per_second" in line]
        rates = [line["tokens_per_second"] for line in lines[1:] or lines]  # the first holds start-up and compiling
        on_gpu = device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        result |= {
            "step": progress.step,
            "tokens": progress.step * settings.train.batch_size * settings.data.sequence_length,
            "seconds": time.perf_counter() - began,
            "train_seconds": progress.seconds,
            "tokens_per_second": statistics.median(rates) if rates else None,
            "peak_memory_bytes": peak,
            "parameters/active": origin["parameters"]["active"],
            "parameters/total": origin["parameters"]["total"],
            "train_flops_per_token": origin["train_flops_per_token"],
            "data_fingerprint": prepared.fingerprint,
        }
        recorder.mirror.guarded(lambda run: run.summary.update(result))
        checkpoint.prune(checkpoints, settings.record.keep_weights, settings.record.keep_optimizer)
        checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1))
        if result["outcome"] == "diverged":
            return DIVERGED
        recorder.say(
            f"finished: perplexity {result['val/perplexity']:.2f} on validation ({result['val/ce']:.4f} nats), "
            f"{result['test/perplexity']:.2f} on test ({result['test/ce']:.4f} nats); {folder}"
        )
        return FINISHED
