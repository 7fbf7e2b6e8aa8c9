"""The algorithms of the CPU kernels, written in jax.numpy: the fallback on other platforms and the
oracle of the tests.

Arithmetic is float32, rounded once to the input's dtype: float32, bfloat16 or float16. `order`
(1 to 5) is the degree of the polynomial for 2^f on [0, 1), in e^x = 2^n · 2^f. The method is QuAKE
(Narayanaswami, Srinivasan, Ravindran, arXiv 2412.00408, 2024). No step depends on whether the
compiler fuses a multiplication with an addition.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from quake_jax import _constants

_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
_SMALLEST_NORMAL = 2.0**-126
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _polynomial(x, coefficients):
    """c[0] + c[1]·x + … by Horner's rule."""
    value = jnp.float32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def _power_of_two(n):
    """2^n for whole n from -127 to 127, where 2^-127 comes out as 0."""
    # A conversion of NaN to an integer is undefined on some platforms. It may give anything here:
    # what it would scale is NaN too.
    n = jnp.where(jnp.isnan(n), 0, n)
    return lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)


def _exp(x, order, *, shift=_constants.ORDER1_SHIFT, low=0.0, scale=0):
    """e^(x + low) · 2^scale in float32; inf on overflow, 0 where that would be subnormal.

    `low`, small, carries what does not fit into x (orders 4 and 5 only). `shift` is the constant C
    of order 1 in units of the exponent. `scale` is a whole number.
    """
    # Beyond these bounds the result is 0 or inf all the same, and inf - inf must not arise.
    x = jnp.clip(x, -88.0 - scale, 89.0)
    t = x * _constants.LOG2E
    # n is cut where 2^(n + scale) would overflow: the polynomial then exceeds 2 and makes it inf.
    largest = 127.0 - scale
    if order == 1:
        # int32((t + 127 - shift) · 2^23) reinterpreted as float32, taken apart: its integer part
        # is the exponent field, its fraction the mantissa field.
        t = t - shift
        n = jnp.minimum(jnp.floor(t), largest)
        p = 1 + (t - n)
    elif order in (2, 3):
        n = jnp.minimum(jnp.floor(t), largest)
        p = _polynomial(t - n, [1.0, *_constants.EXP2_POLY[order]])
    else:
        # Cody and Waite: n · LN2_HI is exact, so r is as accurate as x.
        n = jnp.minimum(jnp.floor((x + low) * _constants.LOG2E), largest)
        r = (x - n * _constants.LN2_HI) - n * _constants.LN2_LO + low
        p = _polynomial(r, [1.0, *_constants.EXP_POLY[order]])
    value = p * _power_of_two(jnp.maximum(n + scale, -127.0))
    return jnp.where(value < _SMALLEST_NORMAL, 0, value)


def _times_sigmoid(x, z, a, order):
    """x · sigmoid(±a), where z = |x|, a ≥ 0 and the sign is that of x.

    Written as max(x, 0) - z·e / (1 + e) with e = e^-a: nothing cancels on either side. e carries a
    factor of 2^8, so that it does not underflow before the result does.
    """
    e = _exp(-a, order, scale=8)
    return jnp.maximum(x, 0) - z * e * (1 / (e + 2.0**8))


def _in_float32(function):
    """Make a function of float32 arrays one of float32, bfloat16 and float16 arrays."""

    @functools.wraps(function)
    def wrapped(x: jax.Array, *, order: int) -> jax.Array:
        x = jnp.asarray(x)
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"reference.{function.__name__}: x must be float32, bfloat16 or float16; "
                f"got {x.dtype}"
            )
        if order not in (1, 2, 3, 4, 5):
            raise ValueError(
                f"reference.{function.__name__}: order must be an integer from 1 to 5; "
                f"got {order!r}"
            )
        return function(x.astype(jnp.float32), order=order).astype(x.dtype)

    return wrapped


@_in_float32
def exp(x: jax.Array, *, order: int) -> jax.Array:
    """e^x; 0 below the smallest normal float32.

    Args:
      x: array of any shape; float32, bfloat16 or float16.
      order: 1 to 5.

    Returns:
      An array of x's shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import reference
      >>> y = reference.exp(jnp.float32(1.0), order=5)
    """
    return _exp(x, order)


@_in_float32
def sigmoid(x: jax.Array, *, order: int) -> jax.Array:
    """1 / (1 + e^-x); arguments as in `exp`."""
    return 1 / (1 + _exp(-x, order))


@_in_float32
def silu(x: jax.Array, *, order: int) -> jax.Array:
    """x / (1 + e^-x), with the order's relative accuracy down to its underflow near x = -91.8.

    Arguments as in `exp`.
    """
    z = jnp.minimum(jnp.abs(x), 100.0)  # 0 from -91.9 on, and inf · 0 must not arise
    return _times_sigmoid(x, z, z, order)


@_in_float32
def tanh(x: jax.Array, *, order: int) -> jax.Array:
    """E / (E + 2) with E = e^2x - 1, with the order's relative accuracy at 0 too.

    E = 2^n · (2^f - 1) + (2^n - 1), where 2^f - 1 ≈ f · q(f) has small relative error, so nothing
    cancels. Arguments as in `exp`.
    """
    # Beyond 10 the result rounds to 1, and E would overflow much later.
    t = jnp.minimum(jnp.abs(x), 10.0) * (2 * _constants.LOG2E)
    n = jnp.floor(t)
    f = t - n
    scale = _power_of_two(n)
    e = scale * (f * _polynomial(f, _constants.EXPM1_POLY[order])) + (scale - 1)
    return jnp.copysign(jnp.minimum(e / (e + 2), 1.0), x)


@_in_float32
def gelu_tanh(x: jax.Array, *, order: int) -> jax.Array:
    """GELU in its tanh form, x · sigmoid(2·√(2/π)·(x + 0.044715·x³)).

    Hendrycks and Gimpel, arXiv 1606.08415. Arguments as in `exp`. In the left tail the rounding of
    the sigmoid's argument, up to 2^-24 · 88, adds to the relative error.
    """
    z = jnp.minimum(jnp.abs(x), 12.0)  # 0 from -10.2 on, and inf · 0 must not arise
    a = z * (_SQRT_8_OVER_PI + (_SQRT_8_OVER_PI * 0.044715) * (z * z))
    return _times_sigmoid(x, z, a, order)


@_in_float32
def gelu_erf(x: jax.Array, *, order: int) -> jax.Array:
    """GELU, x · Φ(x) with Φ the normal distribution function.

    Written as max(x, 0) - z · e^(-z²/2) · M(z) with z = |x|, where M, the scaled upper tail of the
    normal distribution, is a polynomial in 1 / (1 + p·z) (the form of Abramowitz and Stegun,
    7.1.26). It keeps the order's relative accuracy in the left tail. Arguments as in `exp`.
    """
    z = jnp.minimum(jnp.abs(x), 14.0)  # 0 from -13.2 on
    if order <= 3:
        e = _exp(-0.5 * (z * z), order)
    else:
        # z² = h² + (z - h)·(z + h). The leading 12 bits of z have an exact square, so the second
        # part holds all that rounding z·z would lose (up to 7e-6 of e^(-z²/2)).
        bits = lax.bitcast_convert_type(z, jnp.uint32) & jnp.uint32(0xFFFFF000)
        h = lax.bitcast_convert_type(bits, jnp.float32)
        e = _exp(-0.5 * (h * h), order, low=-0.5 * ((z - h) * (z + h)))
    u = 1 / (1 + _constants.GELU_P[order] * z)
    tail = _polynomial(u, _constants.GELU_M[order])
    return jnp.maximum(x, 0) - z * e * tail


@_in_float32
def softmax(x: jax.Array, *, order: int) -> jax.Array:
    """e^(x - max x) divided by its sum, over the last axis.

    Args:
      x: array of rank 1 or more; float32, bfloat16 or float16.
      order: 1 to 5. Order 1 has its own constant here, since a common factor cancels.

    Returns:
      An array of x's shape and dtype. Rows with NaN, with +inf, or of all -inf are NaN.
    """
    if 0 in x.shape:
        return x
    e = _exp(x - jnp.max(x, axis=-1, keepdims=True), order, shift=_constants.SOFTMAX_SHIFT)
    return e * (1 / jnp.sum(e, axis=-1, keepdims=True))
