"""Dense layers in jax.numpy: the kernel's algorithm, which stands for it on other platforms and is
the oracle of the tests; and the function whose derivative is theirs.

What is rounded, and where, is the same as in the kernel; sums of integers are equal bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from quake_jax._core import norm
from quake_jax._core.config import EXACT, Order
from quake_jax._dense import layout
from quake_jax._dense.layout import with_axes_in_front
from quake_jax._dense.operands import Call, Operands
from quake_jax._elementwise.functions import FUNCTIONS

# The scale of a row of zeros, whose reciprocal is finite.
_SMALLEST_SCALE = 2.0**-118
# The code of what is NaN or an infinity, where others are from -127 to 127.
_NOT_FINITE = -128


def normalized(v: jax.Array, kind: str, scale, offset, epsilon: float) -> jax.Array:
    """Layer or root mean square normalisation over the last axis, in the dtype of v."""
    if kind == "layer":
        return norm.layer_norm(v, scale, offset, epsilon)
    return norm.rms_norm(v, scale, epsilon)


def activated(name: str, order: Order, y: jax.Array) -> jax.Array:
    """A function of the element-wise table; "" is none."""
    if not name:
        return y
    row = FUNCTIONS[name]
    return row.exact(y) if order == EXACT else row.differentiable(y, order=order)


def _over(x, divisor: int):
    """x / divisor. XLA would multiply by the reciprocal, which differs in the last bit."""
    return x / jnp.where(jnp.isnan(x), jnp.nan, jnp.float32(divisor))


def _or_nan(scale, v):
    """A scale that is not too small, and NaN where the row v has a NaN or an infinity."""
    # Not by the largest element: XLA's maximum of 64 and more may lose a NaN on CPUs.
    is_finite = jnp.all(jnp.isfinite(v), -1, keepdims=True)
    return jnp.where(is_finite, jnp.maximum(scale, _SMALLEST_SCALE), jnp.nan)


def quantized(v: jax.Array, *, zero_point: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The rows v (…, K) as int8 q with scales (…, 1), and zero points z: v ≈ scale · (q - z).

    Without a zero point it is None, and q is from -127 to 127. The scale of a row with NaN or an
    infinity is NaN.
    """
    if not zero_point:
        largest = jnp.max(jnp.abs(v), -1, keepdims=True, initial=0.0)
        scale = _or_nan(_over(largest, 127), v)
        return _int8(jnp.clip(jnp.rint(v * (1 / scale)), -127, 127)), scale, None
    high = jnp.max(v, -1, keepdims=True, initial=0.0)
    low = jnp.min(v, -1, keepdims=True, initial=0.0)
    scale = _or_nan(_over(high, 255) - _over(low, 255), v)
    inverse = 1 / scale
    zero = jnp.rint(-low * inverse) - 128
    q = _int8(jnp.clip(jnp.rint(v * inverse) + zero, -128, 127))
    return q, scale, jnp.where(jnp.isnan(zero), 0, zero).astype(jnp.int32)


def codes(v: jax.Array, limits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v as int8 q from -127 to 127, with one scale and zero point z: v ≈ scale · (q - z).

    -128 stands for NaN and infinities. `limits` (2,) are the least and the largest element that is
    not clipped; if these are not finite, the scale is NaN, and everything -128.
    """
    is_finite = jnp.all(jnp.isfinite(limits))
    low, high = jnp.minimum(limits[0], 0), jnp.maximum(limits[1], 0)
    scale = jnp.maximum(_over(high, 254) - _over(low, 254), _SMALLEST_SCALE)
    scale = jnp.where(is_finite, scale, jnp.nan)
    inverse = 1 / scale
    zero = jnp.where(is_finite, jnp.rint(-low * inverse) - 127, 0)
    q = jnp.rint(jnp.clip(v * inverse, -127 - zero, 127 - zero)) + zero
    q = jnp.where(jnp.isfinite(v) & is_finite, q, _NOT_FINITE)
    return q.astype(jnp.int8), scale, zero.astype(jnp.int32)


def _coded(v: jax.Array, limits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `quantized`, of rows that have a range, or are codes of it already."""
    q, scale, zero = codes(v, limits)
    q = v if v.dtype == jnp.int8 else q
    is_finite = jnp.all(q != _NOT_FINITE, -1, keepdims=True)
    return q, jnp.where(is_finite, scale, jnp.nan), zero


def _int8(q):
    # A conversion of NaN to an integer is undefined.
    return jnp.where(jnp.isnan(q), 0, q).astype(jnp.int8)


def _matmul(a, b, dtype):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def _products(call: Call, v: jax.Array, operands: Operands) -> list[jax.Array]:
    """v · W in float32 for each weight."""
    k = v.shape[-1]
    columns = _columns(call)
    if call.format == "bfloat16":
        v = v.astype(jnp.bfloat16)
    if not call.quantized:
        weights = _unpacked(call, operands, k)
        if call.format == "bfloat16":
            weights = [w.astype(jnp.bfloat16) for w in weights]
        return [_matmul(v, w, jnp.float32) for w in weights]
    if call.has_range:
        q, scale, zero = _coded(v, operands.x_range)
    else:
        q, scale, zero = quantized(v, zero_point=not call.group_size)
    results = []
    for weight, n in zip(operands.weights, columns, strict=True):
        by_column = functools.partial(layout.columns_from_panels, n=n, groups=bool(call.group_size))
        if not call.group_size:
            codes = layout.from_words(weight.codes, call.format, k, n)
            total = _matmul(q, codes, jnp.int32)
            total = total - zero * with_axes_in_front(by_column(weight.sums), total.ndim)
            scales = with_axes_in_front(by_column(weight.scales), total.ndim)
            results.append(total.astype(jnp.float32) * (scale * scales))
            continue
        values = layout.values_of(weight.codes, operands.table, call.format, k, n)
        groups = k // call.group_size
        values = values.astype(jnp.int8).reshape(groups, call.group_size, n)
        q_groups = q.reshape(*q.shape[:-1], groups, call.group_size)
        total = jnp.einsum("...gk,gkn->...gn", q_groups, values, preferred_element_type=jnp.int32)
        scales = by_column(weight.scales).astype(jnp.float32)
        y = total.astype(jnp.float32) * with_axes_in_front(scales, total.ndim)
        if weight.offsets is not None:
            sums = jnp.sum(q_groups, -1, dtype=jnp.int32, keepdims=True).astype(jnp.float32)
            offsets = by_column(weight.offsets).astype(jnp.float32)
            y = y + sums * with_axes_in_front(offsets, y.ndim)
        results.append(scale * jnp.sum(y, -2))
    return results


def _columns(call: Call) -> Sequence[int]:
    return (*call.columns, *call.columns[:1]) if call.has_gate else call.columns


def _unpacked(call: Call, operands: Operands, k: int) -> list[jax.Array]:
    return [
        layout.unpacked(
            *(w.codes, w.scales, w.offsets, operands.table),
            *(call.format, k, n, call.group_size),
        )
        for w, n in zip(operands.weights, _columns(call), strict=True)
    ]


def _rows(call: Call, operands: Operands) -> jax.Array:
    """The rows that are multiplied: normalised, and in the order of the packed weight's."""
    v = operands.x
    if v.dtype == jnp.int8:
        return v
    v = v.astype(jnp.float32)
    if call.norm:
        v = normalized(v, call.norm, operands.norm_scale, operands.norm_offset, call.epsilon)
    return v if operands.permutation is None else jnp.take(v, operands.permutation, -1)


def _results(call: Call, operands: Operands, products: Sequence) -> list[jax.Array]:
    """From the products to the results, which are still float32."""
    results = [
        y if w.bias is None else y + with_axes_in_front(w.bias, y.ndim)
        for y, w in zip(products, operands.weights, strict=True)
    ]
    if call.has_gate:
        y, gate = results
        results = [activated(call.activation, call.order, gate) * y]
    else:
        results = [activated(call.activation, call.order, y) for y in results]
    if operands.residual is not None:
        results = [y + operands.residual.astype(jnp.float32) for y in results]
    return results


def _in_stacks(function: Callable) -> Callable:
    """f(call, operands) of stacked weights from one of operands none of which has that axis."""

    @functools.wraps(function)
    def stacked(call: Call, operands: Operands) -> list[jax.Array]:
        weights = operands._replace(x=None, residual=None)
        # What all weights of a stack share has no axis of it.
        axes = jax.tree.map(lambda leaf: None if leaf.shape[0] == 1 else 0, weights)
        weights = jax.tree.map(
            lambda leaf: jnp.squeeze(leaf, 0) if leaf.shape[0] == 1 else leaf, weights
        )
        operands = weights._replace(x=operands.x, residual=operands.residual)
        if not jax.tree.leaves(axes):
            return function(call, operands)
        axes = axes._replace(x=0, residual=None if operands.residual is None else 0)
        return jax.vmap(functools.partial(function, call), (axes,))(operands)

    return stacked


@_in_stacks
def dense(call: Call, operands: Operands) -> list[jax.Array]:
    """The results of the primitive."""
    results = _results(call, operands, _products(call, _rows(call, operands), operands))
    if call.has_out_range:
        return [codes(y, operands.out_range)[0] for y in results]
    return [y.astype(call.dtype) for y in results]


@_in_stacks
def straight_through(call: Call, operands: Operands) -> list[jax.Array]:
    """The function whose derivative a dense layer has: nothing is rounded or quantised."""
    v = _rows(call, operands)
    products = [_matmul(v, w, jnp.float32) for w in _unpacked(call, operands, v.shape[-1])]
    return _results(call, operands, products)
