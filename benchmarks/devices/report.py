"""The tables of a result of `devices`."""

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
    doubtful = sum(case["doubtful"] for case in result["cases"])
    return pages.prose("devices/remarks.txt", result, doubtful=doubtful)
