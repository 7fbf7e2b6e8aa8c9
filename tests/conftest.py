"""Eight CPU devices for the sharding tests, and what several test files share: functions, bounds,
subprocesses.
"""

import os

# XLA reads this when its backend starts, so it comes before anything that imports jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# NumPy's float64 products are small; with threads of their own they would wait for cores that the
# other process of pytest-xdist, and XLA, have.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import quake_jax
from quake_jax._core import config
from quake_jax._core.constants import MAX_ABS_ERROR, MAX_REL_ERROR

DTYPES = ("float32", "bfloat16", "float16")
ORDERS = (1, 2, 3, 4, 5)


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


@dataclasses.dataclass(frozen=True)
class Function:
    """A kernel as the public function that calls it, with the exact function that it replaces."""

    name: str  # of the kernel: its FFI target is quake_jax_<name>
    quake: Callable
    exact: Callable
    # Element-wise functions: the values at 0, +inf and -inf, and the same in mpmath.
    limits: tuple[float, float, float] | None = None
    truth: Callable | None = None
    # The exact function in a form that keeps its relative accuracy in float64.
    formula: Callable | None = None
    # The kernel whose error bound holds, if it has none of its own.
    bound_of: str | None = None
    # The public function, whose default order it uses.
    public: str | None = None
    # The shapes of the operands that belong to one shape, which is the result's.
    operands: Callable = one
    drops_axis: bool = False  # the result lacks the last axis

    def expected(self, *x, **keywords) -> np.ndarray:
        """The exact values, in double precision."""
        return in_float64(self.formula or self.exact, *x, **keywords)

    def inputs(self, shape, dtype="float32", seed: int = 0, scale: float = 1) -> tuple:
        """Operands with uniform values from -8 to 8, times `scale`."""
        shapes = self.operands(shape)
        return tuple(scale * inputs(s, dtype, seed + k) for k, s in enumerate(shapes))

    def result_shape(self, shape) -> tuple:
        return shape[:-1] if self.drops_axis else shape

    @property
    def primitive(self) -> str:
        return f"quake_{self.name}"

    @property
    def default_order(self) -> int:
        return config.DEFAULT_ORDERS.get(self.public or self.name, config.DEFAULT_ORDER)

    def bound(self, order: int, dtype="float32") -> float:
        """Bound of the relative error where the result is normal, rounding to dtype included.

        For logarithms, a bound of the absolute error.
        """
        name = self.bound_of or self.name
        error = MAX_REL_ERROR[name][order] if name in MAX_REL_ERROR else MAX_ABS_ERROR[name][order]
        error += 0 if name == self.name else 2.0**-22  # a product or a sum beside the kernel
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


def _gelu_tanh_formula(x):
    # jax.nn.gelu cancels in the left tail: 1 + tanh(v/2) = 2·sigmoid(v).
    return x * jax.nn.sigmoid(jnp.sqrt(8 / jnp.pi) * (x + 0.044715 * x**3))


def _gelu_tanh_truth(x):
    v = mpmath.sqrt(8 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x / (1 + mpmath.exp(-v))


def _elu_truth(x, scale=1, alpha=1):
    return scale * (x if x > 0 else alpha * mpmath.expm1(x))


def _halves(x):
    return jnp.split(x, 2, -1)


gelu_erf = functools.partial(quake_jax.gelu, approximate=False)
exact_gelu_erf = functools.partial(jax.nn.gelu, approximate=False)

_SELU = {
    "scale": mpmath.mpf("1.0507009873554804934193349852946"),
    "alpha": mpmath.mpf("1.6732632423543772848170429916717"),
}
_INF = np.inf

ELEMENTWISE = (
    Function("exp", quake_jax.exp, jnp.exp, (1, _INF, 0), mpmath.exp),
    Function("exp2", quake_jax.exp2, jnp.exp2, (1, _INF, 0), lambda x: mpmath.mpf(2) ** x),
    Function("expm1", quake_jax.expm1, jnp.expm1, (0, _INF, -1), mpmath.expm1),
    Function(
        "sigmoid",
        quake_jax.sigmoid,
        jax.nn.sigmoid,
        (0.5, 1, 0),
        lambda x: 1 / (1 + mpmath.exp(-x)),
    ),
    Function(
        "log_sigmoid",
        quake_jax.log_sigmoid,
        jax.nn.log_sigmoid,
        (-np.log(2), 0, -_INF),
        lambda x: -mpmath.log1p(mpmath.exp(-x)),
    ),
    Function(
        "softplus",
        quake_jax.softplus,
        jax.nn.softplus,
        (np.log(2), _INF, 0),
        lambda x: mpmath.log1p(mpmath.exp(x)),
    ),
    Function("silu", quake_jax.silu, jax.nn.silu, (0, _INF, 0), lambda x: x / (1 + mpmath.exp(-x))),
    Function(
        "mish",
        quake_jax.mish,
        jax.nn.mish,
        (0, _INF, 0),
        lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    ),
    Function(
        "quick_gelu",
        quake_jax.quick_gelu,
        lambda x: x * jax.nn.sigmoid(1.702 * x),
        (0, _INF, 0),
        lambda x: x / (1 + mpmath.exp(-mpmath.mpf("1.702") * x)),
    ),
    Function("elu", quake_jax.elu, jax.nn.elu, (0, _INF, -1), _elu_truth),
    Function(
        "selu",
        quake_jax.selu,
        jax.nn.selu,
        (0, _INF, -float(_SELU["scale"] * _SELU["alpha"])),
        functools.partial(_elu_truth, **_SELU),
    ),
    Function("tanh", quake_jax.tanh, jnp.tanh, (0, 1, -1), mpmath.tanh),
    Function(
        "gelu_tanh",
        quake_jax.gelu,
        jax.nn.gelu,
        (0, _INF, 0),
        _gelu_tanh_truth,
        formula=_gelu_tanh_formula,
        public="gelu",
    ),
    Function(
        "gelu_erf",
        gelu_erf,
        exact_gelu_erf,
        (0, _INF, 0),
        lambda x: x * mpmath.ncdf(x),
        public="gelu",
    ),
)
LOGADDEXP = Function("logaddexp", quake_jax.logaddexp, jnp.logaddexp, operands=two)
# The activations of gated and biased kernels: the exact one, and a form accurate in its tail.
_ACTIVATIONS = {f.name: (f.exact, f.formula or f.exact) for f in ELEMENTWISE}


def _gated(name, quake, activation, public=None, gate_first=True):
    """The functions of a gate and a value, and of one array that holds both."""
    exact, formula = _ACTIVATIONS[activation]

    def halves(x):
        return _halves(x) if gate_first else reversed(_halves(x))

    common = {"bound_of": activation, "public": public or name}
    pair = Function(
        name,
        quake,
        lambda g, v: exact(g) * v,
        formula=lambda g, v: formula(g) * v,
        operands=two,
        **common,
    )

    def exact_split(x):
        gate, value = halves(x)
        return exact(gate) * value

    def formula_split(x):
        gate, value = halves(x)
        return formula(gate) * value

    split = Function(
        f"{name}_split",
        quake,
        exact_split,
        formula=formula_split,
        operands=twice_as_wide,
        **common,
    )
    return pair, split


def _biased(name, quake, activation, public=None):
    exact, formula = _ACTIVATIONS[activation]
    return Function(
        name,
        quake,
        lambda x, b: exact(x + b),
        # The sum is one of float32, whose rounding the tail of an activation magnifies.
        formula=lambda x, b: formula((x + b).astype(jnp.float32).astype(jnp.float64)),
        bound_of=activation,
        public=public,
        operands=with_bias,
    )


SWIGLU, SWIGLU_SPLIT = _gated("swiglu", quake_jax.swiglu, "silu")
GEGLU_TANH, GEGLU_TANH_SPLIT = _gated("geglu_tanh", quake_jax.geglu, "gelu_tanh", "geglu")
GEGLU_ERF, GEGLU_ERF_SPLIT = _gated(
    "geglu_erf", functools.partial(quake_jax.geglu, approximate=False), "gelu_erf", "geglu"
)
_, GLU = _gated("glu", quake_jax.glu, "sigmoid", gate_first=False)
PAIRS = (LOGADDEXP, SWIGLU, GEGLU_TANH, GEGLU_ERF)
SPLITS = (GLU, SWIGLU_SPLIT, GEGLU_TANH_SPLIT, GEGLU_ERF_SPLIT)
BIASED = (
    _biased("bias_silu", quake_jax.bias_silu, "silu"),
    _biased("bias_gelu_tanh", quake_jax.bias_gelu, "gelu_tanh", "bias_gelu"),
    _biased(
        "bias_gelu_erf",
        functools.partial(quake_jax.bias_gelu, approximate=False),
        "gelu_erf",
        "bias_gelu",
    ),
)
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


def parametrize_functions(functions=FUNCTIONS):
    return pytest.mark.parametrize("function", functions, ids=lambda f: f.name)


def inputs(shape, dtype="float32", seed: int = 0):
    """Uniform values from -8 to 8."""
    values = np.random.default_rng(seed).uniform(-8, 8, shape)
    return jnp.asarray(values.astype(np.float32), dtype)


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
            "XLA_FLAGS": "",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,  # against hangs only
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result


ROOT = pathlib.Path(__file__).resolve().parent.parent
# benchmarks is not installed; at the end of the path, the folder hides nothing that is.
sys.path.append(str(ROOT))


@pytest.fixture
def run_benchmarks() -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs `python -m benchmarks ARGUMENTS`."""

    def run(subcommand: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "XLA_FLAGS": ""}
        if subcommand in ("quality", "approximations"):
            # The models that they try compile for longer than they run.
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", subcommand, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,  # against hangs only
        )

    return run
