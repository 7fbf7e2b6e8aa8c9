"""Which order each function should have by default, decided from a result.

It is the highest order that takes at most 5 % longer than order 3, on float32 in the L2 cache.
"""

from __future__ import annotations

from benchmarks.ops.cases import SUBJECT_ORDER, decides

ALLOWED = 1.05
CANDIDATES = (3, 4, 5)


def decide(cases: list[dict]) -> list[dict]:
    """For each function that a run measured with all candidates its name, the time of each
    candidate relative to order 3 (by order, as median and quartiles), and the `default`.
    """
    decided = []
    for case in cases:
        if not decides(case["function"], case["shape"], case["dtype"]):
            continue
        times = {order: case["relative_times"].get(f"order {order}") for order in CANDIDATES}
        if None in times.values():
            continue
        allowed = [order for order, time in times.items() if time["median"] <= ALLOWED]
        decided.append(
            {
                "function": case["function"],
                "times": {f"order {order}": time for order, time in times.items()},
                "default": max(allowed, default=SUBJECT_ORDER),
            }
        )
    return decided
