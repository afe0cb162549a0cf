"""Runs that wandb has, in its offline files or in a project on its server, in the shape of run folders.

training.recorder mirrors each line of metrics.jsonl, of one step as one row, and at the end result.json and where the
figures come from as "result" and "origin" of the summary.
"""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analysis.metrics import Metrics
from analysis.offline_files import Logged, read_offline
from analysis.runs import Found, Mirror, identity, judged, read_record

NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}  # as the server gives them
OUTCOMES = {"running": "running", "failed": "failed"}  # of a run without a result; all else is stopped


def mirrors(name: str, runs: Path, offline: Path | None, project: str | None, api: Any = None) -> list[Mirror]:
    """The places besides run folders in which a sweep's runs are looked for.

    offline: a folder with offline files at any depth; project: entity/project; api: a wandb.Api. ValueError if the
    project cannot be read.
    """
    if offline is not None and not offline.is_dir():
        raise ValueError(f"--offline {offline} is no folder")
    places = [offline_mirror(offline)] if offline is not None else []
    if project is not None:
        known = (runs / "sweeps" / f"{name}.json").exists()
        listed = [cell["run"] for cell in read_record(name, runs).cells] if known else None
        places.append(online_mirror(project, name, listed, api))
    return places


def offline_mirror(folder: Path) -> Mirror:
    """What is under the folder, read when it is asked for."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("**/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name):
        files.setdefault(path.stem.removeprefix("run-"), []).append(path)
    return {
        run: functools.cache(lambda run=run, paths=paths: _found(run, lambda: read_offline(paths)))
        for run, paths in files.items()
    }


def online_mirror(project: str, name: str, listed: list[str] | None, api: Any = None) -> Mirror:
    """The project's runs that are listed, or else those of the group that the sweep's name is."""
    with as_value_error(project):
        if api is None:
            import wandb

            api = wandb.Api()
        chosen = {"group": name} if listed is None else {"name": {"$in": listed}}  # the server calls a run's id so
        runs = {run.id: run for run in api.runs(project, filters=chosen)}
    return {
        key: functools.cache(lambda key=key, run=run: _found(key, lambda: _download(run, project)))
        for key, run in runs.items()
    }


def _download(run: Any, project: str) -> Logged:
    with as_value_error(project):
        history = [
            {
                key: NOT_FINITE.get(value, value) if isinstance(value, str) else value
                for key, value in row.items()
                if value is not None
            }
            for row in run.scan_history()
        ]
        return Logged(run.id, dict(run.config), history, dict(run.summary_metrics), run.state)


@contextmanager
def as_value_error(project: str) -> Iterator[None]:
    """What goes wrong on the way to the server, in one line."""
    import requests
    from wandb.errors import Error

    try:
        yield
    except (Error, requests.RequestException, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"the wandb project {project} cannot be read: {why}") from error


def _found(name: str, read: Any) -> Found:
    row, metrics, logged = identity(name), Metrics([], []), Logged(name)
    try:
        logged = read()
        lines = [{key: value for key, value in each.items() if key[0] != "_"} for each in logged.history]
        metrics = Metrics([json.dumps(line) for line in lines], logged.flaws)
        row |= {"flaws": "; ".join(logged.flaws)}
        if "result" in logged.summary:
            row |= judged(logged.summary["result"], logged.summary["origin"])
        else:
            row |= {"outcome": OUTCOMES.get(logged.state, "stopped"), "why": metrics.progress()}
    except (ValueError, KeyError, OSError) as error:
        row |= {"outcome": "unreadable", "why": f"{type(error).__name__}: {error}"}
    config = {key: value for key, value in logged.config.items() if key[0] != "_"}
    return Found(row, metrics, lambda: config, lambda: logged.summary.get("origin", {}), mirrored=True)
