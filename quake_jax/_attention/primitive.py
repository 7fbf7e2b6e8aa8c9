"""The primitive of attention: shapes, lowering, batching, and what it is on other platforms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._attention import mapped, reference
from quake_jax._attention.operands import axes_of
from quake_jax._core import jax_names, partitioning
from quake_jax._core.jax_names import mlir
from quake_jax._core.primitive import custom_call_of_batch, make_primitive, merged, typed


def _shapes(*avals, **parameters):
    inputs, results = mapped.axes_of_call(avals, parameters)
    extents, split = {}, {None: None}
    for labels, x in zip(inputs, avals, strict=True):
        for label, size, entry in zip(labels, x.shape, x.sharding.spec, strict=True):
            extents.setdefault(label, size)  # the query, which comes first, has whole ones
            if entry is not None:
                # What one operand is split over, the others have to be too.
                split.setdefault(label, entry)
    first, packed_axis = avals[0], parameters["packed_axis"]
    length = first.shape[inputs[0].index("batch") + 1]
    size = (first if packed_axis else avals[2]).shape[-1]

    def result(labels, unlabelled, dtype):
        unlabelled = iter(unlabelled)
        shape = tuple(next(unlabelled) if k is None else extents[k] for k in labels)
        sharding = first.sharding.update(spec=tuple(map(split.get, labels)))
        return first.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)

    return (
        result(results[0], (length, size), first.dtype),
        result(results[1], (length,), np.dtype(np.float32)),
    )


def _lower(context, *operands, target: str, **parameters):
    avals = context.avals_in
    inputs, results = mapped.axes_of_call(avals, parameters)
    if partitioning.can_split_along_axes(context):
        values = partitioning.lower_split_along_axes(
            context,
            *operands,
            function=functools.partial(dot_product_attention, **parameters),
            inputs=inputs,
            results=results,
            description=f"{target} {sorted(parameters.items())}",
        )
        return typed(context, values)
    if results[0][0] == "map":
        return mlir.lower_fun(_unmapped)(context, *operands, **parameters)
    batch = avals[0].shape[0]
    whole_batch = all(x.shape[0] == batch for x in avals)
    if jax_names.is_partitioned(context) and not whole_batch:
        # XLA would split a bias' or mask's first axis of size 1 together with the others'.
        return mlir.lower_fun(_with_batch_axes)(context, *operands, **parameters)
    values = custom_call_of_batch(
        context, *operands, target=target, is_split=whole_batch, **parameters
    )
    return typed(context, values)


def _unmapped(*operands, **parameters):
    call = functools.partial(dot_product_attention, **parameters)
    return mapped.unmapped(call, operands, **parameters)


def _with_batch_axes(*operands, **parameters):
    batch = operands[0].shape[0]
    operands = [jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in operands]
    return dot_product_attention(*operands, **parameters)


def _batch(bind, operands, axes, **parameters):
    parts = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    operands = [
        x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)
    ]
    ranks = [x.ndim - (a is not None) for x, a in zip(operands, axes, strict=True)]
    labels, results = axes_of(ranks, parameters["packed_axis"], parameters["present"])
    if results[0][0] != "map":
        return bind(*operands, **parameters), [0, 0]
    # Two axes of vmap become one.
    inner_parts = next(
        x.shape[a is not None]
        for x, a, k in zip(operands, axes, labels, strict=True)
        if k[0] == "map"
    )
    both = []
    for x, a, k in zip(operands, axes, labels, strict=True):
        if a is not None or k[0] == "map":
            x = x[None] if a is None else x
            x = x if k[0] == "map" else x[:, None]
            x = merged(jnp.broadcast_to(x, (parts, inner_parts, *x.shape[2:])))
        both.append(x)
    values = bind(*both, **parameters)
    return [y.reshape(parts, inner_parts, *y.shape[1:]) for y in values], [0, 0]


def _elsewhere(*operands: jax.Array, **parameters):
    call = functools.partial(reference.dot_product_attention, **parameters)
    _, results = mapped.axes_of_call(operands, parameters)
    if results[0][0] == "map":
        return tuple(mapped.unmapped(call, operands, **parameters))
    return call(*operands)


dot_product_attention = make_primitive(
    "dot_product_attention",
    shape=_shapes,
    lower=_lower,
    batch=_batch,
    multiple_results=True,
    elsewhere=_elsewhere,
)
