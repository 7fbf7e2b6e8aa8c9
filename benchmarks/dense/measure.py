"""The run of `python -m benchmarks dense`.

All forms and formats of a layer are timed in the same rounds, and with them the limits of the
hardware: the peaks of the instructions that multiply, and for few rows the fastest way to read.
"""

import argparse
from collections.abc import Callable, Container
from dataclasses import dataclass

from benchmarks.dense import cases as all_cases
from benchmarks.dense import goals, systems
from benchmarks.dense.cases import FORMATS, LONG_FLOPS, ROUNDS, Case, Shape
from benchmarks.dense.peers import Peers
from benchmarks.dense.systems import Entry, Layer
from benchmarks.harness import hardware, processes
from benchmarks.harness.errors import quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.hardware import FMA, Ceilings
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.timing import Contestant, paired_ratio

# A contestant beyond this error, relative to the largest element, computes something else.
SANE_ERROR = {"int4": 0.3, "int8": 0.1, "bfloat16": 0.05, "float32": 1e-3}
# Which peaks limit a format, the first that there is: without an instruction of its own bfloat16 is
# widened to float32; of weights alone the products are float32's.
INTEGERS = (hardware.MATRIX_INT8, hardware.INT8)
PEAKS = {
    "bfloat16": (hardware.MATRIX_BFLOAT16, hardware.BFLOAT16, FMA),
    **dict.fromkeys(("int8", "int4/32", "int4/128"), INTEGERS),
}
QUICK_BYTES = 4 << 20
ATTEMPTS = 3  # of a reading, which may last for seconds
PACKING_ROUNDS = 3


def peak_of(format_: str, peaks: Container[str]) -> str | None:
    """The name of the peak that limits a format, or None if it is not among these."""
    wanted = PEAKS.get(all_cases.precision(format_), (FMA,))
    return next((name for name in wanted if name in peaks), None)


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    shapes = all_cases.QUICK_SHAPES if args.quick else all_cases.SHAPES
    everything = args.threads == 1 and not (args.layer or args.quick)
    if args.layer or args.rows:
        layers, rows = args.layer or all_cases.LAYERS, args.rows or all_cases.ROWS
        shapes = [Shape(m, k, n) for k, n in layers for m in rows]
    settings = Settings.of(args, reading_seconds=(2e-3, 2e-4))
    ceilings = Ceilings(quake_jax("pack_weight").isa(), args.threads)
    left_out = {"peak and read": ceilings.left_out} if ceilings.left_out else {}
    peers = Peers(args.threads, settings.reading_seconds) if args.peers else None
    left_out |= peers.left_out if peers else {}
    # Twice the cache: nothing of a copy is left when its turn comes again.
    walked = QUICK_BYTES if args.quick else 2 * systems.last_level_cache()
    run = Run(settings, ceilings, peers, walked)
    compared = []
    if args.threads == 2 and not args.quick:
        compared = [(shape, name) for shape in all_cases.SCALED for name in ("float32", "int8")]
    measured = []
    with progress(len(shapes) + len(compared) + everything) as bar:
        for shape in bar.over(dict.fromkeys(shapes), str):
            measured += run.measure(all_cases.choose(shape, args.form), bar.advance)
        scaling = processes.two_threads(settings, compared, _quake, _described, ROUNDS, bar)
        norms, packing = [], []
        if everything:
            bar.show("norms, and packing a model")
            norms, packing = _norms(settings), _packing(settings)
            bar.advance()
    result = settings.result(
        {"walked_bytes": run.walked},
        goals,
        left_out=left_out,
        cases=measured,
        scaling=scaling,
        norms=norms,
        packing=packing,
    )
    return result | {"bars_not_measured": goals.not_measured(result)}


def _described(compared: tuple[Shape, str]) -> dict:
    shape, name = compared
    return {**vars(shape), "form": "bias", "subject": name}


def _quake(compared: tuple[Shape, str]) -> Callable[[int], None]:
    shape, name = compared
    made = systems.in_jax(Layer(shape), "bias", 1e-3, 1)
    return next(e.contestant.run for e in made if e.contestant.name == goals.name_of(name))


def _norms(settings: Settings) -> list[dict]:
    """Norms that are operators of their own against XLA's."""
    entries = []
    for name in all_cases.NORMS:
        for dtype in all_cases.NORM_DTYPES:
            ours, xla = settings.read(systems.norm(name, dtype), ROUNDS).values()
            entries.append(
                {
                    "case": goals.norm_case(name),
                    "subject": dtype,
                    "us": ours.quartiles(1e6),
                    "speed": paired_ratio(xla.times, ours.times),
                }
            )
    return entries


def _packing(settings: Settings) -> list[dict]:
    """Packing the weights of a model, in rounds after one that compiles."""
    contestants = {name: systems.packing(name) for name in all_cases.PACKED}
    for contestant in contestants.values():
        contestant.run(1)
    read = settings.read(list(contestants.values()), PACKING_ROUNDS, shortest=1.0)
    return [
        {"case": goals.MODEL, "subject": name, "seconds": read[contestant.name].quartiles()}
        for name, contestant in contestants.items()
    ]


@dataclass
class Run:
    """What is the same for all shapes."""

    settings: Settings
    ceilings: Ceilings
    peers: Peers | None = None  # makes the contestants of other libraries
    walked: int = 0  # bytes of the copies through which the weights of few rows walk

    def measure(self, cases: list[Case], advance: Callable[[float], None]) -> list[dict]:
        """Measure all cases of one shape in the same rounds.

        Their entries of the result have `contestants` with milliseconds, GFLOP/s, GB/s of weights
        and `share_of_` peaks and reading, `ratios` of the time of each other contestant to each of
        ours, and in `relative` the time of ours to that of ours without what is fused. `advance` is
        called after each reading with its share of the whole.
        """
        rounds, shape = Rounds(self.settings), cases[0].shape
        layer, threads = Layer(shape, self.walked), self.settings.threads
        entries: dict[tuple[Case, str], Entry] = {}
        for case in cases:
            made = [*systems.in_jax(layer, case.form, self.settings.reading_seconds, threads)]
            made += self.peers.entries(layer, case.form) if self.peers else []
            for entry in made:
                entry.contestant.run(1)
                error = layer.error(case.form, entry.result(), entry.erf)
                sane = SANE_ERROR[FORMATS[entry.format]["dtype"]]
                rounds.add(case, entry.contestant, error, sane)
                entries[entry.contestant.name] = entry
                if shape.flops * entry.copies > LONG_FLOPS * threads:
                    entry.contestant.calls = 1
        reads, bytes_read = self._add_limits(rounds, layer)
        rounds.series = self.settings.read(
            rounds.contestants,
            all_cases.rounds(shape),
            advance,
            shortest=shape.flops / (1e9 * all_cases.MOST_GFLOPS * threads),
            attempts=ATTEMPTS,
        )
        for name, entry in entries.items():
            series = rounds.series[name]
            series.times = [seconds / entry.copies for seconds in series.times]
        read = min((r.name for r in reads), key=lambda r: rounds.series[r].median, default=None)
        return [self._entry(case, rounds, entries, read, bytes_read) for case in cases]

    def _add_limits(self, rounds: Rounds, layer: Layer) -> tuple[list[Contestant], int]:
        """Add the limits of the hardware; those of them that read, and how many bytes."""
        if self.ceilings.left_out:
            return [], 0
        for name in self.ceilings.peaks:
            rounds.add_peak(self.ceilings, name)
        if not layer.shape.walks:
            return [], 0
        arrays = layer.codes("quake float32")
        reads = self.ceilings.reads(arrays)
        rounds.contestants += reads
        return reads, sum(array.nbytes for array in arrays)

    def _entry(
        self,
        case: Case,
        rounds: Rounds,
        entries: dict[tuple[Case, str], Entry],
        read: str | None,
        bytes_read: int,
    ) -> dict:
        """The entry of a case in the result; `read` is the fastest way to read."""
        names, series, peaks = rounds.names(case), rounds.series, self.ceilings.peaks
        contestants = {}
        for name in names:
            key, entry = (case, name), entries[case, name]
            figures = rounds.figures(case, name, case.shape.flops)
            figures["weight_gbps"] = 1e-6 * entry.weight_bytes / figures["ms"]["median"]
            figures["copies"] = entry.copies
            if peak := peak_of(entry.format, series):
                share = case.shape.flops / peaks[peak]
                figures["share_of_peak"] = rounds.ratio(peak, key, share)
            if read:
                share = entry.weight_bytes / bytes_read
                figures["share_of_read"] = rounds.ratio(read, key, share)
            contestants[name] = figures
        ours, bare = [name for name in names if name.startswith("quake ")], Case(case.shape, "bias")
        return {
            **vars(case.shape),
            "form": case.form,
            "rounds": self.settings.rounds or all_cases.rounds(case.shape),
            "peaks_gflops": {name: 1e-9 * peaks[name] / series[name].median for name in peaks},
            "read": read and {"way": read, "gbps": 1e-9 * bytes_read / series[read].median},
            "contestants": contestants,
            "ratios": rounds.ratios(case, ours, names),
            "relative": {
                name: rounds.ratio((case, name), (bare, name))
                for name in ours
                if case != bare and (bare, name) in entries
            },
        }
