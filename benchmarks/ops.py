"""`python -m benchmarks ops`: single operators against jax.nn, torch and onnxruntime.

This module has the options and the course of a run; how a reading is taken is in `timing`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import environment
from benchmarks.cases import DEFAULT_ORDERS, DTYPES, FUNCTIONS, ORDERS, QUICK_SHAPE, Case, choose
from benchmarks.errors import BenchmarkError

HELP = "single operators against jax.nn, torch, onnxruntime and a copy"
# A contestant beyond this relative error computes something else. jax.nn's GELU in bfloat16 is
# already wrong by a fifth in its left tail.
SANE_ERROR = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--threads", type=int, choices=(1, 2), default=1, help="cores and threads of each library")
    add("--function", action="append", choices=FUNCTIONS, help="repeatable; all by default")
    add("--dtype", action="append", choices=DTYPES, help="repeatable; float32 by default")
    add("--shape", action="append", type=_shape, metavar="N,M,…", help="repeatable")
    add(
        "--order",
        action="append",
        type=int,
        choices=ORDERS,
        help=f"repeatable; {', '.join(map(str, DEFAULT_ORDERS))} by default",
    )
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with torch and onnxruntime where installed",
    )
    add("--rounds", type=_positive, help="interleaved rounds (15; 3 with --quick)")
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


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    for path in (args.json, args.markdown):
        if path is not None and not path.parent.is_dir():
            raise BenchmarkError(f"{path}: no such folder as {path.parent}")
        if path is not None and path.is_dir():
            raise BenchmarkError(f"{path}: is a folder")
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

    from benchmarks import bars, overhead
    from benchmarks.peers import PEERS, Peers

    shapes = args.shape or ([QUICK_SHAPE] if args.quick else None)
    cases = choose(args.function or FUNCTIONS, args.dtype or DTYPES[:1], shapes)
    settings = {
        "orders": [] if args.self_check else sorted(set(args.order or DEFAULT_ORDERS)),
        "rounds": args.rounds or (3 if args.quick else 15),
        "reading_seconds": 2e-4 if args.quick else 2e-3,
        "self_check": args.self_check,
        "allocator": args.allocator,
        "quick": args.quick,
    }
    if settings["orders"]:
        from benchmarks import operators

        operators.quake(cases[0].function, settings["orders"][0])  # is quake_jax there?
    peers = Peers(args.threads, PEERS if args.peers else ())
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    measured = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.label)
            measured.append(
                measure_case(
                    case, settings, args.threads, peers, lambda share: progress.advance(task, share)
                )
            )
            progress.update(task, completed=len(measured))
        call_overhead = None
        if not args.self_check:
            progress.update(task, description="call overhead")
            length = 50 if args.quick else 1000
            call_overhead = overhead.measure(
                length, settings["rounds"], settings["reading_seconds"], args.threads
            )
    result = {
        "benchmark": "ops",
        "environment": environment.describe(args.threads),
        "settings": settings,
        "left_out": peers.left_out,
        "cases": measured,
        "call_overhead": call_overhead,
    }
    comparable = not args.quick and args.allocator == "keep"
    result["bars"] = bars.judge(result) if comparable else []
    return result


def measure_case(
    case: Case, settings: dict, threads: int, peers, advance: Callable[[float], None]
) -> dict:
    """Measure one case with all its contestants.

    Args:
        case: The case.
        settings: The result's settings.
        threads: Number of threads in use.
        peers: The `peers.Peers` of the run.
        advance: Called after each reading with its share of the whole case.

    Returns:
        The case's entry of the result: `contestants` with ns per element and what was rejected,
        `ratios` of the time of each other contestant to each of ours, round by round, and `copy`,
        the name of the fastest copy.
    """
    from benchmarks import systems, timing
    from benchmarks.timing import Quartiles

    buffers = systems.Buffers(case)
    if settings["self_check"]:
        ours = [systems.jax_nn(case, buffers, "jax.nn again")]
    else:
        ours = [systems.quake(case, buffers, order) for order in settings["orders"]]
    target = settings["reading_seconds"]
    others = [systems.jax_nn(case, buffers), *peers.contestants(case, buffers, target)]
    copies = systems.copies(buffers) + peers.copy(buffers)

    errors = {}
    for contestant in ours + others:
        contestant.run(1)
        errors[contestant.name] = buffers.error(case.function)
        if not errors[contestant.name] < SANE_ERROR:
            raise BenchmarkError(
                f"{contestant.name} is wrong at {case.label}: error {errors[contestant.name]:.2g}"
            )

    everyone = ours + others + copies
    series = timing.measure(
        everyone,
        rounds=settings["rounds"],
        target=target,
        threads=threads,
        max_faults=timing.MAX_FAULTS if settings["allocator"] == "keep" else float("inf"),
        advance=lambda: advance(1 / (settings["rounds"] * len(everyone))),
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
            "relative_error": errors.get(name),
        }
    ratios = {}
    for subject in ours:
        ratios[subject.name] = {}
        for other in others:
            ratio = timing.paired_ratio(seconds[other.name], seconds[subject.name])
            ratios[subject.name][other.name] = {
                "median": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
            }
    return {
        "function": case.function,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "elements": case.elements,
        "copy": min((c.name for c in copies), key=lambda n: contestants[n]["ns_per_element"]),
        "contestants": contestants,
        "ratios": ratios,
    }
