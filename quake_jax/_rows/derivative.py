"""The differentiable kernels of rows, f(*arrays, order=…, axis=…), and their tangents.

In the exact function's, y is softmax(x): that of log_softmax calls softmax instead of exp(y), whose
rows would not sum to 1. The last selection of the masked ones stops NaN in masked cotangents, the
first in masked tangents.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from quake_jax._core import norm
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


# Norms, f(epsilon, *operands): see primitive.py for the operands.


def _norm(name: str, kernel: Callable, *, centered: bool, rows: int = 1) -> Callable:
    def call(epsilon, *operands):
        y = kernel(*operands, epsilon=epsilon)
        return tuple(y) if rows > 1 else y

    call.__name__ = call.__qualname__ = name
    function = jax.custom_jvp(call, nondiff_argnums=(0,))

    @functools.partial(function.defjvp, symbolic_zeros=True)
    def tangent_rule(epsilon, operands, tangents):
        y = function(epsilon, *operands)
        operands = [x.astype(jnp.float32) for x in operands]
        tangents = [
            None if isinstance(t, SymbolicZero) else t.astype(jnp.float32) for t in tangents
        ]
        of_v = _total(tangents[:rows])
        of_y = _norm_tangent(
            _total(operands[:rows]), of_v, operands[rows], tangents[rows:], epsilon, centered
        )
        results = y if rows > 1 else (y,)
        results = tuple(
            jnp.zeros_like(r) if t is None else t.astype(r.dtype)
            for r, t in zip(results, (of_y, of_v), strict=False)
        )
        return y, results if rows > 1 else results[0]

    return function


def _total(arrays):
    """The sum of arrays, of which some may be None for 0."""
    arrays = [x for x in arrays if x is not None]
    return functools.reduce(operator.add, arrays) if arrays else None


def _norm_tangent(v, of_v, scale, of_parameters, epsilon, centered):
    """The tangent of the norm of v, from those of v, the scale and the offset; None is 0."""
    n, factor = norm.normalized(v, epsilon, centered=centered)
    terms = []
    if of_v is not None:
        t = of_v - jnp.mean(of_v, -1, keepdims=True) if centered else of_v
        t = factor * (t - n * jnp.mean(n * t, -1, keepdims=True))
        terms.append(t * norm.beside(scale, v.ndim))
    for t, slope in zip(of_parameters, (n, jnp.ones_like(n)), strict=False):
        terms.append(None if t is None else slope * norm.beside(t, v.ndim))
    return _total(terms)


layer_norm = _norm("layer_norm", primitive.layer_norm, centered=True)
rms_norm = _norm("rms_norm", primitive.rms_norm, centered=False)
layer_norm_residual = _norm(
    "layer_norm_residual", primitive.layer_norm_residual, centered=True, rows=2
)
rms_norm_residual = _norm("rms_norm_residual", primitive.rms_norm_residual, centered=False, rows=2)
