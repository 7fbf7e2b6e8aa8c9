"""Numbers of threads, devices and processes compared, from processes that take turns.

JAX fixes its threads and devices when it starts, so each way needs processes of its own; the
parent, which only waits meanwhile, asks them for readings in alternation, and ratios are taken
within a round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness import environment, timing
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Progress, Settings

ATTEMPTS = 4
# How long XLA's idle threads may go on spinning after a reading.
SETTLE_SECONDS = 0.02
# Seconds after which a process that does not answer has failed.
PATIENCE = 300

# Prepares a case in a process, which can import it: a function that runs it so many times.
Make = Callable[[Any], Callable[[int], None]]


@dataclass(frozen=True)
class Way:
    """How the cores are used: by so many processes with so many devices and threads each."""

    name: str
    processes: int = 1
    devices: int = 1
    threads: int = 1


ONE_THREAD, TWO_THREADS = Way("1 thread"), Way("2 threads", threads=2)


def compare(
    cases: Sequence[Any],
    teams: Sequence[Team],
    rounds: int,
    target: float,
    advance: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Compare ways of using the cores.

    Each team reads each case once a round, for at least `target` seconds of the first team's, with
    which the others are compared; `advance` is called after each case. For each case the result has
    the number of `calls` of a reading, the `seconds` per call of each way and round, how many
    disturbed readings were used (`doubtful`), and median and quartiles of the `speed` over the
    first way.
    """
    result = []
    for case in cases:
        for team in teams:
            team.prepare(case)
        calls = teams[0].calibrate(target)
        seconds: dict[str, list[float]] = {team.way.name: [] for team in teams}
        doubtful = 0
        for round_ in range(rounds):
            # The one that went first goes last in the next round.
            for team in teams[:: 1 - 2 * (round_ % 2)]:
                reading, disturbed = team.read(calls)
                seconds[team.way.name].append(reading)
                doubtful += disturbed
        base = seconds[teams[0].way.name]
        speed = {name: timing.paired_ratio(base, own) for name, own in seconds.items()}
        result.append({"calls": calls, "seconds": seconds, "doubtful": doubtful, "speed": speed})
        advance()
    return result


def two_threads(
    settings: Settings,
    cases: Sequence[Any],
    make: Make,
    describe: Callable[[Any], dict],
    rounds: int,
    bar: Progress | None = None,
) -> list[dict]:
    """Compare one thread with two: for each case what `describe` says of it, `seconds` and
    `doubtful` as of `compare`, and the `speedup`. `rounds` counts where the settings leave them
    open.
    """
    if not cases:
        return []
    if bar:
        bar.show("one thread against two")
    keep = settings.allocator == "keep"  # else page faults are let pass
    max_faults = timing.MAX_FAULTS if keep else float("inf")
    made = [Team(way, make, keep, max_faults) for way in (ONE_THREAD, TWO_THREADS)]
    target = TWO_THREADS.threads * settings.reading_seconds
    with at_work(made) as teams:
        advance = bar.advance if bar else lambda: None
        found = compare(cases, teams, settings.rounds or rounds, target, advance)
    return [
        {
            **describe(case),
            "seconds": entry["seconds"],
            "doubtful": entry["doubtful"],
            "speedup": entry["speed"][TWO_THREADS.name],
        }
        for case, entry in zip(cases, found, strict=True)
    ]


@contextlib.contextmanager
def at_work(teams: list[Team]) -> Iterator[list[Team]]:
    """The teams, which are stopped at the end."""
    try:
        yield teams
    finally:
        for team in teams:
            team.stop()


class Team:
    """The processes of one way, which the parent asks together, and which work only while they are
    asked for a reading; `make`, `keep_pages` (`environment.prepare`) and `max_faults` (of a
    reading) are theirs.
    """

    def __init__(
        self, way: Way, make: Make, keep_pages: bool = True, max_faults: float = timing.MAX_FAULTS
    ):
        self.way = way
        cores = environment.allowed_cores()[-2:]
        # Kept from other programs until the team stops; gRPC, which shares ports, may listen there.
        self._reserved = socket.socket()
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind(("127.0.0.1", 0))
        port = self._reserved.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")  # JAX must start afresh in each
        self._pipes, self._workers = [], []
        for i in range(way.processes):
            pipe, end = spawn.Pipe()
            own = cores[i : i + 1] if way.processes > 1 else cores
            work = (end, way, i, own, port, make, keep_pages, max_faults)
            worker = spawn.Process(target=_work, args=work, daemon=True)
            worker.start()
            end.close()  # the parent sees the end of a worker that fails
            self._pipes.append(pipe)
            self._workers.append(worker)

    def _ask(self, *question) -> list:
        try:
            for pipe in self._pipes:
                pipe.send(question)
            return [self._answer(pipe) for pipe in self._pipes]
        except (EOFError, ConnectionError) as error:
            raise BenchmarkError(f"{self.way.name}: a process failed") from error

    def _answer(self, pipe: Connection):
        if not pipe.poll(PATIENCE):
            raise BenchmarkError(f"{self.way.name}: no answer for {PATIENCE} seconds")
        return pipe.recv()

    def describe(self) -> dict:
        return self._ask("describe")[0]

    def prepare(self, case: Any) -> None:
        self._ask("prepare", case)

    def calibrate(self, target: float) -> int:
        return self._ask("calibrate", target)[0]

    def read(self, calls: int) -> tuple[float, bool]:
        """Seconds per call of the slowest process, and whether the reading was disturbed."""
        best = None
        for _ in range(ATTEMPTS):
            time.sleep(SETTLE_SECONDS)
            readings = self._ask("read", calls)
            seconds = max(wall for wall, _ in readings) / calls
            disturbed = any(was_disturbed for _, was_disturbed in readings)
            best = min(best or (seconds, disturbed), (seconds, disturbed))
            if not disturbed:
                return seconds, False
        return best[0], True

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for worker in self._workers:
            worker.join(timeout=20)
            if worker.is_alive():
                worker.kill()
                worker.join()
        self._reserved.close()


def _work(pipe: Connection, way: Way, number, cores, port, make, keep_pages, max_faults) -> None:
    """Answer the parent until it closes the pipe."""
    environment.pin(cores)
    flags = os.environ.get("XLA_FLAGS", "")
    # The last of two flags counts.
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={way.devices}"
    environment.prepare(way.threads, keep_pages)

    import jax

    if way.processes > 1:
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(address, way.processes, number, coordinator_bind_address=address)
    program = None
    with contextlib.suppress(EOFError):
        while True:
            question, *rest = pipe.recv()
            answer = None
            if question == "describe":
                import quake_jax  # noqa: F401  the description names its instruction set

                answer = environment.describe(way.threads)
            elif question == "prepare":
                program = make(*rest)
                program(2)
            elif question == "calibrate":
                answer = timing.calibrate(program, *rest)
            else:
                reading = timing.read(program, *rest)
                answer = reading.wall, timing.disturbance(reading, max_faults) is not None
            pipe.send(answer)
    if way.processes > 1:
        jax.distributed.shutdown()
