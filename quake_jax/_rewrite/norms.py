"""LayerNorm and RMSNorm over the last axis, as programs write them.

The result is a product of factors, and maybe an offset: x less its mean, or x; 1/√(variance +
epsilon), which is constant along the last axis; a scale, which is constant along the others. What
is recognised is checked to be of the same x: the mean, and the variance as the mean square of the
differences or as the difference of mean squares.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax.numpy as jnp

from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._dense.norms import LayerNorm, RMSNorm
from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.match import Match
from quake_jax._rows.norms import layer_norm, rms_norm

NAMES = {True: "layer_norm", False: "rms_norm"}  # by whether x is centered


class _No(Exception):
    """The value is no norm."""


@dataclasses.dataclass
class _Norm:
    """A norm while it is being recognised."""

    nodes: set[Node]
    x: Value | None = None
    centered: bool = False
    inverse: Value | None = None  # the variance + epsilon whose inverse root is a factor
    scale: Value | None = None
    offset: Value | None = None
    factors: list[Value] = dataclasses.field(default_factory=list)  # x and the scale


def find(root: Node) -> Match | None:
    """The norm whose last equation is `root`, as a call of `layer_norm` or `rms_norm`."""
    if root.primitive not in ("add", "mul", "div", "convert_element_type"):
        return None
    result = root.output
    if result.dtype not in KERNEL_DTYPES or not result.ndim:
        return None
    for norm in _candidates(root):
        try:
            epsilon = _epsilon(norm)
        except _No:
            continue
        return _match(root, norm, epsilon)
    return None


def _candidates(root: Node) -> Iterator[_Norm]:
    """What the norm may be, by the shapes alone: of a single row, scale and offset look like x."""
    norm = _Norm({root})
    value, shape = _uncast(root.output, norm), root.output.shape
    ways = [(value, None)]
    if value.primitive == "add":
        norm.nodes.add(value.node)
        first, second = value.node.inputs
        ways = [(first, second), (second, first)]
    for product, row in ways:
        offset = None if row is None else views.repeated_rows(row, 1, shape)
        if row is not None and offset is None:
            continue
        read = dataclasses.replace(norm, nodes=set(norm.nodes), offset=offset, factors=[])
        try:
            _read_factors(product, shape, read)
        except _No:
            continue
        for i, x in enumerate(read.factors):
            rows = [
                views.repeated_rows(v, 1, shape) for v in read.factors[:i] + read.factors[i + 1 :]
            ]
            if x.shape == shape and len(rows) < 2 and None not in rows:
                scale = rows[0] if rows else None
                yield dataclasses.replace(read, nodes=set(read.nodes), x=x, scale=scale)


def _epsilon(norm: _Norm) -> float:
    """Settle what x is, and check that all else is of it."""
    if norm.inverse is None:
        raise _No
    _settle_x(norm)
    epsilon = _epsilon_of_variance(norm)
    if not norm.centered and norm.offset is not None:
        raise _No
    if any(row is not None and _reads(row, norm.nodes) for row in (norm.scale, norm.offset)):
        raise _No  # of a single row, what is added to the norm, or multiplied, and made of it
    return epsilon


def _reads(value: Value, nodes: set[Node]) -> bool:
    """Whether a value depends on one of these nodes."""
    first = min(node.index for node in nodes)
    pending, seen = [value], set()
    while pending:
        node = pending.pop().node
        if node is None or node.index < first or node in seen:
            continue
        if node in nodes:
            return True
        seen.add(node)
        pending += node.inputs
    return False


def _match(root: Node, norm: _Norm, epsilon: float) -> Match:
    arrays = {"scale": norm.scale, "offset": norm.offset}
    given = {name: value for name, value in arrays.items() if value is not None}
    return Match(
        NAMES[norm.centered],
        f"quake_jax.{NAMES[norm.centered]}",
        root,
        frozenset(norm.nodes),
        (norm.x, *given.values()),
        _call,
        (
            ("centered", norm.centered),
            ("given", tuple(given)),
            ("epsilon", epsilon),
            ("dtype", root.output.dtype.name),
        ),
    )


def _uncast(value: Value, norm: _Norm) -> Value:
    """What a value is before conversions between floating-point types, and before a choice that is
    known, such as jax.numpy.var's of NaN for an empty axis."""
    while value.node is not None:
        node = value.node
        if views.is_cast(node):
            value = node.inputs[0]
        elif node.primitive == "select_n" and views.uniform(node.inputs[0]) is not None:
            value = node.inputs[1 + int(views.uniform(node.inputs[0]))]
        else:
            break
        norm.nodes.add(node)
    return value


def _source_of_rows(value: Value, shape, norm: _Norm) -> Value | None:
    """What a value repeats along its last axis; None if it does not."""
    view = views.repeated(value, shape, range(len(shape) - 1))
    if view is None:
        return None
    norm.nodes.update(view.nodes)
    return view.source


def _read_factors(value: Value, shape, norm: _Norm, inverted: bool = False) -> None:
    value = _uncast(value, norm)
    if value.primitive in ("mul", "div") and not _is_row_constant(value, shape):
        norm.nodes.add(value.node)
        first, second = value.node.inputs
        _read_factors(first, shape, norm, inverted)
        _read_factors(second, shape, norm, inverted != (value.primitive == "div"))
        return
    if _is_row_constant(value, shape):
        of_row = _Norm(set())
        source = _uncast(_source_of_rows(value, shape, of_row), of_row)
        if norm.inverse is None and source.primitive == ("sqrt" if inverted else "rsqrt"):
            norm.nodes |= of_row.nodes | {source.node}
            norm.inverse = source.node.inputs[0]
            return
    if inverted:
        raise _No
    norm.factors.append(value)


def _is_row_constant(value: Value, shape) -> bool:
    return _source_of_rows(value, shape, _Norm(set())) is not None


def _settle_x(norm: _Norm) -> None:
    """Look through the subtraction of the mean from x."""
    x, shape = norm.x, norm.x.shape
    if x.primitive == "sub":
        rest, mean = x.node.inputs
        if views.uniform(mean) == 0:  # as Flax's RMSNorm has it
            norm.nodes.add(x.node)
            norm.x = _uncast(rest, norm)
            return
        source = _source_of_rows(mean, shape, norm)
        of = None if source is None else _mean_of(_uncast(source, norm), norm)
        if of is not None and _uncast(of, norm) is _uncast(rest, norm):
            norm.nodes.add(x.node)
            norm.centered = True
            x = rest
    norm.x = _uncast(x, norm)


def _unmoved(value: Value) -> views.View:
    """The view of a value, whose axes must be in the order of its source's."""
    view = views.view(value)
    kept = [a for a in view.axes if a is not None]
    if kept != sorted(kept) or math.prod(view.source.shape) != math.prod(value.shape):
        raise _No
    return view


def _mean_of(value: Value, norm: _Norm) -> Value | None:
    """What a value is the mean over the last axis of."""
    node = value.node
    if node is None or node.primitive not in ("div", "mul"):
        return None
    total, count = node.inputs
    if node.primitive == "mul" and views.uniform(total) is not None:
        total, count = count, total
    number = views.uniform(count)
    if node.primitive == "mul" and number:
        number = 1 / number
    # Some keep the axis.
    view = _unmoved(total)
    summed = view.source
    if number is None or summed.primitive != "reduce_sum":
        return None
    of = summed.node.inputs[0]
    is_last = tuple(summed.node.params["axes"]) == (of.ndim - 1,)
    if not is_last or not isinstance(of.shape[-1], int):
        return None
    if abs(number - of.shape[-1]) > 1e-6 * number:
        return None
    norm.nodes.update((node, summed.node, *view.nodes))
    return of


def _square_of(value: Value, norm: _Norm) -> Value | None:
    node = value.node
    if node is None:
        return None
    is_square = node.primitive == "square" or (
        (node.primitive == "integer_pow" and node.params["y"] == 2)
        or (node.primitive == "mul" and node.inputs[0] is node.inputs[1])
    )
    if not is_square:
        return None
    norm.nodes.add(node)
    return node.inputs[0]


def _epsilon_of_variance(norm: _Norm) -> float:
    """Check that the inverse root is that of the variance of x (or its mean square) + epsilon."""
    total = norm.inverse
    if total.primitive != "add":
        raise _No
    norm.nodes.add(total.node)
    variance, epsilon = total.node.inputs
    if views.uniform(epsilon) is None:
        variance, epsilon = epsilon, variance
    number = views.uniform(epsilon)
    if number is None or not number >= 0:
        raise _No
    view = _unmoved(variance)
    norm.nodes.update(view.nodes)
    variance = _uncast(view.source, norm)
    if variance.primitive == "max" and any(views.uniform(v) == 0 for v in variance.node.inputs):
        norm.nodes.add(variance.node)
        (variance,) = [v for v in variance.node.inputs if views.uniform(v) != 0]
    is_one = _is_variance(variance, norm) if norm.centered else _is_mean_square(variance, norm)
    if not is_one:
        raise _No
    return number


def _is_mean_square(value: Value, norm: _Norm) -> bool:
    squares = _mean_of(_uncast(value, norm), norm)
    of = None if squares is None else _square_of(_uncast(squares, norm), norm)
    return of is not None and _uncast(of, norm) is norm.x


def _is_variance(value: Value, norm: _Norm) -> bool:
    if value.primitive == "sub":  # mean(x²) - mean(x)²
        squares, square = value.node.inputs
        mean = _square_of(square, norm)
        of = None if mean is None else _mean_of(_uncast(mean, norm), norm)
        norm.nodes.add(value.node)
        return of is not None and _uncast(of, norm) is norm.x and _is_mean_square(squares, norm)
    squares = _mean_of(value, norm)
    centered = None if squares is None else _square_of(_uncast(squares, norm), norm)
    if centered is None:
        return False
    centered = _uncast(centered, norm)
    if centered.primitive != "sub":
        return False
    rest, mean = centered.node.inputs
    source = _source_of_rows(mean, centered.shape, norm)
    of = None if source is None else _mean_of(_uncast(source, norm), norm)
    norm.nodes.add(centered.node)
    return of is not None and _uncast(of, norm) is norm.x and _uncast(rest, norm) is norm.x


def _call(x, *arrays, centered, given, epsilon, dtype, order):
    del order  # there is no exponential in norms
    keywords = {n: a.reshape(-1) for n, a in zip(given, arrays, strict=True)}
    function = layer_norm if centered else rms_norm
    # The result has x's dtype, and must not be coarser than what it replaces.
    x = x.astype(jnp.promote_types(x.dtype, dtype))
    return function(x, **keywords, epsilon=epsilon).astype(dtype)


def is_norm(match: Match | None) -> bool:
    return match is not None and match.name in NAMES.values()


def applied(norm: LayerNorm | RMSNorm | None, x):
    """The rows that a norm of `dense` makes of x, in float32; x itself without one."""
    if norm is None:
        return x
    names = ("scale", "offset") if isinstance(norm, LayerNorm) else ("scale",)
    arrays = {name: array for name in names if (array := getattr(norm, name)) is not None}
    function = layer_norm if isinstance(norm, LayerNorm) else rms_norm
    return function(x.astype(jnp.float32), **arrays, epsilon=norm.epsilon)


def of_dense(arrays, *, centered, given, epsilon, dtype) -> LayerNorm | RMSNorm:
    """The norm that a match is, as `dense` takes it; `arrays` are the match's inputs after x."""
    del dtype  # it stays float32
    keywords = {n: a.reshape(-1) for n, a in zip(given, arrays, strict=True)}
    return (LayerNorm if centered else RMSNorm)(**keywords, epsilon=epsilon)
