"""Softmax from small tables: REXP and 2D-LUT.

Vasyltsov, Chang, "Efficient Softmax Approximation for Deep Neural Networks with Attention
Mechanism", arXiv 2111.10770, 2021. About 700 bytes of tables.
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


@functools.lru_cache
def _reciprocal_exponentials(w: int) -> np.ndarray:
    """⌊M e^-i⌋, i = 0 … ⌈ln M⌉ + 1."""
    m = 2**w - 1
    return np.array([int(m * math.exp(-i)) for i in range(math.ceil(math.log(m)) + 2)], np.int32)


@functools.lru_cache
def _reciprocals(w: int, x_s: int) -> np.ndarray:
    """⌊M / j⌋, j = 1 … x_s."""
    return np.array([(2**w - 1) // j for j in range(1, x_s + 1)], np.int32)


@functools.partial(jax.jit, static_argnames=("axis", "w", "x_s"))
def _rexp(steps, keep, *, axis, w, x_s):
    """A and B with σ = A·B / M², for non-negative integers max x - x."""
    m = 2**w - 1
    table = _reciprocal_exponentials(w)
    a = jnp.asarray(table)[jnp.minimum(steps, len(table) - 1)]
    total = jnp.sum(jnp.where(keep, a, 0), axis, keepdims=True, dtype=jnp.int32)
    j = jnp.clip((total + m // 2) // m, 1, x_s)  # nearest: M is odd, so there are no ties
    return a, jnp.asarray(_reciprocals(w, x_s))[j - 1]


def _steps(x, axis, unit):
    """max x - x in units, rounded to nearest."""
    largest = jnp.max(x, axis, keepdims=True)
    return jnp.round(jnp.minimum((largest - x) / unit, 1e6)).astype(jnp.int32)


def _product(a, b, w, integer_output):
    """a·b / M² as float32; with integer_output, a·b / M is cut to an integer before."""
    m = 2**w - 1
    if integer_output:
        return (a * b // m).astype(jnp.float32) / m
    return a.astype(jnp.float32) * b.astype(jnp.float32) / m**2


def _rexp_of_floats(x, keep, *, axis, w, x_s, integer_output):
    a, b = _rexp(_steps(x, axis, 1.0), keep, axis=axis, w=w, x_s=x_s)
    return _product(a, b, w, integer_output)


_rexp_call = softmax_front("rexp_softmax", _rexp_of_floats)


def rexp_softmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    w: int = 8,
    x_s: int = 256,
    integer_output: bool = False,
) -> jax.Array:
    """Softmax by reciprocal exponentiation (REXP): two tables and one product.

    Vasyltsov and Chang, arXiv 2111.10770, 2021. With M = 2^w - 1: A[i] = ⌊M e^-i⌋ for
    i = 0 … ⌈ln M⌉ + 1; B[j] = ⌊M / j⌋ for j = 1 … x_s; σ = A[max x - x]·B[Σ A], both indices
    rounded to nearest, Σ A in units of M. Differences are so rounded to whole numbers.

    Uncertain: the rounding of the indices, which here gives the smallest error; whether the
    product is cut back to w bits (`integer_output`). Sums above x_s count as x_s.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      w: bits of the entries of the tables, 4 to 15.
      x_s: entries of B, 256 to 512 in the paper; 1 to 65536.
      integer_output: whether results are multiples of 1 / M.

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
      >>> y = approximations.rexp_softmax(jnp.array([1.0, 1.0]))
      >>> (y * 255).tolist()
      [127.0, 127.0]
    """
    name = "rexp_softmax"
    static = {
        "w": _arguments.integer(w, name, "w", 4, 15),
        "x_s": _arguments.integer(x_s, name, "x_s", 1, 2**16),
        "integer_output": _arguments.flag(integer_output, name, "integer_output"),
    }
    return _rexp_call(x, axis, where, **static)


def rexp_softmax_int(
    x: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    w: int = 8,
    x_s: int = 256,
) -> jax.Array:
    """REXP of integers x, whose unit is 1; see `rexp_softmax`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more.
      axis: one axis; it has fewer than 65536 elements.
      where: boolean array that broadcasts to x's shape, or None.
      w: bits of the entries of the tables, 4 to 15.
      x_s: entries of the second table, 1 to 65536.

    Returns:
      An int32 array of x's shape, whose unit is 1 / (2^w - 1): ⌊A·B / M⌋.

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.rexp_softmax_int(jnp.array([2, 2, 1], jnp.int8)).tolist()
      [127, 127, 46]
    """
    name = "rexp_softmax_int"
    x, _, axis, keep = row_arguments(x, 1.0, axis, where, name)
    w = _arguments.integer(w, name, "w", 4, 15)
    x_s = _arguments.integer(x_s, name, "x_s", 1, 2**16)
    a, b = _rexp(jnp.max(x, axis, keepdims=True) - x, keep, axis=axis, w=w, x_s=x_s)
    return jnp.where(keep, a * b // (2**w - 1), 0)


# 2D-LUT.

_STEP = 0.1
_EXP_ENTRIES = 101  # [0, 10] in steps of 0.1
_NUMERATORS = 11  # [0, 1] in steps of 0.1


@functools.lru_cache
def _exponentials(w: int) -> np.ndarray:
    m = 2**w - 1
    return np.array([int(m * math.exp(-i / 10)) for i in range(_EXP_ENTRIES)], np.int32)


@functools.lru_cache
def _quotients(w: int, denominators: int) -> np.ndarray:
    """⌊M (0.1 i) / j⌋, i = 0 … 10, j = 1 … denominators."""
    m = 2**w - 1
    rows = [[m * i // (10 * j) for j in range(1, denominators + 1)] for i in range(_NUMERATORS)]
    return np.array(rows, np.int32)


@functools.partial(jax.jit, static_argnames=("axis", "w", "denominators"))
def _lut2d(steps, keep, *, axis, w, denominators):
    m = 2**w - 1
    e = jnp.asarray(_exponentials(w))[jnp.minimum(steps, _EXP_ENTRIES - 1)]
    total = jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True, dtype=jnp.int32)
    i = (20 * e + m) // (2 * m)
    j = jnp.clip((total + m // 2) // m, 1, denominators)
    return jnp.asarray(_quotients(w, denominators))[i, j - 1]


def _lut2d_of_floats(x, keep, *, axis, w, denominators):
    y = _lut2d(_steps(x, axis, _STEP), keep, axis=axis, w=w, denominators=denominators)
    return y.astype(jnp.float32) / (2**w - 1)


_lut2d_call = softmax_front("lut2d_softmax", _lut2d_of_floats)


def lut2d_softmax(
    x: ArrayLike,
    axis=-1,
    where: ArrayLike | None = None,
    *,
    w: int = 8,
    denominators: int = 60,
) -> jax.Array:
    """Softmax from a table of exponentials and a table of quotients (2D-LUT).

    Vasyltsov and Chang, arXiv 2111.10770, 2021. With M = 2^w - 1: e = ⌊M exp(-0.1 i)⌋, 101
    entries for max x - x in [0, 10]; σ(i, j) = ⌊M (0.1 i) / j⌋ for i = 0 … 10 and j = 1 … 60;
    the result is σ(e / 0.1, Σ e), all indices rounded to nearest. Sums above 60 count as 60.

    Uncertain: the rounding of the indices and of the entries of the first table.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      w: bits of the entries of the tables, 4 to 15.
      denominators: columns of the second table, 1 to 1024.

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
      >>> y = approximations.lut2d_softmax(jnp.array([1.0, 1.0]))
      >>> (y * 255).round().tolist()
      [127.0, 127.0]
    """
    name = "lut2d_softmax"
    w = _arguments.integer(w, name, "w", 4, 15)
    denominators = _arguments.integer(denominators, name, "denominators", 1, 1024)
    return _lut2d_call(x, axis, where, w=w, denominators=denominators)


def lut2d_softmax_int(
    x: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    *,
    w: int = 8,
    denominators: int = 60,
) -> jax.Array:
    """2D-LUT of integers x, whose unit is 0.1; see `lut2d_softmax`.

    Args:
      x: array of int8, int16 or int32, of rank 1 or more.
      axis: one axis; it has fewer than 65536 elements.
      where: boolean array that broadcasts to x's shape, or None.
      w: bits of the entries of the tables, 4 to 15.
      denominators: columns of the second table, 1 to 1024.

    Returns:
      An int32 array of x's shape, whose unit is 1 / (2^w - 1).

    Raises:
      TypeError: if x is not of an integer dtype named above; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if a parameter is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.lut2d_softmax_int(jnp.array([20, 20, 10], jnp.int8)).tolist()
      [127, 127, 51]
    """
    name = "lut2d_softmax_int"
    x, _, axis, keep = row_arguments(x, 1.0, axis, where, name)
    w = _arguments.integer(w, name, "w", 4, 15)
    denominators = _arguments.integer(denominators, name, "denominators", 1, 1024)
    steps = jnp.max(x, axis, keepdims=True) - x
    y = _lut2d(steps, keep, axis=axis, w=w, denominators=denominators)
    return jnp.where(keep, y, 0)
