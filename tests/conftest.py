"""Eight CPU devices for the sharding tests, and what several test files share: functions, bounds,
subprocesses.
"""

import os

# XLA reads this when its backend starts, so it comes before anything that imports jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quake_jax
from quake_jax._constants import MAX_REL_ERROR

DTYPES = ("float32", "bfloat16", "float16")


def in_float64(function: Callable, *arguments, **keywords) -> np.ndarray:
    """Call an exact function in double precision."""
    with jax.enable_x64(True):
        arguments = [np.asarray(a, np.float64) for a in arguments]
        return np.asarray(function(*arguments, **keywords))


@dataclasses.dataclass(frozen=True)
class Function:
    """A public function with the exact one that it replaces."""

    name: str
    quake: Callable
    exact: Callable
    primitive: str
    # The exact function in a form that keeps its relative accuracy in float64.
    formula: Callable | None = None

    def expected(self, x, **keywords) -> np.ndarray:
        """The exact values, in double precision."""
        return in_float64(self.formula or self.exact, x, **keywords)

    def bound(self, order: int, dtype="float32") -> float:
        """Bound of the relative error where the result is normal, rounding to dtype included."""
        error = MAX_REL_ERROR[self.name][order]
        store = 0.0 if jnp.dtype(dtype) == jnp.float32 else float(jnp.finfo(dtype).eps) / 2
        return error * (1 + store) + store


def _gelu_erf(x, *, order=None):
    return quake_jax.gelu(x, approximate=False, order=order)


def _gelu_erf_exact(x):
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh_formula(x):
    # jax.nn.gelu cancels in the left tail: 1 + tanh(v/2) = 2·sigmoid(v).
    return x * jax.nn.sigmoid(jnp.sqrt(8 / jnp.pi) * (x + 0.044715 * x**3))


ELEMENTWISE = (
    Function("exp", quake_jax.exp, jnp.exp, "quake_exp"),
    Function("sigmoid", quake_jax.sigmoid, jax.nn.sigmoid, "quake_sigmoid"),
    Function("silu", quake_jax.silu, jax.nn.silu, "quake_silu"),
    Function("tanh", quake_jax.tanh, jnp.tanh, "quake_tanh"),
    Function(
        "gelu_tanh",
        quake_jax.gelu,
        jax.nn.gelu,
        "quake_gelu_tanh",
        formula=_gelu_tanh_formula,
    ),
    Function("gelu_erf", _gelu_erf, _gelu_erf_exact, "quake_gelu_erf"),
)
SOFTMAX = Function("softmax", quake_jax.softmax, jax.nn.softmax, "quake_softmax")
FUNCTIONS = (*ELEMENTWISE, SOFTMAX)


def parametrize_functions(functions=FUNCTIONS):
    return pytest.mark.parametrize("function", functions, ids=lambda f: f.name)


def inputs(shape, dtype="float32", seed: int = 0):
    """Uniform values from -8 to 8."""
    values = np.random.default_rng(seed).uniform(-8, 8, shape)
    return jnp.asarray(values.astype(np.float32), dtype)


def assert_within(actual, expected, bound: float) -> None:
    """Assert relative errors of at most `bound`, or of the smallest normal number below that."""
    actual = jnp.asarray(actual)
    tiny = float(jnp.finfo(actual.dtype).tiny)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=bound, atol=2 * tiny)


def run_python(code: str, folder, check: bool = True, **environment) -> subprocess.CompletedProcess:
    """Run code in a new interpreter that imports the same quake_jax, from a folder of its own."""
    package = pathlib.Path(quake_jax.__file__).resolve().parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package), "XLA_FLAGS": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if check:
        assert result.returncode == 0, result.stderr
    return result
