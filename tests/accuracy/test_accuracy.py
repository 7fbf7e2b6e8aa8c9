"""Accuracy of every kernel, order, dtype and instruction set, against float64 and the reference.

Each instruction set runs in a process of its own (QUAKE_JAX_ISA is read at import), which is this
file as a script: it evaluates the kernels on the inputs below and saves the results. All inputs of
the 16-bit types and a dense float32 sample are checked here; `pytest -m exhaustive` checks all.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special
from support import (
    BIASED,
    DTYPES,
    ELEMENTWISE,
    KERNELS,
    LOG_SOFTMAX,
    LOGADDEXP,
    LOGSUMEXP,
    ORDERS,
    PAIRS,
    ROOT,
    SOFTMAX,
    SPLITS,
    Function,
    compiled_as_users_do,
    in_float64,
    parametrize_functions,
)

import quake_jax
from quake_jax import reference
from quake_jax._core.constants import MAX_ABS_ERROR, MAX_REL_ERROR
from quake_jax._elementwise import table

SMALLEST_NORMAL = 2.0**-126
HALF_ULP = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Below the smallest normal float32 a result is flushed; float16 has subnormals of step 2^-24.
ABSOLUTE = {"float32": SMALLEST_NORMAL, "bfloat16": SMALLEST_NORMAL, "float16": 2.0**-25}


# Inputs, by a label.


def line(dtype: str) -> np.ndarray:
    """All values of a 16-bit dtype; for float32 a dense sample of the bit patterns and specials."""
    if dtype != "float32":
        return np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    bits = np.arange(0, 2**32, 40013, dtype=np.uint64).astype(np.uint32)
    special_values = [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 88.7, 88.73, -87.3, -87.4, 3e38]
    dense = [np.linspace(-1, 1, 20_003), np.linspace(-104, 104, 60_007)]
    return np.concatenate(
        [bits.view(np.float32), np.float32(special_values), *map(np.float32, dense)]
    )


def elements(dtype: str) -> dict[str, tuple]:
    return {"": (line(dtype),)}


def gates_and_values(dtype: str) -> dict[str, tuple]:
    gate = line(dtype)
    value = np.random.default_rng(0).uniform(-4, 4, gate.shape)
    return {"": (gate, value.astype(gate.dtype))}


def near_and_far(dtype: str) -> dict[str, tuple]:
    """Pairs whose difference is moderate, and pairs of anything."""
    x, random = line(dtype), np.random.default_rng(1)
    with np.errstate(over="ignore", invalid="ignore"):
        near = (x.astype(np.float32) + random.uniform(-20, 20, x.shape)).astype(x.dtype)
    return {"near": (x, near), "far": (x, random.permutation(x)), "equal": (x, x)}


def halves(dtype: str) -> dict[str, tuple]:
    random, result = np.random.default_rng(2), {}
    for width in (1, 7, 16, 197, 1000):
        gates, values = random.uniform(-12, 12, (61, width)), random.uniform(-4, 4, (61, width))
        x = np.concatenate([gates, values], -1)
        result[f"{width}"] = (x.astype(jnp.dtype(dtype)),)
    return result


def with_biases(dtype: str) -> dict[str, tuple]:
    random, result = np.random.default_rng(3), {}
    for width in (1, 7, 16, 197, 1000):
        x, bias = random.uniform(-10, 10, (61, width)), random.uniform(-4, 4, width)
        result[f"{width}"] = (x.astype(jnp.dtype(dtype)), bias.astype(jnp.dtype(dtype)))
    return result


def rows(dtype: str) -> dict[str, tuple]:
    """Matrices by name: widths around the vectors' sizes, long rows, large logits."""
    random, result = np.random.default_rng(4), {}
    for width in (1, 2, 3, 7, 15, 16, 17, 33, 64, 100, 197, 1024, 5001):
        result[f"{width}"] = random.normal(size=(5, width)) * 3
    large = 6e4 if dtype == "float16" else 3e38
    result["large"] = random.uniform(-large, large, (4, 50))
    result["equal"] = np.full((2, 1000), -large)
    if dtype == "float32":
        result["long"] = random.normal(size=(1, 1_000_003)) * 3
    return {name: (x.astype(jnp.dtype(dtype)),) for name, x in result.items()}


def columns(dtype: str) -> dict[str, tuple]:
    random, result = np.random.default_rng(5), {}
    for shape in ((1, 5), (2, 16), (7, 33), (64, 1), (197, 70), (3, 301), (5001, 3)):
        result[f"{shape}"] = random.normal(size=shape) * 3
    large = 6e4 if dtype == "float16" else 3e38
    result["large"] = random.uniform(-large, large, (50, 20))
    return {name: (x.astype(jnp.dtype(dtype)),) for name, x in result.items()}


def masked_rows(dtype: str) -> dict[str, tuple]:
    """Rows with masks that differ by row or not; what is masked is NaN."""
    random, result = np.random.default_rng(6), {}
    for width in (1, 7, 16, 33, 197, 1024, 5001):
        for mask_rows in (6, 1):
            mask = random.random((mask_rows, width)) < 0.6
            if mask_rows > 1:
                mask[0], mask[1] = False, True
            x = np.where(mask, random.normal(size=(6, width)) * 3, np.nan)
            result[f"{width} by {mask_rows}"] = (x.astype(jnp.dtype(dtype)), mask)
    return result


# Exact values, in double precision.


def exact_softmax(x, axis=-1):
    return special.softmax(x, axis)


def exact_log_softmax(x, axis=-1):
    return special.log_softmax(x, axis)


def exact_softmax_where(x, mask):
    with np.errstate(invalid="ignore"):
        y = exact_softmax(np.where(mask, x, -np.inf))
    return np.where(mask, y, 0)


def exact_log_softmax_where(x, mask):
    with np.errstate(invalid="ignore"):
        y = exact_log_softmax(np.where(mask, x, -np.inf))
    return np.where(mask, y, -np.inf)


def as_float64(x: np.ndarray) -> np.ndarray:
    """The values as the kernels take them: denormals are zeros."""
    if x.dtype == bool:
        return x
    x = x.astype(np.float64)
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(0.0, x), x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel with inputs and exact values."""

    name: str
    function: Function  # whose bounds hold
    kernel: Callable
    reference: Callable
    exact: Callable
    inputs: Callable[[str], dict[str, tuple]]

    def tolerances(self, order: int, dtype: str) -> tuple[float, float]:
        """The relative and the absolute error that is allowed, rounding to dtype included."""
        name = self.function.bound_of or self.function.name
        relative, absolute = 2.0**-22, ABSOLUTE[dtype]
        if name == "selu":
            absolute *= 2  # it scales what has been flushed
        if name in MAX_ABS_ERROR:
            absolute += MAX_ABS_ERROR[name][order]
        elif name == self.function.name:
            relative = MAX_REL_ERROR[name][order]
        else:  # a product with a value of at most 4, rounded once more
            relative = MAX_REL_ERROR[name][order] + 2.0**-23
            absolute += 4 * SMALLEST_NORMAL
        return relative + HALF_ULP[dtype] * (1 + relative), absolute


def elementwise_case(function: Function) -> Case:
    inputs = elements if function.limits else gates_and_values
    return Case(
        function.name,
        function,
        function.quake,
        getattr(reference, function.name),
        function.expected,
        near_and_far if function is LOGADDEXP else inputs,
    )


def row_case(function: Function, exact: Callable, axis: int) -> Case:
    return Case(
        f"{function.name} of {'rows' if axis else 'columns'}",
        function,
        functools.partial(getattr(quake_jax, function.name), axis=axis),
        functools.partial(getattr(reference, function.name), axis=axis),
        functools.partial(exact, axis=axis),
        rows if axis else columns,
    )


def masked_case(function: Function, exact: Callable) -> Case:
    name = f"{function.name}_where"
    public = getattr(quake_jax, function.name)

    def kernel(x, mask, *, order):
        return public(x, where=mask, order=order)

    return Case(name, function, kernel, getattr(reference, name), exact, masked_rows)


def split_case(function: Function) -> Case:
    gate_first = int(table.FUSED[function.name].gate_first)
    of_split = functools.partial(getattr(reference, function.name), gate_first=gate_first)
    return Case(function.name, function, function.quake, of_split, function.expected, halves)


ELEMENTWISE_CASES = {f.name: elementwise_case(f) for f in KERNELS}
CASES = {
    case.name: case
    for case in (
        *ELEMENTWISE_CASES.values(),
        *map(elementwise_case, PAIRS),
        *(split_case(f) for f in SPLITS),
        *(
            Case(f.name, f, f.quake, getattr(reference, f.name), f.expected, with_biases)
            for f in BIASED
        ),
        *(
            row_case(f, exact, axis)
            for f, exact in (
                (SOFTMAX, exact_softmax),
                (LOG_SOFTMAX, exact_log_softmax),
                (LOGSUMEXP, special.logsumexp),
            )
            for axis in (-1, 0)
        ),
        masked_case(SOFTMAX, exact_softmax_where),
        masked_case(LOG_SOFTMAX, exact_log_softmax_where),
    )
}
# Few, because each is a program that XLA compiles: the kernels' own variety is in their inputs.
LABELS_OF_REFERENCE = ("", "near", "far", "equal", "7", "197", "large", "(197, 70)", "197 by 6")


def evaluate(function: Callable, inputs: dict[str, tuple]) -> dict[str, dict[int, np.ndarray]]:
    """The results of one program, by label and order."""

    def program(inputs):
        return {
            label: {order: function(*x, order=order) for order in ORDERS}
            for label, x in inputs.items()
        }

    with np.errstate(all="ignore"):
        return jax.tree.map(lambda y: np.asarray(y, np.float32), jax.jit(program)(inputs))


def main(path: str) -> None:
    """Save the results of all kernels with the instruction set in use."""
    results = {"isa": quake_jax.isa()}
    for case in CASES.values():
        for dtype in DTYPES:
            for label, ys in evaluate(case.kernel, case.inputs(dtype)).items():
                for order, y in ys.items():
                    results[f"{case.name} {dtype} {order} {label}"] = y
    np.savez(path, **results)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Results by instruction set, each from its own process."""

    @functools.cache
    def run(isa: str):
        path = tmp_path_factory.mktemp("accuracy") / f"{isa}.npz"
        package = str(pathlib.Path(quake_jax.__file__).parent.parent)
        paths = [package, str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "QUAKE_JAX_ISA": isa,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        subprocess.run(
            [sys.executable, __file__, str(path)], env=environment, check=True, timeout=900
        )
        with np.load(path) as saved:
            assert saved["isa"] == isa
            return {name: saved[name] for name in saved}

    return run


@functools.cache
def exact_values(name: str, dtype: str) -> dict[str, np.ndarray]:
    case = CASES[name]
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        return {
            label: np.asarray(case.exact(*map(as_float64, x)))
            for label, x in case.inputs(dtype).items()
        }


@functools.cache
def reference_values(name: str, dtype: str) -> dict[str, dict[int, np.ndarray]]:
    case = CASES[name]
    inputs = {k: x for k, x in case.inputs(dtype).items() if k in LABELS_OF_REFERENCE}
    # In 16 bits it is the same float32 between two conversions: there the compiler may be quick.
    with compiled_as_users_do() if dtype == "float32" else contextlib.nullcontext():
        return evaluate(case.reference, inputs)


def each_case(names):
    return lambda test: pytest.mark.parametrize("dtype", DTYPES)(
        pytest.mark.parametrize("name", names)(
            pytest.mark.parametrize("isa", quake_jax.supported_isas())(test)
        )
    )


def assert_within(y, exact, relative, absolute, dtype, context="") -> None:
    """NaN must be NaN; inf is also the rounding of what may overflow."""
    y = y.astype(np.float64)
    largest = float(jnp.finfo(dtype).max)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(y - exact) > relative * np.abs(exact) + absolute
        overflows = (np.abs(exact) * (1 + relative) >= largest) & (y * exact > 0)
    wrong = np.where(np.isinf(y), ~overflows, far | np.isnan(y))
    wrong = np.where(np.isinf(exact), y != exact, wrong)
    wrong = np.flatnonzero(np.where(np.isnan(exact), ~np.isnan(y), wrong))
    some = wrong[:3]
    assert wrong.size == 0, (
        f"{context}: {wrong.size} beyond {relative:.3g} and {absolute:.3g}, first at {some}: "
        f"{y.flat[some]}, expected {exact.flat[some]}"
    )


@each_case(CASES)
def test_error_is_within_the_stated_bound(results, isa, name, dtype):
    for label, exact in exact_values(name, dtype).items():
        for order in ORDERS:
            y = results(isa)[f"{name} {dtype} {order} {label}"]
            tolerances = CASES[name].tolerances(order, dtype)
            assert_within(y, exact, *tolerances, dtype, f"order {order}, {label}")


def test_double_precision_is_exact_enough_to_judge():
    """Of the formulas in NumPy, and in JAX, where `python -m quake_jax` judges by them."""
    with mpmath.workdps(40):
        for function in ELEMENTWISE:
            in_jax = functools.partial(table.in_float64, table.FUNCTIONS[function.name])
            for x in np.float32([-91, -40.3, -10, -5.5, -1e-3, -1e-30, 1e-30, 0.3, 2.7, 20, 80]):
                truth = function.truth(mpmath.mpf(float(x)))
                if abs(truth) > SMALLEST_NORMAL:
                    for y in (function.expected(x), in_jax(x)):
                        assert abs(float(y / truth) - 1) < 1e-12, (function.name, x)


@pytest.mark.parametrize("isa", quake_jax.supported_isas())
@pytest.mark.parametrize("name", ELEMENTWISE_CASES)
def test_small_results_keep_their_relative_accuracy(results, isa, name):
    """In tails and near zeros nothing cancels, down to where flushing to 0 plays no part."""
    exact = exact_values(name, "float32")[""]
    with np.errstate(invalid="ignore"):
        small = (np.abs(exact) < 1e-3) & (np.abs(exact) > 2.0**-100)
    assert np.count_nonzero(small) > 1000
    for order in ORDERS:
        y = results(isa)[f"{name} float32 {order} "][small].astype(np.float64)
        assert np.max(np.abs(y / exact[small] - 1)) <= MAX_REL_ERROR[name][order]


def ranges() -> dict[str, tuple[float, float]]:
    """The limits of functions that grow from one to the other, where they are float32 numbers."""
    result, x = {}, np.linspace(-100, 100, 20_001)
    for function in KERNELS:
        y, ends = function.expected(x), function.limits[:0:-1]
        if np.all(np.diff(y) >= -1e-12 * np.abs(y[1:])) and np.all(np.float32(ends) == ends):
            result[function.name] = ends
    assert {"exp", "sigmoid", "tanh", "softplus", "log_sigmoid"} <= result.keys()
    return result


RANGES = ranges()


@each_case(RANGES)
def test_range(results, isa, name, dtype):
    x = line(dtype).astype(np.float32)
    low, high = RANGES[name]
    for order in ORDERS:
        y = results(isa)[f"{name} {dtype} {order} "]
        assert np.all((y >= low) & (y <= high) | np.isnan(x))


# Functions and orders that are computed piecewise where tables are fast: another algorithm.
PIECEWISE = {"tanh": ORDERS, "gelu_erf": (2, 3)}


def reference_tolerance(name: str, isa: str, order: int) -> float:
    """How far two evaluations of one algorithm may be apart, before rounding to the output dtype.

    Two algorithms may differ by the bounds of both.

    A few ulp; at orders 1 to 3 also the effect of rounding t = x·log2(e) twice on each side, for
    exponents of up to 134. The exponent of the tanh form of GELU is a rounded cubic at every order,
    that of quick_gelu a rounded product. Order 1 rounds again when it adds 127 (2^-17).
    """
    function = CASES[name].function
    bound_of = function.bound_of or function.name
    if isa.startswith("avx512") and order in PIECEWISE.get(bound_of, ()):
        return 2 * MAX_REL_ERROR[bound_of][order]
    ulp = 2.0**-23
    roundings = 2 if order <= 3 else 0
    if "gelu_tanh" in name or "geglu_tanh" in name or name == "quick_gelu":
        roundings = 4
    if name == "tanh":
        roundings = 0  # there a large exponent means a result of 1
    slope = 1.0 if order > 1 else 2.0
    exponent = slope * roundings * 134 * np.log(2) * 2.0**-23
    return 12 * ulp + exponent + (2.0**-16 if order == 1 else 0)


@each_case(CASES)
def test_kernels_agree_with_the_reference(results, isa, name, dtype):
    is_logarithm = CASES[name].function.name in MAX_ABS_ERROR
    for label, ys in reference_values(name, dtype).items():
        for order, expected in ys.items():
            y = results(isa)[f"{name} {dtype} {order} {label}"]
            tolerance = reference_tolerance(name, isa, order)
            # Two roundings to the output dtype may differ by one of its steps.
            relative = tolerance + 2 * HALF_ULP[dtype]
            # So do two subnormal float16 results; elsewhere selu and the gated functions multiply
            # what may have been flushed on one side alone.
            absolute = (2 if dtype == "float16" else 8) * ABSOLUTE[dtype]
            if is_logarithm:
                absolute += tolerance
            expected = expected.astype(np.float64)
            assert_within(y, expected, relative, absolute, dtype, f"order {order} {label}")


def test_every_kernel_has_a_case():
    targets = {name.removeprefix("quake_jax_") for name in quake_jax._core.extension.targets}
    # The gates of glu are among the pairs; attention has cases of its own, dense layers have
    # tests/dense, norms tests/functions/test_norms.py.
    own_cases = {"glu", "dot_product_attention", "dense"}
    norms = {name for name in targets if "_norm" in name}
    assert targets - own_cases - norms == {name.split(" of ")[0] for name in CASES}


@parametrize_functions((*ELEMENTWISE, *PAIRS, *SPLITS))
def test_the_formulas_are_those_of_the_replaced_functions(function):
    """As JAX computes these in double precision, which may cancel in a tail."""
    x = [np.linspace(*ends, 202) for ends in ((-30, 30), (-10, 20))]
    x = x[: len(function.operands((101,)))]
    y = in_float64(function.exact, *x)
    np.testing.assert_allclose(function.expected(*x), y, rtol=1e-12, atol=1e-13)


if __name__ == "__main__":
    main(sys.argv[1])
