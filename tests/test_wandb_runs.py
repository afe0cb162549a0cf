"""Runs from wandb: what training logged comes back as from the run's folder, also after a kill, and counts once."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, compose_config, tiny_words
from wandb.errors import CommError

from analysis.behind import read as read_table
from analysis.offline_files import read_file, read_offline
from analysis.report import report
from analysis.runs import read_study
from analysis.wandb_runs import mirrors
from training.job import FINISHED, run
from training.loop import Progress
from training.preflight import read
from training.recorder import Recorder


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A sweep of two runs, one of them deeper, mirrored offline."""
    runs = tmp_path_factory.mktemp("mirrored")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs)
    for own in (["router=dense"], ["router=hash_random", "model.depth_factor=2"]):
        config = compose_config(*words, *own, "wandb.mode=offline")
        config.sweep = "pair"
        assert run(config) == FINISHED
    files = list(runs.glob("*/wandb/*/*.wandb"))
    until = time.time() + 60  # finish() may return a moment before wandb's own process has written all
    while any(read_file(file).state != "finished" for file in files) and time.time() < until:
        time.sleep(0.1)
    names = sorted(path.parent.name for path in runs.glob("*/result.json"))
    record = {"sweep": "pair", "scale": "smoke", "command": ["python", "run.py"], "runs": names}
    (runs / "sweeps").mkdir()
    (runs / "sweeps" / "pair.json").write_text(json.dumps(record))
    return runs


@pytest.fixture
def wandb_alone(trained, tmp_path) -> Path:
    """The same runs of which nothing but wandb's files is left."""
    for path in trained.glob("*/wandb"):
        shutil.copytree(path, tmp_path / "left" / path.parent.name / "wandb")
    return tmp_path / "left"


LEDGER = """scale,arm,trial,lr,knob,value,seed,val_ce,run,chosen,at_edge,outcome,unchanged,tokens,data_fingerprint
smoke,dense,0,0.5,,,100,5.0,dense-s100-00000000,True,False,finished,False,{tokens},{data_fingerprint}
"""


def same(one, other) -> None:
    """The two studies say the same, but for the wall clock of a file's own."""
    pd.testing.assert_frame_equal(one.runs, other.runs)
    pd.testing.assert_frame_equal(one.curves, other.curves)
    assert one.config == other.config and one.scale == other.scale


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--offline .*nowhere is no folder"):
        mirrors("quickstart", tmp_path, tmp_path / "nowhere", None)


def test_what_training_logged_comes_back_from_the_offline_files_alone(trained, wandb_alone, tmp_path):
    expected = read_study("pair", trained)
    found = read_study("pair", wandb_alone, mirrors("pair", wandb_alone, wandb_alone, None))
    same(found, expected)
    assert set(found.runs["outcome"]) == {"finished"} and len(found.curves) == 2 * 3
    table = [tmp_path / name / "smoke" / "pair" / "table.csv" for name in ("one", "two")]
    unlisted = "cells that were first trained for another sweep are missing"
    assert unlisted not in " ".join(report("pair", trained, tmp_path / "one").split())
    printed = report("pair", wandb_alone, tmp_path / "two", mirrors("pair", wandb_alone, wandb_alone, None))
    assert unlisted in " ".join(printed.split())
    assert table[0].read_bytes() == table[1].read_bytes()


@pytest.mark.parametrize("online", [False, True])
def test_conditions_origin_and_tuning_are_told_as_from_folders_and_what_wandb_lacks_is(
    trained, wandb_alone, tmp_path, online
):
    def told(results: Path, runs: Path, places=(), ledger=True) -> tuple[list[str], pd.DataFrame]:
        if ledger:
            (results / "smoke" / "tune").mkdir(parents=True)
            (results / "smoke" / "tune" / "ledger.csv").write_text(LEDGER.format(**result))
        lines = report("pair", runs, results, places).splitlines()
        return lines, read_table(results / "smoke" / "pair" / "runs.csv")

    result = json.loads(next(trained.glob("dense-s0-*/result.json")).read_text())
    where = [None, "us/switchyard", Api(trained)] if online else [wandb_alone, None]
    places = mirrors("pair", wandb_alone, *where)
    (expected, rows), (found, mirrored) = told(tmp_path / "a", trained), told(tmp_path / "b", wandb_alone, places)
    said = ("not equal:", "dense: train.lr", "hash_random: ")
    assert [line for line in expected if line.startswith(said)] == [line for line in found if line.startswith(said)]
    assert "not equal: model.depth_factor is 1, but 2 of Hash, random" in found
    assert any(line.startswith("dense: train.lr=0.5 is the best of 1 trial ") for line in found)
    assert "NOT used here by 1 of 1 runs" in " ".join(" ".join(found).split())
    columns = ["id", "commit", "dirty", "device", *[column for column in rows if column.startswith("config/")]]
    pd.testing.assert_frame_equal(mirrored[columns], rows[columns])
    lacks = "command, python, versions, precision, dispatch, threads, losses of single test documents"
    assert f"read from wandb, which lacks of 2 of 2 counted runs: {lacks}" in " ".join(" ".join(found).split())
    assert "wandb" not in " ".join(expected)
    alone, _ = told(tmp_path / "c", wandb_alone, places, ledger=False)
    assert "no ledger at this scale: what was tuned is not known, for wandb has none" in alone


def test_every_line_of_the_metrics_comes_back(trained):
    for folder in trained.glob("*-s0-*"):
        logged = read_file(next(folder.glob("wandb/offline-run-*/*.wandb")))
        by_step = {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            by_step.setdefault(json.loads(line)["step"], {}).update(json.loads(line))
        assert [row["_step"] for row in logged.history] == list(by_step)
        assert [{k: v for k, v in row.items() if k[0] != "_"} for row in logged.history] == list(by_step.values())
        assert logged.summary["result"] == json.loads((folder / "result.json").read_text())


def test_a_run_in_two_places_counts_once_and_the_place_that_knows_more_counts(trained, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs)
    same(read_study("pair", runs, mirrors("pair", runs, runs, None)), read_study("pair", trained))
    for result in runs.glob("*/result.json"):  # as if the folder had been copied before the run ended
        result.unlink()
    found = read_study("pair", runs, mirrors("pair", runs, runs, None))
    assert len(found.runs) == 2 and set(found.runs["outcome"]) == {"finished"}


def test_a_file_cut_anywhere_gives_the_steps_before_the_cut(trained, tmp_path):
    path = next(trained.glob("dense-*/wandb/offline-run-*/*.wandb"))
    content, whole = path.read_bytes(), read_file(path)
    lengths = [0, 3, 7, 11, *range(100, len(content), len(content) // 40)]
    for length in lengths:
        cut = tmp_path / path.name
        cut.write_bytes(content[:length])
        part = read_file(cut) if length != 3 else None
        if part is not None:
            assert part.history == whole.history[: len(part.history)]
            assert part.summary.get("result") in (None, whole.summary["result"]) and part.state == "stopped"
    spoiled = bytearray(content)
    spoiled[len(content) * 4 // 5] ^= 1
    (tmp_path / path.name).write_bytes(spoiled)
    part = read_file(tmp_path / path.name)
    assert 0 < len(part.history) < len(whole.history) and part.flaws == [f"{tmp_path.name} is cut"]


LOGS_AND_IS_KILLED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = ["tests", "."]
from conftest import compose_config
from training.loop import Progress
from training.preflight import read
from training.recorder import Recorder

progress = Progress()
recorder = Recorder(read(compose_config(*sys.argv[2:])), Path(sys.argv[1]), progress)
for progress.step in range(1, 1001):
    recorder.log({"val/ce": 1 / progress.step, "text": "x" * 300})
time.sleep(2)  # wandb writes from a process of its own
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_a_killed_process_what_it_had_written_comes_back_and_of_its_resumption_the_rest(tiny, tmp_path):
    folder, words = tmp_path / "runs" / "dense-s0-0000000a", [*tiny, "wandb.mode=offline", "train.steps=2000"]
    folder.mkdir(parents=True)
    alone = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # which would outlive it
    command = [sys.executable, "-c", LOGS_AND_IS_KILLED, folder, *words]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True)
    assert done.returncode == -9, done.stderr
    killed = next(folder.glob("wandb/offline-run-*/*.wandb"))
    before = read_file(killed)
    assert 100 < len(before.history) < 1000 and before.state == "stopped"
    assert [row["val/ce"] for row in before.history] == [1 / step for step in range(1, len(before.history) + 1)]
    progress = Progress(step=50)
    with Recorder(read(compose_config(*words)), folder, progress) as recorder:
        for progress.step in range(51, 61):
            recorder.log({"val/ce": 2.0})
    both = read_offline(sorted(folder.glob("wandb/offline-run-*/*.wandb")))
    assert [row["_step"] for row in both.history] == list(range(1, 61))
    assert [row["val/ce"] for row in both.history] == [1 / step for step in range(1, 51)] + [2.0] * 10
    assert both.config["train"]["steps"] == 2000 and both.state == "finished"


class Api:
    """The shape of wandb.Api, as far as it is used, over what the offline files hold."""

    def __init__(self, runs: Path, spoil=lambda row: row):
        self.asked, self.found = [], []
        for path in sorted(runs.glob("*/wandb/offline-run-*/*.wandb")):
            logged = read_file(path)
            history = [spoil(row) for row in logged.history]
            self.found.append(
                SimpleNamespace(
                    id=logged.id,
                    config={key: value for key, value in logged.config.items() if key != "_wandb"},
                    summary_metrics=logged.summary,
                    state=logged.state,
                    scan_history=lambda history=history: iter(history),
                )
            )

    def runs(self, path, filters):
        self.asked.append((path, filters))
        ids = filters.get("name", {}).get("$in")
        return [each for each in self.found if ids is None or each.id in ids]


def test_a_project_on_the_server_gives_the_same_as_the_folders(trained, wandb_alone):
    api, expected = Api(trained), read_study("pair", trained)
    found = read_study("pair", wandb_alone, mirrors("pair", wandb_alone, None, "us/switchyard", api))
    same(found, expected)
    assert api.asked == [("us/switchyard", {"group": "pair"})]
    shutil.copytree(trained / "sweeps", wandb_alone / "sweeps")
    same(read_study("pair", wandb_alone, mirrors("pair", wandb_alone, None, "us/switchyard", api)), expected)
    assert api.asked[-1] == ("us/switchyard", {"name": {"$in": list(expected.runs["id"])}})


def test_what_the_server_writes_for_numbers_that_are_none_is_understood(trained, wandb_alone):
    api = Api(trained, lambda row: row | {"grad_norm": "NaN", "val/other": None})
    mirror = mirrors("pair", wandb_alone, None, "us/switchyard", api)[0]
    lines = next(iter(mirror.values()))().metrics.lines()
    assert math.isnan(lines[1]["grad_norm"]) and "val/other" not in lines[1]


def test_what_goes_wrong_with_the_server_is_one_line(wandb_alone):
    class Absent:
        def runs(self, path, filters):
            raise CommError("Could not find\nproject")

    with pytest.raises(ValueError, match="us/gone cannot be read: Could not find project"):
        mirrors("pair", wandb_alone, None, "us/gone", Absent())


def test_a_file_that_is_no_wandb_file_makes_its_run_unreadable(wandb_alone):
    path = next(wandb_alone.glob("dense-*/wandb/offline-run-*/*.wandb"))
    path.write_bytes(b"something else")
    found = mirrors("pair", wandb_alone, wandb_alone, None)[0][path.stem.removeprefix("run-")]()
    assert found.row["outcome"] == "unreadable" and "is no wandb file" in found.row["why"]
