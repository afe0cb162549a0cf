"""Tuning by hand arithmetic: spaces, trials, what lies beyond an edge, and what a ledger chooses and gives."""

import csv
import json
import math
import shutil
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT, compose_config
from matplotlib.figure import Figure
from test_config import ARMS, run_py
from test_sweeps import plan_of

from analysis import ledger, tuned
from analysis import trials as trials_module
from analysis.arms import described
from analysis.report import report
from sweeps.composing import jobs_of
from sweeps.hydra_plugins.local_queue import record as write_record
from sweeps.plan import Plan
from training.build import open_data
from training.compose import composed
from training.identity import digest_of
from training.preflight import read
from training.tuning import Space, settle, space_of, tuned_elsewhere, value_at

SPACES = sorted(path.stem for path in (ROOT / "conf" / "tuning").glob("*.yaml"))


@pytest.mark.parametrize("name", SPACES)
def test_every_space_has_eight_trials_one_of_them_the_arm_as_it_is(name):
    space = space_of(name)
    assert name in ARMS and len(space.places()) == 8 and 1 in space.lr
    if space.knob:
        group, key = compose_config(f"router={name}", "runs=nowhere"), space.knob
        for part in key.split("."):
            group = group[part]
        assert group in space.values


def test_beyond_the_grid_its_ratio_goes_on():
    assert value_at([0.5, 1, 2, 4], 2) == 2
    assert [value_at([0.5, 1, 2, 4], place) for place in (-1, 4, 5)] == [0.25, 8, 16]
    assert value_at([0.01, 0.1], 2) == 1 and value_at([0.01, 0.1], -1) == 0.001


def test_what_is_no_log_grid_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("training.tuning.SPACES", tmp_path)
    (tmp_path / "one.yaml").write_text("lr: [1, 2, 3]\n")
    with pytest.raises(ValueError, match="must have rising log grids"):
        space_of("one")
    with pytest.raises(ValueError, match=r"there is no conf/tuning/none\.yaml"):
        space_of("none")


def test_the_best_at_an_edge_asks_for_its_neighbours_beyond():
    one = {(0,): 3.0, (1,): 2.9, (2,): 2.8}
    assert ledger.beyond(one) == [(3,)]
    assert ledger.beyond(one | {(3,): 2.85}) == []  # the best is inside now
    assert ledger.beyond({(0,): 2.7, (1,): 2.9}) == [(-1,)]
    assert ledger.beyond({(0,): math.inf, (1,): math.inf}) == []
    two = {(i, j): 3.0 - 0.1 * (i == 1) - 0.01 * j for i in range(4) for j in range(2)}
    assert ledger.beyond(two) == [(1, 2)]  # of two values of a knob one is always at an edge
    assert ledger.beyond(two | {(1, 2): 3.0}) == []
    corner = {(i, j): 3.0 + i + j for i in range(4) for j in range(2)}
    assert ledger.beyond(corner) == [(-1, 0), (0, -1)]
    many = {(i,): -float(i) for i in range(ledger.MOST)}
    assert ledger.beyond(many) == []  # the budget is spent


def write_trial(folder: Path, loss: float | None, **result) -> None:
    """One that ended: finished with this validation loss, or diverged at None."""
    folder.mkdir(parents=True)
    outcome = {"outcome": "diverged"} if loss is None else {"outcome": "finished", "val/ce": loss, "test/ce": loss}
    about = {"step": 9, "tokens": 90, "data_fingerprint": "same"}
    (folder / "result.json").write_text(json.dumps(outcome | about | result))
    origin = {"git": {"commit": "a" * 40, "dirty": None}, "device": "Some CPU"}
    (folder / "provenance.json").write_text(json.dumps(origin))
    corpus = {"_target_": "data.corpora.TextFiles", "files": "*.txt"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"corpus": corpus}}))


@pytest.fixture
def record(tmp_path):
    """Four trials of switch by two numbers, the best (1, 1) at 2.5 nats, at the knob's edge; dense settled at (1,)."""
    runs, cells = tmp_path / "runs", []
    losses = {"switch": {(0, 0): 2.9, (0, 1): 2.8, (1, 0): 2.6, (1, 1): 2.5, (2, 0): 2.7, (2, 1): 2.7}}
    losses["dense"] = {(0,): 3.0, (1,): 2.9, (2,): None}
    for arm, results in losses.items():
        for place, loss in results.items():
            name = f"{arm}-s100-{len(cells):08x}"
            write_trial(runs / name, loss)
            knob = {"knob": "router.load_balance_coef", "value": [0.01, 0.1][place[1]]} if len(place) > 1 else {}
            tuned = {"tuned": arm, "place": place, "lr": 0.001 * 2 ** place[0], "knob": None, "value": None} | knob
            label = "_".join([arm, "trial", *map(str, place)]) if any(place) else arm  # nothing changed at the first
            cells.append({"arm": label, "seed": 100, "run": name} | tuned)
    (runs / "sweeps").mkdir()
    (runs / "sweeps" / "tune.json").write_text(
        json.dumps({"scale": "smoke", "command": [], "cells": cells, "runs": []})
    )
    return runs


def test_the_ledger_chooses_the_settled_and_names_what_is_open(record, tmp_path):
    printed = ledger.write(record, tmp_path / "results", "tune")[1]
    assert "switch: the best of 6 lies at an edge, 1 more to try" in printed
    path = tmp_path / "results" / "smoke" / "tune" / "ledger.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [row["trial"] for row in rows if row["arm"] == "dense"] == ["0", "1", "2"]
    assert [(row["arm"], row["lr"], row["val_ce"]) for row in rows if row["chosen"] == "True"] == [
        ("dense", "0.002", "2.900000")
    ]
    assert [row["val_ce"] for row in rows if row["arm"] == "dense"][2] == "inf"  # diverged, and counted as tried
    text = {"tokens": 90, "data_fingerprint": "same"}
    runs = [{"train.lr": rate, "router.load_balance_coef": 0.1} | text for rate in (0.002, 0.002, 0.001)]
    arms = {"dense_1x": runs[:1], "dense": runs[1:2], "switch_64": runs, "base": []}
    tried = "dense: train.lr=0.002 is the best of 3 trials of the plain arm (validation, seed 100) with 2.900000 nats"
    assert tuned.notes(tmp_path / "results", "smoke", arms) == [
        f"{tried}, used",
        "switch: 6 trials of the plain arm (validation, seed 100) have ended, and nothing is chosen before all have",
        "base: not tuned",
    ]
    longer, untried = runs[0] | {"tokens": 180}, text | {"train.lr": 0.0015}
    not_used = (  # 3.0 nats at place 0, 2.9 at the one chosen, a diverged run at place 2; a rate that was never tried
        (runs, "NOT used here by 1 of 3 runs: theirs was 0.1000 nats worse"),
        ([text | {"train.lr": 0.004}], "NOT used here by 1 of 1 runs: theirs diverged"),
        ([untried], "NOT used here by 1 of 1 runs"),
        ([untried, *runs], "NOT used here by 2 of 4 runs"),
        ([runs[0], longer], "used, 1 of 2 runs are of another text or budget than the trials"),
        ([longer], "1 of 1 runs are of another text or budget than the trials"),
        ([{}], "of these runs not known"),
    )
    for dense, said in not_used:
        assert tuned.notes(tmp_path / "results", "smoke", {"dense": dense}) == [f"{tried}, {said}"]
    assert tuned.notes(tmp_path / "results", "small", arms) == []
    known = tuned.notes(tmp_path / "results", "smoke", {"dense_wider": runs, "dense_64": runs[:1]})
    assert known == ["dense_wider: not tuned", f"{tried}, used"]  # a router of its own, though dense is its beginning
    own = [run | {"tuned": str(path)} for run in runs[:1]]  # by a ledger of another scale's folder
    assert tuned.notes(tmp_path / "results", "small", {"dense": own}) == [f"{tried}, used"]
    path.write_text("scale,arm,chosen\nsmoke,dense,True\n")
    with pytest.raises(ValueError, match="ledger.csv is no ledger that can be read: it has no column "):
        tuned.notes(tmp_path / "results", "smoke", arms)


def test_the_report_of_trials_has_a_row_an_arm_and_comes_again_to_the_byte(record, tmp_path):
    printed = report("tune", record, tmp_path)
    folder = tmp_path / "smoke" / "tune"
    rows = [line.split("  ") for line in printed.splitlines() if line.startswith(("Dense", "Switch"))]
    switch, dense = ([cell.strip() for cell in row if cell.strip()] for row in rows)
    assert dense == ["Dense", "3", "0.002", "2.900", "3.000", "chosen"]
    assert switch == ["Switch", "6", "0.002", "router.load_balance_coef", "0.1", "2.500", "2.900", "more to try"]
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"ledger.csv", "runs.csv", "table.md", "table.tex", "table.csv", "figure.png", "figure.pdf"} == made.keys()
    report("tune", record, tmp_path)
    assert made == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_trials_that_failed_or_are_of_other_data_or_budget_choose_nothing_and_are_named(record, tmp_path):
    """The other data's loss is the lowest of its arm; without its best trial dense has its second as the best."""
    folders = {place: next(record.glob(f"{arm}-s100-*{place}")) for arm, place in (("switch", 3), ("dense", 7))}
    for place, other in ((3, {"data_fingerprint": "other"}), (7, {"outcome": "failed"})):
        shutil.rmtree(folders[place])
        write_trial(folders[place], 2.0, **other)
    (folders[7] / "result.json").unlink()
    (folders[7] / "error.txt").write_text("ValueError: no")
    printed = report("tune", record, tmp_path)
    rows = list(csv.DictReader((tmp_path / "smoke" / "tune" / "ledger.csv").read_text().splitlines()))
    assert {row["chosen"] for row in rows} == {"False"}
    assert [row["val_ce"] for row in rows if row["outcome"] not in ("finished", "diverged")] == ["", ""]
    table = (tmp_path / "smoke" / "tune" / "table.md").read_text()
    for text in (printed, table):
        assert f"does not count: {folders[3].name}, other data\ndoes not count: {folders[7].name}, failed" in text
    best = {
        row["method"]: row
        for row in csv.DictReader((tmp_path / "smoke" / "tune" / "table.csv").read_text().splitlines())
    }
    assert (best["Dense"]["lr"], best["Dense"]["val_ce"], best["Switch"]["val_ce"]) == ("0.001", "3", "2.6")


def test_an_arm_of_which_no_trial_has_ended_has_a_row_without_figures(record, tmp_path):
    for result in record.glob("dense-*/result.json"):
        result.unlink()
    dense = next(line for line in report("tune", record, tmp_path).splitlines() if line.startswith("Dense"))
    assert dense.split() == ["Dense", "0", "of", "3", "3", "to", "go"]


def drawn(draw, losses, chosen):
    """The figure of these losses by rate, an arm each; and its lines and stars."""
    figure = Figure()
    figure.subplots()
    arms = described([*losses, "base"], yaml.safe_load((ROOT / "analysis" / "style.yaml").read_text()))
    draw(figure, {arm: pd.Series(own) for arm, own in losses.items()}, arms, chosen)
    lines = figure.axes[0].get_lines()
    return figure.axes[0], [line for line in lines if line.get_marker() == "*"]


def test_a_loss_by_rate_is_the_best_knob_s_mean_over_seeds():
    """At 0.001 the knob's 0.1 has the lowest single loss and the worse mean; at 0.002 a seed diverged."""
    tried = [(0.001, 0.01, 3.0), (0.001, 0.01, 3.2), (0.001, 0.1, 2.8), (0.001, 0.1, 3.6), (0.002, 0.01, 2.0)]
    rows = pd.DataFrame([("switch", *row) for row in [*tried, (0.002, 0.01, math.inf)]])
    rows.loc[len(rows)] = ("dense", 0.001, math.nan, 3.5)
    rows.loc[len(rows)] = ("base", 0.001, math.nan, math.nan)  # has not ended
    found = trials_module.by_rate(rows.set_axis(["arm", "lr", "value", "val_ce"], axis="columns"))
    assert {arm: own.to_dict() for arm, own in found.items()} == {"switch": {0.001: 3.1}, "dense": {0.001: 3.5}}


def test_the_figure_of_few_arms_has_a_curve_an_arm_and_stars_at_the_best():
    losses = {
        "dense": {0.001: 3.4, 0.002: 3.2, 0.004: 3.3},
        "switch": {0.001: 3.0, 0.002: 3.1},
        "loss_free": {0.001: 9.0},
    }
    axes, stars = drawn(trials_module.curves, losses, {"dense"})
    assert [star.get_xydata().tolist() for star in stars] == [[[2.0, 3.2]], [[1.0, 3.0]]]  # thousandths, nats
    assert [star.get_markerfacecolor() == "white" for star in stars] == [False, True]
    assert axes.get_ylim() == pytest.approx((2.975, 3.41))  # a single rate is no curve, and moves no axis
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["Dense", "Switch"]


def test_the_figure_of_many_arms_has_a_row_an_arm():
    losses = {"dense": {0.001: 3.4, 0.002: 3.2}, "switch": {0.001: 3.0}}
    axes, stars = drawn(trials_module.rows_of_dots, losses, {"switch"})
    assert [star.get_xydata().tolist() for star in stars] == [[[2.0, 0.0]], [[1.0, 1.0]]]
    assert [star.get_markerfacecolor() == "white" for star in stars] == [True, False]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["Dense", "Switch", "BASE"]


def trials(**losses: list[float]) -> list[dict]:
    """By seed s<n>: losses of the places (0,), (1,), ..."""
    return [
        {"seed": int(seed[1:]), "place": [place], "val_ce": loss}
        for seed, own in losses.items()
        for place, loss in enumerate(own)
    ]


def test_of_several_seeds_the_place_is_chosen_that_all_have_tried():
    # seed 100 went on beyond its edge to a loss that no other seed has; seed 101 is content inside
    cells = trials(s100=[3.0, 2.9, 2.8, 2.7, 2.75], s101=[3.0, 2.6, 2.9, 2.95])
    assert ledger.choose(cells) == ((1,), False, "")  # 2.75 against 3.0, 2.85 and 2.825
    falling = trials(s100=[3.0, 2.9, 2.8], s101=[3.0, 2.6, 2.9])
    assert ledger.choose(falling) == (None, False, "the best of 6 lies at an edge, 1 more to try")


def test_a_best_at_the_edge_of_all_that_may_be_tried_is_chosen_and_said_to_be_there(record, tmp_path):
    assert ledger.choose(trials(s100=[3.0 - place / 10 for place in range(ledger.MOST)])) == ((11,), True, "")
    cells = json.loads((record / "sweeps" / "tune.json").read_text())
    for place in range(2, 2 + ledger.MOST - 6):
        write_trial(record / f"more-s100-{place}", 2.5 - place / 10)
        knob = {"knob": "router.load_balance_coef", "value": 10.0**place}
        cell = {"arm": "x", "seed": 100, "run": f"more-s100-{place}", "tuned": "switch", "place": [1, place]}
        cells["cells"].append(cell | {"lr": 0.002} | knob)
    (record / "sweeps" / "tune.json").write_text(json.dumps(cells))
    assert "switch: the best lies at an edge still, and no more are tried" in ledger.write(record, tmp_path, "tune")[1]
    assert "with 1.800000 nats and still at an edge, " in tuned.notes(tmp_path, "smoke", {"switch": []})[0]


def test_a_ledger_gives_an_arm_its_rate_and_knob_but_not_over_the_command_line(record, tmp_path):
    cells = json.loads((record / "sweeps" / "tune.json").read_text())
    wider = record / "switch-s100-ffffffff"
    write_trial(wider, 2.55)
    beyond = {"tuned": "switch", "place": [1, 2], "lr": 0.002, "knob": "router.load_balance_coef", "value": 1.0}
    cells["cells"].append({"arm": "x", "seed": 100, "run": wider.name} | beyond)
    (record / "sweeps" / "tune.json").write_text(json.dumps(cells))
    ledger.write(record, tmp_path, "tune")
    word = f"tuned={tmp_path}/smoke/tune/ledger.csv"
    switch = composed(["router=switch", word])
    assert (switch.train.lr, switch.router.load_balance_coef) == (0.002, 0.1)
    kept = composed(["router=switch", word, "router.load_balance_coef=0.5"])
    assert (kept.train.lr, kept.router.load_balance_coef) == (0.002, 0.5)
    assert composed(["router=dense", word]).train.lr == 0.002
    with pytest.raises(
        ValueError,
        match=r"has chosen nothing for base, as it was not tried \(it has for dense, switch\): leave base out, ",
    ):
        composed(["router=base", word])
    assert composed(["router=base", word, "space=null"]).train.lr == composed(["router=base"]).train.lr
    with pytest.raises(ValueError, match="is of scale=smoke, whose rates are not those of scale=small"):
        composed(["router=dense", word, "scale=small"])
    with pytest.raises(ValueError, match="is no ledger that can be read"):
        composed(["router=base", f"tuned={tmp_path}/none.csv"])
    text = (tmp_path / "smoke" / "tune" / "ledger.csv").read_text()
    (tmp_path / "odd.csv").write_text(text.replace(",0.002,", ",quick,"))
    with pytest.raises(ValueError, match="odd.csv is no ledger that can be read: .*'quick', of dense"):
        composed(["router=dense", f"tuned={tmp_path}/odd.csv"])


@pytest.mark.parametrize("trial", ["9", "abc", "[0]", "[0,0,0]", "[0,x]", "{}"])
def test_a_trial_that_is_no_place_is_refused_in_a_line(trial):
    with pytest.raises(ValueError, match="trial must be .*; got ") as refused:
        composed(["router=switch", f"trial={trial}", "seed=100"])
    assert "\n" not in str(refused.value) and "router.load_balance_coef" in str(refused.value)


def test_a_trial_is_a_factor_of_the_scales_rate_and_a_seed_that_no_table_has():
    def trial(**values):
        knob = {"load_balance_coef": 0.01}
        config = {
            "arm": "switch",
            "space": "switch",
            "tuned": None,
            "seed": 100,
            "train": {"lr": 0.002},
            "router": knob,
        }
        config |= values
        settle(config, [])
        return config["arm"], config["train"]["lr"], config["router"]["load_balance_coef"]

    assert space_of("switch") == Space([0.5, 1, 2, 4], "router.load_balance_coef", [0.01, 0.1])
    assert trial(trial=[1, 0]) == ("switch", 0.002, 0.01)
    assert trial(trial=[3, 1]) == ("switch_trial_3_1", 0.008, 0.1)
    assert trial(trial=[-1, 2]) == ("switch_trial_-1_2", 0.0005, 1.0)
    with pytest.raises(ValueError, match="seed must be at least 100 for a trial; got 3"):
        trial(trial=[0, 0], seed=3)


def checked(*words: str) -> Plan:
    """The trials of these arms, before their runs are opened."""
    compose, jobs = jobs_of(["sweeps=tune", *words])
    plan = Plan(compose, open_data)
    for each in jobs:
        plan.check(each)
    return plan


def test_trials_are_read_as_each_would_be_alone(tiny):
    plan = checked("router=dense,switch,hash_clustered,first_k_hash", *tiny, "model.sparse_layers=[0,1]")
    assert plan.errors() == [] and len(plan.jobs) == 32
    for number, job in enumerate(plan.jobs):
        config = deepcopy(job.config) | {"trial": job.place}
        settle(config, job.words)
        alone = read(config, [each.settings for each in plan.jobs[:number]])
        assert (alone.arm, alone.train.lr, alone.trial) == (job.settings.arm, job.settings.train.lr, job.settings.trial)
        assert digest_of(alone, "text") == digest_of(job.settings, "text")
    assert len({digest_of(job.settings, "text") for job in plan.jobs}) == 32


def test_a_trial_with_a_wrong_option_is_refused_as_if_read_alone(tiny, tmp_path, monkeypatch):
    (tmp_path / "odd.yaml").write_text("lr: [1, 2]\nknob: router.jitter\nvalues: [0.5, 5]")
    monkeypatch.setattr("training.tuning.SPACES", tmp_path)
    plan = checked(*tiny, "router=switch", "space=odd")
    assert len(plan.jobs) == 4 and sum("jitter" in job.error for job in plan.jobs) == 2 == len(plan.errors())


def test_a_plan_adds_trials_beyond_an_edge_once_all_have_ended(tiny):
    words = [*tiny, "router=switch"]
    plan = plan_of("tune", *words, data=open_data)
    assert plan.errors() == [] and len(plan.jobs) == 8
    for job in plan.jobs[:-1]:
        finish(job, ce=3.0 - 0.1 * (job.place[0] == 1) - 0.1 * job.place[1])
    assert len(plan_of("tune", *words, data=open_data).jobs) == 8  # one has not ended
    finish(plan.jobs[-1], ce=3.0)
    (further,) = plan_of("tune", *words, data=open_data).jobs[8:]
    assert further.place == [1, 2] and further.settings.router["load_balance_coef"] == 1.0
    finish(further, ce=3.0)
    assert len(plan_of("tune", *words, data=open_data).jobs) == 9


def finish(job, ce: float) -> None:
    job.run.folder.mkdir(parents=True)
    (job.run.folder / "result.json").write_text(json.dumps({"outcome": "finished", "val/ce": ce}))


@pytest.mark.long
def test_tuning_goes_on_beyond_an_edge_when_it_is_called_again(tiny, tmp_path):
    words = ["-m", "sweeps=tune", *tiny, "router=dense", "train.steps=2", "train.warmup_steps=0", "train.lr=1e-6"]
    first = run_py(*words, cwd=tmp_path)  # so low a rate that the highest trial is best
    assert first.returncode == 0 and "8 of 8 jobs are finished" in first.stdout, first.stdout + first.stderr
    assert "the best of an arm's trials lies at an edge: the same command makes 1 more beyond it" in first.stdout
    rows = ledger.ledger(tmp_path / "runs", "tune")[1]
    assert min(rows, key=lambda row: row["val_ce"])["trial"] == 7 and not any(row["chosen"] for row in rows)
    again = run_py(*words, cwd=tmp_path)
    assert "8 of 9 jobs are finished already" in again.stdout
    assert [row["lr"] for row in ledger.ledger(tmp_path / "runs", "tune")[1]][7:] == [2.83e-6, 4e-6]


def test_trials_of_a_further_arm_are_added_to_the_record_and_a_plain_sweep_replaces_it(tiny, capsys):
    """Of an arm that is tried again only the new trials stay; of an arm of another scale none."""

    def arms(*words: str, sweep: str = "tune") -> list[tuple[str, int]]:
        plan = plan_of(sweep, *tiny, *words, data=open_data)
        write_record(plan.jobs)
        folder = next(Path(job.run.folder) for job in plan.jobs if job.run).parent
        (path,) = (folder / "sweeps").glob("tune.json")
        cells = json.loads(path.read_text())["cells"]
        return list(Counter((cell.get("tuned"), cell["seed"]) for cell in cells).items())

    few = "train.steps=2", "train.warmup_steps=0"
    assert arms(*few, "router=dense") == [(("dense", 100), 8)]
    assert arms(*few, "router=switch") == [(("dense", 100), 8), (("switch", 100), 8)]
    assert capsys.readouterr().out == ""
    assert arms(*few, "router=dense", "seed=101") == [(("switch", 100), 8), (("dense", 101), 8)]
    assert "listed other runs: that list is tune.smoke.json now" in capsys.readouterr().out
    assert arms(*few, "router=dense", "seed=1", "sweep=tune", sweep="main")[0] == ((None, 1), 1)


def test_a_rate_that_was_chosen_on_another_text_or_budget_is_said_to_be_so(tiny, tmp_path):
    path, row = tmp_path / "ledger.csv", {"scale": "smoke", "arm": "dense", "chosen": "True", "lr": 0.002, "knob": ""}

    def said(**of_trials):
        row.update(of_trials)
        path.write_text(",".join([*row, "value"]) + "\n" + ",".join(map(str, [*row.values(), ""])) + "\n")
        settings = read(compose_config(*tiny, "router=dense", f"tuned={path}"))
        tokens = settings.train.steps * settings.train.batch_size * settings.data.sequence_length
        assert settings.train.lr == 0.002
        return tuned_elsewhere(settings, "mine").removeprefix(f"tuned={path}: the trials of dense were of "), tokens

    nothing, tokens = said()  # a ledger of before
    assert nothing == "" and said(tokens=tokens, data_fingerprint="mine")[0] == ""
    assert said(data_fingerprint="another's")[0] == "another text"
    assert said(tokens=2_000_000)[0] == f"another text and 2,000,000 tokens, not {tokens:,}"
    for word in ("router=dense", f"tuned={path}"):
        settings = read(compose_config(*tiny, word))
        path.unlink(missing_ok=True)  # of a run that is trained again
        assert tuned_elsewhere(settings, "mine") == ""
