"""The call of `quake_jax.dot_product_attention` that takes the place of an attention.

This is what is traced into the rewritten program: it brings arrays into the kernel's form, and its
result into the original's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._attention import call
from quake_jax._attention.arguments import attention_order
from quake_jax._attention.masks import Masking, kept_keys
from quake_jax._attention.operands import NO_LIMIT
from quake_jax._rewrite.labels import SIZE, Labels, apart

# A bias of at most this leaves masked logits (at most -9e8) as good as none.
_LARGEST_LATE_BIAS = 1e8

# The axes of an array by label, as a tuple so that it can be hashed.
_Axes = tuple[tuple[int | str, int], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to call the kernel.

    Attributes:
      labels: what the axes of the kernel's arrays are made of.
      operands: the axes of query, key and value.
      packed_axis: if they are one array instead: which axis of it has size 3, -3 or -2.
      repeats: (label, n) if query has n times the heads that key and value have, or None.
      masks: the axes of each mask, and whether it is True where a key takes no part.
      lengths: of keys: the axes of an array, or None for 0, and what is added to it.
      numbers: if the masks are to be one bias: what each puts in a logit's place, or adds to it.
      masking: what is constant where a mask that is no sum masks.
      biases: the axes of each, and its factor.
      late_biases: the same of those that are added after the masks.
      late_mask: if there are such: the number of the masks, and whether it is added to a logit or
        put in its place.
      factors: the axes of arrays that multiply the result.
      scale, is_scale_traced, soft_cap: of the logits.
      window: (left, right) as in `quake_jax.dot_product_attention`, or None.
      keyless: what queries without any key get, or None if it is what the kernel gives them.
      dtype: that the kernel computes in.
      result, shape, result_dtype: the labels of the result's axes, its shape and dtype.
    """

    labels: Labels
    operands: tuple[_Axes, ...]
    packed_axis: int | None
    repeats: tuple[int, int] | None
    masks: tuple[tuple[_Axes, bool], ...]
    lengths: tuple[tuple[_Axes | None, int], ...]
    numbers: tuple[tuple[float, bool], ...]
    masking: Masking
    biases: tuple[tuple[_Axes, float], ...]
    late_biases: tuple[tuple[_Axes, float], ...]
    late_mask: tuple[float, bool] | None
    factors: tuple[_Axes, ...]
    scale: float
    is_scale_traced: bool
    soft_cap: float | None
    window: tuple[int, int] | None
    keyless: float | None
    dtype: np.dtype
    result: tuple[tuple[int | str, ...], ...]
    shape: tuple[int, ...]
    result_dtype: np.dtype

    @property
    def sizes(self) -> dict:
        return dict(self.labels.sizes)

    @property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The labels of batch, length and query heads."""
        labels = self.labels
        return labels.batch, labels.length, (*labels.heads, *labels.groups)


def attend(*arrays, plan: Plan, compute_dtype: str | None, order):
    """The attention of the plan: operands, masks, biases, factors, and the scale if traced."""
    remaining = iter(arrays)

    def take(described: Sequence) -> list:
        return [next(remaining) for _ in described]

    operands = take(plan.operands if plan.packed_axis is None else (None,))
    kept = _masks(plan, take(plan.masks))
    lengths = _lengths(
        plan, [None if axes is None else next(remaining) for axes, _ in plan.lengths]
    )
    terms = _biases(plan, plan.biases, take(plan.biases))
    late = _sum(_biases(plan, plan.late_biases, take(plan.late_biases)))
    factors = take(plan.factors)
    scale = plan.scale
    if plan.is_scale_traced:
        scale = next(remaining).astype(jnp.float32) * scale
    if plan.numbers:
        terms.append(_bias_of_masks(kept, plan.numbers))
        kept = [m for m, (_, is_added) in zip(kept, plan.numbers, strict=True) if not is_added]
    mask = functools.reduce(operator.and_, kept) if kept else None
    bias = _sum(terms if late is None else [*terms, late])

    def kernel():
        return _kernel(plan, operands, bias, mask, lengths, scale, compute_dtype, order)

    if late is None:
        out = kernel()
    else:
        # A bias may show in a mask's number only where it is huge or a query has no key.
        kept = _kept(plan, mask, lengths)
        is_plain = (jnp.abs(late) <= _LARGEST_LATE_BIAS).all() & kept.any(-1).all()
        arrays = (*operands, _sum(terms), late, kept, scale)
        out = jax.lax.cond(is_plain, kernel, lambda: _with_weights(plan, *arrays))
    if plan.keyless is not None:
        is_kept = _kept(plan, mask, lengths).any(-1)  # (batch, heads, length)
        out = jnp.where(is_kept.swapaxes(1, 2)[..., None], out, plan.keyless)
    for axes, factor in zip(plan.factors, factors, strict=True):
        factor = _arranged(factor, dict(axes), plan.rows, plan.sizes, fill=False)
        out = (out.astype(jnp.float32) * factor[..., None]).astype(out.dtype)
    return _result(plan, out).astype(plan.result_dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def _with_weights(plan: Plan, query, key, value, bias, late, kept, scale):
    """As the program that is replaced has it, with all weights in memory."""
    query, key, value = _in_form(plan, (query, key, value))
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32) * scale
    if plan.soft_cap is not None:
        logits = plan.soft_cap * jnp.tanh(logits / plan.soft_cap)
    logits = logits if bias is None else logits + bias
    number, is_added = plan.late_mask
    masked = logits + jnp.float32(number) if is_added else number
    weights = jax.nn.softmax(jnp.where(kept, logits, masked) + late)
    out = jnp.einsum("bnts,bsnv->btnv", weights, value.astype(jnp.float32))
    return out.astype(plan.dtype)


def _kernel(plan: Plan, operands, bias, mask, lengths, scale, compute_dtype, order):
    window = plan.window
    is_causal = (
        window is not None and window[1] == 0 and window[0] >= plan.labels.size(plan.labels.length)
    )
    if plan.packed_axis is None:
        arrays, packed_axis = _in_form(plan, operands), 0
    else:
        (qkv,) = operands
        batch, length, heads = map(plan.labels.size, plan.rows)
        lanes = (3, heads) if plan.packed_axis == -3 else (heads, 3)
        qkv = qkv.astype(plan.dtype).reshape(batch, length, *lanes, -1)
        arrays, packed_axis = (qkv, None, None), plan.packed_axis + qkv.ndim
    return call.attend(
        *arrays,
        bias,
        mask,
        None,
        lengths,
        None,
        None,
        scale if plan.is_scale_traced else None,
        packed_axis=packed_axis,
        scale=None if plan.is_scale_traced else scale,
        soft_cap=plan.soft_cap,
        is_causal=is_causal,
        window=None if is_causal else window,
        compute_dtype=compute_dtype,
        order=attention_order(order, compute_dtype),
        masking=plan.masking,
    )


def _in_form(plan: Plan, operands):
    """Query, key and value as the kernel takes them."""
    sizes = plan.sizes
    key_sizes = dict(sizes)
    if plan.repeats is not None:
        label, n = plan.repeats
        key_sizes[label] //= n
    keys = plan.labels.batch, (plan.labels.keys,), plan.labels.heads
    return (
        _operand(x, dict(axes), parts, own).astype(plan.dtype)
        for x, axes, parts, own in zip(
            operands,
            plan.operands,
            (plan.rows, keys, keys),
            (sizes, key_sizes, key_sizes),
            strict=True,
        )
    )


def _operand(x, axes: dict, parts, sizes: dict):
    """Query, key or value as (batch, length, heads, size)."""
    last = x.shape[axes[SIZE]] if SIZE in axes else 1
    return _arranged(x, axes, [*parts, (SIZE,)], {**sizes, SIZE: last})


def _beside_logits(plan: Plan, x, axes: _Axes):
    """A mask or bias with the axes (batch, heads, queries, keys), or 1 in their place."""
    batch, length, heads = plan.rows
    parts = (batch, heads, length, (plan.labels.keys,))
    return _arranged(x, dict(axes), parts, plan.sizes, fill=False)


def _masks(plan: Plan, arrays) -> list:
    """The masks, True where a key takes part."""
    kept = []
    for (axes, is_negated), x in zip(plan.masks, arrays, strict=True):
        x = _beside_logits(plan, x.astype(bool), axes)
        kept.append(~x if is_negated else x)
    return kept


def _biases(plan: Plan, described, arrays) -> list:
    terms = []
    for (axes, factor), x in zip(described, arrays, strict=True):
        x = _beside_logits(plan, x, axes)
        terms.append(x if factor == 1 else x.astype(jnp.float32) * factor)
    return terms


def _sum(terms):
    if len(terms) < 2:
        return terms[0] if terms else None
    return functools.reduce(operator.add, (x.astype(jnp.float32) for x in terms))


def _bias_of_masks(kept, numbers):
    """What masks by selections and sums, in order, add to a logit that is small beside them."""
    bias = jnp.float32(0)
    for mask, (number, is_added) in zip(kept, numbers, strict=True):
        if is_added:
            bias = bias + jnp.where(mask, jnp.float32(0), jnp.float32(number))
        else:
            bias = jnp.where(mask, bias, jnp.float32(number))
    return bias


def _lengths(plan: Plan, arrays):
    """How many keys there are, as an array by batch, or None."""
    lengths, size = [], plan.sizes[plan.labels.keys]
    for (axes, offset), x in zip(plan.lengths, arrays, strict=True):
        if axes is None:
            x, axes, offset = jnp.int32(offset), (), 0
        x = (jnp.clip(x, -offset, size - offset) + offset).astype(jnp.int32)
        lengths.append(_arranged(x, dict(axes), [plan.labels.batch], plan.sizes))
    return functools.reduce(jnp.minimum, lengths) if lengths else None


def _kept(plan: Plan, mask, lengths):
    """The keys that each query keeps, as a boolean array that broadcasts to the logits'."""
    left, right = (NO_LIMIT, NO_LIMIT) if plan.window is None else plan.window
    kept = kept_keys(
        jnp.arange(plan.labels.size(plan.labels.length)),
        plan.sizes[plan.labels.keys],
        mask,
        None,
        lengths,
        is_causal=False,
        window_left=left,
        window_right=right,
    )
    return jnp.ones((1, 1, 1, 1), bool) if kept is None else kept


def _result(plan: Plan, out):
    """The kernel's result, (batch, length, heads, size), with the axes of the original's."""
    order = [*(label for part in plan.rows for label in part), SIZE]
    sizes = {**plan.sizes, SIZE: out.shape[-1]}
    out = out.reshape([sizes[label] for label in order])
    wanted = [label for part in plan.result for label in part]
    missing = [label for label in order if label not in wanted]  # of size 1
    out = out.transpose([order.index(label) for label in (*missing, *wanted)])
    return out.reshape(plan.shape)


def _arranged(x, axes: dict, parts: Sequence[Sequence], sizes: dict, *, fill: bool = True):
    """x with one axis for each part, which is labels in order; absent labels are broadcast.

    A part none of whose labels x has is an axis of size 1, unless `fill`.
    """
    order = [label for part in parts for label in part]
    shape, axes = apart(x.shape, axes, sizes)
    x = x.reshape(shape)
    present = [label for label in order if label in axes]
    rest = [a for a in range(x.ndim) if a not in axes.values()]
    x = x.transpose([*rest, *(axes[label] for label in present)])
    x = x.reshape([sizes[label] if label in axes else 1 for label in order])
    full, merged = [], []
    for part in parts:
        whole = fill or any(label in axes for label in part)
        extents = [sizes[label] if whole else 1 for label in part]
        full += extents
        merged.append(math.prod(extents))
    return jnp.broadcast_to(x, full).reshape(merged)
