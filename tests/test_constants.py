"""Checks that every numerical constant is what its definition says, with the error it promises.

The committed files must be exactly what tools/derive_constants.py derives; the errors are measured
here independently, against numpy and scipy in float64.
"""

import importlib.util
import math
import re
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special

ROOT = Path(__file__).resolve().parent.parent


def _load(name, path):
    # By path: the constants are checked without the compiled extension that quake_jax imports.
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


K = _load("_quake_constants_under_test", ROOT / "quake_jax" / "_constants.py")
tool = _load("_derive_constants_under_test", ROOT / "tools" / "derive_constants.py")
HEADER = (ROOT / "cpu_kernels" / "core" / "constants.h").read_text(encoding="utf-8")
BOUNDS = (ROOT / "cpu_kernels" / "tests" / "bounds.h").read_text(encoding="utf-8")

ORDERS = (1, 2, 3, 4, 5)
EPS = 2.0**-24  # half an ulp of a float32 in [1, 2)
LN2 = math.log(2)
# Orders 2 and 3 take t = x log2(e) as one product: half an ulp of t in [64, 128), and the error of
# log2(e) itself, enter the exponent.
ARGUMENT_ERROR = LN2 * (2.0**-18 + 127 * abs(K.LOG2E - 1 / LN2))
# What is left to the polynomials of exp alone: the argument, and for order 5 (design: 9.3e-8) the
# reduction, are paid from the same bound.
EXP_POLYNOMIAL_BOUND = {
    2: K.EXP_MAX_REL_ERROR[2] - ARGUMENT_ERROR,
    3: K.EXP_MAX_REL_ERROR[3] - ARGUMENT_ERROR,
    4: K.EXP_MAX_REL_ERROR[4] - 2 * EPS,
    5: 9.3e-8,
}


@pytest.fixture(scope="module")
def derived():
    return tool.derive()


def _scalars():
    return {
        "kLog2e": K.LOG2E,
        "kLn2Hi": K.LN2_HI,
        "kLn2Lo": K.LN2_LO,
        "kOrder1Shift": K.ORDER1_SHIFT,
        "kSoftmaxShift": K.SOFTMAX_SHIFT,
    }


def _arrays():
    arrays = {f"kExp2Poly{o}": K.EXP2_POLY[o] for o in (2, 3)}
    arrays |= {f"kExpPoly{o}": K.EXP_POLY[o] for o in (4, 5)}
    arrays |= {f"kExpm1Poly{o}": K.EXPM1_POLY[o] for o in ORDERS}
    arrays |= {f"kExpm1Centered{o}": K.EXPM1_CENTERED[o] for o in ORDERS}
    arrays |= {f"kLog1p{o}": K.LOG1P[o] for o in ORDERS}
    arrays |= {f"kGeluM{o}": K.GELU_M[o] for o in ORDERS}
    arrays["kGeluP"] = [0.0, *(K.GELU_P[o] for o in ORDERS)]
    return arrays


# --- The generated files -----------------------------------------------------------------------


def test_files_are_what_the_tool_derives(derived):
    assert tool.PY_PATH.read_text(encoding="utf-8") == tool.render_python(derived)
    assert tool.CPP_PATH.read_text(encoding="utf-8") == tool.render_cpp(derived)
    segments = tool.CPP_SEGMENTS_PATH.read_text(encoding="utf-8")
    assert segments == tool.render_cpp_segments(derived)
    assert tool.CPP_BOUNDS_PATH.read_text(encoding="utf-8") == tool.render_cpp_bounds(derived)


@pytest.mark.parametrize("changed", ["CPP_PATH", "CPP_SEGMENTS_PATH", "CPP_BOUNDS_PATH", "PY_PATH"])
def test_check_reports_a_changed_digit_and_writes_nothing(derived, monkeypatch, tmp_path, changed):
    monkeypatch.setattr(tool, "derive", lambda: derived)
    reports = tool.measure(derived)
    monkeypatch.setattr(tool, "measure", lambda constants: reports)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "CPP_PATH", tmp_path / "constants.h")
    monkeypatch.setattr(tool, "CPP_SEGMENTS_PATH", tmp_path / "segments.h")
    monkeypatch.setattr(tool, "CPP_BOUNDS_PATH", tmp_path / "bounds.h")
    monkeypatch.setattr(tool, "PY_PATH", tmp_path / "_constants.py")
    assert tool.main(["--check"]) == 1  # the files do not exist
    assert not any(tmp_path.iterdir())
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    path = getattr(tool, changed)
    text = re.sub(r"\d(?=\D*$)", "", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    assert tool.main(["--check"]) == 1
    assert path.read_text(encoding="utf-8") == text


def test_header_holds_the_same_numbers_as_the_python_module():
    number = r"-?0x[0-9a-f.]+p[+-]?\d+f|0\.0f"
    scalars = re.findall(rf"constexpr float (\w+) = ({number});", HEADER)
    arrays = re.findall(r"constexpr float (\w+)\[\] = \{(.*?)\};", HEADER, re.DOTALL)
    assert HEADER.count("constexpr") == len(scalars) + len(arrays)

    def value(literal):
        return float.fromhex(literal.removesuffix("f"))

    assert {name: value(literal) for name, literal in scalars} == _scalars()
    parsed = {name: [value(v) for v in re.findall(number, body)] for name, body in arrays}
    assert parsed == _arrays()


def test_every_constant_is_a_float32():
    for values in (list(_scalars().values()), *_arrays().values()):
        assert [float(np.float32(v)) for v in values] == values


# --- Scalars -----------------------------------------------------------------------------------


def test_logarithms():
    assert np.float32(1 / LN2) == K.LOG2E
    assert all(float(np.float32(n * K.LN2_HI)) == n * K.LN2_HI for n in range(-256, 257))
    # The low part is a float32 near 2.1e-4: half an ulp of it is what remains of ln 2.
    assert abs(K.LN2_HI + K.LN2_LO - LN2) <= abs(K.LN2_LO) * EPS


def test_order1_shift_balances_the_error():
    t = np.linspace(0, 1, 1_000_001)

    def extremes(c):
        shifted = t - c / 2**23
        value = (1 + shifted - np.floor(shifted)) * np.exp2(np.floor(shifted))
        error = value / np.exp2(t) - 1
        return error.min(), error.max()

    low, high = extremes(K.ORDER1_C)
    # One unit of C moves both by ln 2 / 2^23; C is rounded to half a unit. The grid adds 1e-6.
    assert high == pytest.approx(-low, abs=LN2 / 2**23 + 1e-6)
    assert high <= K.EXP_MAX_REL_ERROR[1]
    for c in (K.ORDER1_C - 100, K.ORDER1_C + 100):
        assert max(map(abs, extremes(c))) > high
    assert K.ORDER1_SHIFT == np.float32(K.ORDER1_C / 2**23)


def test_softmax_shift_beats_its_neighbours_on_other_logits():
    # Another sample than the derivation's. Computed as the kernel does, from the float's bits.
    logits = 2 * np.random.default_rng(1).standard_normal((4000, 128))
    t = (logits - logits.max(axis=1, keepdims=True)) / LN2
    exact = scipy.special.softmax(logits, axis=1)

    def total_variation(shift):
        bits = ((t + 127 - shift) * 2**23).astype(np.int32)
        e = bits.view(np.float32).astype(np.float64)
        return np.abs(e / e.sum(axis=1, keepdims=True) - exact).sum(axis=1).mean() / 2

    best = total_variation(K.SOFTMAX_SHIFT)
    assert best < 0.006
    assert best < 0.7 * total_variation(K.ORDER1_SHIFT)
    step = 300_000 / 2**23
    assert best < total_variation(K.SOFTMAX_SHIFT - step)
    assert best < total_variation(K.SOFTMAX_SHIFT + step)
    assert K.SOFTMAX_SHIFT == np.float32(K.SOFTMAX_C / 2**23)


# --- Polynomials -------------------------------------------------------------------------------


def _polynomial_error(coefficients, x, exact):
    return np.max(np.abs(np.polynomial.polynomial.polyval(x, coefficients) / exact - 1))


def _rounding_bound(coefficients, x, exact):
    """Bound on what Horner's rule in float32 adds: each FMA's result b_j is off by EPS |b_j|."""
    value, total = np.full_like(x, coefficients[-1]), np.zeros_like(x)
    for c in reversed(coefficients[:-1]):
        value = value * x + c
        total = total * x + np.abs(value)
    return EPS * np.max(total / exact)


def _float32_error(coefficients, x, exact):
    value = np.float32(coefficients[-1])
    for c in reversed(coefficients[:-1]):  # an FMA: the float64 product is exact
        value = np.float32(value.astype(np.float64) * x + c)
    return np.max(np.abs(value.astype(np.float64) / exact - 1))


def _exp_case(order):
    """(coefficients from c0, end of the interval, function, bound) of a polynomial of exp."""
    if order <= 3:
        return [1.0, *K.EXP2_POLY[order]], 1.0, np.exp2, EXP_POLYNOMIAL_BOUND[order]
    return [1.0, *K.EXP_POLY[order]], LN2, np.exp, EXP_POLYNOMIAL_BOUND[order]


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_exp_polynomial_meets_its_bound(order):
    coefficients, end, function, bound = _exp_case(order)
    assert len(coefficients) == order + 1
    x = np.linspace(0, end, 1_000_001)
    assert _polynomial_error(coefficients, x, function(x)) <= bound
    x = np.float32(x).astype(np.float64)
    exact = function(x)
    rounding = _rounding_bound(coefficients, x, exact)
    assert rounding <= 2 * EPS
    assert _float32_error(coefficients, x, exact) <= bound + rounding


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_exp_polynomial_is_continuous_between_binades(order):
    coefficients, end, _, _ = _exp_case(order)
    at_end = sum(Fraction(c) * Fraction(end) ** k for k, c in enumerate(coefficients))
    assert abs(at_end - 2) <= 2.0**-24  # half the spacing of float32 just below 2
    value = np.float32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = np.float32(np.float64(value) * np.float64(np.float32(end)) + c)
    assert abs(float(value) - 2) <= 2.0**-23


def _expm1_grid(points=1_000_001):
    f = np.float32(np.linspace(0, 1, points)[1:]).astype(np.float64)
    return f, np.expm1(f * LN2) / f


@pytest.mark.parametrize("order", ORDERS)
def test_expm1_polynomial_meets_its_bound(order):
    coefficients = K.EXPM1_POLY[order]
    assert len(coefficients) == order + 1
    f, exact = _expm1_grid()
    bound = {1: 0.016, 2: 6.1e-4, 3: 2.0e-5, 4: 6e-7, 5: 2e-8}[order]
    assert bound < 0.6 * K.EXP_MAX_REL_ERROR[order]
    assert _polynomial_error(coefficients, f, exact) <= bound
    rounding = _rounding_bound(coefficients, f, exact)
    assert rounding <= 2 * EPS
    assert _float32_error(coefficients, f, exact) <= bound + rounding
    assert abs(sum(map(Fraction, coefficients)) - 1) <= EPS


def _centered_grid(points=1_000_001):
    f = np.float32(np.linspace(-0.5, 0.5, points)).astype(np.float64)
    f = f[f != 0]
    return f, np.expm1(f * LN2) / f


@pytest.mark.parametrize("order", ORDERS)
def test_centered_expm1_polynomial_meets_its_bound(order):
    coefficients = K.EXPM1_CENTERED[order]
    assert len(coefficients) == order + 1
    f, exact = _centered_grid()
    bound = {1: 0.0185, 2: 4.6e-4, 3: 2.1e-5, 4: 4.6e-7, 5: 1.7e-8}[order]
    assert bound < 0.65 * K.EXP_MAX_REL_ERROR[order]
    assert _polynomial_error(coefficients, f, exact) <= bound
    rounding = _rounding_bound(coefficients, np.abs(f), exact)
    assert rounding <= 2 * EPS
    assert _float32_error(coefficients, f, exact) <= bound + rounding


@pytest.mark.parametrize("order", ORDERS)
def test_centered_expm1_polynomial_is_continuous_between_binades(order):
    def two_to(f):
        return 1 + f * sum(Fraction(c) * f**k for k, c in enumerate(K.EXPM1_CENTERED[order]))

    half = Fraction(1, 2)
    assert abs(two_to(half) - 2 * two_to(-half)) <= EPS  # half the spacing of float32 at sqrt(2)


@pytest.mark.parametrize("order", ORDERS)
def test_centered_expm1_polynomial_is_minimax(order):
    """No change of the coefficients that keeps it continuous makes the error smaller.

    As a linear program, independent of the derivation: the best change, in units of the error.
    """
    f, exact = _centered_grid(2001)
    powers = np.arange(order + 1)
    basis = f[:, None] ** powers / exact[:, None]
    error = basis @ K.EXPM1_CENTERED[order] - 1
    largest = np.max(np.abs(error))
    # |error / largest + basis c| <= bound, bound minimal; Chebyshev-like scale of the columns.
    scale = 2.0**powers
    ones = np.ones((len(f), 1))
    program = scipy.optimize.linprog(
        [*np.zeros(order + 1), 1],
        A_ub=np.block([[basis * scale, -ones], [-basis * scale, -ones]]),
        b_ub=np.concatenate([-error, error]) / largest,
        A_eq=[[*(0.5 * 0.5**powers + (-0.5) ** powers) * scale, 0]],
        b_eq=[0],
        bounds=(None, None),
    )
    assert program.status == 0
    # Rounding the coefficients to float32 costs next to nothing.
    assert largest <= 1.0005 * program.fun * largest + 0.25 * EPS


@pytest.mark.parametrize("order", ORDERS)
def test_log1p_polynomial_meets_its_bound(order):
    coefficients = K.LOG1P[order]
    e = np.float32(np.linspace(0, 1, 1_000_001)[1:]).astype(np.float64)
    exact = np.log1p(e) / e
    bound = 0.3 * K.EXP_MAX_REL_ERROR[order] if order < 5 else 1.2e-7
    assert _polynomial_error(coefficients, e, exact) <= bound
    rounding = _rounding_bound(coefficients, e, exact)
    assert rounding <= 3 * EPS  # well conditioned although the signs alternate
    assert _float32_error(coefficients, e, exact) <= bound + rounding


@pytest.mark.parametrize("order", ORDERS)
def test_log1p_polynomial_has_the_lowest_degree(order):
    with tool.mp.workdps(tool.DIGITS):
        _, error = tool.remez(tool.log1p_problem(len(K.LOG1P[order]) - 2))
    assert error > tool.LOG1P_POLY_BOUND[order]


def _mills(z):
    return scipy.special.erfcx(z / math.sqrt(2)) / 2


@pytest.mark.parametrize("order", ORDERS)
def test_gelu_polynomial_meets_its_bound(order):
    p, coefficients = K.GELU_P[order], K.GELU_M[order]
    z = np.float32(np.linspace(0, 13.3, 500_001)).astype(np.float64)
    exact = _mills(z)
    bound = 0.3 * K.EXP_MAX_REL_ERROR[order]
    assert _polynomial_error(coefficients, 1 / (1 + p * z), exact) <= bound
    # u = 1/(1 + p z) is rounded twice; M sees that times d ln M / d ln u.
    u = (np.float32(1) / np.float32(p * z + 1)).astype(np.float64)
    derivative = np.polynomial.polynomial.polyder(coefficients)
    sensitivity = np.max(np.abs(np.polynomial.polynomial.polyval(u, derivative) * u / exact))
    rounding = 2 * EPS * sensitivity + _rounding_bound(coefficients, u, exact)
    assert rounding <= 12 * EPS  # 6 ulp in the worst case: no large coefficients that cancel
    assert _float32_error(coefficients, u, exact) <= bound + rounding


def test_gelu_polynomial_stays_positive_up_to_the_clamp():
    # Kernels clamp z at 14, where exp(-z^2/2) is 0: the factor only has to be finite there.
    for order in ORDERS:
        u = 1 / (1 + K.GELU_P[order] * np.linspace(13.3, 14, 1000))
        assert np.all(np.polynomial.polynomial.polyval(u, K.GELU_M[order]) > 0)


@pytest.mark.parametrize("order", ORDERS)
def test_gelu_polynomial_has_the_lowest_degree(order):
    degree = len(K.GELU_M[order]) - 2
    with tool.mp.workdps(tool.DIGITS):
        _, error = tool.remez(tool.gelu_problem(degree, tool.gelu_variable(degree)))
    assert error > 0.3 * K.EXP_MAX_REL_ERROR[order]


def _problems():
    cases = [(tool.exp2_problem, (d,), K.EXP2_POLY[d]) for d in (2, 3)]
    cases += [(tool.exp_problem, (d,), K.EXP_POLY[d]) for d in (4, 5)]
    cases += [(tool.expm1_problem, (d,), K.EXPM1_POLY[d]) for d in ORDERS]
    cases += [(tool.log1p_problem, (len(K.LOG1P[o]) - 1,), K.LOG1P[o]) for o in ORDERS]
    cases += [(tool.gelu_problem, (len(K.GELU_M[o]) - 1, K.GELU_P[o]), K.GELU_M[o]) for o in ORDERS]
    return [pytest.param(*case, id=f"{case[0].__name__}{case[1]}") for case in cases]


@pytest.mark.parametrize("make, arguments, committed", _problems())
def test_polynomials_are_minimax(make, arguments, committed):
    """Chebyshev's alternation: n free coefficients, n + 1 levelled errors of alternating sign."""
    with tool.mp.workdps(tool.DIGITS):
        problem = make(*arguments)
        coefficients, largest = tool.remez(problem)
    error = problem.relative_error(coefficients)
    free = problem.degree + 1 - len(problem.fixed) - (problem.linear is not None)
    levelled = error[np.abs(error) > largest * (1 - 1e-6)]
    assert 1 + np.count_nonzero(np.diff(np.sign(levelled))) == free + 1
    # Rounding the coefficients to float32 costs next to nothing.
    rounded = problem.relative_error([*map(float, problem.fixed.values()), *committed])
    assert np.max(np.abs(rounded)) <= 1.0001 * largest + 0.25 * EPS


# --- Error bounds ------------------------------------------------------------------------------


def test_header_holds_the_same_bounds_as_the_python_module():
    rows = re.findall(r"constexpr double (\w+)\[\] = \{(.*?)\};", BOUNDS)
    parsed = {name: [float(v) for v in row.split(", ")] for name, row in rows}
    expected = {name: list(row.values()) for name, row in K.MAX_REL_ERROR.items()}
    expected |= {f"{name}_absolute": list(row.values()) for name, row in K.MAX_ABS_ERROR.items()}
    assert parsed == expected


@pytest.mark.parametrize("table", [K.MAX_REL_ERROR, K.MAX_ABS_ERROR])
def test_bounds_fall_with_the_order(table):
    for row in table.values():
        assert tuple(row) == ORDERS
        values = list(row.values())
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == len(values)


def _expm1_float32(x, order, fused):
    """The kernels' expm1 in float32, with fused multiply-adds or without."""

    def rounded(v):
        return np.float32(v).astype(np.float64)

    def fma(a, b, c):
        return rounded((a * b if fused else rounded(a * b)) + c)

    t = rounded(x * K.LOG2E)
    n = np.rint(t)
    if order <= 3:
        f = t - n
    else:
        f = rounded(fma(n, -K.LN2_LO, fma(n, -K.LN2_HI, x)) * K.LOG2E)
    q = np.full_like(f, K.EXPM1_CENTERED[order][-1])
    for c in reversed(K.EXPM1_CENTERED[order][:-1]):
        q = fma(q, f, c)
    power = np.exp2(n - 1)
    half = rounded(power - 0.5)
    return rounded(fma(power, 2 * rounded(f * q), half) + half)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_expm1_bounds_hold_in_float32(order, fused):
    x = np.concatenate([np.linspace(-20, 88, 400_001), np.linspace(-2, 2, 400_001)])
    x = np.float32(x[x != 0]).astype(np.float64)
    error = np.abs(_expm1_float32(x, order, fused) / np.expm1(x) - 1)
    assert 0.3 * K.MAX_REL_ERROR["expm1"][order] < np.max(error) <= K.MAX_REL_ERROR["expm1"][order]
    negative = np.max(error[x < 0])
    assert 0.3 * K.MAX_REL_ERROR["elu"][order] < negative <= K.MAX_REL_ERROR["elu"][order]


def _mish(x, w):
    positive = x * (1 + 2 * w) / (1 + 2 * w + 2 * w * w)
    return np.where(x > 0, positive, x * w * (w + 2) / (w * w + 2 * w + 2))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("order", ORDERS)
def test_bounds_cover_the_error_of_the_exponential(derived, order, sign):
    """Whatever the exponential's error is: all that the order permits, upward (to 1) or downward.

    The rest of a bound is for rounding, and for the polynomial of log(1 + e), measured here too.
    """
    x = np.linspace(-87, 87, 400_000)
    e = np.exp(-np.abs(x))
    wrong = np.minimum(e * (1 + sign * K.EXP_MAX_REL_ERROR[order]), 1)

    def logarithm(e):
        return e * np.polynomial.polynomial.polyval(e, K.LOG1P[order])

    exact = np.maximum(x, 0) + np.log1p(e)
    error = np.maximum(x, 0) + logarithm(wrong) - exact
    for name in ("softplus", "log_sigmoid"):
        assert np.max(np.abs(error / exact)) <= K.MAX_REL_ERROR[name][order]
    # x is the difference of the two operands.
    assert np.max(np.abs(error)) <= K.MAX_ABS_ERROR["logaddexp"][order]
    # The bound of mish has the polynomial's own error, not the promise that exp rounds it up to.
    own = tool.order1_error(derived)
    if order > 1:
        coefficients, end, function, _ = _exp_case(order)
        own = _polynomial_error(coefficients, unit := np.linspace(0, end, 100_001), function(unit))
    error = _mish(x, e * (1 + sign * own)) / _mish(x, e) - 1
    assert np.max(np.abs(error)) <= K.MAX_REL_ERROR["mish"][order]
    # Each exponential of a row, and with them their sum.
    of_sum = np.abs(np.log1p(sign * K.EXP_MAX_REL_ERROR[order]))
    for name in ("logsumexp", "log_softmax"):
        assert of_sum <= K.MAX_ABS_ERROR[name][order]


@pytest.mark.parametrize("order", ORDERS)
def test_logsumexp_bound_covers_a_row_summed_in_blocks(order):
    """The sum of float32 exponentials in the worst allowed order: a large one, then small ones."""
    rng = np.random.default_rng(order)
    spread = rng.uniform(0.1, 10, (200, 1))
    d = np.float32(-spread * rng.exponential(size=(200, tool.SUM_DEPTH)))
    d[:, 0] = 0
    exact = np.log(np.exp(d.astype(np.float64)).sum(axis=1))
    e = np.float32(np.exp(d.astype(np.float64)) * (1 + K.EXP_MAX_REL_ERROR[order]))
    total = e[:, 0]
    for column in e.T[1:]:
        total = total + column  # float32
    error = np.abs(np.float32(np.log(total.astype(np.float64))) - exact)
    assert np.all(error <= K.MAX_ABS_ERROR["logsumexp"][order] + 2.0**-22 * exact)


# --- Piecewise polynomials ----------------------------------------------------------------------

SEGMENTS = (ROOT / "cpu_kernels" / "core" / "segments.h").read_text(encoding="utf-8")


def _segments(name, order):
    """What segments.h says of one table, as a dictionary of numbers and arrays."""
    [body] = re.findall(rf"struct {name}Segments<{order}> \{{\n(.*?)\n\}};", SEGMENTS, re.DOTALL)

    def numbers(text):
        return np.array([float.fromhex(v) for v in re.findall(r"(-?0x[0-9a-f.p+-]+)f", text)])

    scalars = {k: float.fromhex(v) for k, v in re.findall(r"float (\w+) = (\S+)f;", body)}
    [shift] = re.findall(r"kShift = (\d+);", body)
    [local] = re.findall(r"kLocal = (\w+);", body)
    [start] = re.findall(r"kStart\[32\] = \{(.*?)\};", body, re.DOTALL)
    [table] = re.findall(r"c\[\d+\]\[32\] = \{(.*)\};", body, re.DOTALL)
    return scalars | {
        "shift": int(shift),
        "local": local == "true",
        "start": numbers(start),
        "c": numbers(table).reshape(-1, 32),
    }


def _lookup(s, z):
    """The polynomial of each z's segment by fused multiply-adds in float32."""
    y = np.float32(z.astype(np.float64) * s["kScale"] + s["kOffset"])
    row = (y.view(np.int32) >> s["shift"]) & 31
    x = z.astype(np.float64) - (s["start"][row] if s["local"] else 0.0)
    value = np.zeros_like(x)
    for c in s["c"][::-1]:
        value = np.float32(value * x + c[row]).astype(np.float64)
    return value


@pytest.mark.parametrize("order", ORDERS)
def test_piecewise_tanh_keeps_the_bound(order):
    s = _segments("Tanh", order)
    near_zero = np.float32(2.0) ** np.arange(-126, -3, dtype=np.float32)
    z = np.concatenate([near_zero, np.linspace(0, s["kUpper"], 1_000_001, dtype=np.float32)[1:]])
    assert (
        np.max(np.abs(_lookup(s, z) / np.tanh(z.astype(np.float64)) - 1))
        <= (K.MAX_REL_ERROR["tanh"][order])
    )
    assert _lookup(s, z[-1:]) == 1.0  # the limit, exactly
    assert _lookup(s, z).max() <= 1.0


@pytest.mark.parametrize("order", (2, 3))
def test_piecewise_logarithm_of_the_normal_tail_leaves_room_for_the_power(order):
    s = _segments("LogTail", 3)
    z = np.linspace(0, s["kUpper"], 1_000_001, dtype=np.float32)
    exact = scipy.special.log_ndtr(-z.astype(np.float64))
    error = np.max(np.abs(np.expm1(_lookup(s, z) * LN2 - exact)))
    power = EXP_POLYNOMIAL_BOUND[order]  # its argument is not multiplied
    assert (1 + error) * (1 + power) - 1 + 4 * EPS <= K.MAX_REL_ERROR["gelu_erf"][order]


@pytest.mark.parametrize(("name", "order"), [("Tanh", o) for o in ORDERS] + [("LogTail", 3)])
def test_segments_begin_where_the_row_changes(name, order):
    s = _segments(name, order)
    y = np.linspace(s["kOffset"], 8.0, 100_000, endpoint=False, dtype=np.float32)
    row = (y.view(np.int32) >> s["shift"]) & 31
    assert set(row) == set(range(32))
    z = (y.astype(np.float64) - s["kOffset"]) / s["kScale"]
    first = np.array([z[row == r].min() for r in range(32)])
    assert np.all(s["start"] <= first + 1e-6)
    assert np.all(s["start"] >= first - 1e-3)
