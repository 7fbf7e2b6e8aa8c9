"""FQ-ViT: Log-Int-Softmax, and layer normalisation with power-of-two factors.

Lin, Zhang, Sun, Li, Zhou, "FQ-ViT: Post-Training Quantization for Fully Quantized Vision
Transformer", IJCAI 2022, arXiv 2111.13824. The details are those of the authors' code
(github.com/megvii-research/FQ-ViT, Apache-2.0).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments, _ibert
from quake_jax.approximations._front import layer_norm_front, softmax_front
from quake_jax.approximations._quantise import quantised

# The largest power-of-two factor, K in the paper, is 2^3.
_LARGEST_FACTOR = 3


@functools.partial(jax.jit, static_argnames=("axis", "bits"))
def _log_int_softmax(x, keep, scale, *, axis, bits):
    """The exponents f of attention = 2^-f, and which of them are not 0, of integers x."""
    d = x - jnp.max(x, axis, keepdims=True)
    e = _ibert.exp_of_integers(d, scale)
    total = jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True)
    # Larger quotients are 0 in the result whatever they are; log2 of inf is avoided.
    largest = 2.0 ** (2**bits + 1)
    n = jnp.minimum(jnp.round(total / jnp.maximum(e, 1e-30)), largest)
    mantissa, exponent = jnp.frexp(n)
    # n = 2^f (2 mantissa), and n - 2^f >= 2^(f-1) means mantissa >= 3/4.
    f = exponent - 1 + (mantissa >= 0.75).astype(exponent.dtype)
    return f, f < 2**bits


def _log_int_softmax_of_floats(x, keep, scale, *, axis, bits, input_bit):
    x, scale = quantised(x, scale, input_bit, keep)
    f, some = _log_int_softmax(x, keep, scale, axis=axis, bits=bits)
    return jnp.where(some, jnp.ldexp(jnp.float32(1), -f), 0)


_log_int_softmax_call = softmax_front("log_int_softmax", _log_int_softmax_of_floats)


def log_int_softmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    scale: float | jax.Array | None = None,
    bits: int = 4,
    input_bit: int = 8,
) -> jax.Array:
    """Log-Int-Softmax (LIS): attention weights that are powers of two, of 4 bits.

    Lin et al., "FQ-ViT", IJCAI 2022, arXiv 2111.13824. With e = i-exp(x - max x) (see `i_exp`):
    N = ⌊Σe / e⌉; f = ⌊log2 N⌋, and one more if N - 2^f >= 2^(f-1); weight 2^-f, and 0 if
    f >= 2^bits. The product with the values is then made of shifts.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      scale: of the quantisation of x, a positive number, which may be traced. None: the largest
        |x| of the whole array is the largest integer; the authors calibrate one for each layer.
      bits: of f, 1 to 4.
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
      >>> approximations.log_int_softmax(jnp.array([2.0, 1.0, -4.0])).tolist()
      [1.0, 0.25, 0.001953125]
    """
    name = "log_int_softmax"
    scale = _arguments.optional_scalar(scale, name, "scale")
    bits = _arguments.integer(bits, name, "bits", 1, 4)
    input_bit = _arguments.integer(input_bit, name, "input_bit", 2, 16)
    return _log_int_softmax_call(x, axis, where, scale, bits=bits, input_bit=input_bit)


def log_int_softmax_int(
    x: ArrayLike,
    scale: float | jax.Array,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    bits: int = 4,
) -> jax.Array:
    """Log-Int-Softmax of integers x, which stand for x·scale; see `log_int_softmax`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more.
      scale: positive number.
      axis: one axis.
      where: boolean array that broadcasts to x's shape, or None.
      bits: of the result, 1 to 4.

    Returns:
      An int32 array f of x's shape: weights are 2^-f, and 0 where f is 2^bits.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([32, 16, -64], jnp.int8)
      >>> approximations.log_int_softmax_int(x, 1 / 16).tolist()
      [0, 2, 8]
    """
    name = "log_int_softmax_int"
    x, scale, axis, keep = _ibert.row_arguments(x, scale, axis, where, name)
    bits = _arguments.integer(bits, name, "bits", 1, 4)
    f, some = _log_int_softmax(x, keep, scale, axis=axis, bits=bits)
    return jnp.where(some & keep, f, 2**bits)


# Power-of-two factors.


@functools.partial(jax.jit, static_argnames=("axis", "input_bit"))
def power_of_two_factors(x: jax.Array, *, axis: int, input_bit: int):
    """α, s and the zero point of `power_of_two_factor`; α broadcasts with x."""
    limit = 2**input_bit - 1
    low, high = jnp.min(x), jnp.max(x)
    # The scale of the largest factor covers the range of the whole array.
    widest = jnp.maximum((high - low) / limit, jnp.finfo(jnp.float32).eps)
    zero_point = jnp.clip(-jnp.round(low / widest), 0, limit)
    s = widest / 2**_LARGEST_FACTOR
    others = tuple(d for d in range(x.ndim) if d != axis)

    def error(alpha):
        unit = s * 2**alpha
        q = jnp.clip(jnp.round(x / unit + zero_point), 0, limit) - zero_point
        return jnp.mean((x - q * unit) ** 2, others, keepdims=True)

    errors = jnp.stack([error(alpha) for alpha in range(_LARGEST_FACTOR + 1)])
    return jnp.argmin(errors, 0).astype(jnp.int32), s, zero_point.astype(jnp.int32)


def power_of_two_factor(
    x: ArrayLike, axis: int = -1, *, input_bit: int = 8
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Power-of-two factors (PTF): a quantisation of x with one scale, and a shift per channel.

    Lin et al., "FQ-ViT", IJCAI 2022, arXiv 2111.13824: s = (max x - min x) / (8 (2^bits - 1)),
    and for each channel the α of 0, 1, 2, 3 with the smallest mean square error of
    x ≈ s·2^α (X - ZP), X from 0 to 2^bits - 1.

    Args:
      x: array of rank 1 or more, of a floating-point dtype; all its values are finite.
      axis: the axis of the channels.
      input_bit: bits of X, 2 to 16.

    Returns:
      alpha: int32 array of shape (channels,).
      scale: float32 scalar, s.
      zero_point: int32 scalar, ZP.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if x is empty; if axis or input_bit is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([[1.0, 100.0], [-1.0, -90.0]])
      >>> alpha, scale, zero_point = approximations.power_of_two_factor(x)
      >>> alpha.tolist(), zero_point.tolist()
      ([0, 3], 121)
    """
    name = "power_of_two_factor"
    x = _arguments.real_array(x, name)
    axis = _arguments.one_axis(axis, x.ndim, name)
    if x.size == 0:
        raise ValueError(f"quake_jax.approximations.{name}: x is empty; its shape is {x.shape}")
    input_bit = _arguments.integer(input_bit, name, "input_bit", 2, 16)
    alpha, s, zero_point = power_of_two_factors(
        x.astype(jnp.float32), axis=axis, input_bit=input_bit
    )
    return alpha.reshape(-1), s, zero_point


def _multiplier_and_shift(a: jax.Array, bit: int = 7):
    """M and N with |a| ≈ M / 2^N and M of 8 bits."""
    _, exponent = jnp.frexp(a)  # ⌊log2 a⌋ is exponent - 1
    n = jnp.clip(bit + 1 - exponent, 0, 31)
    m = jnp.clip(jnp.floor(jnp.ldexp(a, n)), 0, 2 ** (bit + 1) - 1)
    return m, n


@functools.partial(jax.jit, static_argnames=("axis", "epsilon"))
def _ptf_layernorm(x, s, scale, bias, output_scale, *, axis, epsilon):
    """Integers y with y·output_scale ≈ LayerNorm of the integers x, whose unit is s."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis, keepdims=True)
    # n Σx² - (Σx)² in the paper, whose terms need 64 bits; this is n² times the same variance.
    variance = jnp.mean((x - mean) ** 2, axis, keepdims=True)
    deviation = s * jnp.sqrt(variance + epsilon / (s * s))
    deviation = jnp.where(deviation > 0, deviation, jnp.inf)
    scale = jnp.float32(1) if scale is None else scale
    bias = jnp.float32(0) if bias is None else bias
    a = s / deviation * scale / output_scale
    m, n = _multiplier_and_shift(jnp.abs(a))
    b = jnp.round(jnp.ldexp((bias - s * mean / deviation * scale) / output_scale, n))
    return jnp.round(jnp.ldexp(jnp.sign(a) * m * x + b, -n))


def _ptf_layernorm_of_floats(x, scale, bias, output_scale, *, axis, epsilon, input_bit, output_bit):
    alpha, s, zero_point = power_of_two_factors(x, axis=axis, input_bit=input_bit)
    zero_point = zero_point.astype(s.dtype)
    limit = 2**input_bit - 1
    units = jnp.clip(jnp.round(x / jnp.ldexp(s, alpha) + zero_point), 0, limit) - zero_point
    units = jnp.ldexp(units, alpha)
    largest = 2 ** (output_bit - 1) - 1
    if output_scale is None:
        y = _ptf_exact(units * s, scale, bias, axis, epsilon)
        output_scale = jnp.maximum(jnp.max(jnp.abs(y)), 1e-30) / largest
    y = _ptf_layernorm(units, s, scale, bias, output_scale, axis=axis, epsilon=epsilon)
    return jnp.clip(y, -largest - 1, largest) * output_scale


def _ptf_exact(x, scale, bias, axis, epsilon):
    centred = x - jnp.mean(x, axis, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(centred**2, axis, keepdims=True) + epsilon)
    y = centred / jnp.where(deviation > 0, deviation, 1)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


_ptf_layernorm_call = layer_norm_front("ptf_layernorm", _ptf_layernorm_of_floats)


def ptf_layernorm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = -1,
    epsilon: float = 1e-6,
    *,
    output_scale: float | jax.Array | None = None,
    input_bit: int = 8,
    output_bit: int = 8,
) -> jax.Array:
    """Layer normalisation of FQ-ViT: power-of-two factors, then integers, a multiplier, a shift.

    Lin et al., "FQ-ViT", IJCAI 2022, arXiv 2111.13824. x is quantised as by
    `power_of_two_factor`; then mean and deviation are those of the integers x_q = 2^α (X - ZP),
    and y = ⌊(±M x_q + B) / 2^N⌉, where M / 2^N with 8 bits in M stands for |scale| / (σ s_out) and
    B for the rest; y·s_out is the result.

    The authors' code has no epsilon; here it is added to the variance. Statistics are float32,
    as there.

    Args:
      x: array of rank 1 or more, of a floating-point dtype. The quantisation is that of the whole
        array, which the authors calibrate on other data.
      scale, bias: arrays of shape (channels,), or None.
      axis: the axis of the channels, over which x is normalised.
      epsilon: non-negative number.
      output_scale: s_out, a positive number, which may be traced. None: the largest result is the
        largest integer.
      input_bit, output_bit: bits of the integers x and y, 2 to 16.

    Returns:
      An array of x's shape and dtype; rows with NaN or inf are NaN. The derivative is the exact
      function's.

    Raises:
      TypeError: if x, scale or bias have no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis, scale or bias do not fit x; if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.ptf_layernorm(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    """
    name = "ptf_layernorm"
    output_scale = _arguments.optional_scalar(output_scale, name, "output_scale")
    static = {
        "input_bit": _arguments.integer(input_bit, name, "input_bit", 2, 16),
        "output_bit": _arguments.integer(output_bit, name, "output_bit", 2, 16),
    }
    return _ptf_layernorm_call(x, scale, bias, axis, epsilon, output_scale, **static)


def ptf_layernorm_int(
    x: ArrayLike,
    input_scale: float | jax.Array,
    output_scale: float | jax.Array,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = -1,
    epsilon: float = 0.0,
) -> jax.Array:
    """Integer layer normalisation of FQ-ViT, of the integers 2^α (X - ZP); see `ptf_layernorm`.

    Args:
      x: array of int8, int16 or int32 of rank 1 or more: the quantised x, shifted by α.
      input_scale: s, positive: x·s is what x stands for.
      output_scale: s_out, positive.
      scale, bias: float arrays of shape (channels,), or None.
      axis: the axis of the channels.
      epsilon: non-negative number, added to the variance of x·s.

    Returns:
      An int32 array y of x's shape, not clipped: y·output_scale is the result. Rows without
      variance give `bias` if epsilon is 0.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis, scale or bias do not fit x; if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([10, 20, 30, 60], jnp.int32)
      >>> approximations.ptf_layernorm_int(x, 0.1, 1 / 64).tolist()
      [-69, -34, 0, 102]
    """
    name = "ptf_layernorm_int"
    x = _arguments.integer_array(x, name)
    axis = _arguments.one_axis(axis, x.ndim, name)
    s = _arguments.scalar(input_scale, name, "input_scale")
    output_scale = _arguments.scalar(output_scale, name, "output_scale")
    scale = _arguments.channels(scale, x, axis, name, "scale")
    bias = _arguments.channels(bias, x, axis, name, "bias")
    epsilon = 0.0 if epsilon == 0 else _arguments.positive(epsilon, name, "epsilon")
    y = _ptf_layernorm(x, s, scale, bias, output_scale, axis=axis, epsilon=epsilon)
    return y.astype(jnp.int32)
