"""`python -m benchmarks attention`: fused attention against XLA's and torch's.

All dtypes and masks of a shape are timed in the same rounds, and with them the two limits of the
hardware: the peak of fused multiply-adds, and for one query the bandwidth of reading.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import attention_cases, environment
from benchmarks.attention_cases import (
    DECODE,
    DEFAULT_ORDERS,
    DTYPES,
    GPT,
    HUGE_FLOPS,
    HUGE_ROUNDS,
    LONG_FLOPS,
    MASKS,
    MOST_GFLOPS,
    ORDERS,
    QUICK_SHAPE,
    ROUNDS,
    SHAPES,
    SUBJECT_ORDER,
    VIT_BATCH,
    Case,
    Shape,
)
from benchmarks.errors import BenchmarkError, check_files
from benchmarks.ops import positive

HELP = "fused attention against XLA and torch, and against the peak of the machine"
# A contestant beyond this error, relative to the largest element, computes something else.
SANE_ERROR = 0.1
# Of page faults, at half a microsecond each, in a reading.
FAULT_SHARE, FAULT_SECONDS = 0.003, 0.5e-6
# The batch, and the heads of one row, one head alone, and reading: each is divided differently.
SCALED = (VIT_BATCH, GPT, Shape.parse("1,1024,1,64"), DECODE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--threads", type=int, choices=(1, 2), default=1, help="cores and threads of each library")
    add(
        "--dtype",
        action="append",
        choices=DTYPES,
        help=f"repeatable; {' and '.join(DTYPES)}, or float32 with --quick",
    )
    add(
        "--shape",
        action="append",
        type=_shape,
        metavar="B,T,N,H",
        help="repeatable; T-S for T queries and S keys, N/K for K key/value heads",
    )
    add("--mask", action="append", choices=MASKS, help="repeatable; all that make sense by default")
    add(
        "--order",
        action="append",
        type=int,
        choices=ORDERS,
        help=f"repeatable; {' and '.join(map(str, DEFAULT_ORDERS))} by default",
    )
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with torch where installed",
    )
    few = f"{HUGE_ROUNDS} for the largest, 3 with --quick"
    add("--rounds", type=positive, help=f"interleaved rounds ({ROUNDS}; {few})")
    add("--quick", action="store_true", help="a small shape and short readings: a try, no result")
    add(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="keep: freed pages stay mapped, no page faults inside readings (default); system: "
        "as users have it, where XLA's arrays of T × S logits are fresh pages at each call",
    )
    add("--json", type=Path, metavar="PATH", help="write the result as JSON")
    add("--markdown", type=Path, metavar="PATH", help="write or replace the section of this run")


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape such as 1,197,12,64 or 1,1-4096,32/8,64"
        ) from None


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    check_files(args.json, args.markdown)
    environment.prepare(args.threads, keep_pages=args.allocator == "keep")

    from benchmarks import attention_report, report

    result = measure(args)
    tables, remarks = attention_report.tables(result), attention_report.remarks(result)
    report.print_page(report.headline(result), tables, remarks)
    if args.json:
        report.to_json(result, args.json)
    if args.markdown:
        heading = attention_report.heading(result)
        report.write_section(result, args.markdown, heading, tables, remarks)


def measure(args: argparse.Namespace) -> dict:
    """Run all cases.

    Args:
        args: The options, as `add_arguments` declares them.

    Returns:
        The result, a dictionary that json can write. `attention_report` describes how it is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import attention_report, attention_systems, scaling
    from benchmarks.ceilings import Ceilings

    shapes = list(dict.fromkeys(args.shape or ([QUICK_SHAPE] if args.quick else SHAPES)))
    dtypes = args.dtype or (DTYPES[:1] if args.quick else DTYPES)
    settings = {
        "orders": sorted(set(args.order or DEFAULT_ORDERS)),
        "rounds": args.rounds or (3 if args.quick else None),
        "reading_seconds": 2e-4 if args.quick else 2e-3,
        "allocator": args.allocator,
        "quick": args.quick,
    }
    attention_systems.attention_of_quake_jax()  # is it there?
    isa = environment.describe(args.threads)["isa"]
    left_out = {}
    ceilings = Ceilings(isa, args.threads)
    if ceilings.left_out:
        left_out["peak and read"] = ceilings.left_out
    torch = None
    if args.peers and importlib.util.find_spec("torch") is None:
        left_out["torch"] = "torch not installed"
    elif args.peers:
        torch = attention_systems.Torch(args.threads)

    # A child compares threads at the default order only, on cases of its own.
    compared = []
    if args.threads == 2 and not args.quick:
        compared = [Case(shape, "none", "float32") for shape in SCALED]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    measured, speedups = [], []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(shapes) + len(compared))
        for done, shape in enumerate(shapes, 1):
            progress.update(task, description=shape.text)
            measured += measure_shape(
                attention_cases.choose(shape, dtypes, args.mask),
                settings,
                args.threads,
                ceilings,
                torch,
                lambda share: progress.advance(task, share),
            )
            progress.update(task, completed=done)
        if compared:
            progress.update(task, description="one thread against two")
            found = scaling.compare(
                compared,
                make_for_scaling,
                settings["rounds"] or ROUNDS,
                settings["reading_seconds"],
                args.allocator == "keep",
                lambda: progress.advance(task),
            )
            speedups = [
                {"shape": case.shape.text, "mask": case.mask, "dtype": case.dtype, **entry}
                for case, entry in zip(compared, found, strict=True)
            ]
    result = {
        # Names the section of a Markdown file: either allocator has its own.
        "benchmark": "attention" if args.allocator == "keep" else "attention, system allocator",
        "environment": environment.describe(args.threads),
        "settings": settings,
        "left_out": left_out,
        "cases": measured,
        "scaling": speedups,
    }
    result["bars"] = [] if args.quick else attention_report.judge(result)
    return result


def make_for_scaling(case: Case) -> Any:
    """The contestant of a process of `scaling`."""
    from benchmarks import attention_systems

    return attention_systems.quake(attention_systems.AttentionBuffers(case), SUBJECT_ORDER)


def measure_shape(
    cases: list[Case],
    settings: dict,
    threads: int,
    ceilings: Any,
    torch: Any,
    advance: Callable[[float], None],
) -> list[dict]:
    """Measure all cases of one shape in the same rounds.

    Args:
        cases: The cases.
        settings: The result's settings.
        threads: Number of threads in use.
        ceilings: The `ceilings.Ceilings` of the run.
        torch: The `attention_systems.Torch` of the run, or None.
        advance: Called after each reading with its share of the whole shape.

    Returns:
        The cases' entries of the result: `contestants` with milliseconds, GFLOP/s, the `share_of_`
        peak and reading and what was rejected, `ratios` of the time of each other contestant to
        each of ours, round by round, and in `relative` the time of ours to that of ours without a
        mask, with is_causal, and in float32.
    """
    from benchmarks import attention_systems as systems
    from benchmarks import timing
    from benchmarks.ceilings import FMA, READ

    shape, target = cases[0].shape, settings["reading_seconds"]
    shared, everyone, names, errors, readers = {}, [], {}, {}, {}
    for case in cases:
        buffers = systems.AttentionBuffers(case, shared)
        ours = [systems.quake(buffers, order) for order in settings["orders"]]
        # To them an array is what is_causal is; seconds a call are not worth to show it again.
        again = case.mask == "causal array" and shape.flops > HUGE_FLOPS
        others = [] if again else [systems.xla(buffers)]
        if torch is not None and not again:
            others.append(torch.contestant(buffers, target))
        names[case] = [c.name for c in ours], [c.name for c in others]
        for contestant in ours + others:
            error = buffers.error_of(contestant)
            if not error < SANE_ERROR:
                raise BenchmarkError(f"{contestant.name} is wrong at {case.label}: {error:.2g}")
            contestant.name = f"{case.name} {contestant.name}"
            contestant.calls = 1 if case.flops > LONG_FLOPS * threads else None
            errors[contestant.name] = error
            everyone.append(contestant)
        reading = f"{case.dtype} {READ}"
        if shape.decodes and not ceilings.left_out and reading not in readers:
            arrays = buffers.sources[1:3]
            readers[reading] = sum(array.nbytes for array in arrays)
            everyone.append(ceilings.read(reading, arrays))
    if not ceilings.left_out:
        everyone.append(ceilings.fma())
        # Against readings that last long: over more of the clock's ups and downs.
        everyone[-1].calls = timing.calibrate(everyone[-1].run, 5 * target)

    rounds = settings["rounds"] or attention_cases.rounds(shape)
    shortest = min(case.flops for case in cases) / (1e9 * MOST_GFLOPS * threads)
    allowed = int(FAULT_SHARE * shortest / FAULT_SECONDS)
    keep = settings["allocator"] == "keep"
    series = timing.measure(
        everyone,
        rounds=rounds,
        target=target,
        threads=threads,
        max_faults=max(timing.MAX_FAULTS, allowed) if keep else float("inf"),
        advance=lambda: advance(1 / (rounds * len(everyone))),
    )
    seconds = {name: one.times for name, one in series.items()}

    def compared(other: str, subject: str) -> dict[str, float]:
        return timing.paired_ratio(seconds[other], seconds[subject]).as_dict()

    def entry(case: Case, name: str) -> dict:
        full = f"{case.name} {name}"
        milliseconds = timing.Quartiles.of([1e3 * s for s in seconds[full]])
        made = {
            "ms": milliseconds.as_dict(),
            "gflops": 1e-6 * case.flops / milliseconds.median,
            "error": errors[full],
            "calls_per_reading": series[full].readings[0].calls,
            "cpu_per_wall": series[full].cpu_per_wall(),
            "faults_per_call": _faults_per_call(series[full].readings),
            "rejected": series[full].rejected,
            "doubtful": series[full].doubtful,
        }
        if FMA in seconds:
            share = case.flops / ceilings.flops_per_call
            made["share_of_peak"] = _scaled(compared(FMA, full), share)
        reading = f"{case.dtype} {READ}"
        if reading in readers:
            share = case.bytes_read / readers[reading]
            made["share_of_read"] = _scaled(compared(reading, full), share)
        return made

    result = []
    for case in cases:
        ours, others = names[case]
        relative = {}
        for to, other in _references(case).items():
            if other in names:
                relative[to] = {
                    name: compared(f"{case.name} {name}", f"{other.name} {name}") for name in ours
                }
        result.append(
            {
                "shape": shape.text,
                "mask": case.mask,
                "dtype": case.dtype,
                "gflop": 1e-9 * case.flops,
                "rounds": rounds,
                "peak_gflops": (
                    1e-9 * ceilings.flops_per_call / timing.Quartiles.of(seconds[FMA]).median
                    if FMA in seconds
                    else None
                ),
                "contestants": {name: entry(case, name) for name in ours + others},
                "ratios": {
                    name: {
                        other: compared(f"{case.name} {other}", f"{case.name} {name}")
                        for other in others
                    }
                    for name in ours
                },
                "relative": relative,
            }
        )
    return result


def _references(case: Case) -> dict[str, Case]:
    """The cases to whose time that of a case is compared, by the key in the result."""
    found = {}
    if case.mask != "none":
        found["none"] = Case(case.shape, "none", case.dtype)
    if case.mask == "causal array":
        found["causal"] = Case(case.shape, "causal", case.dtype)
    if case.dtype != "float32":
        found["float32"] = Case(case.shape, case.mask, "float32")
    return found


def _faults_per_call(readings: list) -> float:
    return sum(reading.faults for reading in readings) / sum(reading.calls for reading in readings)


def _scaled(quartiles: dict[str, float], factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in quartiles.items()}
