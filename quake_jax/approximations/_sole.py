"""SOLE: E2Softmax and AILayerNorm.

Wang, Zhou, Sun, Sun, Liu, "SOLE: Hardware-Software Co-design of Softmax and LayerNorm for Efficient
Transformer Inference", ICCAD 2023, arXiv 2510.17189. The authors published no code; the formulas
here are those of summaries and of circuits by others, and each function says what is uncertain.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._fqvit import power_of_two_factors
from quake_jax.approximations._front import layer_norm_front, softmax_front

ROUNDINGS = ("nearest", "floor", "truncate")
# Exponents have 4 bits.
_LARGEST_SHIFT = 15
# A difference that gives the largest shift, with up to 12 bits of fraction.
_NEGLIGIBLE = 2**20


def _log2exp(d: jax.Array, fraction_bits: int, rounding: str) -> jax.Array:
    """-log2(e^(d / 2^fraction_bits)) of integers d <= 0, rounded to 0…15."""
    z = -(d + (d >> 1) - (d >> 4))
    unit = 1 << fraction_bits
    if rounding == "nearest":  # ties away from zero, as an adder before the shift gives
        z = z + unit // 2
    elif rounding == "floor":  # of the negative, so upwards here
        z = z + unit - 1
    return jnp.clip(z >> fraction_bits, 0, _LARGEST_SHIFT)


def _leading_one(total: jax.Array) -> jax.Array:
    return 31 - lax.clz(total)


def _shifts(x, keep, axis, fraction_bits, rounding):
    """k of each element, and Σ 2^(15 - k) over those that count."""
    k = _log2exp(x - jnp.max(x, axis, keepdims=True), fraction_bits, rounding)
    terms = jnp.where(keep, 1 << (_LARGEST_SHIFT - k), 0)
    return k, jnp.sum(terms, axis, keepdims=True, dtype=jnp.int32)


def _online_shifts(x, keep, axis, fraction_bits, rounding):
    """The same in one pass: exponents relative to the maximum so far, corrected afterwards."""
    rows = jnp.moveaxis(x, axis, 0)
    kept = jnp.moveaxis(keep, axis, 0)

    def step(carry, element):
        largest, total = carry
        value, counts = element
        new = jnp.where(counts, jnp.maximum(largest, value), largest)
        # Kept in range where nothing has come before; the sum is 0 then.
        growth = jnp.maximum(largest, new - _NEGLIGIBLE) - new
        total = total >> _log2exp(growth, fraction_bits, rounding)
        k = _log2exp(value - new, fraction_bits, rounding)
        total = total + jnp.where(counts, 1 << (_LARGEST_SHIFT - k), 0)
        return (new, total), (k, new)

    start = (jnp.full_like(rows[0], jnp.iinfo(jnp.int32).min // 2), jnp.zeros_like(rows[0]))
    (largest, total), (k, seen) = lax.scan(step, start, (rows, kept))
    k = jnp.minimum(k + _log2exp(seen - largest, fraction_bits, rounding), _LARGEST_SHIFT)
    return jnp.moveaxis(k, 0, axis), jnp.expand_dims(total, axis)


@functools.partial(jax.jit, static_argnames=("axis", "fraction_bits", "rounding", "online"))
def _e2softmax(x, keep, *, axis, fraction_bits, rounding, online):
    shifts = _online_shifts if online else _shifts
    k, total = shifts(x, keep, axis, fraction_bits, rounding)
    top = jnp.maximum(_leading_one(total), 0)
    # s >= 0.5: the bit below the leading one.
    half = (total >> jnp.maximum(top - 1, 0)) & (top > 0).astype(total.dtype)
    c = jnp.where(half == 1, 0.568, 0.818).astype(jnp.float32)
    return jnp.ldexp(c, -(k + top - _LARGEST_SHIFT))


def _e2softmax_of_floats(x, keep, *, axis, fraction_bits, **parameters):
    d = x - jnp.max(x, axis, keepdims=True)
    # Differences of 8 bits; with 4 of them fractional that is 15.9, and k is 15 from 10.4 on.
    d = jnp.clip(jnp.round(d * 2**fraction_bits), -(2**_DIFFERENCE_BITS - 1), 0)
    d = d.astype(jnp.int32)
    return _e2softmax(d, keep, axis=axis, fraction_bits=fraction_bits, **parameters)


# Enough for k = 15 at each number of fractional bits that is allowed.
_DIFFERENCE_BITS = 16
_e2softmax_call = softmax_front("e2softmax", _e2softmax_of_floats)


def _e2softmax_parameters(function, fraction_bits, rounding, online):
    return {
        "fraction_bits": _arguments.integer(fraction_bits, function, "fraction_bits", 0, 12),
        "rounding": _arguments.choice(rounding, function, "rounding", ROUNDINGS),
        "online": _arguments.flag(online, function, "online"),
    }


def e2softmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    fraction_bits: int = 4,
    rounding: str = "nearest",
    online: bool = False,
) -> jax.Array:
    """E2Softmax: exponentials and quotients that are powers of two.

    Wang et al., "SOLE", ICCAD 2023, arXiv 2510.17189. With d = x - max x, rounded to fixed point:
    k = -⌊1.4375 d⌉ as shifts d + d/2 - d/16, clipped to 0…15; S = Σ 2^-k = 2^ks (1 + s);
    y = 2^-(k + ks)·c, c = 0.818 where s < 0.5 and 0.568 elsewhere (1.636 - s to one bit, halved).
    Rows sum to 0.818…1.23.

    Uncertain: sources disagree on how k is rounded (`rounding`); the fixed-point format of the
    inputs; whether the result is rounded to 8 bits too (not so here). `online` is the one-pass
    form, our reading of it: exponents relative to the largest element so far, the sum shifted
    right when that grows, and the exponents corrected at the end.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      fraction_bits: of the fixed-point differences, 0 to 12.
      rounding: of k: "nearest" (smallest error), "floor" (of -k) or "truncate".
      online: one pass.

    Returns:
      An array of x's dtype and the shape of x and where together. Rows with NaN or +inf are NaN.
      Elements lower than the maximum by 1e8 (3e4 in float16) count as masked. The derivative is
      the exact softmax's.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.e2softmax(jnp.array([0.0, 0.0])).tolist()
      [0.4090000092983246, 0.4090000092983246]
    """
    parameters = _e2softmax_parameters("e2softmax", fraction_bits, rounding, online)
    return _e2softmax_call(x, axis, where, **parameters)


def e2softmax_int(
    x: ArrayLike,
    fraction_bits: int = 4,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    rounding: str = "nearest",
    online: bool = False,
) -> jax.Array:
    """E2Softmax of fixed-point numbers x / 2^fraction_bits; see `e2softmax`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more; the differences within a row must fit
        30 bits, and rows have fewer than 65536 elements.
      fraction_bits: 0 to 12.
      axis, where, rounding, online: as in `e2softmax`; one axis.

    Returns:
      A float32 array of the shape of x: y = 2^-(k + ks)·c.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.e2softmax_int(jnp.array([32, 16], jnp.int8))
      >>> (1000 * y).round().tolist()  # k = 0 and 1, so s = 0.5
      [568.0, 284.0]
    """
    name = "e2softmax_int"
    x = _arguments.integer_array(x, name)
    axis = _arguments.one_axis(axis, x.ndim, name)
    _arguments.masks(where, x, name)
    keep = jnp.ones_like(x, bool) if where is None else jnp.broadcast_to(where, x.shape)
    lowest = jnp.iinfo(jnp.int32).min // 2
    x = jnp.where(keep, x, jnp.max(x, axis, keepdims=True, where=keep, initial=lowest))
    parameters = _e2softmax_parameters(name, fraction_bits, rounding, online)
    return jnp.where(keep, _e2softmax(x, keep, axis=axis, **parameters), 0)


# AILayerNorm.


def _compressed_square(x: jax.Array) -> jax.Array:
    """x² of integers |x| <= 255 from 4 bits of |x|, a table of 16 squares and a shift, as float32.

    Bits 7 to 4 of |x| if bit 7 or 6 is set, and bits 5 to 2 otherwise: y·2^(2 s + 2).
    """
    x = jnp.abs(x)
    s = (x >= 64).astype(jnp.int32)
    y = jnp.where(s == 1, x >> 4, x >> 2)
    return (y * y) << (4 * s + 4)


def _table_rsqrt(variance: jax.Array, table_bits: int) -> jax.Array:
    """1/√ from a table over one octave pair: 2^table_bits entries for [1, 4), and a shift."""
    mantissa, exponent = jnp.frexp(variance)
    odd = exponent % 2
    # variance = u·4^h with u in [1, 4): mantissa is in [1/2, 1).
    u = jnp.ldexp(mantissa, 2 - odd)
    half = (exponent - 2 + odd) // 2
    entries = 2**table_bits
    index = jnp.clip(jnp.floor((u - 1) * (entries / 3)), 0, entries - 1)
    middle = 1 + (index + 0.5) * (3 / entries)
    return jnp.ldexp(1 / jnp.sqrt(middle), -half)


@functools.partial(jax.jit, static_argnames=("axis", "table_bits"))
def _ailayernorm(x, alpha, *, axis, floor, table_bits):
    """(x·2^alpha - mean) / σ of centred integers x, where floor is the least variance."""
    count = x.shape[axis]
    shifted = x << alpha
    mean = jnp.sum(shifted, axis, keepdims=True, dtype=jnp.int32).astype(jnp.float32) / count
    squares = (_compressed_square(x) << (2 * alpha)).astype(jnp.float32)
    square = jnp.sum(squares, axis, keepdims=True) / count
    variance = jnp.maximum(square - mean * mean, floor)
    return (shifted.astype(jnp.float32) - mean) * _table_rsqrt(variance, table_bits)


def _affine(y, scale, bias):
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _ailayernorm_of_floats(x, scale, bias, *, axis, epsilon, table_bits):
    alpha, s, zero_point = power_of_two_factors(x, axis=axis, input_bit=8)
    units = jnp.round(x / jnp.ldexp(s, alpha)).astype(jnp.int32)
    units = jnp.clip(units, -zero_point, 255 - zero_point)
    # A row whose compressed squares sum to less than its squared mean has no variance left.
    floor = jnp.maximum(epsilon / (s * s), 2.0**-20)
    y = _ailayernorm(units, alpha, axis=axis, floor=floor, table_bits=table_bits)
    return _affine(y, scale, bias)


_ailayernorm_call = layer_norm_front("ailayernorm", _ailayernorm_of_floats)


def ailayernorm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = -1,
    epsilon: float = 1e-6,
    *,
    table_bits: int = 8,
) -> jax.Array:
    """AILayerNorm: layer normalisation whose statistics come from 8-bit and 4-bit integers.

    Wang et al., "SOLE", ICCAD 2023, arXiv 2510.17189. Inputs are quantised to uint8 with a
    power-of-two factor per channel (see `power_of_two_factor`): x = s·2^α (X - ZP). E[x] is from
    Σ X 2^α. E[x²] is from 4 of the 8 bits of |X|: bits 7 to 4 if one of the upper two is set
    (s = 1), else bits 5 to 2 (s = 0); their square, from 16 values, is shifted by 4 s + 2 α + 4.

    Uncertain: the size of the table for 1/√, which is `table_bits` here; how the affine part is
    quantised (not at all here). The bits that are cut off make the variance too small, by a tenth
    or so. `epsilon` is a lower bound of the variance: the paper has none.

    Args:
      x: array of rank 1 or more, of a floating-point dtype. The quantisation is that of the whole
        array, which the paper calibrates on other data.
      scale, bias: arrays of shape (channels,), or None.
      axis: the axis of the channels, over which x is normalised.
      epsilon: non-negative number.
      table_bits: logarithm of the table's size, 1 to 12.

    Returns:
      An array of x's shape and dtype; rows with NaN or inf are NaN. The derivative is the exact
      function's.

    Raises:
      TypeError: if x, scale or bias have no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis, scale or bias do not fit x; if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.ailayernorm(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    """
    table_bits = _arguments.integer(table_bits, "ailayernorm", "table_bits", 1, 12)
    return _ailayernorm_call(x, scale, bias, axis, epsilon, table_bits=table_bits)


def ailayernorm_int(
    x: ArrayLike,
    alpha: ArrayLike,
    zero_point: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = -1,
    *,
    table_bits: int = 8,
) -> jax.Array:
    """AILayerNorm of uint8 numbers; see `ailayernorm`.

    Args:
      x: uint8 array of rank 1 or more.
      alpha: the power-of-two factors, integers of shape (channels,), 0 to 3.
      zero_point: integer scalar: the value of x that stands for 0.
      scale, bias: float arrays of shape (channels,), or None.
      axis: the axis of the channels.
      table_bits: as in `ailayernorm`.

    Returns:
      A float32 array of x's shape. The scale of x cancels. Rows without variance give `bias`.

    Raises:
      TypeError: if x, alpha or zero_point have another dtype; if an argument has a wrong type.
      ValueError: if axis, alpha, zero_point, scale or bias do not fit x; if table_bits is out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([138, 148, 158, 188], jnp.uint8)
      >>> y = approximations.ailayernorm_int(x, jnp.zeros(4, jnp.int32), jnp.int32(128))
    """
    name = "ailayernorm_int"
    x = _arguments.integer_array(x, name, dtypes=[jnp.uint8])
    axis = _arguments.one_axis(axis, x.ndim, name)
    alpha = _arguments.channels(
        _arguments.integer_array(alpha, name, "alpha"), x, axis, name, "alpha"
    )
    dtypes = (jnp.uint8, jnp.int8, jnp.int16, jnp.int32)
    zero_point = _arguments.integer_array(zero_point, name, "zero_point", dtypes)
    if zero_point.shape != ():
        raise ValueError(
            f"quake_jax.approximations.{name}: zero_point must be one number; got an array of "
            f"shape {zero_point.shape}"
        )
    table_bits = _arguments.integer(table_bits, name, "table_bits", 1, 12)
    scale = _arguments.channels(scale, x, axis, name, "scale")
    bias = _arguments.channels(bias, x, axis, name, "bias")
    floor = jnp.float32(2.0**-20)
    y = _ailayernorm(x - zero_point, alpha, axis=axis, floor=floor, table_bits=table_bits)
    return _affine(y, scale, bias)
