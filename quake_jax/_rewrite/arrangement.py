"""From the axes by label of an attention that was found to a call of the kernel.

This decides which labels are batch, heads, groups and length, and plans the call.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from quake_jax._attention.masks import Constant, Masking
from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._rewrite import masks, packing, views
from quake_jax._rewrite.attend import Plan, attend
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.labels import SIZE, Labels
from quake_jax._rewrite.match import Match, Reject

# Fewer weights than that cost less than the call (docs/results/small_arrays.md).
SMALLEST = 16
LARGEST_HEAD = 512


def match(root: Node, nodes, operands, logits, weights, keys: int, shape) -> Match:
    """The match of an attention whose parts have been found.

    Args:
      root: the product with the values.
      nodes: what is replaced.
      operands: query, key, value, and the labels of each axis of the result.
      logits: what makes the logits of query and key.
      weights: what they are multiplied and masked by, after the softmax.
      keys: the label of the keys' axis.
      shape: of the logits, by label.

    Raises:
      Reject: if the kernel cannot take them.
    """
    query, key, value, result = operands
    if not all(isinstance(n, int) for x in (query, key, value) for n in x.value.shape):
        raise Reject("its sizes are symbolic", "attention")
    if math.prod(shape) < SMALLEST:
        raise Reject(f"too small ({math.prod(shape)} weights)", "attention")
    for x in (query, value):
        if SIZE in x.axes and x.value.shape[x.axes[SIZE]] > LARGEST_HEAD:
            raise Reject(f"heads of more than {LARGEST_HEAD} elements", "attention")
    masks.check_masked_numbers(logits.masks)
    dtype = _kernel_dtype((query, key, value), root.output)
    repeats = _without_repeats(key, value)
    arrays = _sources(query, key, value)
    labels = _classified(*arrays, logits, keys, shape, repeats)
    sizes = dict(labels.sizes)
    conditions, lengths, window, is_full = masks.conditions(logits.masks, labels)
    _check_sums(logits, labels)
    keyless = masks.number_without_keys(logits.masks, weights.masks, is_full, sizes)
    if weights.masks and logits.late_biases:
        raise Reject("its weights are masked and a bias is added after its mask", "attention")
    # Which tells apart what else such queries get.
    as_bias = keyless != 0 and not (is_full or masks.is_one_selection(logits.masks))
    if as_bias:
        masks.check_as_bias(logits.masks)
        window, lengths = None, []
        conditions = [masks.viewed(m.value, m.axes, m.is_negated, sizes) for m in logits.masks]
    together = None if repeats or logits.late_biases else packing.packed(query, key, value, labels)
    numbers = tuple((mask.number, mask.is_added) for mask in logits.masks)
    plan = Plan(
        labels=labels,
        operands=tuple(tuple(x.axes.items()) for x in arrays),
        packed_axis=None if together is None else together[1],
        repeats=repeats,
        masks=tuple((tuple(axes.items()), negated) for _, axes, negated in conditions),
        lengths=tuple(
            (None if x.value is None else tuple(x.axes.items()), x.offset) for x in lengths
        ),
        numbers=numbers if as_bias else (),
        masking=Masking(Constant.WHOLE if is_full or keyless == 0 else _constant(logits), as_bias),
        biases=tuple((tuple(b.axes.items()), b.factor) for b in logits.biases),
        late_biases=tuple((tuple(b.axes.items()), b.factor) for b in logits.late_biases),
        late_mask=numbers[0] if logits.late_biases else None,
        factors=tuple(tuple(axes.items()) for _, axes in weights.factors),
        scale=logits.scale,
        is_scale_traced=logits.traced_scale is not None,
        soft_cap=logits.soft_cap,
        window=window,
        keyless=None if as_bias else keyless,
        dtype=dtype,
        result=tuple(result),
        shape=tuple(root.output.shape),
        result_dtype=np.dtype(root.output.dtype),
    )
    inputs = [
        *((x.value for x in arrays) if together is None else together[:1]),
        *(mask for mask, _, _ in conditions),
        *(x.value for x in lengths if x.value is not None),
        *(bias.value for bias in logits.all_biases),
        *(factor for factor, _ in weights.factors),
        *((logits.traced_scale,) if plan.is_scale_traced else ()),
    ]
    name = "dot_product_attention" if together is None else "packed_dot_product_attention"
    return Match(
        "attention",
        f"quake_jax.{name}",
        root,
        frozenset(nodes),
        tuple(inputs),
        attend,
        (("plan", plan),),
    )


def operands(match: Match) -> tuple[Value, ...]:
    """Query, key and value, or the one array that they are, of an attention."""
    plan = dict(match.static)["plan"]
    return match.inputs[: len(plan.operands) if plan.packed_axis is None else 1]


def in_bfloat16(match: Match) -> Match | None:
    """An attention in float32 with operands and a result in bfloat16; None if there is none."""
    plan = dict(match.static)["plan"]
    is_plain = not plan.late_biases and not plan.factors and plan.keyless is None
    # A scale that is traced multiplies the query before it is rounded.
    if (
        not is_plain
        or plan.is_scale_traced
        or {plan.dtype, plan.result_dtype} != {np.dtype(np.float32)}
    ):
        return None
    dtype = np.dtype(jnp.bfloat16)
    plan = dataclasses.replace(plan, dtype=dtype, result_dtype=dtype)
    replacement = f"{match.replacement} → bfloat16"
    return dataclasses.replace(match, replacement=replacement, static=(("plan", plan),))


def _check_sums(logits, labels: Labels) -> None:
    """Raise Reject if a query may see no key whose logits a sum in 16 bits has rounded."""
    coarse = [bias for bias in logits.all_biases if bias.rounds_by]
    if not coarse:
        return
    known = [bias.mask for bias in coarse if bias.mask is not None]
    *_, is_full = masks.conditions([*logits.masks, *known], labels)
    if len(known) < len(coarse) or not is_full:
        size, dtype = coarse[0].rounds_by, coarse[0].value.dtype
        raise Reject(f"a query may see no key: {dtype} rounds its logits by {size:g}", "attention")


def _constant(logits) -> Constant:
    """What is constant where a mask that is no sum masks."""
    selections = {i for i, mask in enumerate(logits.masks) if not mask.is_added}
    # The selections that a bias does not pass because it is added behind them.
    behind = {frozenset(i for i in selections if i < b.masks_before) for b in logits.biases}
    if not selections:
        return Constant.NOTHING
    if not behind or behind == {frozenset()}:
        return Constant.WHOLE
    if behind == {frozenset(selections)}:
        return Constant.PRODUCT
    raise Reject("a bias is added between its masks", "attention")


def _sources(query, key, value):
    """The operands before equations that only arrange them, or repeat key and value."""
    q, k, v = map(_source, (query, key, value))
    # A query that is repeated, or one of key and value alone, is taken as it is.
    if len(q.axes) != len(query.axes):
        q = query
    lost = [set(old.axes) - set(new.axes) for old, new in ((key, k), (value, v))]
    return (q, k, v) if lost[0] == lost[1] and SIZE not in lost[0] else (q, key, value)


def _source(x):
    view = views.view(x.value)
    axes = {label: view.axes[a] for label, a in x.axes.items() if view.axes[a] is not None}
    return type(x)(view.source, axes)


def _without_repeats(key, value) -> tuple[int, int] | None:
    """(label, repeats) if heads of key and value are repeated; they are then without."""
    found = [_repeated(x) for x in (key, value)]
    if None in found or len({(label, n) for label, n, _, _ in found}) != 1:
        return None
    for x, (_, _, source, axes) in zip((key, value), found, strict=True):
        x.value, x.axes = source, axes
    return found[0][:2]


def _repeated(x):
    """(label, n, source, axes) if an axis of x is that of a source with each element n times."""
    view = views.view(x.value)
    node = view.source.node
    if node is None or node.primitive != "reshape" or node.params.get("dimensions"):
        return None
    wide = node.inputs[0]
    old, new = wide.shape, node.output.shape
    # Axes m and m + 1 of `wide` become one.
    m = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    if (
        m is None
        or len(old) != len(new) + 1
        or old[:m] + (old[m] * old[m + 1],) + old[m + 2 :] != new
    ):
        return None
    inner = views.view(wide)
    if inner.axes[m + 1] is not None or old[m + 1] == 1:
        return None
    axes, label = {}, None
    for name, a in x.axes.items():
        b = view.axes[a]
        if b is None:
            continue
        if b == m:
            if label is not None:
                return None
            label = name
        c = inner.axes[b if b <= m else b + 1]
        if c is None and b != m:
            return None
        if c is not None:
            axes[name] = c
    return None if label is None else (label, old[m + 1], inner.source, axes)


def _classified(query, key, value, logits, keys: int, shape, repeats) -> Labels:
    def refuse(reason):
        raise Reject(reason, "attention")

    sizes = {i: n for i, n in enumerate(shape)}
    repeated = None if repeats is None else repeats[0]
    in_query, in_key, in_value = (set(x.axes) - {SIZE, keys} for x in (query, key, value))
    if repeated is not None:
        in_key, in_value = in_key | {repeated}, in_value | {repeated}
    if in_key != in_value:
        refuse("its keys and values do not have the same batch and heads")
    if {i for i, n in sizes.items() if n != 1} - {keys} != in_query | in_key:
        refuse("its weights have an axis that neither queries nor keys have")
    if any(keys not in x.axes for x in (key, value)):
        refuse("its keys or values are repeated")
    shared, alone = list(in_key), list(in_query - in_key)
    patterns = [masks.viewed(m.value, m.axes, m.is_negated, sizes)[1] for m in logits.masks]
    patterns += [bias.axes for bias in logits.all_biases]
    # Masks that tell queries apart do so by position.
    alone.sort(key=lambda i: (sum(i in axes for axes in patterns), sizes[i]))
    length = alone[-1:]
    groups = sorted(alone[:-1])
    # In the order of memory, so that nothing is transposed without need.
    place = packing.places_in_memory(query)
    order = sorted(shared, key=lambda i: (place.get(i, -1), i))
    if length:
        batch = [i for i in order if place.get(i, -1) < place[length[0]]]
    else:
        batch = order[:-1]
    partly = any(
        set(length) & set(axes) and 0 < len(set(batch) & set(axes)) < len(batch)
        for axes in patterns
    )
    if partly:
        batch = batch[:-1]  # else masks would be copied for each head
    if repeated is not None:
        if groups:
            refuse("its keys and values are repeated in two ways")
        # The repeated heads have to be the kernel's.
        batch = [i for i in order if i != repeated]
    heads = [i for i in order if i not in batch]
    return Labels(
        tuple(batch), tuple(length), tuple(heads), tuple(groups), keys, tuple(sizes.items())
    )


def _kernel_dtype(operands, result: Value) -> np.dtype:
    """The dtype that the kernel computes in."""
    dtypes = {np.dtype(x.value.dtype) for x in operands}
    for dtype in (*dtypes, np.dtype(result.dtype)):
        if dtype not in KERNEL_DTYPES:
            raise Reject(f"dtype {dtype}", "attention")
    return dtypes.pop() if dtypes == {np.dtype(result.dtype)} else np.dtype(np.float32)
