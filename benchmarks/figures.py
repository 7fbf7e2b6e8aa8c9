"""Figures that tables, bars and plots take from one case of a result."""

from __future__ import annotations

from benchmarks.cases import SUBJECT_ORDER


def systems(case: dict) -> list[str]:
    """The contestants that compute the function: not the copies, not the clock."""
    return [name for name, entry in case["contestants"].items() if "relative_error" in entry]


def subject(case: dict) -> str:
    """Whose speed is stated: order 3, or the first of ours in a run without it."""
    name = f"order {SUBJECT_ORDER}"
    return name if name in case["ratios"] else next(iter(case["ratios"]))


def fastest(ratios: dict[str, dict]) -> tuple[str, dict] | None:
    """The other contestant with the least time over ours, and that ratio."""
    return min(ratios.items(), key=lambda item: item[1]["median"], default=None)


def share_of_copy(case: dict, name: str) -> float:
    """Bytes moved per second, relative to the fastest copy."""
    entries = case["contestants"]
    copied = entries[case["copy"]]["ns_per_element"]
    return case["traffic"] * copied / entries[name]["ns_per_element"]


def over_bound(case: dict, name: str) -> float | None:
    """Measured cycles over the counted bound; None where either is missing."""
    entry = case["contestants"][name]
    cycles, bound = entry.get("cycles_per_16"), entry.get("bound_cycles_per_16")
    return cycles / bound if cycles and bound else None
