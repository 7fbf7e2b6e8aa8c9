"""Calibration: the ranges of the rows that packed weights multiply, from batches of inputs.

The functions run as they will later, but rows are quantised one by one, and each call of `dense`
reports the least and the largest element of its own (`_dense.primitive.observed`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from quake_jax._core.drop_in import refusal
from quake_jax._core.progress import progress
from quake_jax._dense.primitive import observed
from quake_jax._pack.plan import Plan, Slot


class _Ranges:
    """The ranges of some slots while they are being measured.

    Attributes:
      numbers: by slot, what stands in the place of ranges: (…, 2), a number for each weight. Those
        that are read together have the same ones.
    """

    def __init__(self, slots: Sequence[Slot], together: Iterable[Sequence[Slot]]):
        self.numbers: dict[Slot, np.ndarray] = {}
        count = 0
        for group in _groups(slots, together):
            lead = group[0].static.activation_range.shape[:-1]
            size = int(np.prod(lead))
            numbers = np.arange(count, count + size, dtype=np.float32).reshape(lead)
            self.numbers.update(dict.fromkeys(group, np.stack([numbers, numbers], -1)))
            count += size
        self._least, self._largest = np.full(count, np.inf), np.full(count, -np.inf)
        self._lock = threading.Lock()

    def add(self, numbers, least, largest) -> None:
        at, least, largest = np.broadcast_arrays(numbers, least, largest)
        at = at.astype(int)
        with self._lock:
            np.minimum.at(self._least, at, least)
            np.maximum.at(self._largest, at, largest)

    def measured(self, slot: Slot) -> np.ndarray:
        at = self.numbers[slot][..., 0].astype(int)
        return np.stack([self._least[at], self._largest[at]], -1).astype(np.float32)


def _groups(slots: Sequence[Slot], together: Iterable[Sequence[Slot]]) -> list[list[Slot]]:
    """The slots, with those in one group that one call reads together, or calls one by one do."""
    group_of = {slot: [slot] for slot in slots}
    for those in together:
        ranged = [slot for slot in those if slot in group_of]
        for slot in ranged[1:]:
            mine, other = group_of[ranged[0]], group_of[slot]
            shape = ranged[0].static.activation_range.shape
            if mine is not other and slot.static.activation_range.shape == shape:
                mine += other
                group_of.update(dict.fromkeys(other, mine))
    return [*{id(group): group for group in group_of.values()}.values()]


def calibrated(
    plan: Plan,
    functions: Sequence[Callable],
    packed,
    calibrate,
    kwargs: dict,
    *,
    together: Iterable[Sequence[Slot]],
    is_one: bool,
) -> None:
    """Set the ranges of a plan.

    `functions` are to be lowered for this alone; the ranges in `packed` have no meaning;
    `together` are the packed weights that calls read together.

    Raises:
      TypeError: if calibrate is no batches.
      ValueError: if rows are not finite, or no batch reaches a weight.
    """
    given = [calibrate] if is_one else calibrate
    if not isinstance(given, Sequence) or len(given) != len(functions):
        expected = f"a sequence of {len(functions)}, the batches of each function"
        raise refusal("pack", "calibrate", expected, repr(calibrate), TypeError)
    ranges = _Ranges(plan.with_ranges, together)
    plan.ranges = ranges.numbers
    packed = plan.ranged(packed)
    with observed(ranges.add):
        for function, of_function in zip(functions, given, strict=True):
            _run(function, packed, of_function, kwargs)
    plan.ranges = {slot: ranges.measured(slot) for slot in plan.with_ranges}
    for slot, found in plan.ranges.items():
        _check(plan.name(slot), found)


def _run(function: Callable, packed, calibrate, kwargs: dict) -> None:
    if calibrate is None:
        return
    is_batch = isinstance(calibrate, (tuple, Mapping)) or hasattr(calibrate, "shape")
    batches = [calibrate] if is_batch else calibrate
    if not isinstance(batches, Iterable):
        expected = "a batch (a tuple of the arguments after params) or an iterable of batches"
        raise refusal("pack", "calibrate", expected, repr(calibrate), TypeError)
    total = len(batches) if hasattr(batches, "__len__") else None
    with progress("calibrating", total, after=1.0) as advance:
        for batch in batches:
            args = batch if isinstance(batch, tuple) else (batch,)
            for x in jax.tree.leaves((args, kwargs)):
                if isinstance(x, jax.ShapeDtypeStruct):
                    raise refusal("pack", "calibrate", "of arrays with values", repr(x), TypeError)
            jax.block_until_ready(function(packed, *args, **kwargs))
            advance()


def _check(name: str, found: np.ndarray) -> None:
    if np.isposinf(found[..., 0]).any():
        raise ValueError(
            f"quake_jax.pack: no batch of calibrate reaches the weight {name}: give batches that "
            "do, or leave it alone by a rule"
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"quake_jax.pack: calibrate has NaN or infinities in the rows of the weight {name}"
        )
