"""IndexSoftmax of IntAttention.

Zhong, Feng, Zhou, Peng, Yu, "IntAttention: A Fully Integer Attention Pipeline for Efficient Edge
Inference", arXiv 2511.21513, 2025. The details are those of the authors' simulation
(github.com/WanliZhong/IntAttention).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._front import softmax_front
from quake_jax.approximations._ibert import row_arguments

ROUNDINGS = ("floor", "nearest")


@functools.lru_cache
def _table(b: int, c: float) -> np.ndarray:
    """round(255 e^(-c i / (2^b - 1))), the last of which is 0."""
    entries = 2**b
    values = [round(255 * math.exp(-c * i / (entries - 1))) for i in range(entries)]
    return np.array([*values[:-1], 0], np.int32)


def _exponentials(index, b, c, rounding):
    index = jnp.round(index) if rounding == "nearest" else jnp.floor(index)
    return jnp.asarray(_table(b, c))[index.astype(jnp.int32)]


def _quotients(e, keep, axis, integer_output):
    total = jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True, dtype=jnp.int32)
    if not integer_output:
        return e.astype(jnp.float32) / total.astype(jnp.float32)
    return jnp.round(255 * e.astype(jnp.float32) / total.astype(jnp.float32)) / 255


def _index_softmax_of_floats(x, keep, *, axis, b, c, rounding, integer_output):
    difference = jnp.minimum(jnp.max(x, axis, keepdims=True) - x, c)
    e = _exponentials(difference * (2**b - 1) / c, b, c, rounding)
    return _quotients(e, keep, axis, integer_output)


_index_softmax_call = softmax_front("index_softmax", _index_softmax_of_floats)


def index_softmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    b: int = 5,
    c: float = 6.6,
    rounding: str = "floor",
    integer_output: bool = False,
) -> jax.Array:
    """IndexSoftmax: exponentials from a table of 32 bytes, and an integer division.

    Zhong et al., "IntAttention", arXiv 2511.21513, 2025: Δ = min(max x - x, c);
    e = T[Δ (2^b - 1) / c] with T[i] = ⌊255 exp(-c i / (2^b - 1))⌉, whose last entry is 0; the
    weight is ⌊255 e / Σe⌉ / 255.

    The authors' code truncates the index; nearest has a smaller error. It rounds the result to 8
    bits in the integer pipeline (`integer_output`), and leaves the quotient in float.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      b: bits of the index, 2 to 12.
      c: the difference from which on weights are 0, a positive number.
      rounding: of the index: "floor" or "nearest".
      integer_output: whether results are multiples of 1 / 255.

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
      >>> approximations.index_softmax(jnp.array([1.0, 1.0, -9.0])).tolist()
      [0.5, 0.5, 0.0]
    """
    name = "index_softmax"
    static = {
        "b": _arguments.integer(b, name, "b", 2, 12),
        "c": _arguments.positive(c, name, "c"),
        "rounding": _arguments.choice(rounding, name, "rounding", ROUNDINGS),
        "integer_output": _arguments.flag(integer_output, name, "integer_output"),
    }
    return _index_softmax_call(x, axis, where, **static)


def index_softmax_int(
    x: ArrayLike,
    scale: float | jax.Array,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    b: int = 5,
    c: float = 6.6,
    rounding: str = "floor",
) -> jax.Array:
    """IndexSoftmax of integers x, which stand for x·scale; see `index_softmax`.

    The threshold is ⌊c / scale⌋, and must be at least 1.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more; differences within a row fit 32 bits.
      scale: positive number, at least c / 2^31 · 2^b.
      axis: one axis.
      where: boolean array that broadcasts to x's shape, or None.
      b, c, rounding: as in `index_softmax`.

    Returns:
      An int32 array of x's shape, 0 to 255, whose unit is 1 / 255.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> x = jnp.array([32, 16, -100], jnp.int8)
      >>> approximations.index_softmax_int(x, 1 / 16).tolist()
      [179, 76, 0]
    """
    name = "index_softmax_int"
    b = _arguments.integer(b, name, "b", 2, 12)
    c = _arguments.positive(c, name, "c")
    rounding = _arguments.choice(rounding, name, "rounding", ROUNDINGS)
    x, scale_array, axis, keep = row_arguments(x, scale, axis, where, name)
    if not isinstance(scale, jax.Array) and not 1 <= c / float(scale) < 2.0 ** (31 - b):
        raise ValueError(
            f"quake_jax.approximations.{name}: scale must be from {c / 2.0 ** (31 - b):.3g} to "
            f"c, {c}; got {scale}"
        )
    threshold = jnp.floor(c / scale_array).astype(jnp.int32)
    difference = jnp.minimum(jnp.max(x, axis, keepdims=True) - x, threshold)
    scaled = difference * (2**b - 1)
    if rounding == "nearest":
        scaled = scaled + threshold // 2
    e = jnp.asarray(_table(b, c))[scaled // threshold]
    total = jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True, dtype=jnp.int32)
    y = jnp.round(255 * e.astype(jnp.float32) / total.astype(jnp.float32))
    return jnp.where(keep, y, 0).astype(jnp.int32)
