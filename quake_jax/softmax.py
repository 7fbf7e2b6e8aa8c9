"""Softmax and its logarithm with the signatures of jax.nn: any axes, an optional mask, any dtype.

The kernels reduce one axis, and take a mask if it is the last one; this module brings other
arguments into these forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax import _axes, _compat
from quake_jax._config import EXACT, Order, resolved_order
from quake_jax._drop_in import KERNEL_DTYPES, differentiable, naming_arguments, refuse_complex

# Derivatives. In the exact function's, y is softmax(x): that of log_softmax calls softmax instead
# of exp(y), whose rows would not sum to 1. The last selection of the masked ones stops NaN in
# masked cotangents, the first in masked tangents.


def _weighted_mean(y, t, axis):
    return jnp.sum(y * t, axis, keepdims=True)


def _softmax_tangent(operands, tangents, y, *, order, axis):
    # Sums of 16-bit values are taken in float32, as everywhere in JAX.
    y32, t = y.astype(jnp.float32), tangents[0].astype(jnp.float32)
    return (y32 * (t - _weighted_mean(y32, t, axis))).astype(y.dtype)


def _log_softmax_tangent(operands, tangents, y, *, order, axis):
    p = softmax_kernel(operands[0].astype(jnp.float32), order=order, axis=axis)
    t = tangents[0].astype(jnp.float32)
    return (t - _weighted_mean(p, t, axis)).astype(y.dtype)


def _softmax_where_tangent(operands, tangents, y, *, order, axis):
    where = operands[1]
    t = jnp.where(where, tangents[0], 0)
    return jnp.where(where, _softmax_tangent(operands, [t], y, order=order, axis=axis), 0)


def _log_softmax_where_tangent(operands, tangents, y, *, order, axis):
    x, where = operands
    p = _softmax_where(x.astype(jnp.float32), where, order=order, axis=axis)
    t = jnp.where(where, tangents[0].astype(jnp.float32), 0)
    return jnp.where(where, t - _weighted_mean(p, t, axis), 0).astype(y.dtype)


softmax_kernel = differentiable("softmax", _softmax_tangent)
_log_softmax = differentiable("log_softmax", _log_softmax_tangent)
_softmax_where = differentiable("softmax_where", _softmax_where_tangent)
_log_softmax_where = differentiable("log_softmax_where", _log_softmax_where_tangent)


def _normalization(
    name: str, exact: Callable, kernel: Callable, masked_kernel: Callable, masked: float
) -> Callable:
    """Make f(x, where, axis, order) from the kernels; masked elements give the value `masked`."""

    def call(x, where, axis, order):
        is_bool = getattr(x, "dtype", None) == jnp.bool_
        x = _axes.promoted(x, name)
        _axes.check_axes(axis, x.ndim, name)
        if is_bool:
            raise TypeError(f"quake_jax.{name}: x must be real; got an array of dtype bool")
        refuse_complex(x, name)
        if where is not None:
            _axes.check_where(where, x, name)
        if order == EXACT or x.dtype not in KERNEL_DTYPES:
            return exact(x, axis, where)
        if where is None:

            def apply(x, axis):
                return kernel(x, order=order, axis=axis)

            return _axes.over_axes(apply, x, _axes.positive_axes(axis, x.ndim))
        # where may give x more axes, or larger ones.
        x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, where.shape))
        axes = _axes.positive_axes(axis, x.ndim)
        if axes == (x.ndim - 1,):
            where = where.reshape((1,) * (x.ndim - where.ndim) + where.shape)
            where = jnp.broadcast_to(where, (*where.shape[:-1], x.shape[-1]))
            return masked_kernel(x, where, order=order, axis=x.ndim - 1)
        # Both selections stop NaN: the first in masked values, the second in rows without any
        # value, where the kernel gives NaN; in derivatives they do the same to tangents.
        y = call(jnp.where(where, x, -jnp.inf), None, axes, order)
        return jnp.where(where, y, masked)

    call.__name__ = call.__qualname__ = f"quake_{name}"
    compiled = jax.jit(call, static_argnums=(2, 3), inline=_compat.INLINE)
    return naming_arguments(name, compiled, {"x": 0, "where": 1})


_softmax_call = _normalization("softmax", jax.nn.softmax, softmax_kernel, _softmax_where, 0.0)
_log_softmax_call = _normalization(
    "log_softmax", jax.nn.log_softmax, _log_softmax, _log_softmax_where, -jnp.inf
)


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
      axis: the axis or axes over which the result sums to 1; None means all. In a program for one
        device, one axis, whichever, needs no copy.
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
    axis = _axes.static_axis(axis, "softmax")
    return _softmax_call(x, where, axis, resolved_order(order, "softmax"))


def log_softmax(
    x: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    order: Order | None = None,
) -> jax.Array:
    """log(softmax(x)) over one or more axes: `jax.nn.log_softmax` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape, as in `softmax`.
      axis: the axis or axes over which the exponential of the result sums to 1; None means all.
      where: boolean array that broadcasts with x, or None. Elements where it is False are left
        out of the sum, whatever they are, and their result is -inf.
      order: accuracy, as in `softmax`. The absolute error is the relative error of `exp`.

    Returns:
      An array of the broadcast shape of x and where, and x's (promoted) dtype. A row that
      contains NaN or +inf is NaN, and so is one of all -inf; a row with `where` all False is -inf.

    Raises:
      TypeError: if x is complex, boolean or no array; if axis is not made of integers.
      ValueError: if axis is out of bounds or duplicate; if where is not boolean or does not
        broadcast; if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.log_softmax(jnp.array([[1.0, 2.0, 3.0]]))
    """
    axis = _axes.static_axis(axis, "log_softmax")
    return _log_softmax_call(x, where, axis, resolved_order(order, "log_softmax"))
