"""Approximations with the derivatives of the exact functions, which these are too."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def with_derivative_of(exact: Callable, approximate: Callable, active: int = 1) -> Callable:
    """Make f(static, *operands), whose value is approximate(*operands, **dict(static)).

    Its derivative with respect to the first `active` operands is that of exact, which takes the
    same arguments; the others (masks, scales of a quantisation) are constants. `static` is a
    tuple of pairs, and f is compiled once for each.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def function(static, *operands):
        return approximate(*operands, **dict(static))

    @function.defjvp
    def tangent_rule(static, operands, tangents):
        constants = operands[active:]
        y = function(static, *operands)
        _, tangent = jax.jvp(
            lambda *variables: exact(*variables, *constants, **dict(static)),
            operands[:active],
            tangents[:active],
        )
        return y, tangent.astype(y.dtype)

    function.__name__ = function.__qualname__ = approximate.__name__
    return jax.jit(function, static_argnums=0)


def exact_softmax(x, where, *constants, axis, **parameters):
    """Softmax with a mask; rows without any element are 0, and so are their derivatives."""
    if where is None:
        return jax.nn.softmax(x, axis)
    x = jnp.where(where, x, -jnp.inf)
    largest = jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(x - jnp.where(jnp.isfinite(largest), largest, 0))
    total = jnp.sum(e, axis, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def exact_layer_norm(x, scale, bias, *constants, axis, epsilon, **parameters):
    """Layer normalisation over one axis, in float32; scale and bias broadcast with x."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis, keepdims=True) + epsilon)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y.astype(dtype)


def exact_gelu(x, *constants, **parameters):
    return jax.nn.gelu(x, approximate=False)


def exact_exp(x, *constants, **parameters):
    return jnp.exp(x)


def exact_sigmoid(x, *constants, **parameters):
    return jax.nn.sigmoid(x)
