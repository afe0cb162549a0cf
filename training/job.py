"""One job: name its folder, train or resume, evaluate, write the result."""

import json
import math
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig

from data.dictionary_files import find_dictionary
from data.mixed_batches import MixedSplit, open_split, training_batches
from data.prepare import Prepared
from data.splits import SPLITS
from training import checkpoint
from training.build import open_data, source_length
from training.folder import held, is_finished, write_atomically
from training.identity import digest_of
from training.loop import Diverged, Interrupted, Trainer, stop_requests
from training.preflight import check_model, read
from training.provenance import require_same_files
from training.recorder import Recorder
from training.run import Run
from training.session import Session, open_session
from training.settings import Settings
from training.start import earlier, require_same_dictionary, require_same_positions, take_dictionary
from training.targets import classes
from training.tuning import tuned_elsewhere

FINISHED, FAILED, DIVERGED, INTERRUPTED = 0, 1, 3, 75  # exit statuses; 75: it has left a checkpoint and can go on


def open_run(
    settings: Settings, planned: Sequence[Run] = (), open_data: Callable[[Settings], Prepared] = open_data
) -> Run:
    """Prepare the data if need be and name the folder. planned: the sweep's earlier jobs, one of which may make the run
    that this one starts from or reads. open_data: training.build.find_data prepares none.

    Raises ValueError for unusable data, for another dictionary than that of the run it starts from, and for a router
    whose own file was edited after the run was begun.
    """
    if settings.train.init_from is not None:
        take_dictionary(settings, planned)
    prepared = open_data(settings)
    if settings.router.get("baseline"):
        _take_baseline(settings, prepared, planned)
    source_length(settings, prepared)  # which dialogues do not take
    if settings.train.init_from is not None:
        require_same_positions(settings, prepared, planned)
    check_model(settings, prepared.vocab_size)  # a dictionary of words has its size from the text
    length, packing = settings.data.sequence_length, settings.data.packing
    splits = {name: open_split(prepared, name, length, packing) for name in SPLITS}
    if settings.train.epochs is not None:
        windows = settings.train.epochs * splits["train"].full
        settings.train.steps = max(1, math.ceil(windows / settings.train.batch_size))
    folder = _folder(settings, digest_of(settings, prepared.fingerprint), planned)
    require_same_files(folder, classes(settings.router), settings.extra_packages)
    return Run(settings, prepared, splits, folder)


def _take_baseline(settings: Settings, prepared: Prepared, planned: Sequence[Run]) -> None:
    """router.baseline becomes a folder, of a run that was trained on this data; or, where this run starts from another
    one whose tables were drawn from it, with this dictionary. ValueError if it was not."""
    baseline = settings.router["baseline"]
    if maker := earlier(baseline, planned):
        settings.router["baseline"] = str(maker.folder)
        checkpoint.require_same_tokens(maker.folder, maker.prepared.fingerprint, prepared)
    elif settings.train.init_from is not None:
        require_same_dictionary(find_dictionary(baseline), prepared.folder, f"router.baseline={baseline}")
    else:
        checkpoint.require_same_data(Path(baseline), prepared)


def _folder(settings: Settings, digest: str, planned: Sequence[Run]) -> Path:
    """Of the run with this id: where an earlier job has it, else one on the disk, under this arm's name or, if there is
    none, any other's."""
    runs = Path(settings.runs).expanduser().absolute()
    own = runs / f"{settings.arm}-s{settings.seed}-{digest}"
    made = [run.folder for run in planned if run.folder.name.endswith(f"-{digest}")]
    others = [] if own.exists() else sorted(runs.glob(f"*-s{settings.seed}-{digest}"))
    return next(iter([*made, *others]), own)


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
        except Exception as error:  # whatever failed, its traceback is kept and the exit status says so
            trace, said = traceback.format_exc(), in_a_line(error)
            if trace.splitlines()[-1] != said:  # the queue and reports read the last one
                trace += f"{said}\n"
            (opened.folder / "error.txt").write_text(trace)
            print(f"failed: {said} (traceback: {opened.folder / 'error.txt'})")
            return FAILED


def in_a_line(error: Exception) -> str:
    """Its type, and the first two lines of what it says: the first may be a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *filter(None, [" ".join(lines[:2])])])


def _train(opened: Run) -> int:
    began, settings, folder = time.perf_counter(), opened.settings, opened.folder
    session = open_session(opened)
    write_atomically(folder / "config.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))
    write_atomically(folder / "provenance.json", json.dumps(session.origin, indent=1))
    again = (folder / "metrics.jsonl").exists()
    with stop_requests() as stop, Recorder(settings, folder, session.progress) as recorder:
        recorder.say(_announcement(session, again))
        outcome = _outcome(session, recorder, stop)
        result = outcome | _figures(session) | {"seconds": time.perf_counter() - began}
        recorder.conclude(result, session.origin)
        write_atomically(folder / "result.json", json.dumps(result, indent=1))
        checkpoint.prune(folder / "checkpoints", settings.record.keep_weights, settings.record.keep_optimizer)
        if result["outcome"] == "diverged":
            return DIVERGED
        recorder.say(_conclusion(result, folder))
        return FINISHED


def _outcome(session: Session, recorder: Recorder, stop: list[int]) -> dict[str, Any]:
    """Trains to the end: the held-out figures, or that the run diverged. Raises Interrupted as the loop does."""
    settings, model, progress = session.run.settings, session.model, session.progress

    def watch(split: str, share: float) -> None:
        recorder.watch(f"{split}: {share:.0%} evaluated")

    def watch_and_stop(split: str, share: float) -> None:
        if stop:
            raise Interrupted
        watch(split, share)

    def validate() -> None:  # a later one is finished, for going on after its step would leave it out
        recorder.log(session.validate(watch if progress.step else watch_and_stop))

    batches = training_batches(session.run.splits["train"], settings.train.batch_size, settings.seed)
    loop = settings, model, session.losses, session.optimizer, batches, progress
    try:
        trainer = Trainer(*loop, recorder.log, validate, session.save, stop)
        trainer.train()
        try:
            return {"outcome": "finished"} | session.held_out(watch_and_stop)
        except Interrupted:
            if not trainer.keeps_last():
                session.save()
            raise
    except (Diverged, FloatingPointError) as diverged:
        recorder.say(f"diverged: {diverged}")
        progress.step = getattr(diverged, "step", progress.step + 1)
        return {"outcome": "diverged"}


def _announcement(session: Session, again: bool) -> str:
    """What trains, where and on how much. again: it was begun before."""
    settings, counts, progress = session.run.settings, session.origin["parameters"], session.progress
    windows, split = settings.train.steps * settings.train.batch_size, session.run.splits["train"]
    filled = split.tokens_per_epoch / (split.full * split.length)
    padding = f" ({1 - filled:.1%} padding)" if filled < 1 else ""
    trained = "" if counts["trained"] == counts["total"] else f", {counts['trained']:,} trained"
    part, whole = settings.record.validation_windows, len(session.run.splits["validation"])
    seen = f"; validations during training read {part:,} of {whole:,} windows" if part and part < whole else ""
    start = f", starting from {settings.train.init_from}" if settings.train.init_from else ""
    each = split.epochs(windows).items() if isinstance(split, MixedSplit) else ()
    parts = f" ({', '.join(f'{name} {epochs:.2f}' for name, epochs in each)})" if each else ""
    on_cpu = session.device.type == "cpu" and settings.scale != "smoke"
    slow = f"; scale={settings.scale} is made for a GPU, a step may take minutes here" if on_cpu else ""
    plain = ", not compiled" if settings.train.compile and not session.origin["compiled"] else ""
    elsewhere = tuned_elsewhere(settings, session.run.prepared.fingerprint)
    return (
        f"{settings.arm}, seed {settings.seed}: {session.run.folder}{start}\n"
        f"  {counts['active']:,} active of {counts['total']:,} parameters{trained} on {session.device}, dispatch "
        f"{session.origin['dispatch']}{plain}; {windows * split.length:,} tokens{padding}, {windows / split.full:.2f} "
        f"epochs{parts}; dictionary of {session.run.prepared.vocab_size:,} entries{seen}"
        + slow
        + (f"; going on after step {progress.step}" if progress.step else "")
        + ("; begun before, without a checkpoint: from the start" if again and not progress.step else "")
        + (f"\n  {elsewhere}" if elsewhere else "")
    )


def _figures(session: Session) -> dict[str, Any]:
    """The result's figures besides the held-out ones."""
    settings, progress, counts = session.run.settings, session.progress, session.origin["parameters"]
    lines = [json.loads(line) for line in (session.run.folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_gpu, early = session.device.type == "cuda", settings.train.patience is not None
    per_step = settings.train.batch_size * settings.data.sequence_length
    return {
        "step": progress.step,
        **({"best_step": progress.best_step} if early else {}),
        "tokens": progress.step * per_step,
        "token_budget": settings.train.steps * per_step,
        "train_seconds": progress.seconds,
        "evaluate_seconds": session.evaluate_seconds,
        # the first rate holds start-up and compiling
        "tokens_per_second": statistics.median(rates[1:] or rates) if rates else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else resident,
        **{f"parameters/{name}": counts[name] for name in ("active", "total", "trained")},
        "train_flops_per_token": session.origin["train_flops_per_token"],
        "data_fingerprint": session.run.prepared.fingerprint,
        "vocab_size": session.run.prepared.vocab_size,
        "leaks": sorted({leak for router in session.model.routers.values() for leak in router.leaks}),
    }


def _conclusion(result: dict[str, Any], folder: Path) -> str:
    best = f" of step {result['best_step']}, the best" if "best_step" in result else ""
    return (
        f"finished{best}: perplexity {result['val/perplexity']:.2f} on validation ({result['val/ce']:.4f} nats), "
        f"{result['test/perplexity']:.2f} on test ({result['test/ce']:.4f} nats); {folder}"
    )
