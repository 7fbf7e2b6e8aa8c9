"""The private and version-dependent names of JAX that quake_jax needs, each under one name.

No other module imports from `jax._src`: when a new JAX moves something, this file alone changes.
"""

from __future__ import annotations

import jax
from jax._src.core import auto_insert_reshard
from jax._src.dispatch import apply_primitive
from jax._src.interpreters.mlir import lower_with_sharding_in_types, reshape
from jax._src.lax.lax import _convert_element_type, broadcasting_sharding_rule
from jax._src.numpy.util import promote_args_inexact
from jax._src.sharding_impls import ShardingContext, SPMDAxisContext
from jax.extend.core import Primitive

__all__ = [
    "INLINE",
    "Primitive",
    "apply_primitive",
    "auto_insert_reshard",
    "broadcasting_sharding_rule",
    "has_unreduced_axes",
    "is_partitioned",
    "lower_with_sharding_in_types",
    "promote_args_inexact",
    "reshape",
    "with_weak_type",
]

# The value of jax.jit's `inline` that leaves no trace of a call in a jaxpr: newer JAX has a choice
# of moments, and True there keeps the call until the program is lowered.
INLINE = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def has_unreduced_axes(aval) -> bool:
    """Whether an abstract value is a partial sum, still to be added up over some mesh axes."""
    return bool(aval.sharding.spec.unreduced) or bool(aval.manual_axis_type.unreduced)


def with_weak_type(x: jax.Array, weak_type: bool) -> jax.Array:
    """Return x with a weak type, or with none."""
    return _convert_element_type(x, x.dtype, weak_type)


def is_partitioned(context) -> bool:
    """Whether XLA may split the arrays of a program that is being lowered over several devices.

    Not so within `jax.shard_map` over all axes of its mesh: there an array is what one device has.
    """
    axes = context.module_context.axis_context
    if isinstance(axes, ShardingContext):
        return axes.num_devices > 1
    if isinstance(axes, SPMDAxisContext):
        return axes.mesh.size > 1 and set(axes.mesh.axis_names) != set(axes.manual_axes)
    return False
