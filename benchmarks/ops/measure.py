"""The run of `python -m benchmarks ops`; how a reading is taken is in `harness.timing`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.harness import environment, hardware, processes
from benchmarks.harness.errors import quake_jax
from benchmarks.harness.frame import Progress, Settings, progress
from benchmarks.harness.hardware import CLOCK, CYCLES_PER_CALL
from benchmarks.harness.peers import PEERS
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.timing import Contestant
from benchmarks.ops import cases, goals, overhead, systems
from benchmarks.ops.cases import DTYPES, SUBJECT_ORDER, Case
from benchmarks.ops.instructions import Bounds
from benchmarks.ops.operators import FUNCTIONS
from benchmarks.ops.peers import Peers

# A contestant beyond this relative error computes something else. jax.nn's GELU in bfloat16 is
# already wrong by a third in its left tail.
SANE_ERROR = 0.9


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    shapes = args.shape or ([cases.QUICK_SHAPE] if args.quick else None)
    dtypes = args.dtype or (DTYPES[:1] if args.quick else DTYPES)
    chosen = cases.choose(args.function or FUNCTIONS, dtypes, shapes)
    settings = Settings.of(args, reading_seconds=(2e-3, 2e-4))
    quake_jax("softmax")  # is it there?
    peers = Peers(args.threads, PEERS if args.peers else ())
    run = Run(settings, peers, args.order)
    if args.threads == 1 and not args.quick:
        run.count_cycles()
    compared = [] if args.threads == 1 else scaled(chosen)
    with progress(len(chosen) + len(compared)) as bar:
        measured = [run.measure(case, bar.advance) for case in bar.over(chosen, str)]
        speedups = measure_scaling(compared, settings, bar)
        bar.show("call overhead")
        call_overhead = overhead.measure(settings)
    orders = None if args.order is None else sorted(set(args.order))
    return settings.result(
        {"orders": orders},
        goals,
        judged=args.allocator == "keep",
        left_out=peers.left_out | run.left_out,
        cases=measured,
        scaling=speedups,
        call_overhead=call_overhead,
        default_orders=goals.default_orders(measured),
    )


@dataclass
class Run:
    """What is the same for all cases."""

    settings: Settings
    peers: Peers
    orders: list[int] | None = None  # ours, or None for those that a case has by default
    clock: Contestant | None = None
    bounds: Bounds | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def count_cycles(self) -> None:
        """State cycles and their bounds, too; what those of several threads are is not clear."""
        from rich.console import Console

        with Console(stderr=True).status("compiling the kernels to count their instructions"):
            self.clock = hardware.clock()
            self.bounds = Bounds(environment.describe(self.settings.threads)["isa"])
        if self.clock is None:
            self.left_out["cycles"] = "needs a C++ compiler, and x86-64"
        if self.bounds.left_out:
            self.left_out["counted bound"] = self.bounds.left_out

    def measure(self, case: Case, advance: Callable[[float], None]) -> dict:
        """Measure one case with all its contestants.

        Its entry of the result has `contestants` with ns per element and what was rejected,
        `ratios` of the time of each other contestant to each of ours, round by round,
        `relative_times` of ours to order 3, and `copy`, the name of the fastest copy. `advance` is
        called after each reading with its share of the whole.
        """
        buffers, rounds = systems.Buffers(case), Rounds(self.settings)
        orders = sorted(set(self.orders or cases.orders(case)))
        ours = [systems.quake(buffers, order) for order in orders]
        target = self.settings.reading_seconds
        others = [systems.jax_nn(buffers), *self.peers.contestants(buffers, target)]
        copied = systems.for_copies(buffers)
        copies = systems.copies(copied) + self.peers.copy(copied)
        own, compared, copying = ([one.name for one in of] for of in (ours, others, copies))
        for one in ours + others:
            one.run(1)
            rounds.add(case, one, buffers.error(), SANE_ERROR)
        for one in copies:
            rounds.add(case, one)
        rounds.contestants += [self.clock] if self.clock else []
        rounds.series = self.settings.read(rounds.contestants, cases.rounds(case), advance)

        contestants = {name: self._entry(case, name, rounds) for name in rounds.names(case)}
        clock, subject = rounds.series.get(CLOCK), f"order {SUBJECT_ORDER}"
        return {
            **case.described(),
            "level": case.level,
            "elements": case.elements,
            "traffic": case.traffic,
            "rounds": self.settings.rounds or cases.rounds(case),
            "gigahertz": 1e-9 * CYCLES_PER_CALL / clock.median if clock else None,
            "copy": min(copying, key=lambda name: contestants[name]["ns"]["median"]),
            "contestants": contestants,
            "ratios": rounds.ratios(case, own, compared),
            "relative_times": {
                name: rounds.ratio((case, name), (case, subject)) for name in own if subject in own
            },
        }

    def _entry(self, case: Case, name: str, rounds: Rounds) -> dict:
        series, error = rounds.series[case, name], rounds.errors[case, name]
        entry = {
            "ns": series.quartiles(1e9 / case.elements),  # per element
            "subtracted_us_per_call": 1e6 * series.overhead,
            **series.conditions(),
        }
        if self.clock:
            cycles = rounds.ratio((case, name), CLOCK, CYCLES_PER_CALL)["median"]
            entry["cycles_per_16"] = cycles * 16 / case.elements
        if name.startswith("order") and self.bounds:
            entry["bound_cycles_per_16"] = self.bounds.cycles(case, int(name.split()[1]))
        return entry if error is None else entry | {"relative_error": error}


# --- One thread against two


def scaled(wanted: list[Case]) -> list[Case]:
    """The cases of a run for which the threads are compared."""
    compared = [Case(function, cases.VIT_SHAPE, "float32") for function in goals.SCALED]
    return [case for case in wanted if case in compared]


def measure_scaling(
    compared: list[Case], settings: Settings, bar: Progress | None = None
) -> list[dict]:
    """One thread against two at order `cases.SUBJECT_ORDER`, as of `processes.two_threads`."""

    def describe(case: Case) -> dict:
        return {**case.described(), "order": SUBJECT_ORDER}

    return processes.two_threads(settings, compared, _quake, describe, cases.ROUNDS, bar)


def _quake(case: Case) -> Callable[[int], None]:
    return systems.quake(systems.Buffers(case), SUBJECT_ORDER).run
