"""Accuracy of every function, order, dtype and instruction set, against float64 and the reference.

Each instruction set runs in a process of its own (QUAKE_JAX_ISA is read at import), which is this
file as a script: it evaluates the kernels on the inputs below and saves the results. All inputs of
the 16-bit types and a dense float32 sample are checked here; `cpu_kernels/tests` sweeps more.
"""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special

import quake_jax
from quake_jax import reference
from quake_jax._constants import MAX_REL_ERROR

ORDERS = (1, 2, 3, 4, 5)
DTYPES = ("float32", "bfloat16", "float16")
SMALLEST_NORMAL = 2.0**-126
HALF_ULP = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Below the smallest normal float32 a result is flushed; float16 has subnormals of step 2^-24.
ABSOLUTE = {"float32": SMALLEST_NORMAL, "bfloat16": SMALLEST_NORMAL, "float16": 2.0**-25}

KERNELS = {
    "exp": quake_jax.exp,
    "sigmoid": quake_jax.sigmoid,
    "silu": quake_jax.silu,
    "tanh": quake_jax.tanh,
    "gelu_tanh": quake_jax.gelu,
    "gelu_erf": functools.partial(quake_jax.gelu, approximate=False),
    "softmax": quake_jax.softmax,
}
ELEMENTWISE = tuple(name for name in KERNELS if name != "softmax")


def gelu_tanh(x):
    return x * special.expit(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3))


# In double precision, in forms that keep their relative accuracy in the tails.
EXACT = {
    "exp": np.exp,
    "sigmoid": special.expit,
    "silu": lambda x: np.where(x == -np.inf, 0, x * special.expit(x)),
    "tanh": np.tanh,
    "gelu_tanh": lambda x: np.where(x == -np.inf, 0, gelu_tanh(x)),
    "gelu_erf": lambda x: np.where(x == -np.inf, 0, 0.5 * x * special.erfc(-x / np.sqrt(2))),
}
MPMATH = {
    "exp": mpmath.exp,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "gelu_tanh": lambda x: (
        x / (1 + mpmath.exp(-mpmath.sqrt(8 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))
    ),
    "gelu_erf": lambda x: x * mpmath.ncdf(x),
}


def inputs(dtype: str) -> np.ndarray:
    """All values of a 16-bit dtype; for float32 a dense sample of the bit patterns and specials."""
    if dtype != "float32":
        return np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    bits = np.arange(0, 2**32, 20011, dtype=np.uint64).astype(np.uint32)
    special_values = [0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 88.7, 88.73, -87.3, -87.4, 3e38]
    line = np.linspace(-100, 100, 100_003)
    return np.concatenate([bits.view(np.float32), np.float32(special_values), np.float32(line)])


def softmax_inputs(dtype: str) -> dict[str, np.ndarray]:
    """Matrices by name: widths around the vectors' sizes, long rows, large logits."""
    random = np.random.default_rng(0)
    result = {}
    for width in (1, 2, 3, 7, 15, 16, 17, 33, 64, 100, 197, 1024, 5001):
        result[f"{width}"] = random.normal(size=(5, width)) * 3
    large = 6e4 if dtype == "float16" else 3e38
    result["large"] = random.uniform(-large, large, (4, 50))
    result["equal"] = np.full((2, 1000), -large)
    return {name: x.astype(jnp.dtype(dtype)) for name, x in result.items()}


def main(path: str) -> None:
    """Save the results of all kernels with the instruction set in use."""
    results = {"isa": quake_jax.isa()}
    for name, kernel in KERNELS.items():
        for dtype in DTYPES:
            xs = {"": inputs(dtype)} if name != "softmax" else softmax_inputs(dtype)
            for order in ORDERS:
                for label, x in xs.items():
                    y = jax.jit(kernel, static_argnames="order")(jnp.asarray(x), order=order)
                    results[f"{name} {dtype} {order} {label}"] = np.asarray(y, np.float32)
    np.savez(path, **results)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Results by instruction set, each from its own process."""

    @functools.cache
    def run(isa: str):
        path = tmp_path_factory.mktemp("accuracy") / f"{isa}.npz"
        environment = {**os.environ, "QUAKE_JAX_ISA": isa, "JAX_PLATFORMS": "cpu"}
        subprocess.run(
            [sys.executable, "-m", "tests.test_accuracy", str(path)],
            env=environment,
            cwd=pathlib.Path(__file__).parent.parent,
            check=True,
            timeout=300,
        )
        saved = np.load(path)
        assert saved["isa"] == isa
        return saved

    return run


def each_case(names):
    return lambda test: pytest.mark.parametrize("dtype", DTYPES)(
        pytest.mark.parametrize("name", names)(
            pytest.mark.parametrize("isa", quake_jax.supported_isas())(test)
        )
    )


def as_float64(x: np.ndarray) -> np.ndarray:
    """The values as the kernels take them: denormals are zeros."""
    x = x.astype(np.float64)
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(0.0, x), x)


def assert_within(y, exact, relative, dtype, context="", absolute=1.0) -> None:
    """NaN must be NaN; inf is also the rounding of what may overflow; `absolute` is in ABSOLUTE."""
    largest = float(jnp.finfo(dtype).max)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(y - exact) > relative * np.abs(exact) + absolute * ABSOLUTE[dtype]
        overflows = (np.abs(exact) * (1 + relative) >= largest) & (y * exact > 0)
    wrong = np.where(np.isinf(y), ~overflows, far | np.isnan(y))
    wrong = np.where(np.isinf(exact), y != exact, wrong)
    wrong = np.flatnonzero(np.where(np.isnan(exact), ~np.isnan(y), wrong))
    some = wrong[:3]
    assert wrong.size == 0, (
        f"{context}: {wrong.size} beyond {relative:.3g}, first at {some}: "
        f"{y.flat[some]}, expected {exact.flat[some]}"
    )


def stored(bound: float, dtype: str) -> float:
    """The bound after rounding to dtype."""
    return bound + HALF_ULP[dtype] * (1 + bound)


@each_case(ELEMENTWISE)
def test_error_is_within_the_stated_bound(results, isa, name, dtype):
    x = inputs(dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = EXACT[name](as_float64(x))
    for order in ORDERS:
        y = results(isa)[f"{name} {dtype} {order} "].astype(np.float64)
        assert_within(y, exact, stored(MAX_REL_ERROR[name][order], dtype), dtype, f"order {order}")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_double_precision_is_exact_enough_to_judge(name):
    with mpmath.workdps(40):
        for x in np.float32([-91, -40.3, -10, -5.5, -1e-3, 1e-30, 0.3, 2.7, 20, 80]):
            truth = MPMATH[name](mpmath.mpf(float(x)))
            if abs(truth) > SMALLEST_NORMAL:
                assert abs(EXACT[name](np.float64(x)) / truth - 1) < 1e-12


@pytest.mark.parametrize("isa", quake_jax.supported_isas())
@pytest.mark.parametrize("name", ["sigmoid", "silu", "gelu_tanh", "gelu_erf"])
def test_left_tail_keeps_its_relative_accuracy(results, isa, name):
    """Down to -10 for GELU and to the underflow for the others: no cancellation."""
    x = inputs("float32")
    tail = (x < -4) & (x >= (-10 if name.startswith("gelu") else -87))
    assert np.count_nonzero(tail) > 1000
    exact = EXACT[name](x[tail].astype(np.float64))
    assert np.min(np.abs(exact)) > SMALLEST_NORMAL
    for order in ORDERS:
        y = results(isa)[f"{name} float32 {order} "][tail]
        assert np.max(np.abs(y / exact - 1)) <= MAX_REL_ERROR[name][order]


@each_case(["sigmoid", "tanh"])
def test_range(results, isa, name, dtype):
    x = inputs(dtype)
    low = 0 if name == "sigmoid" else -1
    for order in ORDERS:
        y = results(isa)[f"{name} {dtype} {order} "]
        assert np.all((y >= low) & (y <= 1) | np.isnan(x.astype(np.float32)))


def exact_softmax(x):
    x = x.astype(np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@each_case(["softmax"])
def test_softmax_error_is_within_the_stated_bound(results, isa, name, dtype):
    for label, x in softmax_inputs(dtype).items():
        for order in ORDERS:
            y = results(isa)[f"softmax {dtype} {order} {label}"].astype(np.float64)
            bound = stored(MAX_REL_ERROR["softmax"][order], dtype)
            assert_within(y, exact_softmax(x), bound, dtype, f"order {order}, {label}")


def reference_tolerance(name: str, order: int) -> float:
    """How far two evaluations of one algorithm may be apart, before rounding to the output dtype.

    A few ulp; at orders 1 to 3 also the effect of rounding t = x·log2(e) twice on each side, for
    exponents of up to 134. The exponent of gelu_tanh is a rounded cubic at every order. Order 1
    rounds again when it adds 127 (2^-17).
    """
    ulp = 2.0**-23
    roundings = {"gelu_tanh": 4}.get(name, 2 if order <= 3 else 0)
    if name == "tanh":
        roundings = 0  # there a large exponent means a result of 1
    slope = 1.0 if order > 1 else 2.0
    exponent = slope * roundings * 134 * np.log(2) * 2.0**-23
    return 12 * ulp + exponent + (2.0**-16 if order == 1 else 0)


@each_case(KERNELS)
def test_kernels_agree_with_the_reference(results, isa, name, dtype):
    xs = {"": inputs(dtype)} if name != "softmax" else softmax_inputs(dtype)
    for order in ORDERS:
        for label, x in xs.items():
            expected = jax.jit(getattr(reference, name), static_argnames="order")(x, order=order)
            y = results(isa)[f"{name} {dtype} {order} {label}"].astype(np.float64)
            # Two roundings to the output dtype may differ by one of its steps.
            relative = reference_tolerance(name, order) + 2 * HALF_ULP[dtype]
            expected = np.asarray(expected, np.float64)
            assert_within(y, expected, relative, dtype, f"order {order} {label}", absolute=2)


if __name__ == "__main__":
    main(sys.argv[1])
