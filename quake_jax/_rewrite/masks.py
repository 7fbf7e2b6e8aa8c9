"""The masks of an attention: conjunctions taken apart, constant ones evaluated and recognised."""

from __future__ import annotations

import dataclasses

import numpy as np

from quake_jax._attention.masks import in_window
from quake_jax._rewrite import positions, views
from quake_jax._rewrite.graph import Value
from quake_jax._rewrite.labels import Axes, Labels, apart
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
    keeps_nan: bool = False  # where it masks, as a product with 0 does

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


def number_without_keys(
    masks: list[Mask], of_weights: list[Mask], is_full: bool, sizes: dict
) -> float | None:
    """What queries without any key get, or None if that is an average of the values.

    Args:
      masks: of the logits.
      of_weights: masks that the weights are masked by again.
      is_full: whether every query keeps some key for sure.
      sizes: of the labels.

    Raises:
      Reject: if `of_weights` do more than to make weights of such queries 0.
    """
    inner, outer = (
        [part for m in some for part in _conjuncts(m.value, m.axes, m.is_negated, sizes)]
        for some in (masks, of_weights)
    )
    is_nan = any(mask.number == -np.inf for mask in masks)
    if not of_weights:
        return np.nan if is_nan and not is_full else None
    if not _are_among(outer, inner) or not (is_full or _are_among(inner, outer)):
        raise Reject("its weights are masked by others than its logits", "attention")
    if is_full:
        return None
    if is_nan and all(mask.keeps_nan for mask in of_weights):
        if not is_one_selection(masks):
            raise Reject("a query without any key may get NaN, or 0", "attention")
        return np.nan
    return 0.0


def _are_among(some, others) -> bool:
    """Whether all conjuncts of one mask are conjuncts of another."""

    def is_same(a, b):
        return a[1:] == b[1:] and views.same(a[0], b[0])

    return all(any(is_same(a, b) for b in others) for a in some)


def conditions(masks, labels: Labels):
    """(arrays, lengths, window or None, whether every query keeps some key for sure).

    The arrays are the masks that stay arrays, the lengths are of `positions`.
    """
    sizes = dict(labels.sizes)
    arrays, lengths, bands = [], [], []
    is_constant = True
    total = None
    for mask in masks:
        for value, axes, negated in _conjuncts(mask.value, mask.axes, mask.is_negated, sizes):
            node = value.node
            limits = None if node is None else positions.limits(node, axes, negated, labels)
            if limits is not None and not limits.lengths:
                bands += limits.bands
                continue
            elements = views.constant(value)
            if elements is None:
                is_constant = False
                if limits is None:
                    arrays.append((value, axes, negated))
                else:
                    bands += limits.bands
                    lengths += limits.lengths
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
    window = None
    if bands:
        window = (min(b[0] for b in bands), min(b[1] for b in bands))
        if total is not None:
            total = total & _in_band(*total.shape, *window)
    is_full = is_constant and (total is None or bool(total.any(1).all()))
    return arrays, lengths, window, is_full


def viewed(value: Value, axes, negated: bool, sizes: dict):
    """A mask before equations that only arrange or repeat it, with its axes."""
    source, own, _, _ = views.followed(value, axes, sizes)
    return source, own, negated


def _conjuncts(value: Value, axes, negated: bool, sizes: dict):
    """The parts of a mask that is a conjunction, each with its axes, and whether it is negated.

    Numbers are masks too: True where they are not 0.
    """
    source, axes, _ = viewed(value, axes, negated, sizes)
    node = source.node
    name = None if node is None else node.primitive
    if name == "not":
        return _conjuncts(node.inputs[0], axes, not negated, sizes)
    parts = None
    if name == ("or" if negated else "and") and str(source.dtype) == "bool":
        parts = [(inner, negated) for inner in node.inputs]
    elif name == "select_n" and len(node.inputs) == 3 and str(node.inputs[0].dtype) == "bool":
        parts = _of_selection(*node.inputs, negated)
    elif name in ("ne", "eq") and views.uniform(node.inputs[1]) == 0:
        parts = [(node.inputs[0], negated ^ (name == "eq"))]
    elif name == "convert_element_type" and "b" in map(views.kind, (source, node.inputs[0])):
        parts = [(node.inputs[0], negated)]
    if parts is not None:
        return [
            part
            for inner, is_negated in parts
            for part in _conjuncts(inner, positions.own(inner, axes), is_negated, sizes)
        ]
    two = two_valued(source, axes, sizes)
    if two is None or two.value is source:
        return [(source, axes, negated)]
    results = [bool(x) ^ negated for x in (two.if_false, two.if_true)]
    if results[0] == results[1]:
        return [] if results[0] else [(source, axes, negated)]
    return _conjuncts(two.value, two.axes, results[0], sizes)


def _of_selection(which: Value, if_false: Value, if_true: Value, negated: bool):
    """A selection among masks, negated or not, as a conjunction, or None: jnp.tril(mask)."""
    for case, other, is_other in ((if_false, if_true, True), (if_true, if_false, False)):
        known = views.uniform(case)
        # Where the case that is known is chosen the conjunction has to be False.
        if known is not None and bool(known) == negated:
            return [(which, not is_other), (other, negated)]
    return None


@dataclasses.dataclass
class TwoValued:
    """where(value, if_true, if_false); the value has boolean elements, or the numbers 0 and 1."""

    value: Value
    axes: Axes
    if_false: float
    if_true: float


_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


def two_valued(value: Value, axes: Axes, sizes: dict, depth: int = 12) -> TwoValued | None:
    """A value that is made of a mask and of constants, as a choice between two numbers."""
    value, axes, _ = viewed(value, axes, False, sizes)
    node = value.node
    name = None if node is None else node.primitive
    if depth == 0 or views.kind(value) not in "biufV":
        return None
    if name == "select_n" and len(node.inputs) == 3 and str(node.inputs[0].dtype) == "bool":
        which, *cases = node.inputs
        numbers = [views.uniform(v) for v in cases]
        if None not in numbers and which.shape == value.shape:
            return TwoValued(which, axes, *numbers)
    elif name in ("convert_element_type", "neg", "stop_gradient"):
        found = two_valued(node.inputs[0], positions.own(node.inputs[0], axes), sizes, depth - 1)
        return _applied(found, (lambda x: -x) if name == "neg" else (lambda x: x), value.dtype)
    elif name in (*_COMPARISONS, *_ARITHMETIC) and str(node.inputs[0].dtype) != "bool":
        function = {**_COMPARISONS, **_ARITHMETIC}[name]
        a, b = node.inputs
        numbers = views.uniform(a), views.uniform(b)
        if numbers[0] is None and numbers[1] is not None:
            found = two_valued(a, positions.own(a, axes), sizes, depth - 1)
            return _applied(found, lambda x: function(x, numbers[1]), value.dtype)
        if numbers[0] is not None and numbers[1] is None:
            found = two_valued(b, positions.own(b, axes), sizes, depth - 1)
            return _applied(found, lambda x: function(numbers[0], x), value.dtype)
    if str(value.dtype) == "bool":
        return TwoValued(value, axes, 0.0, 1.0)
    elements = views.constant(value)
    if elements is not None and bool(((elements == 0) | (elements == 1)).all()):
        return TwoValued(value, axes, 0.0, 1.0)
    return None


def _applied(found: TwoValued | None, function, dtype) -> TwoValued | None:
    """What becomes of both numbers, as a dtype has it."""
    if found is None:
        return None
    with np.errstate(all="ignore"):
        numbers = np.asarray([function(found.if_false), function(found.if_true)]).astype(dtype)
    return dataclasses.replace(found, if_false=float(numbers[0]), if_true=float(numbers[1]))


def _matrix(elements: np.ndarray, axes, labels: Labels) -> np.ndarray | None:
    """A constant mask as a matrix of queries and keys; None if it depends on anything else."""
    sizes = dict(labels.sizes)
    shape, axes = apart(elements.shape, axes, sizes)
    elements = elements.reshape(shape)
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
    return (left, right) if np.array_equal(matrix, _in_band(*matrix.shape, left, right)) else None


def _in_band(queries: int, keys: int, left: int, right: int) -> np.ndarray:
    return in_window(np.arange(queries)[:, None], np.arange(keys), left, right)


def _limit(distances, is_limited, unlimited: int) -> int | None:
    """The distance that all rows that are limited share; None if they do not."""
    limits = set(distances[is_limited].tolist())
    if len(limits) > 1:
        return None
    limit = limits.pop() if limits else unlimited
    return limit if (distances <= limit).all() else None
