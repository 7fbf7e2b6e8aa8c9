"""Attention in jax.numpy, exact whatever the order, with all weights in memory: what stands for the
kernel on other platforms and takes what it has no place for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from quake_jax._attention import masks
from quake_jax._attention.operands import by_name


def grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """x of shape (B, N, T, S), N being 1 or the query heads, as (B, kv_heads or 1, -1, T, S)."""
    batch, heads, *rest = x.shape
    # Not as a reshape: that has no rule for split arrays whose axes of size 1 move.
    return x[:, :, None] if heads == 1 else x.reshape(batch, kv_heads, heads // kv_heads, *rest)


def attention_logits(
    query: jax.Array, key: jax.Array, bias: jax.Array | None, *, scale: float, soft_cap: float
) -> jax.Array:
    """Logits (B, K, N / K, T, S) before masks of query (B, T, N, H) and key (B, S, K, H).

    They have at least float32. soft_cap 0 is none.
    """
    batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    query = query.astype(dtype).reshape(batch, length, kv_heads, heads // kv_heads, size)
    logits = scale * jnp.einsum("btkgh,bskh->bkgts", query, key.astype(dtype))
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return with_bias(logits, bias)


def with_bias(logits: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Logits (B, K, N / K, T, S) and a bias of shape (B, N, T, S) or with axes of size 1."""
    return logits if bias is None else logits + grouped(bias, logits.shape[1]).astype(logits.dtype)


def is_for_jax_nn(query: jax.Array, key: jax.Array, value: jax.Array) -> bool:
    """Whether jax.nn takes such arrays; a jitted one refuses float16 on CPUs."""
    is_alike = value.shape == key.shape and key.dtype == query.dtype
    return is_alike and query.dtype != jnp.float16


def unfused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    query_lengths: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    *,
    scale: float,
    soft_cap: float = 0.0,
    is_causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """Exact attention and the log-sum-exp of its logits, with all weights in memory.

    The shapes are those of `quake_jax.dot_product_attention` with a batch axis.
    """
    (batch, length, heads, _), (_, keys, kv_heads, size) = query.shape, value.shape
    logits = attention_logits(query, key, bias, scale=scale, soft_cap=soft_cap)
    kept = masks.kept_keys(
        jnp.arange(length),
        keys,
        mask,
        query_lengths,
        key_lengths,
        is_causal=is_causal,
        window_left=window_left,
        window_right=window_right,
    )
    if kept is not None:
        kept = grouped(kept, kv_heads)
        logits = jnp.where(kept, logits, masks.MASKED_LOGIT)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(logits.dtype))
    out = out.reshape(batch, length, heads, size)
    if query_lengths is not None:
        valid = jnp.arange(length)[None, :] < query_lengths[:, None]
        out = jnp.where(valid[:, :, None, None], out, 0)
    lse = lse.reshape(batch, heads, length).transpose(0, 2, 1)
    return out.astype(query.dtype), lse


def dot_product_attention(
    *operands: jax.Array, order: int, format: int, packed_axis: int, present: int, **parameters
) -> tuple[jax.Array, jax.Array]:
    """`jax.nn.dot_product_attention` and its residual in float32, of the primitive's operands.

    It is exact for every `order` and `format`. With a soft cap, values of another size than the
    keys, keys of another dtype than the query's, or float16, which jax.nn refuses on some
    platforms, it is `unfused_attention`.
    """
    arrays = by_name(operands, packed_axis, present).without_codes()
    query, key, value, bias = arrays[:4]
    lengths = (arrays.query_lengths, arrays.key_lengths)
    mask = masks.with_segments(arrays.mask, arrays.query_segments, arrays.key_segments)
    out, lse = unfused_attention(query, key, value, bias, mask, *lengths, **parameters)
    if not parameters["soft_cap"] and is_for_jax_nn(query, key, value):
        window = (parameters["window_left"], parameters["window_right"])
        if window == (-1, -1):
            window = None
        else:  # one that reaches everywhere instead of none
            window = tuple(max(query.shape[1], key.shape[1]) if w < 0 else w for w in window)
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=parameters["scale"],
            is_causal=bool(parameters["is_causal"]),
            query_seq_lengths=lengths[0],
            key_value_seq_lengths=lengths[1],
            local_window_size=window,
        )
    return out, lse
