"""`python -m benchmarks devices`: two cores as threads, as devices of one process, as processes.

Each way has processes of its own, for JAX fixes its threads and devices when it starts; the parent
asks them for readings in turn, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import socket
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environment
from benchmarks.errors import BenchmarkError, check_files
from benchmarks.ops import positive

HELP = "two cores as threads, as devices of one process, and as processes of jax.distributed"
ROUNDS = 9
ATTEMPTS = 4
# How long XLA's idle threads may go on spinning after a reading.
SETTLE_SECONDS = 0.02
# Seconds after which a process that does not answer has failed.
PATIENCE = 300


@dataclass(frozen=True)
class Way:
    """How the cores are used: by so many processes with so many devices and threads each."""

    name: str
    processes: int = 1
    devices: int = 1
    threads: int = 1


BASE = Way("1 thread")
WAYS = (
    BASE,
    Way("2 threads", threads=2),
    Way("2 devices", devices=2, threads=2),
    Way("2 processes", processes=2),
)


@dataclass(frozen=True)
class Case:
    """What is run, and along which axis of the mesh it is divided: "data" or "model"."""

    name: str
    axis: str = "data"


CASES = (
    Case("softmax 8×12×197×197"),
    Case("gelu 8×197×3072"),
    Case("attention 8×197×12×64"),
    Case("attention 8×197×12×64", "model"),
    Case("GPT prefill 8×256"),
    Case("GPT prefill 8×256", "model"),
)
DIVIDED = {"data": "batch", "model": "heads"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--rounds", type=positive, help=f"interleaved rounds ({ROUNDS}; 2 with --quick)")
    add("--quick", action="store_true", help="small arrays, short readings: a try, no result")
    add("--json", type=Path, metavar="PATH", help="write the result as JSON")
    add("--markdown", type=Path, metavar="PATH", help="write or replace the section of this run")


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write the files asked for."""
    check_files(args.json, args.markdown)
    if importlib.util.find_spec("flax") is None:
        raise BenchmarkError("flax is not installed: pip install '.[bench,flax]'")
    if not hasattr(os, "sched_getaffinity"):
        raise BenchmarkError("processes cannot be tied to cores on this system: it takes Linux")
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        raise BenchmarkError(f"two cores are needed; this process may use {cores}")

    from benchmarks import report

    result = measure(args.rounds or (2 if args.quick else ROUNDS), args.quick)
    report.print_page(report.headline(result), tables(result), remarks(result))
    if args.json:
        report.to_json(result, args.json)
    if args.markdown:
        heading = "Threads, devices and processes"
        report.write_section(result, args.markdown, heading, tables(result), remarks(result))


def measure(rounds: int, quick: bool) -> dict:
    """Run all cases in all ways.

    Args:
        rounds: Number of rounds: readings of each case in each way.
        quick: Whether to shrink the cases.

    Returns:
        The result, a dictionary that json can write: for each case the seconds per call of each
        way and round, how many disturbed readings were used, and median and quartiles of the
        `speed` over one thread. A process works only while its reading is taken.

    Raises:
        BenchmarkError: A process failed.
    """
    from benchmarks import timing

    target = 1e-3 if quick else 0.1
    teams = [Team(way, quick) for way in WAYS]
    try:
        described = teams[1].describe()
        load = os.getloadavg()[0]
        measured = []
        for case in CASES:
            for team in teams:
                team.prepare(case)
            calls = teams[0].calibrate(target)
            seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
            doubtful = 0
            for round_ in range(rounds):
                # The one that went first goes last in the next round.
                for team in teams[:: 1 - 2 * (round_ % 2)]:
                    reading, disturbed = team.read(calls)
                    seconds[team.way.name].append(reading)
                    doubtful += disturbed
            base = seconds[BASE.name]
            speed = {
                name: timing.paired_ratio(base, times).as_dict() for name, times in seconds.items()
            }
            measured.append(
                {
                    "name": case.name,
                    "divided": DIVIDED[case.axis],
                    "calls": calls,
                    "seconds": seconds,
                    "doubtful": doubtful,
                    "speed": speed,
                }
            )
    finally:
        for team in teams:
            team.stop()
    return {
        "benchmark": "devices",
        "environment": described | {"load_average": round(load, 2)},
        "settings": {"rounds": rounds, "reading_seconds": target, "quick": quick},
        "cases": measured,
    }


class Team:
    """The processes of one way, which the parent asks together."""

    def __init__(self, way: Way, quick: bool):
        self.way = way
        cores = sorted(os.sched_getaffinity(0))[-2:]
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
            worker = spawn.Process(target=_work, args=(end, way, i, own, port, quick), daemon=True)
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

    def _answer(self, pipe):
        if not pipe.poll(PATIENCE):
            raise BenchmarkError(f"{self.way.name}: no answer for {PATIENCE} seconds")
        return pipe.recv()

    def describe(self) -> dict:
        return self._ask("describe")[0]

    def prepare(self, case: Case) -> None:
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


def _work(pipe, way: Way, number: int, cores: list[int], port: int, quick: bool) -> None:
    """Answer the parent until it closes the pipe."""
    os.sched_setaffinity(0, cores)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={way.devices}"
    environment.prepare(way.threads)

    import jax

    if way.processes > 1:
        address = f"127.0.0.1:{port}"
        jax.distributed.initialize(address, way.processes, number, coordinator_bind_address=address)

    from benchmarks import timing

    program = None
    while True:
        try:
            question, *rest = pipe.recv()
        except EOFError:
            break
        if question == "describe":
            import quake_jax  # noqa: F401  the description names its instruction set

            answer = environment.describe(way.threads)
        elif question == "prepare":
            program = _program(*rest, quick)
            program(2)
            answer = None
        elif question == "calibrate":
            answer = timing.calibrate(program, *rest)
        else:
            reading = timing.read(program, *rest)
            # Page faults are part of what a fresh result costs.
            answer = reading.wall, timing.disturbance(reading, float("inf")) is not None
        pipe.send(answer)
    if way.processes > 1:
        jax.distributed.shutdown()


def _program(case: Case, quick: bool):
    """A function that runs a case so many times on all devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = jax.device_count()
    shape = (devices, 1) if case.axis == "data" else (1, devices)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    f, operands, specs, result = _function(case.name.split()[0], quick)

    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec or P()))

    operands = jax.tree.map(place, operands, specs)
    compiled = jax.jit(f, out_shardings=NamedSharding(mesh, result))

    def run(calls: int) -> None:
        for _ in range(calls):
            # Each: calls on several devices need not end in the order in which they began.
            compiled(*operands).block_until_ready()

    return run


def _function(name: str, quick: bool):
    """A function, its operands and how they and its result are divided."""
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import quake_jax

    def normal(*shape):
        if quick:
            shape = tuple(min(n, 16) for n in shape)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    rows, heads = P("data"), P("data", None, "model")
    if name == "softmax":
        return quake_jax.softmax, (normal(8, 12, 197, 197),), (rows,), rows
    if name == "gelu":
        return quake_jax.gelu, (normal(8, 197, 3072),), (rows,), rows
    if name == "attention":
        x = normal(8, 197, 12, 64)
        return quake_jax.dot_product_attention, (x, x, x), (heads,) * 3, heads
    return _prefill(quick)


def _prefill(quick: bool):
    """The logits after eight texts, by a GPT of four layers with random weights."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import quake_jax.linen
    from benchmarks import models_cases, models_flax

    sizes = models_cases.Sizes(layers=4, width=256, heads=8, vocabulary=1024, positions=256)
    if quick:
        sizes = models_cases.Sizes(layers=1, width=32, heads=2, vocabulary=64, positions=16)
    case = models_cases.Case("gpt", "GPT", "gpt2", sizes, 8, sizes.positions)
    model = models_flax.module(case)
    parameters, _ = models_flax.variables(case)

    def spec(path, _):
        """Heads and hidden units: outputs of what makes them, inputs of what reads them."""
        module, leaf = path[-2].key, path[-1].key
        if module in ("query", "key", "value"):
            return P(None, "model") if leaf == "kernel" else P("model")
        if module == "Dense_0":
            return P(None, "model") if leaf == "kernel" else P("model")
        return P("model") if module in ("out", "Dense_1") and leaf == "kernel" else P()

    def f(parameters, tokens, places):
        with quake_jax.linen.substitute():
            return model.apply({"params": parameters}, tokens, places)

    parameters = jax.tree.map(np.asarray, parameters)
    specs = jax.tree_util.tree_map_with_path(spec, parameters)
    tokens, places = map(np.asarray, models_flax.inputs(case))
    return f, (parameters, tokens, places), (specs, P("data"), P()), P("data")


def tables(result: dict) -> list[tuple[str, list[list[str]]]]:
    """Make the tables, as `report.print_page` takes them."""
    from benchmarks import report

    names = [way.name for way in WAYS]
    times = [["", "divided by", *names]]
    speed = [["", "divided by", *names[1:]]]
    for case in result["cases"]:
        label = [case["name"], case["divided"]]
        medians = [1e3 * statistics.median(case["seconds"][name]) for name in names]
        mark = "†" if case["doubtful"] else ""
        times.append([*label, *(f"{m:.3g}{mark}" for m in medians)])
        speed.append([*label, *(report.spread(case["speed"][name]) for name in names[1:])])
    return [
        ("Milliseconds per call (median)", times),
        ("Speed over one thread, median (quartiles) of the rounds", speed),
    ]


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    doubtful = sum(case["doubtful"] for case in result["cases"])
    lines = [
        "2 threads: one device, whose kernels and matrix products XLA's two threads share. "
        "2 devices: `--xla_force_host_platform_device_count=2` in one process with two threads. "
        "2 processes: `jax.distributed` on loopback with gloo, one core and one thread each. "
        "All on the same two cores; 1 thread has the second of them.",
        f"{settings['rounds']} interleaved rounds, readings of about "
        f"{1e3 * settings['reading_seconds']:g} ms on one thread, float32; of processes the "
        f"slowest counts. Load average at the start: {result['environment']['load_average']}.",
        "The GPT has 4 layers of width 256 with 8 heads, random weights, and "
        "`quake_jax.linen.substitute()`.",
    ]
    if doubtful:
        lines.append(
            f"† {doubtful} disturbed readings had to be used: threads waited for a core that other "
            "processes had, or other threads of their own way."
        )
    return lines
