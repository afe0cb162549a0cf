"""Verdicts on the claims: planted effects and nulls on real runs, hand arithmetic, and committed results."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import compose_config, tiny_words

from analysis.contrasts import examine
from analysis.runs import read_study
from analysis.verdicts import judge, main, read_claims, runs_of
from training.job import FINISHED, run

SEEDS = 4
CLAIMS = read_claims()


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> list[Path]:
    """Runs of one arm that run.py's code made, a seed each; what is planted is planted on copies of them."""
    runs = tmp_path_factory.mktemp("seeds")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs)
    for seed in range(SEEDS):
        assert run(compose_config(*words, "train.steps=2", "record.keep_weights=false", f"seed={seed}")) == FINISHED
    return sorted(runs.glob("dense-s*"))


def plant(trained: list[Path], runs: Path, sweep: str, effects: dict[str, float], **more: dict[str, float]) -> None:
    """A sweep of copies: each arm's test loss is moved by its effect and a little noise of its own, in balance."""
    draws, names = np.random.default_rng(7), []
    for arm, effect in effects.items():
        for seed, folder in enumerate(trained):
            copy = runs / f"{arm}-s{seed}-{len(names):08x}"
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            result = json.loads((copy / "result.json").read_text())
            result["test/ce"] += effect + 0.0005 * draws.standard_normal()
            result |= {key: values[arm] * (1 + 0.001 * draws.standard_normal()) for key, values in more.items()}
            (copy / "result.json").write_text(json.dumps(result))
            names.append(copy.name)
    (runs / "sweeps").mkdir(parents=True, exist_ok=True)
    record = {"sweep": sweep, "scale": "smoke", "command": ["python", "run.py"], "runs": names}
    (runs / "sweeps" / f"{sweep}.json").write_text(json.dumps(record))


METHODS = {"hash_balanced": 0, "hash_random": 0.003, "hash_clustered": 0.03, "hash_dispersed": 0.003}
METHODS |= {"hash_previous": 0.05, "hash_bigram": 0.04, "hash_position": 0.09, "hash_next_token": -2.0}


def planted(trained: list[Path], runs: Path, size: float) -> dict[str, str]:
    """Verdicts on effects as the paper has them, times size, the margins of equivalence aside."""
    at = (16, 32, 64, 128)
    sweeps = {
        "main": {"hash_balanced_1x64": -0.02, "switch_1x64": 0},
        "hash_methods": METHODS,
        "modules": {f"hash_balanced_{x}": -0.02 * math.log2(x / 16) for x in at} | {f"switch_{x}": 0.0 for x in at},
        "multi_hash": {"hash_balanced_1_hash": 0} | {f"hash_multi_{n}_hashes": -0.01 for n in (2, 4, 8)},
        "dictionary": {"hash_balanced_words": 0.02, "switch_words": 0},
        "position": {f"hash_balanced_layer_{x}": -0.01 * x for x in range(3)},
        "finetune": {"hash_balanced_tuned": -0.03, "switch_tuned": 0},
        "load_balance": {"switch_coef_0": 0.1, "switch_coef_0.001": 0.05}
        | {f"switch_coef_{x}": 0 for x in ("0.01", "0.1", "1")},
        "horizon": {"hash_balanced_1x": -0.2, "dense_1x": 0, "dense_2x": -0.1},
    }
    for sweep, effects in sweeps.items():
        plant(trained, runs, sweep, {arm: size * effect for arm, effect in effects.items()})
    speeds = {"hash_balanced": 1 + 0.1 * size, "base": 1.0}
    plant(trained, runs, "base_comparison", {"hash_balanced": -0.02 * size, "base": 0}, tokens_per_second=speeds)
    judged = judge(CLAIMS, lambda sweep: runs_of(sweep, "smoke", runs, runs / "none"))
    return {each.claim: each.verdict for each in judged}


def test_planted_effects_are_supported_and_planted_the_other_way_contradicted(trained, tmp_path):
    assert set(planted(trained, tmp_path / "as_published", 1).values()) == {"supported"}
    reversed_ = planted(trained, tmp_path / "reversed", -1)
    assert reversed_.pop("C11") == "supported"  # a range has no other way
    assert set(reversed_.values()) == {"contradicted"}


def test_of_planted_nulls_nothing_is_separated_but_that_equal_is_no_worse(trained, tmp_path):
    verdicts = planted(trained, tmp_path, 0)
    assert verdicts.pop("C1") == "supported"
    assert verdicts.pop("C11") == "contradicted"  # all five coefficients are within the margin of each other
    assert set(verdicts.values()) == {"not separated"}


def frame(losses: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(f"{arm}-s{seed}-0", arm, seed, loss) for arm, own in losses.items() for seed, loss in enumerate(own)]
    return pd.DataFrame(rows, columns=["id", "arm", "seed", "test/ce"])


def test_a_difference_is_the_paired_t_test_of_its_two_arms():
    part = {"sweep": "any", "weights": {"a": 1, "b": -1}, "expect": "below"}
    found = examine(part, frame({"a": [5.0, 5.1, 5.2], "b": [5.01, 5.13, 5.22], "c": [1, 9, 5]}), 0.008)
    # differences -0.01, -0.03, -0.02: t = -0.02 / (0.01 / sqrt 3) = -3.4641, one-sided on 2 degrees 0.0371
    assert found.estimate.value == pytest.approx(-0.02) and found.estimate.n == 3
    assert found.p_for == pytest.approx(0.0371, abs=1e-4) and found.p_against == pytest.approx(1 - 0.0371, abs=1e-4)
    assert found.runs == ("a-s0-0", "a-s1-0", "a-s2-0", "b-s0-0", "b-s1-0", "b-s2-0")


def test_a_slope_is_over_the_places_that_all_arms_have():
    lead = {"a_16": [5.0, 5.1], "a_32": [4.9, 5.01], "a_64": [4.8, 4.9], "b_16": [5.0, 5.1], "b_32": [5.0, 5.1]}
    part = {"sweep": "any", "weights": {"a_{x}": 1, "b_{x}": -1}, "along": {"log": 2}, "expect": "below"}
    found = examine(part, frame(lead), 0.008)
    assert found.estimate.value == pytest.approx(-0.095) and found.estimate.dof == 3  # 4 arms, 2 seeds
    assert examine(part, frame({"a_16": [5.0], "b_16": [5.0]}), 0.008).lacks.endswith("run of a_{x}, b_{x}")


def test_weights_are_of_means_so_three_against_one_is_in_nats():
    part = {"sweep": "any", "weights": {"a": 1, "b": 1, "c": -2}, "expect": "below"}
    found = examine(part, frame({"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0]}), 0.008)
    assert found.estimate.value == pytest.approx(-3)


def test_a_range_over_equal_arms_is_found_in_five_of_a_hundred():
    arms = [str(number) for number in range(5)]
    part = {"sweep": "any", "range": arms, "expect": "above"}
    draws = np.random.default_rng(0).standard_normal((120, 5, 3))
    found = [examine(part, frame(dict(zip(arms, own.tolist()))), 0.008).p_for < 0.05 for own in draws]
    assert 0 < np.mean(found) < 0.1


def test_committed_results_are_read_without_any_run_folder(trained, tmp_path, capsys, monkeypatch):
    plant(trained, tmp_path / "runs", "finetune", {"hash_balanced_tuned": -0.3, "switch_tuned": 0})
    committed = tmp_path / "results" / "smoke" / "finetune"
    committed.mkdir(parents=True)
    read_study("finetune", tmp_path / "runs").runs.to_csv(committed / "runs.csv", index=False)
    words = ["verdicts", "smoke", "--runs", str(tmp_path / "none"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", words)
    main()
    printed = capsys.readouterr().out
    assert "C9   supported" in printed and printed.count("not run") >= 11
    assert "finetune: hash_balanced_tuned - switch_tuned < 0\n    -0." in printed
    assert "hash_balanced_tuned-s0-00000000" in printed and "switch_tuned-s3-" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_a_single_seed_separates_nothing_and_another_scale_is_not_run(trained, tmp_path):
    plant(trained[:1], tmp_path, "finetune", {"hash_balanced_tuned": -0.3, "switch_tuned": 0})
    for scale, verdict in (("smoke", "not separated"), ("small", "not run")):
        judged = judge(CLAIMS, lambda sweep, scale=scale: runs_of(sweep, scale, tmp_path, tmp_path / "none"))
        assert judged[8].claim == "C9" and judged[8].verdict == verdict


def test_every_declared_contrast_is_whole():
    assert list(CLAIMS["claims"]) == [f"C{number}" for number in range(1, 13)]
    for claim in CLAIMS["claims"].values():
        for part in claim["parts"]:
            assert set(part) <= {"sweep", "weights", "along", "range", "metric", "ratio", "expect"}
            assert ("range" in part) != ("weights" in part)
            assert "{x}" in str(part) if "along" in part else sum(part.get("weights", {"": 0}).values()) == 0
