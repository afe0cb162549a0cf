"""What may be said of a handful of seeds: pure functions of numbers."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit


class Difference(NamedTuple):
    """The mean of `pairs` differences and the ends of its 95 % interval (NaN below two pairs)."""

    pairs: int
    mean: float
    low: float
    high: float

    @property
    def separated(self) -> bool:
        """Whether there is an interval and zero is outside it."""
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: pd.Series) -> tuple[float, float]:
    """Over seeds, with n - 1 in the denominator; NaN where too few. ValueError if a value is not finite."""
    x = values.to_numpy(dtype=float)
    if not np.isfinite(x).all():
        raise ValueError(f"a mean over seeds needs finite numbers, not {x[~np.isfinite(x)][0]}")
    return float(x.mean()) if len(x) else np.nan, float(x.std(ddof=1)) if len(x) > 1 else np.nan


def paired_difference(values: pd.Series, reference: pd.Series) -> Difference:
    """Mean of `values - reference` over the seeds both have, with the interval of the paired t-test.

    Both are indexed by seed; ValueError if a seed occurs twice. Runs of one seed share data order and first values, so
    what a seed does to both cancels; what remains is taken as normal and independent between seeds.
    """
    for series in (values, reference):
        if not series.index.is_unique:
            raise ValueError(
                f"seed {series.index[series.index.duplicated()][0]} occurs twice in one arm; arm=NAME names a variant"
            )
    differences = (values - reference).loc[values.index.intersection(reference.index)]
    n, (mean, deviation) = len(differences), mean_and_deviation(differences)
    reach = stdtrit(n - 1, 0.975) * deviation / n**0.5 if n > 1 else np.nan
    return Difference(n, mean, float(mean - reach), float(mean + reach))
