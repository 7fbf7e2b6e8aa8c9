"""The run of `python -m benchmarks dense`.

All forms and formats of a layer are timed in the same rounds, and with them the limits of the
hardware: the peaks of the instructions that multiply, and for few rows the fastest way to read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from benchmarks.dense import cases as all_cases
from benchmarks.dense import goals, systems
from benchmarks.dense.cases import (
    FORMATS,
    LAYERS,
    LONG_FLOPS,
    MOST_GFLOPS,
    NORM_DTYPES,
    NORMS,
    PACKED,
    QUICK_SHAPES,
    ROUNDS,
    ROWS,
    SCALED,
    SHAPES,
    Case,
    Shape,
)
from benchmarks.dense.peers import Peers
from benchmarks.dense.systems import Entry, Layer
from benchmarks.harness import environment, processes, timing
from benchmarks.harness.errors import BenchmarkError, quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.hardware import BFLOAT16, FMA, INT8, Ceilings
from benchmarks.harness.timing import Contestant, Quartiles, Series, paired_ratio

# A contestant beyond this error, relative to the largest element, computes something else.
SANE_ERROR = {"int4": 0.3, "int8": 0.1, "bfloat16": 0.05, "float32": 1e-3}
# Which peak is the limit of a format; of weights alone the products are float32's.
PEAK = {"float32": FMA, "bfloat16": BFLOAT16, "int8": INT8, "int4/32": INT8, "int4/128": INT8}
QUICK_BYTES = 4 << 20
ATTEMPTS = 3  # of a reading, which may last for seconds
PACKING_ROUNDS = 3


def peak_of(format_: str, peaks: Container[str]) -> str | None:
    """The name of the peak that limits a format, or None if it is not among these. Without an
    instruction of its own bfloat16 is widened to float32.
    """
    name = PEAK.get(format_, FMA)
    if name == BFLOAT16 and name not in peaks:
        name = FMA
    return name if name in peaks else None


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    shapes = QUICK_SHAPES if args.quick else SHAPES
    everything = args.threads == 1 and not (args.layer or args.quick)
    if args.layer or args.rows:
        shapes = [Shape(m, k, n) for k, n in args.layer or LAYERS for m in args.rows or ROWS]
    earlier = _earlier(args)
    measured, norms, packing = (earlier.get(key, []) for key in ("cases", "norms", "packing"))
    done = {goals.case_of(entry).shape for entry in measured}
    shapes = [shape for shape in dict.fromkeys(shapes) if shape not in done]
    settings = Settings.of(args, reading_seconds=(2e-3, 2e-4))
    quake_jax("pack_weight")  # is it there?
    ceilings = Ceilings(environment.describe(args.threads)["isa"], args.threads)
    left_out = {"peak and read": ceilings.left_out} if ceilings.left_out else {}
    peers = Peers(args.threads, settings.reading_seconds) if args.peers else None
    left_out |= peers.left_out if peers else {}
    # Twice the cache: nothing of a copy is left when its turn comes again.
    run = Run(settings, ceilings, peers, QUICK_BYTES if args.quick else 0)
    compared = list(SCALED) if args.threads == 2 and not args.quick else []
    with progress(len(shapes) + 2 * len(compared) + everything) as bar:
        for shape in bar.over(shapes, str):
            measured += run.measure(all_cases.choose(shape, args.form), bar.advance)
        bar.show("one thread against two" if compared else "")
        scaling = _scaling(compared, settings, bar.advance)
        if everything and not packing:
            bar.show("norms, and packing a model")
            norms, packing = _norms(settings), _packing(settings)
            bar.advance()
    result = {
        "benchmark": "dense" if args.allocator == "keep" else "dense, system allocator",
        "environment": environment.describe(args.threads),
        "settings": {"walked_bytes": run.walked, **settings.as_dict()},
        "left_out": left_out,
        "cases": sorted(measured, key=lambda entry: (entry["k"], entry["n"], entry["m"])),
        "scaling": scaling,
        "norms": norms,
        "packing": packing,
    }
    result["bars"] = [] if args.quick else goals.judge(result)
    result["bars_not_judged"] = goals.not_judged(result)
    result["bars_not_measured"] = goals.not_measured(result)
    return result


def _earlier(args: argparse.Namespace) -> dict:
    """The result that the run resumes; empty where there is none."""
    if not (args.resume and args.json and args.json.exists()):
        return {}
    return json.loads(args.json.read_text())


def _scaling(shapes: list[Shape], settings: Settings, advance: Callable[[], None]) -> list[dict]:
    """One thread against two."""
    compared = [(shape, name) for shape in shapes for name in ("float32", "int8")]
    found = processes.two_threads(
        compared,
        _quake,
        settings.rounds or ROUNDS,
        settings.reading_seconds,
        settings.allocator == "keep",
        advance,
    )
    return [
        {**vars(shape), "form": "bias", "subject": name, **entry}
        for (shape, name), entry in zip(compared, found, strict=True)
    ]


def _norms(settings: Settings) -> list[dict]:
    """Norms that are operators of their own against XLA's."""
    entries = []
    for name in NORMS:
        for dtype in NORM_DTYPES:
            both = systems.norm(name, dtype)
            ours, xla = (series.times for series in settings.read(both, ROUNDS).values())
            entries.append(
                {
                    "case": goals.norm_case(name),
                    "subject": dtype,
                    "us": Quartiles.of(ours).scaled(1e6).as_dict(),
                    "speed": paired_ratio(xla, ours).as_dict(),
                }
            )
    return entries


def _packing(settings: Settings) -> list[dict]:
    """Packing the weights of a model, in rounds after one that compiles."""
    contestants = {name: systems.packing(name) for name in PACKED}
    for contestant in contestants.values():
        contestant.run(1)
    read = settings.read(list(contestants.values()), PACKING_ROUNDS, shortest=1.0)
    return [
        {
            "case": goals.MODEL,
            "subject": name,
            "seconds": Quartiles.of(read[contestant.name].times).as_dict(),
        }
        for name, contestant in contestants.items()
    ]


def _quake(compared: tuple[Shape, str]) -> Callable[[int], None]:
    shape, name = compared
    for entry in systems.in_jax(Layer(shape), "bias", 1e-3, 1):
        if entry.contestant.name == f"quake {name}":
            return entry.contestant.run
    raise ValueError(name)


@dataclass
class Run:
    """What is the same for all shapes.

    Attributes:
        settings: How readings are taken.
        ceilings: The limits of the hardware.
        peers: Makes the contestants of other libraries, or None.
        walked: Bytes of the copies through which the weights of few rows walk; 0 for twice the
            last-level cache.
    """

    settings: Settings
    ceilings: Ceilings
    peers: Peers | None = None
    walked: int = 0

    def __post_init__(self):
        self.walked = self.walked or 2 * systems.last_level_cache()

    def measure(self, cases: list[Case], advance: Callable[[float], None]) -> list[dict]:
        """Measure all cases of one shape in the same rounds.

        Their entries of the result have `contestants` with milliseconds, GFLOP/s, GB/s of weights
        and `share_of_` peaks and reading, `ratios` of the time of each other contestant to each of
        ours, and in `relative` the time of ours to that of ours without what is fused. `advance` is
        called after each reading with its share of the whole.
        """
        shape = cases[0].shape
        gathered = self._gathered(cases)
        everyone = [entry.contestant for entry in gathered.entries.values()]
        gathered.series = self.settings.read(
            everyone + gathered.limits,
            all_cases.rounds(shape),
            advance,
            shortest=shape.flops / (1e9 * MOST_GFLOPS * self.settings.threads),
            attempts=ATTEMPTS,
        )
        for entry in gathered.entries.values():
            series = gathered.series[entry.contestant.name]
            series.times = [seconds / entry.copies for seconds in series.times]
        return [self._entry(case, gathered) for case in cases]

    def _gathered(self, cases: list[Case]) -> Gathered:
        """Make and check the contestants of all cases."""
        gathered, shape = Gathered(), cases[0].shape
        layer = Layer(shape, self.walked)
        for case in cases:
            seconds, threads = self.settings.reading_seconds, self.settings.threads
            made = list(systems.in_jax(layer, case.form, seconds, threads))
            made += self.peers.entries(layer, case.form) if self.peers else []
            for entry in made:
                name = entry.contestant.name
                entry.contestant.run(1)
                error = layer.error(case.form, entry.result(), entry.erf)
                if not error < SANE_ERROR[FORMATS[entry.format]["dtype"]]:
                    raise BenchmarkError(f"{name} is wrong at {case}: {error:.2g}")
                gathered.errors[case, name] = error
                gathered.entries[case, name] = entry
                entry.contestant.name = _full(case, name)
                if shape.flops * entry.copies > LONG_FLOPS * threads:
                    entry.contestant.calls = 1
        if not self.ceilings.left_out:
            self._add_limits(gathered, layer)
        return gathered

    def _add_limits(self, gathered: Gathered, layer: Layer) -> None:
        for name in self.ceilings.peaks:
            peak = self.ceilings.peak(name)
            # Against readings that last long: over more of the clock's ups and downs.
            peak.calls = timing.calibrate(peak.run, 5 * self.settings.reading_seconds)
            gathered.limits.append(peak)
        if layer.shape.walks:
            arrays = [systems.view(copy.codes) for copy in layer.known("quake float32")]
            gathered.bytes_read = sum(array.nbytes for array in arrays)
            gathered.reads = self.ceilings.reads(arrays)
            gathered.limits += gathered.reads

    def _entry(self, case: Case, gathered: Gathered) -> dict:
        """The entry of a case in the result."""
        names = [name for of, name in gathered.entries if of == case]
        ours = [name for name in names if name.startswith("quake ")]
        bare = Case(case.shape, "bias")
        peaks = {
            name: 1e-9 * work / Quartiles.of(gathered.series[name].times).median
            for name, work in self.ceilings.peaks.items()
        }

        read = None
        if gathered.reads:
            way = gathered.fastest_read()
            seconds = Quartiles.of(gathered.series[way].times).median
            read = {"way": way, "gbps": 1e-9 * gathered.bytes_read / seconds}

        def ratio(subject: str, other: str, of: Case = case) -> dict[str, float]:
            return gathered.ratio(_full(of, other), _full(case, subject)).as_dict()

        return {
            **vars(case.shape),
            "form": case.form,
            "rounds": self.settings.rounds or all_cases.rounds(case.shape),
            "peaks_gflops": peaks,
            "read": read,
            "contestants": {name: self._figures(case, name, gathered) for name in names},
            "ratios": {
                name: {other: ratio(name, other) for other in names if other != name}
                for name in ours
            },
            "relative": {
                name: gathered.ratio(_full(case, name), _full(bare, name)).as_dict()
                for name in ours
                if case != bare and (bare, name) in gathered.entries
            },
        }

    def _figures(self, case: Case, name: str, gathered: Gathered) -> dict:
        """The figures of a contestant of a case."""
        full, entry = _full(case, name), gathered.entries[case, name]
        series = gathered.series[full]
        milliseconds = Quartiles.of(series.times).scaled(1e3)
        peak = peak_of(entry.format, gathered.series)
        figures = {
            "ms": milliseconds.as_dict(),
            "gflops": 1e-6 * case.shape.flops / milliseconds.median,
            "weight_gbps": 1e-6 * entry.weight_bytes / milliseconds.median,
            "copies": entry.copies,
            "error": gathered.errors[case, name],
            **series.conditions(),
        }
        if peak:
            work = self.ceilings.peaks[peak]
            share = gathered.ratio(peak, full).scaled(case.shape.flops / work)
            figures["share_of_peak"] = share.as_dict()
        if gathered.reads:
            read = gathered.fastest_read()
            share = gathered.ratio(read, full).scaled(entry.weight_bytes / gathered.bytes_read)
            figures["share_of_read"] = share.as_dict()
        return figures


@dataclass
class Gathered:
    """The contestants of all cases of a shape, and their readings.

    Attributes:
        entries: The contestants, by case and name.
        errors: Of each of them.
        limits: The contestants of the hardware.
        reads: Those of them that read, and `bytes_read`.
        series: The readings, by the contestants' full names.
    """

    entries: dict[tuple[Case, str], Entry] = field(default_factory=dict)
    errors: dict[tuple[Case, str], float] = field(default_factory=dict)
    limits: list[Contestant] = field(default_factory=list)
    reads: list[Contestant] = field(default_factory=list)
    bytes_read: int = 0
    series: dict[str, Series] = field(default_factory=dict)

    def ratio(self, other: str, subject: str) -> Quartiles:
        """The time of one contestant over another's, round by round."""
        return paired_ratio(self.series[other].times, self.series[subject].times)

    def fastest_read(self) -> str:
        """The name of the fastest way to read."""
        names = [contestant.name for contestant in self.reads]
        return min(names, key=lambda name: Quartiles.of(self.series[name].times).median)


def _full(case: Case, name: str) -> str:
    """A contestant's name among those of all cases of a shape."""
    return f"{case.form} {name}"
