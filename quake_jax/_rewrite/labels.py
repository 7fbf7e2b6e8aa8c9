"""The axes of an attention by name: batch, heads, groups, length and keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

SIZE = "size"  # the label of the axis that queries and keys, or values, are vectors along


Axes = dict  # from labels (positions among the axes of the logits, or SIZE) to axes of an array


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
