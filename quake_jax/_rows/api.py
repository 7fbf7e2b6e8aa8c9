"""Softmax, log-softmax and log-sum-exp with the signatures of jax.nn's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._core import jax_names
from quake_jax._core.axes import (
    check_axes,
    check_broadcast,
    check_where,
    over_axes,
    positive_axes,
    promoted,
    static_axis,
)
from quake_jax._core.config import EXACT, Order, resolved_order
from quake_jax._core.drop_in import (
    KERNEL_DTYPES,
    naming_arguments,
    refuse_complex,
    refuse_other_than_numbers,
    same_kind,
    static_bool,
)
from quake_jax._core.exports import defined_in
from quake_jax._elementwise.functions import exp
from quake_jax._rows import derivative


def _normalization(
    name: str, exact: Callable, kernel: Callable, masked_kernel: Callable, masked: float
) -> Callable:
    """Make f(x, where, axis, order) from the kernels; masked elements give the value `masked`."""

    def call(x, where, axis, order):
        is_bool = getattr(x, "dtype", None) == jnp.bool_
        x = promoted(x, name)
        check_axes(axis, x.ndim, name)
        if is_bool:
            raise TypeError(f"quake_jax.{name}: x must be real; got an array of dtype bool")
        refuse_complex(x, name)
        if where is not None:
            check_where(where, x, name)
        if order == EXACT or x.dtype not in KERNEL_DTYPES:
            return exact(x, axis, where)
        if where is None:

            def apply(x, axis):
                return kernel(x, order=order, axis=axis)

            return over_axes(apply, x, positive_axes(axis, x.ndim))
        # where may give x more axes, or larger ones.
        x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, where.shape))
        axes = positive_axes(axis, x.ndim)
        if axes == (x.ndim - 1,):
            where = where.reshape((1,) * (x.ndim - where.ndim) + where.shape)
            where = jnp.broadcast_to(where, (*where.shape[:-1], x.shape[-1]))
            return masked_kernel(x, where, order=order, axis=x.ndim - 1)
        # Both selections stop NaN: the first in masked values, the second in rows without any
        # value, where the kernel gives NaN; in derivatives they do the same to tangents.
        y = call(jnp.where(where, x, -jnp.inf), None, axes, order)
        return jnp.where(where, y, masked)

    call.__name__ = call.__qualname__ = f"quake_{name}"
    compiled = jax.jit(call, static_argnums=(2, 3), inline=jax_names.INLINE)
    return naming_arguments(name, compiled, {"x": 0, "where": 1})


_softmax_call = _normalization(
    "softmax", jax.nn.softmax, derivative.softmax, derivative.softmax_where, 0.0
)
_log_softmax_call = _normalization(
    "log_softmax",
    jax.nn.log_softmax,
    derivative.log_softmax,
    derivative.log_softmax_where,
    -jnp.inf,
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
    axis = static_axis(axis, "softmax")
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
    axis = static_axis(axis, "log_softmax")
    return _log_softmax_call(x, where, axis, resolved_order(order, "log_softmax"))


def _of_weighted_sum(a, b, axes, order):
    """log|Σ b·e^a| over some axes, and the sign of the sum."""
    a, b, dtype = a.astype(jnp.float32), b.astype(jnp.float32), a.dtype
    a = jnp.where(b != 0, a, -jnp.inf)
    largest = jnp.max(a, axes, keepdims=True, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(b * exp(a - largest, order=order), axes)
    y = jnp.log(jnp.abs(total)) + jnp.squeeze(largest, axes)
    return y.astype(dtype), jnp.sign(total).astype(dtype)


def _of_sum(a, axes, order):
    """log Σ e^a over some axes."""
    if not axes:
        return a
    if any(a.shape[axis] == 0 for axis in axes):
        return jnp.max(a, axes, initial=-jnp.inf)

    def apply(a, axis):
        return derivative.logsumexp(a, order=order, axis=axis)

    return over_axes(apply, a, axes, keeps_axes=False)


def _logsumexp(a, b, where, axis, keepdims, return_sign, order):
    name = "logsumexp"
    a = promoted(a, name, "a")
    refuse_complex(a, name, "a")
    if b is not None:
        refuse_other_than_numbers(b, name, "b")
        check_broadcast("b", b, a, name, "a")
        try:
            a, b = jax_names.promote_args_inexact(name, a, b)
        except (TypeError, ValueError) as error:
            raise same_kind(
                error,
                f"quake_jax.{name}: a of dtype {a.dtype} and b of dtype {b.dtype} have no common "
                f"dtype: {error}",
            ) from error
        refuse_complex(b, name, "b")
    if where is not None:
        check_where(where, a, name, "a")
        if b is not None:
            check_broadcast("where", where, b, name, "b")
    shape = jnp.broadcast_shapes(*(x.shape for x in (a, b, where) if x is not None))
    check_axes(axis, len(shape), name, "a")
    if order == EXACT or a.dtype not in KERNEL_DTYPES:
        return jax.nn.logsumexp(a, axis, b, keepdims, return_sign, where)
    a = jnp.broadcast_to(a, shape)
    if where is not None:
        a = jnp.where(where, a, -jnp.inf)
    axes = positive_axes(axis, a.ndim)
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


_logsumexp.__name__ = _logsumexp.__qualname__ = "quake_logsumexp"
_logsumexp_call = naming_arguments(
    "logsumexp",
    jax.jit(_logsumexp, static_argnums=(3, 4, 5, 6), inline=jax_names.INLINE),
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
    axis = static_axis(axis, "logsumexp")
    order = resolved_order(order, "logsumexp")
    keepdims = static_bool(keepdims, "logsumexp", "keepdims")
    return_sign = static_bool(return_sign, "logsumexp", "return_sign")
    return _logsumexp_call(a, b, where, axis, keepdims, return_sign, order)


__all__ = defined_in(globals())
