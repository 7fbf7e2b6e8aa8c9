"""Logarithms of sums of exponentials: of the elements of a row, and of two arrays.

The signatures are those of jax.scipy.special.logsumexp and jax.numpy.logaddexp.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax import _axes, _compat, activations
from quake_jax._config import EXACT, Order, resolved_order
from quake_jax._drop_in import (
    KERNEL_DTYPES,
    differentiable,
    drop_in,
    naming_arguments,
    refuse_complex,
    refuse_other_than_numbers,
    same_kind,
    static_bool,
)
from quake_jax.softmax import softmax_kernel


def _logsumexp_tangent(operands, tangents, y, *, order, axis):
    x, t = operands[0].astype(jnp.float32), tangents[0].astype(jnp.float32)
    row = jnp.expand_dims(y, axis)
    # softmax(x), but where the result is infinite: 1 at +inf, and 0 in a row of -inf.
    limit = ((operands[0] == row) & (row > 0)).astype(jnp.float32)
    weights = jnp.where(jnp.isinf(row), limit, softmax_kernel(x, order=order, axis=axis))
    return jnp.sum(weights * t, axis).astype(y.dtype)


_logsumexp_kernel = differentiable("logsumexp", _logsumexp_tangent)


def _logaddexp_tangent(operands, tangents, y, *, order):
    x1, x2, t1, t2 = (a.astype(jnp.float32) for a in (*operands, *tangents))
    # Equal infinities have no difference; their weights are 1/2, as for other equal numbers.
    distance = jnp.where((x1 == x2) & jnp.isinf(x1), 0, x1 - x2)
    first, second = (activations.sigmoid_kernel(d, order=order) for d in (distance, -distance))
    return (first * t1 + second * t2).astype(y.dtype)


_logaddexp_kernel = differentiable("logaddexp", _logaddexp_tangent)


def _logaddexp(x1, x2, *, order):
    return _logaddexp_kernel(*jnp.broadcast_arrays(x1, x2), order=order)


# jax.numpy.logaddexp is an object that jax.eval_shape cannot tell from another of its kind.
_logaddexp_call = drop_in(
    "logaddexp", _logaddexp, lambda x1, x2: jnp.logaddexp(x1, x2), arrays=["x1", "x2"]
)


def _of_weighted_sum(a, b, axes, order):
    """log|Σ b·e^a| over some axes, and the sign of the sum."""
    a, b, dtype = a.astype(jnp.float32), b.astype(jnp.float32), a.dtype
    a = jnp.where(b != 0, a, -jnp.inf)
    largest = jnp.max(a, axes, keepdims=True, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(b * activations.exp_kernel(a - largest, order=order), axes)
    y = jnp.log(jnp.abs(total)) + jnp.squeeze(largest, axes)
    return y.astype(dtype), jnp.sign(total).astype(dtype)


def _of_sum(a, axes, order):
    """log Σ e^a over some axes."""
    if not axes:
        return a
    if any(a.shape[axis] == 0 for axis in axes):
        return jnp.max(a, axes, initial=-jnp.inf)

    def apply(a, axis):
        return _logsumexp_kernel(a, order=order, axis=axis)

    return _axes.over_axes(apply, a, axes, keeps_axes=False)


def quake_logsumexp(a, b, where, axis, keepdims, return_sign, order):
    name = "logsumexp"
    a = _axes.promoted(a, name, "a")
    refuse_complex(a, name, "a")
    if b is not None:
        refuse_other_than_numbers(b, name, "b")
        _axes.check_broadcast("b", b, a, name, "a")
        try:
            a, b = _compat.promote_args_inexact(name, a, b)
        except (TypeError, ValueError) as error:
            raise same_kind(
                error,
                f"quake_jax.{name}: a of dtype {a.dtype} and b of dtype {b.dtype} have no common "
                f"dtype: {error}",
            ) from error
        refuse_complex(b, name, "b")
    if where is not None:
        _axes.check_where(where, a, name, "a")
        if b is not None:
            _axes.check_broadcast("where", where, b, name, "b")
    shape = jnp.broadcast_shapes(*(x.shape for x in (a, b, where) if x is not None))
    _axes.check_axes(axis, len(shape), name, "a")
    if order == EXACT or a.dtype not in KERNEL_DTYPES:
        return jax.nn.logsumexp(a, axis, b, keepdims, return_sign, where)
    a = jnp.broadcast_to(a, shape)
    if where is not None:
        a = jnp.where(where, a, -jnp.inf)
    axes = _axes.positive_axes(axis, a.ndim)
    if b is None:
        y = _of_sum(a, axes, order)
    else:
        b = b if where is None else jnp.where(where, b, 0)
        y, sign = _of_weighted_sum(a, b, axes, order)
        if not return_sign:
            y = jnp.where(sign < 0, jnp.nan, y)
    if keepdims:
        y = jnp.expand_dims(y, axes)
    if not return_sign:
        return y
    if b is None:
        # The sum is positive, or NaN, or 0 = e^-inf.
        sign = jnp.where(jnp.isnan(y), y, (y > -jnp.inf).astype(y.dtype))
        sign = jax.lax.stop_gradient(sign)
    elif keepdims:
        sign = jnp.expand_dims(sign, axes)
    return y, sign


_logsumexp_call = naming_arguments(
    "logsumexp",
    jax.jit(quake_logsumexp, static_argnums=(3, 4, 5, 6), inline=_compat.INLINE),
    {"a": 0, "b": 1, "where": 2},
)


def logsumexp(
    a: ArrayLike,
    axis: int | Sequence[int] | None = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
    *,
    order: Order | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """log Σ b·e^a over one or more axes: `jax.nn.logsumexp` with QuAKE (arXiv 2412.00408).

    Args:
      a: real array of any shape; integers and bool are promoted as by `jax.nn.logsumexp`.
      axis: the axis or axes over which to sum; None means all. One axis, whichever, without `b`
        and `where`, is one pass over a.
      b: weights that broadcast with a, or None. Where they are 0, a may be anything.
      keepdims: whether the result keeps the axes, with size 1.
      return_sign: whether to return the sign of the sum too. If not, a negative sum gives NaN.
      where: boolean array that broadcasts with a, or None. Elements where it is False are left
        out of the sum, whatever they are.
      order: accuracy, as in `softmax`. The absolute error is the relative error of `exp`.

    Returns:
      An array of the broadcast shape without the axes, and the promoted dtype; or, with
      return_sign, two of these: log|Σ| and the sign. A sum of no elements, or of exponentials of
      -inf, gives -inf; the gradient is 0 there.

    Raises:
      TypeError: if an argument is complex or no array; if axis is not made of integers.
      ValueError: if axis is out of bounds or duplicate; if where is not boolean; if where or b
        does not broadcast; if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.logsumexp(jnp.array([[1.0, 2.0, 3.0]]), axis=-1)
    """
    axis = _axes.static_axis(axis, "logsumexp")
    order = resolved_order(order, "logsumexp")
    keepdims = static_bool(keepdims, "logsumexp", "keepdims")
    return_sign = static_bool(return_sign, "logsumexp", "return_sign")
    return _logsumexp_call(a, b, where, axis, keepdims, return_sign, order)


def logaddexp(x1: ArrayLike, x2: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """log(e^x1 + e^x2) without overflow: `jax.numpy.logaddexp` with QuAKE (arXiv 2412.00408).

    Args:
      x1, x2: real arrays that broadcast with each other; integers and bool are promoted as by
        `jax.numpy.logaddexp`.
      order: accuracy, as in `exp`. The absolute error is at most half the relative error of `exp`.

    Returns:
      An array of the broadcast shape and promoted dtype. The derivatives at equal infinities are
      1/2.

    Raises:
      TypeError: if an argument is complex or no array.
      ValueError: if x1 and x2 do not broadcast.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.logaddexp(jnp.array([1.0, 2.0]), 0.0)
    """
    return _logaddexp_call(resolved_order(order, "logaddexp"), x1, x2)
