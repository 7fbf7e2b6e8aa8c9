"""The process behind tests/test_load.py: threads that call compiled programs and check each result.

Prints a line of JSON for every round, and one at the end. It exits with status 1 and the stacks
of all threads where no call has ended for `--patience` seconds, and with 2 where a result differs.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import faulthandler
import functools
import gc
import hashlib
import itertools
import json
import os
import pathlib
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np

import quake_jax

# Results that a thread keeps before it looks at the oldest: dispatch is asynchronous.
KEPT = 6


def _array(shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).uniform(-4, 4, shape)
    return jnp.asarray(values.astype(np.float32), dtype)


def _attention_inputs(
    dtype="float32", batch=1, queries=64, keys=64, heads=2, size=32, kv_heads=None
):
    shapes = [(batch, queries, heads, size)] + 2 * [(batch, keys, kv_heads or heads, size)]
    return tuple(_array(shape, dtype, seed) for seed, shape in enumerate(shapes))


def _slope(function):
    return jax.grad(lambda *x: function(*x).astype(jnp.float32).sum())


def _beside_each_other(x):
    return [f(x) for f in (quake_jax.softmax, quake_jax.gelu, quake_jax.exp)]


def _loop(x):
    return jax.lax.fori_loop(0, 5, lambda _, y: quake_jax.tanh(y) + quake_jax.softmax(y), x)


def programs() -> dict[str, tuple]:
    """Return functions and their operands, by name.

    Every family of kernels, with operands on both sides of the size from which a kernel uses
    XLA's pool (65,536 elements), and with sizes that divide nothing.
    """
    attend = quake_jax.dot_product_attention
    one, small, large = (5,), (64, 100), (301, 1003)
    mask = _array((1, 1, 64, 64), seed=9) > 0
    square, lengths = _attention_inputs(), jnp.array([40, 7], jnp.int32)
    keep = _array(small, seed=8) > 0
    return {
        "exp": (quake_jax.exp, _array(one)),
        "gelu": (quake_jax.gelu, _array(small, "bfloat16")),
        "gelu_erf": (functools.partial(quake_jax.gelu, approximate=False), _array(large)),
        "mish": (quake_jax.mish, _array(small, "float16")),
        "silu_order_1": (functools.partial(quake_jax.silu, order=1), _array(large, "bfloat16")),
        "logaddexp": (quake_jax.logaddexp, _array(small), _array(small, seed=1)),
        "swiglu": (quake_jax.swiglu, _array(large, "float16"), _array(large, "float16", 1)),
        "glu": (quake_jax.glu, _array(small, "bfloat16")),
        "bias_gelu": (quake_jax.bias_gelu, _array(large), _array(large[1:])),
        "softmax": (quake_jax.softmax, _array(large)),
        "softmax_columns": (
            functools.partial(quake_jax.softmax, axis=0),
            _array(large, "bfloat16"),
        ),
        "softmax_masked": (lambda x, m: quake_jax.softmax(x, where=m), _array(small), keep),
        "log_softmax": (quake_jax.log_softmax, _array(small, "float16")),
        "log_softmax_masked": (
            lambda x, m: quake_jax.log_softmax(x, where=m),
            _array(small, "bfloat16"),
            keep,
        ),
        "logsumexp": (functools.partial(quake_jax.logsumexp, axis=-1), _array(large)),
        "logsumexp_columns": (functools.partial(quake_jax.logsumexp, axis=0), _array(small)),
        "attention": (attend, *_attention_inputs(queries=197, keys=197)),
        "attention_mask": (lambda q, k, v, m: attend(q, k, v, mask=m), *square, mask),
        "attention_bias": (
            lambda q, k, v, b: attend(q, k, v, bias=b),
            *square,
            _array((2, 64, 64)),
        ),
        "attention_causal": (
            functools.partial(attend, is_causal=True),
            *_attention_inputs("bfloat16", queries=300, keys=300),
        ),
        "attention_window": (functools.partial(attend, local_window_size=9), *square),
        "attention_lengths": (
            lambda q, k, v, n: attend(q, k, v, key_value_seq_lengths=n),
            *_attention_inputs("float16", batch=2, heads=4, kv_heads=2),
            lengths,
        ),
        "attention_decoding": (
            lambda q, k, v, n: attend(q, k, v, key_value_seq_lengths=n),
            *_attention_inputs(batch=2, queries=1, keys=1025, heads=4),
            lengths + 900,
        ),
        "attention_decoding_bfloat16": (
            attend,
            *_attention_inputs("bfloat16", queries=3, keys=513, heads=4, kv_heads=1),
        ),
        "attention_packed": (quake_jax.packed_dot_product_attention, _array((2, 50, 3, 2, 32))),
        "attention_vmap": (jax.vmap(attend), *(x[None].repeat(3, 0) for x in square)),
        "beside_each_other": (_beside_each_other, _array(large)),
        "loop": (_loop, _array(small)),
        "gradient_of_softmax": (_slope(lambda x: quake_jax.softmax(x) ** 2), _array(small)),
        "gradient_of_gelu": (_slope(quake_jax.gelu), _array(small, "bfloat16")),
        "gradient_of_attention": (_slope(functools.partial(attend, is_causal=True)), *square),
    }


def content(results) -> bytes:
    """Wait for the results of a call, and return their bytes."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(results))


class Memory:
    """What this process holds.

    `held()` is what malloc has given out and not got back, in all its arenas and in mapped blocks,
    exact to the byte; Python's objects are in it where PYTHONMALLOC=malloc. `resident()` also has
    what does not come from malloc, but moves by tens of megabytes with the order in which threads
    happen to free, even after malloc has returned to the system what it can. Both are None where
    the system does not tell: without glibc, without /proc.
    """

    class _Info(ctypes.Structure):
        _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]

    def __init__(self):
        libc = ctypes.CDLL(None)
        self._mallinfo = getattr(libc, "mallinfo2", None)
        if self._mallinfo is not None:
            self._mallinfo.restype = self._Info
        self._trim = getattr(libc, "malloc_trim", None)
        self._malloc = libc.malloc
        self._malloc.restype, self._malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]

    def held(self) -> int | None:
        if self._mallinfo is None:
            return None
        info = self._mallinfo()
        return info.uordblks + info.hblkhd

    def resident(self) -> int | None:
        statm = pathlib.Path("/proc/self/statm")
        if not statm.exists():
            return None
        if self._trim is not None:
            self._trim(0)
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def leak(self, size: int) -> None:
        """Lose `size` bytes, to see that somebody notices."""
        self._malloc(size)


def pool_threads() -> int | None:
    """Return the number of threads in XLA's intra-op pool, or None without /proc."""
    tasks = pathlib.Path("/proc/self/task")
    if not tasks.exists():
        return None
    names = [(task / "comm").read_text() for task in tasks.iterdir()]
    return sum(name.startswith("tf_XLAEigen") for name in names)


class Load:
    """Threads that call programs in random order, and compare each result with the expected one."""

    def __init__(self, options, memory):
        self.options, self.memory = options, memory
        self.calls, self.expected = [], []
        self.finished = dict.fromkeys(range(options.threads), 0)
        self.wrong: list[str] = []

    def compile(self) -> dict[str, str]:
        """Compile everything, and return the digests of the results of one thread by name."""
        digests, table = {}, programs()
        for name in self.options.programs or table:
            function, *operands = table[name]
            compiled = jax.jit(function)
            first = content(compiled(*operands))
            self.calls.append((name, compiled, operands))
            self.expected.append(first)
            digests[name] = hashlib.sha256(first).hexdigest()
        if self.options.wrong:
            self.expected[-1] = b""
        return digests

    def work(self, thread: int, seed: int, start: threading.Barrier, calls: int) -> None:
        """Make calls in one thread, and note the programs that fail or whose results differ."""
        kept, index = collections.deque(), 0
        try:
            start.wait()
            for index in np.random.default_rng(seed).integers(len(self.calls), size=calls).tolist():
                _, compiled, operands = self.calls[index]
                kept.append((index, compiled(*operands)))
                if len(kept) > KEPT:
                    self.check(thread, *kept.popleft())
                if self.options.leak:
                    self.memory.leak(self.options.leak)
                if self.options.hang:
                    threading.Event().wait()
            for pair in kept:
                self.check(thread, *pair)
        except Exception as error:
            self.wrong.append(f"{self.calls[index][0]}: {error!r}")

    def check(self, thread: int, index: int, result) -> None:
        if content(result) != self.expected[index]:
            self.wrong.append(self.calls[index][0])
        self.finished[thread] += 1

    def round(self, number: int) -> None:
        """Start the threads, and wait for them.

        Threads are new in each round, so what a kernel keeps for a thread must go with it.
        """
        count, calls = self.options.threads, self.options.round
        start = threading.Barrier(count)
        threads = [
            threading.Thread(
                target=self.work, args=(k, number * count + k, start, calls), daemon=True
            )
            for k in range(count)
        ]
        for thread in threads:
            thread.start()
        seen = -1
        for thread in threads:
            while thread.is_alive():
                done = sum(self.finished.values())
                if done != seen:  # somebody gets on
                    seen = done
                    faulthandler.dump_traceback_later(self.options.patience, exit=True)
                thread.join(0.25)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--calls", type=int, default=2000, help="at least so many in each thread")
    parser.add_argument("--round", type=int, default=100, help="calls of a thread in a round")
    parser.add_argument("--seconds", type=float, default=0, help="at least so long")
    parser.add_argument("--patience", type=float, default=300, help="seconds without any result")
    parser.add_argument("--leak", type=int, default=0, help="bytes that each call is to lose")
    parser.add_argument("--programs", nargs="+", help="the names of some; default: all")
    parser.add_argument("--wrong", action="store_true", help="the last program's is to be wrong")
    parser.add_argument("--hang", action="store_true", help="calls are never to return")
    return parser.parse_args()


def main() -> int:
    options, memory = parse(), Memory()
    faulthandler.dump_traceback_later(600, exit=True)  # while it compiles
    load = Load(options, memory)
    digests = load.compile()
    rounds, begin = [], time.monotonic()
    for number in itertools.count():
        load.round(number)
        gc.collect()
        calls, seconds = sum(load.finished.values()), time.monotonic() - begin
        rounds.append((calls, memory.held(), memory.resident()))
        names = ("calls", "held", "resident", "seconds")
        print(
            json.dumps(dict(zip(names, (*rounds[-1], round(seconds, 1)), strict=True))), flush=True
        )
        if calls >= options.calls * options.threads and seconds >= options.seconds:
            break
        if number > 0 and calls == rounds[-2][0]:
            break  # everything fails
    summary = {
        "wrong": sorted(set(load.wrong)),
        "digests": digests,
        "pool": pool_threads(),
        "rounds": rounds,
        "seconds": seconds,
    }
    print(json.dumps(summary), flush=True)
    return 2 if load.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
