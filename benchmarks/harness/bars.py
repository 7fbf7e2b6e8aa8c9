"""The speeds that the project set itself as a goal, and whether a run reaches them.

Which ones is for each subject to say, in its module `goals`.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from benchmarks.harness.pages import Table, median

# Takes a figure from the entry of a result and the bar's subject; None if it was not measured.
Figure = Callable[[dict, str], float | None]


@dataclass(frozen=True)
class Kind:
    """What the figure of a bar is."""

    what: str  # the words for it
    unit: str
    figure: Figure
    at_least: bool = True  # whether the threshold is the least or the largest
    entries: str = "cases"  # which of a result's lists has the entry


@dataclass(frozen=True)
class Bar:
    """A limit for one figure of one case, for one instruction set and number of threads."""

    kind: Kind
    case: Any  # of the subject; as text it is what the bar is called
    threshold: float  # the least figure, or the largest where the kind says so
    subject: str  # whose figure it is, such as "order 3"
    # Those that begin with its name extend it: avx512bf16 is avx512 with other bfloat16 kernels.
    isa: str = "avx512"
    threads: int = 1

    @property
    def what(self) -> str:
        return self.kind.what.format(subject=self.subject)

    @property
    def name(self) -> str:
        return f"{self.case}, {self.what}"

    def holds(self, environment: dict) -> bool:
        """Whether a run under these conditions is judged by it."""
        isa = environment["isa"] or ""
        return environment["threads"] == self.threads and isa.startswith(self.isa)


# --- Figures that several subjects have


def against(other: str) -> Figure:
    """How many times as long the other takes."""
    return lambda entry, subject: median(entry["ratios"].get(subject, {}).get(other))


def least(entry: dict, subject: str, others: Iterable[str]) -> float | None:
    """Speed of a contestant over that of the fastest of these others which were measured."""
    ratios = entry["ratios"].get(subject, {})
    return min((ratios[other]["median"] for other in others if other in ratios), default=None)


def percent_of(limit: str) -> Figure:
    """The share of a limit of the hardware."""
    key = f"share_of_{limit}"
    return lambda entry, subject: percent(entry["contestants"].get(subject, {}).get(key))


def percent(share: dict | None) -> float | None:
    """The median of a share in percent, or None."""
    return 100 * share["median"] if share else None


def listed(key: str) -> Figure:
    """What the subject has in that part of an entry."""
    return lambda entry, subject: median(entry[key].get(subject))


def inverse(figure: Figure) -> Figure:
    """One over another figure: a speed of a time, a time of a speed."""

    def inverted(entry: dict, subject: str) -> float | None:
        found = figure(entry, subject)
        return None if found is None else 1 / found

    return inverted


# --- Judging


def figures(
    bars: Iterable[Bar], result: dict, case_of: Callable[[dict], Any]
) -> list[tuple[Bar, float]]:
    """The bars that hold for a run and whose figure it measured, each with the figure; `case_of`
    tells the case of an entry of the result.
    """
    entries = {
        name: [(case_of(entry), entry) for entry in result[name]]
        for name in {bar.kind.entries for bar in bars}
    }
    return [
        (bar, figure)
        for bar in bars
        if bar.holds(result["environment"])
        for case, entry in entries[bar.kind.entries]
        if case == bar.case and (figure := bar.kind.figure(entry, bar.subject)) is not None
    ]


def verdict(name: str, figure: float, threshold: float, unit: str, at_least: bool) -> dict:
    """What a result says of one bar."""
    return {
        "name": name,
        "figure": figure,
        "threshold": threshold,
        "unit": unit,
        "at_least": at_least,
        "met": figure >= threshold if at_least else figure <= threshold,
    }


def judge(
    result: dict,
    case_of: Callable[[dict], Any],
    bars: Iterable[Bar],
    means: Iterable[tuple[str, Collection[Bar], float]] = (),
) -> list[dict]:
    """Compare a run with bars: a verdict on each that it measured, and on geometric means: of each
    the name, the bars, and the least. Without the figures of all there is none, for it would be
    another figure.
    """
    verdicts = [
        verdict(bar.name, figure, bar.threshold, bar.kind.unit, bar.kind.at_least)
        for bar, figure in figures(bars, result, case_of)
    ]
    for name, wanted, least in means:
        found = [figure for _, figure in figures(wanted, result, case_of)]
        if len(found) == len(wanted):
            verdicts.append(verdict(name, geometric_mean(found), least, "×", at_least=True))
    return verdicts


def not_judged(bars: Iterable[Bar], result: dict) -> dict[str, int]:
    """How many bars hold for other instruction sets alone, by the name of the least one."""
    at = result["environment"]
    same = [bar for bar in bars if bar.threads == at["threads"]]
    return Counter(bar.isa for bar in same if not bar.holds(at))


def tables(result: dict) -> list[Table]:
    """The table of the bars, or none where a run is not judged."""
    if not result["bars"]:
        return []
    rows = [["bar", "figure", "wanted", ""]]
    for bar in sorted(result["bars"], key=lambda bar: bar["met"]):  # the missed ones first
        sign = "≥" if bar["at_least"] else "≤"
        figure, wanted = (f"{bar[key]:.2f} {bar['unit']}" for key in ("figure", "threshold"))
        rows.append([bar["name"], figure, f"{sign} {wanted}", "met" if bar["met"] else "MISSED"])
    missed = sum(not bar["met"] for bar in result["bars"])
    return [(f"Bars ({missed} of {len(result['bars'])} missed)", rows)]
