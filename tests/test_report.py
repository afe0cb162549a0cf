"""The report: right numbers, every run named, the same bytes again; on folders as training writes them."""

import fcntl
import json
import math
import re
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

from analysis import figures
from analysis.arms import load
from analysis.figures import over_seeds
from analysis.layout import numbers_at_the_ends
from analysis.metrics import read_metrics
from analysis.report import main, report, write_tables
from analysis.runs import read_record, read_study
from analysis.tables import human

ARMS = {"dense": 5.30, "hash_random": 5.25, "hash_balanced": 5.24, "switch": 5.29, "base": 5.26}
UNIGRAM = 5.94


def write_run(
    runs: Path, arm: str, seed: int, ce: float, commit="a" * 40, dirty=None, fingerprint="data0", own=None, **result
) -> Path:
    """One finished run of 200 steps whose test loss is `ce`."""
    folder = runs / f"{arm}-s{seed}-{zlib.crc32(repr((arm, seed, commit, dirty, fingerprint, result)).encode()):08x}"
    folder.mkdir(parents=True)
    corpus = {"_target_": "data.corpora.StandardLibrary", "validation_share": 0.015, "test_share": 0.015}
    (folder / "config.yaml").write_text(yaml.safe_dump({"arm": arm, "seed": seed, "data": {"corpus": corpus}}))
    provenance = {"git": {"commit": commit, "dirty": dirty, "own": own}, "device": "Some CPU @ 2.00GHz"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    lines = []
    for step in range(0, 201, 20):
        lines.append({"step": step, "steps": 200, "tokens": step * 2048, "train/ce": 6.0, "route/1/max_over_mean": 1.5})
        value = ce - 0.01 + (math.log(1024) - ce) * math.exp(-step / 30)
        lines.append({"step": step, "tokens": step * 2048, "seconds": step / 20, "val/ce": value})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {
        "outcome": "finished",
        "step": 200,
        "tokens": 409600,
        "seconds": 12.1,
        "train_seconds": 10.0,
        "data_fingerprint": fingerprint,
    }
    figures |= {"val/unigram_entropy": UNIGRAM, "tokens_per_second": 30000.0 + seed}
    figures |= {
        "train_flops_per_token": 4e6 if arm == "dense" else 5e6,
        "peak_memory_bytes": 812345678,
        "leaks": [],
        "parameters/active": 745000,
        "parameters/total": 745000 if arm == "dense" else 1234567,
    }
    for split, loss in (("val", ce - 0.01), ("test", ce)):
        figures |= {f"{split}/ce": loss, f"{split}/perplexity": math.exp(loss)}
    (folder / "result.json").write_text(json.dumps(figures | result))
    return folder


def write_sweep(runs: Path, folders, name="quickstart") -> None:
    record = {"sweep": name, "scale": "smoke", "command": ["python", "run.py", "-m", f"sweeps={name}"]}
    (runs / "sweeps").mkdir(parents=True, exist_ok=True)
    (runs / "sweeps" / f"{name}.json").write_text(json.dumps(record | {"runs": [Path(each).name for each in folders]}))


@pytest.fixture
def whole(tmp_path):
    """Five arms, three seeds, all finished; the seed moves all arms by 0.1, the pairs differ by a little."""
    runs = tmp_path / "runs"
    wobble = [0.0, 0.01, -0.01]
    folders = [
        write_run(runs, arm, seed, ce + 0.1 * seed + (wobble[seed] if arm == "switch" else 0))
        for arm, ce in ARMS.items()
        for seed in range(3)
    ]
    write_sweep(runs, folders)
    return runs


def table_of(tmp_path, name="quickstart") -> pd.DataFrame:
    return pd.read_csv(tmp_path / "results" / "smoke" / name / "table.csv").set_index("arm")


def width(printed: str) -> int:
    """Of all lines but the commands at the end, which name where this machine has python and the checkout."""
    return max(len(line) for line in printed[: printed.index("what to try next")].splitlines())


def test_the_table_holds_means_and_paired_differences(whole, tmp_path):
    printed = report("quickstart", whole, tmp_path / "results")
    frame = table_of(tmp_path)
    assert list(frame.index) == list(ARMS)
    perplexities = [math.exp(5.30 + 0.1 * seed) for seed in range(3)]
    assert frame.loc["dense", "test_perplexity"] == pytest.approx(sum(perplexities) / 3)
    assert frame.loc["dense", "below_unigram"] == pytest.approx(UNIGRAM - (5.30 + 0.1 - 0.01))
    assert frame.loc["hash_random", "difference_mean"] == pytest.approx(-0.05)
    assert frame.loc["switch", "difference_mean"] == pytest.approx(-0.01)
    # differences -0.01, 0.00, -0.02: deviation 0.01, reach 4.302653 * 0.01 / sqrt(3) = 0.024841
    assert frame.loc["switch", "paired_high"] == pytest.approx(-0.01 + 0.024841, abs=1e-6)
    # the others do not scatter at all, so it is tested alone, at 5 % over 4: t(1 - 0.05 / 8, 2) = 8.860234
    assert frame.loc["switch", "alone"]
    assert frame.loc["switch", "difference_high"] == pytest.approx(-0.01 + 8.860234 * 0.01 / 3**0.5, abs=1e-6)
    assert "Switch" in printed and "-0.010 [-0.061, +0.041] ◊ †" in printed
    assert "† not separated from Dense at n = 3: the interval contains 0" in printed
    assert "15 of 15 runs are counted\n" in printed
    assert printed.startswith(
        "quickstart at scale smoke: Python's standard library\ntrained on 410k tokens in 200 steps"
    )


def write_grid(runs: Path, methods: dict[str, float], recorded=True) -> list[Path]:
    """Each method with byte pairs and with words, three seeds; words cost 2 nats more a token, and a half more a seed.
    recorded: as the launcher records a call that asks for both."""
    folders, cells = [], []
    for text, more, by_seed in (("bpe", 0.0, 0.1), ("words", 2.0, 0.5)):
        for arm, ce in methods.items():
            for seed in range(3):
                wobble = 0.004 * (-1) ** seed * (arm != "dense")
                unigram = {"val/unigram_entropy": UNIGRAM + more}
                loss = ce + more + by_seed * seed + wobble
                folders.append(write_run(runs, f"{arm}_{text}", seed, loss, fingerprint=text, **unigram))
                cells.append({"arm": f"{arm}_{text}", "seed": seed, "run": folders[-1].name, "group": text})
    write_sweep(runs, folders, "mine")
    path = runs / "sweeps" / "mine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ({"cells": cells} if recorded else {})))
    return folders


def test_arms_of_several_texts_that_one_call_asked_for_are_each_compared_within_their_own(tmp_path):
    """mine is a method that style.yaml does not know."""
    runs = tmp_path / "runs"
    write_grid(runs, {"switch": 5.31, "mine": 5.20, "dense": 5.30})
    printed = report("mine", runs, tmp_path / "results")
    frame = table_of(tmp_path, "mine")
    assert "\n18 of 18 runs are counted\n" in printed and "other data" not in printed
    assert [*frame["reference_arm"].fillna("")] == ["dense_bpe", "dense_bpe", "", "dense_words", "dense_words", ""]
    for text in ("bpe", "words"):  # the wobble is 0.004 less a third of it
        assert frame.loc[f"switch_{text}", "difference_mean"] == pytest.approx(0.01 + 0.004 / 3)
        assert frame.loc[f"mine_{text}", "difference_mean"] == pytest.approx(-0.1 + 0.004 / 3)
        assert frame.loc[f"mine_{text}", "p"] < 1e-4  # a seed of one text is no seed of the other
    assert "difference to Dense  " in printed and "png, figure.pdf: differences to the reference" in printed
    groups = "\n  Switch, bpe; mine bpe; Dense, bpe\n  Switch, words; mine words; Dense, words\n"
    assert f"as this sweep has several, by the\n  scatter of all of them:{groups}" in printed
    folder = tmp_path / "results" / "smoke" / "mine"
    before = {name: (folder / name).read_text() for name in ("table.md", "table.csv", "table.tex")}
    write_tables(folder, load("style"))
    assert before == {name: (folder / name).read_text() for name in before}


def test_a_run_of_another_text_than_its_group_or_than_all_where_none_was_asked_for_is_in_no_mean(tmp_path):
    runs = tmp_path / "runs"
    folders = write_grid(runs, {"dense": 5.30, "switch": 5.31})
    for folder, change in ((folders[5], {"data_fingerprint": "words"}), (folders[9], {"token_budget": 7})):
        result = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(result | change))
    printed = report("mine", runs, tmp_path / "results")
    assert "\n10 of 12 runs are counted; in no mean:\n" in printed
    assert f"\n  {folders[5].name}: other data (words, not bpe)\n" in printed
    assert f"\n  {folders[9].name}: other token budget (7, not 409600)\n" in printed
    assert list(table_of(tmp_path, "mine")["n"]) == [3, 2, 3, 2]
    write_grid(tmp_path / "unasked", {"dense": 5.30, "switch": 5.31}, recorded=False)
    printed = report("mine", tmp_path / "unasked", tmp_path / "results")
    assert printed.count(": other data (words, not bpe)\n") == 6 and "6 of 12 runs are counted" in printed


def test_one_method_on_several_texts_has_figures_of_each_and_no_differences(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, folder, name: drawn.append(figure))
    write_grid(tmp_path / "runs", {"dense": 5.30})
    printed = report("mine", tmp_path / "runs", tmp_path / "results")
    assert "\n6 of 6 runs are counted\n" in printed and "is better than Dense;" in printed
    assert table_of(tmp_path, "mine")["difference_mean"].isna().all()
    (axes,) = drawn[0].axes  # curves, with no panel of differences, and what guessing gives on each text
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert levels == [UNIGRAM, UNIGRAM + 2.0]


def test_runs_that_shared_their_gpu_are_counted_under_the_speeds(whole, tmp_path):
    assert "shared their GPU" not in report("quickstart", whole, tmp_path / "results")
    for folder, jobs in zip(sorted(whole.glob("switch-*")), (1, 2, 12)):
        said = json.loads((folder / "provenance.json").read_text())
        said["command"] = ["run.py", "-m", "sweeps=quickstart", f"hydra.launcher.jobs_per_gpu={jobs}"]
        (folder / "provenance.json").write_text(json.dumps(said))
        result = json.loads((folder / "result.json").read_text()) | {"tokens_per_second": 1000.0 * jobs}
        (folder / "result.json").write_text(json.dumps(result))
    printed = report("quickstart", whole, tmp_path / "results")
    assert "benchmark\n  2 of 15 runs shared their GPU with other jobs: no speed or seconds of theirs\n" in printed
    assert table_of(tmp_path).loc["switch", "tokens_per_second"] == 1000


@pytest.mark.parametrize(("wobble", "noisy"), [(0.006, False), (0.03, True)])
def test_a_reference_that_scatters_has_a_row_and_is_tested_alone_or_said_not_to_be(tmp_path, wobble, noisy):
    """One arm of four at 3.5 times the deviation of the others is by the F-test chance at n = 3; at 17 times not."""
    runs, scatter = tmp_path / "runs", [[1, -1, 0], [0, 1, -1], [1, 0, -1], [-1, 0, 1]]
    sizes = {"dense": wobble, "switch": 0.002, "hash_random": 0.002, "base": 0.002}
    losses = {
        (arm, seed): 5 + size * part[seed] for (arm, size), part in zip(sizes.items(), scatter) for seed in range(3)
    }
    write_sweep(runs, [write_run(runs, *cell, ce) for cell, ce in losses.items()])
    printed = report("quickstart", runs, tmp_path / "results")
    frame, ratio = table_of(tmp_path), table_of(tmp_path).loc["dense", "variance_ratio"]
    assert ratio >= 3 and frame.loc["dense", "noisy"] == noisy
    assert list(frame["alone"]) == [False, *[noisy] * 3]
    said = f"Dense has {ratio:.2g} times the others' variance, which an F-test does not tell from chance:\n"
    assert (said in printed) != noisy
    table = (tmp_path / "results/smoke/quickstart/table.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| Dense") and f" {ratio:.2g} |" in line]
    assert "reference" in row and f"{frame.loc['dense', 'residual_deviation']:.4f}" in row


def test_an_arm_that_collapsed_is_a_number_at_the_axis_end_and_presses_no_other_flat(tmp_path, monkeypatch):
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda figure, *_: drawn.update(axes=figure.axes))
    losses = {"dense": 5.3, "hash_balanced": 5.2, "switch_coef_0": 5.28, "switch_coef_0.1": 5.26, "switch_coef_1": 6.5}
    runs, scatter = tmp_path / "runs", [[1, -1, 0], [0, 1, -1], [1, 0, -1], [-1, 0, 1], [300, -200, -100]]
    cells = [(arm, seed, ce + 1e-3 * own[seed]) for (arm, ce), own in zip(losses.items(), scatter) for seed in range(3)]
    write_sweep(runs, [write_run(runs, *cell) for cell in cells], "load_balance")
    printed = report("load_balance", runs, tmp_path / "results")
    assert "Switch, coef 1, whose variance is another (p < 0.001), has no part in it" in printed
    frame = table_of(tmp_path, "load_balance")
    assert list(frame["alone"]) == [False] * 4 + [True] and frame.loc["switch_coef_0", "separated"]
    for axes, text in zip(drawn["axes"], ("at 1: 6.50 ↑", "at 1: +1.3 ↑")):
        assert [each.get_text() for each in axes.texts] == [text]
        low, high = axes.get_ylim()
        assert high - low < 0.2


def test_one_seed_and_one_degree_of_freedom_are_said_in_the_singular(tmp_path):
    cells = [("dense", 0, 5.3), ("dense", 1, 5.31), ("hash_balanced", 0, 5.2), ("hash_balanced", 1, 5.22)]
    for seeds, said in ((1, "steps, seed 0, on"), (2, "pooled on 1 degree of freedom;")):
        runs = tmp_path / str(seeds)
        write_sweep(runs, [write_run(runs, *cell) for cell in cells if cell[1] < seeds], "routers")
        assert said in report("routers", runs, tmp_path / "results")


def test_where_all_are_tested_alone_none_is_far_off(tmp_path, monkeypatch):
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda each, *_: drawn.update(axes=each.axes, figure=each))
    losses = {"dense": 5.3, "hash_balanced": 5.2, "switch_coef_0": 5.28, "switch_coef_0.1": 5.26}
    runs, scatter = tmp_path / "runs", [[1, -1, 0], [40, -20, -20], [1, 0, -1], [-1, 0, 1]]
    cells = [(arm, seed, ce + 1e-3 * own[seed]) for (arm, ce), own in zip(losses.items(), scatter) for seed in range(3)]
    write_sweep(runs, [write_run(runs, *cell) for cell in cells], "load_balance")
    report("load_balance", runs, tmp_path / "results")
    assert list(table_of(tmp_path, "load_balance")["alone"]) == [True, False, True, True]
    upper, lower = drawn["axes"]
    assert not upper.texts and not lower.texts
    assert lower.get_ylim()[1] > 0.08 and upper.get_ylim()[1] > 5.3
    assert "intervals, each alone" in drawn["figure"].get_supxlabel().replace("\u00a0", " ").replace("\n", " ")


def test_a_figure_says_which_intervals_hold_alone(tmp_path, monkeypatch):
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda figure, *_: drawn.update(figure=figure))
    runs, scatter = tmp_path / "runs", {"hash_random": (40, -20, -20)}
    arms = ("hash_balanced", "hash_random", "dense", "hash_previous", "hash_bigram")
    cells = [
        (arm, seed, 5.2 + place / 10 + 1e-3 * scatter.get(arm, ((1, -1, 0), (0, 1, -1))[place % 2])[seed])
        for place, arm in enumerate(arms)
        for seed in range(3)
    ]
    write_sweep(runs, [write_run(runs, *cell) for cell in cells], "hash_methods")
    report("hash_methods", runs, tmp_path / "results")
    (axes,) = drawn["figure"].axes
    marked = {each.get_text() for each in axes.get_yticklabels() if "◊" in each.get_text()}
    table = table_of(tmp_path, "hash_methods")
    assert marked == {f"{label} ◊" for label in table.loc[table["alone"], "label"]}
    assert "Hash, random ◊" in marked and len(marked) < 4
    assert "intervals, all at once (◊: alone)" in drawn["figure"].get_supxlabel().replace("\u00a0", " ")


def test_level_lines_do_not_stretch_the_axis_of_differences_and_one_hash_begins_the_line_of_several(
    tmp_path, monkeypatch
):
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda figure, *_: drawn.update(axes=figure.axes))
    runs = tmp_path / "runs"
    losses = {"dense": 5.9, "hash_balanced_1_hash": 5.2, "hash_multi_2_hashes": 5.19, "hash_multi_4_hashes": 5.18}
    write_sweep(runs, [write_run(runs, arm, 0, ce) for arm, ce in losses.items()], "multi_hash")
    report("multi_hash", runs, tmp_path / "results")
    upper, lower = drawn["axes"]
    (line,) = [each for each in upper.lines if len(each.get_xdata()) > 2]
    assert list(line.get_ydata()) == [5.2, 5.19, 5.18]
    assert lower.get_ylim()[1] < 0.01  # dense, which lies 0.7 above, is not drawn there


def caption(tmp_path, monkeypatch, sweep: str, arms, seeds: int) -> str:
    """What stands under the figure of a sweep of these arms."""
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda figure, *_: drawn.update(said=figure.get_supxlabel()))
    runs = tmp_path / f"{sweep}-{len(arms)}-{seeds}"
    cells = [(arm, seed, 5.2 + 0.01 * place + 0.1 * seed) for place, arm in enumerate(arms) for seed in range(seeds)]
    write_sweep(runs, [write_run(runs, *cell) for cell in cells], sweep)
    report(sweep, runs, tmp_path / "results")
    return drawn["said"].replace("\u00a0", " ")


def test_under_a_figure_stand_only_the_bars_and_bands_that_it_has(tmp_path, monkeypatch):
    said = {seeds: caption(tmp_path, monkeypatch, "quickstart", ("dense", "switch"), seeds) for seeds in (1, 2)}
    assert said[1] == "lines: mean over seeds (n = 1)"
    assert said[2] == "lines: mean over seeds (n = 2); bands: ± 1 standard deviation"
    placed = ("switch_16", "hash_balanced_16", "switch_32", "hash_balanced_32")
    assert caption(tmp_path, monkeypatch, "modules", placed, 1) == "n = 1 seed; hollow: published"
    bars = caption(tmp_path, monkeypatch, "modules", placed, 2)
    assert "\nbars (where longer than marks) above: ± 1 standard deviation" in bars
    assert "n = 2 seeds; bars below: 95 % intervals" in bars and "bands" not in bars
    level = caption(tmp_path, monkeypatch, "modules", ("dense", *placed), 2)
    assert "bars (where longer than marks) and bands above: ± 1 standard deviation" in level


def test_the_figure_of_rates_has_every_run_and_what_an_arm_is_of_the_reference(tmp_path, monkeypatch):
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda figure, *_: drawn.update(figure=figure))
    runs, rates = tmp_path / "runs", {"base": (20_000.0, 30_000.0), "hash_balanced": (30_000.0, 32_500.0)}
    cells = [(arm, seed, rate) for arm, each in rates.items() for seed, rate in enumerate(each)]
    write_sweep(runs, [write_run(runs, arm, seed, 5.2, tokens_per_second=rate) for arm, seed, rate in cells], "rates")
    assert "figure.pdf: tokens trained per second, every run" in report("rates", runs, tmp_path / "results")
    (axes,) = drawn["figure"].axes
    assert [bar.get_width() for bar in axes.patches] == [25.0, 31.25]  # thousands
    assert [list(line.get_xdata()) for line in axes.lines] == [[20.0, 30.0], [30.0, 32.5]]
    assert [each.get_text() for each in axes.texts] == ["1.25 times"]
    assert [each.get_text() for each in axes.get_yticklabels()] == ["BASE", "Hash, balanced"]
    said = drawn["figure"].get_supxlabel().replace("\u00a0", " ")
    assert said == "bars: means (times: of BASE's mean); dots: runs, n = 2"


def test_the_figure_of_repeats_has_the_noise_floor(tmp_path, monkeypatch):
    drawn: dict = {}
    monkeypatch.setattr("analysis.figures.save", lambda figure, *_: drawn.update(figure=figure))
    runs, losses = tmp_path / "runs", (5.0, 5.002, 5.004)
    cells = [write_run(runs, f"hash_balanced_repeat_{number}", 0, ce) for number, ce in enumerate(losses)]
    write_sweep(runs, cells, "noise_floor")
    report("noise_floor", runs, tmp_path / "results")
    (axes,) = drawn["figure"].axes
    floor = 0.002 * 4.302653 * 2**0.5  # deviation, t(0.975, 2)
    ends = [(each.get_x(), each.get_x() + each.get_width()) for each in axes.patches]
    assert ends == [pytest.approx((-floor, floor), abs=1e-6)] * 2
    assert axes.get_xlim()[0] < -floor and axes.get_xlim()[1] > floor
    assert "(of two single runs 0.0122 nats, 95 %)" in drawn["figure"].get_supxlabel()


def test_no_two_methods_have_colour_and_marker_in_common():
    looks = [(look["color"], look["marker"]) for look in load("style")["arms"].values()]
    assert len(set(looks)) == len(looks)


def test_numbers_of_what_lies_beyond_an_axis_stand_one_below_the_other_and_clear_of_its_ends():
    axes = Figure().subplots()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 1)
    numbers_at_the_ends(axes, [(0, 5, "a"), (5, 0.5, "inside"), (5, 7, "b"), (10, -3, "c")])
    drawn = [(each.get_text(), each.get_ha(), each.get_position()[1]) for each in axes.texts]
    assert drawn == [("a ↑", "left", -1), ("b ↑", "right", -9), ("c ↓", "right", 17)]


def test_figures_of_the_text_stand_beside_those_of_the_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs, results = Path("runs"), Path("results")
    more = {f"{split}/{key}": 1.5 for split in ("val", "test") for key in ("bits_per_byte", "word_perplexity")}
    for unknown, arms in ((0.0, ["dense"]), (0.0125, ["switch", "base"])):
        given = more | {"val/unknown_share": unknown, "test/unknown_share": unknown, "test/word_perplexity": 1.23456e30}
        write_sweep(runs, [write_run(runs, arm, 0, 5.3, **given) for arm in arms])
        printed = report("quickstart", runs, results)
        assert "test bits" in printed and "exp(69.29)" in printed
        assert ("§ of the test tokens 1.25% are the unknown word" in printed) == (unknown > 0)
        assert width(printed) <= 120
    frame = table_of(tmp_path)
    assert frame.loc["switch", "test_bits_per_byte"] == 1.5 and frame.loc["base", "val_unknown_share"] == 0.0125


def test_no_printed_line_is_wider_than_120_columns(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert width(report("quickstart", Path("runs"), Path("results"))) <= 120


def test_it_says_where_things_are_and_what_to_try_next(whole, tmp_path):
    assert "training.sample" not in report("quickstart", whole, tmp_path / "results")  # no run has kept weights
    best = next(whole.glob("hash_balanced-s0-*"))
    (best / "checkpoints" / "step-200").mkdir(parents=True)
    printed = report("quickstart", whole, tmp_path / "results")
    assert f"-m training.sample {best}\n" in printed
    assert len(printed[printed.index("what to try next") :].splitlines()) == 7
    for name in ("table.md", "table.tex", "table.csv", "runs.csv", "figure.png", "figure.pdf"):
        assert (tmp_path / "results" / "smoke" / "quickstart" / name).stat().st_size > 0


def test_made_again_every_file_is_the_same_bytes(whole, tmp_path):
    report("quickstart", whole, tmp_path / "one")
    command = [
        sys.executable,
        "-m",
        "analysis.report",
        "quickstart",
        "--runs",
        whole,
        "--results",
        tmp_path / "two",
    ]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
    made = [tmp_path / again / "smoke" / "quickstart" for again in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in made)
    assert len(one) == 6
    assert one == two
    assert str(tmp_path).encode() not in b"".join(one.values())


def test_commits_count_as_one_only_where_it_is_declared_with_the_reason(tmp_path, monkeypatch):
    runs, commits = tmp_path / "runs", ("a" * 40, "b" * 40)
    arms = {"dense": commits[0], "switch": commits[0], "base": commits[1]}
    folders = [write_run(runs, arm, seed, 5.3 + 0.1 * seed, commit=c) for arm, c in arms.items() for seed in range(2)]
    write_sweep(runs, [*folders, write_run(runs, "base", 3, 5.3, commit=commits[1], dirty="c0ffee")])
    said = tmp_path / "same_code.yaml"
    monkeypatch.setattr("analysis.runs.SAME_CODE", said)
    assert "4 of 7 runs are counted" in report("quickstart", runs, tmp_path / "results")
    said.write_text(f"- {{commits: [{commits[1]}, {commits[0][:12]}], why: a comment alone was changed}}")
    printed = report("quickstart", runs, tmp_path / "results")
    assert "6 of 7 runs are counted" in printed  # code that was changed since a commit is none of its
    assert f"runs of commits {'b' * 10} and {'a' * 10} count as of one code: a comment alone was changed\n" in printed
    assert printed.startswith(write_tables(tmp_path / "results/smoke/quickstart", load("style"), runs)[0])
    said.write_text("- {commits: [a]}")
    with pytest.raises(ValueError, match="must be a list of"):
        report("quickstart", runs, tmp_path / "results")


def test_a_router_in_a_new_file_stands_beside_the_others_but_not_beside_another_version_of_itself(tmp_path):
    runs = tmp_path / "runs"
    folders = [write_run(runs, "dense", seed, 5.3 + 0.1 * seed) for seed in range(3)]
    folders += [write_run(runs, "modulo", seed, 5.2, own="new" if seed else "old") for seed in range(3)]
    write_sweep(runs, folders)
    printed = report("quickstart", runs, tmp_path / "results")
    assert "5 of 6 runs are counted" in printed
    assert f"  {folders[3].name}: other version (old, not new)" in printed


def test_every_kind_of_bad_run_is_named_and_in_no_mean(tmp_path):
    runs = tmp_path / "runs"
    good = [write_run(runs, arm, seed, ARMS[arm] + 0.1 * seed) for arm in ("dense", "switch") for seed in range(3)]
    diverged = write_run(runs, "dense", 3, 90.0, outcome="diverged", step=40, tokens=81920)
    nan = write_run(runs, "dense", 4, math.nan)
    bad = {
        "other commit": [
            write_run(runs, "switch", 3, 90.0, commit="b" * 40),
            write_run(runs, "switch", 4, 90.0, dirty="c0ffee"),
        ],
        "other data": [write_run(runs, "switch", 5, 90.0, fingerprint="data1")],
        "other token budget": [write_run(runs, "switch", 6, 90.0, tokens=999, step=7)],
        "diverged": [diverged, nan],
        "missing": [runs / "switch-s7-00000007"],
        "failed": [write_run(runs, "switch", 8, 90.0)],
        "stopped": [write_run(runs, "switch", 9, 90.0)],
        "unreadable": [write_run(runs, "switch", 10, 90.0)],
        "running": [write_run(runs, "switch", 11, 90.0)],
    }
    for outcome in ("failed", "stopped", "running"):
        (bad[outcome][0] / "result.json").unlink()
        (bad[outcome][0] / "lock").touch()
    (bad["failed"][0] / "error.txt").write_text(
        "Traceback (most recent call last):\n  ...\nRuntimeError: out of memory\n"
    )
    (bad["unreadable"][0] / "result.json").write_text('{"outcome": "fini')
    write_sweep(runs, [*good, *[folder for folders in bad.values() for folder in folders]])
    with (bad["running"][0] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        printed = report("quickstart", runs, tmp_path / "results")

    assert "\n  python run.py -m sweeps=quickstart\n" in printed
    frame = table_of(tmp_path)
    assert list(frame["n"]) == [3, 3] and list(frame["planned"]) == [5, 12]
    assert max(frame["test_perplexity"]) < 300
    assert "3 of 5" in printed and "6 of 17 runs are counted; in no mean:" in printed
    listed = pd.read_csv(tmp_path / "results" / "smoke" / "quickstart" / "runs.csv").set_index("id")
    for outcome, folders in bad.items():
        for folder in folders:
            assert f"\n  {folder.name}: {outcome}" in printed
            assert listed.at[folder.name, "outcome"] == outcome
    assert list(listed.index[listed["outcome"] == "finished"]) == [folder.name for folder in good]
    assert "RuntimeError: out of memory" in printed and "at step 200" in printed


def test_notes_say_what_curves_are_over_which_weights_and_what_was_priced(tmp_path):
    """And to try next is the sweep that was run, its data included, at another scale."""
    runs = tmp_path / "runs"
    special = {
        "val/tokens": 99,
        "best_step": 40,
        "test/bits_per_byte": 2.0,
        "test/priced_share": 0.5,
        "test/tokens": 1987,
    }
    folders = [write_run(runs, arm, 0, 5.3, **special) for arm in ("dense", "switch")]
    for folder in folders:
        path = folder / "metrics.jsonl"
        path.write_text(path.read_text().replace('"val/ce"', '"val/tokens": 33, "val/ce"'))
        origin = json.loads((folder / "provenance.json").read_text())
        origin["data"] = {"splits": {"test": {"documents": 29 if folder == folders[1] else 4000}}}
        (folder / "provenance.json").write_text(json.dumps(origin))
    write_sweep(runs, folders)
    path = runs / "sweeps" / "quickstart.json"
    command = ["python", "run.py", "-m", "sweeps=quickstart", "data.folder=my talk", "scale=smoke"]
    command += ["tuned=of/smoke.csv", "train.steps=9"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"command": command}))
    printed = report("quickstart", runs, tmp_path / "results")
    assert "perplexity: exp(cross-entropy per token) of the best validation's weights; mean" in printed
    assert "learning curves: over 33 of 99 validation tokens, the same at every step" in printed
    assert "of 50.0% of the test tokens, which stand for all" in printed
    assert "run.py -m sweeps=quickstart 'data.folder=my talk' scale=small\n" in f"{printed}\n"
    assert re.search(r"^test split: 29 documents, 1,987 tokens; so few say little of other text$", printed, re.M)


def test_notes_say_what_the_steps_logged_of_gaps_drops_and_loads(tmp_path):
    """The largest gap and drop of any step, layer and seed; the last load, of the fullest layer, as the seeds' mean."""
    runs = tmp_path / "runs"
    folders = [write_run(runs, arm, seed, 5.3) for arm in ("dense", "base") for seed in (0, 1)]
    for seed, folder in enumerate(folders[2:]):
        path = folder / "metrics.jsonl"
        steps = [json.loads(line) for line in path.read_text().splitlines()]
        for line in (line for line in steps if "train/ce" in line):
            gap = {20: 3e-4, 40: math.nan}.get(line["step"], 1e-5)
            line |= {"route/1/assignment_gap": gap / (1 + seed), "route/1/dropped": 0.25 * (line["step"] == 60)}
            line |= {"route/3/dropped": 0.0, "route/3/max_over_mean": 2.5 + seed if line["step"] == 200 else 9.0}
            line |= {"route/3/weight": 0.125 + 0.25 * seed if line["step"] == 200 else 0.1}
            line["route/1/weight"] = 1.0
        path.write_text("".join(json.dumps(line) + "\n" for line in steps))
    for folder in folders[:2]:
        path = folder / "metrics.jsonl"
        path.write_text(path.read_text().replace(', "route/1/max_over_mean": 1.5', ""))
    write_sweep(runs, folders)
    printed = report("quickstart", runs, tmp_path / "results").replace("\n  ", " ")
    assert "over tokens times the scores' deviation, at most: BASE 3.0e-04\n" in printed
    assert "dropped for want of capacity, in a logged step at most: BASE 25.0%\n" in printed
    assert "of the fullest expert over the mean, in training's last logged step, mean over runs: BASE 3.0\n" in printed
    weights = (
        "weight of experts' outputs in the layer where it is least, in training's last logged step, mean over runs"
    )
    assert f"{weights}: BASE 0.25\n" in printed


def test_a_seed_without_its_pair_enters_the_mean_but_not_the_difference(tmp_path):
    runs = tmp_path / "runs"
    folders = [write_run(runs, "dense", seed, 5.3) for seed in (0, 1)]
    folders += [write_run(runs, "new_idea", seed, 5.2 + 0.001 * seed) for seed in (0, 1, 2)]
    write_sweep(runs, folders)
    printed = report("quickstart", runs, tmp_path / "results")
    assert list(table_of(tmp_path).loc["new_idea", ["n", "difference_pairs"]]) == [3, 2]
    assert "new idea: 2 of its 3 runs have a pair of the same seed" in printed


def test_one_seed_gives_a_table_without_deviations(tmp_path):
    runs = tmp_path / "runs"
    write_sweep(runs, [write_run(runs, arm, 0, ce) for arm, ce in ARMS.items()])
    printed = report("quickstart", runs, tmp_path / "results")
    assert "±" not in printed.split("perplexity: ")[0] and "-0.050" in printed and "[-" not in printed


def test_without_a_finished_reference_there_are_means_but_no_differences(tmp_path):
    runs = tmp_path / "runs"
    folders = [write_run(runs, "switch", seed, 5.3, tokens_per_second=None) for seed in (0, 1)]
    write_sweep(runs, [runs / "dense-s0-00000000", *folders])
    printed = report("quickstart", runs, tmp_path / "results")
    assert "0 of 1" in printed and "no pair" in printed and "nan" not in printed


def test_a_last_line_that_is_cut_and_steps_written_twice_change_no_curve_and_are_named(whole, tmp_path):
    before = read_study("quickstart", whole).curves
    cut, twice = (next(whole.glob(f"switch-s{seed}-*")) / "metrics.jsonl" for seed in (1, 2))
    cut.write_text(cut.read_text() + '{"step": 220, "val/ce": 5.')
    twice.write_text('{"step": 20, "tokens": 1, "val/ce": 9.0}\n' * 2 + twice.read_text())  # the later line counts
    twice.write_text(twice.read_text() + twice.read_text().splitlines()[-1] + "\n")
    study = read_study("quickstart", whole)
    columns = ["arm", "seed", "tokens", "val/ce"]
    curves = [frame[columns].sort_values(columns, ignore_index=True) for frame in (study.curves, before)]
    pd.testing.assert_frame_equal(*curves)
    assert study.curves.groupby(["arm", "seed"])["step"].agg(lambda step: step.is_monotonic_increasing).all()
    printed = report("quickstart", whole, tmp_path / "results")
    assert f"{cut.parent.name}: the last line of metrics.jsonl is cut" in printed
    assert f"{twice.parent.name}: metrics.jsonl has step 20, 200 twice; the later line counts" in printed


def test_a_file_of_metrics_that_is_damaged_in_its_middle_makes_its_run_unreadable(whole):
    metrics = next(whole.glob("switch-s1-*")) / "metrics.jsonl"
    metrics.write_text('{"step": 0, "val/ce": 7' + metrics.read_text())
    damaged = read_study("quickstart", whole).runs.set_index("id").loc[metrics.parent.name]
    assert damaged["outcome"] == "unreadable" and "metrics.jsonl" in damaged["why"]


def test_a_curve_is_over_points_that_all_seeds_have():
    points = [(0, 0), (0, 10), (0, 20), (1, 0), (1, 20)]
    losses = pd.Series([7.0, 6.5, 6.0, 7.0, 5.0], index=pd.MultiIndex.from_tuples(points, names=["seed", "tokens"]))
    curve = over_seeds(losses)
    assert list(curve.index) == [0, 20]
    assert curve["mean"].tolist() == [7.0, 5.5] and curve["deviation"].tolist() == pytest.approx([0, 0.5**0.5])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda runs: (runs / "sweeps" / "quickstart.json").unlink(), "run into"),
        (
            lambda runs: [path.unlink() for path in runs.glob("*/result.json")],
            "no run of 'quickstart' has finished (15 stopped)",
        ),
        (lambda runs: write_sweep(runs, []), "(none listed)"),
    ],
)
def test_nothing_to_report_is_one_line_and_status_2(whole, tmp_path, spoil, says, monkeypatch, capsys):
    spoil(whole)
    monkeypatch.setattr(
        sys, "argv", ["report", "quickstart", "--runs", str(whole), "--results", str(tmp_path / "results")]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1 and says in printed.err
    assert not (tmp_path / "results").exists()


def test_a_sweep_that_is_not_there_is_not_recommended(whole):
    with pytest.raises(ValueError, match="sweeps/ has none of that name either; run were quickstart"):
        read_study("nosuch", whole)
    with pytest.raises(ValueError, match="no sweep 'modules' was run into .*; python run.py -m sweeps=modules does it"):
        read_study("modules", whole)


def test_a_path_in_place_of_a_sweeps_name_is_told_what_to_give(whole, tmp_path):
    rule = "; a sweep is given by its name alone, and a report that was made by its runs.csv"
    for path in (f"{tmp_path}/modules", "modules/", "sweeps/modules.json"):
        with pytest.raises(ValueError, match=f"^no sweep '{path}' was run into {whole}{rule}$"):
            read_record(path, whole)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "runs.csv").touch()
    with pytest.raises(ValueError, match=f"{rule}: {tmp_path}/modules/runs.csv$"):
        read_record(f"{tmp_path}/modules", whole)


def test_a_record_that_points_out_of_the_folder_is_refused(whole, tmp_path):
    record = whole / "sweeps" / "quickstart.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"runs": ["../runs"]}))
    with pytest.raises(ValueError, match="a run folder is called"):
        report("quickstart", whole, tmp_path / "results")


def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path):
    runs = tmp_path / "runs"
    write_sweep(runs, [write_run(runs, "dense", 0, 5.3, train_seconds=seconds) for seconds in (1, 2)])
    with pytest.raises(ValueError, match="seed 0 occurs twice"):
        report("quickstart", runs, tmp_path / "results")


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1234567, "1.2M"), (745000, "745k"), (1.28e9, "1.3B"), (22e6, "22.0M")]
)
def test_counts_are_readable(count, text):
    assert human(count) == text


def test_metrics_of_a_run_that_has_written_none_are_empty(tmp_path):
    assert read_metrics(tmp_path).curve().empty


def test_costs_stand_beside_the_references(whole, tmp_path):
    printed = report("quickstart", whole, tmp_path / "results")
    rows = [line.split() for line in printed.splitlines()]
    dense = "Dense 745k / 745k 1.00 4.0M 1.00 0.81 GB 14 14"  # 409,600 tokens at 30,000 a second
    switch = "Switch 745k / 1.2M 1.66 5.0M 1.25 0.81 GB 14"  # 1,234,567 / 745,000; 5 / 4
    assert dense.split() in rows and switch.split() in [row[:10] for row in rows]


def test_many_arms_are_drawn_by_their_differences_and_leaks_are_marked(tmp_path, monkeypatch):
    drawn: list[str] = []
    saved = figures.save
    monkeypatch.setattr(figures, "save", lambda each, *at: drawn.append(each.get_supxlabel()) or saved(each, *at))
    runs = tmp_path / "runs"
    arms = {"dense": 5.3} | {f"arm_{number:02}": 5.3 - number / 100 for number in range(14)}
    folders = [write_run(runs, arm, seed, ce) for arm, ce in arms.items() for seed in range(2)]
    leaks = ["future in evaluation", "future in training"]
    folders += [write_run(runs, "seer", seed, 2.0, leaks=leaks) for seed in range(2)]
    write_sweep(runs, folders, "many")
    for folder in folders:
        (folder / "checkpoints" / "step-200").mkdir(parents=True)
    printed = report("many", runs, tmp_path / "results")
    assert "differences to the reference" in printed
    assert "seer ‡" in printed and drawn[0].endswith("\n‡ sees the future in evaluation")
    assert "‡ routes by what comes after a token" in printed
    assert "training.sample" in printed
    assert f"training.sample {runs}/arm_13-" in printed, "the best that sees no future is to continue a text"
    assert (tmp_path / "results" / "smoke" / "many" / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("sweep", ["main", "modules", "load_balance", "horizon", "first_k_hash", "hash_methods"])
@pytest.mark.parametrize(("arms", "shown"), [(("dense",), "learning curves"), (("dense", "switch_x"), "")])
def test_a_sweep_of_which_little_is_there_has_a_figure(sweep, arms, shown, tmp_path):
    """Of the reference alone, or of arms without the number that the figure is drawn over."""
    runs = tmp_path / "runs"
    cells = [(arm, seed, 5.2 + place / 10 + seed / 50) for place, arm in enumerate(arms) for seed in range(2)]
    write_sweep(runs, [write_run(runs, *cell) for cell in cells], sweep)
    printed = report(sweep, runs, tmp_path / "results")
    assert f"figure.pdf: {shown}" in printed


def test_a_run_stands_in_a_sweep_under_the_sweeps_own_label(whole):
    dense = [path.name for path in sorted(whole.glob("dense-s*"))]
    record = json.loads((whole / "sweeps" / "quickstart.json").read_text())
    cells = [{"run": run, "arm": arm, "seed": seed} for arm in ("plain", "again") for seed, run in enumerate(dense)]
    (whole / "sweeps" / "labels.json").write_text(json.dumps(record | {"runs": dense, "cells": cells}))
    study = read_study("labels", whole)
    assert list(study.counted["arm"]) == ["plain"] * 3 + ["again"] * 3 and list(study.counted["id"]) == dense * 2
    assert study.curves.groupby(["arm", "seed"], sort=False).size().tolist() == [11] * 6


@pytest.mark.long
def test_sixty_runs_of_two_thousand_logged_steps_are_read_in_two_seconds(tmp_path):
    runs = tmp_path / "runs"
    folders = [write_run(runs, f"arm_{arm}", seed, 5.0 + arm / 100) for arm in range(20) for seed in range(3)]
    routes = {f"route/{layer}/{name}": 1.23456789012345 for layer in (1, 3) for name in ("max_over_mean", "entropy")}
    for folder in folders:
        lines = [{"step": step, "tokens": step, "seconds": step / 7, "train/ce": 6.1} | routes for step in range(2001)]
        lines += [{"step": step, "tokens": step, "seconds": step / 7, "val/ce": 6.1} for step in range(0, 2001, 50)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_sweep(runs, folders)
    began = time.process_time()
    assert len(read_study("quickstart", runs).curves) == 60 * 41
    assert time.process_time() - began < 2
