"""The derivative of attention, tile by tile: its memory grows with the length of the sequences and
not with its square.

It recomputes the weights by the exact exponential, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from quake_jax._attention import masks, primitive, reference
from quake_jax._attention.operands import (
    Present,
    by_name,
    count_of_arrays,
    parts_of_packed,
    without_mask,
)

# The derivative holds a few tiles of about so many weights, of at least so many queries.
_TILE_WEIGHTS = 1 << 22
_TILE_QUERIES = 32


def _call(parameters, masking, *operands):
    parameters = dict(parameters)
    if masking.is_by_bias:
        operands, parameters["present"] = without_mask(
            operands, parameters["packed_axis"], parameters["present"]
        )
    return tuple(primitive.dot_product_attention(*operands, **parameters))


_call.__name__ = _call.__qualname__ = "dot_product_attention"
attention = jax.custom_jvp(_call, nondiff_argnums=(0, 1))


@functools.partial(attention.defjvp, symbolic_zeros=True)
def _tangent_rule(parameters, masking, operands, tangents):
    out, lse = attention(parameters, masking, *operands)
    parameters = dict(parameters)
    packed_axis, present = parameters.pop("packed_axis"), parameters.pop("present")
    del parameters["order"], parameters["format"]
    arrays = by_name(operands, packed_axis, present).without_codes()
    tangents = [None if isinstance(t, SymbolicZero) else t for t in tangents]
    # Those of query, key, value and bias, or None; codes and their scales are constants.
    at = count_of_arrays(packed_axis)
    moving = tangents[:at]
    if present & Present.KEY_SCALES:
        moving[1:] = [None] * 2
    if packed_axis:
        moving = [None] * 3 if moving[0] is None else parts_of_packed(moving[0], packed_axis)
    moving.append(tangents[at] if present & Present.BIAS else None)
    tangent = _tangent(arrays, moving, jax.lax.stop_gradient(lse), masking=masking, **parameters)
    # The residual is a constant in derivatives, as in jax.nn.
    return (out, lse), (tangent.astype(out.dtype), jnp.zeros_like(lse))


def _tangent(arrays, tangents, lse, **parameters):
    """The tangent of the output, in float32, from the exact weights.

    Args:
      arrays: those of `Operands`.
      tangents: of the first four, or None where they are 0.
      lse: the log-sum-exp of the logits, (B, T, N).
    """
    query, key, value, bias, mask, query_lengths, key_lengths, segments, key_segments = arrays[:9]
    dquery, dkey, dvalue, dbias = tangents
    if all(t is None for t in tangents):
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), jnp.float32)
    # What is used in every tile: derivatives are sums over tiles, which are taken in float32.
    shared = jax.tree.map(lambda x: x.astype(jnp.float32), (key, value, dkey, dvalue))
    # By tile, with the axis of queries in front.
    by_query = [
        *((None if x is None else jnp.moveaxis(x, 1, 0)) for x in (query, dquery, lse, segments)),
        *((None if x is None else jnp.moveaxis(x, 2, 0)) for x in (bias, dbias, mask)),
    ]
    length = query.shape[1]
    # Those with one row for all queries are the same in every tile.
    constant = [None if x is None or x.shape[0] == length else x for x in by_query]
    sliced = [None if x is None or x.shape[0] != length else x for x in by_query]

    @jax.checkpoint
    def tile(positions, sliced, constant, shared, integers):
        x = [x if c is None else c for x, c in zip(sliced, constant, strict=True)]
        q, dq, lse, segments = (None if a is None else jnp.moveaxis(a, 0, 1) for a in x[:4])
        b, db, m = (None if a is None else jnp.moveaxis(a, 0, 2) for a in x[4:])
        key_segments, *lengths = integers
        return _tangent_of_tile(
            positions,
            q,
            dq,
            lse,
            b,
            db,
            masks.with_segments(m, segments, key_segments),
            *shared,
            *lengths,
            **parameters,
        )

    integers = (key_segments, query_lengths, key_lengths)
    rows = _tile_length(query.shape, key.shape[1])
    if rows == length:
        return tile(jnp.arange(length), sliced, constant, shared, integers)
    tiles = -(-length // rows)

    def in_tiles(x):
        # The last query again: of zeros with its masks there may be no weights but NaN.
        padding = ((0, tiles * rows - length), *((0, 0) for _ in x.shape[1:]))
        return jnp.pad(x, padding, mode="edge").reshape(tiles, rows, *x.shape[1:])

    def step(_, by_tile):
        positions, sliced = by_tile
        return None, tile(positions, sliced, constant, shared, integers)

    by_tile = jax.tree.map(in_tiles, (jnp.arange(length), sliced))
    _, out = jax.lax.scan(step, None, by_tile)
    out = jnp.moveaxis(out, 0, 1)  # (B, tiles, rows, N, V)
    return out.reshape(out.shape[0], tiles * rows, *out.shape[3:])[:, :length]


def _tile_length(query_shape: Sequence[int], keys: int) -> int:
    """How many queries a tile of the derivative has."""
    batch, length, heads, _ = query_shape
    if not all(isinstance(n, int) for n in (batch, length, heads, keys)):
        return length  # a program that is exported with symbolic dimensions
    most = max(_TILE_QUERIES, _TILE_WEIGHTS // (batch * heads * keys))
    return -(-length // -(-length // most))


def _tangent_of_tile(
    positions,
    query,
    dquery,
    lse,
    bias,
    dbias,
    mask,
    key,
    value,
    dkey,
    dvalue,
    query_lengths,
    key_lengths,
    *,
    scale,
    soft_cap,
    masking,
    **limits,
):
    """The tangent of the outputs of the queries at `positions`: (B, T, N, V)."""
    batch, length, heads, _ = query.shape
    kv_heads, size = value.shape[2:]
    query = query.astype(jnp.float32)
    dquery = None if dquery is None else dquery.astype(jnp.float32)
    primals, tangents = (query, key, bias), (dquery, dkey, dbias)
    moving = [i for i, t in enumerate(tangents) if t is not None]
    kept = masks.kept_keys(positions, key.shape[1], mask, query_lengths, key_lengths, **limits)
    kept = None if kept is None else reference.grouped(kept, kv_heads)

    def logits(*changed):
        x = list(primals)
        for i, value in zip(moving, changed, strict=True):
            x[i] = value
        return _masked_logits(*x, kept, masking, scale=scale, soft_cap=soft_cap)

    if moving:
        s, ds = jax.jvp(logits, [primals[i] for i in moving], [tangents[i] for i in moving])
    else:
        s, ds = logits(), None
    lse = lse.transpose(0, 2, 1).reshape(batch, kv_heads, heads // kv_heads, length)
    # The division makes up for the error of the residual, which is the kernel's and, where all
    # logits are as large as a masked one, rounds log(S) away. So p does not depend on it.
    p = jnp.exp(s - lse[..., None])
    p = p / jnp.sum(p, -1, keepdims=True)
    out = 0.0
    if dvalue is not None:
        out = out + jnp.einsum("bkgts,bskh->btkgh", p, dvalue)
    if ds is not None:
        dp = p * (ds - jnp.sum(p * ds, -1, keepdims=True))
        out = out + jnp.einsum("bkgts,bskh->btkgh", dp, value)
    out = out.reshape(batch, length, heads, size)
    if query_lengths is not None:
        valid = positions[None, :] < query_lengths[:, None]
        out = jnp.where(valid[:, :, None, None], out, 0)
    return out


def _masked_logits(query, key, bias, kept, masking, *, scale, soft_cap):
    """Logits (B, K, N / K, T, S), constant where `masking` says so in those that are not kept."""

    def masked(logits):
        if kept is None:
            return logits
        if masking.is_by_bias:
            return jnp.where(kept, logits, jax.lax.stop_gradient(logits))
        if masking.constant is masks.Constant.NOTHING:
            return logits + jnp.where(kept, jnp.float32(0), jnp.float32(masks.MASKED_LOGIT))
        return jnp.where(kept, logits, masks.MASKED_LOGIT)

    if masking.constant is not masks.Constant.PRODUCT:
        return masked(reference.attention_logits(query, key, bias, scale=scale, soft_cap=soft_cap))
    product = reference.attention_logits(query, key, None, scale=scale, soft_cap=soft_cap)
    return reference.with_bias(masked(product), bias)
