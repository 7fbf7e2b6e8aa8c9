"""The differentiable kernels of rows, f(*arrays, order=…, axis=…), and their tangents.

In the exact function's, y is softmax(x): that of log_softmax calls softmax instead of exp(y), whose
rows would not sum to 1. The last selection of the masked ones stops NaN in masked cotangents, the
first in masked tangents.
"""

from __future__ import annotations

import jax.numpy as jnp

from quake_jax._core.drop_in import differentiable
from quake_jax._rows import primitive


def _weighted_mean(y, t, axis):
    return jnp.sum(y * t, axis, keepdims=True)


def _softmax_tangent(operands, tangents, y, *, order, axis):
    # Sums of 16-bit values are taken in float32, as everywhere in JAX.
    y32, t = y.astype(jnp.float32), tangents[0].astype(jnp.float32)
    return (y32 * (t - _weighted_mean(y32, t, axis))).astype(y.dtype)


def _log_softmax_tangent(operands, tangents, y, *, order, axis):
    p = softmax(operands[0].astype(jnp.float32), order=order, axis=axis)
    t = tangents[0].astype(jnp.float32)
    return (t - _weighted_mean(p, t, axis)).astype(y.dtype)


def _softmax_where_tangent(operands, tangents, y, *, order, axis):
    where = operands[1]
    t = jnp.where(where, tangents[0], 0)
    return jnp.where(where, _softmax_tangent(operands, [t], y, order=order, axis=axis), 0)


def _log_softmax_where_tangent(operands, tangents, y, *, order, axis):
    x, where = operands
    p = softmax_where(x.astype(jnp.float32), where, order=order, axis=axis)
    t = jnp.where(where, tangents[0].astype(jnp.float32), 0)
    return jnp.where(where, t - _weighted_mean(p, t, axis), 0).astype(y.dtype)


def _logsumexp_tangent(operands, tangents, y, *, order, axis):
    x, t = operands[0].astype(jnp.float32), tangents[0].astype(jnp.float32)
    row = jnp.expand_dims(y, axis)
    # softmax(x), but where the result is infinite: 1 at +inf, and 0 in a row of -inf.
    limit = ((operands[0] == row) & (row > 0)).astype(jnp.float32)
    weights = jnp.where(jnp.isinf(row), limit, softmax(x, order=order, axis=axis))
    return jnp.sum(weights * t, axis).astype(y.dtype)


softmax = differentiable("softmax", primitive.softmax, _softmax_tangent)
log_softmax = differentiable("log_softmax", primitive.log_softmax, _log_softmax_tangent)
softmax_where = differentiable("softmax_where", primitive.softmax_where, _softmax_where_tangent)
log_softmax_where = differentiable(
    "log_softmax_where", primitive.log_softmax_where, _log_softmax_where_tangent
)
logsumexp = differentiable("logsumexp", primitive.logsumexp, _logsumexp_tangent)
