"""The model arm + seed and its comparisons, by hand, by other programs, and by simulation of thousands of tables."""

from typing import Any

import numpy as np
import pytest
from scipy.special import stdtrit
from scipy.stats import dunnett, multivariate_t

from analysis.additive_model import (
    against_one,
    by_seed,
    compare,
    fit,
    nested,
    paired,
    residual_deviations,
    settled,
    variance_tests,
)
from analysis.dunnett import covers, critical_value, p_values, power, seeds_to_separate

TABLES = 20_000


def equal(k: int, rho: float = 0.5) -> np.ndarray:
    return np.full((k, k), rho) + (1 - rho) * np.eye(k)


def some_tables(arms: int, seeds: int, shift: float = 0.0, tables: int = TABLES, noise: Any = 1.0, seed_effect=3.0):
    """arm, seed and losses (tables, arms * seeds); the last arm is shifted; noise by arm or for all."""
    draws = np.random.default_rng([arms, seeds])
    arm, seed = np.repeat(np.arange(arms), seeds), np.tile(np.arange(seeds), arms)
    losses = draws.normal(size=(tables, len(arm))) * np.broadcast_to(noise, arms)[arm]
    return arm, seed, losses + seed_effect * draws.normal(size=(tables, seeds))[:, seed] + shift * (arm == arms - 1)


def against(model, reference):
    return compare(model, against_one(model, reference))


def intervals(arm, seed, losses):
    """(k, tables): ends of the simultaneous intervals against arm 0, all tables at once."""
    model = fit(arm, seed, losses)
    ends = []
    contrasts = [{other: 1.0, 0: -1.0} for other in model.arms[1:]]
    on_losses = np.array([model.on_losses(contrast) for contrast in contrasts])
    reach = critical_value(on_losses @ on_losses.T, model.dof)
    for contrast in contrasts:
        found = model.contrast(contrast)
        ends.append((found.value - reach * found.error, found.value + reach * found.error))
    return np.array(ends).transpose(1, 0, 2)


def test_effects_and_residuals_of_a_small_table_are_hand_arithmetic():
    # rows 1 3 / 2 6: arm means 2 and 4, seed means 1.5 and 4.5, mean 3; residuals 1 - 2 - 1.5 + 3 = 0.5, and so on
    model = fit(["a", "a", "b", "b"], [0, 1, 0, 1], [1.0, 3.0, 2.0, 6.0])
    assert model.residuals == pytest.approx([0.5, -0.5, -0.5, 0.5])
    assert (model.dof, model.variance) == (1, pytest.approx(1.0))
    found = model.contrast({"b": 1.0, "a": -1.0})
    assert (found.value, found.error) == (pytest.approx(2.0), pytest.approx(1.0))  # sqrt(1 * (1/2 + 1/2))


def test_of_two_arms_the_model_is_the_paired_t_test():
    arm, seed, losses = some_tables(2, 5, tables=1)
    model = fit(arm, seed, losses[0])
    found, by_hand = against(model, 0)[1], paired(model, 1, 0)
    assert found.estimate == pytest.approx(by_hand)
    assert [found.low, found.high] == pytest.approx(by_hand.interval())
    assert found.p == pytest.approx(by_hand.p)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("gaps", [[], [3, 7]])
def test_ninety_five_tables_of_a_hundred_are_covered_whole_and_five_separate_falsely(seeds, gaps):
    arm, seed, losses = some_tables(5, seeds)
    kept = np.setdiff1d(np.arange(len(arm)), gaps)
    low, high = intervals(arm[kept], seed[kept], losses[:, kept])
    assert ((low <= 0) & (high >= 0)).all(0).mean() == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_single_contrast_of_the_pooled_fit_is_covered(seeds):
    arm, seed, losses = some_tables(4, seeds, shift=2.0)
    found = fit(arm, seed, losses).contrast({3: 1.0, 1: -1.0})
    low, high = found.interval()
    assert ((low <= 2) & (high >= 2)).mean() == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_paired_t_interval_covers_and_the_percentile_bootstrap_would_not(seeds):
    arm, seed, losses = some_tables(2, seeds, shift=1.0)
    pairs = (losses[:, arm == 1] - losses[:, arm == 0])[:4000]
    reach = stdtrit(seeds - 1, 0.975) * pairs.std(1, ddof=1) / seeds**0.5
    assert (abs(pairs.mean(1) - 1) <= reach).mean() == pytest.approx(0.95, abs=0.015)
    again = np.random.default_rng(0).integers(seeds, size=(500, seeds))
    low, high = np.percentile(pairs[:, again].mean(-1), [2.5, 97.5], axis=1)
    assert ((low <= 1) & (high >= 1)).mean() < 0.90


def separated_by_the_rule(arm, seed, losses, of_pooled=False):
    """(tables,) each: whether any arm separates from arm 0, and whether any is tested alone; all tables at once.
    of_pooled: alone is an arm of three times the variance that all arms have together, its own included."""
    model = fit(arm, seed, losses)
    ratios, p = variance_tests(model)
    noisy = (ratios >= 3) & (p < 0.05)
    if of_pooled:
        squares = np.stack([(model.residuals[..., arm == each] ** 2).sum(-1) for each in range(arm.max() + 1)], -1)
        noisy = squares / (model.dof / (arm.max() + 1)) >= 3 * model.variance[..., None]
    low, high = intervals(arm, seed, losses)
    by_pairs = []
    for other in range(1, arm.max() + 1):
        pairs, n = losses[:, arm == other] - losses[:, arm == 0], seed.max() + 1
        t = abs(pairs.mean(1)) / (pairs.std(1, ddof=1) / n**0.5)
        by_pairs.append(t > stdtrit(n - 1, 1 - 0.025 / arm.max()))
    alone = (noisy[:, 1:] | noisy[:, :1]).T
    return np.where(alone, by_pairs, (low > 0) | (high < 0)).any(0), alone.any(0)


EQUAL, NOISY, REFERENCE, TWICE = 1.0, [1.0, 1, 1, 1, 4], [4.0, 1, 1, 1, 1], [2.0, 1, 1, 1, 1]
FALSELY = [(3, EQUAL, 0.05), (5, EQUAL, 0.05), (3, NOISY, 0.07), (5, NOISY, 0.03), (3, REFERENCE, 0.10)]
FALSELY += [(5, REFERENCE, 0.05), (3, TWICE, 0.09), (5, TWICE, 0.07)]


@pytest.mark.parametrize(("seeds", "noise", "falsely"), FALSELY)
def test_as_many_tables_of_no_effect_separate_as_the_docstring_says(seeds, noise, falsely):
    arm, seed, losses = some_tables(5, seeds, noise=noise)
    separated, alone = separated_by_the_rule(arm, seed, losses)
    for table, expected in zip(losses[:12], zip(separated, alone)):
        found = against(fit(arm, seed, table), 0).values()
        assert (any(each.separated for each in found), any(each.alone for each in found)) == expected
    assert separated.mean() == pytest.approx(falsely, abs=0.008)
    assert alone.mean() == pytest.approx(0.25, abs=0.01) if noise == EQUAL else alone.mean() > 0.35


@pytest.mark.parametrize(("seeds", "noise"), [(3, NOISY), (5, NOISY), (3, REFERENCE), (5, REFERENCE), (5, TWICE)])
def test_three_times_the_pooled_variance_would_let_more_tables_separate_falsely(seeds, noise):
    """The rule that was set aside: an arm's own noise in what it is held against hides it."""
    arm, seed, losses = some_tables(5, seeds, noise=noise)
    separated, _ = separated_by_the_rule(arm, seed, losses)
    pooled, _ = separated_by_the_rule(arm, seed, losses, of_pooled=True)
    assert pooled.mean() > separated.mean() + 0.015
    arm, seed, losses = some_tables(4, seeds, noise=noise[:4] if noise[0] > 1 else noise[1:])
    assert not separated_by_the_rule(arm, seed, losses, of_pooled=True)[1].any()  # of four no arm is ever three times


def test_a_contrast_by_seed_is_the_t_test_of_its_value_at_each_seed_that_all_its_arms_have():
    values = {"a": [1.0, 2.0, 4.0], "b": [0.5, 1.0, 2.5], "c": [2.0, 2.0]}
    cells = [(arm, seed, loss) for arm, own in values.items() for seed, loss in enumerate(own)]
    model = fit(*map(list, zip(*cells)))
    found = by_seed(model, {"a": 1.0, "b": 1.0, "c": -2.0})  # -2.5 and -1
    assert (found.n, found.dof) == (2, 1)
    assert (found.value, found.error) == (pytest.approx(-1.75), pytest.approx(0.75))
    assert by_seed(model, {"a": 1.0, "b": -1.0}) == pytest.approx(paired(model, "a", "b"))


def test_a_seed_that_is_another_one_in_each_group_is_seen_in_five_tables_of_a_hundred_without_such():
    arm, seed, losses = some_tables(6, 3, tables=2000)
    apart = seed + 10 * (arm > 2)
    p = np.array([nested(fit(arm, seed, table), fit(arm, apart, table)) for table in losses])
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    shifted = losses[0] + 50 * (seed == 1) * (arm > 2)
    assert nested(fit(arm, seed, shifted), fit(arm, apart, shifted)) < 0.001
    assert np.isnan(nested(fit(arm, seed, losses[0]), fit(arm, seed, losses[0])))


def test_the_variance_of_an_arm_is_tested_as_f_against_the_others():
    arm, seed, losses = some_tables(4, 5)
    ratios, p = variance_tests(fit(arm, seed, losses))
    assert (p < 0.05).mean(0) == pytest.approx([0.05] * 4, abs=0.01)
    assert np.median(ratios) == pytest.approx(0.9, abs=0.1)
    arm, seed, losses = some_tables(2, 5, tables=1)
    assert np.isnan(variance_tests(fit(arm, seed, losses[0]))[0]).all()  # of two arms nobody can say which is noisy


def test_a_noisy_reference_makes_every_comparison_one_by_one():
    arm, seed, losses = some_tables(5, 5, tables=1, noise=[30.0, 1.0, 1.0, 1.0, 1.0])
    found = against(fit(arm, seed, losses[0]), 0)
    assert all(each.alone and each.estimate.dof == 4 for each in found.values())
    reach = stdtrit(4, 1 - 0.05 / 2 / 4)  # Bonferroni's, of four
    for other, each in found.items():
        single = paired(fit(arm, seed, losses[0]), other, 0)
        assert (each.low, each.high) == pytest.approx(
            (single.value - reach * single.error, single.value + reach * single.error)
        )
        assert each.p == pytest.approx(min(1, 4 * single.p))


def test_an_arm_that_collapsed_hides_no_difference_of_the_others():
    """As Switch does at a coefficient of 1: one arm of seven scatters some 50 times as much."""
    arm, seed, losses = some_tables(7, 3, noise=[1, 1, 1, 1, 1, 1, 50.0], tables=300)
    falsely, apart = 0, 0
    for table in losses:
        model = settled(fit(arm, seed, table))
        alone = fit(arm[arm < 6], seed[arm < 6], table[arm < 6])
        apart += model.apart == {6}
        if model.apart == {6}:
            assert model.dof == alone.dof == 10 and model.degrees == alone.degrees
            assert model.variance == pytest.approx(alone.variance)
            inside, whole = model.contrast({3: 1.0, 0: -1.0}), fit(arm, seed, table).contrast({3: 1.0, 0: -1.0})
            assert inside == pytest.approx(alone.contrast({3: 1.0, 0: -1.0})) and inside.error < whole.error
            assert variance_tests(model)[0] == pytest.approx(
                [*variance_tests(alone)[0], variance_tests(fit(arm, seed, table))[0][6]]
            )
            by_arm = residual_deviations(alone) | {6: residual_deviations(fit(arm, seed, table))[6]}
            assert residual_deviations(model) == pytest.approx(by_arm)
        found = against(model, 0)
        assert list(found) == [1, 2, 3, 4, 5, 6] and found[6].alone
        falsely += any(each.separated for each in found.values())
    assert apart > 290
    assert falsely / 300 <= 0.08


@pytest.mark.parametrize(("seeds", "falsely"), [(3, 0.08), (5, 0.05)])
def test_as_many_tables_with_an_arm_apart_separate_as_its_docstring_says(seeds, falsely):
    arm, seed, losses = some_tables(5, seeds, noise=NOISY, tables=500)
    separated = [any(e.separated for e in against(settled(fit(arm, seed, table)), 0).values()) for table in losses]
    assert np.mean(separated) == pytest.approx(falsely, abs=0.03)


def test_of_tables_of_equal_variances_hardly_one_has_an_arm_apart():
    arm, seed, losses = some_tables(5, 3, tables=2000)
    assert sum(bool(settled(fit(arm, seed, table)).apart) for table in losses) <= 6  # 2 are expected


def test_the_noise_of_an_arm_apart_reaches_no_other_and_its_own_comparison_is_by_pairs():
    arm, seed, losses = some_tables(5, 3, tables=1, noise=[1, 1, 1, 1, 1e3])
    model = settled(fit(arm, seed, losses[0]))
    found = against(model, 0)
    moved = losses[0] + 1e3 * (arm == 4) * np.array([1.0, -2.0, 0.5])[seed]
    assert [each.estimate.value for each in against(settled(fit(arm, seed, moved)), 0).values()][:3] == pytest.approx(
        [each.estimate.value for each in found.values()][:3]
    )
    single = paired(model, 4, 0)
    assert (found[4].low, found[4].high) == pytest.approx(single.interval(1 - 0.05 / 4))
    assert found[4].p == pytest.approx(min(1, 4 * single.p))
    inside = fit(arm[arm < 4], seed[arm < 4], losses[0][arm < 4])
    on_losses = np.array([inside.on_losses({other: 1.0, 0: -1.0}) for other in (1, 2, 3)])
    reach = critical_value(on_losses @ on_losses.T, inside.dof, 1 - 0.05 * 3 / 4)  # three of four comparisons
    each = inside.contrast({2: 1.0, 0: -1.0})
    assert (found[2].low, found[2].high) == pytest.approx(
        (each.value - reach * each.error, each.value + reach * each.error)
    )


def test_where_nobody_can_say_which_of_two_arms_it_is_none_is_apart():
    arm, seed, losses = some_tables(6, 3, tables=1, noise=[1, 1, 1, 1, 1, 200.0])
    groups = seed + 10 * (arm > 3)  # arms 4 and 5 share their seeds with no other
    assert settled(fit(arm, seed, losses[0])).apart == {5}
    assert settled(fit(arm, groups, losses[0])).apart == set()


def test_arms_may_have_references_of_their_own_and_intervals_hold_together():
    arm, seed, losses = some_tables(4, 3, tables=2000)
    covered = 0
    model = fit(arm, seed, losses)
    on_losses = np.array([model.on_losses({1: 1.0, 0: -1.0}), model.on_losses({3: 1.0, 2: -1.0})])
    reach = critical_value(on_losses @ on_losses.T, model.dof)
    found = [model.contrast({1: 1.0, 0: -1.0}), model.contrast({3: 1.0, 2: -1.0})]
    covered = np.all([abs(each.value) <= reach * each.error for each in found], axis=0)
    assert covered.mean() == pytest.approx(0.95, abs=0.015)
    pairs = compare(fit(arm, seed, losses[0]), {1: 0, 3: 2})
    assert [each.high - each.estimate.value for each in pairs.values() if not each.alone] == pytest.approx(
        [reach * each.error[0] for each in found]
    )


def test_residual_deviations_pool_to_the_models():
    arm, seed, losses = some_tables(4, 3, tables=1)
    model = fit(arm, seed, losses[0])
    by_arm = residual_deviations(model)
    assert sum(each**2 for each in by_arm.values()) / 4 == pytest.approx(model.variance)


def test_pairing_narrows_the_interval_when_seeds_matter():
    arm, seed, losses = some_tables(3, 5, tables=1, noise=0.01)
    low, high = intervals(arm, seed, losses)
    shuffled = np.where(arm == 0, seed, (seed + arm) % 5)
    apart = intervals(arm, shuffled, losses)
    assert (high - low).max() < 0.1 * (apart[1] - apart[0]).min()


def test_what_no_run_can_tell_is_not_told():
    assert against(fit(["a", "b"], [0, 1], [1.0, 2.0]), "a") == {}
    one = against(fit(["a", "b"], [0, 0], [1.0, 2.0]), "a")["b"]
    assert one.estimate.value == pytest.approx(1.0) and np.isnan([one.low, one.p]).all() and not one.separated
    # seed 1 of b and seed 0 of a meet in c, which has both
    linked = against(fit(["a", "c", "c", "b"], [0, 0, 1, 1], [1.0, 1.5, 2.5, 2.0]), "a")["b"]
    assert linked.estimate.value == pytest.approx(0.5 - 0.5)
    with pytest.raises(ValueError, match="sum to 0"):
        fit(["a", "b"], [0, 0], [1.0, 2.0]).contrast({"a": 1.0})
    with pytest.raises(ValueError, match="seed 0 occurs twice in one arm"):
        fit(["a", "a"], [0, 0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        fit(["a", "b"], [0, 0], [1.0, np.nan])


def test_critical_values_are_dunnetts_printed_ones():
    printed = {5: [2.57, 3.03, 3.29, 3.48, 3.62], 10: [2.23, 2.57, 2.76, 2.89, 2.99]}
    printed[20] = [2.09, 2.38, 2.54, 2.65, 2.73]
    for dof, row in printed.items():
        found = [critical_value(equal(k), dof) for k in range(1, 6)]
        assert found == pytest.approx(row, abs=0.0075)  # printed to two digits, some rounded up


def test_both_ways_to_the_distribution_agree_and_give_the_same_digits_again():
    for k, dof, t in ((2, 4, 3.0), (4, 8, 2.5), (8, 16, 3.5)):
        shape: Any = equal(k)
        by_scipy = multivariate_t.cdf(np.full(k, t), shape=shape, df=dof, lower_limit=np.full(k, -t), random_state=1)
        assert covers(equal(k), dof, t) == pytest.approx(by_scipy, abs=2e-4)
    uneven = np.array([[1.0, 0.3, 0.5], [0.3, 1.0, 0.6], [0.5, 0.6, 1.0]])
    assert critical_value(uneven, 6) == critical_value(uneven, 6)
    assert p_values(uneven, 6, [2.0, 3.0, 9.0]) == p_values(uneven, 6, [2.0, 3.0, 9.0])


def test_p_values_are_scipys_for_one_way_tables_and_never_below_a_single_tests():
    draws = np.random.default_rng(3)
    groups = draws.normal(size=(4, 6)) + np.array([[0.0], [0.4], [0.8], [1.6]])
    scipys = dunnett(*groups[1:], control=groups[0], rng=0)
    # the one-way layout has dof 4 * 5 and the same correlations
    assert p_values(equal(3), 20, np.asarray(scipys.statistic).tolist()) == pytest.approx(scipys.pvalue, abs=1e-3)
    tiny = p_values(equal(3), 20, [15.0])[0]
    assert 0 < tiny < 1e-10


def test_the_papers_numbers_of_seeds_come_out():
    """13, 44 or 119 pairs for 0.0026 nats at a paired deviation of 0.003, 0.006 or 0.010; 3, 6 or 10 for 0.01."""
    deviations = [paired_deviation / 2**0.5 for paired_deviation in (0.003, 0.006, 0.010)]
    assert [seeds_to_separate(0.0026, deviation) for deviation in deviations] == [13, 44, 119]
    assert [seeds_to_separate(0.01, deviation) for deviation in deviations] == [3, 6, 10]
    assert seeds_to_separate(1e-9, 1.0) is None and seeds_to_separate(0.0, 1.0) is None


@pytest.mark.parametrize(("arms", "shift"), [(2, 1.5), (5, 2.0)])
def test_the_suggested_number_of_seeds_indeed_separates(arms, shift):
    design = {"comparisons": arms - 1, "degrees": arms - 1}
    seeds = seeds_to_separate(shift, 1.0, **design)
    assert seeds is not None

    def separated(n: int) -> float:
        low, high = intervals(*some_tables(arms, n, shift=shift))
        return float(((low > 0) | (high < 0))[-1].mean())

    assert separated(seeds) >= 0.79 and separated(seeds - 1) < 0.81
    assert separated(seeds) == pytest.approx(power(shift, 1.0, seeds, **design), abs=0.015)


def test_of_eight_comparisons_one_that_is_tested_alone_is_suggested_seeds_that_separate_it():
    """Where scipy's noncentral t is NaN."""
    draws, level = np.random.default_rng(0), 1 - 0.05 / 8
    for seeds in (2, 3, 4):
        pairs = 0.074 + 0.0094 * 2**0.5 * draws.normal(size=(40_000, seeds))
        t = pairs.mean(1) / (pairs.std(1, ddof=1) / seeds**0.5)
        separated = (abs(t) > stdtrit(seeds - 1, 1 - 0.05 / 16)).mean()
        assert power(0.074, 0.0094, seeds, level=level) == pytest.approx(separated, abs=0.01)
    assert seeds_to_separate(0.074, 0.0094, level=level) == 4


@pytest.mark.parametrize("seeds", [3, 5])
def test_power_is_of_the_comparisons_that_a_table_makes_and_not_of_its_arms(seeds):
    """Two pairs of arms: of the four neither all are comparisons, nor does the fourth take a degree of freedom away."""
    model = fit(*some_tables(4, seeds, shift=2.0))
    found = [model.contrast({arm: 1.0, arm - 1: -1.0}) for arm in (1, 3)]
    on_losses = np.array([model.on_losses({1: 1.0, 0: -1.0}), model.on_losses({3: 1.0, 2: -1.0})])
    separated = abs(found[1].t) > critical_value(on_losses @ on_losses.T, model.dof)
    design = {"comparisons": 2, "degrees": model.degrees, "rho": 0.0}
    assert separated.mean() == pytest.approx(power(2.0, 1.0, seeds, **design), abs=0.012)


def test_degrees_are_what_one_more_seed_adds():
    arm, seed, losses = some_tables(4, 3, tables=1)
    apart = seed + 10 * (arm > 1)  # two tables whose seeds are not the same
    for seeds, more in ((seed, 3), (apart, 2)):
        model = fit(arm, seeds, losses[0])
        assert (model.degrees, model.dof) == (more, 2 * more)
