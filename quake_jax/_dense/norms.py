"""Norms that a dense layer applies to its rows while it reads them."""

from __future__ import annotations

import dataclasses

import jax

from quake_jax._core.exports import defined_in
from quake_jax._dense.trees import pytree


@pytree(["scale", "offset"], ["epsilon"])
@dataclasses.dataclass(frozen=True, eq=False)
class LayerNorm:
    """Layer normalisation of the rows that `dense` reads, in float32.

    Ba et al., arXiv 1607.06450: (x - mean) / √(variance + epsilon) · scale + offset. A pytree whose
    leaves are the arrays.

    Attributes:
      scale: floating-point array of shape (K,), or None for 1.
      offset: floating-point array of shape (K,), or None for 0.
      epsilon: a number, static. Flax's is 1e-6, PyTorch's 1e-5.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> norm = quake_jax.LayerNorm(jnp.ones(4), jnp.zeros(4), 1e-5)
      >>> y = quake_jax.dense(jnp.ones((2, 4)), jnp.eye(4), norm=norm)
    """

    scale: jax.Array | None = None
    offset: jax.Array | None = None
    epsilon: float = 1e-6


@pytree(["scale"], ["epsilon"])
@dataclasses.dataclass(frozen=True, eq=False)
class RMSNorm:
    """Root mean square normalisation of the rows that `dense` reads, in float32.

    Zhang and Sennrich, arXiv 1910.07467: x / √(mean of x² + epsilon) · scale. A pytree whose leaf
    is the array.

    Attributes:
      scale: floating-point array of shape (K,), or None for 1.
      epsilon: a number, static.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> norm = quake_jax.RMSNorm(jnp.ones(4), 1e-5)
      >>> y = quake_jax.dense(jnp.ones((2, 4)), jnp.eye(4), norm=norm)
    """

    scale: jax.Array | None = None
    epsilon: float = 1e-6


__all__ = defined_in(globals())
