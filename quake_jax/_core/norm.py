"""The formulas of layer norm and RMS norm over the last axis, in the dtype of their arguments."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np


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
    """Scale and offset may be None, for 1 and 0."""
    y, _ = normalized(v, epsilon, centered=True)
    y = y if scale is None else y * beside(scale, v.ndim)
    return y if offset is None else y + beside(offset, v.ndim)


def rms_norm(v, scale, epsilon: float) -> jax.Array:
    """The scale may be None, for 1."""
    y, _ = normalized(v, epsilon, centered=False)
    return y if scale is None else y * beside(scale, v.ndim)


def static_epsilon(epsilon, where: str) -> float:
    """Epsilon as a number; an error that begins with `where` unless it is one, of at least 0."""
    expected = f"{where} must be a non-negative number"
    try:
        # A truth value counts as a number in Python.
        value = None if isinstance(epsilon, (bool, np.bool_, str)) else float(epsilon)
    except (TypeError, ValueError, OverflowError):
        value = None
    if value is None:
        raise TypeError(f"{expected}, known when the function is traced; got {epsilon!r}")
    if not (0 <= value and math.isfinite(value)):
        raise ValueError(f"{expected}; got {epsilon!r}")
    return value
