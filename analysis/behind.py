"""What stands behind a table: every run with its figures and origin, as runs.csv has it; the table is made of that."""

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from analysis import tuned
from analysis.arms import described, references, timed_against
from analysis.published import settings as published_settings
from analysis.runs import Found, Study, declared_same, read_study
from analysis.variation import noise_floor, over_documents

TEXTS = (
    "tuning",
    "folder",
    "listed",
    "same_code",
    "unlogged",
    "sweep",
    "scale",
    "sweep_command",
    "corpus",
    "id",
    "arm",
    "group",
    "outcome",
    "why",
    "flaws",
    "leaks",
    "code",
    "own_files",
    "device",
    "tuned",
    "knob",
)
TEXTS += ("data_fingerprint", "run_command", "commit", "dirty", "python", "versions", "precision", "dispatch")
SETTING = "config/"  # begins the columns of settings that differ among counted runs
OF_PAPER = "published/"  # begins those of settings that published rows name
COMPARED = (
    "data",
    "experts.num_shared",
    "model",
    "num_experts",
    "tokenizer",
    "train",
)  # what should be equal in a table
REPEATS = "noise_floor"  # the sweep of one run repeated
WANTED = ("command", "python", "versions", "precision", "dispatch", "threads")  # of provenance.json
NO_LEDGER = "no ledger at this scale: what was tuned is not known, for wandb has none"
NOT_COMPARED = ("data.cache", "data.folder", "train.micro_batch")  # where things lie, and how the same is computed


def behind(study: Study, folder: Path, results: Path, style: dict, asked: dict[str, Any]) -> pd.DataFrame:
    """with_origin, and what only run folders can tell."""
    runs = with_origin(study, folder, style)
    runs["noise_floor"] = (
        floor_of(study.counted) if study.name == REPEATS else known_floor(study.scale, folder, results)
    )
    if lines := unlogged(study, folder):
        runs["unlogged"] = "\n".join(lines)
    configs = {run: _config(study.found[run]) for run in study.counted["id"]}
    settings = {run: flat(config) for run, config in configs.items() if config}
    of_text = study.counted.set_index("id").loc[:, ["tokens", "data_fingerprint"]].to_dict("index")
    known = {run: own | of_text[run] for run, own in settings.items()}
    by_arm = {arm: [known.get(run, {}) for run in own["id"]] for arm, own in study.counted.groupby("arm")}
    arms = {arm: by_arm.get(arm, []) for arm in runs["arm"].unique()}
    unknown = NO_LEDGER if any(study.found[run].mirrored for run in configs) else ""
    runs["tuning"] = "; ".join(tuned.notes(results, study.scale, arms, folder)) or unknown
    for key in published_settings(asked.get("published", [])):
        runs[OF_PAPER + key] = [_text(settings[run].get(key)) if run in settings else "" for run in runs["id"]]
    for key in differing(settings):
        runs[SETTING + key] = [_text(settings[run].get(key)) if run in settings else "" for run in runs["id"]]
    runs["curve_tokens"] = study.curves["val/tokens"].max()  # of validations during training, which may read a part
    labels = described(runs["arm"], style)
    pairs, waited = references(labels, asked), seconds_to_loss(study, timed_against(labels, asked))
    runs["seconds_to_reference"] = [waited.get(run, np.nan) for run in runs["id"]]
    intervals = over_test_documents(study.counted, folder, pairs)
    for place, key in enumerate(("documents_low", "documents_high")):
        runs[key] = [intervals.get(arm, (np.nan, np.nan))[place] for arm in runs["arm"]]
    return runs


def with_origin(study: Study, folder: Path, style: dict) -> pd.DataFrame:
    """study.runs in job order, with columns for the sweep, its text and the runs' origin."""
    runs = study.runs.copy()
    runs["listed"] = study.listed
    corpus = study.config["data"]["corpus"]
    text = style["corpora"].get(corpus["_target_"], corpus["_target_"]).format(**corpus)
    runs["sweep"], runs["scale"], runs["sweep_command"], runs["corpus"] = study.name, study.scale, study.command, text
    if not folder.is_absolute() and folder != Path("runs"):  # nothing committed names a machine's folders
        runs["folder"] = str(folder)
    if whys := several_commits(study.counted):
        runs["same_code"] = "\n".join(whys)
    if "leaks" in runs:
        runs["leaks"] = [each if isinstance(each, str) else "; ".join(_listed(each)) for each in runs["leaks"]]
    origins = [
        origin(study.found[run].origin()) if kind == "finished" else {}
        for run, kind in zip(runs["id"], runs["outcome"])
    ]
    return pd.concat([runs, pd.DataFrame(origins, index=runs.index)], axis="columns")


def several_commits(counted: pd.DataFrame) -> list[str]:
    """A line for each declaration by which runs of several commits are counted together."""
    lines = []
    for each in declared_same():
        found = [commit for commit in each["commits"] if commit in set(counted["code"])]
        if len(found) > 1:
            lines.append(f"runs of commits {' and '.join(found)} count as of one code: {each['why']}")
    return lines


def unlogged(study: Study, folder: Path) -> list[str]:
    """A line for what is not known of counted runs, in wandb or in their folders: of how many, and what."""
    lacks = Counter()
    for run in study.counted["id"]:
        found = study.found[run]
        missing = [key for key in WANTED if not found.origin().get(key)]
        missing += [] if _config(found) else ["config"]
        missing += [] if len(found.metrics.curve()) else ["validations during training"]
        missing += [] if (folder / run / "evaluation.safetensors").exists() else ["losses of single test documents"]
        if missing:
            lacks["read from wandb, which lacks of" if found.mirrored else "not kept of", ", ".join(missing)] += 1
    of = len(study.counted)
    return [f"{where} {count} of {of} counted runs: {keys}" for (where, keys), count in lacks.items()]


def write(runs: pd.DataFrame, path: Path) -> None:
    """Floats in full: what is read back is the same bits."""
    runs.to_csv(path, index=False, lineterminator="\n")


def read(path: Path) -> pd.DataFrame:
    """What write wrote. ValueError if it is no such file."""
    if not path.is_file():
        raise ValueError(f"{path} is no runs.csv of a report: there is no such file")
    columns = pd.read_csv(path, nrows=0).columns
    if missing := {"sweep", "scale", "id", "arm", "seed", "outcome", "test/ce"} - set(columns):
        raise ValueError(f"{path} is no runs.csv of a report: it has no column {sorted(missing)[0]}")
    texts = [column for column in columns if column in TEXTS or column.startswith((SETTING, OF_PAPER))]
    runs = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in columns.difference(texts, sort=False):
        runs[column] = [_number(value) for value in runs[column]]
    return runs


def origin(said: dict[str, Any]) -> dict[str, Any]:
    """The columns of what provenance.json says; {} if that is not there."""
    if not said:
        return {}
    versions = " ".join(f"{name}={version}" for name, version in said.get("versions", {}).items())
    git = {key: said["git"].get(key) or "" for key in ("commit", "dirty")}
    plain = {key: said.get(key, "") for key in ("python", "precision", "dispatch", "threads")}
    documents = said.get("data", {}).get("splits", {}).get("test", {}).get("documents")
    told = {} if documents is None else {"test_documents": documents}
    return {"run_command": " ".join(said.get("command", [])), "versions": versions} | git | plain | told


def flat(node: Any, place: str = "") -> dict[str, Any]:
    """{"train.lr": 0.002, ...}; a list is a leaf."""
    if not isinstance(node, dict):
        return {place: node}
    return {
        key: value for name, part in node.items() for key, value in flat(part, f"{place}.{name}".strip(".")).items()
    }


def differing(settings: dict[str, dict[str, Any]]) -> list[str]:
    """Keys of what should be equal in a table and is not, in order."""
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    asked = [key for key in keys if key.startswith(COMPARED) and key not in NOT_COMPARED]
    return [key for key in asked if len({_text(each.get(key)) for each in settings.values()}) > 1]


def of_published(runs: pd.DataFrame) -> dict[str, dict[str, str]]:
    """arm -> the values that its counted runs have of the settings that published rows name."""
    counted = runs.loc[runs["outcome"] == "finished"]
    keys = [column for column in runs if column.startswith(OF_PAPER)]
    return {
        str(arm): {key.removeprefix(OF_PAPER): " and ".join(own[key].unique()) for key in keys}
        for arm, own in counted.groupby("arm")
    }


def seconds_to_loss(study: Study, of: dict[str, str]) -> dict[str, float]:
    """By run: training seconds, at its tokens per second, until its validation loss was that of another arm's last
    validation with the same seed, between validations by a straight line; infinite if it never was, absent without both
    curves or a rate. of: arm -> that one.
    """
    curves = {key: curve.sort_values("step") for key, curve in study.curves.groupby(["arm", "seed"])}
    found = {}
    for run in study.counted.to_dict("records"):
        own = curves.get((run["arm"], run["seed"]))
        other = curves.get((of.get(run["arm"], ""), run["seed"]))
        if own is not None and other is not None and (rate := run.get("tokens_per_second")):
            step = _crossing(own["step"], own["val/ce"], other["val/ce"].iloc[-1])
            found[run["id"]] = step * run["tokens"] / run["step"] / rate
    return found


def _crossing(steps: Any, losses: Any, wanted: float) -> float:
    x, y = steps.to_numpy(float), losses.to_numpy(float)
    if not (y <= wanted).any():
        return np.inf
    at = int(np.argmax(y <= wanted))
    if at == 0:
        return x[0]
    return float(x[at] - (x[at] - x[at - 1]) * (wanted - y[at]) / (y[at - 1] - y[at]))


def over_test_documents(counted: pd.DataFrame, folder: Path, pairs: dict[str, str]) -> dict[str, tuple[float, float]]:
    """By arm: the interval over test documents of its difference to the reference, in nats per token, over the seeds
    that both have; absent where the sums are not there."""
    sums = {(run["arm"], run["seed"]): _sums(folder / run["id"]) for run in counted.to_dict("records")}
    found = {}
    for arm, reference in pairs.items():
        seeds = [seed for one, seed in sums if one == arm and sums.get((reference, seed)) and sums[one, seed]]
        if seeds:
            own, others = (np.mean([sums[each, seed][0] for seed in seeds], axis=0) for each in (arm, reference))
            found[arm] = over_documents(own, sums[arm, seeds[0]][1], others)
    return found


def _sums(folder: Path) -> tuple[np.ndarray, ...]:
    """Of the test documents: loss sums in nats, and tokens; () if they are not there."""
    path = folder / "evaluation.safetensors"
    if not path.exists():
        return ()
    with safe_open(path, "np") as file:
        return file.get_tensor("test/document_ce_sum"), file.get_tensor("test/document_tokens")


def floor_of(counted: pd.DataFrame) -> float:
    """What two runs of one config may differ by, from such runs alone; in nats per token."""
    return noise_floor(counted.loc[:, "test/ce"])


def known_floor(scale: str, folder: Path, results: Path) -> float:
    """floor_of the repeats of this scale that lie beside the runs; without two of them, of the runs.csv of a report on
    repeats in results; NaN if there is neither."""
    floor = np.nan
    if (folder / "sweeps" / f"{REPEATS}.json").exists():
        with suppress(ValueError):  # none has finished
            study = read_study(REPEATS, folder)
            floor = floor_of(study.counted) if study.scale == scale else np.nan
    path = results / scale / REPEATS / "runs.csv"
    if floor == floor or not path.exists():
        return floor
    runs = read(path)
    return floor_of(runs.loc[runs["outcome"] == "finished"])


def _config(found: Found) -> dict[str, Any]:
    with suppress(FileNotFoundError):
        return found.config()
    return {}


def _number(text: str) -> Any:
    """What was written, to the last bit; pandas' own parser gives that in some versions alone."""
    if not text:
        return np.nan
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _listed(value: Any) -> list[str]:
    return list(value) if isinstance(value, list | tuple) else []


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value
