"""Log-sum-exp as programs write it: the logarithm of a sum of exponentials.

What was subtracted from the exponents may be added again: their maximum, or anything else that is
constant along the axes of the sum.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.match import Match, Reject
from quake_jax._rewrite.softmax import check_exponential
from quake_jax._rows.api import logsumexp

_NAME = "logsumexp"
# Of shorter rows XLA makes the sums faster (float32, AVX2, by `jax.nn.logsumexp` of 2^21 elements).
_SHORTEST_ROW = 24


@dataclasses.dataclass
class _Logarithm:
    """log(factor · Σ where · e^exponent) over axes of the exponent.

    Attributes:
      result_axes: which axis of the sum each axis of the logarithm is, or None.
      where: boolean array, or None; its axes as those of the exponent, or None.
      weights: what else the exponentials are multiplied by, or None.
      nodes: from the exponentials to the logarithm.
    """

    exponent: Value
    axes: tuple[int, ...]
    sum: Value
    result_axes: tuple[int | None, ...]
    nodes: set[Node]
    factor: float = 1.0
    where: Value | None = None
    where_axes: tuple[int | None, ...] | None = None
    weights: Value | None = None


def find(root: Node) -> Match | None:
    """The log-sum-exp whose last equation is `root`.

    Raises:
      Reject: if there is one that must stay.
    """
    if not root.outputs or not views.is_float(root.output):
        return None
    found = _with_sign(root) if root.primitive == "select_n" else _with_shift(root)
    return None if found is None else _match(root, *found)


def _match(root: Node, found: _Logarithm, logits: Value) -> Match | None:
    nodes = found.nodes | {root}
    result, total = root.output, found.sum
    kept = [a for a in found.result_axes if a is not None]
    if kept != [a for a in range(total.ndim) if total.shape[a] != 1] or any(
        a is None and n != 1 for a, n in zip(found.result_axes, result.shape, strict=True)
    ):
        return None  # it is transposed or broadcast before the logarithm is taken
    for dtype in (result.dtype, logits.dtype):
        if dtype not in KERNEL_DTYPES:
            raise Reject(f"dtype {dtype}", _NAME, nodes)
    if found.weights is not None:
        raise Reject("its exponentials have weights: XLA's one loop is faster", _NAME, nodes)
    row = math.prod(logits.shape[a] for a in found.axes)
    if logits.ndim - 1 in found.axes and isinstance(row, int) and row < _SHORTEST_ROW:
        raise Reject(f"too short ({row} elements in a row)", _NAME, nodes)
    check_exponential(_NAME, nodes, root)
    return Match(
        _NAME,
        f"quake_jax.{_NAME}",
        root,
        frozenset(nodes),
        (logits,) if found.where is None else (logits, found.where),
        _call,
        (
            ("axis", found.axes),
            ("factor", found.factor),
            ("where_axes", found.where_axes),
            ("shape", tuple(result.shape)),
            ("dtype", np.dtype(result.dtype)),
        ),
    )


def _call(logits, where=None, *, axis, factor, where_axes, shape, dtype, order):
    if dtype.itemsize > logits.dtype.itemsize:
        logits = logits.astype(dtype)
    if where is not None:
        where = where.reshape([1 if a is None else where.shape[a] for a in where_axes])
    y = logsumexp(logits, axis, where=where, order=order)
    if factor != 1:
        y = y + math.log(factor)
    return (y if y.shape == shape else jnp.reshape(y, shape)).astype(dtype)


def _identity(value: Value) -> tuple[int | None, ...]:
    return tuple(None if n == 1 else d for d, n in enumerate(value.shape))


def _with_sign(root: Node) -> tuple[_Logarithm, Value] | None:
    """where(sign(Σ) < 0, nan, log|Σ|): jax.nn.logsumexp with weights."""
    if len(root.inputs) != 3:
        return None
    which, value, other = root.inputs
    number = views.uniform(other)
    if number is None or not math.isnan(number) or value.node is None:
        return None
    if which.primitive != "lt" or views.uniform(which.node.inputs[1]) != 0:
        return None
    sign = which.node.inputs[0]
    found = _with_shift(value.node) if value.primitive in ("add", "log") else None
    if found is None or sign.primitive != "sign":
        return None
    total = views.view(sign.node.inputs[0], views.is_cast)
    if total.source is not found[0].sum:
        return None
    # Exponentials are not negative, nor are their sums: without weights the sign says nothing.
    found[0].nodes |= {which.node, sign.node, value.node, *total.nodes}
    return found


def _with_shift(root: Node) -> tuple[_Logarithm, Value] | None:
    """log Σ e^(x - m) + m and its logits x, or a logarithm alone and the whole exponent."""
    if root.primitive == "log":
        found = _logarithm(root.output)
        return None if found is None else (found, found.exponent)
    if root.primitive == "add":
        for logarithm, shift in (root.inputs, root.inputs[::-1]):
            found = _logarithm(logarithm)
            logits = None if found is None else _without_shift(found, shift)
            if logits is not None:
                return found, logits
    return None


def _logarithm(value: Value) -> _Logarithm | None:
    outer = views.view(value, views.is_cast)
    if outer.source.primitive != "log":
        return None
    result_axes = outer.axes
    nodes = {*outer.nodes, outer.source.node}
    total, factor = outer.source.node.inputs[0], 1.0
    if total.primitive == "abs":
        nodes.add(total.node)
        total = total.node.inputs[0]
    mean = views.view(total, views.is_cast)
    if mean.source.primitive in ("mul", "div"):
        summed, by = mean.source.node.inputs
        if mean.source.primitive == "mul" and views.uniform(summed) is not None:
            summed, by = by, summed
        number = views.uniform(by)
        if number is None or not 0 < number < math.inf:
            return None
        nodes |= {*mean.nodes, mean.source.node}
        factor = number if mean.source.primitive == "mul" else 1 / number
        total, result_axes = summed, views.compose(result_axes, mean.axes)
    inner = views.view(total, views.is_cast)
    summation = inner.source.node
    if summation is None or summation.primitive != "reduce_sum":
        return None
    nodes |= {*inner.nodes, summation}
    axes = tuple(int(a) for a in summation.params["axes"])
    result_axes = views.compose(result_axes, inner.axes)
    found = _Logarithm(value, axes, inner.source, result_axes, nodes, factor)
    return found if axes and _read_summands(summation.inputs[0], found) else None


def _read_summands(summands: Value, found: _Logarithm) -> bool:
    """Whether `summands` are exponentials, perhaps weighted or selected; enters what they are."""
    view = views.view(summands, views.is_cast)
    node = view.source.node
    if node is None or view.axes != _identity(summands):
        return False
    found.nodes |= set(view.nodes)
    if node.primitive == "exp":
        found.nodes.add(node)
        found.exponent = node.inputs[0]
        return found.exponent.shape == summands.shape
    if found.where is not None or found.weights is not None:
        return False
    found.nodes.add(node)
    if node.primitive == "select_n" and len(node.inputs) == 3:
        which, other, kept = node.inputs
        if str(which.dtype) != "bool" or views.uniform(other) != 0:
            return False
        found.where, found.where_axes = which, _identity(which)
        return which.shape == kept.shape and _read_summands(kept, found)
    if node.primitive == "mul":
        for exponentials, weights in (node.inputs, node.inputs[::-1]):
            if views.view(exponentials, views.is_cast).source.primitive == "exp":
                _read_weights(weights, found)
                return _read_summands(exponentials, found)
    return False


def _read_weights(weights: Value, found: _Logarithm) -> None:
    number = views.uniform(weights)
    if number is not None and 0 < number < math.inf:
        found.factor *= number
        return
    view = views.view(weights, views.is_cast)
    node = view.source.node
    if node is not None and node.primitive == "convert_element_type":
        (mask,) = node.inputs
        kept = [a for a in view.axes if a is not None]
        if str(mask.dtype) == "bool" and kept == sorted(kept):
            found.where, found.where_axes = mask, view.axes
            return
    found.weights = weights


def _without_shift(found: _Logarithm, shift: Value) -> Value | None:
    """The logits x, if the exponent is x - m and `shift`, added to the logarithm, is m.

    The same m in every element of a row, by the same equations: one that is stopped from having a
    gradient in one place alone makes a gradient of its own.
    """
    view = views.view(found.exponent, views.is_cast)
    node = view.source.node
    if node is None or node.primitive != "sub" or view.axes != _identity(found.exponent):
        return None
    logits, subtracted = node.inputs
    before, after = (views.view(v, views.is_cast) for v in (subtracted, shift))
    if logits.shape != found.exponent.shape or not views.same(before.source, after.source):
        return None
    if before.source.ndim == 0:
        return logits  # one number, the same in every row
    kept = [d for d in range(logits.ndim) if d not in found.axes]
    where_added = {kept[a]: after.axes[r] for r, a in enumerate(found.result_axes) if a is not None}
    for d, n in enumerate(logits.shape):
        if n != 1 and before.axes[d] != where_added.get(d):
            return None
    # Along other axes it must not vary: a result that it is broadcast over is no log-sum-exp.
    if any(after.axes[r] is not None for r, a in enumerate(found.result_axes) if a is None):
        return None
    return logits
