"""What one call of a quake_jax operator costs inside a jitted program, beside XLA's own operator.

A chain of dependent operators on 16 elements: the arithmetic is a few nanoseconds, the rest is
the call.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import operators, timing
from benchmarks.timing import Contestant, Quartiles

ELEMENTS = 16
ORDER = 3
# tanh is one instruction to XLA, softmax several; both stay bounded when chained.
FUNCTIONS = ("tanh", "softmax")
# XLA would fuse a whole chain of tanh into one kernel, barriers or not: fusion is off there. A
# softmax it cannot fuse with the next one, and there its fusion of the steps is its due.
COMPILER_OPTIONS = {"tanh": {"xla_disable_hlo_passes": "fusion"}, "softmax": {}}


def measure(length: int, rounds: int, target: float, threads: int) -> dict[str, dict]:
    """Measure the cost of one call.

    Args:
        length: Number of operators in the chain.
        rounds: Number of interleaved rounds.
        target: Least length of a reading in seconds.
        threads: Number of threads in use.

    Returns:
        For each function the microseconds per operator of both, and the median and the quartiles
        of their difference.
    """
    result = {}
    for function in FUNCTIONS:
        options = COMPILER_OPTIONS[function]
        contestants = [
            Contestant("quake_jax", _chain(operators.quake(function, ORDER), length, options)),
            Contestant("jax.nn", _chain(operators.JAX_NN[function], length, options)),
        ]
        series = timing.measure(contestants, rounds=rounds, target=target, threads=threads)
        per_op = {
            name: [1e6 * seconds / length for seconds in one.times] for name, one in series.items()
        }
        difference = Quartiles.of(
            [a - b for a, b in zip(per_op["quake_jax"], per_op["jax.nn"], strict=True)]
        )
        result[function] = {
            "quake_jax_us": Quartiles.of(per_op["quake_jax"]).median,
            "jax_nn_us": Quartiles.of(per_op["jax.nn"]).median,
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

    def run(calls: int) -> None:
        for _ in range(calls):
            compiled(x).block_until_ready()

    return run
