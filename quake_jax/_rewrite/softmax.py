"""Softmax and log-softmax as programs write them: exponentials divided by their sum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.match import Match, Reject, check_unused
from quake_jax._rows.api import log_softmax, softmax

_EXPONENTIALS = ("exp", "exp2")


@dataclasses.dataclass
class _Row:
    """Exponentials e^(scale · (x - max x)): the logits x and what computes the exponentials."""

    logits: Value
    nodes: set[Node]
    scale: float = 1.0


def find(root: Node) -> Match | None:
    """The softmax or log-softmax whose last equation is `root`.

    Raises:
      Reject: if there is one that must stay.
    """
    if root.primitive in ("div", "mul"):
        return _softmax(root)
    if root.primitive == "select_n":
        return _masked_softmax(root)
    if root.primitive == "sub":
        return _log_softmax(root)
    return None


def _match(
    name: str,
    root: Node,
    axes,
    nodes,
    logits: Value,
    where: Value | None = None,
    scale: float = 1.0,
) -> Match:
    result = root.output
    for dtype in (result.dtype, logits.dtype):
        if dtype not in KERNEL_DTYPES:
            raise Reject(f"dtype {dtype}", name, nodes)
    check_exponential(name, nodes, root)
    # Where the sum alone is wider than the exponentials, the kernel's sum is as wide.
    function = softmax if name == "softmax" else log_softmax
    inputs = (logits,) if where is None else (logits, where)
    return Match(
        name,
        f"quake_jax.{name}",
        root,
        frozenset(nodes | {root}),
        inputs,
        _call,
        (
            ("function", function),
            ("axis", tuple(axes)),
            ("dtype", np.dtype(result.dtype)),
            ("scale", scale),
        ),
    )


def check_exponential(name: str, nodes, root: Node) -> None:
    """Raise Reject if the exponentials or what follows them are used elsewhere."""
    first = min((n.index for n in nodes if n.primitive in _EXPONENTIALS), default=root.index)
    try:
        late = {n for n in nodes if n.index >= first and _depends(n, nodes)}
        check_unused(late | {root}, root)
    except Reject as reason:
        raise Reject(str(reason), name, nodes) from None


def _depends(node: Node, nodes) -> bool:
    """Whether a node is an exponential or follows one among `nodes`."""
    if node.primitive in (*_EXPONENTIALS, "reduce_sum"):
        return True
    return any(v.node in nodes and _depends(v.node, nodes) for v in node.inputs if v.node)


def _call(logits, where=None, *, function, axis, dtype, scale, order):
    axis = axis[0] if len(axis) == 1 else axis
    if scale != 1:
        logits = logits.astype(jnp.float32) * scale
    return function(logits, axis, where, order=order).astype(dtype)


def _no_rounding(node: Node) -> bool:
    return views.is_cast(node)


# The parts.


def _normalizer(
    total: Value, prefix: views.View | None = None
) -> tuple[Value, tuple[int, ...], set[Node], views.View] | None:
    """If `total` is a sum along axes: its operand, those axes of it, the nodes between, a view.

    The view is of `total` from the sum, or of what has the view `prefix` from `total`.
    """
    view = views.view(total, _no_rounding)
    node = view.source.node
    if node is None or node.primitive != "reduce_sum":
        return None
    nodes = {*view.nodes, node}
    if prefix is not None:
        nodes |= set(prefix.nodes)
        view = views.View(view.source, views.compose(prefix.axes, view.axes))
    return node.inputs[0], tuple(int(a) for a in node.params["axes"]), nodes, view


def _aligned(view: views.View, operand: views.View, axes, shape) -> bool:
    """Whether a reduction over `axes` of its operand stands where its rows are.

    Args:
      view: of the array that the result of the reduction is combined with, from that result.
      operand: of the same array from the operand of the reduction, or from what it is a view of.
      axes: of the operand.
      shape: of the array.
    """
    kept = [d for d in range(view.source.ndim + len(axes)) if d not in axes]
    for d, n in enumerate(shape):
        if n == 1:
            continue
        a = view.axes[d] if view.axes else None  # a scalar beside an array has no axes
        if a is None:
            # Constant along d: d has to be reduced.
            if operand.axes[d] not in axes:
                return False
        elif kept[a] != operand.axes[d]:
            return False
    return True


def _identity(value: Value) -> views.View:
    """A view of a value from itself."""
    return views.View(value, tuple(None if n == 1 else i for i, n in enumerate(value.shape)))


def _sum_of(
    exponentials: Value,
    total: Value,
    prefix: views.View | None = None,
    select: Callable | None = None,
) -> tuple[tuple[int, ...], set[Node]] | None:
    """The axes of `exponentials` along which `total` is their sum, and nodes, or None.

    `select(value)` gives what is summed in place of the exponentials: (exponentials, nodes).
    """
    found = _normalizer(total, prefix)
    if found is None:
        return None
    operand, axes, nodes, view = found
    summed = views.view(operand, _no_rounding)
    nodes |= set(summed.nodes)
    if select is not None:
        selected = select(summed.source)
        if selected is None or summed.axes != _identity(operand).axes:
            return None
        summed = views.view(selected[0], _no_rounding)
        nodes |= selected[1] | set(summed.nodes)
    base = views.view(exponentials, _no_rounding)
    if base.source is not summed.source:
        if not views.same(base.source, summed.source):
            return None
        nodes |= _cone_of(summed.source, 16)
    # The operand's axes as axes of the exponentials.
    to_operand = {a: d for d, a in enumerate(summed.axes) if a is not None}
    as_operand = views.View(
        operand, tuple(None if a is None else to_operand.get(a) for a in base.axes)
    )
    if not _aligned(view, as_operand, axes, exponentials.shape):
        return None
    # An axis of size 1 makes no difference.
    reduced = tuple(d for d, a in enumerate(as_operand.axes) if a in axes)
    return reduced, nodes | set(base.nodes)


def _cone_of(value: Value, depth: int) -> set[Node]:
    if value.node is None or depth == 0:
        return set()
    if value.node.primitive not in (*_EXPONENTIALS, "sub", "select_n", "mul"):
        return set()
    return {value.node}.union(*(_cone_of(v, depth - 1) for v in value.node.inputs))


def _row(exponentials: Value, axes) -> _Row | None:
    """The logits of `exponentials`, without a maximum that is subtracted along `axes`.

    Softmax does not change when a number is subtracted from a row: without it or with it the
    result is right.
    """
    view = views.view(exponentials, _no_rounding)
    node = view.source.node
    if node is None or node.primitive not in _EXPONENTIALS:
        return None
    nodes = {*view.nodes, node}
    if view.axes != _identity(exponentials).axes or view.source.shape != exponentials.shape:
        return None
    shifted = node.inputs[0]
    scale = 1.0
    if node.primitive == "exp2":
        shifted, scale = _of_base_2(shifted, nodes)
    stripped = without_maximum(shifted, axes)
    if stripped is None:
        return _Row(shifted, nodes, scale)
    return _Row(stripped[0], nodes | stripped[1], scale)


def _of_base_2(exponent: Value, nodes: set[Node]) -> tuple[Value, float]:
    """(x, c) with 2^exponent = e^(c·x), a constant factor of the exponent being a part of c."""
    node = exponent.node
    if node is not None and node.primitive == "mul":
        for x, factor in (node.inputs, node.inputs[::-1]):
            c = views.uniform(factor)
            if c is not None and math.isfinite(c) and c > 0 and x.shape == exponent.shape:
                nodes.add(node)
                scale = c * math.log(2)
                return x, 1.0 if abs(scale - 1) < 2.0**-22 else scale
    return exponent, math.log(2)


def without_maximum(shifted: Value, axes) -> tuple[Value, set[Node]] | None:
    """The logits, if `shifted` is logits minus their maximum along at least `axes`."""
    view = views.view(shifted, _no_rounding)
    node = view.source.node
    if node is None or node.primitive != "sub" or view.axes != _identity(shifted).axes:
        return None
    logits, maximum = node.inputs
    if logits.shape != shifted.shape:
        return None
    found = _maximum(maximum)
    if found is None:
        return None
    operand, reduced, nodes, largest = found
    base, compared = views.view(logits, _no_rounding), views.view(operand, _no_rounding)
    select = _masked(compared.source)
    if base.source is not compared.source and not views.same(base.source, compared.source):
        # where(mask, x, -inf) for the maximum alone, or once more for the logits
        if select is None or not select[2] <= -1e30:
            return None
        nodes |= {compared.source.node}
        own = _masked(base.source)
        is_again = own is not None and own[2] <= -1e30 and all(map(views.same, own[:2], select[:2]))
        if not is_again:
            if not views.same(select[1], base.source):
                return None
            compared = views.view(select[1])
    to_operand = {a: d for d, a in enumerate(compared.axes) if a is not None}
    as_operand = views.View(
        operand, tuple(None if a is None else to_operand.get(a) for a in base.axes)
    )
    if not _aligned(largest, as_operand, reduced, logits.shape):
        return None
    if not all(as_operand.axes[d] in reduced for d in axes if logits.shape[d] != 1):
        return None
    return logits, {*view.nodes, node, *nodes}


def _passes_maximum(node: Node) -> bool:
    """Whether a node leaves a maximum what it is, for the purpose of subtracting it."""
    if node.primitive == "stop_gradient" or views.is_cast(node):
        return True
    return False


def _maximum(value: Value):
    """(operand, axes, nodes, view of `value` from the maximum) if it is a maximum along axes."""
    nodes: set[Node] = set()
    axes = _identity(value).axes
    while True:
        view = views.view(value, _passes_maximum)
        nodes |= set(view.nodes)
        axes = views.compose(axes, view.axes)
        node = view.source.node
        if node is None:
            return None
        if node.primitive == "reduce_max":
            reduced = tuple(int(a) for a in node.params["axes"])
            return node.inputs[0], reduced, nodes | {node}, views.View(view.source, axes)
        if node.primitive == "max":  # with the least number, where it says nothing
            rest = [v for v in node.inputs if views.uniform(v) != -np.inf]
            if len(rest) != 1 or rest[0].shape != node.output.shape:
                return None
            nodes, value = nodes | {node}, rest[0]
        elif node.primitive == "select_n":  # where(isfinite(m), m, 0)
            which, other, kept = node.inputs if len(node.inputs) == 3 else (None, None, None)
            if which is None or views.uniform(other) != 0 or which.primitive != "is_finite":
                return None
            if which.node.inputs[0] is not kept:
                return None
            nodes, value = nodes | {node, which.node}, kept
        else:
            return None


def _masked(value: Value):
    """(mask, value where it is True, number elsewhere) of where(mask, value, number)."""
    node = value.node
    if node is None or node.primitive != "select_n" or len(node.inputs) != 3:
        return None
    which, other, kept = node.inputs
    number = views.uniform(other)
    if number is None or str(which.dtype) != "bool" or which.shape != value.shape:
        return None
    return which, kept, number


# The patterns.


def _softmax(root: Node) -> Match | None:
    for exponentials, total, prefix, nodes in quotients(root):
        if exponentials.shape != root.output.shape or not views.is_float(root.output):
            continue
        found = _sum_of(exponentials, total, prefix)
        if found is None or not found[0]:
            continue
        axes, more = found
        row = _row(exponentials, axes)
        if row is not None:
            nodes |= more | row.nodes
            return _match("softmax", root, axes, nodes, row.logits, scale=row.scale)
    return None


def divisor_of_rows(
    total: Value, prefix: views.View | None, root: Node
) -> tuple[Match, Value, tuple[int | None, ...]] | None:
    """The softmax that exponentials make when they are divided by `total`, if that is their sum.

    For those that are multiplied by something else first. `prefix` is as in `quotients`.

    Returns:
      A match of which logits, axis, scale and nodes count, the root apart; the exponentials; and
      which axis of them each axis of what is divided is.
    """
    found = _normalizer(total, prefix)
    if found is None:
        return None
    operand, axes, nodes, view = found
    summed = views.view(operand, _no_rounding)
    reduced = tuple(summed.axes[a] for a in axes if summed.axes[a] is not None)
    row = _row(summed.source, reduced) if reduced else None
    if row is None:
        return None
    kept = [d for d in range(operand.ndim) if d not in axes]
    places = tuple(None if a is None else summed.axes[kept[a]] for a in view.axes)
    nodes = frozenset(nodes | set(summed.nodes) | row.nodes)
    static = (("axis", reduced), ("scale", row.scale))
    match = Match("softmax", "quake_jax.softmax", root, nodes, (row.logits,), _call, static)
    return match, summed.source, places


def quotients(root: Node):
    """The ways to read `root` as a quotient: dividend, divisor, a view of it or None, nodes."""
    if root.primitive == "div":
        yield *root.inputs, None, set()
        return
    for dividend, factor in (root.inputs, root.inputs[::-1]):
        view = views.view(factor, _no_rounding)
        node = view.source.node
        if node is None:
            continue
        if node.primitive == "div" and views.uniform(node.inputs[0]) == 1:
            divisor = node.inputs[1]
        elif node.primitive == "integer_pow" and node.params["y"] == -1:
            divisor = node.inputs[0]
        else:
            continue
        if divisor.shape == view.source.shape:
            yield dividend, divisor, view, {node}


def _masked_softmax(root: Node) -> Match | None:
    """jax.nn.softmax(x, where=mask): selections before the maximum, in the sum, of the result."""
    outer = _masked(root.output)
    if outer is None or outer[2] != 0:
        return None
    mask, quotient, _ = outer
    if quotient.primitive != "div":
        return None
    exponentials, total = quotient.node.inputs
    if exponentials.shape != quotient.shape:
        return None

    def select(value):
        found = _masked(value)
        if found is None or found[2] != 0 or not views.same(found[0], mask):
            return None
        return found[1], {value.node}

    found = _sum_of(exponentials, total, select=select)
    if found is None or not found[0]:
        return None
    axes, nodes = found
    row = _row(exponentials, axes)
    if row is None:
        return None
    inner = _masked(row.logits)
    logits = row.logits
    if inner is not None and views.same(inner[0], mask):
        logits, row.nodes = inner[1], row.nodes | {row.logits.node}
    nodes = nodes | row.nodes | {quotient.node}
    return _match("softmax", root, axes, nodes, logits, mask, row.scale)


def _log_softmax(root: Node) -> Match | None:
    """x - log Σ e^x, with or without a maximum that is subtracted from x first."""
    x, logarithm = root.inputs
    if x.shape != root.output.shape or not views.is_float(root.output):
        return None
    nodes: set[Node] = set()
    axes_of_log = _identity(logarithm).axes
    view = views.view(logarithm, _no_rounding)
    nodes |= set(view.nodes)
    axes_of_log = views.compose(axes_of_log, view.axes)
    node = view.source.node
    maximum = None
    if node is not None and node.primitive == "add":  # log Σ e^(x - m) + m: jax.nn.logsumexp
        axes_of_add = axes_of_log
        for a, b in (node.inputs, node.inputs[::-1]):
            log_view = views.view(a)
            if log_view.source.primitive == "log" and a.shape == node.output.shape:
                maximum = b
                nodes |= {node, *log_view.nodes}
                axes_of_log = views.compose(axes_of_log, log_view.axes)
                node = log_view.source.node
                break
    if node is None or node.primitive != "log":
        return None
    nodes.add(node)
    total = node.inputs[0]
    if total.primitive == "abs":
        nodes.add(total.node)
        total = total.node.inputs[0]
    found = _normalizer(total)
    if found is None:
        return None
    operand, axes, more, inner = found
    through = views.View(inner.source, views.compose(axes_of_log, inner.axes))
    exponentials = views.view(operand, _no_rounding)
    if exponentials.source.primitive != "exp" or exponentials.source.shape != x.shape:
        return None
    if exponentials.axes != _identity(operand).axes:
        return None
    if not _aligned(through, _identity(x), axes, x.shape):
        return None
    exponent = exponentials.source.node.inputs[0]
    nodes |= more | {*exponentials.nodes, exponentials.source.node}
    stripped = without_maximum(exponent, axes)
    if maximum is None:
        # x may be the logits minus their maximum, or the logits if nothing is subtracted.
        if not views.same(exponent, x):
            return None
        logits = x if stripped is None else stripped[0]
    else:
        # log Σ e^(x - m) + m - here x has to be what m was subtracted from.
        if stripped is None or not views.same(stripped[0], x):
            return None
        a = _maximum(maximum)
        b = _maximum(exponent.node.inputs[1]) if exponent.primitive == "sub" else None
        if a is None or b is None or not views.same(a[3].source, b[3].source):
            return None
        if views.compose(axes_of_add, a[3].axes) != b[3].axes:
            return None  # it is added to another row than it was subtracted from
        stopped = [any(n.primitive == "stop_gradient" for n in m[2]) for m in (a, b)]
        if stopped[0] != stopped[1]:
            return None  # its gradient does not cancel
        logits = x
    if stripped is not None:
        nodes |= stripped[1]
    return _match("log_softmax", root, axes, nodes, logits)
