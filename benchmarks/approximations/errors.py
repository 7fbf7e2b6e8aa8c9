"""The error of an operator on fixed inputs, against NumPy and SciPy in float64."""

from functools import cache

import jax
import numpy as np

from benchmarks.approximations.cases import LAYERNORM_EPSILON, OPERATOR_OF, Candidate
from benchmarks.ops.operators import OPERATORS
from benchmarks.ops.systems import ERROR_FLOOR

# Rows and width of the logits, N(0, 2²).
LOGITS = {"tv_128": (512, 128), "tv_1024": (64, 1024)}
# Ends of the range and number of points.
RANGES = {"gelu": (-6.0, 6.0), "exp": (-10.0, 0.0), "sigmoid": (-10.0, 10.0)}
POINTS = 1 << 16
# Rows and channels of the numbers that are normalised.
NORMALISED = (256, 384)
# `ERROR_FLOOR`: results of less than this share of the largest have no relative error, for GELU
# passes zero.
SETS = {
    "logits": {name: list(shape) for name, shape in LOGITS.items()},
    "ranges": {kind: list(ends) for kind, ends in RANGES.items()},
    "points": POINTS,
    "normalised": list(NORMALISED),
    "floor": ERROR_FLOOR,
}


def of(candidate: Candidate) -> dict[str, float]:
    """Measure the error of a candidate.

    Of softmax `tv_128` and `tv_1024`, the mean total variation of rows, and `row_sum`, the largest
    distance of a row's sum from 1 on both sets; of layer normalisation `rms_even` and `rms_uneven`,
    the root of the mean square of the error, where channels are alike and where their spreads
    differ; of the others `max_abs` and `max_rel`.
    """
    function = jax.jit(candidate.function)

    def result(x):
        return np.asarray(function(x), np.float64)

    if candidate.kind == "softmax":
        results = {name: (result(_logits(name)[0]), _logits(name)[1]) for name in LOGITS}
        figures = {n: float(0.5 * np.abs(y - w).sum(-1).mean()) for n, (y, w) in results.items()}
        sums = (np.abs(y.sum(-1) - 1).max() for y, _ in results.values())
        return figures | {"row_sum": float(max(sums))}
    if candidate.kind == "layernorm":
        return {
            name: float(np.sqrt(np.mean((result(x) - wanted) ** 2)))
            for name, (x, wanted) in _normalised().items()
        }
    x, wanted = _points(candidate.kind)
    errors, sizes = np.abs(result(x) - wanted), np.abs(wanted)
    counted = sizes >= ERROR_FLOOR * sizes.max() if candidate.kind == "gelu" else sizes > 0
    return {
        "max_abs": float(errors.max()),
        "max_rel": float((errors[counted] / sizes[counted]).max()),
    }


@cache
def _logits(name: str) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(0, 2, LOGITS[name]).astype(np.float32)
    return x, OPERATORS["softmax"].exact(x.astype(np.float64))


@cache
def _points(kind: str) -> tuple[np.ndarray, np.ndarray]:
    x = np.linspace(*RANGES[kind], POINTS, dtype=np.float32)
    return x, OPERATORS[OPERATOR_OF[kind]].exact(x.astype(np.float64))


@cache
def _normalised() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """N(0, 1) in all channels, and with a spread of 1, 2, 4 or 8 by channel."""
    random = np.random.default_rng(0)
    even = random.normal(size=NORMALISED).astype(np.float32)
    uneven = even * np.exp2(random.integers(0, 4, NORMALISED[1])).astype(np.float32)
    return {"rms_even": (even, _layer_norm(even)), "rms_uneven": (uneven, _layer_norm(uneven))}


def _layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + LAYERNORM_EPSILON)
