"""The formulas of layer norm and RMS norm over the last axis, in the dtype of their arguments."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalized(v, epsilon: float, *, centered: bool) -> tuple[jax.Array, jax.Array]:
    """The rows of v with mean 0 (if `centered`) and mean square 1, and by what they were divided.

    The second result is the reciprocal of that, 1/√(mean square + epsilon), with a last axis of 1.
    """
    if centered:
        v = v - jnp.mean(v, -1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean(v * v, -1, keepdims=True) + jnp.asarray(epsilon, v.dtype))
    return v * factor, factor


def beside(parameter, rank: int) -> jax.Array:
    """A scale or an offset, of some first axes of an array and the last, as one of that rank."""
    *first, last = parameter.shape
    return parameter.reshape(*first, *(1,) * (rank - parameter.ndim), last)


def layer_norm(v, scale, offset, epsilon: float) -> jax.Array:
    y, _ = normalized(v, epsilon, centered=True)
    return y * beside(scale, v.ndim) + beside(offset, v.ndim)


def rms_norm(v, scale, epsilon: float) -> jax.Array:
    y, _ = normalized(v, epsilon, centered=False)
    return y * beside(scale, v.ndim)
