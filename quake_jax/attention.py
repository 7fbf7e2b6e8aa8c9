"""Fused scaled-dot-product attention with the signature of jax.nn: no array holds the weights.

The kernel takes float32, bfloat16 and float16 with head sizes up to 512; what else jax.nn takes
goes to jax.nn. The derivative is computed tile by tile, so its memory grows with the length of the
sequences and not with its square.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from quake_jax import _compat, _primitives, reference
from quake_jax._config import EXACT, Order, resolved_order
from quake_jax._drop_in import (
    KERNEL_DTYPES,
    as_array,
    is_numeric,
    optional_array,
    refuse_complex,
    static_bool,
)

# The kernel's tiles are cut for sizes of heads up to this one.
_LARGEST_HEAD = 512
# The derivative holds a few tiles of about so many weights, of at least so many queries.
_TILE_WEIGHTS = 1 << 22
_TILE_QUERIES = 32
# Positions are int32, and a window is added to them.
_LONGEST = 2**30
# What the primitive's parameter `present` is a sum of.
_BIAS, _MASK, _QUERY_LENGTHS, _KEY_LENGTHS = 1, 2, 4, 8
_NO_LIMIT = -1

# The derivative.

# What is constant where a key is masked: all of a logit, as in jax.nn; the product of query and
# key, to which the bias is added afterwards; or nothing, if a mask is itself added. That shows
# where a query sees no key: elsewhere the weight of a masked logit is 0.
WHOLE, PRODUCT, NOTHING = "whole", "product", "nothing"


def _call(parameters, *operands):
    parameters = dict(parameters)
    parameters.pop("constant")
    if parameters.pop("is_masked_by_bias"):
        at = (1 if parameters["packed_axis"] else 3) + bool(parameters["present"] & _BIAS)
        operands = (*operands[:at], *operands[at + 1 :])
        parameters["present"] -= _MASK
    return tuple(_primitives.dot_product_attention(*operands, **parameters))


_call.__name__ = _call.__qualname__ = "dot_product_attention"
_attention = jax.custom_jvp(_call, nondiff_argnums=(0,))


@functools.partial(_attention.defjvp, symbolic_zeros=True)
def _tangent_rule(parameters, operands, tangents):
    out, lse = _attention(parameters, *operands)
    parameters = dict(parameters)
    packed_axis, present = parameters.pop("packed_axis"), parameters.pop("present")
    parameters.pop("order")
    arrays = reference.attention_operands(operands, packed_axis, present)
    active = [not isinstance(t, SymbolicZero) for t in tangents]
    # The tangents of query, key, value and bias, or None.
    if packed_axis:
        q, k, v = (
            reference.attention_operands(tangents[:1], packed_axis, 0)[:3]
            if active[0]
            else (None, None, None)
        )
    else:
        q, k, v = (t if a else None for t, a in zip(tangents[:3], active[:3], strict=True))
    at = 1 if packed_axis else 3
    bias = tangents[at] if present & _BIAS and active[at] else None
    tangent = _tangent(arrays, (q, k, v, bias), jax.lax.stop_gradient(lse), **parameters)
    # The residual is a constant in derivatives, as in jax.nn.
    return (out, lse), (tangent.astype(out.dtype), jnp.zeros_like(lse))


def _tangent(arrays, tangents, lse, **parameters):
    """The tangent of the output, in float32, from the exact weights.

    Args:
      arrays: query, key, value, bias, mask, query lengths and key lengths, or None for those.
      tangents: of the first four, or None where they are 0.
      lse: the log-sum-exp of the logits, (B, T, N).
    """
    query, key, value, bias, mask, query_lengths, key_lengths = arrays
    dquery, dkey, dvalue, dbias = tangents
    if all(t is None for t in tangents):
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), jnp.float32)
    # What is used in every tile: derivatives are sums over tiles, which are taken in float32.
    shared = jax.tree.map(lambda x: x.astype(jnp.float32), (key, value, dkey, dvalue))
    # By tile, with the axis of queries in front.
    by_query = [
        *((None if x is None else jnp.moveaxis(x, 1, 0)) for x in (query, dquery, lse)),
        *((None if x is None else jnp.moveaxis(x, 2, 0)) for x in (bias, dbias, mask)),
    ]
    length = query.shape[1]
    # Those with one row for all queries are the same in every tile.
    constant = [None if x is None or x.shape[0] == length else x for x in by_query]
    sliced = [None if x is None or x.shape[0] != length else x for x in by_query]

    @jax.checkpoint
    def tile(positions, sliced, constant, shared, lengths):
        q, dq, lse, b, db, m = (
            x if c is None else c for x, c in zip(sliced, constant, strict=True)
        )
        return _tangent_of_tile(
            positions,
            *(None if x is None else jnp.moveaxis(x, 0, 1) for x in (q, dq, lse)),
            *(None if x is None else jnp.moveaxis(x, 0, 2) for x in (b, db, m)),
            *shared,
            *lengths,
            **parameters,
        )

    lengths = (query_lengths, key_lengths)
    rows = _tile_length(query.shape, key.shape[1])
    if rows == length:
        return tile(jnp.arange(length), sliced, constant, shared, lengths)
    tiles = -(-length // rows)

    def in_tiles(x):
        # The last query again: of zeros with its masks there may be no weights but NaN.
        padding = ((0, tiles * rows - length), *((0, 0) for _ in x.shape[1:]))
        return jnp.pad(x, padding, mode="edge").reshape(tiles, rows, *x.shape[1:])

    def step(_, by_tile):
        positions, sliced = by_tile
        return None, tile(positions, sliced, constant, shared, lengths)

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
    constant,
    is_masked_by_bias,
    **masks,
):
    """The tangent of the outputs of the queries at `positions`: (B, T, N, V)."""
    batch, length, heads, _ = query.shape
    kv_heads, size = value.shape[2:]
    query = query.astype(jnp.float32)
    dquery = None if dquery is None else dquery.astype(jnp.float32)
    primals, tangents = (query, key, bias), (dquery, dkey, dbias)
    moving = [i for i, t in enumerate(tangents) if t is not None]
    kept = reference.kept_keys(positions, key.shape[1], mask, query_lengths, key_lengths, **masks)
    if kept is not None:
        kept = reference.grouped(kept.reshape((1,) * (4 - kept.ndim) + kept.shape), kv_heads)

    def masked(x):
        if kept is None:
            return x
        if is_masked_by_bias:
            return jnp.where(kept, x, jax.lax.stop_gradient(x))
        if constant == NOTHING:
            return x + jnp.where(kept, jnp.float32(0), jnp.float32(reference.MASKED_LOGIT))
        return jnp.where(kept, x, reference.MASKED_LOGIT)

    def logits(*changed):
        x = list(primals)
        for i, value in zip(moving, changed, strict=True):
            x[i] = value
        query, key, bias = x
        s = reference.attention_logits(query, key, None, scale=scale, soft_cap=soft_cap)
        s = masked(s) if constant == PRODUCT else s
        s = s if bias is None else s + reference.grouped(bias, kv_heads).astype(s.dtype)
        return s if constant == PRODUCT else masked(s)

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
        valid = positions < query_lengths[:, None]
        out = jnp.where(valid[:, :, None, None], out, 0)
    return out


# Arguments.


def _checked(function: str, arrays: dict[str, jax.Array | None]) -> None:
    """Raise ValueError or TypeError, as jax.nn does, unless the arrays belong together."""

    def refuse(name, expected):
        x = arrays[name]
        raise ValueError(
            f"quake_jax.{function}: {name} must have {expected}; got shape {x.shape} and dtype "
            f"{x.dtype}"
        )

    for name, x in arrays.items():
        if x is not None:
            refuse_complex(x, function, name)
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    for name in ("key", "value", "query"):
        if arrays[name].ndim != 4:
            refuse(name, "3 or 4 axes, (batch,) length, heads and size")
    batch, keys, kv_heads, size = key.shape
    if value.dtype != key.dtype:
        refuse("value", f"the dtype of key, {key.dtype}")
    if value.shape[:3] != key.shape[:3]:
        refuse("value", f"the batch, length and heads of key, {key.shape[:3]}")
    if query.dtype != key.dtype:
        refuse("query", f"the dtype of key, {key.dtype}")
    if query.shape[0] != batch or query.shape[3] != size:
        refuse("query", f"the batch {batch} and the head size {size} of key")
    heads = query.shape[2]
    if (kv_heads == 0 and heads != 0) or (kv_heads != 0 and heads % kv_heads):
        refuse("query", f"a multiple of key's {kv_heads} heads")
    logits = (batch, heads, query.shape[1], keys)
    for name in ("bias", "mask"):
        x = arrays[name]
        if x is None:
            continue
        if name == "mask" and x.dtype != jnp.bool_:
            refuse(name, "dtype bool")
        if x.ndim != 4 or any(n not in (1, full) for n, full in zip(x.shape, logits, strict=True)):
            refuse(name, f"a shape that broadcasts to the logits' {logits}")
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        x = arrays[name]
        if x is not None and (x.shape != (batch,) or x.dtype != jnp.int32):
            refuse(name, f"shape {(batch,)} and dtype int32")


def _four_axes(x, default=None):
    """x as an array with axes of size 1 in front, four in all."""
    if x is None:
        return default
    x = jnp.asarray(x)
    return x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x


def _attend(
    query,
    key,
    value,
    bias,
    mask,
    query_lengths,
    key_lengths,
    traced_scale,
    *,
    function: str,
    scale: float | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    implementation: str | None,
    return_residual: bool,
    soft_cap: float | None,
    packed_axis: int,
    order: Order,
    constant: str = WHOLE,
    is_masked_by_bias: bool = False,
):
    """The public functions, once what is static is known. If packed, query is qkv with a batch.

    What they do not have is `constant`, and `is_masked_by_bias`: then the bias has large negative
    numbers where the mask, if there is one, says that logits are constant.
    """
    packed = query
    if packed_axis:
        query, key, value = reference.attention_operands([packed], packed_axis, 0)[:3]
        shape = query.shape
    else:
        shape = jnp.shape(query)
        query, key, value = map(_four_axes, (query, key, value))
    bias, mask = _four_axes(bias), _four_axes(mask)
    query_lengths, key_lengths = (
        None if x is None else jnp.asarray(x) for x in (query_lengths, key_lengths)
    )
    _checked(
        function,
        {
            "query": query,
            "key": key,
            "value": value,
            "bias": bias,
            "mask": mask,
            "query_seq_lengths": query_lengths,
            "key_value_seq_lengths": key_lengths,
        },
    )
    sizes = (query.shape[3], value.shape[3])
    if scale is None:
        scale = 1 / math.sqrt(sizes[0]) if sizes[0] else math.inf
    kernel = (
        implementation in (None, "quake")
        and order != EXACT
        and query.dtype in KERNEL_DTYPES
        and max(sizes) <= _LARGEST_HEAD
        and not any(isinstance(n, int) and n == 0 for n in (*query.shape, *value.shape))
        # jax.nn has no meaning for negative ones but this: keys on one side only.
        and (window is None or min(window) >= 0)
    )
    lengths = [n for n in (query.shape[1], key.shape[1]) if isinstance(n, int)]
    by_position = is_causal or any(x is not None for x in (query_lengths, key_lengths, window))
    if kernel and by_position and max(lengths, default=0) > _LONGEST:
        raise ValueError(
            f"quake_jax.{function}: query and key must have a length of at most {_LONGEST} where "
            f"results depend on positions; got {query.shape[1]} and {key.shape[1]}"
        )
    residual_dtype = key.dtype
    arrays = (query, key, value, bias, mask, query_lengths, key_lengths)
    limits = (_NO_LIMIT, _NO_LIMIT) if window is None else window
    if isinstance(query.shape[2], int) and query.shape[2] == 0:  # jax.nn would divide by it
        shape_of_out = (*query.shape[:3], sizes[1])
        out = jnp.zeros(shape_of_out, query.dtype), jnp.zeros(query.shape[:3], jnp.float32)
    elif not kernel:
        out = _without_kernel(
            function,
            arrays,
            scale=scale if traced_scale is None else traced_scale,
            soft_cap=soft_cap,
            is_causal=is_causal,
            window=window,
            implementation=implementation,
        )
    else:
        dtype = query.dtype
        if traced_scale is not None:
            # The kernel's is static. In float32 the product loses nothing that matters.
            query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
            query, scale, packed_axis = query * traced_scale.astype(jnp.float32), 1.0, 0
        if bias is not None and bias.dtype not in KERNEL_DTYPES:
            bias = bias.astype(jnp.float32)
        optional = (bias, mask, query_lengths, key_lengths)
        bits = (_BIAS, _MASK, _QUERY_LENGTHS, _KEY_LENGTHS)
        parameters = {
            "order": order,
            "scale": float(scale),
            "soft_cap": 0.0 if soft_cap is None else soft_cap,
            "is_causal": int(is_causal),
            # Longer than any array all the same, and int32 even when a position is added.
            "window_left": min(limits[0], _LONGEST),
            "window_right": min(limits[1], _LONGEST),
            "packed_axis": packed_axis,
            "present": sum(b for b, x in zip(bits, optional, strict=True) if x is not None),
            "constant": constant,
            "is_masked_by_bias": is_masked_by_bias and mask is not None,
        }
        operands = (
            *((packed,) if packed_axis else (query, key, value)),
            *(x for x in optional if x is not None),
        )
        operands = _split_alike(operands, packed_axis, parameters["present"])
        out, lse = _attention(tuple(parameters.items()), *operands)
        out = out.astype(dtype), lse
    out, lse = out
    out = out.reshape(*shape[:-1], sizes[1])
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(lse.astype(residual_dtype).reshape(shape[:-1]))


def _split_alike(operands: Sequence[jax.Array], packed_axis: int, present: int) -> list[jax.Array]:
    """The operands with shardings in their types over batch and heads alone, all alike there.

    So are the results, and tangents have to be what results are.
    """
    ranks = [x.ndim for x in operands]
    axes, _ = _primitives.attention_axes(ranks, packed_axis, present)
    types = [jax.typeof(x) for x in operands]
    split: dict = {None: ()}
    sizes: dict = {}
    for kinds, x in zip(axes, types, strict=True):
        for kind, size, entry in zip(kinds, x.shape, x.sharding.spec, strict=True):
            sizes.setdefault(kind, set()).add(size)
            if entry is not None:
                # The first one decides.
                split.setdefault(kind, entry if isinstance(entry, tuple) else (entry,))
    mesh = types[0].sharding.mesh

    def parts(kind) -> int:
        return math.prod(mesh.shape[name] for name in split.get(kind, ()))

    # The derivative makes two axes of the query heads, of which that of the key heads is split.
    uneven = any(size != 1 and size % parts("heads") for size in sizes["heads"])
    if uneven or {*split.get("batch", ())} & {*split.get("heads", ())}:
        split["heads"] = ()

    def wanted(kinds, shape) -> PartitionSpec:
        return PartitionSpec(
            *(split.get(k, ()) if size != 1 else () for k, size in zip(kinds, shape, strict=True))
        )

    resharded = []
    for x, aval, kinds in zip(operands, types, axes, strict=True):
        spec = wanted(kinds, aval.shape)
        resharded.append(x if spec == aval.sharding.spec else jax.sharding.reshard(x, spec))
    return resharded


def _without_kernel(function, arrays, *, scale, soft_cap, is_causal, window, implementation):
    """Output and residual from jax.nn, or from the unfused form of what jax.nn lacks."""
    query, key, value, bias, mask, query_lengths, key_lengths = arrays
    # A jitted jax.nn refuses float16 on CPUs.
    is_jax = implementation == "cudnn" or query.dtype != jnp.float16
    if soft_cap is None and value.shape == key.shape and is_jax:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            local_window_size=window,
            implementation=None if implementation == "quake" else implementation,
            return_residual=True,
        )
    if implementation == "cudnn":
        raise ValueError(
            f'quake_jax.{function}: implementation "cudnn" has neither logits_soft_cap nor values '
            "of another size than the keys"
        )
    if window is not None and min(window) < 0:
        t, s = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])[None, :]
        kept = ((t <= s + window[0]) & (t >= s - window[1]))[None, None]
        mask, window = kept if mask is None else mask & kept, None
    left, right = (_NO_LIMIT, _NO_LIMIT) if window is None else window
    return reference.unfused_attention(
        query,
        key,
        value,
        bias,
        mask,
        query_lengths,
        key_lengths,
        scale=scale,
        soft_cap=soft_cap or 0.0,
        is_causal=is_causal,
        window_left=left,
        window_right=right,
    )


attend_call = jax.jit(
    _attend,
    static_argnames=(
        "function",
        "scale",
        "is_causal",
        "window",
        "implementation",
        "return_residual",
        "soft_cap",
        "packed_axis",
        "order",
        "constant",
        "is_masked_by_bias",
    ),
    inline=_compat.INLINE,
)


def static_arguments(
    function, scale, is_causal, window, implementation, return_residual, soft_cap, order
) -> tuple[dict, jax.Array | None]:
    """The keyword arguments as `_attend` takes them, and the scale if it is traced."""
    order = resolved_order(order, "dot_product_attention")

    def refuse(error, name, expected, value):
        raise error(f"quake_jax.{function}: {name} must be {expected}; got {value!r}")

    is_causal = static_bool(is_causal, function, "is_causal")
    return_residual = static_bool(return_residual, function, "return_residual")
    known = implementation is None or isinstance(implementation, str)
    if not known or implementation not in (None, "quake", "xla", "cudnn"):
        refuse(ValueError, "implementation", 'None, "quake", "xla" or "cudnn"', implementation)
    if window is not None:
        try:
            left, right = (window, window) if np.ndim(window) == 0 else window
            window = (operator.index(left), operator.index(right))
        except (TypeError, ValueError):
            refuse(TypeError, "local_window_size", "an integer or two, (left, right)", window)
    if soft_cap is not None:
        is_static = is_numeric(soft_cap) and not isinstance(soft_cap, _compat.Tracer)
        if not is_static or jnp.ndim(soft_cap) != 0 or jnp.iscomplexobj(soft_cap):
            refuse(TypeError, "logits_soft_cap", "a static number", soft_cap)
        soft_cap = float(soft_cap)
        if not (soft_cap > 0 and math.isfinite(soft_cap)):
            refuse(ValueError, "logits_soft_cap", "None, or positive and finite", soft_cap)
    traced = None
    if scale is not None:
        if not is_numeric(scale) or jnp.iscomplexobj(scale):
            refuse(TypeError, "scale", "a real number", scale)
        if jnp.ndim(scale) != 0:
            refuse(ValueError, "scale", "one number, not an array", scale)
        if isinstance(scale, _compat.Tracer):
            scale, traced = None, scale
        else:
            scale = float(scale)
    static = {
        "function": function,
        "scale": scale,
        "is_causal": is_causal,
        "window": window,
        "implementation": implementation,
        "return_residual": return_residual,
        "soft_cap": soft_cap,
        "order": order,
    }
    return static, traced


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    order: Order | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale · query keyᵀ + bias) value: `jax.nn.dot_product_attention` with QuAKE.

    B is the batch, T and S are the lengths of queries and keys, N and K the heads of queries and
    of keys (N a multiple of K: grouped or multi-query attention), H and V the sizes of heads. The
    weights of shape (B, N, T, S) are never in memory, in derivatives neither.

    Args:
      query: real array of shape (B, T, N, H) or (T, N, H). float32, bfloat16 and float16 with H
        and V up to 512 use the kernel on CPUs; everything else is `jax.nn.dot_product_attention`.
      key: array of shape (B, S, K, H) or (S, K, H), and query's dtype.
      value: array of shape (B, S, K, V) or (S, K, V), and query's dtype; V may differ from H.
      bias: array that broadcasts to (B, N, T, S), added to the logits; or None.
      mask: boolean array that broadcasts to (B, N, T, S): True where a key takes part; or None.
      scale: factor of the logits; None is 1/√H. If it is traced, 16-bit operands are converted
        to float32.
      is_causal: whether query t sees the keys 0 to t only.
      query_seq_lengths: int32 array of shape (B,); results of queries from there on are 0.
      key_value_seq_lengths: int32 array of shape (B,); keys from there on are masked.
      local_window_size: (left, right): query t sees the keys t - left to t + right. An integer is
        both.
      implementation: None or "quake" is this package's; "xla" and "cudnn" are those of jax.nn.
      return_residual: whether to return the log-sum-exp of the logits too.
      logits_soft_cap: replaces the scaled logits by cap · tanh(logits / cap), before the bias.
      order: accuracy of the exponential, as in `softmax`, 5 unless a default is set; "exact" is
        `jax.nn.dot_product_attention`.

    Returns:
      An array of shape (B, T, N, V) or (T, N, V) and query's dtype; with `return_residual` also
      the residual, of the same dtype and without the last axis, a constant in derivatives. Results
      for parts of the keys, weighted by the softmax of their residuals, add up to that for all. A
      query that no key takes part for has the mean of all values. A masked key or value that is NaN
      has no effect where its whole tile is masked.

    Raises:
      TypeError: if an array is complex, or an argument that must be static is not.
      ValueError: if shapes or dtypes do not belong together, or another argument is not allowed; if
        results depend on positions beyond 2^30.

    Example:
      >>> import jax, quake_jax
      >>> q = jax.random.normal(jax.random.key(0), (2, 16, 4, 32))
      >>> y = quake_jax.dot_product_attention(q, q, q, is_causal=True)
    """
    function = "dot_product_attention"
    static, traced_scale = static_arguments(
        function,
        scale,
        is_causal,
        local_window_size,
        implementation,
        return_residual,
        logits_soft_cap,
        order,
    )
    names = (
        ("query", query),
        ("key", key),
        ("value", value),
        ("bias", bias),
        ("mask", mask),
        ("query_seq_lengths", query_seq_lengths),
        ("key_value_seq_lengths", key_value_seq_lengths),
    )
    arrays = [as_array(x, function, name) for name, x in names[:3]]
    arrays += [optional_array(x, function, name) for name, x in names[3:]]
    return attend_call(*arrays, traced_scale, packed_axis=0, **static)


def packed_dot_product_attention(
    qkv: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    qkv_axis: int = -3,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    order: Order | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`dot_product_attention` of query, key and value that lie in one array, without a copy.

    That is how one matrix product makes them. Slices of its result would be copied before a
    kernel reads them.

    Args:
      qkv: array of shape (B, T, 3, N, H) or (B, T, N, 3, H), with or without B, whose axis of size
        3 holds query, key and value; dtypes as in `dot_product_attention`.
      qkv_axis: the axis of size 3, the last but two (-3) or the last but one (-2).
      bias, mask, scale, is_causal: as in `dot_product_attention`.
      query_seq_lengths, key_value_seq_lengths, local_window_size: the same.
      implementation, return_residual, logits_soft_cap, order: the same.

    Returns:
      As `dot_product_attention`: an array of shape (B, T, N, H) or (T, N, H).

    Raises:
      TypeError, ValueError: as `dot_product_attention`, and if qkv has no such axis.

    Example:
      >>> import jax, quake_jax
      >>> qkv = jax.random.normal(jax.random.key(0), (2, 16, 3, 4, 32))
      >>> y = quake_jax.packed_dot_product_attention(qkv, is_causal=True)
    """
    function = "packed_dot_product_attention"
    static, traced_scale = static_arguments(
        function,
        scale,
        is_causal,
        local_window_size,
        implementation,
        return_residual,
        logits_soft_cap,
        order,
    )
    qkv = as_array(qkv, function, "qkv")
    if qkv.ndim not in (4, 5):
        raise ValueError(
            f"quake_jax.{function}: qkv must have 5 axes, or 4 without a batch; got shape "
            f"{qkv.shape}"
        )
    try:
        axis = operator.index(qkv_axis)
    except TypeError:
        raise TypeError(
            f"quake_jax.{function}: qkv_axis must be an integer; got {qkv_axis!r}"
        ) from None
    axis = axis if axis < 0 else axis - qkv.ndim
    if axis not in (-3, -2) or qkv.shape[axis] != 3:
        raise ValueError(
            f"quake_jax.{function}: qkv_axis must be -3 or -2, and that axis of qkv have size 3; "
            f"got {qkv_axis} and shape {qkv.shape}"
        )
    has_batch = qkv.ndim == 5
    arrays = [
        optional_array(x, function, name)
        for name, x in (
            ("bias", bias),
            ("mask", mask),
            ("query_seq_lengths", query_seq_lengths),
            ("key_value_seq_lengths", key_value_seq_lengths),
        )
    ]
    result = attend_call(
        qkv if has_batch else qkv[None],
        None,
        None,
        *arrays,
        traced_scale,
        packed_axis=axis + 5,
        **static,
    )
    return result if has_batch else jax.tree.map(lambda x: x[0], result)
