"""The time of an operator inside a jitted program, all candidates of a kind in the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.approximations.cases import Candidate
from benchmarks.harness.frame import Settings
from benchmarks.harness.timing import Contestant, Quartiles
from benchmarks.ops import cases, systems


def shape(quick: bool) -> tuple[int, ...]:
    """The shape of the operand, float32: it and the result fill the second-level cache."""
    return cases.QUICK_SHAPE if quick else cases.L2_SHAPE


def measure(
    candidates: Sequence[Candidate], settings: Settings, advance: Callable[[float], None]
) -> dict[str, dict]:
    """Time the candidates of one kind: by name `ns_per_element` as median and quartiles, and the
    conditions of the readings. `advance` is called after each with its share of the whole.
    """
    # The function of a case decides only how many operands there are: one.
    case = cases.Case("exp", shape(settings.quick), "float32")
    buffers = systems.Buffers(case)
    contestants = [Contestant(c.name, buffers.runner(c.function)) for c in candidates]
    series = settings.read(contestants, settings.rounds, advance)
    return {
        name: {
            "ns_per_element": Quartiles.of(one.times).scaled(1e9 / case.elements).as_dict(),
            **one.conditions(),
        }
        for name, one in series.items()
    }
