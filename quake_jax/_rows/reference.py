"""The algorithms of the kernels of rows in jax.numpy: the fallback on other platforms and the
oracle of the tests. Arithmetic is as in `quake_jax._elementwise.reference`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quake_jax._core import constants, norm
from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._core.exponential import exponential, in_float32
from quake_jax._core.exports import defined_in

# Where a row is `where` alone, the rest of it may be anything, NaN too.


@in_float32
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
    e = exponential(x - jnp.max(x, axis, keepdims=True), order, shift=constants.SOFTMAX_SHIFT)
    return e * (1 / jnp.sum(e, axis, keepdims=True))


@in_float32
def softmax_where(x: jax.Array, where: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """`softmax` over the elements where `where`, of a shape that broadcasts to x's, is True.

    The others are 0, and so is a row without any.
    """
    if 0 in x.shape:
        return x
    largest = jnp.max(x, axis, keepdims=True, where=where, initial=-jnp.inf)
    e = jnp.where(where, exponential(x - largest, order, shift=constants.SOFTMAX_SHIFT), 0)
    return jnp.where(where, e * (1 / jnp.sum(e, axis, keepdims=True)), 0)


@in_float32
def log_softmax(x: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """x - max x - log Σ e^(x - max x), over one axis; arguments as in `softmax`."""
    if 0 in x.shape:
        return x
    x = x - jnp.max(x, axis, keepdims=True)
    return x - jnp.log(jnp.sum(exponential(x, order), axis, keepdims=True))


@in_float32
def log_softmax_where(x: jax.Array, where: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """`log_softmax` over the elements where `where` is True; the others are -inf."""
    if 0 in x.shape:
        return x
    x = x - jnp.max(x, axis, keepdims=True, where=where, initial=-jnp.inf)
    total = jnp.sum(jnp.where(where, exponential(x, order), 0), axis, keepdims=True)
    return jnp.where(where, x - jnp.log(total), -jnp.inf)


@in_float32
def logsumexp(x: jax.Array, *, order: int, axis: int = -1) -> jax.Array:
    """max x + log Σ e^(x - max x), over one axis, which the result lacks.

    Arguments as in `softmax`. A row of -inf, or without elements, gives -inf.
    """
    largest = jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    total = jnp.sum(exponential(x - largest, order), axis)
    return jnp.squeeze(largest, axis) + jnp.log(total)


def _in_float32(name: str, function, *operands) -> tuple[jax.Array, jax.Array]:
    """function(v) of float32 rows v, the sum of the operands, and v; both of their dtype."""
    dtype = operands[0].dtype
    if dtype not in KERNEL_DTYPES:
        raise TypeError(f"reference.{name}: x must be float32, bfloat16 or float16; got {dtype}")
    v = sum(x.astype(jnp.float32) for x in operands)
    return function(v).astype(dtype), v.astype(dtype)


def layer_norm(x, scale, offset, *, epsilon: float) -> jax.Array:
    """(x - mean)/√(variance + epsilon) · scale + offset, over the last axis.

    Args:
      x: array of rank 1 or more; float32, bfloat16 or float16.
      scale, offset: float32 arrays of shape (K,) for the last axis of x; or of one shape, some
        first axes of x and K.
      epsilon: a number.

    Returns:
      An array of x's shape and dtype.
    """
    return _in_float32("layer_norm", lambda v: norm.layer_norm(v, scale, offset, epsilon), x)[0]


def layer_norm_residual(x, residual, scale, offset, *, epsilon: float):
    """`layer_norm` of x + residual, which is not rounded before, and that sum."""
    return _in_float32(
        "layer_norm_residual", lambda v: norm.layer_norm(v, scale, offset, epsilon), x, residual
    )


def rms_norm(x, scale, *, epsilon: float) -> jax.Array:
    """x/√(mean square + epsilon) · scale, over the last axis; arguments as in `layer_norm`."""
    return _in_float32("rms_norm", lambda v: norm.rms_norm(v, scale, epsilon), x)[0]


def rms_norm_residual(x, residual, scale, *, epsilon: float):
    """`rms_norm` of x + residual, which is not rounded before, and that sum."""
    return _in_float32("rms_norm_residual", lambda v: norm.rms_norm(v, scale, epsilon), x, residual)


__all__ = defined_in(globals())
