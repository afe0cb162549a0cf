"""One job: name its folder, train or resume, evaluate, write the result."""

import json
import math
import resource
import statistics
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
from models.transformer import Transformer
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
        except Exception:
            trace = traceback.format_exc()
            (opened.folder / "error.txt").write_text(trace)
            print(f"failed: {trace.splitlines()[-1]} (traceback: {opened.folder / 'error.txt'})")
            return FAILED


def _train(opened: Run) -> int:
    settings, prepared, folder = opened.settings, opened.prepared, opened.folder
    device = choose_device(settings)
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
    validated: dict[int, dict[str, Tensor]] = {}

    def sums(split: str, as_in_training: bool = False) -> dict[str, Tensor]:
        return evaluate(model, losses, opened.splits[split], micro, prepared.token_counts, as_in_training)

    def validate(step: int) -> None:
        validated.clear()
        validated[step] = sums("validation")
        if not math.isfinite(mean_ce(validated[step])):
            raise Diverged(step)
        recorder.log(progress, {"val/ce": mean_ce(validated[step])})

    def save() -> None:
        files = {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(model, optimizer)}
        checkpoint.save(checkpoints, progress.step, files, asdict(progress))

    with stop_requests() as stop, Recorder(settings, folder, progress.step) as recorder:
        recorder.start(model, prepared, device, progress.step)
        batches = TrainingBatches(opened.splits["train"], settings.train.batch_size, settings.seed)
        log = lambda line: recorder.log(progress, line)  # noqa: E731
        trainer = Trainer(settings, model, losses, optimizer, batches, progress, log, validate, save, stop)
        try:
            if progress.step == 0:
                validate(0)
            trainer.train()
        except Diverged as diverged:
            recorder.say(f"diverged: {diverged}")
            return _finish(opened, model, recorder, {"outcome": "diverged", "step": diverged.step}, {}, origin)
        final = {"validation": validated.get(progress.step) or sums("validation"), "test": sums("test")}
        result = {"outcome": "finished", "step": progress.step} | _figures(final, prepared)
        if any(router.trains_differently for router in model.routers.values()):
            for name, split in (("val", "validation"), ("test", "test")):
                result[f"{name}/ce_as_in_training"] = mean_ce(sums(split, as_in_training=True))
        return _finish(opened, model, recorder, result, final, origin)


def _figures(final: dict[str, dict[str, Tensor]], prepared: Prepared) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, split in (("val", "validation"), ("test", "test")):
        ce = mean_ce(final[split])
        figures |= {f"{name}/ce": ce, f"{name}/perplexity": math.exp(ce), f"{name}/tokens": int(final[split]["tokens"])}
        figures[f"{name}/unigram_entropy"] = prepared.splits[split]["unigram_entropy"]
    return figures


def _finish(
    opened: Run,
    model: Transformer,
    recorder: Recorder,
    result: dict[str, Any],
    final: dict[str, dict[str, Tensor]],
    origin: dict[str, Any],
) -> int:
    """Write evaluation and result, prune the checkpoints. Returns the exit status."""
    settings, folder = opened.settings, opened.folder
    lines = [line for line in recorder.lines() if "tokens_per_second" in line]
    rates = [line["tokens_per_second"] for line in lines[1:] or lines]  # the first holds start-up and compiling
    on_gpu = model.embedding.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = settings.train.batch_size * settings.data.sequence_length
    result |= {
        "tokens": result["step"] * tokens,
        "seconds": recorder.seconds(),
        "train_seconds": lines[-1]["seconds"] if lines else 0.0,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "peak_memory_bytes": peak,
        "parameters/active": origin["parameters"]["active"],
        "parameters/total": origin["parameters"]["total"],
        "train_flops_per_token": origin["train_flops_per_token"],
        "data_fingerprint": opened.prepared.fingerprint,
    }
    if final:
        tensors = {
            f"{split}/{name}": value.contiguous() for split, sums in final.items() for name, value in sums.items()
        }
        save_file(tensors, folder / "evaluation.safetensors")
        recorder.say(
            f"finished: perplexity {result['val/perplexity']:.2f} on validation ({result['val/ce']:.4f} nats), "
            f"{result['test/perplexity']:.2f} on test ({result['test/ce']:.4f} nats); {folder}"
        )
    recorder.summarise(result)
    checkpoint.prune(folder / "checkpoints", settings.record.keep_weights, settings.record.keep_optimizer)
    checkpoint.write_atomically(folder / "result.json", json.dumps(result, indent=1))
    return FINISHED if final else DIVERGED
