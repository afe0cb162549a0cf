"""Statistics of a handful of seeds, by hand and by other programs."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from analysis.statistics import (
    holm,
    mean_and_deviation,
    mean_of,
    paired_difference,
    slope_weights,
)


def test_a_paired_interval_is_that_of_hand_arithmetic():
    arm = pd.Series([1.0, 2.0, 4.0], index=[0, 1, 2])
    reference = pd.Series([2.0, 4.0, 7.0], index=[0, 1, 2])
    # differences -1, -2, -3: mean -2, deviation 1; t(0.975, 2) = 4.302653 in printed tables, over sqrt(3)
    difference = paired_difference(arm, reference)
    assert (difference.n, difference.value) == (3, -2.0)
    assert list(difference.interval()) == pytest.approx([-2 - 2.484138, -2 + 2.484138], abs=1e-6)


def test_pairs_are_made_by_seed_not_by_position():
    arm = pd.Series([10.1, 30.1, 20.1], index=[1, 3, 2])
    reference = pd.Series([30.0, 10.0, 20.0, 99.0], index=[3, 1, 2, 7])
    difference = paired_difference(arm, reference)
    assert difference.n == 3
    assert difference.value == pytest.approx(0.1)
    assert difference.error == pytest.approx(0, abs=1e-12)


def test_one_pair_has_a_difference_but_no_interval_and_none_has_neither():
    one = paired_difference(pd.Series([1.0], index=[4]), pd.Series([3.0, 5.0], index=[4, 5]))
    assert (one.n, one.value, one.separated) == (1, -2.0, False)
    assert np.isnan([*one.interval(), one.p, one.p_within(9.0)]).all()
    none = paired_difference(pd.Series([1.0], index=[4]), pd.Series([3.0], index=[5]))
    assert none.n == 0 and np.isnan(none.value) and not none.separated


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


def test_one_and_two_sided_p_are_those_of_scipy():
    values = np.array([0.01, 0.03, 0.02, 0.05])
    found = mean_of(pd.Series(values))

    def scipys(about: float, alternative: Any) -> float:
        tested: Any = ttest_1samp(values, about, alternative=alternative)
        return tested.pvalue

    assert found.p == pytest.approx(scipys(0, "two-sided"))
    assert found.p_below(0.04) == pytest.approx(scipys(0.04, "less"))
    assert found.p_within(0.04) == pytest.approx(max(scipys(-0.04, "greater"), found.p_below(0.04)))


def test_equivalence_is_that_the_ninety_percent_interval_lies_within_the_margin():
    found = mean_of(pd.Series([0.001, -0.002, 0.0015, 0.0, 0.0008]))
    edge = max(abs(end) for end in found.interval(0.90))
    assert found.p_within(edge) == pytest.approx(0.05)
    assert found.p_within(0.99 * edge) > 0.05 > found.p_within(1.01 * edge)


def test_equal_figures_differ_by_nothing_and_a_shift_without_scatter_is_certain():
    assert mean_of(pd.Series([0.0, 0.0, 0.0])).p == 1
    assert mean_of(pd.Series([0.5, 0.5, 0.5])).p == 0


def test_the_slope_is_that_of_least_squares():
    x, y = np.log2([16, 32, 64, 128]), np.array([0.3, 0.1, -0.2, -0.1])
    assert slope_weights(x) @ y == pytest.approx(np.polyfit(x, y, 1)[0])
    assert slope_weights(x) @ (0.012 * x + 5) == pytest.approx(0.012)
    with pytest.raises(ValueError, match="two different places"):
        slope_weights([3, 3])


def test_holm_is_hand_arithmetic_and_a_claim_without_runs_counts_as_a_test():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, np.nan, 0.04, 0.03]) == pytest.approx([0.04, np.nan, 0.09, 0.09], nan_ok=True)


def test_holm_keeps_false_claims_among_twelve_nulls_at_five_percent():
    p = np.random.default_rng(0).uniform(size=(4000, 12))
    assert np.mean([holm(row).min() < 0.05 for row in p]) == pytest.approx(0.05, abs=0.012)
