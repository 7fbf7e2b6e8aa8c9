"""Calibration: the ranges of the rows that packed weights multiply, from batches of inputs.

The functions run on the batches as they will later, but that each row is quantised by itself, and
tell what their weights multiply (`_rewrite.observe`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from quake_jax._core import jax_names
from quake_jax._core.drop_in import refusal
from quake_jax._core.progress import progress
from quake_jax._pack.plan import Plan
from quake_jax._rewrite.observe import calibration


def check(plan: Plan, params, calibrate, count: int | None) -> None:
    """Raise TypeError or ValueError unless the weights of a plan can be calibrated.

    `count` is that of functions where there may be several.
    """
    if not plan.with_ranges:
        expected = "left out where no weight is int8 without groups, with int8 activations"
        raise refusal("pack", "calibrate", expected, type(calibrate).__name__)
    for x in jax.tree.leaves(params):
        if isinstance(x, (jax.ShapeDtypeStruct, jax_names.Tracer)):
            expected = "arrays with values where there is calibrate"
            raise refusal("pack", "params", expected, repr(x))
    if jax.process_count() > 1:
        expected = "None in several processes: calibrate in one, and load_packed what it saves"
        raise refusal("pack", "calibrate", expected, f"{jax.process_count()} processes")
    if count is not None and not (isinstance(calibrate, Sequence) and len(calibrate) == count):
        expected = f"a sequence of {count}, the batches of each function"
        raise refusal("pack", "calibrate", expected, repr(calibrate), TypeError)


@contextlib.contextmanager
def measuring(plan: Plan) -> Iterator[None]:
    """Measure the ranges of a plan: the programs that run inside are those with names for ranges.

    Raises:
      ValueError: at the end, if rows are not finite, or no batch reaches a weight.
    """
    ends = np.cumsum([0, *(np.prod(_lead(slot), dtype=int) for slot in plan.with_ranges)])
    least, largest = np.full(ends[-1], np.inf), np.full(ends[-1], -np.inf)
    lock = threading.Lock()

    def tell(weights, low, high):
        with lock:
            np.minimum.at(least, weights, low)
            np.maximum.at(largest, weights, high)

    numbers = {
        slot: np.arange(first, end).reshape(_lead(slot))
        for slot, first, end in zip(plan.with_ranges, ends, ends[1:], strict=False)
    }

    def pairs(of_weights: Callable) -> dict:
        both = {slot: np.stack(of_weights(x), -1) for slot, x in numbers.items()}
        return {slot: x.astype(np.float32) for slot, x in both.items()}

    with calibration(tell) as number:
        plan.ranges = pairs(lambda x: (np.full_like(x, number), x))
        yield
    plan.ranges = pairs(lambda x: (least[x], largest[x]))
    for slot, found in plan.ranges.items():
        _check(plan.name(slot), found)


def _lead(slot) -> tuple[int, ...]:
    return slot.static.activation_range.shape[:-1]


def run(function: Callable, packed, calibrate, kwargs: dict) -> None:
    """Run a function on batches.

    Raises:
      TypeError: if these are no batches.
    """
    if calibrate is None:
        return
    is_batch = type(calibrate) is tuple or isinstance(calibrate, Mapping)
    is_batch = is_batch or hasattr(calibrate, "shape")
    batches = [calibrate] if is_batch else calibrate
    if not isinstance(batches, Iterable):
        expected = "a batch (a tuple of the arguments after params) or an iterable of batches"
        raise refusal("pack", "calibrate", expected, repr(calibrate), TypeError)
    total = len(batches) if hasattr(batches, "__len__") else None
    with progress("calibrating", total, after=1.0) as advance:
        for batch in batches:
            args = batch if type(batch) is tuple else (batch,)
            for x in jax.tree.leaves((args, kwargs)):
                if isinstance(x, jax.ShapeDtypeStruct):
                    raise refusal("pack", "calibrate", "of arrays with values", repr(x), TypeError)
            jax.block_until_ready(function(packed, *args, **kwargs))
            advance()


def _check(name: str, found: np.ndarray) -> None:
    if np.isposinf(found[..., 0]).any():
        raise ValueError(
            f"quake_jax.pack: no batch of calibrate reaches the weight {name}, or nothing needs "
            "what it gives: give batches that reach it, or leave it alone by a rule"
        )
    if not np.isfinite(found).all():
        raise ValueError(
            f"quake_jax.pack: calibrate has NaN or infinities in the rows of the weight {name}"
        )
