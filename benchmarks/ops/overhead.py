"""What one call of a quake_jax operator costs inside a jitted program, beside XLA's own operator.

A chain of dependent operators on 16 elements: the arithmetic is a few nanoseconds, the rest is
the call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.harness import peers
from benchmarks.harness.frame import Settings
from benchmarks.harness.timing import Contestant, Quartiles
from benchmarks.ops.cases import ROUNDS, SUBJECT_ORDER
from benchmarks.ops.operators import OPERATORS

ELEMENTS = 16
# tanh is one instruction to XLA, softmax several; both stay bounded when chained. XLA would fuse a
# whole chain of tanh into one kernel, barriers or not: fusion is off there. A softmax it cannot
# fuse with the next one, and there its fusion of the steps is its due.
COMPILER_OPTIONS = {"tanh": {"xla_disable_hlo_passes": "fusion"}, "softmax": {}}


def measure(settings: Settings) -> dict[str, dict]:
    """The cost of one call: for each function the microseconds per operator of both, and the median
    and the quartiles of their difference.
    """
    length = 50 if settings.quick else 1000
    result = {}
    for function, options in COMPILER_OPTIONS.items():
        operator = OPERATORS[function]
        both = {"quake_jax": operator.of_quake_jax(SUBJECT_ORDER), "jax.nn": operator.jax_nn}
        contestants = [Contestant(name, _chain(f, length, options)) for name, f in both.items()]
        series = settings.read(contestants, ROUNDS)
        per_op = [[1e6 * seconds / length for seconds in one.times] for one in series.values()]
        difference = Quartiles.of([a - b for a, b in zip(*per_op, strict=True)])
        result[function] = {
            "quake_jax_us": statistics.median(per_op[0]),
            "jax_nn_us": statistics.median(per_op[1]),
            "difference_us": difference.median,
            "difference_low_us": difference.low,
            "difference_high_us": difference.high,
        }
    return result


def _chain(operator: Callable, length: int, options: dict) -> Callable[[int], None]:
    def chain(x):
        for _ in range(length):
            x = lax.optimization_barrier(operator(x))
        return x

    x = jnp.asarray(np.linspace(-2, 2, ELEMENTS, dtype=np.float32))
    compiled = jax.jit(chain).lower(x).compile(options)
    return peers.repeat(lambda: compiled(x).block_until_ready(), x)
