"""The run of `python -m benchmarks ops`; how a reading is taken is in `harness.timing`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.harness import environment, hardware, processes
from benchmarks.harness.errors import BenchmarkError, quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.hardware import CLOCK, CYCLES_PER_CALL
from benchmarks.harness.peers import PEERS
from benchmarks.harness.timing import Contestant, Quartiles, Series, paired_ratio
from benchmarks.ops import cases, defaults, goals, overhead, systems
from benchmarks.ops.cases import DTYPES, QUICK_SHAPE, SUBJECT_ORDER, Case
from benchmarks.ops.instructions import Bounds
from benchmarks.ops.operators import FUNCTIONS
from benchmarks.ops.peers import Peers

# A contestant beyond this relative error computes something else. jax.nn's GELU in bfloat16 is
# already wrong by a third in its left tail.
SANE_ERROR = 0.9


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    shapes = args.shape or ([QUICK_SHAPE] if args.quick else None)
    dtypes = args.dtype or (DTYPES[:1] if args.quick else DTYPES)
    chosen = cases.choose(args.function or FUNCTIONS, dtypes, shapes)
    settings = Settings.of(args, reading_seconds=(2e-3, 2e-4))
    if not args.self_check:
        quake_jax("softmax")  # is it there?
    run = Run(settings, Peers(args.threads, PEERS if args.peers else ()), args.order)
    run.self_check = args.self_check
    if args.threads == 1 and not (args.quick or args.self_check):
        run.count_cycles()
    compared = [] if args.self_check or args.threads == 1 else scaled(chosen)
    with progress(len(chosen) + len(compared)) as bar:
        measured = [run.measure(case, bar.advance) for case in bar.over(chosen, str)]
        bar.show("one thread against two" if compared else "")
        speedups = measure_scaling(compared, settings, bar.advance)
        bar.show("call overhead")
        call_overhead = None if args.self_check else overhead.measure(settings)
    result = {
        "benchmark": "ops",
        "environment": environment.describe(args.threads),
        "settings": {
            "orders": None if args.order is None else sorted(set(args.order)),
            "self_check": args.self_check,
            **settings.as_dict(),
        },
        "left_out": run.left_out,
        "lacking": run.peers.lacking,
        "cases": measured,
        "scaling": speedups,
        "call_overhead": call_overhead,
        "default_orders": defaults.decide(measured),
    }
    comparable = not args.quick and args.allocator == "keep"
    result["bars"] = goals.judge(result) if comparable else []
    return result


@dataclass
class Run:
    """What is the same for all cases.

    Attributes:
        settings: How readings are taken.
        peers: The libraries outside JAX.
        orders: Our orders, or None for those that a case has by default.
        self_check: Whether jax.nn takes the place of ours.
        clock: The contestant that tells the core's clock, or None.
        bounds: The counted bounds, or None.
        left_out: Why something is not measured: text by name.
    """

    settings: Settings
    peers: Peers
    orders: list[int] | None = None
    self_check: bool = False
    clock: Contestant | None = None
    bounds: Bounds | None = None
    left_out: dict[str, str] = field(init=False)

    def __post_init__(self):
        self.left_out = dict(self.peers.left_out)

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
        buffers = systems.Buffers(case)
        if self.self_check:
            ours = [systems.jax_nn(buffers, "jax.nn again")]
        else:
            orders = sorted(set(self.orders or cases.orders(case)))
            ours = [systems.quake(buffers, order) for order in orders]
        target = self.settings.reading_seconds
        others = [systems.jax_nn(buffers), *self.peers.contestants(buffers, target)]
        copied = systems.for_copies(buffers)
        copies = systems.copies(copied) + self.peers.copy(copied)
        errors = checked(case, buffers, ours + others)

        everyone = ours + others + copies
        rounds = cases.rounds(case)
        clocks = [self.clock] if self.clock else []
        series = self.settings.read(everyone + clocks, rounds, advance)
        contestants = {}
        for contestant in everyone:
            name = contestant.name
            contestants[name] = self._entry(case, contestant, series)
            if name in errors:
                contestants[name]["relative_error"] = errors[name]
        gigahertz = None
        if clocks:
            gigahertz = 1e-9 * CYCLES_PER_CALL / Quartiles.of(series[CLOCK].times).median

        def compared(all_of: list[Contestant], subject: str) -> dict[str, dict[str, float]]:
            ratios = {
                one.name: paired_ratio(series[one.name].times, series[subject].times)
                for one in all_of
            }
            return {name: ratio.as_dict() for name, ratio in ratios.items()}

        subject = f"order {SUBJECT_ORDER}"
        return {
            "function": case.function,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "level": case.level,
            "elements": case.elements,
            "traffic": case.traffic,
            "rounds": self.settings.rounds or rounds,
            "gigahertz": gigahertz,
            "copy": min((c.name for c in copies), key=lambda n: contestants[n]["ns_per_element"]),
            "contestants": contestants,
            "ratios": {one.name: compared(others, one.name) for one in ours},
            "relative_times": compared(ours, subject) if subject in series else {},
        }

    def _entry(self, case: Case, contestant: Contestant, series: dict[str, Series]) -> dict:
        name = contestant.name
        per_element = Quartiles.of(series[name].times).scaled(1e9 / case.elements)
        entry = {
            "ns_per_element": per_element.median,
            "ns_per_element_low": per_element.low,
            "ns_per_element_high": per_element.high,
            "subtracted_us_per_call": 1e6 * contestant.overhead,
            **series[name].conditions(),
        }
        if self.clock:
            cycles = paired_ratio(series[name].times, series[CLOCK].times).median
            entry["cycles_per_16"] = CYCLES_PER_CALL * cycles * 16 / case.elements
        if name.startswith("order") and self.bounds:
            entry["bound_cycles_per_16"] = self.bounds.cycles(case, int(name.split()[1]))
        return entry


def checked(
    case: Case, buffers: systems.Buffers, contestants: list[Contestant]
) -> dict[str, float]:
    """Run each contestant once: its error by name; raise BenchmarkError for a wrong one."""
    errors = {}
    for contestant in contestants:
        contestant.run(1)
        error = errors[contestant.name] = buffers.error()
        if not error < SANE_ERROR:
            raise BenchmarkError(f"{contestant.name} is wrong at {case}: error {error:.2g}")
    return errors


# --- One thread against two


def scaled(wanted: list[Case]) -> list[Case]:
    """The cases of a run for which the threads are compared."""
    compared = [Case(function, cases.VIT_SHAPE, "float32") for function in goals.SCALED]
    return [case for case in wanted if case in compared]


def measure_scaling(
    compared: list[Case], settings: Settings, advance: Callable[[], None] = lambda: None
) -> list[dict]:
    """One thread against two at order `cases.SUBJECT_ORDER`: for each case its function, shape and
    dtype, and what `processes.two_threads` finds.
    """
    found = processes.two_threads(
        compared,
        _quake,
        settings.rounds or cases.ROUNDS,
        settings.reading_seconds,
        settings.allocator == "keep",
        advance,
    )
    return [
        {
            "function": case.function,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "order": SUBJECT_ORDER,
            **entry,
        }
        for case, entry in zip(compared, found, strict=True)
    ]


def _quake(case: Case) -> Callable[[int], None]:
    return systems.quake(systems.Buffers(case), SUBJECT_ORDER).run
