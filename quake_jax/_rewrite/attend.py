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

import jax.numpy as jnp
import numpy as np

from quake_jax import attention as public
from quake_jax._rewrite.labels import SIZE, Labels

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
      numbers: if the masks are to be one bias: what each puts in a logit's place, or adds to it.
      constant: what is constant where a mask that is no sum masks, as in `quake_jax.attention`.
      biases: the axes of each, and its factor.
      factors: the axes of arrays that multiply the result.
      scale, is_scale_traced, soft_cap: of the logits.
      window: (left, right) as in `quake_jax.dot_product_attention`, or None.
      nan_rows: whether queries without any key get NaN.
      dtype: that the kernel computes in.
      result, shape, result_dtype: the labels of the result's axes, its shape and dtype.
    """

    labels: Labels
    operands: tuple[_Axes, ...]
    packed_axis: int | None
    repeats: tuple[int, int] | None
    masks: tuple[tuple[_Axes, bool], ...]
    numbers: tuple[tuple[float, bool], ...]
    constant: str
    biases: tuple[tuple[_Axes, float], ...]
    factors: tuple[_Axes, ...]
    scale: float
    is_scale_traced: bool
    soft_cap: float | None
    window: tuple[int, int] | None
    nan_rows: bool
    dtype: np.dtype
    result: tuple[int | str | None, ...]
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


def attend(*arrays, plan: Plan, order):
    """The attention of the plan: operands, masks, biases, factors, and the scale if traced."""
    remaining = iter(arrays)

    def take(described: Sequence) -> list:
        return [next(remaining) for _ in described]

    operands = take(plan.operands if plan.packed_axis is None else (None,))
    kept = _masks(plan, take(plan.masks))
    terms = _biases(plan, take(plan.biases))
    factors = take(plan.factors)
    scale = plan.scale
    if plan.is_scale_traced:
        scale = next(remaining).astype(jnp.float32) * scale
    if plan.numbers:
        terms.append(_bias_of_masks(kept, plan.numbers))
        kept = [m for m, (_, is_added) in zip(kept, plan.numbers, strict=True) if not is_added]
    mask = functools.reduce(operator.and_, kept) if kept else None
    bias = _sum(terms)
    out = _kernel(plan, operands, bias, mask, scale, order)
    if plan.nan_rows:
        is_kept = _kept(plan, mask).any(-1)  # (batch, heads, length)
        out = jnp.where(is_kept.swapaxes(1, 2)[..., None], out, jnp.nan)
    for axes, factor in zip(plan.factors, factors, strict=True):
        factor = _arranged(factor, dict(axes), plan.rows, plan.sizes, fill=False)
        out = (out.astype(jnp.float32) * factor[..., None]).astype(out.dtype)
    return _result(plan, out).astype(plan.result_dtype)


def _kernel(plan: Plan, operands, bias, mask, scale, order):
    is_causal, window = False, plan.window
    if window is not None and window[1] == 0:
        is_causal = window[0] >= plan.labels.size(plan.labels.length)
    static, traced_scale = public.static_arguments(
        "dot_product_attention",
        scale,
        is_causal,
        None if is_causal else window,
        None,
        False,
        plan.soft_cap,
        order,
    )
    packed_axis = 0 if plan.packed_axis is None else plan.packed_axis + 5
    return public.attend_call(
        *_query_key_value(plan, operands),
        bias,
        mask,
        None,
        None,
        traced_scale,
        packed_axis=packed_axis,
        constant=plan.constant,
        is_masked_by_bias=bool(plan.numbers),
        **static,
    )


def _query_key_value(plan: Plan, operands):
    """Query, key and value as the kernel reads them; the array that is all three, and two Nones."""
    if plan.packed_axis is not None:
        (qkv,) = operands
        batch, length, heads = map(plan.labels.size, plan.rows)
        lanes = (3, heads) if plan.packed_axis == -3 else (heads, 3)
        return qkv.astype(plan.dtype).reshape(batch, length, *lanes, -1), None, None
    sizes = plan.sizes
    key_sizes = dict(sizes)
    if plan.repeats is not None:
        label, n = plan.repeats
        key_sizes[label] //= n
    keys = plan.labels.batch, (plan.labels.keys,), plan.labels.heads
    return tuple(
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


def _biases(plan: Plan, arrays) -> list:
    terms = []
    for (axes, factor), x in zip(plan.biases, arrays, strict=True):
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


def _kept(plan: Plan, mask):
    """The keys that each query keeps, as a boolean array that broadcasts to the logits'."""
    queries, keys = plan.labels.size(plan.labels.length), plan.sizes[plan.labels.keys]
    kept = jnp.ones((1, 1, queries, keys), bool) if mask is None else mask
    if plan.window is not None:
        left, right = plan.window
        distance = jnp.arange(keys)[None, :] - jnp.arange(queries)[:, None]
        kept = kept & (distance >= -left) & (distance <= right)
    return kept


def _result(plan: Plan, out):
    """The kernel's result, (batch, length, heads, size), with the axes of the original's."""
    order = [*(label for part in plan.rows for label in part), SIZE]
    sizes = {**plan.sizes, SIZE: out.shape[-1]}
    out = out.reshape([sizes[label] for label in order])
    wanted = [label for label in plan.result if label is not None]
    missing = [label for label in order if label not in wanted]  # of size 1
    out = out.transpose([order.index(label) for label in (*missing, *wanted)])
    return out.reshape(plan.shape)


def _arranged(x, axes: dict, parts: Sequence[Sequence], sizes: dict, *, fill: bool = True):
    """x with one axis for each part, which is labels in order; absent labels are broadcast.

    A part none of whose labels x has is an axis of size 1, unless `fill`.
    """
    order = [label for part in parts for label in part]
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
