"""NN-LUT: softmax, GELU and layer normalisation from piecewise linear tables of 16 or 32 entries.

Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191; `_nn_lut_fit` makes the tables.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._front import gelu_front, layer_norm_front, softmax_front
from quake_jax.approximations._nn_lut_fit import LookupTable, fit_relu_network, lookup_table


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.array([v / 2 * math.erfc(-v / math.sqrt(2)) for v in np.ravel(x)]).reshape(x.shape)


# Function, range, first and last segment if they are forced, and whether errors are relative.
_FUNCTIONS = {
    "exp": (np.exp, -256.0, 0.0, (0.0, 0.0), None, False),
    "reciprocal": (lambda x: 1 / x, 1.0, 1024.0, None, None, True),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 0.1, 1024.0, None, None, True),
    "gelu": (_gelu, -10.0, 10.0, (0.0, 0.0), (1.0, 0.0), False),
}


def nn_lut_table(function: str, entries: int = 16) -> LookupTable:
    """The table of NN-LUT for a function: fitted once per process, in a fraction of a second.

    Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191; the paper's ranges, our fit (see
    `fit_relu_network`): the paper publishes no tables.

    Args:
      function: "exp" on [-256, 0], 0 below; "reciprocal" on [1, 1024] and "rsqrt" on [0.1, 1024],
        both with the smallest relative error; "gelu" on [-10, 10], 0 and x beyond.
      entries: 4 to 64; 16 in the paper.

    Returns:
      A LookupTable.

    Raises:
      TypeError: if entries is no integer.
      ValueError: if function is unknown, or entries out of range.

    Example:
      >>> from quake_jax import approximations
      >>> table = approximations.nn_lut_table("exp", 16)
      >>> table.slopes.shape, bool(abs(table(-1.0) - 0.3679) < 2e-3)
      ((16,), True)
    """
    _arguments.choice(function, "nn_lut_table", "function", tuple(_FUNCTIONS))
    return _table(function, _arguments.integer(entries, "nn_lut_table", "entries", 4, 64))


@functools.lru_cache
def _table(function: str, entries: int) -> LookupTable:
    exact, lower, upper, left, right, relative = _FUNCTIONS[function]
    network = fit_relu_network(
        exact, lower, upper, entries, left=left, right=right, relative=relative
    )
    table = lookup_table(network, lower, upper)
    # What is forced is so exactly, without the rounding errors of the network's sums.
    for k, forced in ((0, left), (-1, right)):
        if forced is not None:
            table.slopes[k], table.intercepts[k] = forced
    for array in (table.breakpoints, table.slopes, table.intercepts):
        array.flags.writeable = False
    return table


def _look_up(function: str, entries: int, x: jax.Array) -> jax.Array:
    table = _table(function, entries)
    breakpoints, slopes, intercepts = (
        jnp.asarray(a, jnp.float32) for a in (table.breakpoints, table.slopes, table.intercepts)
    )
    k = jnp.searchsorted(breakpoints, x, side="right", method="compare_all")
    return slopes[k] * x + intercepts[k]


def _reciprocal(x: jax.Array, entries: int) -> jax.Array:
    """1 / x of x of about 1 or more: above 1024 by 1 / x = 2^-10 / (x 2^-10)."""
    large = x > 1024
    y = _look_up("reciprocal", entries, jnp.clip(jnp.where(large, x / 1024, x), 1.0, 1024.0))
    return jnp.where(large, y / 1024, y)


def _rsqrt(x: jax.Array, entries: int) -> jax.Array:
    """1 / √x, with x brought into [0.1, 1024] by powers of 2^10."""
    exponent = jnp.where(x < 0.1 / 2**10, 20, jnp.where(x < 0.1, 10, jnp.where(x > 1024, -10, 0)))
    inside = jnp.clip(jnp.ldexp(x, exponent), 0.1, 1024.0)
    return jnp.ldexp(_look_up("rsqrt", entries, inside), exponent // 2)


def _entries(entries, name: str) -> int:
    return _arguments.integer(entries, name, "entries", 4, 64)


def _softmax(x, keep, *, axis, entries):
    e = _look_up("exp", entries, x - jnp.max(x, axis, keepdims=True))
    total = jnp.sum(jnp.where(keep, e, 0), axis, keepdims=True)
    return e * _reciprocal(total, entries)


_softmax_call = softmax_front("nn_lut_softmax", _softmax)


def nn_lut_softmax(
    x: ArrayLike, axis=-1, where: ArrayLike | None = None, *, entries: int = 16
) -> jax.Array:
    """Softmax of NN-LUT: exp and 1 / Σ from piecewise linear tables.

    Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191, with tables of our own (see `nn_lut_table`),
    in float32. Sums above 1024, the paper's range, are scaled by 2^-10, up to 2^20.

    Args:
      x: array of any shape and floating-point dtype.
      axis: the axis or axes over which the result sums to about 1; None means all.
      where: boolean array that broadcasts with x, or None. The result is 0 where it is False.
      entries: of both tables, 4 to 64.

    Returns:
      An array of x's dtype and the shape of x and where together. Rows with NaN or +inf are NaN.
      Elements lower than the maximum by 1e8 (3e4 in float16) count as masked. The derivative is
      the exact softmax's.

    Raises:
      TypeError: if x has no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis or where do not fit x; if entries is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.nn_lut_softmax(jnp.array([1.0, 2.0, 3.0]))
      >>> bool(abs(y.sum() - 1) < 0.03)
      True
    """
    return _softmax_call(x, axis, where, entries=_entries(entries, "nn_lut_softmax"))


_gelu_call = gelu_front("nn_lut_gelu", lambda x, *, entries: _look_up("gelu", entries, x))


def nn_lut_gelu(x: ArrayLike, *, entries: int = 16) -> jax.Array:
    """GELU of NN-LUT: one piecewise linear table.

    Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191, with a table of our own (see `nn_lut_table`),
    in float32: 0 in the left tail, x in the right one.

    Args:
      x: array of any shape and floating-point dtype.
      entries: of the table, 4 to 64.

    Returns:
      An array of x's shape and dtype: NaN gives NaN, inf gives inf, -inf gives 0. The derivative
      is the exact GELU's.

    Raises:
      TypeError: if x has no floating-point dtype, or entries is no integer.
      ValueError: if entries is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.nn_lut_gelu(jnp.array([8.0, 9.0])).tolist()
      [8.0, 9.0]
    """
    return _gelu_call(x, entries=_entries(entries, "nn_lut_gelu"))


def _layernorm(x, scale, bias, *, axis, epsilon, entries):
    centred = x - jnp.mean(x, axis, keepdims=True)
    variance = jnp.mean(centred * centred, axis, keepdims=True) + epsilon
    y = centred * _rsqrt(variance, entries)
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


_layernorm_call = layer_norm_front("nn_lut_layernorm", _layernorm)


def nn_lut_layernorm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    axis: int = -1,
    epsilon: float = 1e-6,
    *,
    entries: int = 16,
) -> jax.Array:
    """Layer normalisation of NN-LUT: 1 / √variance from a piecewise linear table.

    Yu et al., "NN-LUT", DAC 2022, arXiv 2112.02191, with a table of our own (see `nn_lut_table`),
    in float32. The paper scales small variances into the table's range by powers of two; which, we
    are not certain of: here by 2^10 and 2^20, and large ones by 2^-10. Variances outside
    [1e-7, 1e6] count as the nearest of these.

    Args:
      x: array of rank 1 or more, of a floating-point dtype.
      scale, bias: arrays of shape (channels,), or None.
      axis: the axis over which x is normalised.
      epsilon: non-negative number, added to the variance.
      entries: of the table, 4 to 64.

    Returns:
      An array of x's shape and dtype; rows with NaN or inf are NaN. The derivative is the exact
      function's.

    Raises:
      TypeError: if x, scale or bias have no floating-point dtype; if an argument has a wrong type.
      ValueError: if axis, scale or bias do not fit x; if a number is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.nn_lut_layernorm(jnp.array([[1.0, 2.0, 3.0, 6.0]]))
    """
    entries = _entries(entries, "nn_lut_layernorm")
    return _layernorm_call(x, scale, bias, axis, epsilon, entries=entries)
