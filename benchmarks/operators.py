"""The measured operators in jax.nn, in quake_jax, and exactly (NumPy in float64).

Importing this module imports JAX: `environment.prepare` comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from benchmarks.cases import Case
from benchmarks.errors import BenchmarkError

JAX_NN: dict[str, Callable] = {
    "softmax": jax.nn.softmax,
    "exp": jnp.exp,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "gelu_tanh": jax.nn.gelu,
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
}

EXACT: dict[str, Callable] = {
    "softmax": partial(special.softmax, axis=-1),
    "exp": np.exp,
    "sigmoid": special.expit,
    "silu": lambda x: x * special.expit(x),
    "tanh": np.tanh,
    "gelu_tanh": lambda x: x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    "gelu_erf": lambda x: x * special.ndtr(x),
}

# Errors are relative, for results of at least this share of the largest one.
ERROR_FLOOR = 1e-3


def quake(function: str, order: int) -> Callable:
    """The operator in quake_jax.

    Args:
        function: A name of `cases.FUNCTIONS`.
        order: Order of the approximation.

    Returns:
        A function of one array.

    Raises:
        BenchmarkError: quake_jax cannot be imported.
    """
    try:
        import quake_jax
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"{error.name} is not installed: pip install '.[bench]'") from error
    except ImportError as error:  # a stale build or an unknown instruction set; it says which
        raise BenchmarkError(str(error).splitlines()[0]) from error
    keywords = {"gelu_tanh": {"approximate": True}, "gelu_erf": {"approximate": False}}
    operator = getattr(quake_jax, function.partition("_")[0])
    return partial(operator, order=order, **keywords.get(function, {}))


def inputs(case: Case) -> np.ndarray:
    """Draw the input of a case: independent N(0, 2²), the spread of attention logits."""
    values = np.random.default_rng(0).standard_normal(case.shape, dtype=np.float32)
    values *= 2
    return values.astype(jnp.dtype(case.dtype))


def relative_error(function: str, x: np.ndarray, y: np.ndarray) -> float:
    """Largest relative error of `y` as the operator's result for `x`.

    Args:
        function: A name of `cases.FUNCTIONS`.
        x: Input of shape (rows, columns), any float dtype.
        y: Result of the same shape.

    Returns:
        The largest error relative to the exact result for the rounded input, over the results of
        at least `ERROR_FLOOR` times the largest.
    """
    exact = EXACT[function](x.astype(np.float64))
    magnitude = np.abs(exact)
    counted = magnitude >= ERROR_FLOOR * magnitude.max()
    return float(np.max(np.abs(y.astype(np.float64) - exact)[counted] / magnitude[counted]))
