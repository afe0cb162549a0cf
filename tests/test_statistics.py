"""Statistics of a handful of seeds, by hand and by simulation."""

import numpy as np
import pandas as pd
import pytest

from analysis.statistics import mean_and_deviation, paired_difference


def test_a_paired_interval_is_that_of_hand_arithmetic():
    arm = pd.Series([1.0, 2.0, 4.0], index=[0, 1, 2])
    reference = pd.Series([2.0, 4.0, 7.0], index=[0, 1, 2])
    # differences -1, -2, -3: mean -2, deviation 1; t(0.975, 2) = 4.302653 in printed tables, over sqrt(3)
    pairs, mean, low, high = paired_difference(arm, reference)
    assert (pairs, mean) == (3, -2.0)
    assert [low, high] == pytest.approx([-2 - 2.484138, -2 + 2.484138], abs=1e-6)


def test_pairs_are_made_by_seed_not_by_position():
    arm = pd.Series([10.1, 30.1, 20.1], index=[1, 3, 2])
    reference = pd.Series([30.0, 10.0, 20.0, 99.0], index=[3, 1, 2, 7])
    difference = paired_difference(arm, reference)
    assert difference.pairs == 3
    assert difference.mean == pytest.approx(0.1)
    assert difference.high - difference.low == pytest.approx(0, abs=1e-12)


def test_one_pair_has_a_difference_but_no_interval_and_none_has_neither():
    one = paired_difference(pd.Series([1.0], index=[4]), pd.Series([3.0, 5.0], index=[4, 5]))
    assert (one.pairs, one.mean, one.separated) == (1, -2.0, False)
    assert np.isnan([one.low, one.high]).all()
    none = paired_difference(pd.Series([1.0], index=[4]), pd.Series([3.0], index=[5]))
    assert none.pairs == 0 and np.isnan(none.mean) and not none.separated


@pytest.mark.parametrize(("shift", "separated"), [(0.0, False), (-5.0, True), (5.0, True)])
def test_separated_means_that_the_interval_leaves_out_zero(shift, separated):
    arm = pd.Series([0.1, -0.1, 0.0]) + shift
    assert paired_difference(arm, pd.Series([0.0, 0.0, 0.0])).separated is separated


def test_deviation_divides_by_n_less_one_and_one_seed_has_none():
    assert mean_and_deviation(pd.Series([1.0, 2.0, 6.0])) == (3.0, pytest.approx(7**0.5))
    assert np.isnan(mean_and_deviation(pd.Series([5.0]))[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_does_not_vanish_from_a_mean(bad):
    with pytest.raises(ValueError, match="finite"):
        mean_and_deviation(pd.Series([1.0, bad]))


def test_a_seed_that_occurs_twice_is_no_pair():
    with pytest.raises(ValueError, match="seed 3 occurs twice"):
        paired_difference(pd.Series([1.0, 2.0], index=[3, 3]), pd.Series([1.0], index=[3]))


@pytest.mark.parametrize("seeds", [3, 5])
def test_ninety_five_intervals_of_a_hundred_cover_the_truth(seeds):
    draws, trials = np.random.default_rng(0), 2000
    covered = 0
    for _ in range(trials):
        seed_effect = draws.normal(0, 1.0, seeds)  # shared by the pair: cancels
        reference = pd.Series(seed_effect + draws.normal(0, 0.1, seeds))
        arm = pd.Series(seed_effect + draws.normal(0, 0.1, seeds) - 0.05)
        difference = paired_difference(arm, reference)
        covered += difference.low <= -0.05 <= difference.high
    assert covered / trials == pytest.approx(0.95, abs=0.015)


def test_pairing_narrows_the_interval_when_seeds_matter():
    draws = np.random.default_rng(1)
    seed_effect = draws.normal(0, 1.0, 5)
    reference, arm = (pd.Series(seed_effect + draws.normal(0, 0.01, 5)) for _ in range(2))
    paired = paired_difference(arm, reference)
    shuffled = paired_difference(arm, pd.Series(reference.to_numpy(), index=[1, 2, 3, 4, 0]))
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)
