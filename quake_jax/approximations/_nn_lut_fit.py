"""Fitting of NN-LUT: a ReLU network with one hidden layer, and the exact table that it is.

Yu, Park, Park, Kim, Lee, Lee, Choi, "NN-LUT: Neural Approximation of Non-Linear Operations for
Efficient Transformer Inference", DAC 2022, arXiv 2112.02191. numpy only, in double precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from quake_jax.approximations import _arguments

_SAMPLES = 3000
_ROUNDS, _SOLVES, _FINAL_SOLVES = 30, 8, 60


@dataclasses.dataclass(frozen=True)
class ReluNetwork:
    """A network with one hidden layer and one input: Σ m_i ReLU(n_i x + b_i).

    n, b and m are float64 arrays of one shape, (neurons,); no n_i is 0.

    Example:
      >>> import numpy as np
      >>> from quake_jax import approximations
      >>> network = approximations.ReluNetwork(np.ones(1), np.zeros(1), np.full(1, 2.0))
      >>> network(np.array([-1.0, 3.0])).tolist()
      [0.0, 6.0]
    """

    n: np.ndarray
    b: np.ndarray
    m: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The network's value at float64 numbers."""
        hidden = np.maximum(np.asarray(x, np.float64)[..., None] * self.n + self.b, 0)
        return hidden @ self.m


@dataclasses.dataclass(frozen=True)
class LookupTable:
    """A piecewise linear function: slopes[k]·x + intercepts[k] between breakpoints k - 1 and k.

    float64 arrays: breakpoints, ascending, of shape (entries - 1,); slopes and intercepts of shape
    (entries,). A breakpoint belongs to the segment above it.

    Example:
      >>> import numpy as np
      >>> from quake_jax import approximations
      >>> table = approximations.LookupTable(np.zeros(1), np.array([0.0, 2.0]), np.zeros(2))
      >>> table(np.array([1.0, 3.0])).tolist()
      [2.0, 6.0]
    """

    breakpoints: np.ndarray
    slopes: np.ndarray
    intercepts: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The function's value at float64 numbers."""
        x = np.asarray(x, np.float64)
        k = np.searchsorted(self.breakpoints, x, side="right")
        return self.slopes[k] * x + self.intercepts[k]


def lookup_table(network: ReluNetwork, lower: float, upper: float) -> LookupTable:
    """The table that a ReLU network is, exactly, between lower and upper.

    Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191: breakpoints are d_i = -b_i / n_i, in order;
    the slope of segment k is Σ m_i n_i over the neurons that are active there (i <= k with
    n_i > 0, i > k with n_i < 0), its intercept the same sum of m_i b_i. Segments outside the range
    are dropped: those at its ends go on beyond it.

    Args:
      network: with distinct breakpoints within the range.
      lower, upper: the range.

    Returns:
      A LookupTable with one entry more than breakpoints within the range.

    Raises:
      TypeError: if network is no ReluNetwork.
      ValueError: if lower is not less than upper.

    Example:
      >>> import numpy as np
      >>> from quake_jax import approximations
      >>> network = approximations.ReluNetwork(np.ones(1), np.zeros(1), np.full(1, 2.0))
      >>> approximations.lookup_table(network, -1.0, 1.0).slopes.tolist()
      [0.0, 2.0]
    """
    if not isinstance(network, ReluNetwork):
        raise TypeError(
            "quake_jax.approximations.lookup_table: network must be a ReluNetwork; "
            f"got {type(network).__name__}"
        )
    _check_range(lower, upper, "lookup_table")
    breakpoints = -network.b / network.n
    order = np.argsort(breakpoints, kind="stable")
    d, n, b, m = (a[order] for a in (breakpoints, network.n, network.b, network.m))
    k = np.arange(len(d) + 1)[:, None]
    i = np.arange(1, len(d) + 1)[None, :]
    active = ((i <= k) & (n > 0)) | ((i > k) & (n < 0))
    slopes, intercepts = active @ (m * n), active @ (m * b)
    inside = (d > lower) & (d < upper)
    first = int(np.sum(d <= lower))
    last = first + int(np.sum(inside))
    return LookupTable(d[inside], slopes[first : last + 1], intercepts[first : last + 1])


def fit_relu_network(
    function: Callable[[np.ndarray], np.ndarray],
    lower: float,
    upper: float,
    entries: int = 16,
    *,
    left: tuple[float, float] | None = None,
    right: tuple[float, float] | None = None,
    relative: bool = False,
    seed: int = 0,
) -> ReluNetwork:
    """Fit a ReLU network whose table has `entries` entries to a function of one variable.

    Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191, train by gradient descent on random inputs.
    Here the largest error is minimised directly: breakpoints are moved until the segments have the
    same error, and for given breakpoints the values there are those of weighted least squares,
    with Lawson's weights. What comes out is written as a network: entries - 1 neurons with a
    breakpoint in the range, of random sign, and two outside it that stand for a straight line.

    Args:
      function: of float64 arrays, twice differentiable but for single points.
      lower, upper: the range.
      entries: 4 to 64.
      left, right: (slope, intercept) of the first and the last segment, or None if they are free.
      relative: whether errors are relative to the function, which is then positive.
      seed: of the signs, on which only rounding errors depend.

    Returns:
      A ReluNetwork with entries + 1 neurons. It takes a fraction of a second.

    Raises:
      TypeError: if function is none, or entries no integer.
      ValueError: if lower is not less than upper, or entries out of range; if function is not
        finite in the range.

    Example:
      >>> import numpy as np
      >>> from quake_jax import approximations
      >>> network = approximations.fit_relu_network(np.square, 0.0, 1.0, 4)
      >>> x = np.linspace(0, 1, 101)
      >>> bool(np.max(np.abs(network(x) - x * x)) < 0.0085)  # 1 / 128, the least possible
      True
    """
    name = "fit_relu_network"
    if not callable(function):
        raise TypeError(
            f"quake_jax.approximations.{name}: function must be a function; "
            f"got {type(function).__name__}"
        )
    entries = _arguments.integer(entries, name, "entries", 4, 64)
    _check_range(lower, upper, name)
    x, coordinate = _samples(function, lower, upper, relative)
    y = np.asarray(function(x), np.float64)
    weights = 1 / np.abs(y) if relative else np.ones_like(y)
    d, values = _fit(x, y, coordinate, weights, entries, left, right)
    return _network(d, values, np.random.default_rng(seed))


def _check_range(lower, upper, name):
    if not (np.isfinite(lower) and np.isfinite(upper) and lower < upper):
        raise ValueError(
            f"quake_jax.approximations.{name}: lower must be less than upper, both finite; "
            f"got {lower} and {upper}"
        )


def _samples(function, lower, upper, relative):
    """Points of the range, and of each the share of all breakpoints that should lie below it.

    Segments of width h have errors of h² |f''| / 16, so breakpoints are as dense as √|f''|.
    """
    width = upper - lower
    near = np.geomspace(1e-6, 1, 4000)
    x = np.concatenate([np.linspace(0, 1, 8001), near, 1 - near])
    x = lower + width * np.unique(np.clip(x, 0, 1))
    y = np.asarray(function(x), np.float64)
    if y.shape != x.shape or not np.all(np.isfinite(y)):
        raise ValueError(
            "quake_jax.approximations.fit_relu_network: function must be finite from lower to "
            f"upper, and of its argument's shape; got {np.sum(~np.isfinite(y))} other numbers, "
            f"and shape {y.shape} for {x.shape}"
        )
    step = 1e-4 * np.minimum(1 + 0 * x, np.maximum(1e-2 * width, 1e-12))
    middle = np.clip(x, lower + step, upper - step)
    curvature = function(middle + step) - 2 * function(middle) + function(middle - step)
    curvature = np.abs(curvature) / step**2
    density = np.sqrt(curvature / np.abs(y) if relative else curvature)
    density = density + 1e-3 * np.trapezoid(density, x) / width + 1e-12
    share = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    share /= share[-1]
    # Half of the points as dense as the breakpoints, half everywhere.
    points = np.interp(np.linspace(0, 1, _SAMPLES // 2), share, x)
    points = np.unique(np.concatenate([points, np.linspace(lower, upper, _SAMPLES // 2)]))
    return points, np.interp(points, x, share)


def _fit(x, y, coordinate, weights, entries, left, right):
    """Nodes (both ends of the range and the breakpoints) and values there."""
    shares = np.full(entries, 1 / entries)
    best = np.inf, None, None
    for round_ in range(_ROUNDS):
        inner = np.interp(np.cumsum(shares)[:-1], coordinate, x)
        solves = _FINAL_SOLVES if round_ == _ROUNDS - 1 else _SOLVES
        d = np.concatenate([x[:1], inner, x[-1:]])
        values = _values(x, y, weights, d, left, right, solves)
        errors = weights * np.abs(np.interp(x, d, values) - y)
        largest = np.max(errors)
        if largest < best[0]:
            best = largest, d, values
        segment = np.clip(np.searchsorted(d, x, side="right") - 1, 0, entries - 1)
        by_segment = np.full(entries, 1e-3 * largest)
        np.maximum.at(by_segment, segment, errors)
        shares = shares * (largest / by_segment) ** 0.25
        shares /= np.sum(shares)
    return _polished(x, y, weights, best[1], left, right)


def _polished(x, y, weights, d, left, right):
    return d, _values(x, y, weights, d, left, right, _FINAL_SOLVES)


def _values(x, y, weights, d, left, right, solves):
    """Values at the nodes d that make the largest weighted error small, by Lawson's iteration."""
    segment = np.clip(np.searchsorted(d, x, side="right") - 1, 0, len(d) - 2)
    t = (x - d[segment]) / (d[segment + 1] - d[segment])
    fixed = np.full(len(d), np.nan)
    if left is not None:
        fixed[:2] = left[0] * d[:2] + left[1]
    if right is not None:
        fixed[-2:] = right[0] * d[-2:] + right[1]
    free = np.isnan(fixed)

    def at_samples(nodes):
        return (1 - t) * nodes[segment] + t * nodes[segment + 1]

    def at_nodes(shares, shares_above):
        return sum(
            np.bincount(segment + k, part, len(d)) for k, part in ((0, shares), (1, shares_above))
        )

    rest = y - at_samples(np.where(free, 0, fixed))
    lawson = np.full(len(x), 1 / len(x))
    values = fixed.copy()
    best = np.inf
    for _ in range(solves):
        # The normal equations are tridiagonal, as each sample lies between two nodes. Products of
        # large matrices would wait for the threads of BLAS where other work has the cores.
        w = lawson * weights**2
        beside = np.bincount(segment, w * t * (1 - t), len(d))[:-1]
        normal = np.diag(at_nodes(w * (1 - t) ** 2, w * t**2))
        normal += np.diag(beside, 1) + np.diag(beside, -1)
        normal = normal[np.ix_(free, free)]
        normal += 1e-14 * np.trace(normal) * np.eye(len(normal))
        solution = np.zeros(len(d))
        solution[free] = np.linalg.solve(normal, at_nodes(w * (1 - t) * rest, w * t * rest)[free])
        errors = weights * np.abs(at_samples(solution) - rest)
        if np.max(errors) < best:
            best, values[free] = np.max(errors), solution[free]
        lawson = lawson * (errors + 1e-3 * np.max(errors))
        lawson /= np.sum(lawson)
    return values


def _network(d, values, random) -> ReluNetwork:
    slopes = np.diff(values) / np.diff(d)
    inner, changes = d[1:-1], np.diff(slopes)
    n = np.where(random.random(len(inner)) < 0.5, -1.0, 1.0)
    # The first segment's line; a neuron that decreases adds its change of slope on the left.
    slope = slopes[0] + np.sum(changes[n < 0])
    intercept = values[0] - slopes[0] * d[0] - np.sum((changes * inner)[n < 0])
    # As a combination of one neuron active in the whole range and rising, and one falling.
    width = d[-1] - d[0]
    low, high = d[0] - width, d[-1] + width
    falling = (intercept + slope * low) / (high - low)
    return ReluNetwork(
        n=np.concatenate([n, [1.0, -1.0]]),
        b=np.concatenate([-n * inner, [-low, high]]),
        m=np.concatenate([changes, [slope + falling, falling]]),
    )
