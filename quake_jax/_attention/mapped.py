"""What jax.vmap makes of attention: a call with one more axis, as one without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from quake_jax._attention.operands import OF_LOGITS, Present, axes_of
from quake_jax._core.primitive import merged


def axes_of_call(operands: Sequence, parameters: dict) -> tuple[list, list]:
    ranks = [len(x.shape) for x in operands]
    return axes_of(ranks, parameters["packed_axis"], parameters["present"])


def unmapped(call: Callable, operands: Sequence, **parameters) -> list[jax.Array]:
    """The results of operands of which some are mapped, by one call of what are not."""
    axes, _ = axes_of_call(operands, parameters)
    is_mapped = [labels[0] == "map" for labels in axes]
    if is_mapped[0] and not any(is_mapped[1:]) and not parameters["packed_axis"]:
        bias_and_mask = [x for x, k in zip(operands, axes, strict=True) if k == OF_LOGITS]
        if not _do_positions_matter(bias_and_mask, **parameters):
            return _as_more_queries(call, *operands)
        if all(x.shape[1] == 1 for x in bias_and_mask):
            return _as_more_heads(call, *operands)
    return _as_more_batch(call, operands, axes)


def _do_positions_matter(
    bias_and_mask, *, is_causal, window_left, window_right, present, **_
) -> bool:
    """Whether it matters to the result of a query where in its sequence it is."""
    of_queries = present & (Present.QUERY_LENGTHS | Present.QUERY_SEGMENTS)
    limits = is_causal or window_left >= 0 or window_right >= 0 or of_queries
    return bool(limits) or any(x.shape[2] != 1 for x in bias_and_mask)


def _as_more_queries(call, query, *rest) -> list[jax.Array]:
    """All parts of a mapped query as one sequence: they share keys and values without copies."""
    parts, batch, length, *sizes = query.shape
    query = jnp.moveaxis(query, 0, 1).reshape(batch, parts * length, *sizes)
    return [
        jnp.moveaxis(y.reshape(batch, parts, length, *y.shape[2:]), 1, 0)
        for y in call(query, *rest)
    ]


def _as_more_heads(call, query, key, *rest) -> list[jax.Array]:
    """The same as heads that share those of keys and values."""
    parts, batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    query = query.reshape(parts, batch, length, kv_heads, group, size)
    query = jnp.moveaxis(query, 0, 3).reshape(batch, length, parts * heads, size)
    results = []
    for y in call(query, key, *rest):
        y = y.reshape(batch, length, kv_heads, parts, group, *y.shape[3:])
        results.append(jnp.moveaxis(y, 3, 0).reshape(parts, batch, length, heads, *y.shape[5:]))
    return results


def _as_more_batch(call, operands, axes) -> list[jax.Array]:
    """What is mapped as part of the batch. Copies what is not, but for masks of the whole batch."""
    sizes = [
        dict(zip(labels, x.shape, strict=True)) for labels, x in zip(axes, operands, strict=True)
    ]
    parts = next(s["map"] for s in sizes if "map" in s)
    batch = sizes[0]["batch"]
    flat = []
    for x, labels in zip(operands, axes, strict=True):
        if x.shape[0] == 1 and labels == OF_LOGITS:
            flat.append(x)
            continue
        x = x if labels[0] == "map" else x[None]
        flat.append(merged(jnp.broadcast_to(x, (parts, batch, *x.shape[2:]))))
    return [y.reshape(parts, batch, *y.shape[1:]) for y in call(*flat)]
