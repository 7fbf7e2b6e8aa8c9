"""The run of `python -m benchmarks devices`: two cores used in several ways, in turns."""

import argparse
import os
from functools import partial

from benchmarks.devices.command import ROUNDS
from benchmarks.devices.programs import CASES, DIVIDED, make
from benchmarks.harness import processes
from benchmarks.harness.frame import progress
from benchmarks.harness.processes import ONE_THREAD, TWO_THREADS, Team, Way

WAYS = (
    ONE_THREAD,
    TWO_THREADS,
    Way("2 devices", devices=2, threads=2),
    Way("2 processes", processes=2),
)


def measure(args: argparse.Namespace) -> dict:
    """Run all cases in all ways; of each case the result has what `processes.compare` finds."""
    rounds, target = args.rounds or (2 if args.quick else ROUNDS), 1e-3 if args.quick else 0.1
    with processes.at_work(start(args.quick)) as teams, progress(len(CASES)) as bar:
        described = teams[1].describe()
        load = os.getloadavg()[0]
        found = processes.compare(CASES, teams, rounds, target, bar.advance)
    return {
        "benchmark": "devices",
        "environment": described | {"load_average": round(load, 2)},
        "settings": {"rounds": rounds, "reading_seconds": target, "quick": args.quick},
        "cases": [
            {"name": case.name, "divided": DIVIDED[case.axis], **entry}
            for case, entry in zip(CASES, found, strict=True)
        ],
    }


def start(quick: bool, ways: tuple[Way, ...] = WAYS) -> list[Team]:
    """Start the processes of each way. Page faults are part of what a fresh result costs."""
    return [Team(way, partial(make, quick=quick), max_faults=float("inf")) for way in ways]
