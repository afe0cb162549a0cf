"""What may be said of a handful of seeds: pure functions of numbers."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit


class Summary(NamedTuple):
    """A mean over `n` seeds and their standard deviation (n - 1 in the denominator; NaN below two)."""

    n: int
    mean: float
    deviation: float


class Difference(NamedTuple):
    """The mean of `pairs` differences and the ends of its interval (NaN below two pairs)."""

    pairs: int
    mean: float
    low: float
    high: float

    @property
    def separated(self) -> bool:
        """Whether the interval exists and leaves out zero."""
        return self.low > 0 or self.high < 0


def summarise(values: pd.Series) -> Summary:
    """Mean and deviation of one number a seed. ValueError if one is not finite: it must not vanish."""
    x = values.to_numpy(dtype=float)
    if not np.isfinite(x).all():
        raise ValueError(f"a mean over seeds needs finite numbers, not {x[~np.isfinite(x)][0]}")
    mean = x.mean() if len(x) else np.nan
    return Summary(len(x), float(mean), float(x.std(ddof=1)) if len(x) > 1 else np.nan)


def paired_difference(values: pd.Series, reference: pd.Series, level: float = 0.95) -> Difference:
    """Mean of `values - reference` over the seeds both have, with the interval of the paired t-test.

    Both are indexed by seed, each seed once. Runs of one seed share data order and first values, so what a
    seed does to both arms cancels; what remains is taken as normal and independent between seeds.
    """
    for series in (values, reference):
        if not series.index.is_unique:
            raise ValueError(f"seed {series.index[series.index.duplicated()][0]} occurs twice: which is the pair?")
    seeds = values.index.intersection(reference.index)
    n, mean, deviation = summarise(values.loc[seeds] - reference.loc[seeds])
    if n < 2:
        return Difference(n, mean, np.nan, np.nan)
    reach = float(stdtrit(n - 1, (1 + level) / 2)) * deviation / n**0.5
    return Difference(n, mean, mean - reach, mean + reach)
