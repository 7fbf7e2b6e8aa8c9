"""Where the time of a compiled model goes: the profiler's events of its instructions, by kind.

Importing this module imports JAX: `environment.prepare` comes first.
"""

import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jax

from benchmarks.models.systems import System

DENSE, ATTENTION, OTHERS = "dense layers", "attention", "other kernels"
COPIES, XLA, DISPATCH = "XLA's copies", "XLA's rest", "dispatch"
KINDS = (DENSE, ATTENTION, OTHERS, COPIES, XLA, DISPATCH)
CALLS = 3


def shares(system: System) -> dict[str, float]:
    """The share of the time of some calls that each of `KINDS` takes; dispatch is what no
    instruction takes, with what the profiler adds to each of them.
    """
    kinds = kinds_of(system.program.as_text())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter_ns()
            system.run(CALLS)
            whole = time.perf_counter_ns() - start
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    found = Counter()
    for plane in profile.planes:
        for line in plane.lines:
            found += own_times(
                (kinds[event.name], event.start_ns, event.duration_ns)
                for event in line.events
                if event.name in kinds
            )
    found[DISPATCH] = max(0, whole - found.total())
    return {kind: found[kind] / found.total() for kind in KINDS}


def kinds_of(program: str) -> dict[str, str]:
    """The kind of each instruction of a program, by its name."""
    found = {}
    for name, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$", program, re.MULTILINE):
        target = re.search(r'custom_call_target="quake_jax_(\w+)"', rest)
        if target:
            attends = target[1].endswith("attention")
            found[name] = DENSE if target[1] == "dense" else ATTENTION if attends else OTHERS
        else:
            found[name] = COPIES if re.search("copy|transpose", name) else XLA
    return found


def own_times(events: Iterable[tuple[str, float, float]]) -> Counter:
    """The time of each kind of a thread's events (kind, start, duration), each without the events
    inside it, such as those of a loop's body.
    """
    times, around = Counter(), []  # kind and end of the events that are not over
    for kind, start, duration in sorted(events, key=lambda event: (event[1], -event[2])):
        while around and around[-1][1] <= start:
            around.pop()
        if around:
            times[around[-1][0]] -= duration
        times[kind] += duration
        around.append((kind, start + duration))
    return times
