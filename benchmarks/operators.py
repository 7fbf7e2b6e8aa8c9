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

from benchmarks.cases import CELU_ALPHA, Case
from benchmarks.errors import BenchmarkError

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
QUICK_GELU_SLOPE = 1.702

JAX_NN: dict[str, Callable] = {
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "logsumexp": partial(jax.nn.logsumexp, axis=-1),
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "sigmoid": jax.nn.sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "gelu_tanh": jax.nn.gelu,
    "gelu_erf": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(QUICK_GELU_SLOPE * x),
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": partial(jax.nn.celu, alpha=CELU_ALPHA),
    "logaddexp": jnp.logaddexp,
    "bias_gelu": lambda x, bias: jax.nn.gelu(x + bias),
    "bias_silu": lambda x, bias: jax.nn.silu(x + bias),
    "glu": jax.nn.glu,
    "swiglu": lambda gate, value: jax.nn.silu(gate) * value,
    "geglu": lambda gate, value: jax.nn.gelu(gate) * value,
}

# Names and keywords in quake_jax where they are not simply ours.
QUAKE: dict[str, tuple[str, dict]] = {
    "gelu_tanh": ("gelu", {"approximate": True}),
    "gelu_erf": ("gelu", {"approximate": False}),
    "celu": ("celu", {"alpha": CELU_ALPHA}),
    "logsumexp": ("logsumexp", {"axis": -1}),
}


def _silu(x):
    return x * special.expit(x)


def _gelu_tanh(x):
    return x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def _softplus(x):
    return np.logaddexp(x, 0)


def _elu(x, alpha=1.0, width=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) / width))


def _glu(x):
    value, gate = np.split(x, 2, axis=-1)
    return value * special.expit(gate)


EXACT: dict[str, Callable] = {
    "softmax": partial(special.softmax, axis=-1),
    "log_softmax": partial(special.log_softmax, axis=-1),
    "logsumexp": partial(special.logsumexp, axis=-1, keepdims=True),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "sigmoid": special.expit,
    "log_sigmoid": lambda x: -_softplus(-x),
    "silu": _silu,
    "tanh": np.tanh,
    "softplus": _softplus,
    "gelu_tanh": _gelu_tanh,
    "gelu_erf": lambda x: x * special.ndtr(x),
    "quick_gelu": lambda x: x * special.expit(QUICK_GELU_SLOPE * x),
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "elu": _elu,
    "selu": lambda x: SELU_SCALE * _elu(x, SELU_ALPHA),
    "celu": lambda x: _elu(x, CELU_ALPHA, CELU_ALPHA),
    "logaddexp": np.logaddexp,
    "bias_gelu": lambda x, bias: _gelu_tanh(x + bias),
    "bias_silu": lambda x, bias: _silu(x + bias),
    "glu": _glu,
    "swiglu": lambda gate, value: _silu(gate) * value,
    "geglu": lambda gate, value: _gelu_tanh(gate) * value,
}

# Errors are relative, for results of at least this share of the largest one.
ERROR_FLOOR = 1e-3
# These pass zero where terms of about 1 cancel: there the error is relative to 1.
CANCELLING = ("logaddexp", "logsumexp")


def quake(function: str, order: int) -> Callable:
    """The operator in quake_jax.

    Args:
        function: A name of `cases.FUNCTIONS`.
        order: Order of the approximation.

    Returns:
        A function of as many arrays as the operator has operands.

    Raises:
        BenchmarkError: quake_jax cannot be imported.
    """
    try:
        import quake_jax
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"{error.name} is not installed: pip install '.[bench]'") from error
    except ImportError as error:  # a stale build or an unknown instruction set; it says which
        raise BenchmarkError(str(error).splitlines()[0]) from error
    name, keywords = QUAKE.get(function, (function, {}))
    return partial(getattr(quake_jax, name), order=order, **keywords)


def inputs(case: Case) -> list[np.ndarray]:
    """Draw the operands of a case: independent N(0, 2²), the spread of attention logits."""
    random = np.random.default_rng(0)
    drawn = []
    for shape in case.operand_shapes:
        values = random.standard_normal(shape, dtype=np.float32)
        values *= 2
        drawn.append(values.astype(jnp.dtype(case.dtype)))
    return drawn


def exact(function: str, operands: list[np.ndarray]) -> np.ndarray:
    """The exact result for the rounded operands, in float64."""
    return EXACT[function](*(operand.astype(np.float64) for operand in operands))


def relative_error(function: str, wanted: np.ndarray, y: np.ndarray) -> float:
    """Largest relative error of `y`.

    Args:
        function: A name of `cases.FUNCTIONS`.
        wanted: The exact result.
        y: The result of the same shape, any float dtype.

    Returns:
        The largest error relative to the exact result, over the results of at least `ERROR_FLOOR`
        times the largest.
    """
    magnitude = np.abs(wanted)
    counted = magnitude >= ERROR_FLOOR * magnitude.max()
    if function in CANCELLING:
        magnitude = np.maximum(magnitude, 1)
    return float(np.max(np.abs(y.astype(np.float64) - wanted)[counted] / magnitude[counted]))
