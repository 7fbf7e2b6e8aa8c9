"""Kernels called from many threads at once, and with pools of different sizes."""

import concurrent.futures
import os
import threading

import jax
import numpy as np
import pytest
from support import FAMILIES, ORDERS, inputs, run_python

import quake_jax

# Kernels share XLA's pool above some size: here both sides of it, and sizes that divide nothing.
SHAPES = [(5,), (64, 100), (301, 1003)]


def test_many_concurrent_calls_give_equal_results_and_do_not_deadlock():
    calls = []
    for function in FAMILIES:
        for shape in SHAPES:
            f, x = jax.jit(function.quake), function.inputs(shape)
            calls.append((f, x, np.asarray(f(*x))))
    threads, rounds = 16, 4
    start = threading.Barrier(threads)

    def work(seed):
        start.wait()
        order = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(calls)), rounds))
        return all(np.array_equal(calls[i][0](*calls[i][1]), calls[i][2]) for i in order)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        results = [pool.submit(work, seed) for seed in range(threads)]
        assert all(r.result(timeout=100) for r in results)


def test_kernels_that_run_beside_each_other_in_one_program():
    # XLA runs independent calls of one program at the same time, on the pool that they share.
    @jax.jit
    def f(xs):
        return [g(x) for x in xs for g in (quake_jax.softmax, quake_jax.gelu, quake_jax.exp)]

    xs = [inputs((300, 1000), seed=k) for k in range(6)]
    first = [np.asarray(y) for y in f(xs)]
    for _ in range(5):
        for y, expected in zip(f(xs), first, strict=True):
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("function", FAMILIES, ids=lambda f: f.name)
def test_dispatch_without_waiting(function):
    f, x = jax.jit(function.quake), function.inputs((200, 998))
    expected = np.asarray(f(*x))
    results = [f(*x) for _ in range(20)]
    assert all(np.array_equal(y, expected) for y in results)


def test_threads_that_trace_at_once_have_their_own_order():
    # One function that each thread's order traces again, and rewrites of one program at once.
    x, weights = inputs((40, 30)), inputs((30, 20), seed=1)

    def model(x):
        return jax.nn.gelu(jax.nn.softmax(x) @ weights)

    shared, start = jax.jit(lambda x: quake_jax.sigmoid(x)), threading.Barrier(15)

    def work(order):
        start.wait()
        with quake_jax.default_order(order):
            whole = jax.jit(quake_jax.accelerate(model))(x)
            return np.asarray(shared(x)), np.asarray(whole), order

    with concurrent.futures.ThreadPoolExecutor(15) as pool:
        results = list(pool.map(work, 3 * ORDERS))
    for sigmoid, whole, order in results:
        np.testing.assert_array_equal(sigmoid, quake_jax.sigmoid(x, order=order))
        expected = jax.jit(quake_jax.accelerate(model, order=order))(x)
        np.testing.assert_array_equal(whole, expected)
    assert len({sigmoid.tobytes() for sigmoid, _, _ in results}) == len(ORDERS)


def test_results_do_not_depend_on_the_number_of_threads(tmp_path):
    code = """
import hashlib, os, pathlib
if cpu := os.environ.get("TEST_CPU"):
    os.sched_setaffinity(0, {int(cpu)})
    for name in ("PJRT_NPROC", "NPROC"):
        os.environ.pop(name, None)
import jax, numpy as np, quake_jax
digest = hashlib.sha256()
names = "exp expm1 sigmoid softplus silu mish elu tanh gelu softmax log_softmax logsumexp"
functions = [getattr(quake_jax, name) for name in names.split()]
functions.append(lambda x: quake_jax.gelu(x, False))
functions.append(lambda x: quake_jax.softmax(x, 0))
functions.append(lambda x: quake_jax.logsumexp(x, 0))
functions.append(lambda x: quake_jax.softmax(x, where=x[:1] > 0))
functions.append(lambda x: quake_jax.bias_silu(x, x[0]))
functions.append(lambda x: quake_jax.glu(x, 0) if len(x) % 2 == 0 else quake_jax.swiglu(x, x))
functions.append(lambda x: quake_jax.softmax(x, order=1))
everything = jax.jit(lambda x: [f(x) for f in functions])
for shape in ((301, 1003), (3, 200_001), (70_001, 7), (1, 1)):
    for dtype in ("float32", "bfloat16"):
        x = np.random.default_rng(0).uniform(-8, 8, shape).astype(np.float32)
        for y in everything(jax.numpy.asarray(x, dtype)):
            digest.update(np.asarray(y).tobytes())
names = [p.joinpath("comm").read_text() for p in pathlib.Path("/proc/self/task").glob("*")]
print(digest.hexdigest(), sum(name.startswith("tf_XLAEigen") for name in names) if names else "?")
"""
    # With the size of the pool that each gives.
    settings = [({"PJRT_NPROC": "1"}, "1"), ({"PJRT_NPROC": "7"}, "7")]
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        settings.append(({"TEST_CPU": str(min(os.sched_getaffinity(0)))}, "1"))
    digests = set()
    for setting, size in settings:
        digest, pool = run_python(code, tmp_path, **setting).stdout.split()
        assert pool in (size, "?"), setting
        digests.add(digest)
    assert len(digests) == 1
