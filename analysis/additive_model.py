"""The additive model of a table: loss = arm + seed + noise, and each arm's comparison with the reference.

Runs of one seed share data order and first values, so a seed moves all arms alike; what is left is noise, whose
variance all arms of a table estimate together. Cells may be missing.
A arms, N runs, k = A - 1 comparisons
"""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import fdtrc

from analysis.arms import repeated
from analysis.dunnett import critical_value, p_values
from analysis.statistics import Estimate, mean_of, paired_difference

ALONE = 3.0  # an arm with so many times the variance of the others, by more than chance, is tested alone
CHANCE = 0.05  # at n = 3 every other table of equal variances has an arm of three times the others'
DOUBT = 1e-3  # an arm whose variance is another one beyond this, all arms together, is set apart


class AdditiveModel(NamedTuple):
    """A least-squares fit. `losses` may have leading dimensions, as many tables of one design."""

    arms: list[Hashable]  # in order of appearance
    arm: np.ndarray  # (N,) index into arms
    seed: np.ndarray  # (N,)
    losses: np.ndarray  # (..., N)
    design: np.ndarray  # (N, effects) of 0 and 1: the arms', the seeds', then one for each run of arms set apart
    inverse: np.ndarray  # (effects, N), takes losses to effects
    residuals: np.ndarray  # (..., N)
    dof: int
    apart: frozenset[Hashable] = frozenset()  # arms that take no part in the seeds' effects nor in the variance

    @property
    def variance(self) -> np.ndarray:
        """(...), pooled over all arms but those apart; NaN without degrees of freedom."""
        return (self.residuals**2).sum(-1) / self.dof if self.dof else np.full(self.losses.shape[:-1], np.nan)

    @property
    def degrees(self) -> int:
        """Degrees of freedom that one more seed of all arms would add: arms less parts that no seed links."""
        inside = [run for run, arm in enumerate(self.arm) if self.arms[arm] not in self.apart]
        return len(inside) - len(set(self.seed[inside])) - self.dof

    def on_losses(self, weights: dict[Hashable, float]) -> np.ndarray:
        """(N,): a contrast of arm effects as weights of the losses; NaN if the runs that are there cannot tell it."""
        contrast = np.zeros(len(self.inverse))
        contrast[[self.arms.index(arm) for arm in weights]] = list(weights.values())
        told = np.allclose(contrast @ self.inverse @ self.design, contrast)
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


def fit(arm: ArrayLike, seed: ArrayLike, losses: ArrayLike, apart: Iterable[Hashable] = ()) -> AdditiveModel:
    """arm, seed: N each; losses (..., N); apart: arms each of whose runs has an effect of its own, which no contrast
    can tell. ValueError if an arm has a seed twice or a loss is not finite."""
    labels, seeds = np.asarray(arm).tolist(), np.asarray(seed)
    if twice := repeated(zip(labels, seeds.tolist())):
        raise ValueError(f"seed {twice[0][1]} occurs twice in one arm ({twice[0][0]}); arm=NAME names a variant")
    losses = np.asarray(losses, float)
    if not np.isfinite(losses).all():
        raise ValueError(f"a table needs finite losses, not {losses[~np.isfinite(losses)][0]}")
    arms = list(dict.fromkeys(labels))
    places = np.array([arms.index(each) for each in labels], int)
    own = np.eye(len(labels))[:, np.isin(places, [arms.index(each) for each in apart])]
    x = np.hstack([places[:, None] == np.unique(places), seeds[:, None] == np.unique(seeds), own]).astype(float)
    inverse = np.linalg.pinv(x)
    residuals = losses - losses @ (x @ inverse).T
    dof = len(labels) - int(np.linalg.matrix_rank(x))
    return AdditiveModel(arms, places, seeds, losses, x, inverse, residuals, dof, frozenset(apart))


def settled(model: AdditiveModel) -> AdditiveModel:
    """The fit with each arm apart whose variance is not the others' beyond DOUBT, the noisiest first: left in, one arm
    that collapsed would hide the differences of all others. Of tables of equal variances one in 1 / DOUBT has any.
    Where nobody can say which of two arms it is, as in a group of two, none is; and two that collapse alike can hide
    each other, which leaves all intervals too wide.

    Of tables of five arms without effects, one of which has four times the others' deviation, 8 % and 5 % separate
    falsely at n = 3 and 5, by simulation; with its noise in the pooled variance 7 % and 3 % (compare).
    """
    ratios, p = variance_tests(model)
    inside = np.array([arm not in model.apart and ratio > 1 for arm, ratio in zip(model.arms, ratios)])
    p, ratios = np.where(inside, p, np.nan), np.where(inside, ratios, np.nan)
    if not (p * len(model.arms) < DOUBT).any():
        return model
    noisiest = int(np.nanargmax(ratios))
    if p[noisiest] * len(model.arms) >= DOUBT or (np.isclose(ratios, ratios[noisiest])).sum() > 1:
        return model
    labels = [model.arms[arm] for arm in model.arm]
    return settled(fit(labels, model.seed, model.losses, {*model.apart, model.arms[noisiest]}))


def beside(model: AdditiveModel, arm: Hashable) -> AdditiveModel:
    """The fit of the arms that are not apart and of this one."""
    if not model.apart:
        return model
    labels = np.array([model.arms[place] for place in model.arm], object)
    runs = [label == arm or label not in model.apart for label in labels]
    return fit(labels[runs], model.seed[runs], model.losses[..., runs])


def variance_tests(model: AdditiveModel) -> tuple[np.ndarray, np.ndarray]:
    """(..., A) each: an arm's own variance over the pooled one of the other arms (without those apart), and the p of
    that F; else NaN.

    The arm's own: what the residual sum of squares loses when the arm is left out, over the degrees that it loses. With
    the arm itself in the denominator no arm of a table of three could reach three times it, however noisy.
    """
    ratios = np.full((*model.losses.shape[:-1], len(model.arms)), np.nan)
    p = ratios.copy()
    for arm, label in enumerate(model.arms):
        within = beside(model, label)
        others = within.arm != within.arms.index(label)
        without = fit(within.arm[others], within.seed[others], within.losses[..., others])
        own = within.dof - without.dof
        if without.dof and own:
            lost = (within.residuals**2).sum(-1) - (without.residuals**2).sum(-1)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios[..., arm] = lost / own / without.variance
            p[..., arm] = fdtrc(own, without.dof, ratios[..., arm])
    return ratios, p


def residual_deviations(model: AdditiveModel) -> dict[Hashable, float]:
    """By arm: root of its residual sum of squares over the degrees of freedom that its runs have in the fit beside the
    arms that are not apart."""
    found = {}
    for arm in model.arms:
        own = beside(model, arm)
        runs = own.arm == own.arms.index(arm)
        degrees = (1 - np.einsum("np,pn->n", own.design, own.inverse)[runs]).sum()
        found[arm] = float((own.residuals[runs] ** 2).sum() / degrees) ** 0.5 if degrees > 1e-9 else np.nan
    return found


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

    An arm with ALONE times the variance of the others (F-test at CHANCE), or one whose reference is so, is tested by
    the paired t-test with Bonferroni's correction instead. Its noise stays in the pooled variance, unless it is apart
    (settled): leaving out whatever looks large would make the rest too small. Of tables of five arms without effects,
    by simulation, some separate falsely: 5 % with equal variances; at n = 3 and 5, 7 % and 3 % if one arm has four
    times the others' deviation, 10 % and 5 % if the reference has, 9 % and 7 % if it has twice.
    """
    present = {arm: ref for arm, ref in references.items() if {arm, ref} <= set(model.arms)}
    weights = {arm: model.on_losses({arm: 1.0, ref: -1.0}) for arm, ref in present.items()}
    told = [arm for arm in weights if np.isfinite(weights[arm]).all()]
    apart = [arm for arm, ref in present.items() if {arm, ref} & model.apart and paired(model, arm, ref).n]
    every = len(told) + len(apart)
    together = np.array([weights[arm] for arm in told])
    pooled = {arm: model.contrast({arm: 1.0, present[arm]: -1.0}) for arm in told}
    reach = critical_value(together @ together.T, model.dof, 1 - (1 - level) * len(told) / every) if told else np.nan
    corrected = p_values(together @ together.T, model.dof, [each.t for each in pooled.values()]) if told else []
    noisy = {arm for arm, (_, beyond_chance) in noisy_arms(model).items() if beyond_chance} | model.apart
    found = {}
    for arm, p in [*zip(told, corrected), *((arm, np.nan) for arm in apart)]:
        if noisy.isdisjoint({arm, present[arm]}):
            estimate, p = pooled[arm], p * every / len(told)
            low, high = estimate.value - reach * estimate.error, estimate.value + reach * estimate.error
            found[arm] = Comparison(estimate, low, high, float(np.minimum(1.0, p)), alone=False)
        else:
            estimate = paired(model, arm, present[arm])
            low, high = estimate.interval(1 - (1 - level) / every)
            found[arm] = Comparison(estimate, low, high, float(np.minimum(1.0, estimate.p * every)), alone=True)
    return {arm: found[arm] for arm in present if arm in found}


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
