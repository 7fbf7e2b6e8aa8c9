"""How much faster two threads are than one, from two processes that take turns.

JAX fixes its number of threads when it starts, so each number needs a process of its own; the
parent, which only waits meanwhile, asks them in alternation, and readings are paired by round.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.cases import SUBJECT_ORDER, VIT_SHAPE, Case
from benchmarks.timing import Contestant

FUNCTIONS = ("softmax", "log_softmax", "gelu_tanh", "exp")
THREADS = (1, 2)
# How long XLA's idle threads may go on spinning after a reading.
SETTLE_SECONDS = 0.02


def choose(wanted: list[Case]) -> list[Case]:
    """The cases of a run for which the threads are compared."""
    return [
        case
        for case in wanted
        if case.function in FUNCTIONS and (case.shape, case.dtype) == (VIT_SHAPE, "float32")
    ]


def measure(
    cases: list[Case],
    rounds: int,
    target: float,
    keep_pages: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Compare one thread with two.

    Args:
        cases: What to run, at order `cases.SUBJECT_ORDER`.
        rounds: Number of rounds: readings of each number of threads.
        target: Least length of a reading in seconds.
        keep_pages: As in `environment.prepare`.
        advance: Called after each case, for a progress bar.

    Returns:
        For each case its function, shape and dtype, the seconds per call of either in each round,
        the number of disturbed readings used, and median and quartiles of the `speedup`.
    """
    compared = compare(cases, _quake, rounds, target, keep_pages, advance)
    return [
        {
            "function": case.function,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "order": SUBJECT_ORDER,
            **entry,
        }
        for case, entry in zip(cases, compared, strict=True)
    ]


def _quake(case: Case) -> Contestant:
    from benchmarks import systems

    return systems.quake(systems.Buffers(case), SUBJECT_ORDER)


def compare(
    cases: Sequence[Any],
    make: Callable[[Any], Contestant],
    rounds: int,
    target: float,
    keep_pages: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Compare one thread with two, whatever is timed.

    Args:
        cases: What to run.
        make: A function of a module, called in either process: the contestant of a case.
        rounds: As in `measure`, like the rest.
        target: Least length of a reading in seconds.
        keep_pages: As in `environment.prepare`.
        advance: Called after each case.

    Returns:
        For each case its `seconds`, `doubtful` and `speedup`, as `measure` describes them.
    """
    from benchmarks.timing import paired_ratio

    spawn = multiprocessing.get_context("spawn")  # JAX must start afresh in each
    pipes, workers = {}, []
    for threads in THREADS:
        pipes[threads], end = spawn.Pipe()
        worker = spawn.Process(
            target=_work, args=(end, threads, make, rounds, target, keep_pages), daemon=True
        )
        worker.start()
        end.close()  # the parent sees the end of a worker that fails
        workers.append(worker)
    result = []
    for case in cases:
        for pipe in pipes.values():
            pipe.send(case)
            pipe.recv()
        seconds = {threads: [] for threads in THREADS}
        doubtful = 0
        for round_ in range(rounds):
            # The one that went first goes second in the next round.
            for threads in THREADS[:: 1 - 2 * (round_ % 2)]:
                time.sleep(SETTLE_SECONDS)
                pipes[threads].send("read")
                reading, disturbed = pipes[threads].recv()
                seconds[threads].append(reading)
                doubtful += disturbed
        speedup = paired_ratio(seconds[1], seconds[2])
        result.append(
            {
                "seconds": {str(threads): times for threads, times in seconds.items()},
                "doubtful": doubtful,
                "speedup": speedup.as_dict(),
            }
        )
        advance()
    for pipe in pipes.values():
        pipe.send(None)
    for worker in workers:
        worker.join()
    return result


def _work(
    pipe: Connection,
    threads: int,
    make: Callable[[Any], Contestant],
    rounds: int,
    target: float,
    keep_pages: bool,
) -> None:
    """Answer the parent: a case prepares its reading, "read" takes one, None is the end."""
    from benchmarks import environment

    environment.prepare(threads, keep_pages)

    from benchmarks import timing

    max_faults = timing.MAX_FAULTS if keep_pages else float("inf")
    while (case := pipe.recv()) is not None:
        contestant = make(case)
        calls = timing.calibrate(contestant.run, target)
        pipe.send("ready")
        for _ in range(rounds):
            pipe.recv()
            series = timing.Series()
            timing.read_well(contestant, calls, series, threads, max_faults)
            pipe.send((series.times[0], series.doubtful))
