"""Derives every numerical constant of quake_jax and writes them for C++ and for Python.

Each constant follows from the mathematics stated beside it (minimax polynomials by the Remez
exchange, shifts of the order-1 exponential in closed form or by a search), so none is pasted in.

    python tools/derive_constants.py            # write both generated files
    python tools/derive_constants.py --check    # compare only; exit status 1 on a difference

Needs mpmath and numpy. The result does not depend on the platform's libm or LAPACK: linear systems
are solved and functions tabulated in mpmath; numpy only picks points and compares errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mpmath as mp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CPP_PATH = ROOT / "cpu_kernels" / "core" / "constants.h"
CPP_SEGMENTS_PATH = ROOT / "cpu_kernels" / "core" / "segments.h"
CPP_BOUNDS_PATH = ROOT / "cpu_kernels" / "tests" / "bounds.h"
PY_PATH = ROOT / "quake_jax" / "_core" / "constants.py"

DIGITS = 40  # decimal digits of every mpmath computation here
MANTISSA_SCALE = 2**23  # bits of a float32 per power of two

# The promise of the library: largest relative error of exp for each order, arithmetic included.
EXP_MAX_REL_ERROR = {1: 0.0299, 2: 0.0027, 3: 1.08e-4, 4: 3.6e-6, 5: 2.5e-7}

# exp(-z^2/2) is below the smallest normal float32 beyond sqrt(2 * 126 * ln 2) = 13.22.
GELU_Z_MAX = 13.3
# The polynomial in GELU may use this share of the error that exp of the same order has.
GELU_ERROR_SHARE = 0.3
# That of log(1 + e) likewise; at order 5 half the error of exp, which is mostly arithmetic.
LOG1P_POLY_BOUND = {o: 0.3 * e for o, e in EXP_MAX_REL_ERROR.items()} | {5: 1.2e-7}
GELU_P_STEP = 1 / 256  # p is searched on this lattice: exact in float32, and robust

SOFTMAX_ROWS, SOFTMAX_WIDTH, SOFTMAX_SIGMA = 8192, 128, 2.0
# The minimum is flat: half a step raises the error by less than 0.1 %, while another sample of
# rows moves the minimum by a tenth of a step.
SOFTMAX_C_STEP = 100_000

GRID = 1201  # points on which the Remez exchange looks for extrema
SEGMENT_GRID = 101  # the same within a segment
SEGMENTS = 32  # as many as two vector registers of 16 floats hold


def float32(value: mp.mpf | float) -> float:
    """Rounds to the nearest float32 and returns it as a Python float."""
    return float(np.float32(float(value)))


# --- Minimax approximation --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """Approximate `target` by sum_k c_k x^k in the relative sense, for k = 0..degree.

    Attributes:
      x: points (mpf), increasing or decreasing.
      target: values of the function at those points (mpf), non-zero.
      degree: highest power.
      fixed: coefficients that are given, by power.
      linear: (weights w, value b) requires sum_k w_k c_k = b, or None; w_degree is not 0.
    """

    x: Sequence[mp.mpf]
    target: Sequence[mp.mpf]
    degree: int
    fixed: Mapping[int, mp.mpf] = dataclasses.field(default_factory=dict)
    linear: tuple[Sequence[mp.mpf], mp.mpf] | None = None

    @functools.cached_property
    def table(self) -> np.ndarray:
        """x^k / target as float64, shape (degree + 1, points)."""
        x = np.array([float(v) for v in self.x])
        columns = [1 / np.array([float(v) for v in self.target])]
        for _ in range(self.degree):
            columns.append(columns[-1] * x)
        return np.array(columns)

    def relative_error(self, coefficients: Sequence[mp.mpf | float]) -> np.ndarray:
        """Relative error at every point, in float64."""
        # A plain sum, not a matrix product: the order of its additions is the same everywhere.
        return sum(float(c) * row for c, row in zip(coefficients, self.table, strict=True)) - 1.0


def _row(problem: Problem, point: int, free: Sequence[int], fixed: Mapping[int, mp.mpf]):
    """One equation sum_free c_k phi_k = rhs at a point, the last power eliminated by `linear`."""
    x, target = problem.x[point], problem.target[point]
    phi = {k: x**k / target for k in (*free, *fixed, problem.degree)}
    rhs = 1 - mp.fsum(c * phi[k] for k, c in fixed.items())
    if problem.linear is None:
        return [phi[k] for k in free], rhs
    weights, b = problem.linear
    rest = b - mp.fsum(c * weights[k] for k, c in fixed.items())
    last = phi[problem.degree] / weights[problem.degree]
    return [phi[k] - weights[k] * last for k in free], rhs - rest * last


def _complete(problem: Problem, free, fixed, values) -> list[mp.mpf]:
    """All coefficients, from those given and those solved for (and the one `linear` determines)."""
    known = {**fixed, **dict(zip(free, values, strict=True))}
    if problem.linear is not None and problem.degree not in known:
        weights, b = problem.linear
        rest = b - mp.fsum(c * weights[k] for k, c in known.items())
        known[problem.degree] = rest / weights[problem.degree]
    return [known[k] for k in range(problem.degree + 1)]


def remez(problem: Problem, fixed: Mapping[int, mp.mpf] | None = None):
    """Minimax coefficients by the Remez exchange on the points of the problem.

    Args:
      problem: what to approximate.
      fixed: further coefficients that are given, by power.

    Returns:
      (coefficients, largest relative error on the points).
    """
    fixed = {**problem.fixed, **(fixed or {})}
    dependent = set() if problem.linear is None else {problem.degree}
    free = [k for k in range(problem.degree + 1) if k not in fixed and k not in dependent]
    size, points = len(free), len(problem.x)

    def levelled(reference: Sequence[int], signs: Sequence[float]) -> list[mp.mpf]:
        """The coefficients with errors of one size and those signs at the reference."""
        rows = [_row(problem, i, free, fixed) for i in reference]
        matrix = [[*row, mp.mpf(sign)] for (row, _), sign in zip(rows, signs, strict=True)]
        solution = _solve(np.array(matrix), np.array([rhs for _, rhs in rows]))
        return _complete(problem, free, fixed, solution[:size, 0])

    if problem.x[0] * problem.x[-1] < 0:
        coefficients = levelled(*_single_exchange(problem, free, fixed))
        return coefficients, float(np.max(np.abs(problem.relative_error(coefficients))))
    # Start from Chebyshev's points, then move to the extrema of the error until it is levelled.
    reference = _chebyshev_points(size + 1, points)
    best, best_error = None, math.inf
    for _ in range(30):
        coefficients = levelled(reference, [(-1) ** j for j in range(size + 1)])
        error = problem.relative_error(coefficients)
        largest = float(np.max(np.abs(error)))
        if largest < best_error:
            best, best_error = coefficients, largest
        segments = np.split(np.arange(points), np.flatnonzero(np.diff(np.sign(error))) + 1)
        extrema = [int(s[np.argmax(np.abs(error[s]))]) for s in segments]
        while len(extrema) > size + 1:
            drop = 0 if abs(error[extrema[0]]) < abs(error[extrema[-1]]) else -1
            del extrema[drop]
        if not size or len(extrema) < size + 1 or extrema == reference:
            break
        reference = extrema
    return best, best_error


def _chebyshev_points(count: int, points: int) -> list[int]:
    """Indices of the extrema of a Chebyshev polynomial, the ends left out."""
    angles = math.pi * (np.arange(count) + 0.5) / count
    return [int(i) for i in np.rint((1 - np.cos(angles)) / 2 * (points - 1))]


def _single_exchange(problem: Problem, free: Sequence[int], fixed: Mapping[int, mp.mpf]):
    """Points and signs of the largest errors of the best approximation, on both sides of 0.

    There the powers without the constant one are no Chebyshev system, nor are those that meet a
    condition on both ends: the errors need not alternate. So points are exchanged one at a time,
    and the ratio test of the simplex method picks the one that leaves (Stiefel 1960).
    """
    size, phi = len(free), problem.table
    matrix = phi[free]
    rhs = sum((-float(c) * phi[k] for k, c in fixed.items()), np.ones(len(problem.x)))
    if problem.linear is not None and problem.degree not in fixed:
        weights, b = problem.linear
        rest = float(b - mp.fsum(c * weights[k] for k, c in fixed.items()))
        last = phi[problem.degree] / float(weights[problem.degree])
        matrix = matrix - np.array([float(weights[k]) for k in free])[:, None] * last
        rhs = rhs - rest * last
    matrix = matrix.T
    reference = np.array(_chebyshev_points(size + 1, len(problem.x)))
    # The weights that annihilate the columns have the signs of the errors.
    weights = _solve(matrix[reference[:-1]].T, -matrix[reference[-1]])
    signs = np.where(np.append(weights, 1.0) < 0, -1.0, 1.0)
    for _ in range(100):
        basis = np.column_stack([signs[:, None] * matrix[reference], np.ones(size + 1)])
        *coefficients, level = _solve(basis, signs * rhs[reference])[:, 0]
        if level < 0:
            signs = -signs
            continue
        residual = rhs - sum((c * m for c, m in zip(coefficients, matrix.T, strict=True)), 0.0)
        enter = int(np.argmax(np.abs(residual)))
        if enter in reference:
            break
        sign = math.copysign(1.0, residual[enter])
        sides = np.column_stack([np.eye(size + 1)[-1], [*(sign * matrix[enter]), 1.0]])
        weights, change = _solve(basis.T, sides).T
        ratios = np.where(change > 1e-12, weights / np.maximum(change, 1e-12), np.inf)
        leave = int(np.argmin(ratios))
        reference[leave], signs[leave] = enter, sign
    return reference.tolist(), signs.tolist()


def _solve(matrix: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solves a small linear system of floats or mpf, to the same bits on every machine."""
    rows = np.column_stack([matrix, rhs])
    size = len(matrix)
    for k in range(size):
        pivot = k + int(np.argmax(np.abs(rows[k:, k])))
        rows[[k, pivot]] = rows[[pivot, k]]
        rows[k] /= rows[k, k]
        others = np.arange(size) != k
        rows[others] -= rows[others, k, None] * rows[k]
    return rows[:, size:]


def round_to_float32(problem: Problem, beam: int = 6) -> list[float]:
    """Minimax coefficients that are float32 numbers.

    Rounding all coefficients at once can multiply the error. Here they are rounded one by one,
    lowest power (coarsest spacing) first, each both ways, and the others are solved for again;
    the best few partial results are kept.

    Returns:
      The coefficients that were not given in the problem, lowest power first.
    """
    powers = [k for k in range(problem.degree + 1) if k not in problem.fixed]
    candidates = [(remez(problem)[0], {})]
    for k in powers:
        scored = {}
        for coefficients, chosen in candidates:
            nearest = np.float32(float(coefficients[k]))
            toward = np.float32(np.inf if mp.mpf(float(nearest)) < coefficients[k] else -np.inf)
            for value in (nearest, np.nextafter(nearest, toward)):
                trial = {**chosen, k: mp.mpf(float(value))}
                key = tuple(trial.values())
                if key not in scored:
                    scored[key] = (*remez(problem, trial)[::-1], trial)
        ranked = sorted(scored.values(), key=lambda item: item[0])[:beam]
        candidates = [(coefficients, chosen) for _, coefficients, chosen in ranked]
    return [float(candidates[0][1][k]) for k in powers]


def _interval(upper: mp.mpf) -> list[mp.mpf]:
    """Points of [0, upper], denser toward both ends as Chebyshev's points are."""
    return [upper * (1 - mp.cospi(mp.mpf(i) / (GRID - 1))) / 2 for i in range(GRID)]


def _value_at(a: mp.mpf, b: int, degree: int) -> tuple[list[mp.mpf], mp.mpf]:
    """The linear condition that a polynomial has the value b at a."""
    return [a**k for k in range(degree + 1)], mp.mpf(b)


# --- What is approximated ----------------------------------------------------------------------


def exp2_problem(degree: int) -> Problem:
    """2^f on [0, 1] with p(0) = 1 and p(1) = 2."""
    x = _interval(mp.mpf(1))
    end = _value_at(mp.mpf(1), 2, degree)
    return Problem(x, [mp.mpf(2) ** v for v in x], degree, {0: mp.mpf(1)}, end)


def exp_problem(degree: int) -> Problem:
    """e^r on [0, ln 2] with P(0) = 1 and P(ln 2) = 2."""
    x = _interval(mp.ln2)
    end = _value_at(+mp.ln2, 2, degree)
    return Problem(x, [mp.exp(v) for v in x], degree, {0: mp.mpf(1)}, end)


def expm1_problem(degree: int) -> Problem:
    """(2^f - 1)/f on [0, 1] with q(1) = 1; the limit at 0 is ln 2."""
    x = _interval(mp.mpf(1))
    target = [mp.expm1(v * mp.ln2) / v if v else +mp.ln2 for v in x]
    return Problem(x, target, degree, {}, _value_at(mp.mpf(1), 1, degree))


def expm1_centered_problem(degree: int) -> Problem:
    """(2^f - 1)/f on [-1/2, 1/2], where 1 + f q(f) doubles from one end to the other.

    So 2^n (1 + f q(f)) is continuous where n = round(t) steps. The condition
    1 + q(1/2)/2 = 2 (1 - q(-1/2)/2) is q(1/2)/2 + q(-1/2) = 1.
    """
    half = mp.mpf(1) / 2
    x = [v - half for i, v in enumerate(_interval(mp.mpf(1))) if i != (GRID - 1) // 2]
    target = [mp.expm1(v * mp.ln2) / v for v in x]
    weights = [half**k / 2 + (-half) ** k for k in range(degree + 1)]
    return Problem(x, target, degree, {}, (weights, mp.mpf(1)))


def log1p_problem(degree: int) -> Problem:
    """log(1 + e)/e on [0, 1]; the limit at 0 is 1."""
    x = _interval(mp.mpf(1))
    return Problem(x, [mp.log1p(v) / v if v else mp.mpf(1) for v in x], degree)


def upper_tail(z: mp.mpf) -> mp.mpf:
    """Q(z), the probability that a standard normal variable exceeds z."""
    return mp.erfc(z / mp.sqrt(2)) / 2


def mills(z: mp.mpf) -> mp.mpf:
    """M(z) = exp(z^2/2) Q(z), Q the upper tail of the standard normal.

    This is Mills' ratio divided by sqrt(2 pi); gelu(x) = max(x, 0) - z exp(-z^2/2) M(z), z = |x|.
    """
    return mp.exp(z * z / 2) * upper_tail(z)


@functools.cache
def _mills_table() -> tuple[list[mp.mpf], list[mp.mpf]]:
    # Chebyshev's points in 1/(1 + 0.3 z), near the best variable, serve for every p.
    scale = mp.mpf("0.3")
    lowest = 1 / (1 + scale * GELU_Z_MAX)
    u = [lowest + v for v in _interval(1 - lowest)]
    z = [(1 / v - 1) / scale for v in u]
    return z, [mills(v) for v in z]


def gelu_problem(degree: int, p: float) -> Problem:
    """M(z) on [0, GELU_Z_MAX] as a polynomial in u = 1/(1 + p z)."""
    z, target = _mills_table()
    return Problem([1 / (1 + mp.mpf(p) * v) for v in z], target, degree)


@functools.cache
def gelu_variable(degree: int) -> float:
    """The p for which the polynomial of that degree has the smallest error."""

    @functools.cache
    def error(multiple: int) -> float:
        return remez(gelu_problem(degree, multiple * GELU_P_STEP))[1]

    # The error has several local minima in p, so scan before refining.
    step = 16
    best = min(range(48, 257, step), key=error)
    while step > 1:
        step //= 2
        best = min((best - step, best, best + step), key=error)
    return best * GELU_P_STEP


def derive_gelu(order: int) -> tuple[float, list[float]]:
    """(p, coefficients m0..mk) of the lowest degree within the share of the error of exp."""
    for degree in range(1, 12):
        p = gelu_variable(degree)
        problem = gelu_problem(degree, p)
        if remez(problem)[1] > GELU_ERROR_SHARE * EXP_MAX_REL_ERROR[order]:
            continue
        coefficients = round_to_float32(problem)
        worst = float(np.max(np.abs(problem.relative_error(coefficients))))
        if worst <= GELU_ERROR_SHARE * EXP_MAX_REL_ERROR[order]:
            return p, coefficients
    raise ArithmeticError(f"no polynomial of degree below 12 serves order {order}")


def derive_log1p(order: int) -> list[float]:
    """Coefficients of the lowest degree within LOG1P_POLY_BOUND."""
    for degree in range(1, 12):
        problem = log1p_problem(degree)
        if remez(problem)[1] > LOG1P_POLY_BOUND[order]:
            continue
        coefficients = round_to_float32(problem)
        worst = float(np.max(np.abs(problem.relative_error(coefficients))))
        if worst <= LOG1P_POLY_BOUND[order]:
            return coefficients
    raise ArithmeticError(f"no polynomial of degree below 12 serves order {order}")


# --- Piecewise polynomials, for machines that look coefficients up in registers -------------------


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A function on [0, upper] in 32 segments, each with a polynomial of its own.

    The bits of the float y = scale z + offset above the lowest `shift` say the segment: 32 equal
    parts of an octave of y (shift 18), or 8 of each of four octaves (shift 20). The lowest five of
    those bits are the row of its coefficients.

    Attributes:
      name: of the C++ tables.
      function: what is approximated, in the relative sense.
      upper, scale, offset, shift: see above.
      degree: of the polynomials, by order.
      local: orders whose polynomials take z less the beginning of the segment: terms would cancel.
      odd: the first segment has no constant term: relative accuracy at 0.
      limit: value of the last segment, or None.
    """

    name: str
    function: Callable[[mp.mpf], mp.mpf]
    upper: float
    scale: float
    offset: float
    shift: int
    degree: Mapping[int, int]
    local: frozenset[int] = frozenset()
    odd: bool = False
    limit: float | None = None

    def row(self, z: np.ndarray) -> np.ndarray:
        """The rows of float32 arguments."""
        y = np.float32(z.astype(np.float64) * self.scale + self.offset)
        return (y.view(np.int32) >> self.shift) & (SEGMENTS - 1)

    def segments(self) -> list[tuple[int, float, float]]:
        """All segments as (row, begin, end)."""
        first = int(np.float32(self.offset).view(np.int32)) >> self.shift
        y = np.arange(first, first + SEGMENTS + 1, dtype=np.int32) << self.shift
        z = (y.view(np.float32).astype(np.float64) - self.offset) / self.scale
        rows = (np.arange(first, first + SEGMENTS)) % SEGMENTS
        return [(int(r), float(a), float(b)) for r, a, b in zip(rows, z[:-1], z[1:], strict=True)]

    def start(self) -> list[float]:
        """Where each segment begins, by row, rounded down so that no difference is negative."""
        start = [0.0] * SEGMENTS
        for row, begin, _ in self.segments():
            near = np.float32(begin)
            start[row] = float(near if near <= begin else np.nextafter(near, np.float32(0)))
        return start

    def derive(self, order: int) -> list[list[float]]:
        """Coefficients as [power][row], rounded one by one and the others solved for again."""
        degree, start = self.degree[order], self.start()
        table = [[0.0] * SEGMENTS for _ in range(degree + 1)]
        for row, begin, end in self.segments():
            if self.limit is not None and end > self.upper:
                table[0][row] = self.limit
                continue
            step = (mp.mpf(end) - begin) / (SEGMENT_GRID - 1)
            z = [begin + step * i for i in range(0 if begin else 1, SEGMENT_GRID)]
            x = [v - start[row] for v in z] if order in self.local else z
            fixed = {0: mp.mpf(0)} if self.odd and not begin else {}
            problem = Problem(x, [self.function(v) for v in z], degree, fixed)
            for k in range(len(fixed), degree + 1):
                fixed[k] = mp.mpf(float32(remez(problem, fixed)[0][k]))
            for k, c in fixed.items():
                table[k][row] = float(c)
        return table

    def evaluate(self, table, order: int, z: np.ndarray, rounded: bool) -> np.ndarray:
        """The function at float32 z; `rounded`: by fused multiply-adds in float32."""
        row, x = self.row(z), z.astype(np.float64)
        if order in self.local:
            x = x - np.array(self.start())[row]
        value = np.zeros_like(x)
        for c in reversed(table):
            value = value * x + np.array(c)[row]
            if rounded:
                value = np.float32(value).astype(np.float64)
        return value


PIECEWISE = (
    Piecewise(
        "Tanh", mp.tanh, 9.125, 13 / 16, 0.5, 20, {1: 1, 2: 2, 3: 3, 4: 4, 5: 4},
        local=frozenset({5}), odd=True, limit=1.0,
    ),
    Piecewise(
        "LogTail", lambda z: mp.log(upper_tail(z), 2), 14.0, 17 / 32, 0.5, 20, {3: 2},
    ),
)  # fmt: skip


# --- Order 1: the bit trick --------------------------------------------------------------------


def derive_order1_c() -> int:
    """C that makes the largest relative error of the order-1 exponential smallest.

    With s = C / 2^23 and phi = frac(t - s), result / 2^t = 2^-s (1 + phi) 2^-phi. The factor
    (1 + phi) 2^-phi is 1 at the ends and peak = 2 / (e ln 2) at phi = 1/ln 2 - 1; the errors
    balance, 1 - 2^-s = 2^-s peak - 1, at 2^s = (1 + peak) / 2.
    """
    peak = 2 / (mp.e * mp.ln2)
    return int(mp.nint(mp.log((1 + peak) / 2, 2) * MANTISSA_SCALE))


def order1_exp2(t: np.ndarray, c: float) -> np.ndarray:
    """2^t by the bit trick without its integer rounding, float64."""
    shifted = t - c / MANTISSA_SCALE
    whole = np.floor(shifted)
    return np.ldexp(1 + (shifted - whole), whole.astype(np.int64))


@functools.cache
def _softmax_sample() -> tuple[np.ndarray, np.ndarray]:
    # RandomState's streams are frozen (NEP 19); those of Generator may change.
    rng = np.random.RandomState(20241200)
    logits = SOFTMAX_SIGMA * rng.standard_normal((SOFTMAX_ROWS, SOFTMAX_WIDTH))
    t = (logits - logits.max(axis=1, keepdims=True)) / math.log(2)
    exact = np.exp2(t)
    return t, exact / exact.sum(axis=1, keepdims=True)


def softmax_total_variation(c: float) -> float:
    """Mean total variation between order-1 softmax rows with that C and the exact ones."""
    t, exact = _softmax_sample()
    e = order1_exp2(t, c)
    return float(np.mean(np.abs(e / e.sum(axis=1, keepdims=True) - exact).sum(axis=1)) / 2)


def derive_softmax_c() -> int:
    """C that makes the mean total variation of order-1 softmax rows smallest.

    A scan of one period of the saw-tooth finds the basin; a parabola through samples around its
    minimum smooths the kinks that single logits leave in the objective.
    """
    coarse = np.arange(16) * (MANTISSA_SCALE // 16)
    centre = int(coarse[np.argmin([softmax_total_variation(c) for c in coarse])])
    for half_width in (MANTISSA_SCALE // 16, MANTISSA_SCALE // 64):
        offsets = np.linspace(-1, 1, 9)
        values = [softmax_total_variation(centre + half_width * o) for o in offsets]
        quadratic, linear, _ = np.polyfit(offsets, values, 2)
        centre += int(half_width * np.clip(-linear / (2 * quadratic), -1, 1))
    return round(centre / SOFTMAX_C_STEP) * SOFTMAX_C_STEP


# --- All of them -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Constants:
    """Every generated constant; floats are exactly representable as float32."""

    order1_c: int
    softmax_c: int
    exp2_poly: dict[int, list[float]]
    exp_poly: dict[int, list[float]]
    expm1_poly: dict[int, list[float]]
    expm1_centered: dict[int, list[float]]
    log1p: dict[int, list[float]]
    gelu_p: dict[int, float]
    gelu_m: dict[int, list[float]]
    piecewise: dict[str, dict[int, list[list[float]]]]  # by name and order, as [power][row]
    ln2_hi: float
    ln2_lo: float
    log2e: float

    @property
    def order1_shift(self) -> float:
        return float32(self.order1_c / MANTISSA_SCALE)

    @property
    def softmax_shift(self) -> float:
        return float32(self.softmax_c / MANTISSA_SCALE)


def derive() -> Constants:
    """Derives all constants (a few seconds)."""
    with mp.workdps(DIGITS):
        orders = tuple(EXP_MAX_REL_ERROR)
        gelu = {order: derive_gelu(order) for order in orders}
        # Nine bits for the high part of ln 2: products with the 8-bit exponent n are exact.
        ln2_hi = mp.nint(mp.ln2 * 512) / 512
        return Constants(
            order1_c=derive_order1_c(),
            softmax_c=derive_softmax_c(),
            exp2_poly={d: round_to_float32(exp2_problem(d)) for d in (2, 3)},
            exp_poly={d: round_to_float32(exp_problem(d)) for d in (4, 5)},
            expm1_poly={d: round_to_float32(expm1_problem(d)) for d in orders},
            expm1_centered={d: round_to_float32(expm1_centered_problem(d)) for d in orders},
            log1p={order: derive_log1p(order) for order in orders},
            gelu_p={order: p for order, (p, _) in gelu.items()},
            gelu_m={order: m for order, (_, m) in gelu.items()},
            piecewise={p.name: {o: p.derive(o) for o in p.degree} for p in PIECEWISE},
            ln2_hi=float32(ln2_hi),
            ln2_lo=float32(mp.ln2 - ln2_hi),
            log2e=float32(1 / mp.ln2),
        )


# --- Errors ------------------------------------------------------------------------------------


def horner_f32(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Polynomial (lowest power first) by fused multiply-adds in float32.

    A product of two float32 is exact in float64, so rounding the float64 sum to float32 is an FMA
    up to a double rounding that is too rare to matter.
    """
    x = x.astype(np.float64)
    value = np.full(x.shape, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = np.float32(value * x + c).astype(np.float64)
    return value.astype(np.float32)


def gelu_u_f32(p: float, z: np.ndarray) -> np.ndarray:
    """u = 1/(1 + p z) in float32: one FMA and one correctly rounded division."""
    denominator = np.float32(p * z.astype(np.float64) + 1)
    return np.float32(1) / denominator


@dataclasses.dataclass(frozen=True)
class Report:
    """One approximation: its degree and its largest relative error."""

    name: str
    order: int
    degree: int
    polynomial: float  # exact arithmetic, rounded coefficients
    float32: float  # evaluated in float32
    bound: float  # what `polynomial` has to meet


# Bounds on the polynomial alone. Order 3 leaves room for the rounding of x log2(e), up to 4e-6;
# order 5 for that of the arithmetic, which is more than half of its 2.5e-7.
EXP_POLY_BOUND = {**EXP_MAX_REL_ERROR, 3: 1.04e-4, 5: 9.3e-8}
EXPM1_POLY_BOUND = {**EXP_MAX_REL_ERROR, 5: 5e-8}


def _measure(
    coefficients: Sequence[float],
    x: np.ndarray,
    truth: Callable[[np.ndarray], np.ndarray],
) -> tuple[float, float]:
    exact = truth(x.astype(np.float64))
    polynomial = np.polynomial.polynomial.polyval(x.astype(np.float64), coefficients)
    rounded = horner_f32(coefficients, x).astype(np.float64)
    return tuple(float(np.max(np.abs(v / exact - 1))) for v in (polynomial, rounded))


def measure(constants: Constants, points: int = 200_001) -> list[Report]:
    """Measures every approximation on an even grid of float32 arguments."""
    unit = np.linspace(0, 1, points, dtype=np.float32)
    reports = []
    worst = order1_error(constants)
    reports.append(Report("exp (bit trick)", 1, 1, worst, worst, EXP_POLY_BOUND[1]))
    for d, c in constants.exp2_poly.items():
        errors = _measure([1.0, *c], unit, np.exp2)
        reports.append(Report("2^f", d, d, *errors, EXP_POLY_BOUND[d]))
    for d, c in constants.exp_poly.items():
        errors = _measure([1.0, *c], np.float32(math.log(2)) * unit, np.exp)
        reports.append(Report("e^r", d, d, *errors, EXP_POLY_BOUND[d]))
    for d, c in constants.expm1_poly.items():
        errors = _measure(c, unit[1:], lambda f: np.expm1(f * math.log(2)) / f)
        reports.append(Report("(2^f - 1)/f", d, d, *errors, EXPM1_POLY_BOUND[d]))
    centered = unit[unit != 0.5] - np.float32(0.5)
    for d, c in constants.expm1_centered.items():
        errors = _measure(c, centered, lambda f: np.expm1(f * math.log(2)) / f)
        reports.append(Report("the same, centered", d, d, *errors, EXPM1_POLY_BOUND[d]))
    for order, c in constants.log1p.items():
        errors = _measure(c, unit[1:], lambda e: np.log1p(e) / e)
        reports.append(Report("log(1 + e)/e", order, len(c) - 1, *errors, LOG1P_POLY_BOUND[order]))
    with mp.workdps(DIGITS):
        z = np.linspace(0, GELU_Z_MAX, 4001, dtype=np.float32)
        exact = np.array([float(mills(mp.mpf(float(v)))) for v in z])
    for order, c in constants.gelu_m.items():
        p = constants.gelu_p[order]
        polynomial = np.polynomial.polynomial.polyval(1 / (1 + p * z.astype(np.float64)), c)
        rounded = horner_f32(c, gelu_u_f32(p, z)).astype(np.float64)
        errors = [float(np.max(np.abs(v / exact - 1))) for v in (polynomial, rounded)]
        bound = GELU_ERROR_SHARE * EXP_MAX_REL_ERROR[order]
        reports.append(Report("M(z)", order, len(c) - 1, *errors, bound))
    for piecewise in PIECEWISE:
        z = np.linspace(0, piecewise.upper, 8001, dtype=np.float32)[1:]
        exact = _piecewise_exact(piecewise.name)
        for order, table in constants.piecewise[piecewise.name].items():
            values = (piecewise.evaluate(table, order, z, rounded) for rounded in (False, True))
            if piecewise.name == "LogTail":  # what counts is the error of the power
                name, bound = "Q(z), piecewise", GELU_ERROR_SHARE * EXP_MAX_REL_ERROR[order]
                errors = [float(np.max(np.abs(np.exp2(v - exact) - 1))) for v in values]
            else:
                name, bound = "tanh, piecewise", EXP_POLY_BOUND[order]
                errors = [float(np.max(np.abs(v / exact - 1))) for v in values]
            reports.append(Report(name, order, piecewise.degree[order], *errors, bound))
    return reports


@functools.cache
def _piecewise_exact(name: str) -> np.ndarray:
    piecewise = next(p for p in PIECEWISE if p.name == name)
    z = np.linspace(0, piecewise.upper, 8001, dtype=np.float32)[1:]
    with mp.workdps(DIGITS):
        return np.array([float(piecewise.function(mp.mpf(float(v)))) for v in z])


# --- Error bounds -------------------------------------------------------------------------------

ULP = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)
LOG2E_ERROR = abs(float32(1 / math.log(2)) * math.log(2) - 1)  # relative, of the float32 constant

# Forms that multiply an exponential by x reach exponents of -134 before the result is below 2^-126.
DEEPEST = 134 * math.log(2)

# A row's sum is formed in blocks. In a row of LONGEST_ROW elements none passes through more than
# SUM_DEPTH additions: 67 in its block, one for each 1024 elements, 4 to join the lanes.
SUM_DEPTH = 80
LONGEST_ROW = 8192

QUICK_GELU_SCALE = 1.702


def half_ulp(value: np.ndarray) -> np.ndarray:
    """The largest error of rounding to `value` in float32."""
    _, exponent = np.frexp(value)
    return np.where(value == 0, 0.0, np.ldexp(ULP, exponent - 1))


def horner_rounding(coefficients: Sequence[float], x: np.ndarray) -> np.ndarray:
    """Bound of the rounding error of Horner's rule in float32 at each x, to first order.

    Every product and every sum is rounded, as on machines without FMA; with FMA it is less.
    """
    value, error = np.full_like(x, coefficients[-1]), np.zeros_like(x)
    for c in reversed(coefficients[:-1]):
        product = value * x
        value = product + c
        error = error * np.abs(x) + half_ulp(product) + half_ulp(value)
    return error


def expm1_error(constants: Constants, order: int) -> tuple[float, float]:
    """Bounds of the relative error of E = 2^n g + (2^n - 1), g = f q(f), for x < 0 and for all x.

    Where n is 0, E is g. Elsewhere the error of 2^n g counts against |E|, which makes it at most
    sqrt(2) times as large, at n = 1 and f = -1/2. To it come the rounding of the argument (of t for
    orders 1 to 3; of r and of r log2(e) for orders 4 and 5, where n LN2_HI is exact), of 2^n - 1,
    exact while |n| <= 24, and of two sums: half of 2^n - 1 is added at a time, lest 2^128 overflow.
    """
    f = np.linspace(-0.5, 0.5, 2001)
    f = f[f != 0]
    g = np.expm1(f * math.log(2))
    c = constants.expm1_centered[order]
    q_error = np.abs(np.polynomial.polynomial.polyval(f, c) - g / f) + horner_rounding(c, f)
    g_error = np.abs(f) * q_error + ULP * np.abs(g)
    worst = {True: 0.0, False: 0.0}
    for n in range(-30, 129):
        power = 2.0**n
        exact = power * g + (power - 1)
        if order <= 3:
            argument = np.abs(n + f) * math.log(2) * (ULP + LOG2E_ERROR)
        else:
            r = f * math.log(2)
            argument = np.abs(r) * (ULP + LOG2E_ERROR) + 2 * abs(n * constants.ln2_lo) * ULP
            argument += half_ulp(r) if n else 0.0
        error = power * g_error + power * (1 + g) * argument
        if n:
            error += 2 * ULP * np.abs(exact)
        if abs(n) > 24:
            error += ULP * abs(power - 1)
        for negative in worst:
            side = (exact < 0) == negative
            relative = float(np.max(error[side] / np.abs(exact[side]), initial=0.0))
            worst[negative] = max(worst[negative], relative)
    return worst[True], max(worst.values())


@dataclasses.dataclass(frozen=True)
class Parts:
    """Relative errors of what the functions are built from, by order."""

    polynomial: dict[int, float]  # of 2^f or e^r; order 1: of the bit trick
    exponential: dict[int, float]  # the same with Horner's rule in float32, argument apart
    log1p: dict[int, float]  # e P(e), arithmetic included
    reports: dict[tuple[str, int], float]  # of polynomials by name
    log_tail: dict[int, float]  # of Q(z) by a piecewise logarithm, arithmetic included


def _parts(constants: Constants) -> Parts:
    measured = measure(constants)
    reports = {(r.name, r.order): r.polynomial for r in measured}
    [log_tail] = (r.float32 for r in measured if r.name == "Q(z), piecewise")
    polynomial = {1: order1_error(constants)}
    for name in ("2^f", "e^r"):
        polynomial |= {order: e for (n, order), e in reports.items() if n == name}
    unit = np.linspace(0, 1, 20_001)

    def with_rounding(order: int) -> float:
        if order == 1:
            # 127 - shift rounds by 2^-18 at most, and so does t where the two are added.
            return polynomial[1] + 2.0**-18 + 2.0**-17
        in_nats = order >= 4
        x = unit * math.log(2) if in_nats else unit
        c = [1.0, *(constants.exp_poly if in_nats else constants.exp2_poly)[order]]
        rounding = horner_rounding(c, x) / (np.exp(x) if in_nats else np.exp2(x))
        # The reduced argument is rounded too, by half a ULP, and in nats its low part.
        return polynomial[order] + float(np.max(rounding)) + ULP

    def log1p(order: int) -> float:
        e, c = unit[1:], constants.log1p[order]
        rounding = horner_rounding(c, e) * e / np.log1p(e)
        return reports["log(1 + e)/e", order] + float(np.max(rounding)) + ULP

    return Parts(
        polynomial,
        {order: with_rounding(order) for order in EXP_MAX_REL_ERROR},
        {order: log1p(order) for order in EXP_MAX_REL_ERROR},
        reports,
        {2: log_tail, 3: log_tail},
    )


def error_bounds(constants: Constants) -> dict[str, dict[int, float]]:
    """Bounds of the relative error of every function over all float32 inputs, for each order.

    They hold where the exact result is normal and finite, up to 2^-126 in absolute terms (results
    below that are flushed; in selu up to 2^-125, as it multiplies what may have been flushed). p is
    the polynomial's error, m that of M(z); the rest is rounding. The exponent t of a result down to
    2^-126 is below 128; forms that multiply by x reach 134.

    - exp: the promise of the library.
    - sigmoid = 1/(1 + e): an error ε of e becomes at most ε/(1 - ε).
    - silu, gelu_tanh = max(x, 0) - z e/(1 + e): at most the error of e.
    - gelu_erf = max(x, 0) - z e M: at most that of e M. Orders 2 and 3 may have 2^(log2 Q) instead,
      with the error of log2 Q as evaluated.
    - tanh = E/(E + 2): at most that of E; or piecewise.
    - softmax: the quotient of two exponentials of rounded differences of up to 2^7 ln 2 (order 1:
      2^t is off by a factor from [c, 1.0615 c], and c cancels).
    - exp2: the argument is not multiplied (or, in nats, only its fraction is), so that no rounding
      of an exponent counts; order 1 adds its 127.
    - expm1: see expm1_error(); elu is that of x < 0, and selu has two constants and two products.
    - softplus, log_sigmoid = ±(max(±x, 0) + log(1 + e)), e <= 1 at every order: log(1 + e) is
      concave in e and 0 at 0, so that a factor of e in [1 - ε, 1 + ε] changes it by no more; the
      sum of two terms of one sign has at most the larger error.
    - mish = x w (w + 2)/(w^2 + 2 w + 2), w = e^x, for x < 0: the derivative of the logarithm by
      log w is in [0, 1], so at most the error of w, which goes down to where x w underflows. For
      x >= 0, x (1 + 2 w)/(1 + 2 w + 2 w^2), w = e^-x, it is in [-0.54, 0].
    - quick_gelu: as silu; 1.702 x is rounded, and 1.702 itself, also in nats.
    """
    parts = _parts(constants)
    polynomial, reports = parts.polynomial, parts.reports
    bounds: dict[str, dict[int, float]] = {"exp": dict(EXP_MAX_REL_ERROR)}

    def add(function: str, value: Callable[[int], float]) -> None:
        bounds[function] = {order: value(order) for order in EXP_MAX_REL_ERROR}

    # Rounding of an exponent of up to 134 powers of two: in t, once and by the error of log2(e); in
    # nats, not at all (a low part carries it).
    def argument(order: int, roundings: float) -> float:
        # Order 1 adds its 127 and rounds to 2^7 units of 2^-23.
        trick = 2.0**-17 if order == 1 else 0.0
        return trick + roundings * DEEPEST * (ULP + LOG2E_ERROR if order <= 3 else 0.0)

    add("sigmoid", lambda o: EXP_MAX_REL_ERROR[o] / (1 - EXP_MAX_REL_ERROR[o]) + 4 * ULP)
    add("silu", lambda o: polynomial[o] + argument(o, 1) + 8 * ULP)
    # x (a + b x^2) is rounded three times, also in nats.
    cubic = 3 * DEEPEST * ULP
    add("gelu_tanh", lambda o: polynomial[o] + argument(o, 1) + cubic + 8 * ULP)

    def gelu_erf(order: int) -> float:
        by_mills = (1 + reports["M(z)", order]) * (1 + polynomial[order]) - 1 + argument(order, 2)
        by_log = parts.log_tail.get(order, 0.0) + polynomial[order]
        return max(by_mills, by_log) + 10 * ULP

    add("gelu_erf", gelu_erf)
    # Piecewise, only the last roundings count: the slope's term is small beside the first one.
    add(
        "tanh",
        lambda o: max(reports["(2^f - 1)/f", o] + 6 * ULP, reports["tanh, piecewise", o] + 3 * ULP),
    )
    difference = 128 * math.log(2) * ULP
    add(
        "softmax",
        lambda o: (
            (
                (1 + polynomial[1]) / (1 - polynomial[1]) - 1 + 2 * argument(1, 1)
                if o == 1
                else 2 * EXP_MAX_REL_ERROR[o] / (1 - EXP_MAX_REL_ERROR[o])
            )
            + difference
            + 8 * ULP
        ),
    )
    add("exp2", lambda o: parts.exponential[o])
    expm1 = {order: expm1_error(constants, order) for order in EXP_MAX_REL_ERROR}
    add("expm1", lambda o: expm1[o][1])
    add("elu", lambda o: expm1[o][0])
    add("selu", lambda o: (1 + expm1[o][0]) * (1 + 4 * ULP) - 1)
    for function in ("softplus", "log_sigmoid"):
        add(function, lambda o: (1 + EXP_MAX_REL_ERROR[o]) * (1 + parts.log1p[o]) - 1 + ULP)
    # Seven operations and a reciprocal that may be off by two.
    add("mish", lambda o: parts.exponential[o] + argument(o, 1) + 9 * ULP)
    scaled = DEEPEST * (ULP + abs(float32(QUICK_GELU_SCALE) / QUICK_GELU_SCALE - 1))
    add("quick_gelu", lambda o: parts.exponential[o] + argument(o, 1) + scaled + 6 * ULP)
    return {f: {o: round_up(b) for o, b in row.items()} for f, row in bounds.items()}


def absolute_error_bounds(constants: Constants) -> dict[str, dict[int, float]]:
    """Bounds of the absolute error of the functions that are logarithms, for each order.

    |error| <= bound + 2^-22 s, where s is |result| or, in log_softmax, |x - max|. The second term
    is the rounding of x - max and of the result.

    - logsumexp = max + log(sum), log_softmax = (x - max) - log(sum): a relative error ε of the sum
      becomes one of at most -log(1 - ε). The sum has the error of its exponentials, that of exp at
      every order (a common factor of them does not cancel here, so order 1 takes the shift of exp
      and not that of softmax), and that of SUM_DEPTH additions. The rounding of a difference d from
      the maximum, ULP |d|, enters with d's weight in the softmax: the mean of |d| is the entropy of
      the weights less log(sum), so at most log(LONGEST_ROW). So is log(sum), of which up to three
      ULP count: log itself may be off by one unit in the last place, and the result by ULP log(sum)
      more than s tells.
    - logaddexp = max + log(1 + e): an error ε of e <= 1 becomes -log(1 - ε/2) at most; that of
      log(1 + e) counts with its value, up to ln 2; the rounding of d = |a - b| adds at most
      ULP d/(1 + e^d) < 0.3 ULP.
    """
    parts = _parts(constants)
    log_length = math.log(LONGEST_ROW)
    bounds: dict[str, dict[int, float]] = {}
    for order, exp_error in EXP_MAX_REL_ERROR.items():
        of_sum = exp_error + (SUM_DEPTH + log_length) * ULP
        logarithm = -math.log1p(-of_sum) + 3 * log_length * ULP
        for function in ("log_softmax", "logsumexp"):
            bounds.setdefault(function, {})[order] = logarithm
        of_pair = -math.log1p(-exp_error / 2) + math.log(2) * parts.log1p[order] + 0.3 * ULP
        bounds.setdefault("logaddexp", {})[order] = of_pair
    return {f: {o: round_up(b) for o, b in row.items()} for f, row in bounds.items()}


def order1_error(constants: Constants) -> float:
    """Largest relative error of the order-1 exponential in exact arithmetic."""
    t = np.linspace(0, 1, 200_001)
    return float(np.max(np.abs(order1_exp2(t, constants.order1_c) / np.exp2(t) - 1)))


def round_up(value: float) -> float:
    """The next number above `value` with three significant digits."""
    exponent = math.floor(math.log10(value)) - 2
    return float(f"{math.ceil(value / 10.0**exponent * (1 - 1e-12))}e{exponent}")


# --- Generated files ---------------------------------------------------------------------------

_COMMAND = "python tools/derive_constants.py"


def hex_float(value: float) -> str:
    """The shortest C++ hexadecimal literal of a float32."""
    mantissa, exponent = float(value).hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}f"


def render_cpp(c: Constants) -> str:
    """The text of cpu_kernels/core/constants.h."""
    lines = [
        f"// Generated by `{_COMMAND}`; do not edit. That script derives each number",
        "// and a test derives it again. quake_jax/_core/constants.py holds the same numbers.",
        "#ifndef QUAKE_CORE_CONSTANTS_H_",
        "#define QUAKE_CORE_CONSTANTS_H_",
        "",
        "// clang-format off",
        "namespace quake::constants {",
        "",
    ]

    def scalar(name: str, value: float, comment: str) -> None:
        lines.append(f"// {comment}")
        lines.append(f"constexpr float {name} = {hex_float(value)};  // {value:.9g}")
        lines.append("")

    def array(name: str, values: Sequence[float], indent: str = "    ") -> None:
        lines.append(f"constexpr float {name}[] = {{")
        lines.extend(f"{indent}{hex_float(v)},  // {v:.9g}" for v in values)
        lines.append("};")

    scalar("kLog2e", c.log2e, "log2(e).")
    lines.append("// ln 2 = kLn2Hi + kLn2Lo; n * kLn2Hi is exact for every float32 exponent n.")
    for name, value in (("kLn2Hi", c.ln2_hi), ("kLn2Lo", c.ln2_lo)):
        lines.append(f"constexpr float {name} = {hex_float(value)};  // {value:.9g}")
    lines.append("")
    scalar(
        "kOrder1Shift",
        c.order1_shift,
        f"Order 1: 2^t ~ float with bits (t + 127 - shift) * 2^23; {c.order1_c} / 2^23, minimax.",
    )
    scalar(
        "kSoftmaxShift",
        c.softmax_shift,
        f"The same in softmax, smallest mean total variation: {c.softmax_c} / 2^23.",
    )
    lines.append("// 2^f ~ 1 + c1 f + ... + cd f^d on [0, 1], 1 and 2 at the ends; c1 first.")
    for d, v in c.exp2_poly.items():
        array(f"kExp2Poly{d}", v)
    lines.append("")
    lines.append("// e^r ~ 1 + c1 r + ... + cd r^d on [0, ln 2], 1 and 2 at the ends; c1 first.")
    for d, v in c.exp_poly.items():
        array(f"kExpPoly{d}", v)
    lines.append("")
    lines.append("// 2^f - 1 ~ f (q0 + q1 f + ... + qd f^d) on [0, 1], q(1) = 1, d = order.")
    for d, v in c.expm1_poly.items():
        array(f"kExpm1Poly{d}", v)
    lines += [
        "",
        "// The same on [-1/2, 1/2], where 1 + f q(f) doubles from end to end, d = order.",
    ]
    for d, v in c.expm1_centered.items():
        array(f"kExpm1Centered{d}", v)
    lines += ["", "// log(1 + e) ~ e (l0 + l1 e + ... + lk e^k) on [0, 1]; l0 first."]
    for order, v in c.log1p.items():
        array(f"kLog1p{order}", v)
    lines += [
        "",
        f"// exp(z^2/2) Q(z) ~ m0 + m1 u + ... + mk u^k, u = 1/(1 + p z), 0 <= z <= {GELU_Z_MAX},",
        "// Q the upper tail of the standard normal; m0 first. kGeluP is indexed by order.",
        "constexpr float kGeluP[] = {",
        "    0.0f,",
    ]
    lines.extend(f"    {hex_float(p)},  // {p:.9g}" for p in c.gelu_p.values())
    lines.append("};")
    for order, v in c.gelu_m.items():
        array(f"kGeluM{order}", v)
    lines += [
        "",
        "}  // namespace quake::constants",
        "// clang-format on",
        "",
        "#endif  // QUAKE_CORE_CONSTANTS_H_",
    ]
    return "\n".join(lines) + "\n"


def render_cpp_segments(c: Constants) -> str:
    """The text of cpu_kernels/core/segments.h."""
    lines = [
        f"// Generated by `{_COMMAND}`; do not edit. Polynomials c0 + c1 x + ... in 32 segments,",
        "// as c[power][row]. The row is the lowest five bits of the float y = kScale z + kOffset",
        "// shifted right by kShift; x is z, if kLocal less kStart[row].",
        "#ifndef QUAKE_CORE_SEGMENTS_H_",
        "#define QUAKE_CORE_SEGMENTS_H_",
        "",
        "// clang-format off",
        "namespace quake::constants {",
    ]

    def rows(values: Sequence[float], indent: str) -> list[str]:
        words = [hex_float(v) + "," for v in values]
        return [indent + " ".join(words[i : i + 4]) for i in range(0, len(words), 4)]

    for p in PIECEWISE:
        lines += [
            "",
            "template <int Order>",
            f"struct {p.name}Segments;",
        ]
        for order, table in c.piecewise[p.name].items():
            lines += [
                "template <>",
                f"struct {p.name}Segments<{order}> {{",
                f"  static constexpr float kUpper = {hex_float(p.upper)};",
                f"  static constexpr float kScale = {hex_float(p.scale)};",
                f"  static constexpr float kOffset = {hex_float(p.offset)};",
                f"  static constexpr int kShift = {p.shift};",
                f"  static constexpr bool kLocal = {'true' if order in p.local else 'false'};",
                "  static constexpr float kStart[32] = {",
                *rows(p.start(), "      "),
                "  };",
                f"  static constexpr float c[{len(table)}][32] = {{",
            ]
            for values in table:
                lines += ["      {", *rows(values, "          "), "      },"]
            lines += ["  };", "};"]
    lines += [
        "",
        "}  // namespace quake::constants",
        "// clang-format on",
        "",
        "#endif  // QUAKE_CORE_SEGMENTS_H_",
    ]
    return "\n".join(lines) + "\n"


def render_cpp_bounds(c: Constants) -> str:
    """The text of cpu_kernels/tests/bounds.h."""
    lines = [
        f"// Generated by `{_COMMAND}`; do not edit. error_bounds() and",
        "// absolute_error_bounds() there derive them (index: order - 1) and say what they mean;",
        "// quake_jax/_core/constants.py has them too.",
        "#ifndef QUAKE_TESTS_BOUNDS_H_",
        "#define QUAKE_TESTS_BOUNDS_H_",
        "",
        "namespace quake::bounds {",
        "",
    ]
    absolute = {f"{name}_absolute": row for name, row in absolute_error_bounds(c).items()}
    for name, row in (error_bounds(c) | absolute).items():
        values = ", ".join(f"{v:g}" for v in row.values())
        lines.append(f"constexpr double {name}[] = {{{values}}};")
    lines += ["", "}  // namespace quake::bounds", "", "#endif  // QUAKE_TESTS_BOUNDS_H_"]
    return "\n".join(lines) + "\n"


def render_python(c: Constants) -> str:
    """The text of quake_jax/_core/constants.py."""
    lines = [
        '"""Numerical constants of every approximation, the same as in the C++ kernels.',
        "",
        f"Generated by `{_COMMAND}`, which derives them; do not edit.",
        "Floats are exactly float32; dictionaries are keyed by order.",
        '"""',
        "",
    ]

    def add(comment: str, *assignments: str) -> None:
        lines.append(f"# {comment}")
        lines.extend(assignments)
        lines.append("")

    def table(name: str, polynomials: Mapping[int, Sequence[float]]) -> str:
        rows = [f"{name} = {{"]
        for order, values in polynomials.items():
            rows.append(f"    {order}: [")
            rows.extend(f"        {v!r}," for v in values)
            rows.append("    ],")
        return "\n".join([*rows, "}"])

    def by_order(name: str, values: Mapping[int, float]) -> str:
        return f"{name} = {{" + ", ".join(f"{k}: {v!r}" for k, v in values.items()) + "}"

    add(
        "Largest relative error of exp that the library promises, arithmetic included.",
        by_order("EXP_MAX_REL_ERROR", EXP_MAX_REL_ERROR),
    )
    add(
        "Bounds of the relative error over all float32 inputs, by function and order, where the",
        "# exact result is normal and finite, up to 2^-126 (results below that are flushed).",
        "MAX_REL_ERROR = {",
        *(f'    "{name}": {row!r},' for name, row in error_bounds(c).items()),
        "}",
    )
    add(
        "Absolute error of logarithms, in rows of up to "
        f"{LONGEST_ROW} elements: |error| <= bound + 2^-22 s,",
        "# where s is |result| or, in log_softmax, |x - max|.",
        "MAX_ABS_ERROR = {",
        *(f'    "{name}": {row!r},' for name, row in absolute_error_bounds(c).items()),
        "}",
    )
    add("log2(e).", f"LOG2E = {c.log2e!r}")
    add(
        "ln 2 = LN2_HI + LN2_LO; n * LN2_HI is exact for every float32 exponent n.",
        f"LN2_HI = {c.ln2_hi!r}",
        f"LN2_LO = {c.ln2_lo!r}",
    )
    add(
        "Order 1: 2^t ~ float32 with bits (t + 127 - shift) * 2^23, shift = C / 2^23, minimax.",
        f"ORDER1_C = {c.order1_c}",
        f"ORDER1_SHIFT = {c.order1_shift!r}",
    )
    add(
        "The same in softmax: smallest mean total variation of 128-wide N(0, 2^2) logits.",
        f"SOFTMAX_C = {c.softmax_c}",
        f"SOFTMAX_SHIFT = {c.softmax_shift!r}",
    )
    add(
        "2^f ~ 1 + c1 f + ... + cd f^d on [0, 1], 1 and 2 at the ends; c1 first.",
        table("EXP2_POLY", c.exp2_poly),
    )
    add(
        "e^r ~ 1 + c1 r + ... + cd r^d on [0, ln 2], 1 and 2 at the ends; c1 first.",
        table("EXP_POLY", c.exp_poly),
    )
    add(
        "2^f - 1 ~ f (q0 + q1 f + ... + qd f^d) on [0, 1], q(1) = 1, d = order.",
        table("EXPM1_POLY", c.expm1_poly),
    )
    add(
        "The same on [-1/2, 1/2], where 1 + f q(f) doubles from end to end, d = order.",
        table("EXPM1_CENTERED", c.expm1_centered),
    )
    add(
        "log(1 + e) ~ e (l0 + l1 e + ... + lk e^k) on [0, 1]; l0 first.",
        table("LOG1P", c.log1p),
    )
    lines += [
        f"# exp(z^2/2) Q(z) ~ m0 + m1 u + ... + mk u^k, u = 1/(1 + p z), 0 <= z <= {GELU_Z_MAX},",
        "# Q the upper tail of the standard normal; GELU_P holds p, GELU_M m0 first.",
        by_order("GELU_P", c.gelu_p),
        table("GELU_M", c.gelu_m),
    ]
    return "\n".join(lines) + "\n"


def print_reports(reports: Sequence[Report]) -> None:
    """Prints the errors, as a rich table where rich is installed."""
    head = ("approximation", "order", "degree", "polynomial", "in float32", "bound")
    rows = []
    for r in reports:
        errors = (f"{v:.3g}" for v in (r.polynomial, r.float32, r.bound))
        rows.append((r.name, str(r.order), str(r.degree), *errors))
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for row in (head, *rows):
            print("".join(f"{cell:<17}" for cell in row).rstrip())
        return
    table = Table(*head, title="Largest relative error")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Derive the constants of quake_jax.")
    parser.add_argument(
        "--check", action="store_true", help="only compare with the files; exit 1 if they differ"
    )
    args = parser.parse_args(argv)
    constants = derive()
    print_reports(measure(constants))
    tv = softmax_total_variation(constants.softmax_c)
    print(f"ORDER1_C {constants.order1_c}")
    print(f"SOFTMAX_C {constants.softmax_c}, mean total variation {tv:.4f}")
    status = 0
    files = {
        CPP_PATH: render_cpp,
        CPP_SEGMENTS_PATH: render_cpp_segments,
        CPP_BOUNDS_PATH: render_cpp_bounds,
        PY_PATH: render_python,
    }
    for path, render in files.items():
        name, text = path.relative_to(ROOT), render(constants)
        if not args.check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            print(f"{name} differs from what is derived; run `{_COMMAND}`", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
