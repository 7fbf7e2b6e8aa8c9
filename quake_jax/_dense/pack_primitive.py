"""Packing as an equation of a program, so that what a program packs can be found in it and done
once.

Its results are the leaves of a `PackedWeight` that has no offsets, permutation or table; its
parameters are those of `pack_weight`, and whether calibration sets the range of activations, which
is NaN until then.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.jax_names import ad, batching, mlir
from quake_jax._dense import layout, sharding
from quake_jax._dense.packed import ARRAYS, PackedWeight
from quake_jax._dense.packed import _pack as packed_and_finite

primitive = jax_names.Primitive("quake_pack")
primitive.multiple_results = True
_LEAVES = ("codes", "scales", "sums", "activation_range")


def pack(weight: jax.Array, **parameters) -> PackedWeight:
    """`pack_weight` of a floating-point array (…, K, N), with its arguments checked already."""
    leaves = primitive.bind(sharding.with_split_columns(weight), **parameters)
    return assembled(leaves, weight.shape, **parameters)


def _known(shape, *, dtype, group_size, activations, calibrated, scale_method=None) -> dict:
    """For each leaf of a weight of some shape its own without leading axes, and its dtype."""
    known = layout.shapes_of(dtype, *shape[-2:], group_size, activations)
    names = _LEAVES if calibrated else _LEAVES[:-1]
    return {name: known[name] for name in names if name in known}


def assembled(leaves, shape, *, dtype, group_size, activations, **others) -> PackedWeight:
    """The packed weight whose leaves the primitive gave, of a weight of some shape."""
    static = {"dtype": dtype, "group_size": group_size, "activations": activations}
    arrays = dict.fromkeys(ARRAYS)
    arrays.update(zip(_known(shape, **static, **others), leaves, strict=True))
    k, n = shape[-2:]
    return PackedWeight(**arrays, k=k, n=n, **static)


@primitive.def_abstract_eval
def _shapes(weight, **parameters):
    *spec, _, columns = weight.sharding.spec
    results = []
    for name, (shape, dtype) in _known(weight.shape, **parameters).items():
        first = None if name == "activation_range" else columns
        results.append(
            weight.update(
                shape=(*weight.shape[:-2], *shape),
                dtype=jnp.dtype(dtype),
                weak_type=False,
                sharding=weight.sharding.update(spec=(*spec, first, *[None] * (len(shape) - 1))),
            )
        )
    return tuple(results)


def _leaves(weight, *, scale_method, calibrated, **parameters):
    found, _ = packed_and_finite(weight, method=scale_method, **parameters)
    leaves = [x for name in _LEAVES if (x := getattr(found, name)) is not None]
    is_unknown = calibrated and found.sums is not None
    return [*leaves, *[jnp.full((*weight.shape[:-2], 2), jnp.nan, jnp.float32)] * is_unknown]


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
