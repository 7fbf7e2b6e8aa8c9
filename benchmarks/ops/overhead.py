"""What small arrays cost: one call of a quake_jax operator inside a jitted program, beside XLA's
own operator, in a loop each of whose steps needs the one before it.

With few elements the arithmetic is a few nanoseconds, the rest is the call. From these figures
`accelerate` knows which arrays are too small for a kernel.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.harness import peers
from benchmarks.harness.errors import quake_jax
from benchmarks.harness.frame import Settings
from benchmarks.harness.timing import Contestant, paired_ratio, quartiles
from benchmarks.ops.cases import ROUNDS, SUBJECT_ORDER
from benchmarks.ops.goals import JUDGED_CALLS
from benchmarks.ops.operators import OPERATORS, REDUCTION, UNARY

# Of elements, for attention of weights: one query of four heads.
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
ATTENTION, HEADS, HEAD_SIZE = "attention", 4, 64
FUNCTIONS = (
    *(
        name
        for name, operator in OPERATORS.items()
        # logsumexp gives no array of x's shape.
        if operator.kind in (UNARY, REDUCTION) and name != "logsumexp"
    ),
    ATTENTION,
)


def measure(settings: Settings) -> dict[str, dict[str, dict]]:
    """For each function and size the microseconds of both, as quartiles of all rounds: `quake_jax`,
    `jax.nn`, `difference`, and `speed`, the quotient.
    """
    quick = settings.quick
    return {
        name: {str(size): _measured(name, size, settings) for size in SIZES[: 1 if quick else None]}
        for name in (JUDGED_CALLS if quick else FUNCTIONS)
    }


def _measured(name: str, size: int, settings: Settings) -> dict[str, dict]:
    length = 50 if settings.quick else 1000
    functions, operands = _both(name, size)
    loops = (_loop(function, operands, length) for function in functions)
    contestants = [*map(Contestant, ("quake_jax", "jax.nn"), loops)]
    series = settings.read(contestants, ROUNDS)
    ours, theirs = ([1e6 * t / length for t in one.times] for one in series.values())
    difference = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = {"quake_jax": ours, "jax.nn": theirs, "difference": difference}
    found = {key: quartiles(values) for key, values in found.items()}
    return found | {"speed": paired_ratio(theirs, ours)}


def _both(name: str, size: int) -> tuple[Sequence[Callable], Sequence[jax.Array]]:
    """The function in quake_jax and in jax.nn, and its operands, the first as its result is."""
    if name != ATTENTION:
        operator = OPERATORS[name]
        x = jnp.asarray(np.linspace(-2, 2, size, dtype=np.float32))
        return (operator.of_quake_jax(SUBJECT_ORDER), operator.jax_nn), (x,)
    shape = (2, 1, size // HEADS, HEADS, HEAD_SIZE)
    keys, values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    modules = quake_jax("dot_product_attention"), jax.nn
    return [m.dot_product_attention for m in modules], (keys[:, :1], keys, values)


def _loop(function: Callable, operands: Sequence, length: int) -> Callable[[int], None]:
    # What does not change is given too: of constants XLA computes a part before.
    def loop(x, *others):
        return lax.fori_loop(0, length, lambda _, x: function(x, *others), x)

    operands = [*map(jnp.asarray, operands)]
    compiled = jax.jit(loop).lower(*operands).compile()
    return peers.repeat(lambda: compiled(*operands).block_until_ready(), operands[0])
