"""The exponential and the logistic function of gemmlowp, in 32-bit fixed point, bit by bit.

The library (github.com/google/gemmlowp, Apache-2.0, fixedpoint/fixedpoint.h) of Jacob, Kligys,
Chen, Zhu, Tang, Howard, Adam, Kalenichenko, "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018, arXiv 1712.05877. TensorFlow Lite's
quantised softmax and logistic are made of these.

"Qk.m": an int32 that stands for raw / 2^m, with k integer bits, k + m = 31.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._front import exp_front, sigmoid_front

_MAX, _MIN = 2**31 - 1, -(2**31)
# Q0.31: e^(-1/8), 1/3, and e^(-2^i) for i = -2 … 4.
_EXP_MINUS_EIGHTH, _THIRD = 1895147668, 715827883
_MULTIPLIERS = {
    -2: 1672461947,
    -1: 1302514674,
    0: 790015084,
    1: 290630308,
    2: 39332535,
    3: 720401,
    4: 242,
}
# Q2.29: 48/17 and -32/17.
_48_OVER_17, _MINUS_32_OVER_17 = 1515870810, -1010580540


def _magnitude(x: jax.Array) -> jax.Array:
    bits = x.astype(jnp.uint32)
    return jnp.where(x < 0, jnp.uint32(0) - bits, bits)


def _multiply(a: jax.Array, b) -> jax.Array:
    """SaturatingRoundingDoublingHighMul: a·b / 2^31, rounded to nearest.

    Ties are away from zero for positive products, towards zero for negative ones. The product of
    64 bits is put together from 16-bit halves.
    """
    b = jnp.asarray(b, jnp.int32)
    u, v = _magnitude(a), _magnitude(b)
    low = jnp.uint32(0xFFFF)
    u0, u1, v0, v1 = u & low, u >> 16, v & low, v >> 16
    middle = u1 * v0 + ((u0 * v0) >> 16)  # at most (2^16 - 1)·2^16: fits
    carried = u0 * v1 + (middle & low)
    bits_low = ((carried & low) << 16) | ((u0 * v0) & low)
    bits_high = u1 * v1 + (middle >> 16) + (carried >> 16)
    negative = (a < 0) ^ (b < 0)
    nudge = jnp.where(negative, jnp.uint32((1 << 30) - 1), jnp.uint32(1 << 30))
    total = bits_low + nudge
    bits_high = bits_high + (total < nudge).astype(jnp.uint32)
    quotient = ((bits_high << 1) | (total >> 31)).astype(jnp.int32)
    signed = jnp.where(negative, -quotient, quotient)
    return jnp.where((a == _MIN) & (b == _MIN), _MAX, signed)


def _divide_by_power(x: jax.Array, exponent: int) -> jax.Array:
    """RoundingDivideByPOT: x / 2^exponent, to nearest, ties away from zero."""
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (x < 0).astype(jnp.int32)
    return (x >> exponent) + ((x & mask) > threshold).astype(jnp.int32)


def _multiply_by_power(x: jax.Array, exponent: int) -> jax.Array:
    """SaturatingRoundingMultiplyByPOT for a positive exponent."""
    limit = (1 << (31 - exponent)) - 1
    return jnp.where(x > limit, _MAX, jnp.where(x < -limit, _MIN, x << exponent))


def _exp_near_zero(a: jax.Array) -> jax.Array:
    """exp of Q0.31 numbers in [-1/4, 0): Taylor's series of 4th order at -1/8."""
    x = a + (1 << 28)
    x2 = _multiply(x, x)
    x3 = _multiply(x2, x)
    x4 = _multiply(x2, x2)
    third = _multiply(_divide_by_power(x4, 2) + x3, _THIRD)
    rest = x + _divide_by_power(third + x2, 1)
    return _EXP_MINUS_EIGHTH + _multiply(rest, _EXP_MINUS_EIGHTH)


@functools.partial(jax.jit, static_argnames="integer_bits")
def exp_on_negative_values(a: jax.Array, integer_bits: int) -> jax.Array:
    """Q0.31 exp of int32 a <= 0 in Qk.(31 - k), k = integer_bits."""
    fraction_bits = 31 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    small = (a & (quarter - 1)) - quarter
    y = _exp_near_zero(_multiply_by_power(small, integer_bits) if integer_bits else small)
    remainder = small - a
    for exponent, multiplier in _MULTIPLIERS.items():
        if integer_bits > exponent:
            bit = remainder & (1 << (fraction_bits + exponent))
            y = jnp.where(bit != 0, _multiply(y, multiplier), y)
    if integer_bits > 5:
        y = jnp.where(a < -(1 << (fraction_bits + 5)), 0, y)
    return jnp.where(a == 0, _MAX, y)


def _one_over_one_plus(a: jax.Array) -> jax.Array:
    """Q0.31 1 / (1 + a) of Q0.31 a in [0, 1]: Newton's division in Q2.29, three steps."""
    # RoundingHalfSum(a, 1), in 32 bits without sign.
    half = ((a.astype(jnp.uint32) + jnp.uint32(_MAX) + 1) >> 1).astype(jnp.int32)
    x = _48_OVER_17 + _multiply(half, _MINUS_32_OVER_17)
    for _ in range(3):
        error = (1 << 29) - _multiply(half, x)
        x = x + _multiply_by_power(_multiply(x, error), 2)
    return _multiply_by_power(x, 1)


@functools.partial(jax.jit, static_argnames="integer_bits")
def logistic(a: jax.Array, integer_bits: int) -> jax.Array:
    """Q0.31 logistic function of int32 a in Qk.(31 - k)."""
    positive = _one_over_one_plus(exp_on_negative_values(-jnp.abs(a), integer_bits))
    y = jnp.where(a > 0, positive, _MAX - positive)
    return jnp.where(a == 0, 1 << 30, y)


def _raw(x: jax.Array, integer_bits: int) -> jax.Array:
    """Qk.(31 - k) of float32 numbers, saturating."""
    x = jnp.clip(jnp.ldexp(x, 31 - integer_bits), -(2.0**31), 2.0**31)
    # 2^31 itself is no int32; the conversion would saturate, which XLA does not promise.
    return jnp.where(x >= 2.0**31, _MAX, jnp.round(jnp.where(x >= 2.0**31, 0, x)).astype(jnp.int32))


def _exp_of_floats(x, *, integer_bits):
    y = jnp.ldexp(exp_on_negative_values(_raw(x, integer_bits), integer_bits).astype(x.dtype), -31)
    return jnp.where(x > 0, jnp.nan, y)


_exp_call = exp_front("gemmlowp_exp", _exp_of_floats)


def gemmlowp_exp(x: ArrayLike, *, integer_bits: int = 5) -> jax.Array:
    """gemmlowp's exp(x) for x <= 0, in 32-bit fixed point.

    Jacob et al., CVPR 2018, arXiv 1712.05877, and the library's exp_on_negative_values: x is a
    multiple of 1/4 and a remainder in [-1/4, 0); of that, Taylor's series of 4th order at -1/8;
    multiplied by e^-¼, e^-½, e^-1, … e^-16 for each bit of the multiple. Largest absolute error
    about 1e-7.

    Args:
      x: array of any shape and floating-point dtype, of numbers of at most 0; rounded to multiples
        of 2^(integer_bits - 31), and at least -2^integer_bits.
      integer_bits: 0 to 10; 5 in TensorFlow Lite's softmax.

    Returns:
      An array of x's shape and dtype, of multiples of 2^-31 before rounding to it; 0 below -32;
      NaN where x is positive. The derivative is exp's.

    Raises:
      TypeError: if x has no floating-point dtype, or integer_bits is no integer.
      ValueError: if integer_bits is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.gemmlowp_exp(jnp.array([0.0, -1.0]))
      >>> bool(abs(y[1] - 0.36787944) < 2e-7)
      True
    """
    integer_bits = _arguments.integer(integer_bits, "gemmlowp_exp", "integer_bits", 0, 10)
    return _exp_call(x, integer_bits=integer_bits)


def gemmlowp_exp_int(x: ArrayLike, *, integer_bits: int = 5) -> jax.Array:
    """gemmlowp's exponential of fixed-point numbers x <= 0; see `gemmlowp_exp`.

    Args:
      x: int32 array, in units of 2^(integer_bits - 31); positive numbers count as 0.
      integer_bits: 0 to 10.

    Returns:
      An int32 array of x's shape, in units of 2^-31; 2^31 - 1 for x = 0.

    Raises:
      TypeError: if x is not of dtype int32, or integer_bits is no integer.
      ValueError: if integer_bits is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.gemmlowp_exp_int(jnp.array([0, -(2**26)], jnp.int32)).tolist()
      [2147483647, 790015308]
    """
    name = "gemmlowp_exp_int"
    x = _arguments.integer_array(x, name, dtypes=[jnp.int32])
    integer_bits = _arguments.integer(integer_bits, name, "integer_bits", 0, 10)
    return exp_on_negative_values(jnp.minimum(x, 0), integer_bits)


def _logistic_of_floats(x, *, integer_bits):
    raw = jnp.maximum(_raw(x, integer_bits), -_MAX)
    return jnp.ldexp(logistic(raw, integer_bits).astype(x.dtype), -31)


_logistic_call = sigmoid_front("gemmlowp_logistic", _logistic_of_floats)


def gemmlowp_logistic(x: ArrayLike, *, integer_bits: int = 5) -> jax.Array:
    """gemmlowp's logistic function 1 / (1 + e^-x), in 32-bit fixed point.

    Jacob et al., CVPR 2018, arXiv 1712.05877, and the library's logistic: `gemmlowp_exp` of -|x|,
    and Newton's division, three steps from 48/17 - 32/17 d. Largest absolute error about 1e-7.

    Args:
      x: array of any shape and floating-point dtype; rounded to multiples of
        2^(integer_bits - 31), and within ±2^integer_bits.
      integer_bits: 0 to 10; 4 in TensorFlow Lite.

    Returns:
      An array of x's shape and dtype; NaN for NaN. The derivative is the exact function's.

    Raises:
      TypeError: if x has no floating-point dtype, or integer_bits is no integer.
      ValueError: if integer_bits is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.gemmlowp_logistic(jnp.array([0.0])).tolist()
      [0.5]
    """
    integer_bits = _arguments.integer(integer_bits, "gemmlowp_logistic", "integer_bits", 0, 10)
    return _logistic_call(x, integer_bits=integer_bits)


def gemmlowp_logistic_int(x: ArrayLike, *, integer_bits: int = 5) -> jax.Array:
    """gemmlowp's logistic function of fixed-point numbers; see `gemmlowp_logistic`.

    Args:
      x: int32 array, in units of 2^(integer_bits - 31); -2^31 counts as -2^31 + 1.
      integer_bits: 0 to 10.

    Returns:
      An int32 array of x's shape, in units of 2^-31; 2^30 for x = 0.

    Raises:
      TypeError: if x is not of dtype int32, or integer_bits is no integer.
      ValueError: if integer_bits is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.gemmlowp_logistic_int(jnp.array([0], jnp.int32)).tolist()
      [1073741824]
    """
    name = "gemmlowp_logistic_int"
    x = _arguments.integer_array(x, name, dtypes=[jnp.int32])
    integer_bits = _arguments.integer(integer_bits, name, "integer_bits", 0, 10)
    return logistic(jnp.maximum(x, -_MAX), integer_bits)
