"""What the arguments of the public functions may be."""

from __future__ import annotations

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._attention.operands import FORMATS, Operands
from quake_jax._core import jax_names
from quake_jax._core.config import DEFAULT_ORDERS, Order, resolved_order
from quake_jax._core.drop_in import (
    is_numeric,
    optional_array,
    refusal,
    refuse_complex,
    static_bool,
    unwrapped,
)

# The exponential is a small part of the time: float32-accurate. In int8 it is half of it, and
# weights are rounded by up to 1/255 of the largest, which is more than the error of order 2.
DEFAULT_ORDERS["dot_product_attention"] = 5
DEFAULT_ORDERS["dot_product_attention in int8"] = 2

# What `static_arguments` returns.
STATIC = (
    "function",
    "scale",
    "is_causal",
    "window",
    "implementation",
    "return_residual",
    "soft_cap",
    "compute_dtype",
    "order",
)
# The optional arrays, as the public functions name them.
OPTIONAL = (
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "query_segment_ids",
    "key_value_segment_ids",
)
# Those of a cache alone.
_SCALES = ("key_scales", "value_scales")


def check_arrays(function: str, operands: Operands, is_cache: bool) -> None:
    """Raise ValueError or TypeError, as jax.nn does, unless the arrays belong together.

    Key and value of a cache may have another dtype than query.
    """
    names = ("query", "key", "value", *OPTIONAL, *_SCALES)
    arrays = dict(zip(names, operands, strict=True))

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
    if query.dtype != key.dtype and not is_cache:
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
    integers = {
        "query_seq_lengths": (batch,),
        "key_value_seq_lengths": (batch,),
        "query_segment_ids": (batch, query.shape[1]),
        "key_value_segment_ids": (batch, keys),
    }
    for name, shape in integers.items():
        x = arrays[name]
        if x is not None and (x.shape != shape or x.dtype != jnp.int32):
            refuse(name, f"shape {shape} and dtype int32")
    names = ("query_segment_ids", "key_value_segment_ids")
    for name, other in (names, names[::-1]):
        if arrays[name] is not None and arrays[other] is None:
            refuse(name, f"{other} beside it, with {query.shape[1]} queries and {keys} keys")


def optional_arrays(function: str, *arrays) -> list[jax.Array | None]:
    """Those of `OPTIONAL`, as they are given; raise TypeError for what is no array."""
    return [optional_array(x, function, name) for name, x in zip(OPTIONAL, arrays, strict=True)]


def four_axes(x):
    """x as an array with axes of size 1 in front, four in all."""
    if x is None:
        return None
    x = jnp.asarray(x)
    return x.reshape((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x


def static_arguments(
    function,
    scale,
    is_causal,
    window,
    implementation,
    return_residual,
    soft_cap,
    compute_dtype,
    order,
) -> tuple[dict, jax.Array | None]:
    """The keyword arguments as `call.attend` takes them, and the scale if it is traced."""
    compute_dtype = checked_compute_dtype(function, "compute_dtype", compute_dtype)
    order = attention_order(order, compute_dtype)
    scale, soft_cap = unwrapped(scale), unwrapped(soft_cap)
    is_causal = static_bool(is_causal, function, "is_causal")
    return_residual = static_bool(return_residual, function, "return_residual")
    known = implementation is None or isinstance(implementation, str)
    if not known or implementation not in (None, "quake", "xla", "cudnn"):
        expected = 'None, "quake", "xla" or "cudnn"'
        raise _refusal(ValueError, function, "implementation", expected, implementation)
    scale, traced = _static_scale(scale, function)
    static = {
        "function": function,
        "scale": scale,
        "is_causal": is_causal,
        "window": _static_window(window, function),
        "implementation": implementation,
        "return_residual": return_residual,
        "soft_cap": _static_soft_cap(soft_cap, function),
        "compute_dtype": compute_dtype,
        "order": order,
    }
    return static, traced


def attention_order(order: Order | None, compute_dtype: str | None) -> Order:
    """`resolved_order` of attention that multiplies `compute_dtype`."""
    is_int8 = compute_dtype == "int8"
    return resolved_order(order, f"dot_product_attention{' in int8' if is_int8 else ''}")


def checked_compute_dtype(function: str, argument: str, dtype) -> str | None:
    """The name of what attention is to multiply, or None; raise ValueError for others."""
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in FORMATS:
        allowed = ", ".join(map(repr, FORMATS))
        raise refusal(function, argument, f"None or one of {allowed}", repr(dtype))
    return name


def _refusal(error: type, function: str, name: str, expected: str, value) -> Exception:
    return error(f"quake_jax.{function}: {name} must be {expected}; got {value!r}")


def _static_window(window, function: str) -> tuple[int, int] | None:
    if window is None:
        return None
    try:
        left, right = (window, window) if np.ndim(window) == 0 else window
        return operator.index(left), operator.index(right)
    except (TypeError, ValueError):
        expected = "an integer or two, (left, right)"
        raise _refusal(TypeError, function, "local_window_size", expected, window) from None


def _static_soft_cap(soft_cap, function: str) -> float | None:
    if soft_cap is None:
        return None
    is_static = is_numeric(soft_cap) and not isinstance(soft_cap, jax_names.Tracer)
    if not is_static or jnp.ndim(soft_cap) != 0 or jnp.iscomplexobj(soft_cap):
        raise _refusal(TypeError, function, "logits_soft_cap", "a static number", soft_cap)
    soft_cap = float(soft_cap)
    if not (soft_cap > 0 and math.isfinite(soft_cap)):
        expected = "None, or positive and finite"
        raise _refusal(ValueError, function, "logits_soft_cap", expected, soft_cap)
    return soft_cap


def _static_scale(scale, function: str) -> tuple[float | None, jax.Array | None]:
    """The scale if it is known, and if it is traced."""
    if scale is None:
        return None, None
    if not is_numeric(scale) or jnp.iscomplexobj(scale):
        raise _refusal(TypeError, function, "scale", "a real number", scale)
    if jnp.ndim(scale) != 0:
        raise _refusal(ValueError, function, "scale", "one number, not an array", scale)
    return (None, scale) if isinstance(scale, jax_names.Tracer) else (float(scale), None)
