"""The axes of an attention by name: batch, heads, groups, length and keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

SIZE = "size"  # the label of the axis that queries and keys, or values, are vectors along


# From labels (positions among the axes of the logits, or SIZE) to axes of an array. An axis that
# is several of the logits' in one has all their labels, the first for the slowest in memory.
Axes = dict


def apart(shape: Sequence[int], axes: Axes, sizes: dict) -> tuple[tuple[int, ...], Axes]:
    """The shape with an axis for each label, and the labels' axes there."""
    new_shape: list[int] = []
    new_axes: Axes = {}
    for a, n in enumerate(shape):
        here = sorted(label for label in axes if axes[label] == a)
        for i, label in enumerate(here):
            new_axes[label] = len(new_shape) + i
        new_shape += [n] if len(here) < 2 else [sizes[label] for label in here]
    return tuple(new_shape), new_axes


def parts_of(label, sizes: dict) -> list:
    """What a label has been cut up into, if `sizes` has the parts: label + (0,), label + (1,)."""
    return sorted(x for x in sizes if x[: len(label)] == label)


def regrouped(old, new, axes: Axes, sizes: dict, may_cut: bool) -> tuple[Axes, dict] | None:
    """The axes by label, and the labels' sizes, of an array of one shape reshaped to another.

    Args:
      old, new: the shapes.
      axes: of the first.
      sizes: of the labels.
      may_cut: whether labels, which are tuples then, may be cut up if an axis is.

    Returns:
      None if the axes of one shape are not those of the other, merged or cut up.
    """
    if not all(isinstance(n, int) and n > 0 for n in (*old, *new)):
        return None
    factors: list[tuple] = []  # (label or None, size), the last first
    for a in reversed(range(len(old))):
        here = sorted(label for label in axes if axes[label] == a)
        factors += [(label, sizes[label]) for label in reversed(here)]
        if not here and old[a] != 1:
            factors.append((None, old[a]))
    sizes, result = dict(sizes), {}
    for a, n in enumerate(new):
        here = []
        while n > 1:
            label, size = factors.pop()
            if n % size:
                if not may_cut or label is None or size % n:
                    return None
                outer, inner = (*label, 0), (*label, 1)
                del sizes[label]
                sizes[outer], sizes[inner] = n, size // n
                factors.append((inner, size // n))
                label, size = outer, n
            here.append(label)
            n //= size
        if None in here and len(here) > 1:
            return None
        if here != [None]:
            if here != sorted(here):
                return None
            result.update(dict.fromkeys(here, a))
    return result, sizes


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which labels of the logits make up each axis of the kernel's arrays, with their sizes."""

    batch: tuple[int, ...]
    length: tuple[int, ...]  # one, or none if there is one query
    heads: tuple[int, ...]
    groups: tuple[int, ...]  # query heads that share a key head
    keys: int
    sizes: tuple[tuple[int, int], ...]

    def size(self, labels: Sequence[int]) -> int:
        return math.prod(dict(self.sizes)[label] for label in labels)
