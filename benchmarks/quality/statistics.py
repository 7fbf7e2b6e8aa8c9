"""Confidence intervals (95 %) and rank correlation, by SciPy."""

from collections.abc import Callable

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000


def wilson(successes: int, trials: int) -> dict[str, float]:
    """Wilson's score interval of a share (Wilson, 1927) in percent: the share as `value`, and the
    interval's ends `low` and `high`.
    """
    share = successes / trials
    ends = stats.binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    # Where the interval includes the share itself, rounding must not exclude it.
    low, high = min(float(ends.low), share), max(float(ends.high), share)
    return {"value": 100 * share, "low": 100 * low, "high": 100 * high}


def bootstrap(
    values: np.ndarray, transform: Callable[[float], float] = lambda mean: mean
) -> dict[str, float]:
    """Percentile bootstrap (Efron, 1979) of a mean, or of an increasing function `transform` of
    one: the figure as `value`, and the interval's ends `low` and `high`; equal in equal calls.

    `values` has one number for each unit that is independent of the others (a digit, a window).
    Differences to a reference are resampled in pairs if they are such differences.
    """
    values = np.asarray(values, float)
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values[chosen].mean(axis=1), (tail, 1 - tail))
    figures = {"value": values.mean(), "low": low, "high": high}
    return {name: float(transform(figure)) for name, figure in figures.items()}


def rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row of `a` with that row of `b`, both (n, m)."""
    ranks = (stats.zscore(stats.rankdata(x, axis=1), axis=1) for x in (a, b))
    return np.mean(np.multiply(*ranks), axis=1)
