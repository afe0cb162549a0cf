"""Verdicts on the claims: planted effects and nulls on real runs, hand arithmetic, and committed results."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, compose_config, tiny_words
from scipy.special import stdtr

from analysis.arms import declared, load
from analysis.behind import write
from analysis.contrasts import examine
from analysis.report import report
from analysis.runs import read_study
from analysis.statistics import paired_difference
from analysis.summary import summary
from analysis.verdicts import Verdict, judge, main, printed, read_claims, runs_of
from training.job import FINISHED, run

SEEDS = 4
CLAIMS = read_claims()
PARTS = [part for claim in CLAIMS["claims"].values() for part in claim["parts"]]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> list[Path]:
    """Runs of one arm that run.py's code made, a seed each; what is planted is planted on copies of them."""
    runs = tmp_path_factory.mktemp("seeds")
    words = tiny_words(corpus, tmp_path_factory.getbasetemp() / "cache", runs)
    for seed in range(SEEDS):
        assert run(compose_config(*words, "train.steps=2", "record.keep_weights=false", f"seed={seed}")) == FINISHED
    return sorted(runs.glob("dense-s*"))


def plant(
    trained: list[Path],
    runs: Path,
    sweep: str,
    effects: dict[str, float],
    exact: dict[str, dict] | None = None,
    **more: dict[str, float],
) -> None:
    """A sweep of copies: each arm's test loss is moved by its effect and a little noise of its own, in balance. exact:
    by arm, what else its results say; more: by metric and arm, what it is but for a little noise."""
    draws, names = np.random.default_rng(7), []
    for arm, effect in effects.items():
        for seed, folder in enumerate(trained):
            copy = runs / f"{arm}-s{seed}-{len(names):08x}"
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            result = json.loads((copy / "result.json").read_text())
            result["test/ce"] += effect + 0.0005 * draws.standard_normal()
            result |= {key: values[arm] * (1 + 0.001 * draws.standard_normal()) for key, values in more.items()}
            result |= (exact or {}).get(arm, {})
            (copy / "result.json").write_text(json.dumps(result))
            names.append(copy.name)
    (runs / "sweeps").mkdir(parents=True, exist_ok=True)
    record = {"sweep": sweep, "scale": "smoke", "command": ["python", "run.py"], "runs": names}
    (runs / "sweeps" / f"{sweep}.json").write_text(json.dumps(record))


PLACES = ("1x64", "1x128", "5x16")
COEFFICIENTS = [f"switch_coef_{x}" for x in ("0", "0.001", "0.01", "0.1", "1")]
METHODS = {"hash_balanced": 0, "hash_random": 0.003, "hash_clustered": 0.03, "hash_dispersed": 0.003}
METHODS |= {"hash_previous": 0.05, "hash_bigram": 0.04, "hash_position": 0.09, "hash_predicted": 0.08}
METHODS |= {"hash_next_token": -2.0}


def planted(trained: list[Path], runs: Path, size: float) -> dict[str, str]:
    """Verdicts on effects as the paper has them, times size, the margins of equivalence aside."""
    at = (16, 32, 64, 128)
    sweeps = {
        "main": {f"hash_balanced_{x}": -0.02 for x in PLACES} | {f"switch_{x}": 0 for x in PLACES},
        "hash_methods": METHODS,
        "modules": {f"hash_balanced_{x}": -0.02 * math.log2(x / 16) for x in at} | {f"switch_{x}": 0.0 for x in at},
        "multi_hash": {"hash_balanced_1_hash": 0} | {f"hash_multi_{n}_hashes": -0.01 for n in (2, 4, 8)},
        "dictionary": {"hash_balanced_bpe_1024": 0, "switch_bpe_1024": 0}
        | {"hash_balanced_words": 0.02, "switch_words": 0},
        "position": {f"hash_balanced_layer_{x}": -0.01 * x for x in range(3)},
        "finetune": {"hash_balanced_tuned": -0.03, "switch_tuned": 0},
        "load_balance": dict(zip(COEFFICIENTS, (0.1, 0.05, 0, 0, 0))),
        "horizon": {"hash_balanced_1x": -0.2, "dense_1x": 0, "dense_2x": -0.1, "dense_4x": -0.3},
    }
    exact = {arm: {"data_fingerprint": "words"} for arm in ("hash_balanced_words", "switch_words")}
    exact |= {"dense_2x": {"token_budget": 512}, "dense_4x": {"token_budget": 1024}}
    for sweep, effects in sweeps.items():
        plant(trained, runs, sweep, {arm: size * effect for arm, effect in effects.items()}, exact)
    speeds = {"hash_balanced": 1 + 0.1 * size, "base": 1.0}
    plant(trained, runs, "base_comparison", {"hash_balanced": -0.02 * size, "base": 0})
    plant(trained, runs, "rates", {"hash_balanced": 0, "base": 0}, tokens_per_second=speeds)
    return verdicts_of(runs)


def judged_of(runs: Path, scale: str = "smoke") -> list[Verdict]:
    return judge(CLAIMS, lambda sweep: runs_of(sweep, scale, runs, runs / "none"))


def verdicts_of(runs: Path) -> dict[str, str]:
    return {each.claim: each.verdict for each in judged_of(runs)}


def test_planted_effects_are_supported_and_planted_the_other_way_contradicted(trained, tmp_path):
    assert set(planted(trained, tmp_path / "as_published", 1).values()) == {"supported"}
    reversed_ = planted(trained, tmp_path / "reversed", -1)
    assert reversed_.pop("C11") == "supported"  # a range has no other way
    assert set(reversed_.values()) == {"contradicted"}


def test_of_planted_nulls_nothing_is_separated_but_that_equal_is_no_worse(trained, tmp_path):
    verdicts = planted(trained, tmp_path, 0)
    assert verdicts.pop("C1") == "supported"
    assert verdicts.pop("C4") == "contradicted"  # an oracle that is like all is not far below them
    assert verdicts.pop("C11") == "contradicted"  # all five coefficients are within the margin of each other
    assert set(verdicts.values()) == {"not separated"}


def examined(*given: Any) -> Any:
    """examine's Outcome. Any, as one that cannot be told has no estimate."""
    return examine(*given)


def frame(losses: dict[str, list[float]]) -> pd.DataFrame:
    rows = [(f"{arm}-s{seed}-0", arm, seed, loss) for arm, own in losses.items() for seed, loss in enumerate(own)]
    return pd.DataFrame(rows, columns=["id", "arm", "seed", "test/ce"])


def test_a_difference_of_a_sweep_of_two_arms_is_the_paired_t_test():
    part = {"sweep": "any", "weights": {"a": 1, "b": -1}, "expect": "below"}
    found = examined(part, frame({"a": [5.0, 5.1, 5.2], "b": [5.01, 5.13, 5.22]}), 0.008)
    # differences -0.01, -0.03, -0.02: t = -0.02 / (0.01 / sqrt 3) = -3.4641, one-sided on 2 degrees 0.0371
    assert found.estimate.value == pytest.approx(-0.02) and found.estimate.n == 3
    assert found.p_for == pytest.approx(0.0371, abs=1e-4) and found.p_against == pytest.approx(1 - 0.0371, abs=1e-4)
    assert found.runs == ("a-s0-0", "a-s1-0", "a-s2-0", "b-s0-0", "b-s1-0", "b-s2-0")


def test_the_scatter_of_a_contrast_is_that_of_all_arms_as_in_the_table(trained, tmp_path):
    """On ever more arms, of which it names two: by hand, and as the table has it."""
    part = {"sweep": "modules", "weights": {"hash_balanced_16": 1, "switch_16": -1}, "expect": "below"}
    plant(
        trained, tmp_path, "modules", {f"{arm}_{x}": 0.0 for x in (16, 32, 64) for arm in ("switch", "hash_balanced")}
    )
    runs = runs_of("modules", "smoke", tmp_path, tmp_path)
    found = examined(part, runs, 0.008)
    assert found.estimate.dof == 5 * (SEEDS - 1) and found.estimate.n == SEEDS
    assert found.scatter == "by the residual of all 6 arms on 15 degrees of freedom" and len(found.runs) == 2 * SEEDS
    losses = runs.pivot(index="seed", columns="arm", values="test/ce").to_numpy()
    residuals = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    assert found.estimate.error == pytest.approx(((residuals**2).sum() / 15 * 2 / SEEDS) ** 0.5)
    lost = runs.assign(outcome=["failed" if arm == "switch_64" else "finished" for arm in runs["arm"]])
    assert examined(part, lost, 0.008).estimate.dof == 4 * (SEEDS - 1)  # what has not finished is in no residual


def test_an_arm_that_scatters_unlike_the_others_is_tested_by_its_own_runs_alone(trained, tmp_path):
    arms = {f"{arm}_{x}": 0.0 for x in (16, 32, 64) for arm in ("switch", "hash_balanced")}
    plant(trained, tmp_path, "modules", arms)
    runs = runs_of("modules", "smoke", tmp_path, tmp_path)
    wild = runs["arm"] == "switch_64"
    runs.loc[wild, "test/ce"] += 0.05 * np.array([1, -1, 2, -2])
    part = {"sweep": "modules", "weights": {"hash_balanced_64": 1, "switch_64": -1}, "expect": "below"}
    found = examined(part, runs, 0.008)
    own: Any = runs.pivot(index="seed", columns="arm", values="test/ce")
    expected = paired_difference(own["hash_balanced_64"], own["switch_64"])
    assert found.estimate == pytest.approx(expected)
    assert found.scatter == "by its own runs alone, for switch_64 scatters unlike the other arms"
    other = examined(part | {"weights": {"hash_balanced_16": 1, "switch_16": -1}}, runs, 0.008)
    assert other.estimate.dof == 12  # beyond doubt it is not theirs: out of their variance, as in the table
    assert other.scatter == "by the residual of all 6 arms but switch_64, set apart, on 12 degrees of freedom"
    slope = part | {"weights": {"hash_balanced_{x}": 1, "switch_{x}": -1}, "along": {"log": 2}}
    lead = own[["hash_balanced_16", "hash_balanced_64"]].to_numpy() - own[["switch_16", "switch_64"]].to_numpy()
    expected = paired_difference(pd.Series(lead[:, 1] / 2), pd.Series(lead[:, 0] / 2))
    assert examined(slope, runs, 0.008).estimate == pytest.approx(expected)
    extent = {"sweep": "modules", "range": ["switch_16", "switch_32", "switch_64"], "expect": "above"}
    assert examined(extent, runs, 0.008).estimate.dof == 12  # of the two that are not apart, so at least as wide
    assert abs(examined(extent, runs, 0.008).estimate.value) < 0.01
    runs.loc[wild, "test/ce"] = own["switch_32"].to_numpy() + 0.0006 * np.array([1, -1, 2, -2])  # noisy, but not apart
    assert examined(extent, runs, 0.008).estimate.dof == 2 * (SEEDS - 1)  # of the three alone


def test_a_contrast_takes_one_seed_of_several_groups_as_one_only_if_it_crosses_them():
    """Of horizon: a seed's effect is one in all groups, or another one in each."""
    draws, arms = np.random.default_rng(2), ("dense", "hash_balanced", "switch", "loss_free")
    within = {"sweep": "horizon", "weights": {"hash_balanced_1x": 1, "dense_1x": -1}, "expect": "below"}
    across = within | {"weights": {"hash_balanced_1x": 1, "dense_2x": -1}}
    for apart, dofs in ((0.0, (18, 22)), (0.1, (18, 2))):
        effects = {x: SEED_EFFECTS + apart * draws.standard_normal(3) for x in (1, 2, 4)}
        losses = {f"{arm}_{x}x": effects[x] + 0.001 * draws.standard_normal(3) for arm in arms for x in effects}
        runs = frame({arm: own.tolist() for arm, own in losses.items()})
        assert tuple(examined(part, runs, 0.008).estimate.dof for part in (within, across)) == dofs
        assert examined(within, runs, 0.008).estimate.n == 3


LONG_CASES = [pytest.param(*case, 1, marks=pytest.mark.long) for case in ((4, 0, 3), (1, 1, 3), (1, 0, 5))]


@pytest.mark.parametrize(("noise", "seed_by_group", "n", "other"), [(1, 0, 3, 1), (1, 6, 3, 50), *LONG_CASES])
def test_the_interval_of_a_contrast_covers_in_nineteen_tables_of_twenty(noise, seed_by_group, n, other):
    """Across groups, whatever a seed does in each, and though an arm of it has four times the others' deviation, or
    another one 50 times, which would hide what a seed does."""
    draws = np.random.default_rng(5)
    part = {"sweep": "horizon", "weights": {"hash_balanced_1x": 1, "dense_2x": -1}, "expect": "below"}
    arms, covered = [f"{arm}_{x}x" for x in (1, 2, 4) for arm in ("dense", "hash_balanced", "switch")], []
    for _ in range(250):
        group = np.repeat(seed_by_group * draws.standard_normal((3, n)), 3, axis=0)
        losses = draws.standard_normal(n) + group + draws.standard_normal((9, n))
        losses[3] += (noise**2 - 1) ** 0.5 * draws.standard_normal(n)  # dense_2x
        losses[8] += (other**2 - 1) ** 0.5 * draws.standard_normal(n)  # switch_4x
        low, high = examined(part, frame(dict(zip(arms, losses.tolist()))), 0.008).estimate.interval()
        covered.append(low < 0 < high)
    assert np.mean(covered) > 0.9


def tail(t: float, dof: int = 2) -> float:
    """P(T > t) of Student's t; on 2 degrees of freedom (1 - t / sqrt(t^2 + 2)) / 2."""
    return float(stdtr(dof, -t))


def steps_of(middle: float, step: float) -> np.ndarray:
    """Three differences, whose mean has the standard error step / sqrt(3)."""
    return middle + step * np.array([-1, 0, 1])


SEED_EFFECTS = np.array([5.0, 5.1, 5.25])


def verdict_of(claim: str, sweeps: dict[str, dict[str, np.ndarray]]) -> Verdict:
    """Of the declared claim alone: Holm's correction over one."""
    only = CLAIMS | {"claims": {claim: CLAIMS["claims"][claim]}}
    frames = {
        sweep: frame({arm: (SEED_EFFECTS + effect).tolist() for arm, effect in arms.items()})
        for sweep, arms in sweeps.items()
    }
    return judge(only, lambda sweep: frames.get(sweep, pd.DataFrame()))[0]


@pytest.mark.parametrize(
    ("main", "base", "verdict", "p"),
    [
        # 0.004 and 0.006 below the margin: t of sqrt 80 on 10 degrees and sqrt 108 on 2, the larger p, twice
        (0.004, 0.002, "supported", 2 * tail(108**0.5)),
        # 0.004 above the margin in three parts of four: four times for the parts, and twice for the sides
        (0.012, 0.002, "contradicted", 2 * 4 * tail(80**0.5, 10)),
        # neither: 0.001 above the margin is t = sqrt 5
        (0.009, 0.002, "not separated", 2 * 4 * tail(5**0.5, 10)),
    ],
)
def test_p_of_c1_by_hand(main, base, verdict, p):
    """Residuals of half a step in all six arms of main: a variance of 6 (0.5 0.001)^2 2 / 10, of two means over 3 seeds
    2 / 3 of that, 0.001^2 / 5; of the two arms of base_comparison 0.001^2 / 3."""
    sweeps = {"main": {f"hash_balanced_{x}": steps_of(main, 0.001) for x in PLACES}}
    sweeps["main"] |= {f"switch_{x}": np.zeros(3) for x in PLACES}
    sweeps["base_comparison"] = {"hash_balanced": steps_of(base, 0.001), "base": np.zeros(3)}
    found = verdict_of("C1", sweeps)
    assert found.verdict == verdict and found.p == pytest.approx(p, rel=1e-6)
    assert found.parts[0].p_for == pytest.approx(tail((0.008 - main) / 0.001 * 5**0.5, 10), rel=1e-6)
    assert found.parts[0].p_against == pytest.approx(tail((main - 0.008) / 0.001 * 5**0.5, 10), rel=1e-6)


def test_the_interval_that_is_printed_is_of_that_figure_alone_as_the_legend_says():
    """0.004, its standard error 0.001 / sqrt 5 on 10 degrees of freedom, where t is 2.2281 at 97.5 %."""
    main = {
        f"{arm}_{x}": own
        for x in PLACES
        for arm, own in (("hash_balanced", steps_of(0.004, 0.001)), ("switch", np.zeros(3)))
    }
    said = " ".join(printed([verdict_of("C1", {"main": main})], "smoke", 0.05, 0.008).split())
    assert said.count("+0.0040 [+0.0030, +0.0050] nats, n = 3") == len(PLACES)
    assert "[low, high]: the 95 % t-interval of that figure alone" in said and "p for it, against it: one-sided" in said


def c2(balanced: np.ndarray, random: np.ndarray, dispersed: np.ndarray) -> Verdict:
    """By what is taken from the loss: of clustered for the first two, of random for dispersed."""
    arms = {"hash_clustered": np.zeros(3), "hash_balanced": -balanced, "hash_random": -random}
    return verdict_of("C2", {"hash_methods": arms | {"hash_dispersed": -random - dispersed}})


def test_p_of_c2_by_hand():
    """Residuals of half a step in all four arms: a variance of 4 (0.5 0.001)^2 2 / 6, of a difference 0.001^2 2 / 9."""
    # the farthest from certain is that dispersed is 0.004 within the margin: t of sqrt 72, twice
    found = c2(steps_of(0.04, 0.001), steps_of(0.06, 0), steps_of(0.004, 0.001))
    assert found.verdict == "supported" and found.p == pytest.approx(2 * tail(72**0.5, 6), rel=1e-6)
    # random above clustered by t = sqrt 18: three times for the parts, twice for the sides
    found = c2(steps_of(0.04, 0.001), steps_of(-0.002, 0), steps_of(0.004, 0.001))
    assert found.verdict == "contradicted" and found.p == pytest.approx(2 * 3 * tail(18**0.5, 6), rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_either_side_of_the_margin_speaks_against_equal(sign):
    found = c2(steps_of(0.04, 0.001), steps_of(0.06, 0), steps_of(sign * 0.017, 0.001))
    once = tail(9 * 4.5**0.5, 6)
    assert found.parts[2].p_against == pytest.approx(2 * once, rel=1e-6)  # twice for the two sides
    assert found.verdict == "contradicted" and found.p == pytest.approx(2 * 3 * 2 * once, rel=1e-6)


def test_without_an_effect_five_tables_of_a_hundred_have_a_verdict():
    """Two claims a table, each with its figure on the bound: no more may be said, and Holm's correction lets as much
    be said by chance."""
    bounds = {"below": 0.0, "within": 0.008}
    claims: dict = {"margin": 0.008, "level": 0.05, "claims": {}}
    for expect in bounds:
        part = {"sweep": "any", "weights": {expect: 1, f"reference_of_{expect}": -1}, "expect": expect}
        claims["claims"][expect] = {"says": "", "parts": [part]}
    draws, said = np.random.default_rng(0), []
    for _ in range(250):
        seeds = draws.standard_normal(3)
        losses = {arm: seeds + bound + 0.001 * draws.standard_normal(3) for arm, bound in bounds.items()}
        losses |= {f"reference_of_{arm}": seeds + 0.001 * draws.standard_normal(3) for arm in bounds}
        table = frame({arm: own.tolist() for arm, own in losses.items()})
        verdicts = judge(claims, lambda sweep, table=table: table)
        said.append({each.verdict for each in verdicts} != {"not separated"})
    assert 0.01 < np.mean(said) < 0.065


def test_a_slope_is_over_the_places_that_all_arms_have():
    lead = {"a_16": [5.0, 5.1], "a_32": [4.9, 5.01], "b_16": [5.0, 5.1], "b_32": [5.0, 5.11]}
    part = {"sweep": "any", "weights": {"a_{x}": 1, "b_{x}": -1}, "along": {"log": 2}, "expect": "below"}
    found = examined(part, frame(lead), 0.008)
    assert found.estimate.value == pytest.approx(-0.1) and found.estimate.dof == 3  # 4 arms, 2 seeds
    assert examined(part, frame({"a_16": [5.0], "b_16": [5.0]}), 0.008).lacks.endswith("run of a_{x}, b_{x}")


def test_a_slope_lacks_a_place_that_is_declared_or_that_one_of_its_arms_has():
    part = {"sweep": "any", "weights": {"a_{x}": 1, "b_{x}": -1}, "along": {"log": 2}, "expect": "below"}
    runs = frame({"a_16": [5.0, 5.1], "a_32": [4.9, 5.0], "a_64": [4.8, 4.9], "b_16": [5.0, 5.1], "b_32": [5.0, 5.1]})
    assert examined(part, runs, 0.008).lacks == "any has no finished run of b_64"
    declared = part | {"along": {"log": 2, "places": [16, 32, 128]}}
    assert examined(declared, runs.loc[runs["arm"] != "a_64"], 0.008).lacks.endswith("run of a_128, b_128")
    by_scale = part | {"along": {"log": 2, "places": {"smoke": [64]}}}
    assert examined(by_scale, runs.loc[runs["arm"] != "a_64"].assign(scale="smoke"), 0.008).lacks.endswith("a_64, b_64")
    assert not examined(by_scale, runs.loc[runs["arm"] != "a_64"].assign(scale="small"), 0.008).lacks


def test_every_sweep_of_a_claim_trains_as_many_seeds_as_a_verdict_needs():
    for sweep in {part["sweep"] for part in PARTS}:
        params = yaml.safe_load((ROOT / "sweeps" / f"{sweep}.yaml").read_text())["hydra"]["sweeper"]["params"]
        assert len(str(params["seed"]).split(",")) >= 3, sweep


def test_the_places_declared_are_those_that_the_sweeps_have_by_default():
    places = {part["sweep"]: part["along"]["places"] for part in PARTS if "along" in part}
    for scale, layers in places["position"].items():
        model = yaml.safe_load((ROOT / "conf" / "scale" / f"{scale}.yaml").read_text())["model"]
        assert layers == [*range(model["num_layers"])]
    assert set(places["position"]) == {path.stem for path in (ROOT / "conf" / "scale").glob("*.yaml")}
    sweep = yaml.safe_load((ROOT / "sweeps" / "modules.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert ",".join(map(str, places["modules"])) == sweep["num_experts"]


def test_weights_are_of_means_so_three_against_one_is_in_nats():
    part = {"sweep": "any", "weights": {"a": 1, "b": 1, "c": -2}, "expect": "below"}
    found = examined(part, frame({"a": [1.0, 2.0], "b": [3.0, 4.0], "c": [5.0, 6.0]}), 0.008)
    assert found.estimate.value == pytest.approx(-3)


def test_a_range_over_equal_arms_is_found_in_five_of_a_hundred():
    arms = [str(number) for number in range(5)]
    part = {"sweep": "any", "range": arms, "expect": "above"}
    draws = np.random.default_rng(0).standard_normal((120, 5, 3))
    found = [examined(part, frame(dict(zip(arms, own.tolist()))), 0.008).p_for < 0.05 for own in draws]
    assert 0 < np.mean(found) < 0.1


def test_where_a_figure_is_0_is_told_and_decides_nothing():
    part = {"sweep": "any", "weights": {"a_{x}x": 1, "b_1x": -1}, "along": {"log": 2, "places": [1, 2, 4]}}
    part |= {"expect": "told"}
    losses = {"a_1x": [5.3, 5.4], "a_2x": [5.1, 5.2], "a_4x": [4.9, 5.0], "b_1x": [5.0, 5.1]}
    found = examined(part, frame(losses), 0.008)  # 0.3, 0.1 and -0.1: 0 half way from 2 to 4 on the logarithm
    assert found.told.endswith("; 0 at x = 2.83") and found.told.startswith("+0.3000 [+0.3000, +0.3000] at x = 1; ")
    assert examined(part, frame(losses | {"a_4x": [5.01, 5.11]}), 0.008).told.endswith("; 0 nowhere between")
    apart = frame(losses)
    apart.loc[apart["arm"] == "b_1x", "seed"] += 2
    assert examined(part, apart, 0.008).lacks == "any has no seeds that a_1x, a_2x, a_4x, b_1x share"

    decides = part | {"weights": {"a_1x": 1, "b_1x": -1}, "expect": "above"}
    del decides["along"]
    claims = {"margin": 0.008, "level": 0.05, "claims": {"C": {"says": "", "parts": [decides, part]}}}
    both = {"a_1x": [5.3, 5.41, 5.5], "b_1x": [5.0, 5.1, 5.2]}
    [verdict] = judge(claims, lambda sweep: frame(both))
    assert verdict.verdict == "supported" and verdict.parts[1].lacks.endswith("run of a_2x, a_4x")


def test_the_oracle_is_compared_with_every_other_hash():
    sweep = yaml.safe_load((ROOT / "sweeps" / "hash_methods.yaml").read_text())["hydra"]["sweeper"]["params"]
    hashes = {name.strip() for name in sweep["router"].split(",")} - {"dense", "hash_next_token"}
    weights = [part["weights"] for part in CLAIMS["claims"]["C4"]["parts"]]
    assert weights == [{"hash_next_token": 1, other: -1} for each in weights for other in each if each[other] < 0]
    assert {arm for each in weights for arm in each} - {"hash_next_token"} == hashes


def test_what_is_past_its_bound_by_less_than_the_noise_floor_counts_for_neither_side():
    runs = frame({"a": [5.0, 5.1, 5.2], "b": [5.007, 5.106, 5.208]})  # a is below b by 0.007, p = 0.002
    # two repeats 0.001 apart: deviation 0.001 / sqrt 2, and t of 0.975 on 1 degree is 12.706: 0.012706 for single runs,
    # and for means over three of them 0.012706 / sqrt 3 = 0.007336
    repeats = frame({"r": [5.0, 5.001]}).assign(seed=0)
    below = {"sweep": "any", "weights": {"a": 1, "b": -1}, "expect": "below"}
    found = examined(below, runs, 0.008, repeats)
    assert found.floor == pytest.approx(0.007336, abs=1e-6) and found.below_floor and found.p_for == 1
    assert examined(below, runs, 0.008).p_for < 0.004 and np.isnan(examined(below, runs, 0.008).floor)
    assert np.isnan(examined(below, runs, 0.008, frame({"r": [5.0, 5.1]})).floor)  # two seeds are no repeats
    wider = frame({"a": [5.0, 5.1, 5.2], "b": [5.01, 5.109, 5.211]})  # 0.01: less than two single runs may differ by
    assert (
        examined(below, wider, 0.008, repeats).p_for < 0.002 and not examined(below, wider, 0.008, repeats).below_floor
    )
    # equal figures are within a margin of 0.02, and within one of 0.008, which is more than the floor
    equal = frame({"a": [5.0, 5.1, 5.2], "b": [5.0001, 5.1, 5.1999]})
    within = below | {"expect": "within"}
    for margin in (0.02, 0.008):
        assert (
            examined(within, equal, margin, repeats).p_for < 0.001
            and not examined(within, equal, margin, repeats).blind
        )
    # but whether they are within 0.007, which is less, no figure can tell
    assert examined(within, equal, 0.007, repeats).blind and examined(within, equal, 0.007, repeats).p_for == 1
    # of a slope over four places of three seeds: weights of -0.3, -0.1, 0.1, 0.3, so sqrt(0.2 / 3 / 2) of it
    steps = frame({f"a_{x}": [5 - 0.01 * x, 5.1 - 0.01 * x, 5.2 - 0.01 * x + 1e-4 * (x == 2)] for x in range(4)})
    slope = {"sweep": "any", "weights": {"a_{x}": 1}, "along": {}, "expect": "below"}
    assert examined(slope, steps, 0.008, repeats).floor == pytest.approx(0.012706 * (0.2 / 6) ** 0.5, abs=1e-6)
    assert not examined(slope, steps, 0.008, repeats).below_floor


BLIND = "not separated (floor above margin)"


@pytest.mark.parametrize(
    ("apart", "verdict"),
    [(0.0, BLIND), (0.004, BLIND), (0.1, "contradicted")],
)
def test_that_arms_are_equal_cannot_be_told_where_repeats_differ_by_more_than_the_margin(
    trained, tmp_path, apart, verdict
):
    plant(trained, tmp_path, "hash_methods", METHODS | {"hash_dispersed": METHODS["hash_random"] + apart})
    # 0.003 apart: 0.0381 for two runs, 0.0191 for means over four
    plant(trained[:1], tmp_path, "noise_floor", {"hash_balanced_repeat_0": 0, "hash_balanced_repeat_1": 0.003})
    found = judged_of(tmp_path)[1]
    assert found.claim == "C2" and found.verdict == verdict
    said = " ".join(printed([found], "smoke", 0.05, 0.008).split())
    assert "p for it: cannot be told, the noise floor is above the margin, against it: " in said
    assert "the margin: 0.008 nats, within which two" in said and "(floor above margin): that two methods are" in said
    (tmp_path / "sweeps" / "noise_floor.json").unlink()
    assert verdicts_of(tmp_path)["C2"] == ("contradicted" if apart == 0.1 else "supported")


def test_switch_overtakes_only_where_it_was_not_ahead_with_the_small_dictionary(trained, tmp_path):
    exact = {arm: {"data_fingerprint": "words"} for arm in ("hash_balanced_words", "switch_words")}
    for behind, verdict in ((0.0, "supported"), (0.05, "contradicted")):
        arms = {"hash_balanced_bpe_1024": behind, "switch_bpe_1024": 0, "hash_balanced_words": 0.02, "switch_words": 0}
        plant(trained, tmp_path / verdict, "dictionary", arms, exact)
        assert verdicts_of(tmp_path / verdict)["C7"] == verdict


def test_an_oracle_that_is_below_all_by_little_is_not_far_below(trained, tmp_path):
    for below, verdict in ((-0.02, "contradicted"), (-0.3, "supported")):
        plant(trained, tmp_path / verdict, "hash_methods", METHODS | {"hash_next_token": below})
        assert verdicts_of(tmp_path / verdict)["C4"] == verdict
    said = printed(judged_of(tmp_path / "supported"), "smoke", 0.05, 0.008)
    assert "hash_methods: hash_next_token - hash_balanced < -0.08\n" in said


def test_rates_decide_only_if_they_were_measured_in_one_way(trained, tmp_path):
    speeds = {"hash_balanced": 1.1, "base": 1.0}
    plant(trained, tmp_path, "rates", {"hash_balanced": 0, "base": 0}, tokens_per_second=speeds)
    found = judged_of(tmp_path)[9]
    estimate: Any = found.parts[0].estimate
    assert found.verdict == "supported" and estimate.dof == SEEDS - 1
    assert estimate.error == pytest.approx(0.001 * (2 / SEEDS) ** 0.5, rel=0.6)
    said = " ".join(printed([found], "smoke", 0.05, 0.008).split())
    assert "whatever else the machine did" in said and "1.10" in said and " times, n = 4; p for it: < 0.0001" in said
    changes = {"device": "another", "command": ["run.py", "sweeps=modules"]}
    for key, value in changes.items():
        folder = next(tmp_path.glob("base-s1-*"))
        before = (folder / "provenance.json").read_text()
        (folder / "provenance.json").write_text(json.dumps(json.loads(before) | {key: value}))
        [part] = judged_of(tmp_path)[9].parts
        assert (
            part.lacks.startswith("rates was not measured in one way: ") and judged_of(tmp_path)[9].verdict == "not run"
        )
        (folder / "provenance.json").write_text(before)
    assert judged_of(tmp_path)[9].verdict == "supported"


def test_declared_pairs_stand_under_the_statistics_with_their_paired_intervals(trained, tmp_path):
    """Planted: the gate costs Switch 0.1, and nothing is between the two that have it."""
    arms = {"hash_balanced": 0, "hash_switch_gate": 0.1, "switch": 0.1, "switch_straight_through": 0}
    plant(trained, tmp_path, "gate_by_routing", arms)
    said = report("gate_by_routing", tmp_path, tmp_path / "results")
    [gate] = re.findall(r"\n  Switch less Switch, straight-through: (.*)\n", said)
    [routing] = re.findall(r"\n  Hash, Switch gate less Switch: (.*)\n", said)
    assert "further pairs, in nats: intervals that hold for all of them at once; and the paired t alone\n" in said
    runs = runs_of("gate_by_routing", "smoke", tmp_path, tmp_path)
    own: Any = runs.pivot(index="seed", columns="arm", values="test/ce")
    alone = paired_difference(own["switch"], own["switch_straight_through"])
    low, high = alone.interval()
    assert f"; [{low:+.3f}, {high:+.3f}] p {alone.p:.2g}, n = {SEEDS}" in gate and gate.startswith("+0.1")
    assert re.match(r"[+-]0.00. \[-0.00., \+0.00.\] p ", routing)


def test_every_declared_pair_is_of_arms_that_the_sweep_trains():
    for sweep, asked in load("declared")["sweeps"].items():
        assert len(dict(asked.get("pairs", []))) == len(asked.get("pairs", []))  # an arm is the first of one pair alone
        trained = (ROOT / "sweeps" / f"{sweep}.yaml").read_text()
        for name in [name for pair in asked.get("pairs", []) for name in pair]:
            router, _, place = name.rpartition("_")  # of an experiment's arm
            known = (
                name in trained
                or name.removeprefix("hash_") in trained
                or {router, f"/{place}"} <= set(re.split(r"[,\s]|(?=/)", trained))
            )
            assert known, (sweep, name)


def test_a_difference_of_means_is_marked_by_the_floor_of_means(trained, tmp_path):
    """0.0127 for two runs, half of that for means over four: 0.009 is above it, 0.003 is not."""
    plant(trained, tmp_path, "gate_by_routing", {"hash_balanced": 0, "switch": 0.009, "hash_switch_gate": 0.003})
    runs = read_study("gate_by_routing", tmp_path).runs.assign(noise_floor=0.0127, run_command="")
    for column in ("seconds_to_reference", "documents_low", "documents_high"):
        runs[column] = np.nan
    found = summary(runs, load("style"), declared("gate_by_routing")).set_index("arm")["below_floor"]
    assert found.to_dict() == {"hash_balanced": False, "switch": False, "hash_switch_gate": True}


def test_c1_and_c7_name_the_places_and_dictionaries_that_their_sweeps_have():
    sweep = yaml.safe_load((ROOT / "sweeps" / "main.yaml").read_text())["hydra"]["sweeper"]["params"]
    named = {arm for part in CLAIMS["claims"]["C1"]["parts"] if part["sweep"] == "main" for arm in part["weights"]}
    places = [name.removeprefix("main/") for name in sweep["experiment"].split(",")]
    assert named == {f"{router}_{place}" for router in ("hash_balanced", "switch") for place in places}
    sizes = {
        path.stem: yaml.safe_load(path.read_text())["data"]["vocab_size"]
        for path in (ROOT / "conf" / "scale").glob("*.yaml")
    }
    assert CLAIMS["claims"]["C7"]["parts"][0]["at"] == sizes


def test_a_claim_below_the_noise_floor_is_not_separated_and_says_so(trained, tmp_path):
    plant(trained, tmp_path, "finetune", {"hash_balanced_tuned": -0.02, "switch_tuned": 0})
    plant(trained[:1], tmp_path, "noise_floor", {"hash_balanced_repeat_0": 0, "hash_balanced_repeat_1": 0.01})
    assert verdicts_of(tmp_path)["C9"] == "not separated (below noise floor)"
    (tmp_path / "sweeps" / "noise_floor.json").unlink()
    assert verdicts_of(tmp_path)["C9"] == "supported"


def test_a_sweep_that_cannot_be_told_or_read_stops_no_other(trained, tmp_path):
    plant(trained, tmp_path, "finetune", {"hash_balanced_tuned": -0.03, "switch_tuned": 0})
    unknown = {arm: {"tokens_per_second": None} for arm in ("hash_balanced", "base")}  # as a run of two steps has it
    plant(trained, tmp_path, "rates", {"hash_balanced": 0, "base": 0}, unknown)
    plant(trained, tmp_path, "load_balance", dict.fromkeys(COEFFICIENTS, 0))
    for folder in tmp_path.glob("switch_coef_*"):  # all equal to the last bit
        seed = int(folder.name.split("-s")[1][0])
        (folder / "result.json").write_bytes((trained[seed] / "result.json").read_bytes())
    (tmp_path / "sweeps" / "multi_hash.json").write_text("{")
    verdicts = verdicts_of(tmp_path)
    assert verdicts["C9"] == "supported" and verdicts["C10"] == verdicts["C6"] == "not run"
    assert verdicts["C11"] == "contradicted"
    parts = {each.claim: each.parts for each in judged_of(tmp_path)}
    assert parts["C10"][0].lacks.startswith("rates has no figure of tokens_per_second in hash_balanced-s0-")
    assert parts["C6"][0].lacks.startswith("multi_hash cannot be read: ValueError: ")


def test_what_diverged_is_named(trained, tmp_path):
    diverged = {"switch_coef_0": {"outcome": "diverged"}}
    plant(trained, tmp_path, "load_balance", dict.fromkeys(COEFFICIENTS, 0), diverged)
    verdict = judged_of(tmp_path)[10]
    assert verdict.verdict == "not run (diverged)"
    assert verdict.parts[0].lacks == "load_balance has no finished run of switch_coef_0 (4 diverged)"


def test_runs_that_share_no_seed_tell_nothing():
    runs = frame({"a": [5.0, 5.1, 5.2], "b": [5.0, 5.1, 5.2]})
    runs.loc[runs["arm"] == "b", "seed"] += 3
    found = examined({"sweep": "any", "weights": {"a": 1, "b": -1}, "expect": "below"}, runs, 0.008)
    assert found.estimate is None and found.lacks == "any has no seeds that a, b share"
    found = examined({"sweep": "any", "range": ["a", "b"], "expect": "above"}, runs, 0.008)
    assert found.lacks == "any has no seeds that a, b share"


def test_committed_results_are_read_without_any_run_folder(trained, tmp_path, capsys, monkeypatch):
    plant(trained, tmp_path / "runs", "finetune", {"hash_balanced_tuned": -0.3, "switch_tuned": 0})
    committed = tmp_path / "results" / "smoke" / "finetune"
    committed.mkdir(parents=True)
    found = read_study("finetune", tmp_path / "runs").runs.assign(sweep="finetune", scale="smoke")
    write(found, committed / "runs.csv")
    words = ["verdicts", "smoke", "--runs", str(tmp_path / "none"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", words)
    main()
    said = capsys.readouterr().out
    assert "C9   supported" in said and said.count("not run") == 12  # eleven claims, and the sweeps of them
    assert str(committed / "runs.csv") + ": hash_balanced_tuned-s0-" in "".join(said.split("\n   "))
    assert "finetune: hash_balanced_tuned - switch_tuned < 0\n    -0." in said
    assert "hash_balanced_tuned-s0-00000000" in said and "switch_tuned-s3-" in said
    assert max(map(len, said.splitlines())) <= 120


def test_n_is_that_of_the_arm_with_fewest_runs():
    cells = [("dense", seed) for seed in range(5)] + [("other", seed) for seed in range(5)] + [("few", 0), ("few", 3)]
    losses = [5 + 0.1 * seed + 0.001 * ((seed * 7 + len(arm)) % 3) for arm, seed in cells]
    runs = pd.DataFrame({"arm": [arm for arm, _ in cells], "seed": [seed for _, seed in cells], "test/ce": losses})
    runs["id"] = [f"{arm}-s{seed}" for arm, seed in cells]
    for names, n in ((("dense", "other"), 5), (("dense", "few"), 2)):
        part = {"sweep": "main", "weights": dict(zip(names, (1, -1))), "expect": "below"}
        assert examine(part, runs, 0.008).estimate.n == n


def test_nothing_is_printed_twice_where_nothing_was_run():
    said = printed(judge(CLAIMS, lambda sweep: pd.DataFrame()), "smoke", 0.05, 0.008)
    assert said.count("C4 ") == 1 and said.count("not run") == 13
    for claim in CLAIMS["claims"].values():
        assert " ".join(said.split()).count(claim["says"].split(";")[0]) == 1
    assert said.endswith(
        "finetune (C9), rates (C10), load_balance (C11), horizon (C12)\n  python run.py -m sweeps=NAME scale=smoke"
    )
    assert "smoke: main (C1), base_comparison (C1), hash_methods (C2, C3, C4)" in said


def test_runs_that_do_not_count_are_named(trained, tmp_path):
    plant(trained, tmp_path, "finetune", {"hash_balanced_tuned": -0.03, "switch_tuned": 0})
    lost = next(tmp_path.glob("switch_tuned-s3-*"))
    (lost / "result.json").unlink()
    found = judged_of(tmp_path)
    assert found[8].verdict == "supported" and found[8].parts[0].left_out == (f"{lost.name} (stopped)",)
    assert f"    not counted: {lost.name} (stopped)\n" in printed(found, "smoke", 0.05, 0.008)


def test_run_folders_come_before_committed_results_and_those_of_another_scale_after(trained, tmp_path):
    plant(trained, tmp_path, "finetune", {"hash_balanced_tuned": -0.3, "switch_tuned": 0})
    for scale, seed in (("smoke", 77), ("small", 78)):
        folder = tmp_path / "results" / scale / "finetune"
        folder.mkdir(parents=True)
        committed = read_study("finetune", tmp_path).runs.assign(sweep="finetune", scale=scale, seed=seed)
        write(committed, folder / "runs.csv")
    here = runs_of("finetune", "smoke", tmp_path, tmp_path / "results")
    assert set(here["seed"]) == {0, 1, 2, 3} and set(here["read"]) == {str(tmp_path / "sweeps" / "finetune.json")}
    there = runs_of("finetune", "small", tmp_path, tmp_path / "results")
    assert set(there["seed"]) == {78} and set(there["read"]) == {str(tmp_path / "results/small/finetune/runs.csv")}
    assert runs_of("finetune", "paper", tmp_path, tmp_path / "results").empty


def test_one_text_and_budget_are_asked_of_a_sweeps_groups_but_one_commit_of_all_of_it(trained, tmp_path):
    """Of horizon, each of whose horizons has its own budget."""
    exact = {"dense_2x": {"token_budget": 512}, "dense_4x": {"token_budget": 1024}}
    plant(trained, tmp_path, "horizon", dict.fromkeys(("hash_balanced_1x", "dense_1x", *exact), 0), exact)
    assert set(runs_of("horizon", "smoke", tmp_path, tmp_path)["outcome"]) == {"finished"}
    for folder in tmp_path.glob("dense_2x-*"):
        origin = json.loads((folder / "provenance.json").read_text())
        origin["git"] = {"commit": "0" * 40, "dirty": None}
        (folder / "provenance.json").write_text(json.dumps(origin))
    found = runs_of("horizon", "smoke", tmp_path, tmp_path)
    assert set(found["arm"][found["outcome"] == "other commit"]) == {"dense_2x"}
    assert set(found["arm"][found["outcome"] == "finished"]) == {"hash_balanced_1x", "dense_1x", "dense_4x"}


def test_a_single_seed_separates_nothing_and_another_scale_is_not_run(trained, tmp_path):
    plant(trained[:1], tmp_path, "finetune", {"hash_balanced_tuned": -0.3, "switch_tuned": 0})
    for scale, verdict in (("smoke", "not separated"), ("small", "not run")):
        judged = judged_of(tmp_path, scale)
        assert judged[8].claim == "C9" and judged[8].verdict == verdict


KEYS = {"sweep", "weights", "along", "range", "metric", "ratio", "at", "alike", "by", "expect"}


def test_every_declared_contrast_is_whole():
    assert list(CLAIMS["claims"]) == [f"C{number}" for number in range(1, 13)]
    for claim in CLAIMS["claims"].values():
        for part in claim["parts"]:
            assert set(part) <= KEYS
            assert ("range" in part) != ("weights" in part)
            assert "{x}" in str(part) if "along" in part else sum(part.get("weights", {"": 0}).values()) == 0
