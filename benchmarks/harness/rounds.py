"""The contestants of cases that are timed in the same rounds, and what their readings amount to."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from benchmarks.harness import timing
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Settings
from benchmarks.harness.hardware import Ceilings
from benchmarks.harness.timing import Contestant, Series, paired_ratio


@dataclass
class Rounds:
    """The contestants, each of which is a case and a name, and the limits of the hardware, whose
    keys are names alone.
    """

    settings: Settings
    errors: dict[tuple, float | None] = field(default_factory=dict)
    contestants: list[Contestant] = field(default_factory=list)
    series: dict[Hashable, Series] = field(default_factory=dict)

    def add(
        self, case: Hashable, contestant: Contestant, error: float | None = None, sane: float = 0.0
    ) -> None:
        """Add a contestant; BenchmarkError if it has an error that is not below the sane one."""
        if error is not None and not error < sane:
            raise BenchmarkError(f"{contestant.name} is wrong at {case}: error {error:.2g}")
        contestant.name = case, contestant.name
        self.errors[contestant.name] = error
        self.contestants.append(contestant)

    def add_peak(self, ceilings: Ceilings, name: str) -> None:
        """Add the peak of an instruction."""
        peak = ceilings.peak(name)
        # Against readings that last long: over more of the clock's ups and downs.
        peak.calls = timing.calibrate(peak.run, 5 * self.settings.reading_seconds)
        self.contestants.append(peak)

    def names(self, case: Hashable) -> list[str]:
        """Those of the contestants of a case."""
        return [name for of, name in self.errors if of == case]

    def ratio(self, other: Hashable, subject: Hashable, scale: float = 1.0) -> dict[str, float]:
        """The time of one over another's, round by round: median and quartiles."""
        return paired_ratio(self.series[other].times, self.series[subject].times, scale)

    def ratios(self, case: Hashable, subjects: list[str], others: list[str]) -> dict[str, dict]:
        """The time of the other contestants of a case over that of each subject."""
        return {
            name: {
                other: self.ratio((case, other), (case, name)) for other in others if other != name
            }
            for name in subjects
        }

    def figures(self, case: Hashable, name: str, flops: float) -> dict:
        """The time of a contestant, and how its readings were taken."""
        series = self.series[case, name]
        milliseconds = series.quartiles(1e3)
        return {
            "ms": milliseconds,
            "gflops": 1e-6 * flops / milliseconds["median"],
            "error": self.errors[case, name],
            **series.conditions(),
        }
