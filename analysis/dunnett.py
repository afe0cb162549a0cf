"""Many comparisons with one reference: the distribution of the largest of k t-statistics that share their variance.

Dunnett (1955). With equal correlations, as in a table without gaps, a double quadrature; else scipy's multivariate t
with a generator of its own, so that the same numbers give the same digits.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaincinv, ndtr, stdtr, stdtrit
from scipy.stats import multivariate_t

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2  # on (0, 1)
QUANTILES = (np.arange(4000) + 0.5) / 4000


def covers(correlation: np.ndarray, dof: int, t: float) -> float:
    """P(all |T_i| <= t), T multivariate t with this (k, k) correlation."""
    k = len(correlation)
    pairs = correlation[~np.eye(k, dtype=bool)]
    if k == 1:
        return float(1 - 2 * stdtr(dof, -t))
    if pairs.min() >= 0 and np.ptp(pairs) < 1e-6:
        return _equally_correlated(k, float(pairs[0]), dof, t)
    ends = np.full(k, t)
    generator = np.random.default_rng(0)
    shape: Any = correlation
    return float(multivariate_t.cdf(ends, shape=shape, df=dof, lower_limit=-ends, random_state=generator))


def _equally_correlated(k: int, rho: float, dof: int, t: float) -> float:
    """T_i = (sqrt(1 - rho) Z_i + sqrt(rho) Z_0) / s: over Z_0 and s, given which the T_i are independent."""
    z = 16 * NODES - 8
    density = 16 * WEIGHTS * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    # chi over sqrt(dof); cubed, for more nodes where s is small, which is where the tails are
    s = np.sqrt(gammaincinv(dof / 2, NODES**3) * 2 / dof)[:, None]
    shift, scale = np.sqrt(rho) * z, np.sqrt(1 - rho)
    inside = ndtr((t * s - shift) / scale) - ndtr((-t * s - shift) / scale)
    return float((3 * NODES**2 * WEIGHTS) @ inside**k @ density)


def critical_value(covariance: np.ndarray, dof: int, level: float = 0.95) -> float:
    """t such that estimate +- t * error covers all k at once with this probability; NaN without degrees of freedom."""
    if dof < 1:
        return np.nan
    return _critical_value(_correlation(covariance), len(covariance), dof, level)


@cache
def _critical_value(correlation: tuple[float, ...], k: int, dof: int, level: float) -> float:
    each = (1 - level) / 2
    alone, bonferroni = -stdtrit(dof, each), -stdtrit(dof, each / k)
    if k == 1:
        return float(alone)
    matrix = np.reshape(correlation, (k, k))
    found: Any = brentq(lambda t: covers(matrix, dof, t) - level, 0.99 * alone, 1.01 * bonferroni, xtol=1e-6)
    return float(found)


def p_values(covariance: np.ndarray, dof: int, t: Sequence[float]) -> list[float]:
    """Of each |t|: the probability that the largest of all k is as large. Between the single p and k times it."""
    if dof < 1:
        return [np.nan] * len(t)
    k = len(covariance)
    matrix = np.reshape(_correlation(covariance), (k, k))
    single = [2 * float(stdtr(dof, -abs(each))) for each in t]
    return [float(np.clip(1 - covers(matrix, dof, abs(each)), p, min(1, k * p))) for each, p in zip(t, single)]


def _correlation(covariance: np.ndarray) -> tuple[float, ...]:
    deviation = np.sqrt(np.diag(covariance))
    return tuple(np.round(covariance / np.outer(deviation, deviation), 9).ravel().tolist())


def power(
    difference: float, deviation: float, seeds: int, comparisons: int = 1, degrees: int = 1, rho=0.5, level=0.95
) -> float:
    """P(separated) of one of so many comparisons with `seeds` seeds each, if this were the true difference.

    deviation: of the noise of one run in the additive model, for two arms that of the pairs' differences over sqrt(2).
    degrees: of freedom that each seed after the first adds. rho: correlation of the comparisons, 0.5 with one
    reference. Noncentral t, as the mean of a normal tail over quantiles of the pooled deviation: scipy's nct gives NaN
    in part of this range.
    """
    dof = degrees * (seeds - 1)
    needed = critical_value(np.full((comparisons,) * 2, rho) + (1 - rho) * np.eye(comparisons), dof, level)
    shift = abs(difference) / (deviation * (2 / seeds) ** 0.5)
    s = np.sqrt(gammaincinv(dof / 2, QUANTILES) * 2 / dof)
    return float((ndtr(shift - needed * s) + ndtr(-shift - needed * s)).mean())


def seeds_to_separate(
    difference: float, deviation: float, wanted: float = 0.8, most: int = 10_000, **design: Any
) -> int | None:
    """The fewest seeds that separate with probability `wanted`; None if more than `most`, or nothing is known.

    design: power's comparisons, degrees, rho and level."""
    if not (deviation > 0 and abs(difference) > 0):
        return None
    low, high = 1, 2
    while not power(difference, deviation, high, **design) >= wanted:
        low, high = high, 2 * high
        if low > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(difference, deviation, middle, **design) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return high
