"""Symmetric quantisation of float arrays, for the fronts of the integer methods."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dynamic_scale(x: jax.Array, input_bit: int, keep: jax.Array | None = None) -> jax.Array:
    """The scale at which the largest |x| of the whole array is the largest signed integer."""
    largest = jnp.max(jnp.abs(x), where=keep, initial=0.0)
    return jnp.where(largest > 0, largest, 1.0) / (2 ** (input_bit - 1) - 1)


def quantise(x: jax.Array, scale: jax.Array, input_bit: int) -> jax.Array:
    """x / scale, rounded to nearest (half to even), as int32 within the range of `input_bit`."""
    limit = 2 ** (input_bit - 1)
    return jnp.clip(jnp.round(x / scale), -limit, limit - 1).astype(jnp.int32)


def quantised(x, scale, input_bit: int, keep=None):
    """Integers and their scale: the one given, or the dynamic one."""
    scale = dynamic_scale(x, input_bit, keep) if scale is None else scale
    return quantise(x, scale, input_bit), scale
