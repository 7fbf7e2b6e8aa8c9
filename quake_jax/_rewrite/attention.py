"""Attention as programs write it: softmax(scores of queries and keys) times values.

The axes of the scores get labels, their positions. Following the labels through both matrix
products says which axes of query, key and value are batch, heads, length and size, whatever their
order; `arrangement` then brings the arrays into the form of `quake_jax.dot_product_attention`.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from quake_jax._rewrite import arrangement, softmax, views
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.labels import SIZE, Axes
from quake_jax._rewrite.masks import MASKED, MASKED_BY_SUM, Mask
from quake_jax._rewrite.match import Match, Reject, check_unused


@dataclasses.dataclass
class Bias:
    """logits + factor · value"""

    value: Value
    axes: Axes  # of `value`
    factor: float
    masks_before: int  # how many masks are applied before it is added
    # If it has numbers beside which a sum in 16 bits rounds logits: their size, and the mask that
    # it is but for that, if it is one.
    rounds_by: float = 0.0
    mask: Mask | None = None


@dataclasses.dataclass
class Logits:
    """What stands between the product of query and key and the softmax."""

    product: Node  # query times key
    axes: Axes  # of its result
    nodes: set[Node] = dataclasses.field(default_factory=set)
    masks: list[Mask] = dataclasses.field(default_factory=list)  # in the order of application
    biases: list[Bias] = dataclasses.field(default_factory=list)
    scale: float = 1.0
    traced_scale: Value | None = None
    soft_cap: float | None = None


@dataclasses.dataclass
class Weights:
    """What stands between the softmax and the product with the values.

    Attributes:
      normalized: the match of the softmax.
      axes: of the product's operand, as axes of the softmax.
      nodes: between the two.
      factors: arrays that the weights are multiplied by and that do not depend on the key, each
        with its axes by axis of the softmax. They can multiply the result instead.
    """

    normalized: Match
    axes: tuple[int | None, ...]
    nodes: set[Node]
    factors: list[tuple[Value, Axes]]


def find(root: Node) -> Match | None:
    """The attention whose last equation is `root`, the product with the values.

    Raises:
      Reject: if there is one that must stay.
    """
    if root.primitive != "dot_general" or not root.params["dimension_numbers"][0][0]:
        return None
    for side in (0, 1):
        weights = _weights(root.inputs[side])
        match = None if weights is None else _attention(root, side, weights)
        if match is not None:
            return match
    return None


def _attention(root: Node, side: int, weights: Weights) -> Match | None:
    (logits_value,) = weights.normalized.inputs
    reduced = dict(weights.normalized.static)["axis"]
    if len(reduced) != 1:
        return None
    keys = reduced[0]
    logits = _logits(logits_value, _labels(logits_value))
    scale = dict(weights.normalized.static)["scale"]
    if logits is None or not (scale == 1 or _times(logits, scale, logits_value.dtype)):
        return None
    operands = _operands(root, side, weights, logits, keys)
    nodes = logits.nodes | {logits.product} | weights.normalized.nodes | weights.nodes
    _check_alone(nodes | {root}, root)
    query, key, value, result = operands
    for array in (query, key):
        _fold_scale(array, logits, nodes)
    return arrangement.match(
        root,
        nodes | {root},
        (query, key, value, result),
        logits,
        weights.factors,
        keys,
        logits_value.shape,
    )


def _weights(value: Value, depth: int = 4) -> Weights | None:
    """The softmax that `value` is, but for its arrangement and factors; or None."""
    view = views.view(value, views.is_cast)
    node = view.source.node
    if node is None or depth == 0:
        return None
    if node.primitive in ("div", "mul"):
        try:
            found = softmax.find(node)
        except Reject as reason:
            raise Reject(str(reason), "attention") from None
        if found is not None:
            if found.name != "softmax" or len(found.inputs) != 1:
                return None
            return Weights(found, view.axes, set(view.nodes), [])
    for inner, mapping, factor, factor_axes in _products(node):
        weights = _weights(inner, depth - 1)
        if weights is None:
            continue
        own = {}
        for a, f in factor_axes.items():
            label = weights.axes[a]
            if label is None and factor.shape[f] != 1:
                return None
            if label is not None:
                own[label] = f
        keys = dict(weights.normalized.static)["axis"]
        if any(label in own for label in keys):
            return None
        if views.uniform(factor) != 1:
            weights.factors.append((factor, own))
        weights.axes = views.compose(views.compose(view.axes, mapping), weights.axes)
        weights.nodes |= {node, *view.nodes}
        return weights
    return None


def _products(node: Node):
    """The ways to read a node as an array times a factor with some of its axes.

    Each is the array, which axis of it each axis of the result is, the factor, and which axis of
    the factor belongs to which of the array.
    """
    shape = node.output.shape
    if node.primitive == "mul":
        for inner, factor in (node.inputs, node.inputs[::-1]):
            if inner.shape == shape and views.is_float(factor):
                view = views.view(factor)
                axes = {a: f for a, f in enumerate(view.axes) if f is not None}
                yield inner, tuple(range(len(shape))), view.source, axes
    if node.primitive == "dot_general":
        contracted, batch, free = _sides(node)
        if contracted[0]:
            return
        for side in (0, 1):
            if not free[1 - side]:  # jnp.einsum("bhts,h->bhts", …)
                mapping = (*batch[side], *free[side])
                axes = dict(zip(batch[side], batch[1 - side], strict=True))
                yield node.inputs[side], mapping, node.inputs[1 - side], axes


def _check_alone(nodes: set[Node], root: Node) -> None:
    try:
        check_unused(nodes, root)
    except Reject as reason:
        raise Reject(str(reason), "attention") from None


def _labels(value: Value) -> Axes:
    return {i: i for i, n in enumerate(value.shape) if n != 1}


def _through(axes: Axes, mapping) -> Axes:
    """The axes by label of a value's source, from those of the value."""
    return {label: mapping[a] for label, a in axes.items() if mapping[a] is not None}


# From the softmax back to the first product.


def _logits(value: Value, axes: Axes, depth: int = 24) -> Logits | None:
    """What makes the logits `value`; None if they are not made from a matrix product."""
    view = views.view(value, views.is_cast)
    inner_axes = _through(axes, view.axes)
    node = view.source.node
    if node is None or depth == 0 or len(node.outputs) != 1:
        return None
    if node.primitive == "dot_general":
        return Logits(node, inner_axes, set(view.nodes))
    step = _STEPS.get(node.primitive)
    found = None if step is None else step(node, inner_axes, depth - 1)
    if found is None:
        return None
    found.nodes |= {node, *view.nodes}
    for cast in filter(views.is_cast, reversed(view.nodes)):
        for mask in found.masks:
            mask.becomes(mask.number, cast.output.dtype)
    return found


def _mask_step(node: Node, axes: Axes, depth: int) -> Logits | None:
    if len(node.inputs) != 3:
        return None
    which, if_false, if_true = node.inputs
    if which.shape != node.output.shape or str(which.dtype) != "bool":
        return None
    for number, inner, is_negated in ((if_false, if_true, False), (if_true, if_false, True)):
        c = views.uniform(number)
        if c is None:
            continue
        found = _logits(inner, axes, depth)
        if found is None:
            continue
        is_float16 = str(number.dtype) == "float16"
        found.masks.append(Mask(which, axes, is_negated, c, is_float16=is_float16))
        return found
    return None


def _add_step(node: Node, axes: Axes, depth: int) -> Logits | None:
    sign = -1.0 if node.primitive == "sub" else 1.0
    pairs = [tuple(node.inputs)]
    if sign == 1.0:
        pairs.append(tuple(node.inputs[::-1]))
    for inner, bias in pairs:
        if inner.shape != node.output.shape or not views.is_float(bias):
            continue
        found = _logits(inner, axes, depth)
        if found is None:
            continue
        if any(mask.number > MASKED_BY_SUM for mask in found.masks):
            return None  # the bias would show in rows without any key
        mask = _mask_of_bias(bias, axes) if sign == 1.0 else None
        # In float16 the sum rounds a logit that is added to -65504.
        if mask and mask.number <= MASKED_BY_SUM and str(bias.dtype) != "float16":
            found.masks.append(mask)
        else:
            view = views.view(bias)
            own = {label: a for label, a in axes.items() if _extent(bias, a) != 1}
            added = Bias(view.source, _through(own, view.axes), sign, len(found.masks))
            added.rounds_by, added.mask = _rounding(bias), mask
            found.biases.append(added)
        return found
    return None


def _extent(value: Value, axis: int) -> int:
    return 1 if value.ndim == 0 else value.shape[axis]


def _mask_of_bias(bias: Value, axes: Axes) -> Mask | None:
    """The mask that a bias of 0 and huge negative numbers is."""
    view = views.view(bias, views.is_cast)
    node = view.source.node
    if node is None or node.primitive != "select_n" or len(node.inputs) != 3:
        return None
    which, if_false, if_true = node.inputs
    numbers = views.uniform(if_false), views.uniform(if_true)
    if which.shape != view.source.shape or None in numbers or 0 not in numbers:
        return None
    inner = {
        label: view.axes[a] for label, a in axes.items() if bias.ndim and view.axes[a] is not None
    }
    mask = Mask(which, inner, numbers[1] != 0, min(numbers), is_added=True)
    for cast in filter(views.is_cast, reversed(view.nodes)):
        mask.becomes(mask.number, cast.output.dtype)
    return mask


def _rounding(bias: Value) -> float:
    """The size of numbers in a bias beside which its dtype rounds logits, if float32 does not."""
    size = _largest(bias)
    coarse = bias.dtype.itemsize < 4 and size * float(jnp.finfo(bias.dtype).eps) > 1 / 8
    return size if coarse and size < -MASKED else 0.0


def _largest(value: Value, depth: int = 6) -> float:
    """The largest absolute number that equations are seen to put into a bias."""
    source = views.view(value, views.is_cast).source
    number = views.uniform(source)
    if number is not None:
        return abs(number)
    if source.primitive not in ("select_n", "add", "sub", "mul", "neg") or depth == 0:
        return 0.0
    return max(_largest(v, depth - 1) for v in source.node.inputs)


def _scale_step(node: Node, axes: Axes, depth: int) -> Logits | None:
    pairs = [tuple(node.inputs)]
    if node.primitive == "mul":
        pairs.append(tuple(node.inputs[::-1]))
    for inner, factor in pairs:
        if inner.shape != node.output.shape:
            continue
        c = views.uniform(factor)
        if c is not None:
            if node.primitive == "div":
                c = 1 / c if c else math.inf
            return _scaled(inner, axes, c, depth)
        scalar = views.view(factor, views.is_cast)
        # One number that the program computes.
        if scalar.source.ndim == 0 and node.primitive == "mul" and inner is not factor:
            found = _logits(inner, axes, depth)
            plain = found is not None and not (
                found.masks or found.biases or found.soft_cap or found.traced_scale
            )
            if plain:
                found.traced_scale = scalar.source
                return found
    return None


def _scaled(inner: Value, axes: Axes, c: float, depth: int) -> Logits | None:
    if not math.isfinite(c) or c == 0:
        return None
    view = views.view(inner, views.is_cast)
    if view.source.primitive == "tanh" and c > 0:  # c·tanh(x)
        node = view.source.node
        found = _logits(node.inputs[0], _through(axes, view.axes), depth)
        if found is None or found.masks or found.biases or found.soft_cap is not None:
            return None
        if found.traced_scale is not None:
            return None
        found.nodes |= {node, *view.nodes}
        found.scale *= c
        found.soft_cap = c
        return found
    found = _logits(inner, axes, depth)
    return found if found is not None and _times(found, c, inner.dtype) else None


def _times(logits: Logits, c: float, dtype) -> bool:
    """Multiply logits of a dtype by a number; False if there is no such form of them."""
    if logits.soft_cap is not None or (c < 0 and logits.masks):
        return False
    logits.scale *= c
    for bias in logits.biases:
        bias.factor *= c
    for mask in logits.masks:
        mask.becomes(mask.number * c, dtype)
    return True


_STEPS = {
    "select_n": _mask_step,
    "add": _add_step,
    "sub": _add_step,
    "mul": _scale_step,
    "div": _scale_step,
}


# The matrix products.


@dataclasses.dataclass
class Operand:
    """An array that the kernel reads: which axis is which, by label."""

    value: Value
    axes: Axes


def _sides(node: Node):
    """For both operands of a dot_general, the label of each axis of the result, and its own."""
    (contracted, batch) = node.params["dimension_numbers"]
    free = [
        [d for d in range(node.inputs[i].ndim) if d not in contracted[i] and d not in batch[i]]
        for i in (0, 1)
    ]
    return [[int(d) for d in c] for c in contracted], [[int(d) for d in b] for b in batch], free


def _check_precision(node: Node) -> None:
    precision = node.params.get("precision")
    algorithm = str(precision)
    # What computes in less than the operands' precision is a choice that is not ours to undo.
    if precision is not None and "BF16_BF16_F32" not in algorithm and "DEFAULT" not in algorithm:
        if "HIGH" not in algorithm:
            raise Reject(f"precision {algorithm}", "attention")


def _operands(root: Node, side: int, weights: Weights, logits: Logits, keys: int):
    """Query, key, value, and the label of each axis of the result."""
    for node in (root, logits.product):
        _check_precision(node)
    query, key = _query_and_key(logits, keys)
    contracted, batch, free = _sides(root)
    value_side = 1 - side
    value = root.inputs[value_side]
    summed = [a for a in contracted[side] if root.inputs[side].shape[a] != 1]
    if [weights.axes[a] for a in summed] != [keys]:
        raise Reject("its softmax is over another axis than the values' product", "attention")
    axes: Axes = {keys: contracted[value_side][contracted[side].index(summed[0])]}
    result: list = []
    for p, v in zip(batch[side], batch[value_side], strict=True):
        label = weights.axes[p]
        result.append(label)
        if label is not None:
            axes[label] = v
    sizes = [a for a in free[value_side] if value.shape[a] != 1]
    if len(sizes) > 1:
        raise Reject("its values have more than one axis of their own", "attention")
    if sizes:
        axes[SIZE] = sizes[0]
    rows = [weights.axes[a] for a in free[side]]
    columns = [SIZE if a in sizes else None for a in free[value_side]]
    result += rows + columns if side == 0 else columns + rows
    return query, key, Operand(value, axes), result


def _query_and_key(logits: Logits, keys: int) -> tuple[Operand, Operand]:
    node = logits.product
    contracted, batch, free = _sides(node)
    places = [("batch", i) for i in range(len(batch[0]))]
    places += [(side, d) for side in (0, 1) for d in free[side]]
    if keys not in logits.axes:
        raise Reject("its softmax is over an axis of size 1", "attention")
    key_side, key_axis = places[logits.axes[keys]]
    if key_side == "batch":
        raise Reject("its softmax is over an axis that query and key share", "attention")
    query_side = 1 - key_side
    axes: tuple[Axes, Axes] = ({}, {})
    for label, a in logits.axes.items():
        place, d = places[a]
        if place == "batch":
            axes[0][label], axes[1][label] = batch[query_side][d], batch[key_side][d]
        elif place == query_side:
            axes[0][label] = d
        elif label != keys:
            axes[1][label] = d
    axes[1][keys] = key_axis
    pairs = list(zip(contracted[query_side], contracted[key_side], strict=True))
    pairs = [(q, k) for q, k in pairs if node.inputs[query_side].shape[q] != 1]
    if len(pairs) != 1:
        raise Reject("its queries and keys have more or less than one axis in common", "attention")
    axes[0][SIZE], axes[1][SIZE] = pairs[0]
    return (
        Operand(node.inputs[query_side], axes[0]),
        Operand(node.inputs[key_side], axes[1]),
    )


def _fold_scale(array: Operand, logits: Logits, nodes: set[Node]) -> None:
    """Take a constant factor of query or key into the scale, if nothing else uses the product."""
    view = views.view(array.value)
    node = view.source.node
    if node is None or node.primitive not in ("mul", "div"):
        return
    pairs = [tuple(node.inputs)]
    if node.primitive == "mul":
        pairs.append(tuple(node.inputs[::-1]))
    for inner, factor in pairs:
        c = views.uniform(factor)
        if c is None or inner.shape != node.output.shape or views.uniform(inner) is not None:
            continue
        c = c if node.primitive == "mul" else (1 / c if c else math.inf)
        if not math.isfinite(c) or c <= 0:
            return
        more = {node, *view.nodes}
        if any(v.is_output or not set(v.uses) <= nodes | more for n in more for v in n.outputs):
            return
        axes = _through(array.axes, view.axes)
        if len(axes) != len(array.axes):
            return
        nodes |= more
        logits.scale *= c
        array.value, array.axes = inner, axes
        return
