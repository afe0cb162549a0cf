"""The additive model of a table: loss = arm + seed + noise, and each arm's comparison with the reference.

Runs of one seed share data order and first values, so a seed moves all arms alike; what is left is noise, whose
variance all arms of a table estimate together. Cells may be missing.
A arms, N runs, k = A - 1 comparisons
"""

from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import fdtrc

from analysis.dunnett import critical_value, p_values
from analysis.statistics import Estimate, mean_of, paired_difference

ALONE = 3.0  # an arm with so many times the variance of the others, by more than chance, is tested alone
CHANCE = 0.05  # at n = 3 every other table of equal variances has an arm of three times the others'


class AdditiveModel(NamedTuple):
    """A least-squares fit. `losses` may have leading dimensions, as many tables of one design."""

    arms: list[Hashable]  # in order of appearance
    arm: np.ndarray  # (N,) index into arms
    seed: np.ndarray  # (N,)
    losses: np.ndarray  # (..., N)
    inverse: np.ndarray  # (A + seeds, N), takes losses to effects
    residuals: np.ndarray  # (..., N)
    dof: int

    @property
    def variance(self) -> np.ndarray:
        """(...), pooled over all arms; NaN without degrees of freedom."""
        return (self.residuals**2).sum(-1) / self.dof if self.dof else np.full(self.losses.shape[:-1], np.nan)

    @property
    def degrees(self) -> int:
        """Degrees of freedom that one more seed of all arms would add: arms less parts that no seed links."""
        return len(self.arm) - len(set(self.seed)) - self.dof

    def on_losses(self, weights: dict[Hashable, float]) -> np.ndarray:
        """(N,): a contrast of arm effects as weights of the losses; NaN if the runs that are there cannot tell it."""
        contrast = np.zeros(len(self.inverse))
        contrast[[self.arms.index(arm) for arm in weights]] = list(weights.values())
        told = np.allclose(contrast @ self.inverse @ design(self.arm, self.seed), contrast)
        return contrast @ self.inverse if told else np.full(len(self.arm), np.nan)

    def contrast(self, weights: dict[Hashable, float]) -> Estimate:
        """sum_a weights[a] * effect of a, by the pooled variance. The weights must sum to 0 (ValueError).

        Also a slope over arms that are sizes: {arm: weight for arm, weight in zip(arms, slope_weights(x))}.
        """
        if abs(sum(weights.values())) > 1e-9:
            raise ValueError(f"the weights of a contrast sum to 0, not to {sum(weights.values()):g}")
        on_losses = self.on_losses(weights)
        error = np.sqrt(self.variance * (on_losses @ on_losses))
        n = len(set(self.seed[abs(on_losses) > 1e-9]))
        return Estimate(n, (self.losses @ on_losses)[()], error[()], self.dof)


def design(arm: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """(N, arms + seeds) of 0 and 1."""
    return np.hstack([arm[:, None] == np.unique(arm), seed[:, None] == np.unique(seed)]).astype(float)


def fit(arm: ArrayLike, seed: ArrayLike, losses: ArrayLike) -> AdditiveModel:
    """arm, seed: N each; losses (..., N). ValueError if an arm has a seed twice or a loss is not finite."""
    labels, seeds = np.asarray(arm).tolist(), np.asarray(seed)
    if twice := [cell for cell, n in Counter(zip(labels, seeds.tolist())).items() if n > 1]:
        raise ValueError(f"seed {twice[0][1]} occurs twice in one arm ({twice[0][0]}); arm=NAME names a variant")
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        raise ValueError(f"a table needs finite losses, not {losses[~np.isfinite(losses)][0]}")
    arms = list(dict.fromkeys(labels))
    places = np.array([arms.index(each) for each in labels], int)
    x = design(places, seeds)
    inverse = np.linalg.pinv(x)
    residuals = losses - losses @ (x @ inverse).T
    return AdditiveModel(arms, places, seeds, losses, inverse, residuals, len(labels) - int(np.linalg.matrix_rank(x)))


def variance_tests(model: AdditiveModel) -> tuple[np.ndarray, np.ndarray]:
    """(..., A) each: an arm's own variance over the pooled one of the other arms, and the p of that F; else NaN.

    The arm's own: what the residual sum of squares loses when the arm is left out, over the degrees that it loses. With
    the arm itself in the denominator no arm of a table of three could reach three times it, however noisy.
    """
    ratios = np.full((*model.losses.shape[:-1], len(model.arms)), np.nan)
    p = ratios.copy()
    for arm in range(len(model.arms)):
        others = model.arm != arm
        without = fit(model.arm[others], model.seed[others], model.losses[..., others])
        own = model.dof - without.dof
        if without.dof and own:
            lost = (model.residuals**2).sum(-1) - (without.residuals**2).sum(-1)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios[..., arm] = lost / own / without.variance
            p[..., arm] = fdtrc(own, without.dof, ratios[..., arm])
    return ratios, p


def residual_deviations(model: AdditiveModel) -> dict[Hashable, float]:
    """By arm: root of its residual sum of squares over the degrees of freedom that its runs have in the fit."""
    leverage = np.einsum("np,pn->n", design(model.arm, model.seed), model.inverse)
    squares = np.bincount(model.arm, model.residuals**2)
    degrees = np.bincount(model.arm, 1 - leverage)
    return {arm: (s / d) ** 0.5 if d > 1e-9 else np.nan for arm, s, d in zip(model.arms, squares, degrees)}


class Comparison(NamedTuple):
    """One arm less the reference. The interval is simultaneous: all of a table's cover at once in 95 %."""

    estimate: Estimate
    low: float
    high: float
    p: float  # corrected for the number of comparisons
    alone: bool  # by its own pairs and Bonferroni's correction, because its variance is not the others'

    @property
    def separated(self) -> bool:
        return bool(self.low > 0 or self.high < 0)


def noisy_arms(model: AdditiveModel) -> dict[Hashable, tuple[float, bool]]:
    """arm -> its variance over that of the others, and whether that is ALONE or more and by an F-test beyond CHANCE.

    Not over the pooled variance, that arm's own included: no arm of four or fewer could reach three times that, and of
    tables of five arms without effects, one with four times the others' deviation, 9 % separate falsely at n = 3 and
    7 % at n = 5 (14 % and 10 % if it is the reference), where this rule has 7 % and 3 % (10 % and 5 %), by simulation.

    Each arm at CHANCE, not all together: a quarter of the tables of equal variances have such an arm at n = 3, which
    costs it a wider interval; to correct for the number of arms would miss half of those that scatter fourfold.
    """
    ratios, chances = variance_tests(model)
    return {arm: (float(r), bool(r >= ALONE and p < CHANCE)) for arm, r, p in zip(model.arms, ratios, chances)}


def compare(
    model: AdditiveModel, references: dict[Hashable, Hashable], level: float = 0.95
) -> dict[Hashable, Comparison]:
    """Each arm against its reference (arm -> reference, as against_one makes it): Dunnett's test on the fit, by the
    correlations that the design gives these k differences.

    An arm with ALONE times the variance of the others (F-test at CHANCE), or one whose reference is so, is
    tested by the paired t-test with Bonferroni's correction instead. Its noise stays in the pooled variance: leaving
    out whatever looks large would make the rest too small. Of tables of five arms without effects, by simulation, some
    separate falsely: 5 % with equal variances; at n = 3 and 5, 7 % and 3 % if one arm has four times the others'
    deviation, 10 % and 5 % if the reference has, 9 % and 7 % if it has twice.
    """
    present = {arm: ref for arm, ref in references.items() if {arm, ref} <= set(model.arms)}
    weights = {arm: model.on_losses({arm: 1.0, ref: -1.0}) for arm, ref in present.items()}
    told = [arm for arm in weights if np.isfinite(weights[arm]).all()]
    together = np.array([weights[arm] for arm in told])
    estimates = [model.contrast({arm: 1.0, present[arm]: -1.0}) for arm in told]
    reach = critical_value(together @ together.T, model.dof, level) if told else np.nan
    corrected = p_values(together @ together.T, model.dof, [e.t for e in estimates]) if told else []
    noisy = {arm for arm, (_, beyond_chance) in noisy_arms(model).items() if beyond_chance}
    found = {}
    for arm, estimate, p in zip(told, estimates, corrected):
        alone = not noisy.isdisjoint({arm, present[arm]})
        low, high = estimate.value - reach * estimate.error, estimate.value + reach * estimate.error
        if alone:
            estimate = paired(model, arm, present[arm])
            low, high = estimate.interval(1 - (1 - level) / len(told))
            p = min(1.0, estimate.p * len(told))
        found[arm] = Comparison(estimate, low, high, p, alone)
    return found


def against_one(model: AdditiveModel, reference: Hashable) -> dict[Hashable, Hashable]:
    return {arm: reference for arm in model.arms if arm != reference}


def paired(model: AdditiveModel, arm: Hashable, reference: Hashable) -> Estimate:
    """The unpooled paired t-test of two arms."""
    pair = [model.arm == model.arms.index(each) for each in (arm, reference)]
    return paired_difference(*(pd.Series(model.losses[runs], index=model.seed[runs]) for runs in pair))


def by_seed(model: AdditiveModel, weights: dict[Hashable, float]) -> Estimate:
    """The t-test of a contrast on its own arms' runs alone: its value at each seed that all of them have."""
    own = {arm: model.arm == model.arms.index(arm) for arm in weights}
    values = [pd.Series(model.losses[runs], index=model.seed[runs]) * weights[arm] for arm, runs in own.items()]
    return mean_of(pd.concat(values, axis="columns", join="inner").sum(axis="columns"))


def nested(narrow: AdditiveModel, wide: AdditiveModel) -> float:
    """p of the F-test that the wide fit, of the same losses, tells no more than the narrow one; NaN if it cannot."""
    more = narrow.dof - wide.dof
    if not more or not wide.dof:
        return np.nan
    gained = ((narrow.residuals**2).sum() - (wide.residuals**2).sum()) / more
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(fdtrc(more, wide.dof, gained / wide.variance))
