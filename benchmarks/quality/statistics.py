"""Confidence intervals (95 %) and rank correlation, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

CONFIDENCE = 0.95
# The normal distribution's quantile at (1 + CONFIDENCE) / 2.
_Z = 1.959964
RESAMPLES = 2000


def wilson(successes: int, trials: int) -> dict[str, float]:
    """Wilson's score interval of a share (Wilson, 1927) in percent: the share as `value`, and the
    interval's ends `low` and `high`.
    """
    share, ratio = successes / trials, _Z**2 / trials
    centre = (share + ratio / 2) / (1 + ratio)
    spread = _Z * math.sqrt(share * (1 - share) / trials + ratio / (4 * trials)) / (1 + ratio)
    # At the ends, where the interval includes the share itself, rounding must not exclude it.
    low, high = min(centre - spread, share), max(centre + spread, share)
    return {"value": 100 * share, "low": 100 * max(low, 0.0), "high": 100 * min(high, 1.0)}


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
    return {
        "value": float(transform(values.mean())),
        "low": float(transform(low)),
        "high": float(transform(high)),
    }


def rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of each row of `a` with that row of `b`, both (n, m).

    Equal numbers in a row get different ranks, in the order in which they stand.
    """

    def standardised_ranks(rows):
        ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1).astype(float)
        ranks -= ranks.mean(axis=1, keepdims=True)
        return ranks / np.linalg.norm(ranks, axis=1, keepdims=True)

    return (standardised_ranks(a) * standardised_ranks(b)).sum(axis=1)
