"""I-ViT: ShiftExp, Shiftmax, ShiftGELU and I-LayerNorm.

Li, Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", ICCV 2023,
arXiv 2207.01405. The details are those of the authors' code (github.com/zkkli/I-ViT, Apache-2.0),
which carries large integers in float32 as is done here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._front import (
    exp_front,
    gelu_front,
    layer_norm_front,
    softmax_front,
)
from quake_jax.approximations._ibert import row_arguments
from quake_jax.approximations._quantise import quantised

# Fixed shift n of each function in the authors' code.
_SOFTMAX_N, _GELU_N = 15, 23
_LARGEST = 2.0**31 - 1
_SIGMOID_SLOPE = 1.702
_NEWTON_START, _NEWTON_STEPS = 2**16, 10


@functools.partial(jax.jit, static_argnames="n")
def shift_exp_of_integers(x: jax.Array, scale: jax.Array, n: int) -> jax.Array:
    """e with e·scale/2^n ≈ exp(x·scale) of int32 x, as float32 integers."""
    i0 = jnp.floor(-1 / scale).astype(jnp.int32)
    x = jnp.maximum(x, n * i0)  # those below come out the same, and now their sums fit
    p = jnp.maximum(x + (x >> 1) - (x >> 4), n * i0)
    q = p // i0
    r = (p - q * i0).astype(jnp.float32)
    return jnp.maximum(jnp.floor(jnp.ldexp(r / 2 - i0.astype(jnp.float32), n - q)), 0)


def _quotient(e: jax.Array, total: jax.Array, output_bit: int) -> jax.Array:
    """e / total as integers whose unit is 2^-(output_bit - 1)."""
    factor = jnp.floor(_LARGEST / jnp.minimum(total, _LARGEST))
    return jnp.floor(jnp.ldexp(e * factor, -(31 - output_bit + 1)))


def _shift_exp_of_floats(x, scale, *, n, input_bit):
    limit = 2 ** (input_bit - 1)
    if scale is None:
        lowest = jnp.min(jnp.where(jnp.isfinite(x), x, 0), initial=0.0)
        # n ln 2 is where the result stays the same.
        scale = jnp.minimum(jnp.where(lowest < 0, -lowest, 1.0), 0.7 * n) / limit
    units = jnp.clip(jnp.round(x / scale), -limit, 0).astype(jnp.int32)
    y = jnp.ldexp(shift_exp_of_integers(units, scale, n) * scale, -n)
    return jnp.where(x > 0, jnp.nan, y)


_shift_exp_call = exp_front("shift_exp", _shift_exp_of_floats)


def shift_exp(
    x: ArrayLike,
    *,
    scale: float | jax.Array | None = None,
    n: int = _SOFTMAX_N,
    input_bit: int = 16,
) -> jax.Array:
    """ShiftExp: exp(x) for x <= 0 in integers, from additions and shifts.

    Li and Gu, "I-ViT", ICCV 2023, arXiv 2207.01405, algorithm 1: x log2(e) ≈ x + x/2 - x/16 as
    shifts of integers, and 2^f ≈ 1 + f/2 on (-1, 0]. Largest error 0.06.

    Args:
      x: array of any shape and floating-point dtype, of numbers of at most 0.
      scale: of the quantisation of x, a positive number, which may be traced. None: the smallest
        x of the whole array, or -0.7 n if that is closer to 0, is the lowest integer.
      n: the fixed shift, 1 to 30; results are at least about 2^-n.
      input_bit: bits of the quantised x, 2 to 24.

    Returns:
      An array of x's shape and dtype; NaN where x is positive. The derivative is exp's.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.shift_exp(jnp.array([0.0, -1.0]))
      >>> bool(abs(y[1] - 0.3679) < 0.06)
      True
    """
    scale = _arguments.optional_scalar(scale, "shift_exp", "scale")
    n = _arguments.integer(n, "shift_exp", "n", 1, 30)
    input_bit = _arguments.integer(input_bit, "shift_exp", "input_bit", 2, 24)
    return _shift_exp_call(x, scale, n=n, input_bit=input_bit)


def shift_exp_int(
    x: ArrayLike, scale: float | jax.Array, *, n: int = _SOFTMAX_N
) -> tuple[jax.Array, jax.Array]:
    """ShiftExp of integers x <= 0, which stand for x·scale; see `shift_exp`.

    Args:
      x: array of int8, int16 or int32; positive numbers count as 0.
      scale: positive number, at least 1e-7.
      n: the fixed shift, 1 to 30.

    Returns:
      e: float32 array of integers of x's shape.
      scale: float32 scalar: e·scale is the exponential.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if a number is out of range, or scale no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> e, scale = approximations.shift_exp_int(jnp.array([0, -16], jnp.int8), 1 / 16)
      >>> (e / 2**15).tolist()
      [16.0, 6.25]
    """
    name = "shift_exp_int"
    x = _arguments.integer_array(x, name)
    scale = _arguments.scalar(scale, name, "scale")
    n = _arguments.integer(n, name, "n", 1, 30)
    return shift_exp_of_integers(jnp.minimum(x, 0), scale, n), jnp.ldexp(scale, -n)


@functools.partial(jax.jit, static_argnames=("axis", "n", "output_bit"))
def _shiftmax(x, keep, scale, *, axis, n, output_bit):
    e = shift_exp_of_integers(x - jnp.max(x, axis, keepdims=True), scale, n)
    return _quotient(e, jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True), output_bit)


def _shiftmax_of_floats(x, keep, scale, *, axis, n, output_bit, input_bit):
    x, scale = quantised(x, scale, input_bit, keep)
    y = _shiftmax(x, keep, scale, axis=axis, n=n, output_bit=output_bit)
    return jnp.ldexp(y, 1 - output_bit)


_shiftmax_call = softmax_front("shiftmax", _shiftmax_of_floats)


def shiftmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    scale: float | jax.Array | None = None,
    n: int = _SOFTMAX_N,
    output_bit: int = 8,
    input_bit: int = 8,
) -> jax.Array:
    """Shiftmax: softmax in integers, with ShiftExp and one integer division per row.

    Li and Gu, "I-ViT", ICCV 2023, arXiv 2207.01405, algorithm 1: e = ShiftExp(x - max x);
    F = ⌊(2^31 - 1) / min(Σe, 2^31 - 1)⌋; y = ⌊e F / 2^(31 - output_bit + 1)⌋ in units of
    2^-(output_bit - 1). Their models have 8-bit logits and 16-bit results.

    Finely quantised logits make it worse: e is up to 2^n / scale, and Σe saturates at 2^31.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      scale: of the quantisation of x, a positive number, which may be traced. None: the largest
        |x| of the whole array is the largest integer; the authors calibrate one for each layer.
      n: the fixed shift of ShiftExp, 1 to 30.
      output_bit: bits of the result, 2 to 16.
      input_bit: bits of the quantised x, 2 to 16.

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
      >>> approximations.shiftmax(jnp.array([2.0, 1.0, -4.0]), scale=1 / 16).tolist()
      [0.7109375, 0.2734375, 0.0]
    """
    name = "shiftmax"
    scale = _arguments.optional_scalar(scale, name, "scale")
    static = {
        "n": _arguments.integer(n, name, "n", 1, 30),
        "output_bit": _arguments.integer(output_bit, name, "output_bit", 2, 16),
        "input_bit": _arguments.integer(input_bit, name, "input_bit", 2, 16),
    }
    return _shiftmax_call(x, axis, where, scale, **static)


def shiftmax_int(
    x: ArrayLike,
    scale: float | jax.Array,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    n: int = _SOFTMAX_N,
    output_bit: int = 8,
) -> jax.Array:
    """Shiftmax of integers x, which stand for x·scale; see `shiftmax`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more.
      scale: positive number, at least 1e-7.
      axis: one axis.
      where: boolean array that broadcasts to x's shape, or None.
      n: the fixed shift of ShiftExp, 1 to 30.
      output_bit: bits of the result, 2 to 16.

    Returns:
      An int32 array of x's shape, whose unit is 2^-(output_bit - 1).

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([32, 16, -64], jnp.int8)
      >>> approximations.shiftmax_int(x, 1 / 16).tolist()
      [91, 35, 0]
    """
    name = "shiftmax_int"
    x, scale, axis, keep = row_arguments(x, scale, axis, where, name)
    n = _arguments.integer(n, name, "n", 1, 30)
    output_bit = _arguments.integer(output_bit, name, "output_bit", 2, 16)
    y = _shiftmax(x, keep, scale, axis=axis, n=n, output_bit=output_bit)
    return jnp.where(keep, y, 0).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("axis", "n", "output_bit"))
def _shiftgelu(x, scale, *, axis, n, output_bit):
    """Integers x·sigmoid, whose unit is scale·2^-(output_bit - 1)."""
    slope = scale * _SIGMOID_SLOPE
    largest = jnp.max(x, axis, keepdims=True)
    e = shift_exp_of_integers(x - largest, slope, n)
    one = shift_exp_of_integers(-largest, slope, n)
    return x.astype(jnp.float32) * _quotient(e, e + one, output_bit)


def _shiftgelu_of_floats(x, scale, *, axis, n, output_bit, input_bit):
    x, scale = quantised(x, scale, input_bit)
    rows = x if x.ndim else x[None]
    y = _shiftgelu(rows, scale, axis=axis, n=n, output_bit=output_bit)
    return jnp.ldexp(y.reshape(x.shape) * scale, 1 - output_bit)


_shiftgelu_call = gelu_front("shiftgelu", _shiftgelu_of_floats)


def shiftgelu(
    x: ArrayLike,
    *,
    axis: int = -1,
    scale: float | jax.Array | None = None,
    n: int = _GELU_N,
    output_bit: int = 8,
    input_bit: int = 8,
) -> jax.Array:
    """ShiftGELU: x·sigmoid(1.702 x) in integers, with ShiftExp.

    Li and Gu, "I-ViT", ICCV 2023, arXiv 2207.01405, algorithm 2: with M the largest x of a row,
    sigmoid = e / (e + e'), e = ShiftExp(1.702 (x - M)), e' = ShiftExp(-1.702 M), and the integer
    quotient of `shiftmax`. So the result of an element depends on its row.

    The factor F of the quotient is a small integer here, 6 to 30: e is up to 2^n / (1.702 scale).
    Rounded down, it makes the sigmoid up to 1 / F too small, which finer inputs make worse; the
    authors train their models with it.

    Args:
      x: array of any shape and floating-point dtype; a scalar is a row of one.
      axis: the axis along which a row lies.
      scale: of the quantisation of x, a positive number, which may be traced. None: the largest
        finite |x| of the whole array is the largest integer.
      n: the fixed shift of ShiftExp, 1 to 30.
      output_bit: bits of the sigmoid, 2 to 16.
      input_bit: bits of the quantised x, 2 to 16.

    Returns:
      An array of x's shape and dtype: NaN gives NaN, inf gives inf, -inf gives 0. The derivative
      is the exact GELU's.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis does not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.shiftgelu(jnp.array([0.0, 4.0])).tolist()
      [0.0, 3.84375]
    """
    name = "shiftgelu"
    x = _arguments.real_array(x, name)
    scale = _arguments.optional_scalar(scale, name, "scale")
    static = {
        "axis": _arguments.one_axis(axis, max(x.ndim, 1), name),
        "n": _arguments.integer(n, name, "n", 1, 30),
        "output_bit": _arguments.integer(output_bit, name, "output_bit", 2, 16),
        "input_bit": _arguments.integer(input_bit, name, "input_bit", 2, 16),
    }
    return _shiftgelu_call(x, scale, **static)


def shiftgelu_int(
    x: ArrayLike,
    scale: float | jax.Array,
    axis: int = -1,
    *,
    n: int = _GELU_N,
    output_bit: int = 8,
) -> tuple[jax.Array, jax.Array]:
    """ShiftGELU of integers x, which stand for x·scale; see `shiftgelu`.

    Args:
      x: array of int8 or int16, of rank 1 or more.
      scale: positive number, at least 1e-7.
      axis: the axis along which a row lies.
      n: the fixed shift of ShiftExp, 1 to 30.
      output_bit: bits of the sigmoid, 2 to 15.

    Returns:
      y: int32 array of x's shape.
      scale: float32 scalar: y·scale is GELU.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis does not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y, scale = approximations.shiftgelu_int(jnp.array([0, 64], jnp.int8), 1 / 16)
      >>> (y * scale).tolist()
      [0.0, 3.90625]
    """
    name = "shiftgelu_int"
    x = _arguments.integer_array(x, name, dtypes=(jnp.int8, jnp.int16))
    axis = _arguments.one_axis(axis, x.ndim, name)
    scale = _arguments.scalar(scale, name, "scale")
    n = _arguments.integer(n, name, "n", 1, 30)
    output_bit = _arguments.integer(output_bit, name, "output_bit", 2, 15)
    y = _shiftgelu(x, scale, axis=axis, n=n, output_bit=output_bit)
    return y.astype(jnp.int32), jnp.ldexp(scale, 1 - output_bit)


def _integer_sqrt(x: jax.Array) -> jax.Array:
    """⌊√x⌋ or so of float32 integers: ten steps of Newton's iteration from 2^16."""
    k = jnp.full_like(x, _NEWTON_START)
    for _ in range(_NEWTON_STEPS):
        k = jnp.floor((k + jnp.floor(x / k)) / 2)
    return k


@functools.partial(jax.jit, static_argnames="axis")
def _i_layernorm(x, *, axis):
    """Integers whose unit is √n/2^30, of integers x: (x - mean) / σ."""
    x = x.astype(jnp.float32)
    centred = x - jnp.round(jnp.mean(x, axis, keepdims=True))
    deviation = _integer_sqrt(jnp.sum(centred * centred, axis, keepdims=True))
    factor = jnp.floor(_LARGEST / jnp.maximum(deviation, 1))
    return jnp.floor(centred * factor / 2)


def _affine(y, scale, bias):
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _i_layernorm_of_floats(x, scale, bias, input_scale, *, axis, epsilon, input_bit):
    units, _ = quantised(x, input_scale, input_bit)
    unit = x.shape[axis] ** 0.5 / 2**30
    return _affine(_i_layernorm(units, axis=axis) * unit, scale, bias)


_i_layernorm_call = layer_norm_front("i_layernorm", _i_layernorm_of_floats)


def i_layernorm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = -1,
    epsilon: float = 1e-6,
    *,
    input_scale: float | jax.Array | None = None,
    input_bit: int = 16,
) -> jax.Array:
    """I-LayerNorm: layer normalisation in integers, with an iterated square root.

    Li and Gu, "I-ViT", ICCV 2023, arXiv 2207.01405, algorithm 3: mean rounded to an integer; √ of
    the sum of squares by 10 steps k ← ⌊(k + ⌊v / k⌋) / 2⌋ from 2^16; ⌊(2^31 - 1) / k⌋ as
    multiplier. Deviations below about 64 / √channels units are not reached in 10 steps, and come
    out too large: 8 bits need a fitting scale. The bias, a multiple of √channels·scale / 2^30
    there, is not rounded here.

    Args:
      x: array of rank 1 or more, of a floating-point dtype.
      scale, bias: arrays of shape (channels,), or None.
      axis: the axis over which x is normalised.
      epsilon: of the exact function that the derivative is taken of; the method has none.
      input_scale: of the quantisation of x, a positive number, which may be traced. None: the
        largest |x| of the whole array is the largest integer.
      input_bit: bits of the quantised x, 2 to 16; the authors' models have 16 there.

    Returns:
      An array of x's shape and dtype; rows with NaN or inf are NaN. The derivative is the exact
      function's.

    Raises:
      TypeError: if x, scale or bias have no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis, scale or bias do not fit x; if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.i_layernorm(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    """
    name = "i_layernorm"
    input_scale = _arguments.optional_scalar(input_scale, name, "input_scale")
    input_bit = _arguments.integer(input_bit, name, "input_bit", 2, 16)
    return _i_layernorm_call(x, scale, bias, axis, epsilon, input_scale, input_bit=input_bit)


def i_layernorm_int(x: ArrayLike, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """I-LayerNorm of integers x, whose scale cancels, without the affine part; see `i_layernorm`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more.
      axis: the axis over which x is normalised.

    Returns:
      y: float32 array of integers of x's shape.
      scale: float32 scalar, √channels / 2^30: y·scale is the result.

    Raises:
      TypeError: if x is not of an integer dtype named above; if axis is no integer.
      ValueError: if axis does not fit x.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([-200, 200], jnp.int16)
      >>> y, scale = approximations.i_layernorm_int(x)
      >>> (y * scale).round(2).tolist()
      [-1.0, 1.0]
    """
    x = _arguments.integer_array(x, "i_layernorm_int")
    axis = _arguments.one_axis(axis, x.ndim, "i_layernorm_int")
    return _i_layernorm(x, axis=axis), jnp.float32(x.shape[axis] ** 0.5 / 2**30)
