"""I-BERT: i-exp, i-softmax and i-GELU.

Kim, Gholami, Yao, Mahoney, Keutzer, "I-BERT: Integer-only BERT Quantization", ICML 2021, arXiv
2101.01321: algorithms 1 to 4. Where these leave a choice, it is that of the authors' code
(github.com/kssteven418/I-BERT, MIT), which carries large integers in float32 as is done here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._front import exp_front, gelu_front, softmax_front
from quake_jax.approximations._quantise import quantised

# exp(p) ≈ a p² + b p + 1 on (-ln 2, 0], and the shift that keeps bits of its powers.
_EXP_A, _EXP_B = 0.35815147, 0.96963238
_LN2 = 0.6931
_SHIFT = 30
# erf(u) ≈ sgn(u) [a (min(|u|, -b) + b)² + 1].
_ERF_A, _ERF_B = -0.2888, -1.769
_SQRT2 = 1.4142
# Below this, ⌊ln 2 / scale⌋ would not fit a 32-bit integer times 30.
_SMALLEST_SCALE = 1e-7


@jax.jit
def exp_of_integers(x: jax.Array, scale: jax.Array) -> jax.Array:
    """e with e·a·scale²/2^30 ≈ exp(x·scale) of int32 x <= 0, as float32 integers."""
    x0 = jnp.floor(-_LN2 / scale).astype(jnp.int32)
    x = jnp.maximum(x, _SHIFT * x0)
    q = x // x0
    r = (x - q * x0).astype(jnp.float32)
    b = jnp.floor((_EXP_B / _EXP_A) / scale)
    c = jnp.floor((1 / _EXP_A) / (scale * scale))
    return jnp.maximum(jnp.floor(jnp.ldexp(r * (r + b) + c, _SHIFT - q)), 0)


def _exp_scale(scale: jax.Array) -> jax.Array:
    return jnp.ldexp(_EXP_A * scale * scale, -_SHIFT)


def _exp_of_floats(x, scale, *, input_bit):
    if scale is None:
        lowest = jnp.min(jnp.where(jnp.isfinite(x), x, 0), initial=0.0)
        # Below 30 ln 2 the result is that of 30 ln 2.
        scale = jnp.minimum(jnp.where(lowest < 0, -lowest, 1.0), _SHIFT * _LN2) / 2 ** (
            input_bit - 1
        )
    limit = 2 ** (input_bit - 1)
    units = jnp.clip(jnp.round(x / scale), -limit, 0).astype(jnp.int32)
    y = exp_of_integers(units, scale) * _exp_scale(scale)
    return jnp.where(x > 0, jnp.nan, y)


_exp_call = exp_front("i_exp", _exp_of_floats)


def i_exp(
    x: ArrayLike, *, scale: float | jax.Array | None = None, input_bit: int = 16
) -> jax.Array:
    """i-exp: exp(x) for x <= 0 in integers, a parabola and a shift.

    Kim et al., "I-BERT", ICML 2021, arXiv 2101.01321, algorithm 3: x = p - z ln 2 with p in
    (-ln 2, 0], exp(p) ≈ 0.35815147 p² + 0.96963238 p + 1 (largest error 1.9e-3), shifted right by
    z. ln 2 is 0.6931, and z at most 30, as in the authors' code.

    Args:
      x: array of any shape and floating-point dtype, of numbers of at most 0.
      scale: of the quantisation of x, a positive number, which may be traced. None: the smallest
        x of the whole array, or -30 ln 2 if that is closer to 0, is the lowest integer.
      input_bit: bits of the quantised x, 2 to 24.

    Returns:
      An array of x's shape and dtype; NaN where x is positive. The derivative is exp's.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.i_exp(jnp.array([0.0, -1.0]))
      >>> bool(abs(y[1] - 0.3679) < 2e-3)
      True
    """
    scale = _arguments.optional_scalar(scale, "i_exp", "scale")
    input_bit = _arguments.integer(input_bit, "i_exp", "input_bit", 2, 24)
    return _exp_call(x, scale, input_bit=input_bit)


def i_exp_int(x: ArrayLike, scale: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """i-exp of integers x <= 0, which stand for x·scale; see `i_exp`.

    Args:
      x: array of int8, int16 or int32; positive numbers count as 0.
      scale: positive number, at least 1e-7.

    Returns:
      e: float32 array of integers of x's shape, as the authors' code has them: up to 2^30 / scale².
      scale: float32 scalar: e·scale is the exponential.

    Raises:
      TypeError: if x is not of an integer dtype named above, or scale no number.
      ValueError: if scale is too small or not positive, or no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> e, scale = approximations.i_exp_int(jnp.array([0, -16], jnp.int8), 1 / 16)
      >>> (e / 2**30).tolist()
      [714.0, 279.0]
    """
    x = _arguments.integer_array(x, "i_exp_int")
    scale = _scale(scale, "i_exp_int")
    return exp_of_integers(jnp.minimum(x, 0), scale), _exp_scale(scale)


def _scale(scale, name: str) -> jax.Array:
    array = _arguments.scalar(scale, name, "scale")
    if not isinstance(scale, jax.Array) and float(scale) < _SMALLEST_SCALE:
        raise ValueError(
            f"quake_jax.approximations.{name}: scale must be at least {_SMALLEST_SCALE}; "
            f"got {scale}"
        )
    return array


def row_arguments(x, scale, axis, where, name: str):
    """Checked arguments of an integer softmax: int32 x, scale, axis, and which elements count.

    Those that do not are the largest of their row.
    """
    x = _arguments.integer_array(x, name)
    scale = _scale(scale, name)
    axis = _arguments.one_axis(axis, x.ndim, name)
    _arguments.masks(where, x, name)
    keep = jnp.ones_like(x, bool) if where is None else jnp.broadcast_to(where, x.shape)
    lowest = jnp.iinfo(jnp.int32).min // 2
    largest = jnp.max(x, axis, keepdims=True, where=keep, initial=lowest)
    return jnp.where(keep, x, largest), scale, axis, keep


@functools.partial(jax.jit, static_argnames=("axis", "output_bit"))
def _softmax(x, keep, scale, *, axis, output_bit):
    """Quotients in float32 if output_bit is None, else integers whose unit is 2^-output_bit."""
    e = exp_of_integers(x - jnp.max(x, axis, keepdims=True), scale)
    if output_bit is None:
        return e / jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True)
    # The authors bring e to 16 bits before the sum; the largest is always exp(0).
    one = exp_of_integers(jnp.zeros((), jnp.int32), scale)
    e = jnp.round(e * (32767 / one)).astype(jnp.int32)
    total = jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True, dtype=jnp.int32)
    factor = jnp.floor(2.0**32 / total.astype(jnp.float32))
    return jnp.floor(jnp.ldexp(e.astype(jnp.float32) * factor, output_bit - 32))


def _softmax_of_floats(x, keep, scale, *, axis, output_bit, input_bit):
    x, scale = quantised(x, scale, input_bit, keep)
    y = _softmax(x, keep, scale, axis=axis, output_bit=output_bit)
    return y if output_bit is None else jnp.ldexp(y, -output_bit)


_softmax_call = softmax_front("i_softmax", _softmax_of_floats)


def _output_bit(output_bit, name: str) -> int | None:
    if output_bit is None:
        return None
    return _arguments.integer(output_bit, name, "output_bit", 1, 16)


def i_softmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    scale: float | jax.Array | None = None,
    output_bit: int | None = None,
    input_bit: int = 16,
) -> jax.Array:
    """i-softmax: i-exp of x - max x, divided by its sum.

    Kim et al., "I-BERT", ICML 2021, arXiv 2101.01321, algorithm 4 (see `i_exp`). The algorithm
    ends with the quotient, which is what the default gives. The authors' code rounds e to 16 bits,
    multiplies it by ⌊2^32 / Σe⌋ and keeps `output_bit` bits, 8 in their models.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      scale: of the quantisation of x, a positive number, which may be traced. None: the largest
        |x| of the whole array is the largest integer.
      output_bit: None or 1 to 16; the result is then cut to a multiple of 2^-output_bit.
      input_bit: bits of the quantised x, 2 to 16. Logits are 32-bit products in I-BERT.

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
      >>> approximations.i_softmax(jnp.array([1.0, 1.0]), output_bit=8).tolist()
      [0.5, 0.5]
    """
    name = "i_softmax"
    scale = _arguments.optional_scalar(scale, name, "scale")
    static = {
        "output_bit": _output_bit(output_bit, name),
        "input_bit": _arguments.integer(input_bit, name, "input_bit", 2, 16),
    }
    return _softmax_call(x, axis, where, scale, **static)


def i_softmax_int(
    x: ArrayLike,
    scale: float | jax.Array,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    output_bit: int = 8,
) -> jax.Array:
    """i-softmax of integers x, which stand for x·scale; see `i_softmax`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more; rows have fewer than 65536 elements.
      scale: positive number, at least 1e-7.
      axis: one axis.
      where: boolean array that broadcasts to x's shape, or None.
      output_bit: bits of the result, 1 to 16.

    Returns:
      An int32 array of x's shape, whose unit is 2^-output_bit.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([32, 16, -64], jnp.int8)
      >>> approximations.i_softmax_int(x, 1 / 16).tolist()
      [183, 71, 0]
    """
    name = "i_softmax_int"
    x, scale, axis, keep = row_arguments(x, scale, axis, where, name)
    output_bit = _arguments.integer(output_bit, name, "output_bit", 1, 16)
    y = _softmax(x, keep, scale, axis=axis, output_bit=output_bit)
    return jnp.where(keep, y, 0).astype(jnp.int32)


def _erf(x: jax.Array, scale: jax.Array):
    """Integers and their (negative) scale for erf of the float32 integers x."""
    b = jnp.floor(_ERF_B / scale)
    unit = _ERF_A * scale * scale
    c = jnp.floor(1 / unit)
    return jnp.sign(x) * ((jnp.minimum(jnp.abs(x), -b) + b) ** 2 + c), unit


@jax.jit
def _gelu(x: jax.Array, scale: jax.Array):
    x = x.astype(jnp.float32)
    erf, unit = _erf(x, scale / _SQRT2)
    one = jnp.floor(1 / unit)
    return x * (erf + one), scale * unit / 2


def _gelu_of_floats(x, scale, *, input_bit):
    x, scale = quantised(x, scale, input_bit)
    y, unit = _gelu(x, scale)
    return y * unit


_gelu_call = gelu_front("i_gelu", _gelu_of_floats)


def i_gelu(
    x: ArrayLike, *, scale: float | jax.Array | None = None, input_bit: int = 8
) -> jax.Array:
    """i-GELU: GELU with a parabola for the error function, in integers.

    Kim et al., "I-BERT", ICML 2021, arXiv 2101.01321, algorithm 2:
    erf(u) ≈ sgn(u) [-0.2888 (min(|u|, 1.769) - 1.769)² + 1], u = x / 1.4142; the largest error of
    GELU is 0.018 without the quantisation. The authors' code shifts the integers of erf right by
    14 bits, for inputs of more than 8 bits; that is left out here.

    Args:
      x: array of any shape and floating-point dtype.
      scale: of the quantisation of x, a positive number, which may be traced. None: the largest
        finite |x| of the whole array is the largest integer.
      input_bit: bits of the quantised x, 2 to 16.

    Returns:
      An array of x's shape and dtype: NaN gives NaN, inf gives inf, -inf gives 0. The derivative
      is the exact GELU's.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.i_gelu(jnp.array([0.0, 4.0])).round(2).tolist()
      [0.0, 4.0]
    """
    scale = _arguments.optional_scalar(scale, "i_gelu", "scale")
    input_bit = _arguments.integer(input_bit, "i_gelu", "input_bit", 2, 16)
    return _gelu_call(x, scale, input_bit=input_bit)


def i_gelu_int(x: ArrayLike, scale: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """i-GELU of integers x, which stand for x·scale; see `i_gelu`.

    Args:
      x: array of int8, int16 or int32.
      scale: positive number, at least 1e-7.

    Returns:
      y: float32 array of integers of x's shape.
      scale: float32 scalar, negative as in the paper: y·scale is GELU.

    Raises:
      TypeError: if x is not of an integer dtype named above, or scale no number.
      ValueError: if scale is too small or not positive, or no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y, scale = approximations.i_gelu_int(jnp.array([0, 64], jnp.int8), 1 / 16)
      >>> (y * scale).round(2).tolist()
      [0.0, 4.0]
    """
    x = _arguments.integer_array(x, "i_gelu_int")
    return _gelu(x, _scale(scale, "i_gelu_int"))
