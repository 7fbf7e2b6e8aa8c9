"""The masks of an attention: conjunctions taken apart, constant ones evaluated and recognised."""

from __future__ import annotations

import dataclasses

import numpy as np

from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Value
from quake_jax._rewrite.labels import Axes, Labels
from quake_jax._rewrite.match import Reject

# A masked logit of at most this is as good as none: e^(it - any other) is 0 and, in a row of
# nothing else, all weights are equal.
MASKED = -9e8  # -1e9 in bfloat16
# The same where it is added to a logit, which then must not show in the sum.
MASKED_BY_SUM = -1e30
# Of float16 the least number serves, unless a factor makes it smaller.
_LEAST_FLOAT16 = -65504.0


@dataclasses.dataclass
class Mask:
    """where(mask, logits, number), or logits + where(mask, 0, number) if `is_added`."""

    value: Value
    axes: Axes  # of `value`
    is_negated: bool
    number: float
    is_added: bool = False
    is_float16: bool = False  # where the number is put in

    def becomes(self, number: float, dtype) -> None:
        """Note that a later step makes this of the number, and rounds it to a dtype."""
        with np.errstate(over="ignore"):
            self.number = float(np.float64(number).astype(dtype))


def check_masked_numbers(masks: list[Mask]) -> None:
    """Raise Reject unless masked logits are as good as none."""
    for mask in masks:
        if not mask.number <= (_LEAST_FLOAT16 if mask.is_float16 else MASKED):  # or it is NaN
            raise Reject(f"it is masked by {mask.number:g}, which may not be enough", "attention")


def is_one_selection(masks: list[Mask]) -> bool:
    """Whether all masks together are where(mask, logits, number) with one mask and number."""
    if len(masks) < 2:
        return True
    return len({mask.number for mask in masks}) == 1 and not any(m.is_added for m in masks)


def check_as_bias(masks: list[Mask]) -> None:
    """Raise Reject unless the masks can be taken together as one bias."""
    if any(mask.number > MASKED_BY_SUM for mask in masks):
        raise Reject("it is masked by different numbers", "attention")


def conditions(masks, labels: Labels):
    """(masks that stay arrays, window or None, whether every query keeps some key for sure)."""
    arrays, bands = [], []
    is_constant = True
    total = None
    for mask in masks:
        for value, axes, negated in _conjuncts(mask.value, mask.axes, mask.is_negated):
            elements = views.constant(value)
            if elements is None:
                is_constant = False
                arrays.append((value, axes, negated))
                continue
            elements = elements.astype(bool) ^ negated
            if elements.all():
                continue
            matrix, band = _known_matrix(value, elements, axes, negated, labels)
            if band is None:
                arrays.append((value, axes, negated))
            else:
                bands.append(band)
            if matrix is None:
                is_constant = False
            else:
                total = matrix if total is None else total & matrix
    is_full = is_constant and (total is None or bool(total.any(1).all()))
    window = None
    if bands:
        window = (min(b[0] for b in bands), min(b[1] for b in bands))
    return arrays, window, is_full


def viewed(value: Value, axes, negated: bool):
    """A mask before equations that only arrange or repeat it, with its axes."""
    view = views.view(value)
    own = {i: view.axes[a] for i, a in axes.items() if value.ndim and view.axes[a] is not None}
    return view.source, own, negated


def _conjuncts(value: Value, axes, negated: bool):
    """The parts of a mask that is a conjunction, each with its axes, and whether it is negated."""
    source, axes, _ = viewed(value, axes, negated)
    node = source.node
    name = None if node is None else node.primitive
    if name == "not":
        return _conjuncts(node.inputs[0], axes, not negated)
    if name == ("or" if negated else "and") and str(source.dtype) == "bool":
        parts = []
        for inner in node.inputs:
            own = {i: a for i, a in axes.items() if inner.ndim and inner.shape[a] != 1}
            parts += _conjuncts(inner, own, negated)
        return parts
    return [(source, axes, negated)]


def _matrix(elements: np.ndarray, axes, labels: Labels) -> np.ndarray | None:
    """A constant mask as a matrix of queries and keys; None if it depends on anything else."""
    sizes = dict(labels.sizes)
    wanted = (*labels.length, labels.keys)
    for label in set(axes) - set(wanted):
        first = elements.take([0], axes[label])
        if not (elements == first).all():
            return None
        elements = first
    axes = {i: a for i, a in axes.items() if i in wanted}
    order = [i for i in wanted if i in axes]
    rest = [a for a in range(elements.ndim) if a not in axes.values()]
    if any(elements.shape[a] != 1 for a in rest):
        return None
    matrix = elements.transpose([*rest, *(axes[i] for i in order)])
    shape = [sizes[i] if i in axes else 1 for i in wanted]
    matrix = matrix.reshape(shape)
    matrix = matrix if labels.length else matrix[None]
    return np.broadcast_to(matrix, (labels.size(labels.length), sizes[labels.keys]))


def _known_matrix(value: Value, elements: np.ndarray, axes, negated: bool, labels: Labels):
    """A constant mask as a matrix, and the band that it is; None for what it is not."""

    def compute():
        matrix = _matrix(elements, axes, labels)
        return matrix, None if matrix is None else _band(matrix)

    # The same mask in the next layer is not looked at again.
    recipe = views.recipe(value)
    key = None if recipe is None else (recipe, tuple(axes.items()), negated, labels)
    return views.remembered(key, compute)


def _band(matrix: np.ndarray) -> tuple[int, int] | None:
    """(left, right) if query t keeps the keys t - left to t + right; None if it is no such mask."""
    if not matrix.any(1).all():
        return None
    queries, keys = matrix.shape
    t = np.arange(queries)
    first, last = matrix.argmax(1), keys - 1 - matrix[:, ::-1].argmax(1)
    left = _limit(t - first, first > 0, queries + keys)
    right = _limit(last - t, last < keys - 1, queries + keys)
    if left is None or right is None or min(left, right) < 0:
        return None
    s = np.arange(keys)
    distance = s[None, :] - t[:, None]
    return (
        (left, right) if np.array_equal(matrix, (distance >= -left) & (distance <= right)) else None
    )


def _limit(distances, is_limited, unlimited: int) -> int | None:
    """The distance that all rows that are limited share; None if they do not."""
    limits = set(distances[is_limited].tolist())
    if len(limits) > 1:
        return None
    limit = limits.pop() if limits else unlimited
    return limit if (distances <= limit).all() else None
