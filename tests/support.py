"""What several test files share: functions, bounds, subprocesses."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.special

import quake_jax
from quake_jax._core import config
from quake_jax._core.constants import MAX_ABS_ERROR, MAX_REL_ERROR
from quake_jax._elementwise import table

# XLA's flags for processes that are to have one device.
ONE_DEVICE = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip()

DTYPES = ("float32", "bfloat16", "float16")
ORDERS = (1, 2, 3, 4, 5)


@contextlib.contextmanager
def compiled_as_users_do():
    """With XLA's optimizations, which tests do without (conftest.py)."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def in_float64(function: Callable, *arguments, **keywords):
    """Call an exact function in double precision."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: np.asarray(a, np.float64), arguments)
        return jax.tree.map(np.asarray, function(*arguments, **keywords))


def one(shape):
    return (shape,)


def two(shape):
    return (shape, shape)


def with_bias(shape):
    return (shape, shape[-1:])


def twice_as_wide(shape):
    return ((*shape[:-1], 2 * shape[-1]),)


def halves(x, gate_first: bool, m=np) -> list:
    """The gate and the value that lie side by side in an array; `m` is its library."""
    return m.split(x, 2, -1)[:: 1 if gate_first else -1]


@dataclasses.dataclass(frozen=True)
class Function:
    """A kernel as the public function that calls it, with the exact function that it replaces."""

    name: str  # of the kernel: its FFI target is quake_jax_<name>
    quake: Callable
    exact: Callable
    # Element-wise functions: the values at 0, +inf and -inf, and the function in mpmath.
    limits: tuple[float, float, float] | None = None
    truth: Callable | None = None
    # The function in NumPy, in a form that keeps its relative accuracy in float64.
    formula: Callable | None = None
    # The kernel whose error bound holds, if it has none of its own.
    bound_of: str | None = None
    # The public function, whose default order it uses.
    public: str | None = None
    # The shapes of the operands that belong to one shape, which is the result's.
    operands: Callable = one
    drops_axis: bool = False  # the result lacks the last axis
    primitive: str = ""  # its name, if not that of the kernel with "quake_" before it

    def expected(self, *x, **keywords) -> np.ndarray:
        """The exact values, in double precision."""
        if self.formula is None:
            return in_float64(self.exact, *x, **keywords)
        return self.formula(*(np.asarray(a, np.float64) for a in x))

    def inputs(self, shape, dtype="float32", seed: int = 0, scale: float = 1) -> tuple:
        """Operands with uniform values from -8 to 8, times `scale`."""
        shapes = self.operands(shape)
        return tuple(scale * inputs(s, dtype, seed + k) for k, s in enumerate(shapes))

    def result_shape(self, shape) -> tuple:
        return shape[:-1] if self.drops_axis else shape

    def __post_init__(self):
        object.__setattr__(self, "primitive", self.primitive or f"quake_{self.name}")

    @property
    def default_order(self) -> int:
        return config.DEFAULT_ORDERS.get(self.public or self.name, config.DEFAULT_ORDER)

    def bound(self, order: int, dtype="float32") -> float:
        """Bound of the relative error where the result is normal, rounding to dtype included.

        For logarithms, a bound of the absolute error.
        """
        name = self.bound_of or self.name
        error = MAX_REL_ERROR[name][order] if name in MAX_REL_ERROR else MAX_ABS_ERROR[name][order]
        error += 0 if self.operands is one else 2.0**-22  # a product or a sum beside the kernel
        store = 0.0 if jnp.dtype(dtype) == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
        return error * (1 + store) + store

    def assert_within(self, actual, expected, order: int, dtype="float32") -> None:
        """Assert that results have at most the error that is stated for this function."""
        bound = self.bound(order, dtype)
        absolute = 0.0
        if self.name in MAX_ABS_ERROR:
            store = 0.0 if jnp.dtype(dtype) == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
            absolute, bound = MAX_ABS_ERROR[self.name][order], 2.0**-22 + store
        assert_within(actual, expected, bound, absolute)


class _Mpmath:
    """The functions that formulas of the table use, of numbers of mpmath."""

    def where(self, condition, x, y):
        return x if condition else y

    def __getattr__(self, name: str):
        return getattr(mpmath, name)


# The same, of arrays of NumPy, where nothing is compiled for a new shape.
_NUMPY = types.SimpleNamespace(**vars(np), erfc=scipy.special.erfc)


def _in_numpy(kernel) -> Callable:
    """A kernel's formula of arrays, infinities included."""
    _, top, bottom = kernel.limits

    def formula(x):
        with np.errstate(all="ignore"):
            y = kernel.formula(_NUMPY, x)
        return np.where(x == np.inf, top, np.where(x == -np.inf, bottom, y))

    return formula


def _of_row(row) -> Function:
    kernel = row.kernel
    return Function(
        row.name,
        row.quake,
        row.exact,
        kernel.limits,
        functools.partial(kernel.formula, _Mpmath()),
        _in_numpy(kernel),
        bound_of=kernel.shares,
        public=row.public.__name__,
        primitive=f"quake_{kernel.shares or row.name}",
    )


ELEMENTWISE = tuple(map(_of_row, table.FUNCTIONS.values()))
# Those with a kernel of their own.
KERNELS = tuple(f for f in ELEMENTWISE if f.bound_of is None)
LOGADDEXP = Function(
    "logaddexp", quake_jax.logaddexp, jnp.logaddexp, formula=np.logaddexp, operands=two
)
_BY_NAME = {f.name: f for f in ELEMENTWISE}


def _of_fused(row) -> Function:
    """An activation fused with what stands beside it."""
    activation = _BY_NAME[row.activation]
    exact, formula = activation.exact, activation.formula
    common = {"bound_of": activation.name, "public": row.public.__name__}
    if row.kind == "biased":
        return Function(
            row.name,
            row.quake,
            lambda x, b: exact(x + b),
            # The sum is one of float32, whose rounding the tail of an activation magnifies.
            formula=lambda x, b: formula((x + b).astype(np.float32).astype(np.float64)),
            operands=with_bias,
            **common,
        )

    def gated(f, m):
        if row.kind == "gated":
            return lambda gate, value: f(gate) * value

        def of_both(x):
            gate, value = halves(x, row.gate_first, m)
            return f(gate) * value

        return of_both

    operands = two if row.kind == "gated" else twice_as_wide
    return Function(
        row.name,
        row.quake,
        gated(exact, jnp),
        formula=gated(formula, np),
        operands=operands,
        **common,
    )


_FUSED = {name: _of_fused(row) for name, row in table.FUSED.items()}


def _of_kind(kind: str) -> tuple[Function, ...]:
    return tuple(_FUSED[name] for name, row in table.FUSED.items() if row.kind == kind)


PAIRS = (LOGADDEXP, *_of_kind("gated"))
SPLITS = _of_kind("split")
BIASED = _of_kind("biased")
SWIGLU, SWIGLU_SPLIT, GLU = (_FUSED[name] for name in ("swiglu", "swiglu_split", "glu_split"))
SOFTMAX = Function("softmax", quake_jax.softmax, jax.nn.softmax)
LOG_SOFTMAX = Function("log_softmax", quake_jax.log_softmax, jax.nn.log_softmax)
LOGSUMEXP = Function(
    "logsumexp",
    functools.partial(quake_jax.logsumexp, axis=-1),
    functools.partial(jax.nn.logsumexp, axis=-1),
    drops_axis=True,
)
ROWS = (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP)
# What is one element of each operand for one element of the result.
POINTWISE = (*ELEMENTWISE, *PAIRS)
FUNCTIONS = (*POINTWISE, *SPLITS, *BIASED, *ROWS)
# One of each family, for tests of what a family has in common.
FAMILIES = (ELEMENTWISE[0], LOGADDEXP, SWIGLU, GLU, BIASED[0], *ROWS)


def takes(function: Function, dtype: str) -> bool:
    """Whether the exact function takes operands of a dtype."""
    operands = [jax.ShapeDtypeStruct(s, dtype) for s in function.operands((4,))]
    try:
        jax.eval_shape(function.exact, *operands)
    except TypeError:
        return False
    return True


def parametrize_functions(functions=FUNCTIONS):
    return pytest.mark.parametrize("function", functions, ids=lambda f: f.name)


def on_device(values, dtype=None) -> jax.Array:
    """What `jnp.asarray` gives, which compiles a program for each shape and pair of dtypes."""
    values = np.asarray(values)
    return jax.device_put(values.astype(jnp.dtype(dtype or values.dtype)))


def inputs(shape, dtype="float32", seed: int = 0):
    """Uniform values from -8 to 8."""
    values = np.random.default_rng(seed).uniform(-8, 8, shape)
    return on_device(values.astype(np.float32), dtype)


def orders_in(jaxpr) -> list[int]:
    """The orders of the kernels in a program, as `jax.make_jaxpr` returns it."""
    return [int(order) for order in re.findall(r"\border=(\d)", str(jaxpr))]


def assert_within(actual, expected, bound: float, absolute: float = 0.0) -> None:
    """Assert relative errors of at most `bound`, or of the smallest normal number below that."""
    actual = jnp.asarray(actual)
    absolute += 2 * float(jnp.finfo(actual.dtype).tiny)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=bound, atol=absolute)


def run_python(code: str, folder, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run code in a new interpreter that imports the same quake_jax, from a folder of its own."""
    package = pathlib.Path(quake_jax.__file__).resolve().parent.parent
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "XLA_FLAGS": ONE_DEVICE,
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,  # against hangs only
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


# The repository's.
ROOT = pathlib.Path(__file__).resolve().parent.parent


def weights_like(*shape, seed=0) -> np.ndarray:
    """Normally distributed weights (…, K, N) that keep the size of what they multiply."""
    scale = np.sqrt(shape[-2]) if len(shape) > 1 else 1.0
    return (np.random.default_rng(seed).normal(size=shape) / scale).astype(np.float32)
