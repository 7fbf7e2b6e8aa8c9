"""Packing as an equation of a program, so that what a program packs can be found in it and done
once.

Its results are the leaves of a `PackedWeight` that has no offsets, permutation or table; its
parameters are those of `pack_weight`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.jax_names import ad, batching, mlir
from quake_jax._dense import layout, sharding
from quake_jax._dense.packed import PackedWeight
from quake_jax._dense.packed import _pack as packed_and_finite

primitive = jax_names.Primitive("quake_pack")
primitive.multiple_results = True
_LEAVES = ("codes", "scales", "sums")


def pack(weight: jax.Array, **parameters) -> PackedWeight:
    """`pack_weight` of a floating-point array (…, K, N), with its arguments checked already."""
    leaves = primitive.bind(sharding.with_split_columns(weight), **parameters)
    return assembled(leaves, weight.shape, **parameters)


def assembled(leaves, shape, *, dtype, group_size, activations, scale_method) -> PackedWeight:
    """The packed weight whose leaves the primitive gave, of a weight of some shape."""
    k, n = shape[-2:]
    known = layout.shapes_of(dtype, k, n, group_size, activations)
    remaining = iter(leaves)
    arrays = [next(remaining) if name in known else None for name in _LEAVES]
    return PackedWeight(*arrays, None, None, None, k, n, dtype, group_size, activations)


@primitive.def_abstract_eval
def _shapes(weight, *, dtype, group_size, activations, scale_method):
    *lead, k, n = weight.shape
    known = layout.shapes_of(dtype, k, n, group_size, activations)
    *spec, _, columns = weight.sharding.spec
    results = []
    for name in _LEAVES:
        if name in known:
            shape, leaf_dtype = known[name]
            sharding = weight.sharding.update(spec=(*spec, columns, *[None] * (len(shape) - 1)))
            results.append(
                weight.update(
                    shape=(*lead, *shape),
                    dtype=jnp.dtype(leaf_dtype),
                    weak_type=False,
                    sharding=sharding,
                )
            )
    return tuple(results)


def _leaves(weight, *, scale_method, **parameters):
    found, _ = packed_and_finite(weight, method=scale_method, **parameters)
    return [x for name in _LEAVES if (x := getattr(found, name)) is not None]


def _batch(operands, axes, **parameters):
    (weight,), (axis,) = operands, axes
    results = primitive.bind(jnp.moveaxis(weight, axis, 0), **parameters)
    return results, [0] * len(results)


def _tangents(primals, tangents, **parameters):
    raise TypeError(
        "quake_jax.dense: a packed weight is a constant, which has no derivative; differentiate "
        "with respect to other arguments, or the function whose weights are not packed"
    )


primitive.def_impl(_leaves)
batching.primitive_batchers[primitive] = _batch
ad.primitive_jvps[primitive] = _tangents
mlir.register_lowering(primitive, mlir.lower_fun(_leaves, multiple_results=True))
