"""The algorithms of the element-wise kernels in jax.numpy: the fallback on other platforms and the
oracle of the tests.

Arithmetic is float32, rounded once to the input's dtype: float32, bfloat16 or float16. `order`
(1 to 5) is the degree of the polynomial for 2^f on [0, 1), in e^x = 2^n · 2^f.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from quake_jax._core import constants
from quake_jax._core.exponential import (
    exponential,
    in_float32,
    polynomial,
    power_of_two,
    split_power,
    times_power_of_two,
)
from quake_jax._core.exports import defined_in

_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
_LN2 = math.log(2)

# Klambauer et al., arXiv 1706.02515: the fixed point of zero mean and unit variance.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


def _expm1(x, order):
    """e^x - 1 = 2·(2^(n-1)·(2^f - 1) + (2^(n-1) - 1/2)) with |f| ≤ 1/2.

    2^f - 1 ≈ f · q(f) has small relative error, so nothing cancels where the result is small.
    """
    t = jnp.clip(x * constants.LOG2E, -30.0, 128.5)  # -1 and inf beyond, in float32
    n = jnp.round(t)  # half to even
    if order <= 3:
        f = t - n
    else:
        x = jnp.clip(x, -21.0, 90.0)
        f = ((x - n * constants.LN2_HI) - n * constants.LN2_LO) * constants.LOG2E
    half = power_of_two(n - 1)
    return 2 * (half * (f * polynomial(f, constants.EXPM1_CENTERED[order])) + (half - 0.5))


def _log1p_of_exp(x, order):
    """log(1 + e^x) for x ≤ 0, with small relative error however small e^x is."""
    e = exponential(x, order)
    return e * polynomial(e, constants.LOG1P[order])


def _times_sigmoid(x, z, a, order):
    """x · sigmoid(±a), where z = |x|, a ≥ 0 and the sign is that of x.

    Written as max(x, 0) - z·e / (1 + e) with e = e^-a: nothing cancels on either side. e carries a
    factor of 2^8, so that it does not underflow before the result does.
    """
    e = exponential(-a, order, scale=8)
    return jnp.maximum(x, 0) - z * e * (1 / (e + 2.0**8))


def _sigmoid(x, order):
    return 1 / (1 + exponential(-x, order))


def _silu(x, order):
    z = jnp.minimum(jnp.abs(x), 100.0)  # 0 from -91.9 on, and inf · 0 must not arise
    return _times_sigmoid(x, z, z, order)


def _gelu_tanh(x, order):
    z = jnp.minimum(jnp.abs(x), 12.0)  # 0 from -10.2 on, and inf · 0 must not arise
    a = z * (_SQRT_8_OVER_PI + (_SQRT_8_OVER_PI * 0.044715) * (z * z))
    return _times_sigmoid(x, z, a, order)


def _gelu_erf(x, order):
    z = jnp.minimum(jnp.abs(x), 14.0)  # 0 from -13.2 on
    if order <= 3:
        e = exponential(-0.5 * (z * z), order)
    else:
        # z² = h² + (z - h)·(z + h). The leading 12 bits of z have an exact square, so the second
        # part holds all that rounding z·z would lose (up to 7e-6 of e^(-z²/2)).
        bits = lax.bitcast_convert_type(z, jnp.uint32) & jnp.uint32(0xFFFFF000)
        h = lax.bitcast_convert_type(bits, jnp.float32)
        e = exponential(-0.5 * (h * h), order, low=-0.5 * ((z - h) * (z + h)))
    u = 1 / (1 + constants.GELU_P[order] * z)
    tail = polynomial(u, constants.GELU_M[order])
    return jnp.maximum(x, 0) - z * e * tail


# Functions of one element.


@in_float32
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
    return exponential(x, order)


@in_float32
def exp2(x: jax.Array, *, order: int) -> jax.Array:
    """2^x; 0 below the smallest normal float32. Arguments as in `exp`."""
    x = jnp.clip(x, -127.0, 129.0)
    if order <= 3:
        p, n = split_power(x, order, constants.ORDER1_SHIFT, 127.0)
    else:
        n = jnp.minimum(jnp.floor(x), 127.0)
        p = polynomial((x - n) * _LN2, [1.0, *constants.EXP_POLY[order]])
    return times_power_of_two(p, n)


@in_float32
def expm1(x: jax.Array, *, order: int) -> jax.Array:
    """e^x - 1, with the order's relative accuracy at 0 too. Arguments as in `exp`."""
    return _expm1(x, order)


@in_float32
def sigmoid(x: jax.Array, *, order: int) -> jax.Array:
    """1 / (1 + e^-x); arguments as in `exp`."""
    return _sigmoid(x, order)


@in_float32
def log_sigmoid(x: jax.Array, *, order: int) -> jax.Array:
    """log(sigmoid(x)) = min(x, 0) - log(1 + e^-|x|); arguments as in `exp`."""
    return jnp.minimum(x, 0) - _log1p_of_exp(-jnp.abs(x), order)


@in_float32
def softplus(x: jax.Array, *, order: int) -> jax.Array:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); arguments as in `exp`."""
    return jnp.maximum(x, 0) + _log1p_of_exp(-jnp.abs(x), order)


@in_float32
def silu(x: jax.Array, *, order: int) -> jax.Array:
    """x / (1 + e^-x), with the order's relative accuracy down to its underflow near x = -91.8.

    Arguments as in `exp`.
    """
    return _silu(x, order)


@in_float32
def mish(x: jax.Array, *, order: int) -> jax.Array:
    """x · tanh(softplus(x)), as a rational function of w = e^-|x|; arguments as in `exp`.

    tanh(log(s)) = (s² - 1) / (s² + 1) with s = 1 + e^x, extended by w² where x ≥ 0.
    """
    z = jnp.minimum(jnp.abs(x), 100.0)
    scaled = exponential(-z, order, scale=8)  # does not underflow before the result does
    w = scaled * 2.0**-8
    right = x * ((1 + 2 * w) / (1 + 2 * w + 2 * (w * w)))
    left = -z * scaled * ((w + 2) / (w * w + 2 * w + 2)) * 2.0**-8
    return jnp.where(x < 0, left, right)


@in_float32
def quick_gelu(x: jax.Array, *, order: int) -> jax.Array:
    """x · sigmoid(1.702 x); arguments as in `exp`."""
    z = jnp.minimum(jnp.abs(x), 60.0)  # 0 from -54.2 on, and inf · 0 must not arise
    return _times_sigmoid(x, z, 1.702 * z, order)


@in_float32
def elu(x: jax.Array, *, order: int) -> jax.Array:
    """x where it is positive, else e^x - 1; arguments as in `exp`."""
    return jnp.where(x > 0, x, _expm1(x, order))


@in_float32
def selu(x: jax.Array, *, order: int) -> jax.Array:
    """Scaled elu (Klambauer et al., arXiv 1706.02515); arguments as in `exp`."""
    return jnp.where(x > 0, SELU_SCALE * x, (SELU_SCALE * SELU_ALPHA) * _expm1(x, order))


@in_float32
def tanh(x: jax.Array, *, order: int) -> jax.Array:
    """E / (E + 2) with E = e^2x - 1, with the order's relative accuracy at 0 too.

    E = 2^n · (2^f - 1) + (2^n - 1), where 2^f - 1 ≈ f · q(f) has small relative error, so nothing
    cancels. Arguments as in `exp`.
    """
    # Beyond 10 the result rounds to 1, and E would overflow much later.
    t = jnp.minimum(jnp.abs(x), 10.0) * (2 * constants.LOG2E)
    n = jnp.floor(t)
    f = t - n
    scale = power_of_two(n)
    e = scale * (f * polynomial(f, constants.EXPM1_POLY[order])) + (scale - 1)
    return jnp.copysign(jnp.minimum(e / (e + 2), 1.0), x)


@in_float32
def gelu_tanh(x: jax.Array, *, order: int) -> jax.Array:
    """GELU in its tanh form, x · sigmoid(2·√(2/π)·(x + 0.044715·x³)).

    Hendrycks and Gimpel, arXiv 1606.08415. Arguments as in `exp`. In the left tail the rounding of
    the sigmoid's argument, up to 2^-24 · 88, adds to the relative error.
    """
    return _gelu_tanh(x, order)


@in_float32
def gelu_erf(x: jax.Array, *, order: int) -> jax.Array:
    """GELU, x · Φ(x) with Φ the normal distribution function.

    Written as max(x, 0) - z · e^(-z²/2) · M(z) with z = |x|, where M, the scaled upper tail of the
    normal distribution, is a polynomial in 1 / (1 + p·z) (the form of Abramowitz and Stegun,
    7.1.26). It keeps the order's relative accuracy in the left tail. Arguments as in `exp`.
    """
    return _gelu_erf(x, order)


# Functions of two arrays. Gates: Dauphin et al., arXiv 1612.08083; Shazeer, arXiv 2002.05202.


@in_float32
def logaddexp(x1: jax.Array, x2: jax.Array, *, order: int) -> jax.Array:
    """log(e^x1 + e^x2) = max + log(1 + e^-|x1 - x2|), for two arrays of one shape and dtype."""
    # Equal infinities have no difference, but a limit.
    distance = jnp.where(x1 == x2, 0, jnp.abs(x1 - x2))
    return jnp.maximum(x1, x2) + _log1p_of_exp(-distance, order)


@in_float32
def glu(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """sigmoid(gate) · value, for two arrays of one shape and dtype."""
    return _sigmoid(gate, order) * value


@in_float32
def swiglu(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """silu(gate) · value, for two arrays of one shape and dtype."""
    return _silu(gate, order) * value


@in_float32
def geglu_tanh(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """GELU in its tanh form of gate, times value, for two arrays of one shape and dtype."""
    return _gelu_tanh(gate, order) * value


@in_float32
def geglu_erf(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """GELU of gate, times value, for two arrays of one shape and dtype."""
    return _gelu_erf(gate, order) * value


def _split(gated: Callable) -> Callable:
    """Make gated(gate, value) a function of one array that holds both, split on the last axis."""

    def split(x: jax.Array, *, order: int, gate_first: int) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        gate, value = (first, second) if gate_first else (second, first)
        return gated(gate, value, order=order)

    split.__name__ = split.__qualname__ = f"{gated.__name__}_split"
    split.__doc__ = f"`{gated.__name__}` of the halves of x's last axis; `gate_first` says which."
    return split


glu_split = _split(glu)
swiglu_split = _split(swiglu)
geglu_tanh_split = _split(geglu_tanh)
geglu_erf_split = _split(geglu_erf)


def on_last_axis(bias: jax.Array, x: jax.Array) -> jax.Array:
    """A bias of shape (n,) with the axes that x, of shape (…, n), has in front."""
    # Not by broadcasting, which jax_numpy_rank_promotion="raise" refuses.
    return lax.expand_dims(bias, range(x.ndim - 1))


@in_float32
def bias_silu(x: jax.Array, bias: jax.Array, *, order: int) -> jax.Array:
    """silu(x + bias) with bias on the last axis; the sum is not rounded to a 16-bit dtype."""
    return _silu(x + on_last_axis(bias, x), order)


@in_float32
def bias_gelu_tanh(x: jax.Array, bias: jax.Array, *, order: int) -> jax.Array:
    """GELU in its tanh form of x + bias, as `bias_silu`."""
    return _gelu_tanh(x + on_last_axis(bias, x), order)


@in_float32
def bias_gelu_erf(x: jax.Array, bias: jax.Array, *, order: int) -> jax.Array:
    """GELU of x + bias, as `bias_silu`."""
    return _gelu_erf(x + on_last_axis(bias, x), order)


__all__ = [*defined_in(globals()), "SELU_ALPHA", "SELU_SCALE"]
