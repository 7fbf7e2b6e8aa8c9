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
CPP_PATH = ROOT / "cpu_kernels" / "generic" / "constants.h"
CPP_BOUNDS_PATH = ROOT / "cpu_kernels" / "tests" / "bounds.h"
PY_PATH = ROOT / "quake_jax" / "_constants.py"

DIGITS = 40  # decimal digits of every mpmath computation here
MANTISSA_SCALE = 2**23  # bits of a float32 per power of two

# The promise of the library: largest relative error of exp for each order, arithmetic included.
EXP_MAX_REL_ERROR = {1: 0.0299, 2: 0.0027, 3: 1.08e-4, 4: 3.6e-6, 5: 2.5e-7}

# exp(-z^2/2) is below the smallest normal float32 beyond sqrt(2 * 126 * ln 2) = 13.22.
GELU_Z_MAX = 13.3
# The polynomial in GELU may use this share of the error that exp of the same order has.
GELU_ERROR_SHARE = 0.3
GELU_P_STEP = 1 / 256  # p is searched on this lattice: exact in float32, and robust

SOFTMAX_ROWS, SOFTMAX_WIDTH, SOFTMAX_SIGMA = 8192, 128, 2.0
# The minimum is flat: half a step raises the error by less than 0.1 %, while another sample of
# rows moves the minimum by a tenth of a step.
SOFTMAX_C_STEP = 100_000

GRID = 1201  # points on which the Remez exchange looks for extrema


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
      end: (a, b) requires the polynomial to have the value b at a, or None.
    """

    x: Sequence[mp.mpf]
    target: Sequence[mp.mpf]
    degree: int
    fixed: Mapping[int, mp.mpf] = dataclasses.field(default_factory=dict)
    end: tuple[mp.mpf, mp.mpf] | None = None

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
    """One equation sum_free c_k phi_k = rhs at a point, the last power eliminated by `end`."""
    x, target = problem.x[point], problem.target[point]
    phi = {k: x**k / target for k in (*free, *fixed, problem.degree)}
    rhs = 1 - mp.fsum(c * phi[k] for k, c in fixed.items())
    if problem.end is None:
        return [phi[k] for k in free], rhs
    a, b = problem.end
    rest = (b - mp.fsum(c * a**k for k, c in fixed.items())) / a**problem.degree
    last = phi[problem.degree]
    return [phi[k] - a ** (k - problem.degree) * last for k in free], rhs - rest * last


def _complete(problem: Problem, free, fixed, values) -> list[mp.mpf]:
    """All coefficients, from those given and those solved for (and the one `end` determines)."""
    known = {**fixed, **dict(zip(free, values, strict=True))}
    if problem.end is not None and problem.degree not in known:
        a, b = problem.end
        rest = b - mp.fsum(c * a**k for k, c in known.items())
        known[problem.degree] = rest / a**problem.degree
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
    dependent = set() if problem.end is None else {problem.degree}
    free = [k for k in range(problem.degree + 1) if k not in fixed and k not in dependent]
    size, points = len(free), len(problem.x)
    # Start from Chebyshev's points, then move to the extrema of the error until it is levelled.
    angles = math.pi * (np.arange(size + 1) + 0.5) / (size + 1)
    reference = [int(i) for i in np.rint((1 - np.cos(angles)) / 2 * (points - 1))]
    best, best_error = None, math.inf
    for _ in range(30):
        if size:
            rows = [_row(problem, i, free, fixed) for i in reference]
            matrix = mp.matrix([[*row, (-1) ** j] for j, (row, _) in enumerate(rows)])
            solution = mp.lu_solve(matrix, mp.matrix([rhs for _, rhs in rows]))
            values = list(solution)[:size]
        else:
            values = []
        coefficients = _complete(problem, free, fixed, values)
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


# --- What is approximated ----------------------------------------------------------------------


def exp2_problem(degree: int) -> Problem:
    """2^f on [0, 1] with p(0) = 1 and p(1) = 2."""
    x = _interval(mp.mpf(1))
    return Problem(x, [mp.mpf(2) ** v for v in x], degree, {0: mp.mpf(1)}, (mp.mpf(1), mp.mpf(2)))


def exp_problem(degree: int) -> Problem:
    """e^r on [0, ln 2] with P(0) = 1 and P(ln 2) = 2."""
    x = _interval(mp.ln2)
    return Problem(x, [mp.exp(v) for v in x], degree, {0: mp.mpf(1)}, (+mp.ln2, mp.mpf(2)))


def expm1_problem(degree: int) -> Problem:
    """(2^f - 1)/f on [0, 1] with q(1) = 1; the limit at 0 is ln 2."""
    x = _interval(mp.mpf(1))
    target = [mp.expm1(v * mp.ln2) / v if v else +mp.ln2 for v in x]
    return Problem(x, target, degree, {}, (mp.mpf(1), mp.mpf(1)))


def mills(z: mp.mpf) -> mp.mpf:
    """M(z) = exp(z^2/2) Q(z), Q the upper tail of the standard normal.

    This is Mills' ratio divided by sqrt(2 pi); gelu(x) = max(x, 0) - z exp(-z^2/2) M(z), z = |x|.
    """
    return mp.exp(z * z / 2) * mp.erfc(z / mp.sqrt(2)) / 2


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
    gelu_p: dict[int, float]
    gelu_m: dict[int, list[float]]
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
            gelu_p={order: p for order, (p, _) in gelu.items()},
            gelu_m={order: m for order, (_, m) in gelu.items()},
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
    return reports


# --- Error bounds -------------------------------------------------------------------------------

ULP = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)


def error_bounds(constants: Constants) -> dict[str, dict[int, float]]:
    """Bounds of the relative error of every function over all float32 inputs, for each order.

    They hold where the exact result is normal and finite, up to 2^-126 in absolute terms (results
    below that are flushed). p is the polynomial's error, m that of M(z); the rest is rounding. The
    exponent t of a result down to 2^-126 is below 128; forms that multiply by x reach 134.

    - exp: the promise of the library.
    - sigmoid = 1/(1 + e): an error ε of e becomes at most ε/(1 - ε).
    - silu, gelu_tanh = max(x, 0) - z e/(1 + e): at most the error of e.
    - gelu_erf = max(x, 0) - z e M: at most that of e M.
    - tanh = E/(E + 2): at most that of E.
    - softmax: the quotient of two exponentials of rounded differences of up to 2^7 ln 2 (order 1:
      2^t is off by a factor from [c, 1.0615 c], and c cancels).
    """
    polynomial = {1: order1_error(constants)}
    reports = {(r.name, r.order): r.polynomial for r in measure(constants)}
    for name in ("2^f", "e^r"):
        polynomial |= {order: e for (n, order), e in reports.items() if n == name}
    bounds: dict[str, dict[int, float]] = {"exp": dict(EXP_MAX_REL_ERROR)}

    def add(function: str, value: Callable[[int], float]) -> None:
        bounds[function] = {order: value(order) for order in EXP_MAX_REL_ERROR}

    # Rounding of an exponent of up to 134 powers of two: in t, once and by the error of log2(e); in
    # nats, not at all (a low part carries it).
    def argument(order: int, roundings: float) -> float:
        relative = ULP + abs(constants.log2e * math.log(2) - 1)
        # Order 1 adds its 127 and rounds to 2^7 units of 2^-23.
        trick = 2.0**-17 if order == 1 else 0.0
        return trick + roundings * 134 * math.log(2) * (relative if order <= 3 else 0.0)

    add("sigmoid", lambda o: EXP_MAX_REL_ERROR[o] / (1 - EXP_MAX_REL_ERROR[o]) + 4 * ULP)
    add("silu", lambda o: polynomial[o] + argument(o, 1) + 8 * ULP)
    # x (a + b x^2) is rounded three times, also in nats.
    cubic = 3 * 134 * math.log(2) * ULP
    add("gelu_tanh", lambda o: polynomial[o] + argument(o, 1) + cubic + 8 * ULP)
    add(
        "gelu_erf",
        lambda o: (1 + polynomial[o]) * (1 + reports["M(z)", o]) - 1 + argument(o, 2) + 10 * ULP,
    )
    add("tanh", lambda o: reports["(2^f - 1)/f", o] + 6 * ULP)
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
    """The text of cpu_kernels/generic/constants.h."""
    lines = [
        f"// Generated by `{_COMMAND}`; do not edit. That script derives each number",
        "// and tests/test_constants.py checks it. quake_jax/_constants.py holds the same numbers.",
        "#ifndef QUAKE_GENERIC_CONSTANTS_H_",
        "#define QUAKE_GENERIC_CONSTANTS_H_",
        "",
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
        f"// exp(z^2/2) Q(z) ~ m0 + m1 u + ... + mk u^k, u = 1/(1 + p z), 0 <= z <= {GELU_Z_MAX},",
        "// Q the upper tail of the standard normal; m0 first. kGeluP is indexed by order.",
        "constexpr float kGeluP[] = {",
        "    0.0f,",
    ]
    lines.extend(f"    {hex_float(p)},  // {p:.9g}" for p in c.gelu_p.values())
    lines.append("};")
    for order, v in c.gelu_m.items():
        array(f"kGeluM{order}", v)
    lines += ["", "}  // namespace quake::constants", "", "#endif  // QUAKE_GENERIC_CONSTANTS_H_"]
    return "\n".join(lines) + "\n"


def render_cpp_bounds(c: Constants) -> str:
    """The text of cpu_kernels/tests/bounds.h."""
    lines = [
        f"// Generated by `{_COMMAND}`; do not edit. error_bounds() there derives",
        "// these relative error bounds (index: order - 1); quake_jax/_constants.py has them.",
        "#ifndef QUAKE_TESTS_BOUNDS_H_",
        "#define QUAKE_TESTS_BOUNDS_H_",
        "",
        "namespace quake::bounds {",
        "",
    ]
    for function, row in error_bounds(c).items():
        values = ", ".join(f"{v:g}" for v in row.values())
        lines.append(f"constexpr double {function}[] = {{{values}}};")
    lines += ["", "}  // namespace quake::bounds", "", "#endif  // QUAKE_TESTS_BOUNDS_H_"]
    return "\n".join(lines) + "\n"


def render_python(c: Constants) -> str:
    """The text of quake_jax/_constants.py."""
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
