"""Element-wise functions with the signatures of those in jax.numpy and jax.nn that they replace.

Each is one kernel call in the forward direction. Derivatives are those of the exact function,
written with the approximate outputs, to any order and in both modes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax import _compat, _primitives
from quake_jax._config import EXACT, Order, resolved_order

# The dtypes that the kernels read and write.
KERNEL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
_ONE_OVER_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def _differentiable(name: str, kernel: Callable, derivative: Callable) -> Callable:
    """Give `kernel(x, order)` the derivative `derivative(x, y, order)`, with y = kernel(x, order).

    The derivative is computed in float32. It is itself differentiated for higher orders, so it
    may use differentiable kernels and jax.numpy only.
    """

    def call(x, order):
        return kernel(x, order)

    call.__name__ = call.__qualname__ = name  # what a printed jaxpr shows
    function = jax.custom_jvp(call, nondiff_argnums=(1,))

    @function.defjvp
    def derivative_rule(order, primals, tangents):
        (x,), (t,) = primals, tangents
        y = function(x, order)
        slope = derivative(x.astype(jnp.float32), y.astype(jnp.float32), order)
        return y, t * slope.astype(y.dtype)

    return function


# Each derivative below is finite wherever the function's is: a factor that vanishes meets an
# argument clipped to where it has already vanished, never inf. The order of a nested call is the
# one resolved for the primal, whatever default is in force when the rule is traced.


def _sigmoid_slope(x, y, order):
    return y * (1 - y)


def _silu_slope(x, y, order):
    s = _sigmoid(x, order)
    return s + jnp.clip(x, -104.0, 104.0) * (s * (1 - s))


def _tanh_slope(x, y, order):
    return (1 - y) * (1 + y)


def _gelu_tanh_slope(x, y, order):
    # y = x·σ(v) with v = √(8/π)·(x + 0.044715·x³); σ(v)·(1 - σ(v)) is 0 in float32 for |x| > 12.
    x = jnp.clip(x, -12.0, 12.0)
    s = _sigmoid(_SQRT_8_OVER_PI * (x + 0.044715 * x**3), order)
    return s + x * (s * (1 - s)) * (_SQRT_8_OVER_PI * (1 + 3 * 0.044715 * x**2))


def _normal_density(x, order):
    return _ONE_OVER_SQRT_2PI * _exp(-0.5 * x * x, order)


# Φ as a function of its own, because differentiating gelu(x) / x cancels near 0; Φ' = φ does not.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _normal_cdf(x, gelu_of_x, order):
    quotient = gelu_of_x / jnp.where(x == 0, 1.0, x)
    # Where x has been clipped it no longer fits gelu(x); Φ is 1 in float32 long before.
    return jnp.where(x == 0, 0.5, jnp.where(x >= 14, 1.0, quotient))


@_normal_cdf.defjvp
def _normal_cdf_jvp(order, primals, tangents):
    x, gelu_of_x = primals
    return _normal_cdf(x, gelu_of_x, order), tangents[0] * _normal_density(x, order)


def _gelu_erf_slope(x, y, order):
    x = jnp.clip(x, -14.0, 14.0)  # there φ(x) is 0 in float32, and Φ(x) is 0 or 1
    return _normal_cdf(x, y, order) + x * _normal_density(x, order)


_exp = _differentiable("exp", _primitives.exp, lambda x, y, order: y)
_sigmoid = _differentiable("sigmoid", _primitives.sigmoid, _sigmoid_slope)
_silu = _differentiable("silu", _primitives.silu, _silu_slope)
_tanh = _differentiable("tanh", _primitives.tanh, _tanh_slope)
_gelu_tanh = _differentiable("gelu_tanh", _primitives.gelu_tanh, _gelu_tanh_slope)
_gelu_erf = _differentiable("gelu_erf", _primitives.gelu_erf, _gelu_erf_slope)


def refuse_complex(x: jax.Array, name: str) -> None:
    """Raise TypeError if x is complex: the kernels' functions are those of a real variable."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"quake_jax.{name}: x must be real; got an array of dtype {x.dtype}")


def _drop_in(
    name: str, function: Callable, exact: Callable, *, promotes: bool, keeps_weak_type: bool = True
) -> Callable:
    """Make f(x, order) from a differentiable kernel and the exact function that it replaces.

    Whatever the kernel has no dtype for goes to the exact function: float64 for its result,
    integers that it does not promote for its error.
    """

    def call(x, order):
        if not hasattr(x, "dtype"):
            return exact(x)  # raises: a list, None, or another container
        refuse_complex(x, name)
        if promotes:
            (x,) = _compat.promote_args_inexact(name, x)
        if order == EXACT or x.dtype not in KERNEL_DTYPES:
            return exact(x)
        return function(x if keeps_weak_type else x.astype(x.dtype), order)

    call.__name__ = call.__qualname__ = f"quake_{name}"
    # Compiled, so that a call outside jit takes JAX's fast path; inlined, so that inside jit
    # the program shows the kernel and nothing around it.
    return jax.jit(call, static_argnums=1, inline=_compat.INLINE)


_exp_call = _drop_in("exp", _exp, jnp.exp, promotes=True)
_sigmoid_call = _drop_in("sigmoid", _sigmoid, jax.nn.sigmoid, promotes=False)
_silu_call = _drop_in("silu", _silu, jax.nn.silu, promotes=False)
_tanh_call = _drop_in("tanh", _tanh, jnp.tanh, promotes=True)
_gelu_calls = {
    True: _drop_in("gelu", _gelu_tanh, jax.nn.gelu, promotes=True, keeps_weak_type=False),
    False: _drop_in(
        "gelu",
        _gelu_erf,
        functools.partial(jax.nn.gelu, approximate=False),
        promotes=True,
        keeps_weak_type=False,
    ),
}


def exp(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """Exponential, e^x: `jax.numpy.exp` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape. float32, bfloat16 and float16 use the kernel; integers and bool
        are promoted as by `jax.numpy.exp`; other floating-point dtypes get the exact function.
      order: accuracy. 1 to 5 is the degree of the polynomial for 2^f on [0, 1); the largest
        relative error is 3e-2, 2.7e-3, 1.1e-4, 3.6e-6, 2.5e-7. "exact" is `jax.numpy.exp`. None
        is the default in force (see `default_order`).

    Returns:
      An array of x's shape and (promoted) dtype. Results below the smallest normal float32 are 0.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is none of these.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.exp(jnp.array([0.0, 1.0]), order=5)
    """
    return _exp_call(x, resolved_order(order, "exp"))


def sigmoid(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Logistic function, 1 / (1 + e^-x): `jax.nn.sigmoid` with QuAKE (arXiv 2412.00408).

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and dtype, with values from 0 to 1.

    Raises:
      TypeError: if x is complex, integer or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.sigmoid(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _sigmoid_call(x, resolved_order(order, "sigmoid"))


def silu(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """SiLU or swish, x · sigmoid(x): `jax.nn.silu` with QuAKE (arXiv 2412.00408).

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is complex, integer or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.silu(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _silu_call(x, resolved_order(order, "silu"))


swish = silu


def tanh(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """Hyperbolic tangent: `jax.numpy.tanh` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.numpy.tanh`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of x's shape and (promoted) dtype, with values from -1 to 1.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.tanh(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _tanh_call(x, resolved_order(order, "tanh"))


def gelu(x: ArrayLike, approximate: bool = True, *, order: Order | None = None) -> jax.Array:
    """Gaussian error linear unit: `jax.nn.gelu` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.gelu`.
      approximate: True for the tanh form x · sigmoid(√(8/π)·(x + 0.044715·x³)), False for x · Φ(x)
        with Φ the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415).
      order: accuracy with which the chosen form is computed, as in `exp`.

    Returns:
      An array of x's shape and (promoted) dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.gelu(jnp.array([-1.0, 0.0, 1.0]), approximate=False)
    """
    return _gelu_calls[bool(approximate)](x, resolved_order(order, "gelu"))
