"""The run of `python -m benchmarks models`.

Nothing of a model is changed but what `quake_jax.accelerate` or the interceptor changes; all
systems of a model are timed in the same rounds, and their results compared first.
"""

import argparse
import dataclasses
import gc
import math
from collections.abc import Callable, Collection

import numpy as np

from benchmarks.harness import peers, timing
from benchmarks.harness.errors import BenchmarkError, missing, quake_jax
from benchmarks.harness.frame import Settings, progress
from benchmarks.harness.peers import ONNXRUNTIME, OPENVINO, TORCH
from benchmarks.harness.timing import Contestant, paired_ratio, quartiles
from benchmarks.models import cases, goals, profile, systems
from benchmarks.models.cases import CASES, CEILING, FLAX, PACKED, PEERS, ROUNDS, SUBJECT, Case
from benchmarks.models.systems import Setting, System

# A reading of a second that was disturbed would most likely be disturbed again.
LONG_SECONDS, LONG_ATTEMPTS = 0.5, 3


def measure(args: argparse.Namespace) -> dict:
    """Run all cases that the options ask for."""
    quake_jax("accelerate")  # is it there?
    asked = cases.systems(args.system, args.weights)
    left_out = {name: reason for name in asked if (reason := cannot_run(name, args.dtype))}
    wanted = [name for name in asked if name not in left_out]
    settings = Settings.of(args, reading_seconds=(0.1, 1e-3), quick_rounds=2)
    settings = dataclasses.replace(settings, rounds=settings.rounds or ROUNDS)
    chosen, measured = cases.choose(args.model or CASES, args.dtype, args.quick), []
    with progress(len(chosen)) as bar:
        bar.show("warm-up")
        systems.warm_up(wanted, args.dtype)
        for case in bar.over(chosen, lambda case: case.label):
            entry = measure_case(case, wanted, settings, bar.advance, left_out, args.profile)
            measured.append(entry)
            gc.collect()  # the weights of one model at a time
    described = {"systems": wanted, "dtype": args.dtype}
    parts = {"left_out": left_out, "cases": measured}
    return settings.result(described, goals, args.dtype == goals.DTYPE, **parts)


def cannot_run(name: str, dtype: str = goals.DTYPE) -> str | None:
    """Why this machine cannot run a system on models of a dtype, if so."""
    if name in PEERS and name != TORCH and dtype != goals.DTYPE:
        return f"for models in {goals.DTYPE}"
    if name not in PEERS or name == cases.FLAX_BFLOAT16:
        return None
    library = name.partition("-")[0]
    needed = [library, *(TORCH for _ in "-" if library in (OPENVINO, "zentorch"))]
    needed += ["onnx"] if library == ONNXRUNTIME else []
    needed += ["nncf"] if library == OPENVINO and "int" in name else []
    if absent := missing(*needed):
        return f"{' and '.join(absent)} not installed"
    if "bfloat16" in name and not peers.cpu_has(*peers.BFLOAT16_FLAGS):
        return peers.NO_BFLOAT16
    return None


def measure_case(
    case: Case,
    wanted: list[str],
    settings: Settings,
    advance: Callable[[float], None],
    left_out: dict[str, str] | None = None,
    profiled: bool = False,
) -> dict:
    """Measure all systems of one model.

    Its entry of the result has `contestants` with milliseconds, memory and what building them took;
    `speed`, how many times as long the model as it is took; `over_ours`, the same for each other
    system against `cases.SUBJECT`; `ratios`, the same for peers of the same precision against each
    packed one; `share` of the way to the ceiling; `profile`, if `profiled`, where the time of each
    packed one goes; `replaced` and `left`, what `explain` says. BenchmarkError if a system's result
    is not the model's; a peer is left out then, and `left_out` gets the reason.
    """
    setting = Setting(case)
    left_out = {} if left_out is None else left_out
    built = {}
    for name in wanted:
        if reason := cases.not_for(name, case) or _add(built, setting, name, settings.threads):
            left_out[f"{name} at {case.name}"] = reason
    contestants, shortest = _contestants(built.values(), settings)
    attempts = LONG_ATTEMPTS if shortest > LONG_SECONDS else timing.MAX_ATTEMPTS
    series = settings.read(contestants, ROUNDS, advance, shortest, attempts)
    return {
        "model": case.name,
        "title": case.title,
        "dtype": case.dtype,
        "batch": case.batch,
        "length": case.length or case.sizes.tokens,
        "weights": "random",
        "parameters": setting.parameter_count,
        **(systems.explained(setting) if SUBJECT in built else {"replaced": {}, "left": {}}),
        "contestants": {
            name: {
                "ms": series[name].quartiles(1e3),
                "trace_seconds": system.trace_seconds,
                "compile_seconds": system.compile_seconds,
                "memory_bytes": system.memory,
                **series[name].conditions(),
                **system.difference,
            }
            for name, system in built.items()
        },
        **compare({name: one.times for name, one in series.items()}),
        "profile": {
            name: profile.shares(system)
            for name, system in built.items()
            if profiled and name in PACKED
        },
    }


def _add(built: dict[str, System], setting: Setting, name: str, threads: int) -> str | None:
    """Build a system; a peer that fails or is wrong is not added, and the reason returned. The
    ceiling is no model: its result has nothing to agree with.
    """
    try:
        system = _build(setting, name, threads)
        if name not in (FLAX, CEILING):
            system.difference = checked(setting.case, name, system.result, built[FLAX].result)
    except Exception as error:  # the classes of others are not public
        if name not in PEERS:
            raise
        reason = str(error).strip().splitlines()[0]
        ours = isinstance(error, BenchmarkError)
        return reason if ours else f"{type(error).__name__}: {reason}"
    built[name] = system
    return None


def _build(setting: Setting, name: str, threads: int) -> System:
    library = name.partition("-")[0]
    if name not in PEERS or name == cases.FLAX_BFLOAT16:
        return systems.build(setting, name)
    if library == ONNXRUNTIME:
        from benchmarks.models import onnx_models

        return onnx_models.build(setting, name, threads)
    from benchmarks.models import torch_models

    build = torch_models.build_openvino if library == OPENVINO else torch_models.build
    return build(setting, name, threads)


def checked(case: Case, name: str, result: np.ndarray, flax: np.ndarray) -> dict[str, float]:
    """How far a result is from Flax's, and may be; raise BenchmarkError if it is further."""
    difference, tolerance = systems.difference(result, flax), systems.tolerance(case, name)
    if not difference <= tolerance:
        differs = f"differs by {difference:.2g}, may by {tolerance:.2g}"
        raise BenchmarkError(f"{name} is wrong at {case.label}: {differs}")
    return {"difference": difference, "tolerance": tolerance}


def _contestants(built: Collection[System], settings: Settings) -> tuple[list[Contestant], float]:
    """What the stopwatch takes, and the length in seconds of the shortest reading.

    All have as many calls in a reading: what the first of them pays weighs the same.
    """
    # A model takes longer than a call from Python: no need to approach the target in steps.
    fastest = min(timing.read(system.run, 1).wall for system in built)
    calls = max(1, math.ceil(settings.reading_seconds / fastest))
    contestants = []
    for system in built:
        settle = peers.settle(system.name.partition("-")[0], settings.threads)
        contestants.append(Contestant(system.name, system.run, settle=settle, calls=calls))
    return contestants, calls * fastest


def compare(seconds: dict[str, list[float]]) -> dict:
    """What the seconds of a call in each round, by system, amount to: `speed`, `over_ours`,
    `ratios` and `share` as `measure_case` describes them. `share` is None without the systems that
    it needs, or where the ceiling was not faster in every round.
    """
    flax, ours, ceiling = (seconds.get(name) for name in (FLAX, SUBJECT, CEILING))
    share = None
    if ours and ceiling and all(a > b for a, b in zip(flax, ceiling, strict=True)):
        rounds = zip(flax, ours, ceiling, strict=True)
        share = quartiles([(a - b) / (a - c) for a, b, c in rounds])
    speed = {name: paired_ratio(flax, times) for name, times in seconds.items()}
    over = {name: paired_ratio(times, ours) for name, times in seconds.items() if ours}
    return {
        "speed": {name: ratio for name, ratio in speed.items() if name != FLAX},
        "over_ours": {name: ratio for name, ratio in over.items() if name != SUBJECT},
        "ratios": {
            ours: {
                name: paired_ratio(times, seconds[ours])
                for name, times in seconds.items()
                if PEERS.get(name) == PACKED[ours]
            }
            for ours in seconds
            if ours in PACKED
        },
        "share": share,
    }
