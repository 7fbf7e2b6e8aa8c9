"""The run of `python -m benchmarks attention`.

All dtypes and masks of a shape are timed in the same rounds, and with them the two limits of the
hardware: the peak of fused multiply-adds, and for one query the bandwidth of reading.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.attention import cases as all_cases
from benchmarks.attention import goals, systems
from benchmarks.attention.cases import (
    DECODE,
    DEFAULT_ORDERS,
    DTYPES,
    GPT,
    HUGE_FLOPS,
    LONG_FLOPS,
    MOST_GFLOPS,
    QUICK_SHAPE,
    ROUNDS,
    SHAPES,
    SUBJECT_ORDER,
    VIT_BATCH,
    Case,
    Shape,
)
from benchmarks.harness import environment, processes, timing
from benchmarks.harness.errors import BenchmarkError, missing, quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.hardware import FMA, READ, Ceilings
from benchmarks.harness.timing import Contestant, Quartiles, Series, paired_ratio

# A contestant beyond this error, relative to the largest element, computes something else.
SANE_ERROR = 0.1
# The batch, and the heads of one row, one head alone, and reading: each is divided differently.
SCALED = (VIT_BATCH, GPT, Shape.parse("1,1024,1,64"), DECODE)


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    shapes = list(dict.fromkeys(args.shape or ([QUICK_SHAPE] if args.quick else SHAPES)))
    dtypes = args.dtype or (DTYPES[:1] if args.quick else DTYPES)
    settings = Settings.of(args, reading_seconds=(2e-3, 2e-4))
    quake_jax("dot_product_attention")  # is it there?
    left_out = {}
    ceilings = Ceilings(environment.describe(args.threads)["isa"], args.threads)
    if ceilings.left_out:
        left_out["peak and read"] = ceilings.left_out
    if args.peers and missing("torch"):
        left_out["torch"] = "torch not installed"
    torch = systems.Torch(args.threads) if args.peers and not missing("torch") else None
    run = Run(settings, sorted(set(args.order or DEFAULT_ORDERS)), ceilings, torch)
    compared = []
    if args.threads == 2 and not args.quick:
        compared = [Case(shape, "none", "float32") for shape in SCALED]
    measured = []
    with progress(len(shapes) + len(compared)) as bar:
        for shape in bar.over(shapes, lambda shape: shape.text):
            measured += run.measure(all_cases.choose(shape, dtypes, args.mask), bar.advance)
        bar.show("one thread against two" if compared else "")
        speedups = _scaling(compared, settings, bar.advance)
    result = {
        # Names the section of a Markdown file: either allocator has its own.
        "benchmark": "attention" if args.allocator == "keep" else "attention, system allocator",
        "environment": environment.describe(args.threads),
        "settings": {"orders": run.orders, **settings.as_dict()},
        "left_out": left_out,
        "cases": measured,
        "scaling": speedups,
    }
    result["bars"] = [] if args.quick else goals.judge(result)
    return result


def _scaling(compared: list[Case], settings: Settings, advance: Callable[[], None]) -> list[dict]:
    """One thread against two at the default order."""
    found = processes.two_threads(
        compared,
        _quake,
        settings.rounds or ROUNDS,
        settings.reading_seconds,
        settings.allocator == "keep",
        advance,
    )
    return [
        {"shape": case.shape.text, "mask": case.mask, "dtype": case.dtype, **entry}
        for case, entry in zip(compared, found, strict=True)
    ]


def _quake(case: Case) -> Callable[[int], None]:
    return systems.quake(systems.Buffers(case), SUBJECT_ORDER).run


@dataclass
class Run:
    """What is the same for all shapes.

    Attributes:
        settings: How readings are taken.
        orders: Ours.
        ceilings: The limits of the hardware.
        torch: Makes torch's contestants, or None.
    """

    settings: Settings
    orders: list[int]
    ceilings: Ceilings
    torch: systems.Torch | None = None

    def measure(self, cases: list[Case], advance: Callable[[float], None]) -> list[dict]:
        """Measure all cases of one shape in the same rounds.

        Their entries of the result have `contestants` with milliseconds, GFLOP/s, the `share_of_`
        peak and reading and what was rejected, `ratios` of the time of each other contestant to
        each of ours, round by round, and in `relative` the time of ours to that of ours without a
        mask, with is_causal, and in float32. `advance` is called after each reading with its share
        of the whole.
        """
        readings = self._gathered(cases)
        least = min(case.flops for case in cases)
        readings.series = self.settings.read(
            readings.everyone,
            all_cases.rounds(cases[0].shape),
            advance,
            shortest=least / (1e9 * MOST_GFLOPS * self.settings.threads),
        )
        return [self._entry(case, readings) for case in cases]

    def _gathered(self, cases: list[Case]) -> Readings:
        """Make and check the contestants of all cases."""
        gathered, shared = Readings(), {}
        for case in cases:
            buffers = systems.Buffers(case, shared)
            for contestant in self._of(case, buffers):
                error = buffers.error_of(contestant)
                if not error < SANE_ERROR:
                    raise BenchmarkError(f"{contestant.name} is wrong at {case}: {error:.2g}")
                gathered.errors[case, contestant.name] = error
                contestant.name = _full(case, contestant.name)
                if case.flops > LONG_FLOPS * self.settings.threads:
                    contestant.calls = 1
                gathered.everyone.append(contestant)
            reading = f"{case.dtype} {READ}"
            if case.shape.decodes and not self.ceilings.left_out and reading not in gathered.bytes:
                arrays = buffers.sources[1:3]
                gathered.bytes[reading] = sum(array.nbytes for array in arrays)
                gathered.everyone.append(self.ceilings.read(reading, arrays))
        if not self.ceilings.left_out:
            fma = self.ceilings.fma()
            # Against readings that last long: over more of the clock's ups and downs.
            fma.calls = timing.calibrate(fma.run, 5 * self.settings.reading_seconds)
            gathered.everyone.append(fma)
        return gathered

    def _of(self, case: Case, buffers: systems.Buffers) -> list[Contestant]:
        ours = [systems.quake(buffers, order) for order in self.orders]
        # To them an array is what is_causal is; seconds a call are not worth to show it again.
        if case.mask == "causal array" and case.shape.flops > HUGE_FLOPS:
            return ours
        others = [systems.xla(buffers)]
        if self.torch is not None:
            others.append(self.torch.contestant(buffers, self.settings.reading_seconds))
        return ours + others

    def _entry(self, case: Case, readings: Readings) -> dict:
        """The entry of a case in the result."""
        names = [name for of, name in readings.errors if of == case]
        ours = [f"order {order}" for order in self.orders]
        others = [name for name in names if name not in ours]
        peak = None
        if FMA in readings.series:
            seconds = Quartiles.of(readings.series[FMA].times).median
            peak = 1e-9 * self.ceilings.flops_per_call / seconds

        def compared(other: str, name: str) -> dict[str, float]:
            return readings.ratio(other, _full(case, name)).as_dict()

        return {
            "shape": case.shape.text,
            "mask": case.mask,
            "dtype": case.dtype,
            "gflop": 1e-9 * case.flops,
            "rounds": self.settings.rounds or all_cases.rounds(case.shape),
            "peak_gflops": peak,
            "contestants": {name: self._figures(case, name, readings) for name in names},
            "ratios": {
                name: {other: compared(_full(case, other), name) for other in others}
                for name in ours
            },
            "relative": {
                to: {
                    name: readings.ratio(_full(case, name), _full(other, name)).as_dict()
                    for name in ours
                }
                for to, other in case.references.items()
                if (other, ours[0]) in readings.errors
            },
        }

    def _figures(self, case: Case, name: str, readings: Readings) -> dict:
        """The figures of a contestant of a case."""
        full = _full(case, name)
        milliseconds = Quartiles.of(readings.series[full].times).scaled(1e3)
        figures = {
            "ms": milliseconds.as_dict(),
            "gflops": 1e-6 * case.flops / milliseconds.median,
            "error": readings.errors[case, name],
            **readings.series[full].conditions(),
        }
        if FMA in readings.series:
            share = readings.ratio(FMA, full).scaled(case.flops / self.ceilings.flops_per_call)
            figures["share_of_peak"] = share.as_dict()
        reading = f"{case.dtype} {READ}"
        if reading in readings.bytes:
            share = readings.ratio(reading, full).scaled(case.bytes_read / readings.bytes[reading])
            figures["share_of_read"] = share.as_dict()
        return figures


@dataclass
class Readings:
    """The contestants of all cases of a shape, and their readings.

    Attributes:
        everyone: The contestants, whose names tell their cases too.
        errors: Of each contestant, by case and name.
        bytes: How many the contestants read that only read, by name.
        series: The readings, by the contestants' full names.
    """

    everyone: list[Contestant] = field(default_factory=list)
    errors: dict[tuple[Case, str], float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)

    def ratio(self, other: str, subject: str) -> Quartiles:
        """The time of one contestant over another's, round by round."""
        return paired_ratio(self.series[other].times, self.series[subject].times)


def _full(case: Case, name: str) -> str:
    """A contestant's name among those of all cases of a shape."""
    return f"{case.dtype} {case.mask} {name}"
