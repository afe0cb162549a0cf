"""Where a figure's scatter comes from: table draw, training seed, the machine, and the documents of the test text."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import fdtrc, stdtrit


class Split(NamedTuple):
    """Variance components of a crossed block, by the method of moments; below 0 where the data show none."""

    seed: float
    table: float
    rest: float
    seed_p: float  # of the F-tests that a component is 0
    table_p: float


def split_variance(block: pd.DataFrame) -> Split:
    """block: a row a training seed, a column a table seed, one loss each. ValueError for gaps, or one row or column.

    loss = mean + seed + table + rest, all three random: E[MS_table] = rest + rows * table, and so on.
    """
    values = block.to_numpy(float)
    rows, columns = values.shape
    if min(rows, columns) < 2 or not np.isfinite(values).all():
        raise ValueError(f"needs a block of two seeds by two tables or more without gaps; got {rows} by {columns}")
    by_row, by_column, mean = values.mean(1), values.mean(0), values.mean()
    rest = values - by_row[:, None] - by_column + mean
    degrees = (rows - 1) * (columns - 1)
    seeds, tables = columns * by_row.var(ddof=1), rows * by_column.var(ddof=1)
    left = float((rest**2).sum() / degrees)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = [float(fdtrc(m - 1, degrees, np.divide(s, left))) for m, s in ((rows, seeds), (columns, tables))]
    return Split(float((seeds - left) / columns), float((tables - left) / rows), left, *p)


def noise_floor(repeats: pd.Series) -> float:
    """How far two more runs of one configuration and seed may lie apart, in 95 %; NaN below two repeats.

    sqrt(2) * deviation * t: an exact prediction interval for the difference of two normal values. No claim goes below
    what floor_of_means makes of it.
    """
    n = len(repeats)
    return float(2**0.5 * repeats.std(ddof=1) * stdtrit(n - 1, 0.975)) if n > 1 else np.nan


def floor_of_means(floor: float, weights: ArrayLike, n: ArrayLike) -> float:
    """The noise floor of sum_i weights_i * mean_i, mean_i being over n_i runs; floor is that of two single runs.

    The same quantile, of the deviation sqrt(sum_i weights_i^2 / n_i) instead of sqrt(2).
    """
    return floor * float((np.square(np.asarray(weights, float)) / np.asarray(n, float)).sum() / 2) ** 0.5


def over_documents(
    ce_sum: np.ndarray, tokens: np.ndarray, reference_sum: np.ndarray | None = None, draws: int = 2000
) -> tuple[float, float]:
    """95 % percentile interval of nats per token over documents, drawn anew with replacement; (NaN, NaN) below 10.

    ce_sum, tokens, reference_sum (documents,): of one split, means over seeds; with reference_sum the interval is of
    the difference, document by document. It holds for these trained models on other text, and says nothing of seeds.
    """
    sums = np.asarray(ce_sum, float) - (0.0 if reference_sum is None else np.asarray(reference_sum, float))
    counts = np.asarray(tokens, float)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if len(sums) < 10:
        return np.nan, np.nan
    generator, found = np.random.default_rng(0), []
    for some in np.array_split(np.arange(draws), max(1, draws * len(sums) // 2**22)):  # 32 MiB of weights at a time
        times = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), len(some))
        found.append((times @ sums) / (times @ counts))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
