"""What softmax, log_softmax and logsumexp have in common: checks of their arguments, and the way
from any axes of an array to the one axis of a kernel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from quake_jax._core import drop_in, jax_names


def static_axis(axis, function: str):
    """Return `axis` as None, an int or a tuple of ints; raise for anything else."""
    if axis is None:
        return None
    try:
        if isinstance(axis, (tuple, list)):
            return tuple(operator.index(a) for a in axis)
        return operator.index(axis)
    except TypeError:
        raise TypeError(
            f"quake_jax.{function}: axis must be an integer, a sequence of integers or None; "
            f"got {axis!r}"
        ) from None


def check_axes(axis, ndim: int, function: str, array: str = "x") -> None:
    """Raise ValueError if `axis` has no meaning for an array of `ndim` axes."""
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    allowed = f"from {-ndim} to {ndim - 1}" if ndim else "none, for a scalar (use axis=None)"
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"quake_jax.{function}: axis {axis} is out of bounds for {array} of {ndim} "
                f"dimensions; allowed: {allowed}"
            )
    if len({a % ndim for a in axes}) < len(axes):
        raise ValueError(
            f"quake_jax.{function}: axis {axis} names the same axis of {array} twice; allowed: "
            f"distinct axes {allowed}"
        )


def positive_axes(axis, ndim: int) -> tuple[int, ...]:
    """Return a checked `axis` as a tuple of axes counted from the front."""
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


def check_where(where, x, function: str, array: str = "x") -> None:
    """Raise TypeError or ValueError if `where` is no mask for x."""
    if not hasattr(where, "dtype"):
        raise TypeError(
            f"quake_jax.{function}: where must be None or a boolean array; "
            f"got {type(where).__name__}"
        )
    if where.dtype != jnp.bool_:
        raise ValueError(
            f"quake_jax.{function}: where must be None or a boolean array; "
            f"got an array of dtype {where.dtype}"
        )
    check_broadcast("where", where, x, function, array)


def check_broadcast(name: str, other, x, function: str, array: str = "x") -> None:
    """Raise ValueError if `other`, the argument `name`, does not broadcast with x."""
    try:
        jnp.broadcast_shapes(other.shape, x.shape)
    except ValueError as error:
        raise ValueError(
            f"quake_jax.{function}: {name} of shape {other.shape} does not broadcast with {array} "
            f"of shape {x.shape}; each pair of trailing dimensions must be equal or contain a 1"
        ) from error


def promoted(x, function: str, array: str = "x") -> jax.Array:
    """Return x in the floating-point dtype that jax.nn computes it in, without a weak type."""
    drop_in.refuse_other_than_numbers(x, function, array)
    (x,) = jax_names.promote_args_inexact(function, x)
    return x.astype(x.dtype)


def over_axes(kernel: Callable, x: jax.Array, axes: tuple[int, ...], *, keeps_axes: bool = True):
    """Apply `kernel(x, axis=…)`, which works over one axis, over several as if they were one.

    Args:
      kernel: its result has the shape of x, or lacks the axis if `keeps_axes` is False.
      x: array.
      axes: distinct axes, counted from the front.
      keeps_axes: whether the result has the axes.
    """
    if len(axes) == 1:
        return kernel(x, axis=axes[0])
    if not axes:  # every element is a row of its own
        y = kernel(x[..., None], axis=x.ndim)
        return y[..., 0] if keeps_axes else y
    kept = tuple(d for d in range(x.ndim) if d not in axes)
    permutation = kept + axes
    rows = jnp.transpose(x, permutation)
    spec = jax.typeof(rows).sharding.spec
    batch = spec[: len(kept)]
    split = any(entry is not None for entry in spec[len(kept) :])
    if split:  # axes with explicit sharding cannot be merged: gather what is reduced
        rows = jax.sharding.reshard(rows, PartitionSpec(*batch, *(None for _ in axes)))
    merged = rows.reshape(*rows.shape[: len(kept)], math.prod(rows.shape[len(kept) :]))
    y = kernel(merged, axis=len(kept))
    if not keeps_axes:
        return y
    y = y.reshape(rows.shape)
    if split:
        y = jax.sharding.reshard(y, spec)
    return jnp.transpose(y, [permutation.index(d) for d in range(x.ndim)])
