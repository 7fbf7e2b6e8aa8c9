"""The contestants of one case that run in JAX or copy, and their memory; `peers` has the others.

Importing this module imports JAX: `environment.prepare` comes first.
"""

import functools

import jax.numpy as jnp
import numpy as np

from benchmarks.harness import buffers
from benchmarks.harness.timing import Contestant
from benchmarks.ops.cases import Case

# Results are checked on so many elements; a float64 reference of everything would take too long.
CHECKED_ELEMENTS = 1 << 20
# Errors are relative, for results of at least this share of the largest one.
ERROR_FLOOR = 1e-3
# These pass zero where terms of about 1 cancel: there the error is relative to 1.
CANCELLING = ("logaddexp", "logsumexp")


class Buffers(buffers.Buffers):
    """Operands and output of one case: independent N(0, 2²), the spread of attention logits."""

    def __init__(self, case: Case):
        self.case = case
        random = np.random.default_rng(0)
        drawn = (2 * random.standard_normal(s, dtype=np.float32) for s in case.operand_shapes)
        operands = [jnp.array(values.astype(jnp.dtype(case.dtype))) for values in drawn]
        super().__init__(operands, case.out_shape, case.dtype)

    def error(self) -> float:
        """Largest relative error of what the last contestant wrote, on the first rows."""
        wanted = self._exact
        written = self.target.reshape(-1, wanted.shape[-1])[: len(wanted)]
        return relative_error(self.case.function, wanted, written)

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        rows = max(1, CHECKED_ELEMENTS // self.case.shape[-1])
        first = [source.reshape(-1, source.shape[-1])[:rows] for source in self.sources]
        return self.case.operator.exact(*(operand.astype(np.float64) for operand in first))


def relative_error(function: str, wanted: np.ndarray, y: np.ndarray) -> float:
    """Largest error of `y` relative to the exact result of the same shape, over the results of at
    least `ERROR_FLOOR` times the largest.
    """
    magnitude = np.abs(wanted)
    counted = magnitude >= ERROR_FLOOR * magnitude.max()
    if function in CANCELLING:
        magnitude = np.maximum(magnitude, 1)
    return float(np.max(np.abs(y.astype(np.float64) - wanted)[counted] / magnitude[counted]))


def for_copies(buffers: Buffers) -> Buffers:
    """Buffers for a copy of an array of the case's shape: the same ones where they fit."""
    case = buffers.case
    if case.operand_shapes[0] == case.out_shape:
        return buffers
    return Buffers(Case("exp", case.shape, case.dtype))


def jax_nn(buffers: Buffers, name: str = "jax.nn") -> Contestant:
    """XLA's own operator."""
    return Contestant(name, buffers.runner(buffers.case.operator.jax_nn))


def quake(buffers: Buffers, order: int) -> Contestant:
    """The operator of quake_jax at one order."""
    operator = buffers.case.operator.of_quake_jax(order)
    return Contestant(f"order {order}", buffers.runner(operator))


def copies(buffers: Buffers) -> list[Contestant]:
    """Copies of the operand to the output; the fastest one is the limit for the operators."""

    def in_numpy(calls: int) -> None:
        for _ in range(calls):
            np.copyto(buffers.target, buffers.sources[0])

    in_xla = buffers.runner(lambda x, *_: x)
    return [Contestant("copy (XLA)", in_xla), Contestant("copy (NumPy)", in_numpy)]
