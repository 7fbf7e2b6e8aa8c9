"""Masks that compare positions, read off the equations that make them, whatever their size.

A number that is linear in the positions of queries and keys is known by its offset and slopes, by
label. A comparison of two of them, or of one with a length, says which keys a query keeps.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.labels import Axes, Labels

_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "ne": "eq"}
_SWAPPED = {"gt": "lt", "ge": "le"}
# Constants of more elements are not looked at here.
_LARGEST_LINE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Length:
    """Keys from value + offset on are masked."""

    value: Value | None  # None for 0; otherwise an array with batch axes only
    axes: Axes
    offset: int


@dataclasses.dataclass
class Limits:
    """A conjunction of bands (left, right): query t keeps keys t - left to t + right; lengths."""

    bands: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    lengths: list[Length] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Line:
    """offset + Σ slope · position"""

    offset: float
    slopes: dict

    def plus(self, other: _Line, factor: float = 1.0) -> _Line:
        slopes = dict(self.slopes)
        for label, slope in other.slopes.items():
            slopes[label] = slopes.get(label, 0) + factor * slope
        slopes = {label: slope for label, slope in slopes.items() if slope}
        return _Line(self.offset + factor * other.offset, slopes)

    def extremes(self, sizes: dict) -> tuple[float, float]:
        steps = [slope * (sizes[label] - 1) for label, slope in self.slopes.items()]
        low, high = (sum(pick(s, 0) for s in steps) for pick in (min, max))
        return self.offset + low, self.offset + high


def limits(node: Node, axes: Axes, is_negated: bool, labels: Labels) -> Limits | None:
    """What a comparison keeps; None if it is no such comparison.

    Args:
      node: whose result is the mask, with the labels `axes`.
      is_negated: whether a key is kept where it is False.
      labels: of the attention.
    """
    name = _NEGATED.get(node.primitive) if is_negated else node.primitive
    if name not in ("lt", "le", "gt", "ge", "eq"):
        return None
    sizes = dict(labels.sizes)
    operands = [(v, own(v, axes)) for v in node.inputs]
    if name in _SWAPPED:
        name, operands = _SWAPPED[name], operands[::-1]
    found = Limits()
    pairs = [operands, operands[::-1]] if name == "eq" else [operands]
    for small, large in pairs:
        for a in _bounded(*small, sizes, "max" if name != "eq" else None):
            for b in _bounded(*large, sizes, "min" if name != "eq" else None):
                if not _add(found, a, b, name == "lt", labels):
                    return None
    return found


def own(value: Value, axes: Axes) -> Axes:
    """The axes by label of an operand, from those of the result."""
    return {i: a for i, a in axes.items() if value.ndim and value.shape[a] != 1}


def _bounded(value: Value, axes: Axes, sizes: dict, extreme: str | None) -> list:
    """The operands of the maxima ("max") or minima that a value is: lines, or (value, axes)."""
    source, inner, _, _ = views.followed(value, axes, sizes)
    node = source.node
    if node is not None and node.primitive == extreme:
        return [x for v in node.inputs for x in _bounded(v, own(v, inner), sizes, extreme)]
    if node is not None and node.primitive == "abs" and extreme == "max":
        line = _line(node.inputs[0], own(node.inputs[0], inner), sizes)
        if line is not None:
            return [line, _Line(0, {}).plus(line, -1)]
    line = _line(value, axes, sizes)
    return [(source, inner) if line is None else line]


def _add(found: Limits, small, large, is_strict: bool, labels: Labels) -> bool:
    """Note that small ≤ large, or less; False if it is not understood."""
    sizes = dict(labels.sizes)
    (query,) = labels.length or (None,)
    keys = labels.keys
    if isinstance(small, _Line) and isinstance(large, _Line):
        # difference ≤ 0, of whole numbers
        difference = small.plus(large, -1)
        offset = difference.offset
        offset = math.floor(offset) + 1 if is_strict else math.ceil(offset)
        difference = _Line(offset, difference.slopes)
        unlimited = sum(sizes[label] for label in (keys, *labels.length))
        if difference.extremes(sizes)[1] <= 0:
            return True
        for slope, band in ((1, (unlimited, -offset)), (-1, (-offset, unlimited))):
            if query is not None and difference.slopes == {keys: slope, query: -slope}:
                # Every query has to keep some key.
                found.bands.append(band)
                return min(band) >= 0 and sizes[query] - band[0] <= sizes[keys]
        if difference.slopes == {keys: 1} and offset <= 0:
            found.lengths.append(Length(None, {}, 1 - offset))
            return True
        return False
    if isinstance(small, _Line) and not isinstance(large, _Line):
        value, axes = large
        if value.dtype not in (np.int32, np.int64) or not set(axes) <= set(labels.batch):
            return False
        offset = (0 if is_strict else 1) - small.offset
        if small.slopes == {keys: 1} and abs(offset) < 1 << 30 and offset == int(offset):
            found.lengths.append(Length(value, axes, int(offset)))
            return True
    return False


def _line(value: Value, axes: Axes, sizes: dict, depth: int = 16) -> _Line | None:
    """A number as a line, if it is one and its dtype holds it exactly; None otherwise."""
    if depth == 0 or views.kind(value) not in "iufV" or not (value.ndim == 0 or _is_known(value)):
        return None
    c = views.uniform(value)
    if c is not None:
        return _Line(c, {}) if math.isfinite(c) else None
    source, axes, _, nodes = views.followed(value, axes, sizes, _keeps_numbers)
    line = _line_of_node(source, axes, sizes, depth - 1)
    passed = [source, *(node.output for node in nodes)]
    if line is None or not all(_holds(v.dtype, line, sizes) for v in passed):
        return None
    return line


def _is_known(value: Value) -> bool:
    return all(isinstance(n, int) for n in value.shape)


def _keeps_numbers(node: Node) -> bool:
    if node.primitive == "stop_gradient":
        return True
    return node.primitive == "convert_element_type" and all(
        views.kind(v) in "iufV" for v in (node.inputs[0], node.output)
    )


def _holds(dtype, line: _Line, sizes: dict) -> bool:
    if any(x != int(x) for x in (line.offset, *line.slopes.values())):
        return False
    low, high = line.extremes(sizes)
    if jnp.issubdtype(dtype, jnp.integer):
        return np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max
    return max(-low, high) <= 2 ** (jnp.finfo(dtype).nmant + 1)


def _line_of_node(value: Value, axes: Axes, sizes: dict, depth: int) -> _Line | None:
    node = value.node
    name = None if node is None else node.primitive
    if name == "iota":
        return _along(node.params["dimension"], value.shape, axes, sizes)
    if name in ("add", "sub", "mul", "neg"):
        lines = [_line(v, own(v, axes), sizes, depth) for v in node.inputs]
        if None in lines:
            return None
        if name == "neg":
            return _Line(0, {}).plus(lines[0], -1)
        if name != "mul":
            return lines[0].plus(lines[1], -1 if name == "sub" else 1)
        for a, b in (lines, lines[::-1]):
            if not a.slopes:
                return _Line(0, {}).plus(b, a.offset)
        return None
    if math.prod(value.shape) > _LARGEST_LINE:
        return None
    elements = views.constant(value)
    return None if elements is None else _fitted(elements.astype(np.float64), axes, sizes)


def _along(axis: int, shape, axes: Axes, sizes: dict) -> _Line | None:
    """The positions along an axis."""
    slopes, step = {}, 1
    for label in sorted((i for i, a in axes.items() if a == axis), reverse=True):
        slopes[label] = step
        step *= sizes[label]
    return _Line(0, slopes) if step == shape[axis] else None


def _fitted(elements: np.ndarray, axes: Axes, sizes: dict) -> _Line | None:
    """An array of numbers as a line."""
    if not elements.size:
        return None
    line = _Line(float(elements.flat[0]), {})
    model = np.full(elements.shape, line.offset)
    for a, n in enumerate(elements.shape):
        if n == 1:
            continue
        along = elements[tuple(slice(None) if d == a else 0 for d in range(elements.ndim))]
        positions = _along(a, elements.shape, axes, sizes)
        slope = float(along[1] - along[0])
        if positions is None and slope:
            return None
        if slope:
            line = line.plus(positions, slope)
        shape = [-1 if d == a else 1 for d in range(elements.ndim)]
        model = model + slope * np.arange(n).reshape(shape)
    return line if np.array_equal(model, elements) else None
