"""One job: name its folder, train or resume, evaluate, write the result."""

import json
import math
import resource
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from data.batches import Split, TrainingBatches
from data.prepare import Prepared
from models.transformer import Transformer
from training import checkpoint
from training.build import choose_device, make_losses, make_model, open_data, precision
from training.evaluation import evaluate, mean_ce, text_figures
from training.folder import held, is_finished, require_space
from training.loop import Diverged, Interrupted, Progress, Trainer, stop_requests
from training.optimizer import make_optimizer
from training.preflight import check_routers, read
from training.provenance import provenance
from training.recorder import Recorder
from training.settings import Settings, digest_of

FINISHED, FAILED, DIVERGED, INTERRUPTED = 0, 1, 3, 75  # exit statuses; 75: it has left a checkpoint and can go on


class Run(NamedTuple):
    """A run as settings and data, with the folder that belongs to it."""

    settings: Settings
    prepared: Prepared
    splits: dict[str, Split]
    folder: Path


def open_run(settings: Settings) -> Run:
    """Prepare the data if need be and name the folder. Raises ValueError for unusable data."""
    prepared = open_data(settings)
    if settings.router.get("baseline"):
        checkpoint.require_same_data(Path(settings.router["baseline"]), prepared)
    check_routers(settings, prepared.vocab_size)  # a dictionary of words has its size from the text
    length, packing = settings.data.sequence_length, settings.data.packing
    splits = {name: Split(prepared, name, length, packing) for name in prepared.tokens}
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
    train, began, device = settings.train, time.perf_counter(), choose_device(settings)
    model = make_model(settings, prepared, device, checkpoint.load_baseline(settings, device)).to(device)
    optimizer, losses = make_optimizer(model, train), make_losses(settings, model, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    require_space(folder, 7 * weights)  # for two checkpoints, each three times as large
    checkpoints = folder / "checkpoints"
    last = checkpoint.latest(checkpoints)
    progress = Progress(**checkpoint.restore(last, model, optimizer)) if last else Progress()
    origin = provenance(prepared, model, device, precision(settings, device))
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    checkpoint.write_atomically(folder / "provenance.json", json.dumps(origin, indent=1))

    def measure(split: str, as_in_training: bool = False) -> dict[str, Tensor]:
        micro = train.micro_batch or train.batch_size
        sums = evaluate(model, losses, opened.splits[split], micro, prepared.token_counts, as_in_training)
        if not math.isfinite(mean_ce(sums)):
            raise Diverged(progress.step)
        return sums

    def save() -> None:
        files = {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(model, optimizer)}
        checkpoint.save(checkpoints, progress.step, files, asdict(progress))

    with stop_requests() as stop, Recorder(settings, folder, progress) as recorder:

        def validate() -> None:
            recorder.log({"val/ce": mean_ce(measure("validation"))})

        counts, per_step = origin["parameters"], train.batch_size * settings.data.sequence_length
        split = opened.splits["train"]
        epochs = train.steps * train.batch_size / split.full  # of windows, each once an epoch
        filled = split.tokens_per_epoch / (split.full * split.length)
        dictionary = f"; dictionary of {prepared.vocab_size:,} entries"
        padding = f" ({1 - filled:.1%} padding)" if filled < 1 else ""
        recorder.say(f"{settings.arm}, seed {settings.seed}: {folder}")
        recorder.say(
            f"  {counts['active']:,} active of {counts['total']:,} parameters on {device}, dispatch "
            f"{origin['dispatch']}; {train.steps * per_step:,} tokens{padding}, {epochs:.2f} epochs{dictionary}"
            + (f"; going on after step {progress.step}" if progress.step else "")
        )
        batches = TrainingBatches(opened.splits["train"], train.batch_size, settings.seed)
        try:
            Trainer(settings, model, losses, optimizer, batches, progress, recorder.log, validate, save, stop).train()
            result = {"outcome": "finished"} | _held_out(opened, model, measure)
        except (Diverged, FloatingPointError) as diverged:
            recorder.say(f"diverged: {diverged}")
            result, progress.step = {"outcome": "diverged"}, getattr(diverged, "step", progress.step + 1)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        result |= {
            "step": progress.step,
            "tokens": progress.step * per_step,
            "seconds": time.perf_counter() - began,
            "train_seconds": progress.seconds,
            # the first rate holds start-up and compiling
            "tokens_per_second": statistics.median(rates[1:] or rates) if rates else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident,
            "parameters/active": counts["active"],
            "parameters/total": counts["total"],
            "train_flops_per_token": origin["train_flops_per_token"],
            "data_fingerprint": prepared.fingerprint,
            "vocab_size": prepared.vocab_size,
            "leaks": sorted({leak for router in model.routers.values() for leak in router.leaks}),
        }
        recorder.mirror(lambda run: run.summary.update(result))
        checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1))
        checkpoint.prune(checkpoints, settings.record.keep_weights, settings.record.keep_optimizer)
        if result["outcome"] == "diverged":
            return DIVERGED
        recorder.say(
            f"finished: perplexity {result['val/perplexity']:.2f} on validation ({result['val/ce']:.4f} nats), "
            f"{result['test/perplexity']:.2f} on test ({result['test/ce']:.4f} nats); {folder}"
        )
        return FINISHED


def _held_out(opened: Run, model: Transformer, measure: Callable[..., dict[str, Tensor]]) -> dict[str, Any]:
    """The result's figures of validation and test; what they are made of goes into evaluation.safetensors."""
    result, tensors = {}, {}
    for name, split in (("val", "validation"), ("test", "test")):
        sums = measure(split)
        ce = mean_ce(sums)
        result |= {f"{name}/ce": ce, f"{name}/perplexity": math.exp(ce), f"{name}/tokens": int(sums["tokens"])}
        text = opened.prepared.splits[split]
        result[f"{name}/unigram_entropy"] = text["unigram_entropy"]
        result |= {f"{name}/{key}": value for key, value in text_figures(ce, text).items()}
        if any(router.trains_differently for router in model.routers.values()):
            result[f"{name}/ce_as_in_training"] = mean_ce(measure(split, as_in_training=True))
        tensors |= {f"{split}/{key}": value for key, value in sums.items()}
    save_file(tensors, opened.folder / "evaluation.safetensors")
    return result
