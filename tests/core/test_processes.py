"""Kernels and the life of a process: fork, spawn, interrupts, and exits while calls are running."""

import os
import pathlib
import sys
import sysconfig
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from support import run_python

import quake_jax

# Apple's frameworks, which NumPy uses, do not survive a fork.
needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "darwin", reason="needs os.fork that is safe"
)

# What a child process does; a module of its own, because "spawn" pickles functions by name.
CHILD = """
import hashlib
import jax
import jax.numpy as jnp
import numpy as np
import quake_jax

def digest(seed):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(301, 1003)).astype(np.float32))
    q = x[:300, :64].reshape(1, 75, 4, 64)
    y = jax.jit(lambda x, q: (quake_jax.softmax(x), quake_jax.dot_product_attention(q, q, q)))(x, q)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in y)).hexdigest()
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")
def test_import_starts_no_thread(tmp_path):
    code = """
import os
import jax, jax.ffi, numpy
before = len(os.listdir("/proc/self/task"))
import quake_jax
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert run_python(code, tmp_path).stdout == "0\n"


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded Python"
)
def test_the_import_turns_the_gil_on(tmp_path):
    # The extension does not declare that it works without, so Python sees to it.
    code = "import sys, quake_jax; print(sys._is_gil_enabled())"
    assert run_python(code, tmp_path, PYTHON_GIL="", PYTHONWARNINGS="ignore").stdout == "True\n"


@needs_fork
def test_processes_started_after_the_import(tmp_path):
    # A process may fork until it has used JAX, and use the other two ways at any time.
    (tmp_path / "child.py").write_text(CHILD)
    code = """
import concurrent.futures, multiprocessing
import child
def digests(method):
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["child"])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(child.digest, range(2)))
if __name__ == "__main__":
    forked = digests("fork")
    expected = [child.digest(0), child.digest(1)]
    print(forked == expected != expected[::-1])
    print(digests("spawn") == expected, digests("forkserver") == expected)
"""
    assert run_python(code, tmp_path).stdout == "True\nTrue True\n"


@needs_fork
def test_a_child_that_does_not_use_jax_may_be_forked_at_any_time(tmp_path):
    # As loaders of data do it, while kernels run. JAX itself warns of it.
    (tmp_path / "child.py").write_text(CHILD)
    code = """
import os, sys, threading, warnings
import child
warnings.simplefilter("ignore")
expected = child.digest(0)
stop = threading.Event()
def call():
    while not stop.is_set():
        assert child.digest(0) == expected
threads = [threading.Thread(target=call) for _ in range(3)]
[thread.start() for thread in threads]
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if child.np.arange(10.0).sum() == 45 else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
[thread.join() for thread in threads]
print(child.digest(0) == expected)
"""
    assert run_python(code, tmp_path).stdout == "True\n"


# Not here: daemon threads inside JAX when the interpreter ends. They abort the process with
# jax.nn.softmax alone, too, because CPython ends them by unwinding through C++.
EXITS = {
    "calls that nobody waits for": """
results = [f(x) for _ in range(20)]
""",
    "daemon threads that have called": """
called = threading.Barrier(9)
def call():
    f(x).block_until_ready()
    called.wait()
    threading.Event().wait()
for _ in range(8):
    threading.Thread(target=call, daemon=True).start()
called.wait()
""",
    "threads that are waited for": """
def call():
    for _ in range(10):
        f(x)
for _ in range(8):
    threading.Thread(target=call).start()
""",
    "a call at exit": """
atexit.register(lambda: f(x).block_until_ready())
results = f(x)
""",
}


@needs_fork
def test_exit_while_calls_are_running(tmp_path):
    # Children forked before JAX starts: eight exits for one import. Each ends as a program does.
    code = f"""
import atexit, os, sys, threading
import jax, numpy as np, quake_jax
for how, then in {list(EXITS.items())!r}:
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            x = np.ones((300, 1003), np.float32)
            f = jax.jit(quake_jax.softmax)
            f(x).block_until_ready()
            exec(then)
            sys.exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status == 0, (how, status)
print("eight exits")
"""
    assert run_python(code, tmp_path).stdout == "eight exits\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_interrupts_leave_the_process_as_it_was(tmp_path):
    code = """
import signal, sys
import jax, jax.numpy as jnp, numpy as np, quake_jax
f = jax.jit(lambda x: quake_jax.softmax(quake_jax.gelu(x)))
x = jnp.ones((1500, 1003))
expected = np.asarray(f(x))
for _ in range(10):
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        while True:
            f(x).block_until_ready()
    except KeyboardInterrupt:
        pass
    assert np.array_equal(f(x), expected)
print("ten interrupts")
"""
    assert run_python(code, tmp_path).stdout == "ten interrupts\n"


def test_python_runs_while_a_kernel_does():
    # Something happens in the middle half of a long call, which nothing can if it holds the GIL.
    f, q = jax.jit(quake_jax.dot_product_attention), jnp.ones((1, 1500, 4, 64))
    f(q, q, q).block_until_ready()
    span = []

    def call():
        span.append(time.perf_counter())
        f(q, q, q).block_until_ready()
        span.append(time.perf_counter())

    for _ in range(100):
        span.clear()
        ticks = []
        thread = threading.Thread(target=call)
        thread.start()
        while thread.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)
        begin, end = span
        margin = (end - begin) / 4
        if any(begin + margin < tick < end - margin for tick in ticks):
            return
    pytest.fail("no other thread has run during a hundred calls")


def test_first_calls_from_many_threads(tmp_path):
    # Handlers, tables and scratch memory are made at first use.
    code = """
import concurrent.futures, threading
import jax, jax.numpy as jnp, numpy as np, quake_jax
names = "exp gelu silu mish tanh softplus swiglu glu softmax log_softmax logsumexp attention"
x = jnp.linspace(-3, 3, 70_000).reshape(7, 5000, 2)
def function(name):
    if name == "attention":
        q = x[:, :400].reshape(7, 100, 1, 8)
        return quake_jax.dot_product_attention(q, q, q)
    return getattr(quake_jax, name)(x)
start = threading.Barrier(24)
def first(name):
    start.wait()
    return np.asarray(jax.jit(function, static_argnums=0)(name))
with concurrent.futures.ThreadPoolExecutor(24) as pool:
    results = list(pool.map(first, 2 * names.split()))
for name, result in zip(2 * names.split(), results):
    assert np.array_equal(result, function(name), equal_nan=True), name
print(len(results))
"""
    assert run_python(code, tmp_path, PJRT_NPROC="8").stdout == "24\n"
