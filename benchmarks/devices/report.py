"""The tables of a result of `devices`."""

from __future__ import annotations

import statistics

from benchmarks.devices.measure import WAYS
from benchmarks.harness import pages
from benchmarks.harness.pages import Table

HEADING = "Threads, devices and processes"


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    names = [way.name for way in WAYS]
    times = [["", "divided by", *names]]
    speed = [["", "divided by", *names[1:]]]
    for case in result["cases"]:
        label = [case["name"], case["divided"]]
        medians = [1e3 * statistics.median(case["seconds"][name]) for name in names]
        times.append([*label, *(f"{m:.3g}{pages.doubt(case)}" for m in medians)])
        speed.append([*label, *(pages.spread(case["speed"][name]) for name in names[1:])])
    return [
        ("Milliseconds per call (median)", times),
        ("Speed over one thread, median (quartiles) of the rounds", speed),
    ]


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    return [
        "2 threads: one device, whose kernels and matrix products XLA's two threads share. "
        "2 devices: `--xla_force_host_platform_device_count=2` in one process with two threads. "
        "2 processes: `jax.distributed` on loopback with gloo, one core and one thread each. "
        "All on the same two cores; 1 thread has the second of them.",
        f"{settings['rounds']} interleaved rounds, readings of about "
        f"{1e3 * settings['reading_seconds']:g} ms on one thread, float32; of processes the "
        f"slowest counts. Load average at the start: {result['environment']['load_average']}.",
        "The GPT has 4 layers of width 256 with 8 heads, random weights, and "
        "`quake_jax.linen.substitute()`.",
        *pages.doubt_remarks(
            sum(case["doubtful"] for case in result["cases"]),
            "threads waited for a core that other processes had, or other threads of their own way",
        ),
    ]
