"""From the arguments of the public functions to the kernel, or to what takes their place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from quake_jax._attention import reference
from quake_jax._attention.arguments import check_arrays, four_axes
from quake_jax._attention.derivative import attention
from quake_jax._attention.masks import Masking, in_window, with_segments
from quake_jax._attention.operands import (
    LARGEST_HEAD,
    LONGEST,
    NO_LIMIT,
    Operands,
    axes_of,
    format_of,
    parts_of_packed,
)
from quake_jax._core.config import EXACT, Order
from quake_jax._core.drop_in import KERNEL_DTYPES

_AS_JAX_NN = Masking()


def attend(
    query,
    key,
    value,
    bias,
    mask,
    query_lengths,
    key_lengths,
    query_segments,
    key_segments,
    traced_scale,
    key_scales=None,
    value_scales=None,
    *,
    packed_axis: int,
    scale: float | None,
    soft_cap: float | None,
    is_causal: bool,
    window: tuple[int, int] | None,
    order: Order,
    compute_dtype: str | None = None,
    function: str = "dot_product_attention",
    return_residual: bool = False,
    implementation: str | None = None,
    is_cache: bool = False,
    masking: Masking = _AS_JAX_NN,
):
    """The public functions, once what is static is known; also what stands for other programs.

    If packed, query is qkv with a batch. Only a cache has scales, and keys and values of another
    dtype than query. The public functions have no `masking`, and what takes the kernel's place does
    not know of it.
    """
    packed = query
    if packed_axis:
        query, key, value = parts_of_packed(packed, packed_axis)
        shape = query.shape
    else:
        shape = jnp.shape(query)
        query, key, value = map(four_axes, (query, key, value))
    integers = (query_lengths, key_lengths, query_segments, key_segments)
    integers = (None if x is None else jnp.asarray(x) for x in integers)
    arrays = Operands(
        query, key, value, four_axes(bias), four_axes(mask), *integers, key_scales, value_scales
    )
    if arrays.key_segments is None and arrays.query.shape[1] == arrays.key.shape[1]:
        arrays = arrays._replace(key_segments=arrays.query_segments)
    check_arrays(function, arrays, is_cache)
    size, value_size = arrays.query.shape[3], arrays.value.shape[3]
    if scale is None:
        scale = 1 / math.sqrt(size) if size else math.inf
    if isinstance(shape[-2], int) and shape[-2] == 0:  # jax.nn would divide by it
        rows = arrays.query.shape[:3]
        out, lse = jnp.zeros((*rows, value_size), query.dtype), jnp.zeros(rows, jnp.float32)
    elif implementation in (None, "quake") and _is_for_kernel(
        function, arrays, order, is_causal, window
    ):
        parameters = {
            "order": order,
            "scale": scale,
            "soft_cap": 0.0 if soft_cap is None else soft_cap,
            "is_causal": int(is_causal),
            # A traced scale multiplies the query in float32.
            "format": format_of(
                compute_dtype, query.dtype if traced_scale is None else jnp.float32
            ),
            **limits(window),
        }
        out, lse = _with_kernel(arrays, packed, packed_axis, traced_scale, parameters, masking)
    else:
        out, lse = _without_kernel(
            function,
            arrays,
            scale=scale if traced_scale is None else traced_scale,
            soft_cap=soft_cap,
            is_causal=is_causal,
            window=window,
            implementation=implementation,
        )
    out = out.reshape(*shape[:-1], value_size)
    if not return_residual:
        return out
    return out, jax.lax.stop_gradient(lse.astype(arrays.key.dtype).reshape(shape[:-1]))


def limits(window: tuple[int, int] | None) -> dict[str, int]:
    """A window as the primitive's parameters."""
    left, right = (NO_LIMIT, NO_LIMIT) if window is None else window
    # Longer than any array all the same, and int32 even when a position is added.
    return {"window_left": min(left, LONGEST), "window_right": min(right, LONGEST)}


def _is_for_kernel(
    function: str,
    arrays: Operands,
    order: Order,
    is_causal: bool,
    window: tuple[int, int] | None,
) -> bool:
    """Whether the kernel takes a call; raise ValueError if nothing does."""
    query, key, value = arrays[:3]
    kernel = (
        order != EXACT
        and query.dtype in KERNEL_DTYPES
        and max(query.shape[3], value.shape[3]) <= LARGEST_HEAD
        and not any(isinstance(n, int) and n == 0 for n in (*query.shape, *value.shape))
        # jax.nn has no meaning for negative ones but this: keys on one side only.
        and (window is None or min(window) >= 0)
    )
    by_position = is_causal or any(
        x is not None for x in (arrays.query_lengths, arrays.key_lengths, window)
    )
    lengths = [n for n in (query.shape[1], key.shape[1]) if isinstance(n, int)]
    if kernel and by_position and max(lengths, default=0) > LONGEST:
        raise ValueError(
            f"quake_jax.{function}: query and key must have a length of at most {LONGEST} where "
            f"results depend on positions; got {query.shape[1]} and {key.shape[1]}"
        )
    return kernel


def _with_kernel(
    arrays: Operands,
    packed: jax.Array,
    packed_axis: int,
    traced_scale: jax.Array | None,
    parameters: dict,
    masking: Masking,
) -> tuple[jax.Array, jax.Array]:
    dtype = arrays.query.dtype
    if traced_scale is not None:
        # The kernel's is static. In float32 the product loses nothing that matters.
        query, key, value = (x.astype(jnp.float32) if x.dtype == dtype else x for x in arrays[:3])
        query, packed_axis = query * traced_scale.astype(jnp.float32), 0
        parameters["scale"] = 1.0
        arrays = arrays._replace(query=query, key=key, value=value)
    bias = arrays.bias
    if bias is not None and bias.dtype not in KERNEL_DTYPES:
        arrays = arrays._replace(bias=bias.astype(jnp.float32))
    operands = (
        *((packed,) if packed_axis else arrays[:3]),
        *(x for x in arrays.optional if x is not None),
    )
    operands = _split_alike(operands, packed_axis, arrays.present)
    parameters |= {"packed_axis": packed_axis, "present": arrays.present}
    out, lse = attention(tuple(parameters.items()), masking, *operands)
    return out.astype(dtype), lse


def _split_alike(operands: Sequence[jax.Array], packed_axis: int, present: int) -> list[jax.Array]:
    """The operands with shardings in their types over batch and heads alone, all alike there.

    So are the results, and tangents have to be what results are.
    """
    ranks = [x.ndim for x in operands]
    axes, _ = axes_of(ranks, packed_axis, present)
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
    arrays = arrays.without_codes()
    query, key, value, bias, mask, query_lengths, key_lengths, *segments = arrays[:9]
    mask = with_segments(mask, *segments)
    is_cudnn = implementation == "cudnn" and value.shape == key.shape
    if soft_cap is None and (is_cudnn or reference.is_for_jax_nn(query, key, value)):
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
        kept = in_window(t, s, *window)[None, None]
        mask, window = kept if mask is None else mask & kept, None
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
        **limits(window),
    )
