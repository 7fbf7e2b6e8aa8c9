"""`python -m benchmarks ops`: single operators against jax.nn, torch and onnxruntime.

This module has the options and the course of a run; how a reading is taken is in `timing`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import cases, environment
from benchmarks.cases import DEFAULT_ORDERS, DTYPES, FUNCTIONS, ORDERS, QUICK_SHAPE, SUBJECT_ORDER
from benchmarks.errors import BenchmarkError, check_files

HELP = "single operators against jax.nn, torch, onnxruntime and a copy"
# A contestant beyond this relative error computes something else. jax.nn's GELU in bfloat16 is
# already wrong by a third in its left tail.
SANE_ERROR = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--threads", type=int, choices=(1, 2), default=1, help="cores and threads of each library")
    add("--function", action="append", choices=FUNCTIONS, help="repeatable; all by default")
    add("--dtype", action="append", choices=DTYPES, help="repeatable; all, or float32 with --quick")
    add("--shape", action="append", type=_shape, metavar="N,M,…", help="repeatable")
    add(
        "--order",
        action="append",
        type=int,
        choices=ORDERS,
        help=f"repeatable; {', '.join(map(str, DEFAULT_ORDERS))} by default; 4 on float32 in L2",
    )
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with torch and onnxruntime where installed",
    )
    few = f"{cases.DRAM_ROUNDS} in DRAM, 3 with --quick"
    add("--rounds", type=positive, help=f"interleaved rounds ({cases.ROUNDS}; {few})")
    add("--quick", action="store_true", help="a small shape and short readings: a try, no result")
    add(
        "--self-check",
        action="store_true",
        help="time jax.nn against itself instead: shows the noise of the method",
    )
    add(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="keep: freed pages stay mapped, no page faults inside readings (default); "
        "system: leave the allocator as users have it, and let faults pass",
    )
    add("--json", type=Path, metavar="PATH", help="write the result as JSON")
    add("--markdown", type=Path, metavar="PATH", help="write or replace the section of this run")
    add("--plot", type=Path, metavar="DIR", help="write plots as PNG files")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 128,1024")
    return shape


def positive(text: str) -> int:
    """Read a number from 1 up, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    check_files(args.json, args.markdown)
    environment.prepare(args.threads, keep_pages=args.allocator == "keep")

    from benchmarks import report

    result = measure(args)
    report.to_terminal(result)
    if args.json:
        report.to_json(result, args.json)
    if args.markdown:
        report.to_markdown(result, args.markdown)
    if args.plot:
        from benchmarks import plots

        plots.draw(result, args.plot)


def measure(args: argparse.Namespace) -> dict:
    """Run all cases.

    Args:
        args: The options, as `add_arguments` declares them.

    Returns:
        The result, a dictionary that json can write. `report` describes how it is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import bars, clock, defaults, overhead, scaling
    from benchmarks.instructions import Bounds
    from benchmarks.peers import PEERS, Peers

    shapes = args.shape or ([QUICK_SHAPE] if args.quick else None)
    dtypes = args.dtype or (DTYPES[:1] if args.quick else DTYPES)
    chosen = cases.choose(args.function or FUNCTIONS, dtypes, shapes)
    settings = {
        "orders": None if args.order is None else sorted(set(args.order)),
        "rounds": args.rounds or (3 if args.quick else None),
        "reading_seconds": 2e-4 if args.quick else 2e-3,
        "self_check": args.self_check,
        "allocator": args.allocator,
        "quick": args.quick,
    }
    rounds = settings["rounds"] or cases.ROUNDS
    if not args.self_check:
        from benchmarks import operators

        operators.quake(FUNCTIONS[0], SUBJECT_ORDER)  # is quake_jax there?
    described = environment.describe(args.threads)
    peers = Peers(args.threads, PEERS if args.peers else ())
    left_out = peers.left_out
    console = Console(stderr=True)
    instruments = Instruments(peers)
    # What the cycles of several threads are is not clear, and a try does not wait for a compiler.
    if args.threads == 1 and not (args.quick or args.self_check):
        with console.status("compiling the kernels to count their instructions"):
            instruments.clock = clock.contestant()
            instruments.bounds = Bounds(described["isa"])
        if instruments.clock is None:
            left_out["cycles"] = "needs a C compiler, and x86-64"
        if instruments.bounds.left_out:
            left_out["counted bound"] = instruments.bounds.left_out
    compared = [] if args.self_check or args.threads == 1 else scaling.choose(chosen)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    measured = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(chosen) + len(compared))
        for case in chosen:
            progress.update(task, description=case.label)
            measured.append(
                measure_case(
                    case,
                    settings,
                    args.threads,
                    instruments,
                    lambda share: progress.advance(task, share),
                )
            )
            progress.update(task, completed=len(measured))
        progress.update(task, description="one thread against two" if compared else "")
        speedups = []
        if compared:
            speedups = scaling.measure(
                compared,
                rounds,
                settings["reading_seconds"],
                args.allocator == "keep",
                lambda: progress.advance(task),
            )
        call_overhead = None
        if not args.self_check:
            progress.update(task, description="call overhead")
            length = 50 if args.quick else 1000
            call_overhead = overhead.measure(
                length, rounds, settings["reading_seconds"], args.threads
            )
    result = {
        "benchmark": "ops",
        "environment": environment.describe(args.threads),
        "settings": settings,
        "left_out": left_out,
        "lacking": peers.lacking,
        "cases": measured,
        "scaling": speedups,
        "call_overhead": call_overhead,
        "default_orders": defaults.decide(measured),
    }
    comparable = not args.quick and args.allocator == "keep"
    result["bars"] = bars.judge(result) if comparable else []
    return result


@dataclass
class Instruments:
    """What a run has besides the operators in JAX.

    Attributes:
        peers: The `peers.Peers` of the run.
        clock: The contestant that tells the core's clock, or None.
        bounds: The `instructions.Bounds` of the run, or None.
    """

    peers: Any
    clock: Any = None
    bounds: Any = None


def measure_case(
    case: cases.Case,
    settings: dict,
    threads: int,
    instruments: Instruments,
    advance: Callable[[float], None],
) -> dict:
    """Measure one case with all its contestants.

    Args:
        case: The case.
        settings: The result's settings.
        threads: Number of threads in use.
        instruments: The peers, the clock and the counted bounds of the run.
        advance: Called after each reading with its share of the whole case.

    Returns:
        The case's entry of the result: `contestants` with ns per element and what was rejected,
        `ratios` of the time of each other contestant to each of ours, round by round,
        `relative_times` of ours to order 3, and `copy`, the name of the fastest copy.
    """
    from benchmarks import clock, systems, timing
    from benchmarks.timing import Quartiles

    buffers = systems.Buffers(case)
    if settings["self_check"]:
        ours = [systems.jax_nn(buffers, "jax.nn again")]
    else:
        orders = settings["orders"] or cases.orders(case)
        ours = [systems.quake(buffers, order) for order in orders]
    target = settings["reading_seconds"]
    others = [systems.jax_nn(buffers), *instruments.peers.contestants(buffers, target)]
    copied = systems.for_copies(buffers)
    copies = systems.copies(copied) + instruments.peers.copy(copied)

    errors = {}
    for contestant in ours + others:
        contestant.run(1)
        errors[contestant.name] = buffers.error()
        if not errors[contestant.name] < SANE_ERROR:
            raise BenchmarkError(
                f"{contestant.name} is wrong at {case.label}: error {errors[contestant.name]:.2g}"
            )

    everyone = ours + others + copies
    clocks = [instruments.clock] if instruments.clock else []
    rounds = settings["rounds"] or cases.rounds(case)
    series = timing.measure(
        everyone + clocks,
        rounds=rounds,
        target=target,
        threads=threads,
        max_faults=timing.MAX_FAULTS if settings["allocator"] == "keep" else float("inf"),
        advance=lambda: advance(1 / (rounds * len(everyone + clocks))),
    )
    seconds = {name: one.times for name, one in series.items()}
    contestants = {}
    for contestant in everyone:
        name = contestant.name
        per_element = Quartiles.of([1e9 * s / case.elements for s in seconds[name]])
        contestants[name] = {
            "ns_per_element": per_element.median,
            "ns_per_element_low": per_element.low,
            "ns_per_element_high": per_element.high,
            "calls_per_reading": series[name].readings[0].calls,
            "subtracted_us_per_call": 1e6 * contestant.overhead,
            "cpu_per_wall": series[name].cpu_per_wall(),
            "faults": sum(reading.faults for reading in series[name].readings),
            "rejected": series[name].rejected,
            "doubtful": series[name].doubtful,
        }
        if name in errors:
            contestants[name]["relative_error"] = errors[name]
        if clocks:
            cycles = timing.paired_ratio(seconds[name], seconds[clock.NAME]).median
            contestants[name]["cycles_per_16"] = clock.CYCLES_PER_CALL * cycles * 16 / case.elements
        if name.startswith("order") and instruments.bounds:
            bound = instruments.bounds.cycles(case, int(name.split()[1]))
            contestants[name]["bound_cycles_per_16"] = bound

    def compared(all_of: list, subject: str) -> dict[str, dict[str, float]]:
        return {
            one.name: timing.paired_ratio(seconds[one.name], seconds[subject]).as_dict()
            for one in all_of
        }

    subject = f"order {SUBJECT_ORDER}"
    return {
        "function": case.function,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "level": case.level,
        "elements": case.elements,
        "traffic": case.traffic,
        "rounds": rounds,
        "gigahertz": (
            clock.CYCLES_PER_CALL / Quartiles.of(seconds[clock.NAME]).median / 1e9
            if clocks
            else None
        ),
        "copy": min((c.name for c in copies), key=lambda n: contestants[n]["ns_per_element"]),
        "contestants": contestants,
        "ratios": {one.name: compared(others, one.name) for one in ours},
        "relative_times": compared(ours, subject) if subject in seconds else {},
    }
