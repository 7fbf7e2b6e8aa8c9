"""Softmax with the signature of jax.nn.softmax: any axes, an optional mask, any real dtype.

The kernel reduces the last axis; this module brings other axes there and applies the mask.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from quake_jax import _compat, _primitives
from quake_jax._config import EXACT, Order, resolved_order
from quake_jax.activations import KERNEL_DTYPES, refuse_complex


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _softmax_last_axis(x, order):
    return _primitives.softmax(x, order)


@_softmax_last_axis.defjvp
def _softmax_jvp(order, primals, tangents):
    (x,), (t,) = primals, tangents
    y = _softmax_last_axis(x, order)
    # Sums of 16-bit values are taken in float32, as everywhere in JAX.
    y32, t32 = y.astype(jnp.float32), t.astype(jnp.float32)
    mean = jnp.sum(y32 * t32, axis=-1, keepdims=True)
    return y, (y32 * (t32 - mean)).astype(y.dtype)


def _softmax_axes(x, axes, order):
    """Softmax over a tuple of distinct axes, none of them negative."""
    if axes == (x.ndim - 1,):
        return _softmax_last_axis(x, order)
    if not axes:  # every element is a row of its own
        return _softmax_last_axis(x[..., None], order)[..., 0]
    kept = tuple(d for d in range(x.ndim) if d not in axes)
    permutation = kept + axes
    rows = jnp.transpose(x, permutation)
    spec = jax.typeof(rows).sharding.spec
    split = len(axes) > 1 and any(entry is not None for entry in spec[len(kept) :])
    if split:  # axes with explicit sharding cannot be merged: gather what is reduced
        rows = jax.sharding.reshard(rows, PartitionSpec(*spec[: len(kept)], *(None for _ in axes)))
    merged = rows.reshape(*rows.shape[: len(kept)], math.prod(rows.shape[len(kept) :]))
    rows = _softmax_last_axis(merged, order).reshape(rows.shape)
    if split:
        rows = jax.sharding.reshard(rows, spec)
    return jnp.transpose(rows, [permutation.index(d) for d in range(x.ndim)])


def _checked_axes(axis, ndim: int) -> tuple[int, ...]:
    """Return `axis` as a tuple of integers within an array of `ndim` axes, sign kept."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    allowed = f"from {-ndim} to {ndim - 1}" if ndim else "none, for a scalar (use axis=None)"
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"quake_jax.softmax: axis {axis} is out of bounds for x of {ndim} dimensions; "
                f"allowed: {allowed}"
            )
    if len({a % ndim for a in axes}) < len(axes):
        raise ValueError(
            f"quake_jax.softmax: axis {axis} names the same axis of x twice; allowed: distinct "
            f"axes {allowed}"
        )
    return axes


def _check_where(where, x) -> None:
    if not hasattr(where, "dtype"):
        raise TypeError(
            f"quake_jax.softmax: where must be None or a boolean array; got {type(where).__name__}"
        )
    if where.dtype != jnp.bool_:
        raise ValueError(
            "quake_jax.softmax: where must be None or a boolean array; "
            f"got an array of dtype {where.dtype}"
        )
    try:
        jnp.broadcast_shapes(where.shape, x.shape)
    except ValueError as error:
        raise ValueError(
            f"quake_jax.softmax: where of shape {where.shape} does not broadcast with x of shape "
            f"{x.shape}; each pair of trailing dimensions must be equal or contain a 1"
        ) from error


def quake_softmax(x, where, axis, order):
    is_bool = getattr(x, "dtype", None) == jnp.bool_
    (x,) = _compat.promote_args_inexact("softmax", x)
    axes = _checked_axes(axis, x.ndim)
    if is_bool:
        raise TypeError("quake_jax.softmax: x must be real; got an array of dtype bool")
    refuse_complex(x, "softmax")
    if where is not None:
        _check_where(where, x)
    if order == EXACT or x.dtype not in KERNEL_DTYPES:
        return jax.nn.softmax(x, axis, where)
    x = x.astype(x.dtype)  # drops a weak type, as jax.nn.softmax does
    if where is None:
        return _softmax_axes(x, tuple(a % x.ndim for a in axes), order)
    # Both selections stop NaN: the first in masked values, the second in rows without any value,
    # where the kernel gives NaN; in derivatives they do the same to tangents and cotangents.
    x = jnp.where(where, x, -jnp.inf)
    if axis is None:
        axes = tuple(range(x.ndim))  # where may have given x more axes
    y = _softmax_axes(x, tuple(a % x.ndim for a in axes), order)
    return jnp.where(where, y, 0)


_softmax_call = jax.jit(quake_softmax, static_argnums=(2, 3), inline=_compat.INLINE)


def softmax(
    x: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    order: Order | None = None,
) -> jax.Array:
    """Softmax, e^x / Σ e^x over one or more axes: `jax.nn.softmax` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape. float32, bfloat16 and float16 use the kernel; integers are
        promoted as by `jax.nn.softmax`; other floating-point dtypes get the exact function.
      axis: the axis or axes over which the result sums to 1; None means all. The kernel works on
        the last axis; others are moved there.
      where: boolean array that broadcasts with x, or None. Elements where it is False are left
        out of the sum, whatever they are, and their result is 0.
      order: accuracy. 1 to 5 is the degree of the polynomial in the exponential (see `exp`);
        "exact" is `jax.nn.softmax`. None is the default in force (see `default_order`).

    Returns:
      An array of the broadcast shape of x and where, and x's (promoted) dtype. A row that
      contains NaN or +inf is NaN, and so is one of all -inf; a row with `where` all False is 0.

    Raises:
      TypeError: if x is complex, boolean or no array; if axis is not made of integers.
      ValueError: if axis is out of bounds or duplicate; if where is not boolean or does not
        broadcast; if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.softmax(jnp.array([[1.0, 2.0, 3.0]]), order=3)
    """
    if axis is not None:
        axis = _static_axis(axis)
    return _softmax_call(x, where, axis, resolved_order(order, "softmax"))


def _static_axis(axis):
    try:
        if isinstance(axis, (tuple, list)):
            return tuple(operator.index(a) for a in axis)
        return operator.index(axis)
    except TypeError:
        raise TypeError(
            "quake_jax.softmax: axis must be an integer, a sequence of integers or None; "
            f"got {axis!r}"
        ) from None
