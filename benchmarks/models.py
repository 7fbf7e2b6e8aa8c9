"""`python -m benchmarks models`: whole models in Flax against the same ones on the kernels.

Nothing of a model is changed but what `quake_jax.accelerate` or the interceptor changes; all
systems of a model are timed in the same rounds, and their results compared first.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, models_cases
from benchmarks.attention import FAULT_SECONDS, FAULT_SHARE
from benchmarks.errors import BenchmarkError, check_files
from benchmarks.models_cases import (
    CASES,
    CEILING,
    DTYPES,
    FLAX,
    ROUNDS,
    SUBJECT,
    SYSTEMS,
    TORCH,
    Case,
)
from benchmarks.ops import positive

HELP = "whole Flax models against the same models on the kernels, and against torch"
# A reading of a second that was disturbed would most likely be disturbed again.
LONG_SECONDS, LONG_ATTEMPTS = 0.5, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--threads", type=int, choices=(1, 2), default=1, help="cores and threads of each library")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help=f"{DTYPES[0]} by default")
    add(
        "--model",
        action="append",
        choices=CASES,
        metavar="NAME",
        help=f"repeatable; all by default: {', '.join(CASES)}",
    )
    add(
        "--system",
        action="append",
        choices=SYSTEMS,
        help=f"repeatable; all that are installed by default; {FLAX} always takes part",
    )
    add("--rounds", type=positive, help=f"interleaved rounds ({ROUNDS}; 2 with --quick)")
    add("--quick", action="store_true", help="shrunk models, short readings: a try, no result")
    add(
        "--allocator",
        choices=("keep", "system"),
        default="keep",
        help="keep: freed pages stay mapped, no page faults inside readings (default); system: "
        "as users have it, where XLA's large temporaries are fresh pages at each call",
    )
    add("--json", type=Path, metavar="PATH", help="write the result as JSON")
    add("--markdown", type=Path, metavar="PATH", help="write or replace the section of this run")
    add("--plot", type=Path, metavar="DIR", help="draw the times into this folder")


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    check_files(args.json, args.markdown)
    needed = ["flax"] + ["matplotlib"] * (args.plot is not None)
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise BenchmarkError(f"{name} is not installed: pip install '.[bench,flax]'")
    environment.prepare(args.threads, keep_pages=args.allocator == "keep")

    from benchmarks import models_report, report

    result = measure(args)
    tables, remarks = models_report.tables(result), models_report.remarks(result)
    report.print_page(report.headline(result), tables, remarks)
    if args.json:
        report.to_json(result, args.json)
    if args.markdown:
        heading = models_report.heading(result)
        report.write_section(result, args.markdown, heading, tables, remarks)
    if args.plot:
        from benchmarks import models_plots

        print(models_plots.draw(result, args.plot))


def measure(args: argparse.Namespace) -> dict:
    """Run all cases.

    Args:
        args: The options, as `add_arguments` declares them.

    Returns:
        The result, a dictionary that json can write. `models_report` describes how it is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import models_report, models_systems

    models_systems.require_accelerate()
    wanted, left_out = _systems(args.system or SYSTEMS)
    settings = {
        "systems": wanted,
        "dtype": args.dtype,
        "rounds": args.rounds or (2 if args.quick else ROUNDS),
        "reading_seconds": 1e-3 if args.quick else 0.1,
        "allocator": args.allocator,
        "quick": args.quick,
    }
    cases = models_cases.choose(args.model or CASES, args.dtype, args.quick)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    measured = []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("warm-up", total=len(cases))
        models_systems.warm_up(wanted, args.dtype)
        for done, case in enumerate(cases, 1):
            progress.update(task, description=case.label)
            measured.append(
                measure_case(
                    case, settings, args.threads, lambda share: progress.advance(task, share)
                )
            )
            progress.update(task, completed=done)
            gc.collect()  # the weights of one model at a time
    # Each dtype and allocator has a section of its own.
    allocator = "" if args.allocator == "keep" else ", system allocator"
    result = {
        "benchmark": f"models, {args.dtype}{allocator}",
        "environment": environment.describe(args.threads),
        "settings": settings,
        "left_out": left_out,
        "cases": measured,
    }
    result["bars"] = [] if args.quick else models_report.judge(result)
    return result


def _systems(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The systems of a run, and why others are left out."""
    left_out = {}
    if TORCH in wanted and importlib.util.find_spec("torch") is None:
        left_out[TORCH] = "not installed"
    chosen = {FLAX, *wanted} - left_out.keys()
    return [name for name in SYSTEMS if name in chosen], left_out


def measure_case(
    case: Case, settings: dict, threads: int, advance: Callable[[float], None]
) -> dict:
    """Measure all systems of one model.

    Args:
        case: The model.
        settings: The result's settings.
        threads: Number of threads in use.
        advance: Called after each reading with its share of the whole.

    Returns:
        The case's entry of the result: `contestants` with milliseconds, memory and what building
        them took; `speed`, how many times as long the model as it is took; `over_ours`, the same
        for each other system against `models_cases.SUBJECT`; `share` of the way to the ceiling;
        `replaced` and `left`, what `explain` says.

    Raises:
        BenchmarkError: A system's result is not the model's.
    """
    from benchmarks import models_systems, timing

    systems, setting = _built(case, settings["systems"], threads)
    checked = _checked(case, systems)
    contestants, shortest = _contestants(systems.values(), settings["reading_seconds"], threads)
    rounds = settings["rounds"]
    keep = settings["allocator"] == "keep"
    allowed = max(timing.MAX_FAULTS, FAULT_SHARE * shortest / FAULT_SECONDS)
    series = timing.measure(
        contestants,
        rounds=rounds,
        target=settings["reading_seconds"],
        threads=threads,
        max_faults=allowed if keep else math.inf,
        advance=lambda: advance(1 / (rounds * len(contestants))),
        attempts=LONG_ATTEMPTS if shortest > LONG_SECONDS else timing.MAX_ATTEMPTS,
    )
    found = {"replaced": {}, "left": {}}
    if SUBJECT in systems:
        found = models_systems.explained(setting)
    return {
        "model": case.name,
        "title": case.title,
        "dtype": case.dtype,
        "batch": case.batch,
        "length": case.length or case.sizes.tokens,
        "weights": "random",
        "parameters": setting.parameter_count,
        **found,
        "contestants": {
            name: {**_entry(system, series[name]), **checked[name]}
            for name, system in systems.items()
        },
        **compare({name: one.times for name, one in series.items()}),
    }


def _built(case: Case, names: list[str], threads: int) -> tuple[dict, Any]:
    """The systems by name, ready to run, and the weights and inputs that they share."""
    from benchmarks import models_systems

    setting = models_systems.Setting(case)
    systems = {}
    for name in names:
        if name == TORCH:
            from benchmarks import models_torch

            systems[name] = models_torch.build(setting, threads)
        else:
            systems[name] = models_systems.build(setting, name)
    return systems, setting


def _checked(case: Case, systems: dict) -> dict[str, dict[str, float]]:
    """By name, how far a result is from Flax's, and may be; raise BenchmarkError if further.

    The ceiling is no model: its result has nothing to agree with.
    """
    from benchmarks import models_systems

    found = {}
    for name, system in systems.items():
        found[name] = {}
        if name in (FLAX, CEILING):
            continue
        difference = models_systems.difference(system.result, systems[FLAX].result)
        tolerance = models_systems.tolerance(case, name)
        if not difference <= tolerance:
            raise BenchmarkError(
                f"{name} is wrong at {case.label}: differs by {difference:.2g}, "
                f"may by {tolerance:.2g}"
            )
        found[name] = {"difference": difference, "tolerance": tolerance}
    return found


def _contestants(systems: Collection, target: float, threads: int) -> tuple[list, float]:
    """What the stopwatch takes, and the length in seconds of the shortest reading.

    All have as many calls in a reading: what the first of them pays weighs the same.
    """
    from benchmarks import peers, timing

    # A model takes longer than a call from Python: no need to approach the target in steps.
    fastest = min(timing.read(system.run, 1).wall for system in systems)
    calls = max(1, math.ceil(target / fastest))
    contestants = []
    for system in systems:
        settle = peers.SETTLE_SECONDS[TORCH] if system.name == TORCH and threads > 1 else 0.0
        contestants.append(timing.Contestant(system.name, system.run, settle=settle, calls=calls))
    return contestants, calls * fastest


def _entry(system: Any, series: Any) -> dict:
    from benchmarks.timing import Quartiles

    return {
        "ms": Quartiles.of([1e3 * seconds for seconds in series.times]).as_dict(),
        "trace_seconds": system.trace_seconds,
        "compile_seconds": system.compile_seconds,
        "memory_bytes": system.memory,
        "calls_per_reading": series.readings[0].calls,
        "cpu_per_wall": series.cpu_per_wall(),
        "rejected": series.rejected,
        "doubtful": series.doubtful,
    }


def compare(seconds: dict[str, list[float]]) -> dict:
    """What the times of the rounds amount to.

    Args:
        seconds: By system, the seconds of a call in each round.

    Returns:
        `speed`, `over_ours` and `share` as `measure_case` describes them; `share` is None without
        the systems that it needs, or where the ceiling was not faster in every round.
    """
    from benchmarks.timing import Quartiles, paired_ratio

    flax, ours, ceiling = (seconds.get(name) for name in (FLAX, SUBJECT, CEILING))
    share = None
    if ours and ceiling and all(a > b for a, b in zip(flax, ceiling, strict=True)):
        rounds = zip(flax, ours, ceiling, strict=True)
        share = Quartiles.of([(a - b) / (a - c) for a, b, c in rounds]).as_dict()

    def ratios(others: dict[str, list[float]], name: str) -> dict[str, float]:
        return paired_ratio(others[name], seconds[SUBJECT]).as_dict()

    return {
        "speed": {
            name: paired_ratio(flax, times).as_dict()
            for name, times in seconds.items()
            if name != FLAX
        },
        "over_ours": {name: ratios(seconds, name) for name in seconds if ours and name != SUBJECT},
        "share": share,
    }
