"""Where scatter comes from: planted components are found again."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import f

from analysis.variation import floor_of_means, noise_floor, over_documents, split_variance


def test_a_block_of_hand_arithmetic_splits():
    # rows 0 2 / 4 6: rows differ by 4 (MS 16), columns by 2 (MS 4), nothing is left
    split = split_variance(pd.DataFrame([[0.0, 2.0], [4.0, 6.0]]))
    assert (split.seed, split.table, split.rest) == (8.0, 2.0, 0.0)


def test_a_block_that_is_not_square_splits_by_its_own_sides():
    # 3 seeds of effects 0 3 6 (variance 9), 5 tables of 0 to 4 (2.5), and a rest that has no row or column sum:
    # 4 squares of 1 on 2 * 4 degrees of freedom, 0.5; mean squares 5 * 9 and 3 * 2.5
    rest = np.zeros((3, 5))
    rest[:2, :2] = [[1, -1], [-1, 1]]
    split = split_variance(pd.DataFrame(np.array([[0.0], [3.0], [6.0]]) + np.arange(5.0) + rest))
    assert split[:3] == pytest.approx((9 - 0.5 / 5, 2.5 - 0.5 / 3, 0.5))
    assert split.seed_p == pytest.approx(f.sf(45 / 0.5, 2, 8)) and split.table_p == pytest.approx(f.sf(7.5 / 0.5, 4, 8))


def test_planted_components_come_back_on_average_and_the_null_is_kept():
    draws, found = np.random.default_rng(0), []
    for _ in range(4000):
        seeds, tables = 3.0 * draws.normal(size=(4, 1)), np.zeros((1, 4))
        found.append(split_variance(pd.DataFrame(10 + seeds + tables + draws.normal(size=(4, 4)))))
    mean = np.mean(found, axis=0)
    assert mean[:3] == pytest.approx([9.0, 0.0, 1.0], abs=0.4)
    assert np.mean([split.table_p < 0.05 for split in found]) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("block", [[[1.0, 2.0]], [[1.0, 2.0], [3.0, np.nan]]])
def test_a_block_with_gaps_or_one_row_is_refused(block):
    with pytest.raises(ValueError, match="without gaps"):
        split_variance(pd.DataFrame(block))


def test_the_noise_floor_is_exceeded_by_five_pairs_of_repeats_in_a_hundred():
    draws = np.random.default_rng(0).normal(size=(4000, 5))
    beyond = [abs(row[3] - row[4]) > noise_floor(pd.Series(row[:3])) for row in draws]
    assert np.mean(beyond) == pytest.approx(0.05, abs=0.012)
    # of four means over 5 runs, weighed as a slope is: the same share of them
    weights = np.array([-0.3, -0.1, 0.1, 0.3])
    means = np.random.default_rng(1).standard_normal((4000, 4, 5)).mean(-1) @ weights
    floors = [floor_of_means(noise_floor(pd.Series(row[:3])), weights, [5] * 4) for row in draws]
    assert np.mean(abs(means[: len(floors)]) > floors) == pytest.approx(0.05, abs=0.015)
    assert floor_of_means(1.0, [1, -1], [1, 1]) == pytest.approx(1) and floor_of_means(1.0, [1, -1], [4, 4]) == 0.5
    assert noise_floor(pd.Series([1.0, 1.0, 1.0])) == 0 and np.isnan(noise_floor(pd.Series([1.0])))


def test_an_interval_over_documents_covers_and_is_narrow_for_what_documents_share():
    draws, truth = np.random.default_rng(0), 2.0
    tokens = draws.integers(20, 200, size=(400, 60))
    hardness = draws.normal(size=(400, 60))
    covered, widths = 0, []
    for counts, hard in zip(tokens, hardness):
        sums = counts * (truth + hard + 0.1 * draws.normal(size=60))
        low, high = over_documents(sums, counts, draws=400)
        covered += low <= truth <= high
        paired = over_documents(sums, counts, counts * (truth + hard), draws=400)
        widths.append((paired[1] - paired[0]) / (high - low))
    assert covered / 400 == pytest.approx(0.94, abs=0.035)
    assert np.mean(widths) < 0.2


def test_documents_too_few_or_without_tokens_say_nothing():
    assert np.isnan(over_documents(np.ones(9), np.ones(9))).all()
    sums, counts = np.r_[np.ones(20), 0.0], np.r_[np.ones(20), 0]
    assert over_documents(sums, counts) == (1.0, 1.0)
