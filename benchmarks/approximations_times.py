"""The time of an operator inside a jitted program, all candidates of a kind in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import cases, systems, timing
from benchmarks.approximations_cases import Candidate
from benchmarks.timing import Contestant, Quartiles

READING_SECONDS = 1e-3


def shape(quick: bool) -> tuple[int, ...]:
    """The shape of the operand, float32: it and the result fill the second-level cache."""
    return cases.QUICK_SHAPE if quick else cases.L2_SHAPE


def measure(
    candidates: Sequence[Candidate], rounds: int, quick: bool, advance: Callable[[], None]
) -> dict[str, dict]:
    """Time the candidates of one kind.

    Args:
        candidates: Of one kind.
        rounds: Interleaved rounds.
        quick: A small shape and short readings.
        advance: Called after each reading.

    Returns:
        By name `ns_per_element` as median and quartiles, `rejected` readings by reason, and how
        many of the rounds are `doubtful`.
    """
    # The function of a case decides only how many operands there are: one.
    case = cases.Case(candidates[0].kind, shape(quick), "float32")
    buffers = systems.Buffers(case)
    series = timing.measure(
        [Contestant(c.name, buffers.runner(c.function)) for c in candidates],
        rounds=rounds,
        target=READING_SECONDS / (5 if quick else 1),
        threads=1,
        advance=advance,
    )
    return {
        name: {
            "ns_per_element": Quartiles.of([1e9 * s / case.elements for s in one.times]).as_dict(),
            "rejected": one.rejected,
            "doubtful": one.doubtful,
        }
        for name, one in series.items()
    }
