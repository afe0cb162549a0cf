"""What may be said of a handful of seeds: pure functions of numbers.

An Estimate is a number with a standard error; its t-interval, tests and power follow. No percentile bootstrap over
seeds: at n = 3 it covers 74 % where it says 95 %.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit


class Estimate(NamedTuple):
    """`value` with its standard error, on `dof` degrees of freedom, from n seeds (or pairs of them).

    Without degrees of freedom there is a value but no interval and no p (NaN).
    """

    n: int
    value: Any  # a float, or an array of as many tables; so is what follows from it
    error: Any
    dof: int

    def interval(self, level: float = 0.95) -> tuple[Any, Any]:
        reach = stdtrit(self.dof if self.dof > 0 else np.nan, 0.5 + level / 2) * self.error
        return self.value - reach, self.value + reach

    @property
    def separated(self) -> bool:
        """Whether there is a 95 % interval and zero is outside it."""
        low, high = self.interval()
        return bool(low > 0 or high < 0)

    @property
    def t(self) -> Any:
        return _ratio(self.value, self.error)

    @property
    def p(self) -> Any:
        """That of the two-sided t-test against 0."""
        return 2 * _tail(np.abs(self.t), self.dof)

    def p_below(self, margin: float) -> Any:
        """One-sided: small if the true value is below margin. Non-inferiority, where lower is better."""
        return _tail(_ratio(margin - self.value, self.error), self.dof)

    def p_within(self, margin: float) -> Any:
        """Two one-sided tests (Schuirmann 1987): small if the true value lies within (-margin, margin)."""
        return np.maximum(self.p_below(margin), _tail(_ratio(self.value + margin, self.error), self.dof))


def mean_and_deviation(values: pd.Series) -> tuple[float, float]:
    """Over seeds, with n - 1 in the denominator; NaN where too few. ValueError if a value is not finite."""
    x = values.to_numpy(dtype=float)
    if not np.isfinite(x).all():
        raise ValueError(f"a mean over seeds needs finite numbers, not {x[~np.isfinite(x)][0]}")
    return float(x.mean()) if len(x) else np.nan, float(x.std(ddof=1)) if len(x) > 1 else np.nan


def mean_of(values: pd.Series) -> Estimate:
    """The mean over independent values, one a seed, with its standard error."""
    mean, deviation = mean_and_deviation(values)
    n = len(values)
    return Estimate(n, mean, deviation / n**0.5 if n else np.nan, n - 1)


def paired_difference(values: pd.Series, reference: pd.Series) -> Estimate:
    """Mean of `values - reference` over the seeds both have: the paired t-test.

    Both are indexed by seed; ValueError if a seed occurs twice. Runs of one seed share data order and first values, so
    what a seed does to both cancels; what remains is taken as normal and independent between seeds.
    """
    for series in (values, reference):
        if not series.index.is_unique:
            raise ValueError(
                f"seed {series.index[series.index.duplicated()][0]} occurs twice in one arm; arm=NAME names a variant"
            )
    return mean_of((values - reference).loc[values.index.intersection(reference.index)])


def slope_weights(x: ArrayLike) -> np.ndarray:
    """w with sum w_i y_i the least-squares slope of y on x. ValueError if x has one value alone."""
    centred = np.asarray(x, float)
    centred = centred - centred.mean()
    if not centred.any():
        raise ValueError(f"a slope needs two different places at least; got {np.asarray(x).tolist()}")
    return centred / (centred @ centred)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction over the p that are there; NaN stays NaN and counts as a test all the same."""
    values = np.asarray(p, float)
    order = np.argsort(np.nan_to_num(values, nan=2.0), kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def _ratio(value: Any, error: Any) -> Any:
    """value / error; 0 / 0 is 0 (no difference at all), else division by 0 is infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((np.asarray(value) == 0) & (np.asarray(error) == 0), 0.0, np.divide(value, error))[()]


def _tail(t: Any, dof: int) -> Any:
    """P(T > t); NaN without degrees of freedom."""
    return stdtr(dof if dof > 0 else np.nan, -t)
