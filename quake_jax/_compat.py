"""The private and version-dependent names of JAX that quake_jax needs, each under one name.

No other module imports from `jax._src`: when a new JAX moves something, this file alone changes.
"""

from __future__ import annotations

import jax
from jax._src.dispatch import apply_primitive
from jax._src.interpreters.mlir import lower_with_sharding_in_types, reshape
from jax._src.numpy.util import promote_args_inexact
from jax.extend.core import Primitive

__all__ = [
    "INLINE",
    "Primitive",
    "apply_primitive",
    "has_unreduced_axes",
    "lower_with_sharding_in_types",
    "promote_args_inexact",
    "reshape",
]

# The value of jax.jit's `inline` that leaves no trace of a call in a jaxpr: newer JAX has a choice
# of moments, and True there keeps the call until the program is lowered.
INLINE = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def has_unreduced_axes(aval) -> bool:
    """Whether an abstract value is a partial sum, still to be added up over some mesh axes."""
    return bool(aval.sharding.spec.unreduced) or bool(aval.manual_axis_type.unreduced)
