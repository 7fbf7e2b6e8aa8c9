"""Element-wise functions with the signatures of those in jax.numpy and jax.nn that they replace.

Each is one kernel call in the forward direction. Derivatives are those of the exact function,
written with the approximate outputs, to any order and in both modes.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._config import Order, resolved_order
from quake_jax._drop_in import drop_in, static_bool, unary
from quake_jax.reference import SELU_ALPHA, SELU_SCALE

_LN2 = math.log(2)
_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
_ONE_OVER_SQRT_2PI = 1 / math.sqrt(2 * math.pi)

# Each derivative below is finite wherever the function's is: a factor that vanishes meets an
# argument clipped to where it has already vanished, never inf. The order of a nested call is the
# one resolved for the primal, whatever default is in force when the rule is traced.


def sigmoid_slope(x, y, order):
    return y * (1 - y)


def silu_slope(x, y, order):
    s = sigmoid_kernel(x, order=order)
    return s + jnp.clip(x, -104.0, 104.0) * (s * (1 - s))


def gelu_tanh_slope(x, y, order):
    # y = x·σ(v) with v = √(8/π)·(x + 0.044715·x³); σ(v)·(1 - σ(v)) is 0 in float32 for |x| > 12.
    x = jnp.clip(x, -12.0, 12.0)
    s = sigmoid_kernel(_SQRT_8_OVER_PI * (x + 0.044715 * x**3), order=order)
    return s + x * (s * (1 - s)) * (_SQRT_8_OVER_PI * (1 + 3 * 0.044715 * x**2))


def _normal_density(x, order):
    return _ONE_OVER_SQRT_2PI * exp_kernel(-0.5 * x * x, order=order)


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


def gelu_erf_slope(x, y, order):
    x = jnp.clip(x, -14.0, 14.0)  # there φ(x) is 0 in float32, and Φ(x) is 0 or 1
    return _normal_cdf(x, y, order) + x * _normal_density(x, order)


def _mish_slope(x, y, order):
    # y = x·T with T = tanh(softplus(x)); 1 - T² is 0 in float32 for x > 10.
    t = _tanh(_softplus(x, order=order), order=order)
    s = sigmoid_kernel(x, order=order)
    return t + jnp.clip(x, -104.0, 104.0) * ((1 - t) * (1 + t) * s)


def _quick_gelu_slope(x, y, order):
    s = sigmoid_kernel(1.702 * x, order=order)
    return s + jnp.clip(1.702 * x, -104.0, 104.0) * (s * (1 - s))


exp_kernel = unary("exp", lambda x, y, order: y)
_exp2 = unary("exp2", lambda x, y, order: _LN2 * y)
_expm1 = unary("expm1", lambda x, y, order: y + 1)
_tanh = unary("tanh", lambda x, y, order: (1 - y) * (1 + y))
sigmoid_kernel = unary("sigmoid", sigmoid_slope)
_log_sigmoid = unary("log_sigmoid", lambda x, y, order: sigmoid_kernel(-x, order=order))
_softplus = unary("softplus", lambda x, y, order: sigmoid_kernel(x, order=order))
silu_kernel = unary("silu", silu_slope)
_mish = unary("mish", _mish_slope)
_quick_gelu = unary("quick_gelu", _quick_gelu_slope)
_elu = unary("elu", lambda x, y, order: jnp.where(x > 0, 1.0, y + 1))
_selu = unary("selu", lambda x, y, order: jnp.where(x > 0, SELU_SCALE, y + SELU_SCALE * SELU_ALPHA))
gelu_tanh_kernel = unary("gelu_tanh", gelu_tanh_slope)
gelu_erf_kernel = unary("gelu_erf", gelu_erf_slope)


def _elu_of_any_alpha(x, alpha, *, order):
    x, alpha, dtype = x.astype(jnp.float32), alpha.astype(jnp.float32), x.dtype
    # The kernel sees no large x, whose result would be inf and its derivative inf · 0.
    low = _expm1(jnp.where(x > 0, 0.0, x), order=order)
    return jnp.where(x > 0, x, alpha * low).astype(dtype)


def _celu_of_any_alpha(x, alpha, *, order):
    x, alpha, dtype = x.astype(jnp.float32), alpha.astype(jnp.float32), x.dtype
    low = _expm1(jnp.where(x > 0, 0.0, x) / alpha, order=order)
    return jnp.where(x > 0, x, alpha * low).astype(dtype)


def _exact_quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def _exact_gelu_erf(x):
    return jax.nn.gelu(x, approximate=False)


_exp_call = drop_in("exp", exp_kernel, jnp.exp)
_exp2_call = drop_in("exp2", _exp2, jnp.exp2)
_expm1_call = drop_in("expm1", _expm1, jnp.expm1)
_sigmoid_call = drop_in("sigmoid", sigmoid_kernel, jax.nn.sigmoid)
_log_sigmoid_call = drop_in("log_sigmoid", _log_sigmoid, jax.nn.log_sigmoid)
_softplus_call = drop_in("softplus", _softplus, jax.nn.softplus)
_silu_call = drop_in("silu", silu_kernel, jax.nn.silu)
_mish_call = drop_in("mish", _mish, jax.nn.mish)
_quick_gelu_call = drop_in("quick_gelu", _quick_gelu, _exact_quick_gelu)
_elu_call = drop_in("elu", _elu, jax.nn.elu)
_elu_alpha_call = drop_in("elu", _elu_of_any_alpha, jax.nn.elu, arrays=["x", "alpha"])
_celu_call = drop_in("celu", _elu, jax.nn.celu)
_celu_alpha_call = drop_in("celu", _celu_of_any_alpha, jax.nn.celu, arrays=["x", "alpha"])
_selu_call = drop_in("selu", _selu, jax.nn.selu)
_tanh_call = drop_in("tanh", _tanh, jnp.tanh)
_gelu_calls = {
    True: drop_in("gelu", gelu_tanh_kernel, jax.nn.gelu),
    False: drop_in("gelu", gelu_erf_kernel, _exact_gelu_erf),
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
    return _exp_call(resolved_order(order, "exp"), x)


def exp2(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """Power of two, 2^x: `jax.numpy.exp2` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.numpy.exp2`.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and (promoted) dtype. Results below the smallest normal float32 are 0.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.exp2(jnp.array([0.0, 0.5, 1.0]))
    """
    return _exp2_call(resolved_order(order, "exp2"), x)


def expm1(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """e^x - 1, accurate near 0 too: `jax.numpy.expm1` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.numpy.expm1`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of x's shape and (promoted) dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.expm1(jnp.array([1e-6, 1.0]))
    """
    return _expm1_call(resolved_order(order, "expm1"), x)


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
    return _sigmoid_call(resolved_order(order, "sigmoid"), x)


def log_sigmoid(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """log(sigmoid(x)) = -log(1 + e^-x): `jax.nn.log_sigmoid` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers are promoted as by `jax.nn.log_sigmoid`.
      order: accuracy, as in `exp`. The relative error is of that size in both tails too.

    Returns:
      An array of x's shape and (promoted) dtype, with values of at most 0.

    Raises:
      TypeError: if x is complex, boolean or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.log_sigmoid(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _log_sigmoid_call(resolved_order(order, "log_sigmoid"), x)


def softplus(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """log(1 + e^x): `jax.nn.softplus` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.softplus`.
      order: accuracy, as in `exp`. The relative error is of that size in both tails too.

    Returns:
      An array of x's shape and (promoted) dtype, with values of at least 0.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.softplus(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _softplus_call(resolved_order(order, "softplus"), x)


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
    return _silu_call(resolved_order(order, "silu"), x)


swish = silu


def mish(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Mish, x · tanh(softplus(x)): `jax.nn.mish` with QuAKE (arXiv 2412.00408).

    Misra, arXiv 1908.08681.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.mish`.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and (promoted) dtype; 0 at -inf, where `jax.nn.mish` gives NaN.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.mish(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _mish_call(resolved_order(order, "mish"), x)


def quick_gelu(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """GELU's sigmoid form, x · sigmoid(1.702 x), with QuAKE (arXiv 2412.00408).

    Hendrycks and Gimpel, arXiv 1606.08415, section 2. CLIP uses it; jax.nn has no name for it.

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`. "exact" is `x * jax.nn.sigmoid(1.702 * x)`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.quick_gelu(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _quick_gelu_call(resolved_order(order, "quick_gelu"), x)


def _is_one(alpha) -> bool:
    """Whether alpha is the Python number 1, for which there is a kernel."""
    return isinstance(alpha, (int, float)) and alpha == 1


def elu(x: ArrayLike, alpha: ArrayLike = 1.0, *, order: Order | None = None) -> jax.Array:
    """Exponential linear unit, x or alpha · (e^x - 1): `jax.nn.elu` with QuAKE (arXiv 2412.00408).

    Clevert et al., arXiv 1511.07289.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.elu`.
      alpha: a number or an array that broadcasts with x. The number 1 has a kernel of its own;
        others use that of `expm1`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of the broadcast shape and promoted dtype of x and alpha.

    Raises:
      TypeError: if x or alpha is complex or no array.
      ValueError: if x and alpha do not broadcast.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.elu(jnp.array([-1.0, 0.0, 1.0]), 0.5)
    """
    order = resolved_order(order, "elu")
    return _elu_call(order, x) if _is_one(alpha) else _elu_alpha_call(order, x, alpha)


def celu(x: ArrayLike, alpha: ArrayLike = 1.0, *, order: Order | None = None) -> jax.Array:
    """max(x, 0) + alpha · (e^(min(x, 0)/alpha) - 1): `jax.nn.celu` with QuAKE (arXiv 2412.00408).

    Barron, arXiv 1704.07483.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.celu`.
      alpha: a number or an array that broadcasts with x. The number 1 has a kernel of its own;
        others use that of `expm1`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of the broadcast shape and promoted dtype of x and alpha.

    Raises:
      TypeError: if x or alpha is complex or no array.
      ValueError: if x and alpha do not broadcast.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.celu(jnp.array([-1.0, 0.0, 1.0]), 0.5)
    """
    order = resolved_order(order, "celu")
    return _celu_call(order, x) if _is_one(alpha) else _celu_alpha_call(order, x, alpha)


def selu(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Scaled exponential linear unit: `jax.nn.selu` with QuAKE (arXiv 2412.00408).

    Klambauer et al., arXiv 1706.02515.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.selu`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of x's shape and (promoted) dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.selu(jnp.array([-1.0, 0.0, 1.0]))
    """
    return _selu_call(resolved_order(order, "selu"), x)


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
    return _tanh_call(resolved_order(order, "tanh"), x)


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
    call = _gelu_calls[static_bool(approximate, "gelu", "approximate")]
    return call(resolved_order(order, "gelu"), x)
