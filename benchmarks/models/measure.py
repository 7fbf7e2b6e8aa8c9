"""The run of `python -m benchmarks models`.

Nothing of a model is changed but what `quake_jax.accelerate` or the interceptor changes; all
systems of a model are timed in the same rounds, and their results compared first.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Collection, Sequence

from benchmarks.harness import environment, peers, timing
from benchmarks.harness.errors import BenchmarkError, missing, quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.peers import TORCH
from benchmarks.harness.timing import Contestant, Quartiles, Series, paired_ratio
from benchmarks.models import cases, goals, systems
from benchmarks.models.cases import CASES, CEILING, FLAX, ROUNDS, SUBJECT, SYSTEMS, Case
from benchmarks.models.systems import Setting, System

# A reading of a second that was disturbed would most likely be disturbed again.
LONG_SECONDS, LONG_ATTEMPTS = 0.5, 3


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    quake_jax("accelerate")  # is it there?
    wanted, left_out = _systems(args.system or SYSTEMS)
    settings = Settings.of(args, reading_seconds=(0.1, 1e-3), quick_rounds=2)
    chosen = cases.choose(args.model or CASES, args.dtype, args.quick)
    measured = []
    with progress(len(chosen)) as bar:
        bar.show("warm-up")
        systems.warm_up(wanted, args.dtype)
        for case in bar.over(chosen, lambda case: case.label):
            measured.append(measure_case(case, wanted, settings, bar.advance))
            gc.collect()  # the weights of one model at a time
    # Each dtype and allocator has a section of its own.
    allocator = "" if args.allocator == "keep" else ", system allocator"
    described = {"systems": wanted, "dtype": args.dtype, **settings.as_dict()}
    result = {
        "benchmark": f"models, {args.dtype}{allocator}",
        "environment": environment.describe(args.threads),
        "settings": described | {"rounds": settings.rounds or ROUNDS},
        "left_out": left_out,
        "cases": measured,
    }
    result["bars"] = [] if args.quick else goals.judge(result)
    return result


def _systems(wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The systems of a run, and why others are left out."""
    left_out = {TORCH: "not installed"} if TORCH in wanted and missing("torch") else {}
    chosen = {FLAX, *wanted} - left_out.keys()
    return [name for name in SYSTEMS if name in chosen], left_out


def measure_case(
    case: Case, wanted: list[str], settings: Settings, advance: Callable[[float], None]
) -> dict:
    """Measure all systems of one model.

    Its entry of the result has `contestants` with milliseconds, memory and what building them took;
    `speed`, how many times as long the model as it is took; `over_ours`, the same for each other
    system against `cases.SUBJECT`; `share` of the way to the ceiling; `replaced` and `left`, what
    `explain` says. BenchmarkError if a system's result is not the model's.
    """
    setting = Setting(case)
    built = {name: _build(setting, name, settings.threads) for name in wanted}
    differences = checked(case, built)
    contestants, shortest = _contestants(built.values(), settings)
    series = settings.read(
        contestants,
        ROUNDS,
        advance,
        shortest,
        attempts=LONG_ATTEMPTS if shortest > LONG_SECONDS else timing.MAX_ATTEMPTS,
    )
    found = {"replaced": {}, "left": {}}
    if SUBJECT in built:
        found = systems.explained(setting)
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
            name: {**_entry(system, series[name]), **differences[name]}
            for name, system in built.items()
        },
        **compare({name: one.times for name, one in series.items()}),
    }


def _build(setting: Setting, name: str, threads: int) -> System:
    if name == TORCH:
        from benchmarks.models import torch_models

        return torch_models.build(setting, threads)
    return systems.build(setting, name)


def checked(case: Case, built: dict[str, System]) -> dict[str, dict[str, float]]:
    """By name, how far a result is from Flax's, and may be; raise BenchmarkError if further.

    The ceiling is no model: its result has nothing to agree with.
    """
    found = {}
    for name, system in built.items():
        found[name] = {}
        if name in (FLAX, CEILING):
            continue
        difference = systems.difference(system.result, built[FLAX].result)
        tolerance = systems.tolerance(case, name)
        if not difference <= tolerance:
            raise BenchmarkError(
                f"{name} is wrong at {case.label}: differs by {difference:.2g}, "
                f"may by {tolerance:.2g}"
            )
        found[name] = {"difference": difference, "tolerance": tolerance}
    return found


def _contestants(built: Collection[System], settings: Settings) -> tuple[list[Contestant], float]:
    """What the stopwatch takes, and the length in seconds of the shortest reading.

    All have as many calls in a reading: what the first of them pays weighs the same.
    """
    # A model takes longer than a call from Python: no need to approach the target in steps.
    fastest = min(timing.read(system.run, 1).wall for system in built)
    calls = max(1, math.ceil(settings.reading_seconds / fastest))
    contestants = [
        Contestant(
            system.name,
            system.run,
            settle=peers.settle(system.name, settings.threads),
            calls=calls,
        )
        for system in built
    ]
    return contestants, calls * fastest


def _entry(system: System, series: Series) -> dict:
    return {
        "ms": Quartiles.of(series.times).scaled(1e3).as_dict(),
        "trace_seconds": system.trace_seconds,
        "compile_seconds": system.compile_seconds,
        "memory_bytes": system.memory,
        **series.conditions(),
    }


def compare(seconds: dict[str, list[float]]) -> dict:
    """What the seconds of a call in each round, by system, amount to: `speed`, `over_ours` and
    `share` as `measure_case` describes them. `share` is None without the systems that it needs, or
    where the ceiling was not faster in every round.
    """
    flax, ours, ceiling = (seconds.get(name) for name in (FLAX, SUBJECT, CEILING))
    share = None
    if ours and ceiling and all(a > b for a, b in zip(flax, ceiling, strict=True)):
        rounds = zip(flax, ours, ceiling, strict=True)
        share = Quartiles.of([(a - b) / (a - c) for a, b, c in rounds]).as_dict()
    others = {name: times for name, times in seconds.items() if name != SUBJECT}
    return {
        "speed": {
            name: paired_ratio(flax, times).as_dict()
            for name, times in seconds.items()
            if name != FLAX
        },
        "over_ours": {
            name: paired_ratio(times, ours).as_dict() for name, times in others.items() if ours
        },
        "share": share,
    }
