"""The stopwatch: readings of several contestants in interleaved rounds, and what they amount to.

A reading that was disturbed (page faults, or another process on the core) is thrown away, counted
and repeated; contestants are compared only within a round, so that slow drifts cancel.
"""

from __future__ import annotations

import contextlib
import glob
import random
import resource
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

# A minor fault costs about half a microsecond; 16 of them are 0.3 % of a 3 ms reading.
MAX_FAULTS = 16
# Of page faults, at half a microsecond each, in a reading that lasts long.
FAULT_SHARE, FAULT_SECONDS = 0.003, 0.5e-6
# Share of a reading that threads may have waited for a core that others were using.
MAX_WAIT_SHARE = 0.02
MAX_WAIT_SECONDS = 20e-6
# A thread with less CPU time than this share of a reading is not one of its workers.
WORKER_SHARE = 0.1
MAX_ATTEMPTS = 8
# Longer and longer naps between attempts: the kernel gives a waking thread the core at once.
NAP_SECONDS = 2e-3


@dataclass(frozen=True)
class Reading:
    """One timed stretch of several calls."""

    calls: int
    wall: float  # seconds that passed
    cpu: float  # CPU seconds of all threads of the process
    faults: int  # minor page faults of the process
    waited: float  # seconds that the threads at work were ready but had no core, added up


@dataclass
class Contestant:
    """Something to time."""

    name: Hashable  # in tables, or another key among those of a round
    run: Callable[[int], None]  # returns when the operation was done so many times
    overhead: float = 0.0  # seconds per call that are the caller's: subtracted
    # Seconds during which its idle threads still spin after a run. They would take a core from
    # whoever is next, so the stopwatch waits that long.
    settle: float = 0.0
    calls: int | None = None  # of a reading; None to find out how many make one long enough


@dataclass
class Series:
    """The readings of one contestant, one per round."""

    overhead: float = 0.0  # the contestant's
    readings: list[Reading] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds per call, less the overhead
    rejected: dict[str, int] = field(default_factory=lambda: {"faults": 0, "preempted": 0})
    doubtful: int = 0  # rounds that took a disturbed reading, because all attempts were

    @property
    def median(self) -> float:
        """Of the seconds per call."""
        return statistics.median(self.times)

    def quartiles(self, scale: float = 1.0) -> dict[str, float]:
        """Of the seconds per call in another unit, for JSON."""
        return quartiles(self.times, scale)

    def add(self, reading: Reading, seconds: float) -> None:
        """Add the reading of a round, `seconds` long."""
        self.readings.append(reading)
        self.times.append(seconds / reading.calls - self.overhead)

    def conditions(self) -> dict:
        """What a result says of the readings beside their times."""
        faults = sum(reading.faults for reading in self.readings)
        return {
            "calls_per_reading": self.readings[0].calls,
            # The number of threads that were really at work.
            "cpu_per_wall": statistics.median(one.cpu / one.wall for one in self.readings),
            "faults": faults,
            "faults_per_call": faults / sum(reading.calls for reading in self.readings),
            "rejected": self.rejected,
            "doubtful": self.doubtful,
        }


def quartiles(sample: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Of a sample times a positive factor the quartiles: "low", "median", "high"."""
    found = sample * 3
    if len(sample) > 1:
        found = statistics.quantiles(sample, n=4, method="inclusive")
    return dict(zip(("low", "median", "high"), (scale * x for x in found), strict=True))


def paired_ratio(
    other: Sequence[float], subject: Sequence[float], scale: float = 1.0
) -> dict[str, float]:
    """How many times as long `other` took as `subject`, in seconds of the same rounds: median and
    quartiles of the rounds' ratios, times a factor. Above 1 the subject is faster.
    """
    return quartiles([a / b for a, b in zip(other, subject, strict=True)], scale)


def read(run: Callable[[int], None], calls: int) -> Reading:
    """Time `run(calls)` once."""
    before = _thread_times()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu = time.process_time()
    wall = time.perf_counter()
    run(calls)
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    after = _thread_times()
    waited = waiting(before, after, wall) if after else max(0.0, wall - cpu)
    return Reading(calls, wall, cpu, faults, waited)


ThreadTimes = dict[int, tuple[float, float]]


def _thread_times() -> ThreadTimes:
    """CPU seconds and seconds without a core of each thread of the process (empty off Linux)."""
    times = {}
    for path in glob.glob("/proc/self/task/*/schedstat"):
        with contextlib.suppress(OSError), open(path) as file:  # of a thread that has just ended
            on_core, waited, _ = file.read().split()
            times[int(path.split("/")[4])] = (1e-9 * int(on_core), 1e-9 * int(waited))
    return times


def waiting(before: ThreadTimes, after: ThreadTimes, wall: float) -> float:
    """How many seconds the threads that did the work had to wait for a core, added up, in a reading
    of `wall` seconds.

    Idle helpers that want the core for an instant are left out: where all threads are pinned to one
    core, they wait for us and not for others.
    """
    total = 0.0
    for thread, (on_core, waited) in after.items():
        on_core_before, waited_before = before.get(thread, (0.0, 0.0))
        worked = on_core - on_core_before >= WORKER_SHARE * wall
        if worked or thread == threading.get_native_id():
            total += waited - waited_before
    return total


def disturbance(reading: Reading, max_faults: float = MAX_FAULTS) -> str | None:
    """Say why a reading must not be used: "faults", "preempted", or None for a good one."""
    if reading.faults > max_faults:
        return "faults"
    if reading.waited > max(MAX_WAIT_SHARE * reading.wall, MAX_WAIT_SECONDS):
        return "preempted"
    return None


def calibrate(run: Callable[[int], None], target: float) -> int:
    """Find how many calls make a reading of at least `target` seconds."""
    calls = 1
    run(calls)  # compiles, touches the memory
    while True:
        wall = min(read(run, calls).wall for _ in range(2))
        if wall >= target:
            return calls
        # Short readings are all overhead: approach the target in steps.
        calls = max(calls + 1, min(8 * calls, round(1.2 * calls * target / max(wall, 1e-9))))


def measure(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    target: float,
    threads: int,
    max_faults: float = MAX_FAULTS,
    advance: Callable[[], None] = lambda: None,
    attempts: int = MAX_ATTEMPTS,
) -> dict[str, Series]:
    """Time the contestants in interleaved rounds, in a new random order each round.

    A reading lasts `target` seconds at least, and is taken as often as `attempts` says until it has
    at most `max_faults` page faults and no thread waited; `advance` is called after it. Returns the
    series of each contestant by its name.
    """
    order = random.Random(0)
    calls = {c.name: c.calls or calibrate(c.run, target) for c in contestants}
    series = {c.name: Series(c.overhead) for c in contestants}
    for _ in range(rounds):
        for contestant in order.sample(contestants, len(contestants)):
            one = contestant.name
            _read_well(contestant, calls[one], series[one], threads, max_faults, attempts)
            time.sleep(contestant.settle)
            advance()
    return series


def _read_well(contestant, calls, series, threads, max_faults, attempts) -> None:
    """Add one good reading to the series, or after so many attempts the least disturbed one."""
    disturbed = []
    for attempt in range(attempts):
        time.sleep(attempt * NAP_SECONDS)
        if calls > 1:
            contestant.run(1)  # what the one before left in the caches is not ours to pay for
        reading = read(contestant.run, calls)
        reason = disturbance(reading, max_faults)
        if reason is None:
            series.add(reading, reading.wall)
            return
        series.rejected[reason] += 1
        disturbed.append(reading)
    series.doubtful += 1
    # With one thread its CPU time leaves out at least the time that it waited for the core.
    best = min(disturbed, key=lambda reading: reading.cpu if threads == 1 else reading.wall)
    series.add(best, best.cpu if threads == 1 else best.wall)
