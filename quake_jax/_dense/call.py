"""From the arguments of dense layers on packed weights, which fit, to calls of the kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from quake_jax._core.config import resolved_order
from quake_jax._dense import derivative, layout
from quake_jax._dense.norms import LayerNorm
from quake_jax._dense.operands import Call, Operands, Weight
from quake_jax._dense.packed import PackedWeight
from quake_jax._elementwise import functions


def order_of(activation: str, order):
    """The order in force, of a row of the table of functions or of none, ""."""
    public = functions.FUNCTIONS[activation].public.__name__ if activation else "dense"
    return resolved_order(order, public)


def prepared(
    x, weights, biases, gate, gate_bias, residual, norm, *, activation, order, dtype
) -> tuple[Call, Operands]:
    """The layer as a call of the kernel, and its operands before they are stacked."""
    first = weights[0]
    result = np.dtype(dtype)
    if residual is not None:
        if jnp.promote_types(residual.dtype, result) != result:
            result = np.dtype(np.float32)  # rounded once, after the residual has been added
        residual = residual.astype(result)
    if any(b is not None for b in biases):
        # A call has all of them or none.
        biases = [
            jnp.zeros(w.n, jnp.float32) if b is None else b.astype(jnp.float32)
            for w, b in zip(weights, biases, strict=True)
        ]
    gate_bias = None if gate_bias is None else gate_bias.astype(jnp.float32)
    parts = [
        Weight(w.codes, w.scales, w.sums, w.offsets, b)
        for w, b in zip(
            (*weights, *([] if gate is None else [gate])),
            (*biases, *([] if gate is None else [gate_bias])),
            strict=True,
        )
    ]
    scale, offset = _norm_arrays(norm, first.k)
    table = layout.default_table() if first.table is None else first.table
    operands = Operands(
        x=x,
        permutation=first.permutation,
        norm_scale=scale,
        norm_offset=offset,
        table=table if first.dtype == "int4" else None,
        x_range=_range_of_all((*weights, *([] if gate is None else [gate]))),
        out_range=None,
        weights=tuple(parts),
        residual=residual,
    )
    call = Call(
        order=order,
        activation=functions.FUNCTIONS[activation].kernel.shares or activation
        if activation
        else "",
        format=first.dtype,
        group_size=first.group_size or 0,
        quantized=first.activations is not None,
        columns=tuple(w.n for w in weights),
        dtype=result.name,
        norm=kind_of_norm(norm),
        epsilon=0.0 if norm is None else norm.epsilon,
        has_permutation=first.permutation is not None,
        has_bias=biases[0] is not None,
        has_offsets=first.offsets is not None,
        has_gate=gate is not None,
        has_gate_bias=gate_bias is not None,
        has_residual=residual is not None,
        has_range=operands.x_range is not None,
        has_out_range=False,
    )
    return call, operands


def _range_of_all(weights: Sequence[PackedWeight]):
    """The range that is wide enough for each of the weights; None if they have none."""
    ranges = [w.activation_range for w in weights]
    if ranges[0] is None:
        return None
    return functools.reduce(
        lambda a, b: jnp.stack([jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])]), ranges
    )


def _norm_arrays(norm, k: int) -> tuple:
    """Scale and offset of a norm in float32, where the kernel has them."""
    if norm is None:
        return None, None

    def array(x, default):
        return jnp.full(k, default, jnp.float32) if x is None else x.astype(jnp.float32)

    offset = array(norm.offset, 0.0) if isinstance(norm, LayerNorm) else None
    return array(norm.scale, 1.0), offset


def kind_of_norm(norm) -> str:
    return "" if norm is None else "layer" if isinstance(norm, LayerNorm) else "rms"


def in_one_stack(operands: Operands, columns: Sequence[int]) -> Operands:
    """The operands with an axis of stacked weights in front.

    Those whose types say how they are split over a mesh are split as x is along all of its axes but
    the last, and along columns as the panels of weights are, if these are full. Where x and weights
    want the same devices, x is moved.
    """
    shardings = [jax.typeof(x).sharding for x in jax.tree.leaves(operands)]
    mesh = next((s.mesh for s in shardings if not s.mesh.empty), None)

    def spec(x):
        return jax.typeof(x).sharding.spec

    def split(x, *wanted):
        wanted = PartitionSpec(*wanted, *[None] * (x.ndim - len(wanted)))
        if spec(x) == wanted:
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, wanted))

    is_full = all(n % layout.PANEL == 0 for n in columns)
    by_weight = [spec(w.codes)[0] if is_full else None for w in operands.weights]
    panels = next((names for names in by_weight if names is not None), None)
    taken = panels if isinstance(panels, tuple) else (panels,)

    def not_taken(names):
        if isinstance(names, tuple):
            return tuple(name for name in names if name not in taken) or None
        return None if names in taken else names

    rows = [not_taken(names) for names in spec(operands.x)[:-1]]
    weights = tuple(
        jax.tree.map(lambda leaf, names=names: split(leaf, names if names == panels else None), w)
        for w, names in zip(operands.weights, by_weight, strict=True)
    )
    shared = jax.tree.map(split, operands._replace(x=None, weights=None, residual=None))
    moved = shared._replace(
        x=split(operands.x, *rows),
        weights=weights,
        residual=jax.tree.map(lambda x: split(x, *rows, by_weight[0]), operands.residual),
    )
    return jax.tree.map(lambda leaf: leaf[None], moved)


def chained(x, first: dict, second: dict) -> jax.Array:
    """dense(dense(x, **first), **second) of packed weights, of which the second ones have a range.

    The first call gives its result as the codes that the second one multiplies. Activations are
    rows of the table of functions; types of arrays do not say how they are split over a mesh.
    """

    def layer(x, weight, bias=None, *, activation, order, preferred_element_type, **others):
        activation = activation or ""
        call, operands = prepared(
            x,
            (weight,),
            (bias,),
            *(others.get(name) for name in ("gate", "gate_bias", "residual", "norm")),
            activation=activation,
            order=order_of(activation, order),
            dtype=preferred_element_type,
        )
        return call, jax.tree.map(lambda leaf: leaf[None], operands)

    (call, operands), (last_call, last) = layer(x, **first), layer(None, **second)
    call = dataclasses.replace(call, dtype="int8", has_out_range=True)
    operands = operands._replace(out_range=last.x_range)
    (y,) = derivative.dense((call, last_call), (operands, last))
    return jnp.squeeze(y, 0).astype(second["preferred_element_type"])
