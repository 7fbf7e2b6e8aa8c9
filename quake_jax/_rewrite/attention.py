"""Attention as programs write it: softmax(scores of queries and keys) times values.

The axes of the scores get labels, their positions. Following the labels through both matrix
products says which axes of query, key and value are batch, heads, length and size, whatever their
order; `arrangement` then brings the arrays into the form of `quake_jax.dot_product_attention`.
Where an axis is cut up on the way (heads into groups of heads) its label is too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from quake_jax._rewrite import arrangement, masks, positions, softmax, views
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.labels import SIZE, Axes, parts_of, regrouped
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
    sizes: dict  # of the labels
    nodes: set[Node] = dataclasses.field(default_factory=set)
    masks: list[Mask] = dataclasses.field(default_factory=list)  # in the order of application
    biases: list[Bias] = dataclasses.field(default_factory=list)
    # Added after a mask in whose number they may show.
    late_biases: list[Bias] = dataclasses.field(default_factory=list)
    scale: float = 1.0
    traced_scale: Value | None = None
    soft_cap: float | None = None

    @property
    def all_biases(self) -> list[Bias]:
        return [*self.biases, *self.late_biases]


@dataclasses.dataclass
class Weights:
    """What stands between the softmax and the product with the values.

    Attributes:
      normalized: the match of the softmax.
      steps: between the two, the softmax's first.
      axes: of the product's operand; from `_label`, like the next.
      factors: arrays that the weights are multiplied by and that do not depend on the key, each
        with its axes. They can multiply the result instead.
      masks: that the weights are masked by, by 0.
      division: by the sums of the exponentials, if these alone are the weights.
    """

    normalized: Match
    steps: list[_Step] = dataclasses.field(default_factory=list)
    axes: Axes = dataclasses.field(default_factory=dict)
    factors: list[tuple[Value, Axes]] = dataclasses.field(default_factory=list)
    masks: list[Mask] = dataclasses.field(default_factory=list)
    division: _Division | None = None

    @property
    def nodes(self) -> set[Node]:
        nodes = {step.node for step in self.steps}
        return nodes if self.division is None else nodes | self.division.nodes


@dataclasses.dataclass
class _Division:
    """What divides the product with the values by the sums of exponentials.

    Attributes:
      root: the division; `mapping` says which axis of the product each axis of its result is.
      nodes: between the product and the root.
      axes: of the root's result along which the sums differ, as `Weights.axes`.
    """

    root: Node
    mapping: tuple[int | None, ...]
    nodes: set[Node]
    axes: Axes


@dataclasses.dataclass
class _Step:
    """An equation that arranges the weights, multiplies them by a factor or masks them by 0.

    `mapping` says which axis of its operand each axis of its result is, and is None for one that
    merges axes or cuts them up. `factor_axes` are by axis of the operand. `mask` is of its shape,
    and whether it is negated.
    """

    node: Node
    mapping: tuple[int | None, ...] | None
    factor: Value | None = None
    factor_axes: dict[int, int] = dataclasses.field(default_factory=dict)
    mask: tuple[Value, bool] | None = None


def find(root: Node) -> Match | None:
    """The attention whose last equation is `root`: the product with the values or, where it divides
    that, the division by the sums.

    Raises:
      Reject: if there is one that must stay.
    """
    if root.primitive in ("div", "mul"):
        return _divided(root)
    if root.primitive != "dot_general" or not root.params["dimension_numbers"][0][0]:
        return None
    reason = None
    for side in (0, 1):
        try:
            weights = _weights(root.inputs[side])
            if weights is None:
                _check_no_softmax(root, side)
            match = None if weights is None else _attention(root, side, weights)
        except Reject as found:
            reason = reason or found
        else:
            if match is not None:
                return match
    if reason is not None:
        raise reason
    return None


def _divided(root: Node) -> Match | None:
    """The attention that `root` divides by the sums of its exponentials, at last."""
    shape = root.output.shape
    for dividend, divisor, prefix, nodes in softmax.quotients(root):
        view = views.view(dividend, views.is_cast)
        product = view.source.node
        if product is None or product.primitive != "dot_general" or dividend.shape != shape:
            continue
        if any(a is None and n != 1 for a, n in zip(view.axes, shape, strict=True)):
            continue
        found = softmax.divisor_of_rows(divisor, prefix, root)
        if found is None:
            continue
        normalized, exponentials, places = found
        axes = {(a,): d for d, a in enumerate(places) if a is not None}
        division = _Division(root, view.axes, nodes | set(view.nodes), axes)
        for side, value in enumerate(product.inputs):
            weights = _weights(value, {exponentials.node: normalized}.get)
            if weights is not None:
                weights.division = division
                return _attention(product, side, weights)
    return None


def _attention(product: Node, side: int, weights: Weights) -> Match | None:
    logits_value, *where = weights.normalized.inputs
    reduced = dict(weights.normalized.static)["axis"]
    logits = _all_logits(logits_value)
    if logits is None:
        _check_no_product(logits_value)
        return None
    if len(reduced) != 1:
        raise Reject("its softmax is over more than one axis", "attention")
    labels = _labels(logits_value)
    scale = dict(weights.normalized.static)["scale"]
    if not (scale == 1 or _times(logits, scale, logits_value.dtype)):
        raise Reject(f"the factor {scale:g} of its softmax's logits", "attention")
    for mask in where:  # jax.nn.softmax's: of the logits and, last, of the result
        logits.masks.append(Mask(mask, labels, False, -math.inf))
        weights.masks.append(Mask(mask, labels, False, 0.0))
    keys = _label(weights, logits, labels, reduced[0])
    operands = _operands(product, side, weights, logits, keys)
    root = product if weights.division is None else weights.division.root
    nodes = {*logits.nodes, logits.product, *weights.normalized.nodes, *weights.nodes, product}
    _check_alone(nodes | {root}, root)
    query, key, value, result = operands
    for array in (query, key):
        _fold_scale(array, logits, nodes)
    return arrangement.match(
        root,
        nodes | {root},
        (query, key, value, result),
        logits,
        weights,
        keys,
        tuple(logits.sizes.values()),
    )


# The last equations of a softmax.
_SOFTMAX_ENDS = ("div", "mul", "select_n")


def _softmax_or_reject(node: Node) -> Match | None:
    try:
        return softmax.find(node) if node.primitive in _SOFTMAX_ENDS else None
    except Reject as reason:
        raise Reject(str(reason), "attention") from None


def _weights(value: Value, end: Callable = _softmax_or_reject, depth: int = 16) -> Weights | None:
    """The softmax that `value` is, but for its arrangement and factors; or None.

    `end` gives the match of the softmax whose last equation is a node.
    """
    node = value.node
    if node is None or depth == 0:
        return None
    found = end(node)
    if found is not None:
        return Weights(found)
    for inner, step in _steps(node):
        weights = _weights(inner, end, depth - 1)
        if weights is not None:
            weights.steps.append(step)
            return weights
    return None


def _steps(node: Node):
    """The ways to read a node as an array that is arranged or multiplied: the array, the step."""
    mapping = views.axes_of(node)
    if mapping is None and _keeps(node):
        mapping = tuple(range(node.output.ndim))
    if mapping is not None or views.merges_or_cuts(node):
        yield node.inputs[0], _Step(node, mapping)
    for inner, mapping, factor, factor_axes in _products(node):
        yield inner, _Step(node, mapping, factor, factor_axes)
    if node.primitive == "select_n" and len(node.inputs) == 3:
        which, *cases = node.inputs
        for is_kept, inner in enumerate(cases):
            is_mask = str(which.dtype) == "bool" and which.shape == inner.shape
            if is_mask and views.uniform(cases[1 - is_kept]) == 0:
                yield inner, _Step(node, tuple(range(inner.ndim)), mask=(which, not is_kept))


def _keeps(node: Node) -> bool:
    """Whether a node's result is its operand, rounded at most."""
    return views.is_cast(node) or views.is_name(node)


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


# Why what may be an attention is none.


def _check_no_softmax(root: Node, side: int) -> None:
    """Raise Reject if an operand of the last product is made of a softmax of a product."""
    path = _path(root.inputs[side], lambda node: _softmax_at(node) is not None)
    if path is None:
        return
    found = _softmax_at(path[0])
    if _path(found.inputs[0], _is_product) is None:
        return
    places = set(dict(found.static)["axis"])
    for node, operand in zip(path[1:], path, strict=False):
        mapping = views.axes_of(node) if node.inputs[0] is operand.output else None
        if mapping is not None:
            places = {d for d, a in enumerate(mapping) if a in places}
        elif node.output.shape != operand.output.shape:
            break  # then it is not known where the axes are
    else:
        if not places & {int(a) for a in root.params["dimension_numbers"][0][side]}:
            return
    culprit = next(node for node in path if _weights(node.output) is None)
    raise Reject(f"between its softmax and its values is {_described(culprit)}", "attention")


def _check_no_product(value: Value) -> None:
    """Raise Reject if logits, in a form that is not known, are made of a product."""
    path = _path(value, _is_product)
    if path is None:
        return
    operands = path[0].inputs
    if not all(views.is_float(v) and v.dtype.itemsize >= 2 for v in operands):
        raise Reject(f"its product of queries and keys is of {operands[0].dtype}", "attention")
    culprit = next((node for node in path if _all_logits(node.output) is None), path[-1])
    raise Reject(f"between its product and its softmax is {_described(culprit)}", "attention")


def _described(node: Node) -> str:
    name = node.primitive
    if name == "convert_element_type":
        name = f"a conversion from {node.inputs[0].dtype} to {node.output.dtype}"
    return f"{name}, in a form that is not known"


def _is_product(node: Node) -> bool:
    return node.primitive == "dot_general"


def _softmax_at(node: Node) -> Match | None:
    try:
        found = softmax.find(node) if node.primitive in _SOFTMAX_ENDS else None
    except Reject:
        return None
    return found if found is not None and found.name == "softmax" else None


# What a search for the parts of an attention does not look through.
_APART = ("dot_general", "conv_general_dilated", "reduce_", "arg", "cum", "sort", "scatter")
_LONGEST_SEARCH = 256


def _path(value: Value, is_end: Callable) -> list[Node] | None:
    """The nodes from one that is the end to the one that makes the value, or None."""
    queue = [] if value.node is None else [[value.node]]
    seen = {path[0] for path in queue}
    for path in queue:
        node = path[0]
        if is_end(node):
            return path
        if len(node.outputs) != 1 or node.primitive.startswith(_APART) or node.equation.effects:
            continue
        for v in node.inputs:
            if v.node is not None and v.node not in seen and len(seen) < _LONGEST_SEARCH:
                seen.add(v.node)
                queue.append([v.node, *path])
    return None


def _label(weights: Weights, logits: Logits, axes: Axes, reduced: int) -> int:
    """Label the axes of weights and logits by numbers; return the label of the keys.

    Until then a label is a tuple: (position,), and with a further 0 or 1 for the parts of one that
    is cut up.

    Args:
      weights: gets its axes and factors.
      logits: all its axes are changed.
      axes: of the softmax.
      reduced: the axis that the softmax is over.
    """
    if reduced not in axes.values():
        raise Reject("its softmax is over an axis of size 1", "attention")
    sizes = logits.sizes
    own = _cut_up(axes, sizes)
    for step in weights.steps:
        if step.factor is not None and views.uniform(step.factor) != 1:
            factor_axes = {i: step.factor_axes[a] for i, a in own.items() if a in step.factor_axes}
            unknown = set(step.factor_axes.values()) - set(factor_axes.values())
            known = not any(step.factor.shape[f] != 1 for f in unknown)
            if known and not any(label[0] == reduced for label in factor_axes):
                weights.factors.append((step.factor, factor_axes))
            else:
                weights.masks.append(_mask_of_factor(step.factor, factor_axes, sizes, known))
        if step.mask is not None:
            which, is_negated = step.mask
            # A sum that is NaN divides later.
            keeps_nan = weights.division is not None
            weights.masks.append(Mask(which, dict(own), is_negated, 0.0, keeps_nan=keeps_nan))
        if step.mapping is not None:
            places = {a: d for d, a in enumerate(step.mapping) if a is not None}
            own = {label: places[a] for label, a in own.items()}
            continue
        old, new = step.node.inputs[0].shape, step.node.output.shape
        found = regrouped(old, new, own, sizes, may_cut=True)
        if found is None:
            raise Reject("its weights are reshaped in a way that is not understood", "attention")
        own, sizes = found
    weights.axes = own
    if (reduced,) not in sizes:
        raise Reject("its softmax is over an axis that is cut up", "attention")
    numbers = {label: i for i, label in enumerate(sorted(sizes))}

    def numbered(axes: Axes) -> Axes:
        return {numbers[label]: a for label, a in _cut_up(axes, sizes).items()}

    weights.axes, logits.axes = numbered(own), numbered(logits.axes)
    weights.factors = [(factor, numbered(axes)) for factor, axes in weights.factors]
    if weights.division is not None:
        weights.division.axes = numbered(weights.division.axes)
    biases = logits.all_biases
    masks_of_biases = [b.mask for b in biases if b.mask is not None]
    for part in (*logits.masks, *weights.masks, *biases, *masks_of_biases):
        part.axes = numbered(part.axes)
    logits.sizes = {i: sizes[label] for label, i in numbers.items()}
    return numbers[reduced,]


def _mask_of_factor(factor: Value, axes: Axes, sizes: dict, is_known: bool) -> Mask:
    """The mask that weights are multiplied by."""
    two = masks.two_valued(factor, axes, sizes) if is_known else None
    if two is None or {two.if_false, two.if_true} != {0, 1}:
        raise Reject("its weights are multiplied by what depends on the key", "attention")
    return Mask(two.value, two.axes, two.if_true == 0, 0.0, keeps_nan=True)


def _cut_up(axes: Axes, sizes: dict) -> Axes:
    """Axes by the labels in `sizes`, from those by what they were before they were cut up."""
    return {part: a for label, a in axes.items() for part in parts_of(label, sizes)}


def _check_alone(nodes: set[Node], root: Node) -> None:
    try:
        check_unused(nodes, root)
    except Reject as reason:
        raise Reject(str(reason), "attention") from None


def _labels(value: Value) -> Axes:
    return {(i,): i for i, n in enumerate(value.shape) if n != 1}


def _through(axes: Axes, mapping) -> Axes:
    """The axes by label of a value's source, from those of the value."""
    return {label: mapping[a] for label, a in axes.items() if mapping[a] is not None}


# From the softmax back to the first product.


def _all_logits(value: Value) -> Logits | None:
    labels = _labels(value)
    return _logits(value, labels, {label: value.shape[a] for label, a in labels.items()})


def _logits(value: Value, axes: Axes, sizes: dict, depth: int = 24) -> Logits | None:
    """What makes the logits `value`; None if they are not made from a matrix product."""
    source, axes, sizes, between = views.followed(value, axes, sizes, _keeps, may_cut=True)
    node = source.node
    if node is None or depth == 0 or len(node.outputs) != 1:
        return None
    if node.primitive == "dot_general":
        return Logits(node, axes, sizes, set(between))
    step = _STEPS.get(node.primitive)
    found = None if step is None else step(node, axes, sizes, depth - 1)
    if found is None:
        return None
    found.nodes |= {node, *between}
    casts = list(filter(views.is_cast, reversed(between)))
    if found.late_biases and any(cast.output.dtype != source.dtype for cast in casts):
        return None  # which would round what the biases make of the masks' numbers
    for cast in casts:
        for mask in found.masks:
            mask.becomes(mask.number, cast.output.dtype)
    return found


def _mask_step(node: Node, axes: Axes, sizes: dict, depth: int) -> Logits | None:
    if len(node.inputs) != 3:
        return None
    which, if_false, if_true = node.inputs
    if which.shape != node.output.shape or str(which.dtype) != "bool":
        return None
    for number, inner, is_negated in ((if_false, if_true, False), (if_true, if_false, True)):
        c = views.uniform(number)
        if c is None:
            continue
        found = _logits(inner, axes, sizes, depth)
        if found is None or found.late_biases:
            continue
        is_float16 = str(number.dtype) == "float16"
        found.masks.append(Mask(which, axes, is_negated, c, is_float16=is_float16))
        return found
    return None


def _add_step(node: Node, axes: Axes, sizes: dict, depth: int) -> Logits | None:
    sign = -1.0 if node.primitive == "sub" else 1.0
    pairs = [tuple(node.inputs)]
    if sign == 1.0:
        pairs.append(tuple(node.inputs[::-1]))
    for inner, bias in pairs:
        if inner.shape != node.output.shape or not views.is_float(bias):
            continue
        found = _logits(inner, axes, sizes, depth)
        if found is None:
            found = _blended(inner, bias, sign, axes, sizes, depth)
            if found is None:
                continue
            return found
        if any(mask.number > MASKED_BY_SUM for mask in found.masks):
            # The bias may show in the masks' numbers.
            if str(node.output.dtype) != "float32" or not masks.is_one_selection(found.masks):
                return None
            masks_before = len(found.masks)
            found.late_biases += [b for b in found.biases if b.masks_before == masks_before]
            found.biases = [b for b in found.biases if b.masks_before != masks_before]
            found.late_biases.append(_bias(bias, axes, sign, masks_before))
            return found
        mask = _mask_of_bias(bias, axes) if sign == 1.0 else None
        # In float16 the sum rounds a logit that is added to -65504.
        if mask and mask.number <= MASKED_BY_SUM and str(bias.dtype) != "float16":
            found.masks.append(mask)
        else:
            added = _bias(bias, axes, sign, len(found.masks))
            added.rounds_by, added.mask = _rounding(bias), mask
            found.biases.append(added)
        return found
    return None


def _bias(value: Value, axes: Axes, factor: float, masks_before: int) -> Bias:
    view = views.view(value)
    return Bias(view.source, _through(positions.own(value, axes), view.axes), factor, masks_before)


def _blended(
    product: Value, other: Value, sign: float, axes: Axes, sizes: dict, depth: int
) -> Logits | None:
    """logits · m ± c · (1 - m), a selection if m is a mask as numbers; None otherwise."""
    if product.primitive != "mul":
        return None
    for inner, factor in (product.node.inputs, product.node.inputs[::-1]):
        if inner.shape != product.shape:
            continue
        kept, rest = (masks.two_valued(v, positions.own(v, axes), sizes) for v in (factor, other))
        if kept is None or rest is None or kept.axes != rest.axes:
            continue
        if kept.value is not rest.value and not views.same(kept.value, rest.value):
            continue
        cases = {kept.if_true: (rest.if_true, False), kept.if_false: (rest.if_false, True)}
        if set(cases) != {0, 1} or cases[1][0] != 0:
            continue
        found = _logits(inner, axes, sizes, depth)
        # 0 times -inf is NaN.
        is_finite = found is not None and all(mask.number != -math.inf for mask in found.masks)
        if not is_finite or found.late_biases:
            continue
        found.nodes.add(product.node)
        is_float16 = str(other.dtype) == "float16"
        number = sign * cases[0][0]
        mask = Mask(kept.value, kept.axes, cases[1][1], number, is_float16=is_float16)
        found.masks.append(mask)
        return found
    return None


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
    if not min(numbers) < 0:
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


# What masks as numbers are made by.
_MAKE_MASKS = frozenset(
    "select_n add sub mul div neg max min clamp concatenate pad stop_gradient".split()
)


def _largest(value: Value, depth: int = 8) -> float:
    """The largest absolute number that equations are seen to put into a bias."""
    source = views.view(value, views.is_cast).source
    number = views.uniform(source)
    if number is not None:
        return abs(number)
    if source.primitive in _MAKE_MASKS and depth > 0:
        return max(_largest(v, depth - 1) for v in source.node.inputs)
    elements = views.constant(source) if views.is_float(source) else None
    if elements is None or not elements.size:
        return 0.0
    # In a row with smaller ones too (penalties of distance, say) those count that round nothing.
    return float(np.abs(elements.astype(np.float32)).min(-1).max())


def _scale_step(node: Node, axes: Axes, sizes: dict, depth: int) -> Logits | None:
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
            return _scaled(inner, axes, sizes, c, depth)
        scalar = views.view(factor, views.is_cast)
        # One number that the program computes.
        if scalar.source.ndim == 0 and node.primitive == "mul" and inner is not factor:
            found = _logits(inner, axes, sizes, depth)
            plain = found is not None and not (
                found.masks or found.biases or found.soft_cap or found.traced_scale
            )
            if plain:
                found.traced_scale = scalar.source
                return found
    return None


def _scaled(inner: Value, axes: Axes, sizes: dict, c: float, depth: int) -> Logits | None:
    if not math.isfinite(c) or c == 0:
        return None
    view = views.view(inner, views.is_cast)
    if view.source.primitive == "tanh" and c > 0:  # c·tanh(x)
        node = view.source.node
        found = _logits(node.inputs[0], _through(axes, view.axes), sizes, depth)
        if found is None or found.masks or found.biases or found.soft_cap is not None:
            return None
        if found.traced_scale is not None:
            return None
        found.nodes |= {node, *view.nodes}
        found.scale *= c
        found.soft_cap = c
        return found
    found = _logits(inner, axes, sizes, depth)
    return found if found is not None and _times(found, c, inner.dtype) else None


def _times(logits: Logits, c: float, dtype) -> bool:
    """Multiply logits of a dtype by a number; False if there is no such form of them."""
    if logits.soft_cap is not None or (c < 0 and logits.masks):
        return False
    logits.scale *= c
    for bias in logits.all_biases:
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
    """Query, key, value, and the labels of each axis of the result."""
    for node in (root, logits.product):
        _check_precision(node)
    query, key = _query_and_key(logits, keys)
    contracted, batch, free = _sides(root)
    value_side = 1 - side
    value = root.inputs[value_side]
    on: dict[int, tuple] = {}  # the labels on each axis of the weights
    for label in sorted(weights.axes):
        on[weights.axes[label]] = (*on.get(weights.axes[label], ()), label)
    summed = [a for a in contracted[side] if root.inputs[side].shape[a] != 1]
    if [on.get(a) for a in summed] != [(keys,)]:
        raise Reject("its softmax is over another axis than the values' product", "attention")
    axes: Axes = {keys: contracted[value_side][contracted[side].index(summed[0])]}
    result: list = []
    for p, v in zip(batch[side], batch[value_side], strict=True):
        result.append(on.get(p, ()))
        axes.update(dict.fromkeys(on.get(p, ()), v))
    sizes = [a for a in free[value_side] if value.shape[a] != 1]
    if len(sizes) > 1:
        raise Reject("its values have more than one axis of their own", "attention")
    if sizes:
        axes[SIZE] = sizes[0]
    rows = [on.get(a, ()) for a in free[side]]
    columns = [(SIZE,) if a in sizes else () for a in free[value_side]]
    result += rows + columns if side == 0 else columns + rows
    if weights.division is not None:
        result = _result_of_division(weights.division, result)
    return query, key, Operand(value, axes), result


def _result_of_division(division: _Division, labels: list) -> list:
    """The labels of each axis of the result from those of the product with the values.

    Raises:
      Reject: unless each row is divided by its own sum.
    """
    result = [() if a is None else labels[a] for a in division.mapping]
    for d, here in enumerate(result):
        of_sums = sorted(label for label, a in division.axes.items() if a == d)
        if of_sums != sorted(label for label in here if label != SIZE):
            raise Reject("it is divided by the sums of other rows than its own", "attention")
    return result


def _query_and_key(logits: Logits, keys: int) -> tuple[Operand, Operand]:
    node = logits.product
    contracted, batch, free = _sides(node)
    places = [("batch", i) for i in range(len(batch[0]))]
    places += [(side, d) for side in (0, 1) for d in free[side]]
    if keys not in logits.axes:
        raise Reject("its softmax is over an axis that no product has", "attention")
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
