"""The speeds that the project set itself as a goal, and whether a run reaches them.

They hold for one thread with AVX-512; a run under other conditions is not judged.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import GPT_SHAPE, L2_SHAPE, VIT_SHAPE

THREADS = 1
ISA = "avx512"
CALL_OVERHEAD_US = 1.0  # of one operator of 16 elements inside a jitted program, over XLA's own


@dataclass(frozen=True)
class Bar:
    """The least speed of one operator relative to another library.

    Attributes:
        function: Name of the operator.
        shape: Shape of its input.
        dtype: dtype of its input.
        order: Order of the approximation.
        threshold: Least ratio of the other's time to ours.
        against: Name of the other contestant, or "fastest" of all of them.
    """

    function: str
    shape: tuple[int, ...]
    dtype: str
    order: int
    threshold: float
    against: str = "jax.nn"


BARS = (
    Bar("softmax", VIT_SHAPE, "float32", 3, 3.2),
    Bar("softmax", L2_SHAPE, "float32", 3, 2.8),
    Bar("softmax", GPT_SHAPE, "float32", 3, 3.5),
    Bar("softmax", L2_SHAPE, "float32", 1, 3.5),
    Bar("exp", VIT_SHAPE, "float32", 3, 3.0),
    Bar("gelu_tanh", VIT_SHAPE, "float32", 3, 3.0),
    Bar("gelu_erf", VIT_SHAPE, "float32", 3, 4.0),
    Bar("sigmoid", VIT_SHAPE, "float32", 3, 2.0),
)


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars.

    Args:
        result: The run's result as `benchmarks.ops` makes it.

    Returns:
        One dictionary per bar that the run measured: name, figure, threshold, unit, met.
    """
    environment = result["environment"]
    if environment["threads"] != THREADS or environment["isa"] != ISA:
        return []
    verdicts = []
    for bar in BARS:
        figure = _ratio(bar, result["cases"])
        if figure is not None:
            shape = "×".join(map(str, bar.shape))
            verdicts.append(
                {
                    "name": f"{bar.function} {shape} {bar.dtype}, order {bar.order}, "
                    f"against {bar.against}",
                    "figure": figure,
                    "threshold": bar.threshold,
                    "unit": "×",
                    "met": figure >= bar.threshold,
                }
            )
    for name, overhead in (result["call_overhead"] or {}).items():
        verdicts.append(
            {
                "name": f"call overhead, {name}, 16 elements",
                "figure": overhead["difference_us"],
                "threshold": CALL_OVERHEAD_US,
                "unit": "µs",
                "met": overhead["difference_us"] <= CALL_OVERHEAD_US,
            }
        )
    return verdicts


def _ratio(bar: Bar, cases: list[dict]) -> float | None:
    for case in cases:
        if (case["function"], tuple(case["shape"]), case["dtype"]) != (
            bar.function,
            bar.shape,
            bar.dtype,
        ):
            continue
        ratios = case["ratios"].get(f"order {bar.order}", {})
        if bar.against == "fastest":
            return min((ratio["median"] for ratio in ratios.values()), default=None)
        return ratios[bar.against]["median"] if bar.against in ratios else None
    return None
