"""The run of `python -m benchmarks attention`.

All dtypes and masks of a shape are timed in the same rounds, and with them the two limits of the
hardware: the peak of fused multiply-adds, and for one query the bandwidth of reading.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.attention import cases as all_cases
from benchmarks.attention import goals, systems
from benchmarks.attention.cases import SUBJECT_ORDER, Case, Shape
from benchmarks.attention.peers import Peers
from benchmarks.harness import processes
from benchmarks.harness.errors import quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.hardware import FMA, READ, Ceilings
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.timing import Contestant

# A contestant beyond this error, relative to the largest element, computes something else.
SANE_ERROR = 0.1
# The batch, and the heads of one row, one head alone, and reading: each is divided differently.
SCALED = (all_cases.VIT_BATCH, all_cases.GPT, Shape.parse("1,1024,1,64"), all_cases.DECODE)


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    quick_shapes = [all_cases.QUICK_SHAPE] if args.quick else all_cases.SHAPES
    shapes = list(dict.fromkeys(args.shape or quick_shapes))
    dtypes = args.dtype or all_cases.DTYPES[: 1 if args.quick else None]
    settings = Settings.of(args, reading_seconds=(2e-3, 2e-4))
    ceilings = Ceilings(quake_jax("dot_product_attention").isa(), args.threads)
    left_out = {"peak and read": ceilings.left_out} if ceilings.left_out else {}
    peers = Peers(args.threads) if args.peers else None
    left_out |= peers.left_out if peers else {}
    run = Run(settings, sorted(set(args.order or all_cases.DEFAULT_ORDERS)), ceilings, peers)
    compared = []
    if args.threads == 2 and not args.quick:
        compared = [Case(shape, "none", "float32") for shape in SCALED]
    measured = []
    with progress(len(shapes) + len(compared)) as bar:
        for shape in bar.over(shapes, lambda shape: shape.text):
            measured += run.measure(all_cases.choose(shape, dtypes, args.mask), bar.advance)
        speedups = processes.two_threads(
            settings, compared, _quake, Case.described, all_cases.ROUNDS, bar
        )
    parts = {"left_out": left_out, "cases": measured, "scaling": speedups}
    return settings.result({"orders": run.orders}, goals, **parts)


def _quake(case: Case) -> Callable[[int], None]:
    return systems.quake(systems.Buffers(case), SUBJECT_ORDER).run


@dataclass
class Run:
    """What is the same for all shapes."""

    settings: Settings
    orders: list[int]  # ours
    ceilings: Ceilings
    peers: Peers | None = None  # makes the contestants of other libraries

    def measure(self, cases: list[Case], advance: Callable[[float], None]) -> list[dict]:
        """Measure all cases of one shape in the same rounds.

        Their entries of the result have `contestants` with milliseconds, GFLOP/s, the `share_of_`
        peak and reading and what was rejected, `ratios` of the time of each other contestant to
        each of ours, round by round, and in `relative` the time of ours to that of ours without a
        mask, with is_causal, and in float32. `advance` is called after each reading with its share
        of the whole.
        """
        rounds, bytes_read = Rounds(self.settings), {}
        shared = {}
        for case in cases:
            buffers = systems.Buffers(case, shared)
            for contestant in self._of(case, buffers):
                if case.flops > all_cases.LONG_FLOPS * self.settings.threads:
                    contestant.calls = 1
                rounds.add(case, contestant, buffers.error_of(contestant), SANE_ERROR)
            reading = f"{case.stored} {READ}"
            if case.shape.decodes and not self.ceilings.left_out and reading not in bytes_read:
                bytes_read[reading] = sum(array.nbytes for array in buffers.read)
                rounds.contestants.append(self.ceilings.read(reading, buffers.read))
        if not self.ceilings.left_out:
            rounds.add_peak(self.ceilings, FMA)
        fastest = 1e9 * all_cases.MOST_GFLOPS * self.settings.threads
        rounds.series = self.settings.read(
            rounds.contestants,
            all_cases.rounds(cases[0].shape),
            advance,
            shortest=min(case.flops for case in cases) / fastest,
        )
        return [self._entry(case, rounds, bytes_read) for case in cases]

    def _of(self, case: Case, buffers: systems.Buffers) -> list[Contestant]:
        if case.mask in all_cases.CACHES:
            return [systems.cached(buffers, order) for order in self.orders]
        made = [systems.quake(buffers, order) for order in self.orders]
        if case.dtype == "float32":
            made += [systems.quake(buffers, None, name) for name in all_cases.PRODUCTS]
        # To them an array is what is_causal is; seconds a call are not worth to show it again.
        if case.mask != "causal array" or case.shape.flops <= all_cases.HUGE_FLOPS:
            made.append(systems.xla(buffers))
            if self.peers:
                made += self.peers.contestants(buffers, self.settings.reading_seconds)
        return made

    def _entry(self, case: Case, rounds: Rounds, bytes_read: dict[str, int]) -> dict:
        """The entry of a case in the result."""
        names, ours = rounds.names(case), [f"order {order}" for order in self.orders]
        peak, reading = rounds.series.get(FMA), f"{case.stored} {READ}"
        contestants = {name: rounds.figures(case, name, case.flops) for name in names}
        for name, figures in contestants.items():
            if peak:
                share = case.flops / self.ceilings.flops_per_call
                figures["share_of_peak"] = rounds.ratio(FMA, (case, name), share)
            if reading in bytes_read:
                share = case.bytes_read / bytes_read[reading]
                figures["share_of_read"] = rounds.ratio(reading, (case, name), share)
        return {
            **case.described(),
            "gflop": 1e-9 * case.flops,
            "rounds": self.settings.rounds or all_cases.rounds(case.shape),
            "peak_gflops": 1e-9 * self.ceilings.flops_per_call / peak.median if peak else None,
            "contestants": contestants,
            "ratios": rounds.ratios(case, ours, [name for name in names if name not in ours]),
            "relative": {
                to: {name: rounds.ratio((case, name), (other, name)) for name in ours}
                for to, other in case.references.items()
                if (other, ours[0]) in rounds.errors
            },
        }
