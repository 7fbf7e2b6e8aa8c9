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
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quake_jax import _constants

_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
_LN2 = math.log(2)
_SMALLEST_NORMAL = 2.0**-126
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)

# Klambauer et al., arXiv 1706.02515: the fixed point of zero mean and unit variance.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946


# The building blocks, on float32 arrays.


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


def _times_power_of_two(p, n):
    """p · 2^n for p from 1 to 3, or 0 where that would be subnormal."""
    value = p * _power_of_two(jnp.maximum(n, -127.0))
    return jnp.where(value < _SMALLEST_NORMAL, 0, value)


def _split_power(t, order, shift, largest):
    """p and n with 2^t ≈ p · 2^n, for orders 1 to 3; n is at most `largest`."""
    if order == 1:
        # int32((t + 127 - shift) · 2^23) reinterpreted as float32, taken apart: its integer part
        # is the exponent field, its fraction the mantissa field.
        t = t - shift
        n = jnp.minimum(jnp.floor(t), largest)
        return 1 + (t - n), n
    n = jnp.minimum(jnp.floor(t), largest)
    return _polynomial(t - n, [1.0, *_constants.EXP2_POLY[order]]), n


def _exp(x, order, *, shift=_constants.ORDER1_SHIFT, low=0.0, scale=0):
    """e^(x + low) · 2^scale; inf on overflow, 0 where that would be subnormal.

    `low`, small, carries what does not fit into x (orders 4 and 5 only). `shift` is the constant C
    of order 1 in units of the exponent. `scale` is a whole number.
    """
    # Beyond these bounds the result is 0 or inf all the same, and inf - inf must not arise.
    x = jnp.clip(x, -88.0 - scale, 89.0)
    # n is cut where 2^(n + scale) would overflow: the polynomial then exceeds 2 and makes it inf.
    largest = 127.0 - scale
    if order <= 3:
        p, n = _split_power(x * _constants.LOG2E, order, shift, largest)
    else:
        # Cody and Waite: n · LN2_HI is exact, so r is as accurate as x.
        n = jnp.minimum(jnp.floor((x + low) * _constants.LOG2E), largest)
        r = (x - n * _constants.LN2_HI) - n * _constants.LN2_LO + low
        p = _polynomial(r, [1.0, *_constants.EXP_POLY[order]])
    return _times_power_of_two(p, n + scale)


def _expm1(x, order):
    """e^x - 1 = 2·(2^(n-1)·(2^f - 1) + (2^(n-1) - 1/2)) with |f| ≤ 1/2.

    2^f - 1 ≈ f · q(f) has small relative error, so nothing cancels where the result is small.
    """
    t = jnp.clip(x * _constants.LOG2E, -30.0, 128.5)  # -1 and inf beyond, in float32
    n = jnp.round(t)  # half to even
    if order <= 3:
        f = t - n
    else:
        x = jnp.clip(x, -21.0, 90.0)
        f = ((x - n * _constants.LN2_HI) - n * _constants.LN2_LO) * _constants.LOG2E
    half = _power_of_two(n - 1)
    return 2 * (half * (f * _polynomial(f, _constants.EXPM1_CENTERED[order])) + (half - 0.5))


def _log1p_of_exp(x, order):
    """log(1 + e^x) for x ≤ 0, with small relative error however small e^x is."""
    e = _exp(x, order)
    return e * _polynomial(e, _constants.LOG1P[order])


def _times_sigmoid(x, z, a, order):
    """x · sigmoid(±a), where z = |x|, a ≥ 0 and the sign is that of x.

    Written as max(x, 0) - z·e / (1 + e) with e = e^-a: nothing cancels on either side. e carries a
    factor of 2^8, so that it does not underflow before the result does.
    """
    e = _exp(-a, order, scale=8)
    return jnp.maximum(x, 0) - z * e * (1 / (e + 2.0**8))


def _sigmoid(x, order):
    return 1 / (1 + _exp(-x, order))


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


def _in_float32(function: Callable) -> Callable:
    """Make a function of float32 arrays one of float32, bfloat16 and float16 arrays."""

    @functools.wraps(function)
    def wrapped(*operands: jax.Array, order: int, **parameters) -> jax.Array:
        operands = [jnp.asarray(x) for x in operands]
        dtype = operands[0].dtype
        if dtype not in _DTYPES:
            raise TypeError(
                f"reference.{function.__name__}: x must be float32, bfloat16 or float16; "
                f"got {dtype}"
            )
        if order not in (1, 2, 3, 4, 5):
            raise ValueError(
                f"reference.{function.__name__}: order must be an integer from 1 to 5; "
                f"got {order!r}"
            )
        wide = [x if x.dtype == jnp.bool_ else x.astype(jnp.float32) for x in operands]
        return function(*wide, order=order, **parameters).astype(dtype)

    return wrapped


# Functions of one element.


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
def exp2(x: jax.Array, *, order: int) -> jax.Array:
    """2^x; 0 below the smallest normal float32. Arguments as in `exp`."""
    x = jnp.clip(x, -127.0, 129.0)
    if order <= 3:
        p, n = _split_power(x, order, _constants.ORDER1_SHIFT, 127.0)
    else:
        n = jnp.minimum(jnp.floor(x), 127.0)
        p = _polynomial((x - n) * _LN2, [1.0, *_constants.EXP_POLY[order]])
    return _times_power_of_two(p, n)


@_in_float32
def expm1(x: jax.Array, *, order: int) -> jax.Array:
    """e^x - 1, with the order's relative accuracy at 0 too. Arguments as in `exp`."""
    return _expm1(x, order)


@_in_float32
def sigmoid(x: jax.Array, *, order: int) -> jax.Array:
    """1 / (1 + e^-x); arguments as in `exp`."""
    return _sigmoid(x, order)


@_in_float32
def log_sigmoid(x: jax.Array, *, order: int) -> jax.Array:
    """log(sigmoid(x)) = min(x, 0) - log(1 + e^-|x|); arguments as in `exp`."""
    return jnp.minimum(x, 0) - _log1p_of_exp(-jnp.abs(x), order)


@_in_float32
def softplus(x: jax.Array, *, order: int) -> jax.Array:
    """log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); arguments as in `exp`."""
    return jnp.maximum(x, 0) + _log1p_of_exp(-jnp.abs(x), order)


@_in_float32
def silu(x: jax.Array, *, order: int) -> jax.Array:
    """x / (1 + e^-x), with the order's relative accuracy down to its underflow near x = -91.8.

    Arguments as in `exp`.
    """
    return _silu(x, order)


@_in_float32
def mish(x: jax.Array, *, order: int) -> jax.Array:
    """x · tanh(softplus(x)), as a rational function of w = e^-|x|; arguments as in `exp`.

    tanh(log(s)) = (s² - 1) / (s² + 1) with s = 1 + e^x, extended by w² where x ≥ 0.
    """
    z = jnp.minimum(jnp.abs(x), 100.0)
    scaled = _exp(-z, order, scale=8)  # does not underflow before the result does
    w = scaled * 2.0**-8
    right = x * ((1 + 2 * w) / (1 + 2 * w + 2 * (w * w)))
    left = -z * scaled * ((w + 2) / (w * w + 2 * w + 2)) * 2.0**-8
    return jnp.where(x < 0, left, right)


@_in_float32
def quick_gelu(x: jax.Array, *, order: int) -> jax.Array:
    """x · sigmoid(1.702 x); arguments as in `exp`."""
    z = jnp.minimum(jnp.abs(x), 60.0)  # 0 from -54.2 on, and inf · 0 must not arise
    return _times_sigmoid(x, z, 1.702 * z, order)


@_in_float32
def elu(x: jax.Array, *, order: int) -> jax.Array:
    """x where it is positive, else e^x - 1; arguments as in `exp`."""
    return jnp.where(x > 0, x, _expm1(x, order))


@_in_float32
def selu(x: jax.Array, *, order: int) -> jax.Array:
    """Scaled elu (Klambauer et al., arXiv 1706.02515); arguments as in `exp`."""
    return jnp.where(x > 0, SELU_SCALE * x, (SELU_SCALE * SELU_ALPHA) * _expm1(x, order))


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
    return _gelu_tanh(x, order)


@_in_float32
def gelu_erf(x: jax.Array, *, order: int) -> jax.Array:
    """GELU, x · Φ(x) with Φ the normal distribution function.

    Written as max(x, 0) - z · e^(-z²/2) · M(z) with z = |x|, where M, the scaled upper tail of the
    normal distribution, is a polynomial in 1 / (1 + p·z) (the form of Abramowitz and Stegun,
    7.1.26). It keeps the order's relative accuracy in the left tail. Arguments as in `exp`.
    """
    return _gelu_erf(x, order)


# Functions of two arrays. Gates: Dauphin et al., arXiv 1612.08083; Shazeer, arXiv 2002.05202.


@_in_float32
def logaddexp(x1: jax.Array, x2: jax.Array, *, order: int) -> jax.Array:
    """log(e^x1 + e^x2) = max + log(1 + e^-|x1 - x2|), for two arrays of one shape and dtype."""
    # Equal infinities have no difference, but a limit.
    distance = jnp.where(x1 == x2, 0, jnp.abs(x1 - x2))
    return jnp.maximum(x1, x2) + _log1p_of_exp(-distance, order)


@_in_float32
def glu(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """sigmoid(gate) · value, for two arrays of one shape and dtype."""
    return _sigmoid(gate, order) * value


@_in_float32
def swiglu(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """silu(gate) · value, for two arrays of one shape and dtype."""
    return _silu(gate, order) * value


@_in_float32
def geglu_tanh(gate: jax.Array, value: jax.Array, *, order: int) -> jax.Array:
    """GELU in its tanh form of gate, times value, for two arrays of one shape and dtype."""
    return _gelu_tanh(gate, order) * value


@_in_float32
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


@_in_float32
def bias_silu(x: jax.Array, bias: jax.Array, *, order: int) -> jax.Array:
    """silu(x + bias) with bias on the last axis; the sum is not rounded to a 16-bit dtype."""
    return _silu(x + on_last_axis(bias, x), order)


@_in_float32
def bias_gelu_tanh(x: jax.Array, bias: jax.Array, *, order: int) -> jax.Array:
    """GELU in its tanh form of x + bias, as `bias_silu`."""
    return _gelu_tanh(x + on_last_axis(bias, x), order)


@_in_float32
def bias_gelu_erf(x: jax.Array, bias: jax.Array, *, order: int) -> jax.Array:
    """GELU of x + bias, as `bias_silu`."""
    return _gelu_erf(x + on_last_axis(bias, x), order)


# Functions of rows. Where a row is `where` alone, the rest of it may be anything, NaN too.


@_in_float32
def softmax(x: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """e^(x - max x) divided by its sum, over one axis.

    Args:
      x: array of rank 1 or more; float32, bfloat16 or float16.
      order: 1 to 5. Order 1 has its own constant here, since a common factor cancels.
      axis: the axis over which the result sums to 1.

    Returns:
      An array of x's shape and dtype. Rows with NaN, with +inf, or of all -inf are NaN.
    """
    if 0 in x.shape:
        return x
    e = _exp(x - jnp.max(x, axis, keepdims=True), order, shift=_constants.SOFTMAX_SHIFT)
    return e * (1 / jnp.sum(e, axis, keepdims=True))


@_in_float32
def softmax_where(x: jax.Array, where: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """`softmax` over the elements where `where`, of a shape that broadcasts to x's, is True.

    The others are 0, and so is a row without any.
    """
    if 0 in x.shape:
        return x
    largest = jnp.max(x, axis, keepdims=True, where=where, initial=-jnp.inf)
    e = jnp.where(where, _exp(x - largest, order, shift=_constants.SOFTMAX_SHIFT), 0)
    return jnp.where(where, e * (1 / jnp.sum(e, axis, keepdims=True)), 0)


@_in_float32
def log_softmax(x: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """x - max x - log Σ e^(x - max x), over one axis; arguments as in `softmax`."""
    if 0 in x.shape:
        return x
    x = x - jnp.max(x, axis, keepdims=True)
    return x - jnp.log(jnp.sum(_exp(x, order), axis, keepdims=True))


@_in_float32
def log_softmax_where(x: jax.Array, where: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """`log_softmax` over the elements where `where` is True; the others are -inf."""
    if 0 in x.shape:
        return x
    x = x - jnp.max(x, axis, keepdims=True, where=where, initial=-jnp.inf)
    total = jnp.sum(jnp.where(where, _exp(x, order), 0), axis, keepdims=True)
    return jnp.where(where, x - jnp.log(total), -jnp.inf)


@_in_float32
def logsumexp(x: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """max x + log Σ e^(x - max x), over one axis, which the result lacks.

    Arguments as in `softmax`. A row of -inf, or without elements, gives -inf.
    """
    largest = jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    total = jnp.sum(_exp(x - largest, order), axis)
    return jnp.squeeze(largest, axis) + jnp.log(total)


# Attention. On platforms other than CPU it is jax.nn's own, exact whatever the order.

# What jax.nn puts in the place of a masked float32 logit.
MASKED_LOGIT = float(np.float32(-0.7 * float(np.finfo(np.float32).max)))


def kept_keys(
    queries: jax.Array,
    keys: int,
    mask: jax.Array | None,
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
    *,
    is_causal: bool,
    window_left: int,
    window_right: int,
) -> jax.Array | None:
    """Which of the `keys` keys each of `queries` (T positions) sees, or None if it is all.

    mask broadcasts to (B, N, T, S) and so does the result; lengths have shape (B,), and a window
    of -1 has no limit.
    """
    # All of four axes, as jax_numpy_rank_promotion="raise" demands.
    t, s = queries[None, None, :, None], jnp.arange(keys)[None, None, None, :]
    kept = [] if mask is None else [mask]
    if is_causal:
        kept.append(s <= t)
    if window_left >= 0:
        kept.append(t <= s + window_left)
    if window_right >= 0:
        kept.append(t >= s - window_right)
    if query_lengths is not None:
        kept.append(t < query_lengths[:, None, None, None])
    if key_lengths is not None:
        kept.append(s < key_lengths[:, None, None, None])
    return functools.reduce(jnp.logical_and, kept) if kept else None


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """x of shape (B, N, T, S), N being 1 or the query heads, as (B, kv_heads or 1, -1, T, S)."""
    batch, heads, *rest = x.shape
    # Not as a reshape: that has no rule for split arrays whose axes of size 1 move.
    return x[:, :, None] if heads == 1 else x.reshape(batch, kv_heads, heads // kv_heads, *rest)


def attention_logits(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, *, scale: float, soft_cap: float
) -> jax.Array:
    """Logits (B, K, N / K, T, S) before masks of query (B, T, N, H) and key (B, S, K, H).

    They have at least float32. soft_cap 0 is none.
    """
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    query = query.astype(dtype).reshape(batch, length, kv_heads, heads // kv_heads, size)
    logits = scale * jnp.einsum("btkgh,bskh->bkgts", query, key.astype(dtype))
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return logits if bias is None else logits + grouped(bias, kv_heads).astype(dtype)


def unfused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    query_lengths: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """Exact attention and the log-sum-exp of its logits, with all weights in memory.

    The shapes are those of `quake_jax.dot_product_attention` with a batch axis.
    """
    (batch, length, heads, _), (_, keys, kv_heads, size) = query.shape, value.shape
    logits = attention_logits(query, key, bias, scale=scale, soft_cap=soft_cap)
    kept = kept_keys(
        jnp.arange(length),
        keys,
        mask,
        query_lengths,
        key_lengths,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
    )
    if kept is not None:
        kept = grouped(kept, kv_heads)
        logits = jnp.where(kept, logits, MASKED_LOGIT)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(logits.dtype))
    out = out.reshape(batch, length, heads, size)
    if query_lengths is not None:
        valid = jnp.arange(length)[None, :] < query_lengths[:, None]
        out = jnp.where(valid[:, :, None, None], out, 0)
    lse = lse.reshape(batch, heads, length).transpose(0, 2, 1)
    return out.astype(query.dtype), lse


def attention_operands(
    operands: Sequence[jax.Array], packed_axis: int, present: int
) -> list[jax.Array | None]:
    """Query, key, value, bias, mask, query lengths and key lengths, with None for what is absent.

    Args:
      operands: those of the primitive, which takes only what there is.
      packed_axis: 2 or 3, of the one operand that holds query, key and value; or 0.
      present: a sum of 1 (bias), 2 (mask), 4 (query lengths) and 8 (key lengths).
    """
    rest = iter(operands[1 if packed_axis else 3 :])
    return [
        *(
            (lax.index_in_dim(operands[0], i, packed_axis, keepdims=False) for i in range(3))
            if packed_axis
            else operands[:3]
        ),
        *(next(rest) if present & bit else None for bit in (1, 2, 4, 8)),
    ]


def dot_product_attention(
    *operands: jax.Array, order: int, packed_axis: int, present: int, **parameters
) -> tuple[jax.Array, jax.Array]:
    """`jax.nn.dot_product_attention` and its residual in float32, of the primitive's operands.

    It is exact for every `order`. With a soft cap, values of another size than the keys, or
    float16, which jax.nn refuses on some platforms, it is `unfused_attention`.
    """
    query, key, value, bias, mask, query_lengths, key_lengths = arrays = attention_operands(
        operands, packed_axis, present
    )
    out, lse = unfused_attention(*arrays, **parameters)
    if not parameters["soft_cap"] and value.shape == key.shape and query.dtype != jnp.float16:
        window = (parameters["window_left"], parameters["window_right"])
        if window == (-1, -1):
            window = None
        else:  # one that reaches everywhere instead of none
            window = tuple(max(query.shape[1], key.shape[1]) if w < 0 else w for w in window)
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=parameters["scale"],
            is_causal=bool(parameters["is_causal"]),
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            local_window_size=window,
        )
    return out, lse
