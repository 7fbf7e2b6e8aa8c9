"""Many threads that call kernels for long: no deadlock, equal results, no growth of memory.

The normal suite makes 32,000 calls with two sizes of XLA's pool. The soak test makes at least
128,000, and for ten minutes, with each of three: half an hour in all.

    pytest -s -m soak tests/test_load.py
"""

import ctypes
import gc
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from load_worker import Memory
from support import ONE_DEVICE, inputs

import quake_jax

WORKER = pathlib.Path(__file__).with_name("load_worker.py")
# Threads in XLA's intra-op pool. A short run has no time for the one in between, which all other
# tests have where there are two cores.
POOLS = {"short": (1, 8), "long": (1, 2, 8)}
# The most bytes per call. A long run is one whose caches have settled: what it has left is the
# noise of malloc, and a hundred bytes lost by one program of the thirty would be more.
LONG = 128_000  # calls
MAX_HELD = {"short": 20.0, "long": 3.0}
MAX_RESIDENT = 300.0  # in a long run; for what does not come from malloc
# XLA's own products, which it may sum in another order with more threads.
SUMMED_BY_XLA = {"gradient_of_attention"}


def growth(samples) -> float:
    """Return bytes per call from (calls, bytes) after each round, without the first third.

    It is the median of the slopes between any two samples (Theil and Sen), so a table that is
    enlarged once in a while does not count, and what each call loses does.
    """
    samples = samples[len(samples) // 3 :]
    return statistics.median(
        (bytes_b - bytes_a) / (calls_b - calls_a)
        for k, (calls_a, bytes_a) in enumerate(samples)
        for calls_b, bytes_b in samples[k + 1 :]
        if calls_b > calls_a
    )


def run_worker(*arguments, pool: int = 2) -> tuple[int, dict, str]:
    """Run the worker; return its exit status, its last line and what it wrote to stderr."""
    root = pathlib.Path(quake_jax.__file__).resolve().parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONMALLOC": "malloc",  # so that a lost Python object is seen
        "PJRT_NPROC": str(pool),
        "XLA_FLAGS": ONE_DEVICE,
    }
    command = [sys.executable, str(WORKER), *map(str, arguments)]
    line = "{}"
    with tempfile.TemporaryFile("w+") as errors:
        # No timeout: the worker ends itself when it no longer gets on.
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            for line in process.stdout:
                if "digests" not in line:
                    print(f"pool of {pool}: {line}", end="", flush=True)
        errors.seek(0)
        return process.returncode, json.loads(line), errors.read()


def check_load(*arguments, pools=POOLS["short"]) -> None:
    """Run the worker with each size of the pool, and assert what a service relies on."""
    digests = {}
    for pool in pools:
        status, summary, errors = run_worker(*arguments, pool=pool)
        assert status in (0, 2), errors
        assert summary["wrong"] == []
        assert summary["pool"] in (pool, None)
        digests[pool] = summary["digests"]
        assert_no_growth(summary["rounds"], f"pool of {pool}")
    for name in set(digests[1]) - SUMMED_BY_XLA:
        assert len({digests[pool][name] for pool in pools}) == 1, name


def assert_no_growth(rounds, what: str) -> None:
    """Assert that memory does not grow: rounds are (calls, bytes held, bytes resident)."""
    calls, *measures = zip(*rounds, strict=True)
    long = calls[-1] >= LONG
    bounds = {"held": MAX_HELD["long" if long else "short"], "resident": MAX_RESIDENT}
    for (name, bound), measure in zip(bounds.items(), measures, strict=True):
        if measure[-1] is None:
            continue  # this system does not tell
        rate = growth(list(zip(calls, measure, strict=True)))
        print(f"{what}: {calls[-1]} calls, {name} {rate:+.2f} bytes per call")
        # In a short run, what malloc's arenas happen to keep is more than any leak would be.
        if name == "held" or long:
            assert rate <= bound, (what, name, rate, measure)


def test_many_threads():
    check_load("--calls", 500, "--round", 50)


@pytest.mark.soak
def test_many_threads_for_ten_minutes_each():
    check_load("--calls", 2000, "--round", 50, "--seconds", 600, pools=POOLS["long"])


# ---- That the checks can fail ----


def test_a_leak_of_a_hundred_bytes_per_call_and_a_wrong_result_are_found():
    arguments = ("--calls", 120, "--round", 20, "--leak", 100, "--wrong")
    status, summary, errors = run_worker(*arguments, "--programs", "exp", "attention", "softmax")
    assert (status, summary["wrong"]) == (2, ["softmax"]), errors
    if summary["rounds"][0][1] is not None:
        assert growth([(calls, held) for calls, held, _ in summary["rounds"]]) > 90
        with pytest.raises(AssertionError, match="leaking"):
            assert_no_growth(summary["rounds"], "leaking")


def test_growth():
    calls = range(0, 12_000, 1000)
    noise = np.random.default_rng(0).integers(-4000, 4000, len(calls))
    flat = [(n, 10**8 + e) for n, e in zip(calls, noise, strict=True)]
    assert abs(growth(flat)) < 5
    assert growth([(n, b + 100 * n) for n, b in flat]) > 90
    # A table that doubles once, and what the first calls need, are no leak.
    assert abs(growth([(n, b + (2**16 if n > 9000 else 0)) for n, b in flat])) < 10
    assert abs(growth([(n, b + 500 * min(n, 3000)) for n, b in flat])) < 5


@pytest.mark.parametrize(
    ("held", "resident", "grows"),
    [(0.5, -200, False), (0.5, 200, False), (4, 0, True), (0.5, 400, True)],
)
def test_growth_in_a_long_run(held, resident, grows):
    calls = range(0, 2 * LONG, 3200)
    rounds = [(n, 10**8 + int(held * n), 10**9 + resident * n) for n in calls]
    if grows:
        with pytest.raises(AssertionError, match="growing"):
            assert_no_growth(rounds, "growing")
    else:
        assert_no_growth(rounds, "steady")


def test_the_measure_sees_every_kind_of_memory():
    memory = Memory()
    if memory.held() is None:
        pytest.skip("needs mallinfo2 of glibc")
    function = jax.jit(quake_jax.exp)
    function(inputs((1000, 1003))).block_until_ready()
    gc.collect()  # what other tests have left would be freed in between
    before = memory.held()
    small = [ctypes.create_string_buffer(600) for _ in range(1000)]  # too large for Python's own
    large = [function(inputs((1000, 1003), seed=k)).block_until_ready() for k in range(3)]
    held = memory.held() - before
    assert held >= 1000 * 600 + 3 * 4 * 1000 * 1003
    assert len(small) == 1000 and len(large) == 3


def test_a_deadlock_ends_the_worker_with_the_stacks_of_its_threads():
    arguments = ("--threads", 3, "--hang", "--patience", 5, "--programs", "exp")
    status, _, errors = run_worker(*arguments)
    assert status == 1
    assert "Timeout" in errors and errors.count("in work") == 3
