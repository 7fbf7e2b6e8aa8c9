"""`python -m quake_jax`: what runs here, whether it is accurate, and how fast it is.

Prints versions, instruction sets and threads, then compares each function with the exact one of
jax.nn; the exit code is 1 if an error exceeds its bound.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import quake_jax
from quake_jax._core.config import ORDERS
from quake_jax._core.constants import MAX_ABS_ERROR, MAX_REL_ERROR
from quake_jax._core.switches import DISABLED
from quake_jax._core.tables import Table
from quake_jax._elementwise.table import FUNCTIONS, FUSED, Fused

_SHAPE = (128, 1024)
# Long enough that a clock tick does not matter, short enough for the whole to take seconds.
_SECONDS_PER_TIMING = 0.004
_TIMED_ORDERS = (1, 3, 5)


class _Function(NamedTuple):
    quake: Callable
    exact: Callable
    operands: Callable = lambda x: (x,)
    bound_of: str | None = None  # another kernel, whose error bound holds


def _with_another(x):
    return (x, x[::-1])


def _fused(row: Fused) -> _Function:
    activation = FUNCTIONS[row.activation].exact
    if row.kind == "biased":
        exact, operands = lambda x, b: activation(x + b), lambda x: (x, x[0])
    elif row.kind == "gated":
        exact, operands = lambda g, v: activation(g) * v, _with_another
    else:
        order = 1 if row.gate_first else -1

        def exact(x):
            gate, value = jnp.split(x, 2, -1)[::order]
            return activation(gate) * value

        operands = _Function._field_defaults["operands"]
    return _Function(row.quake, exact, operands, row.activation)


_FUNCTIONS: dict[str, _Function] = {
    **{name: _Function(row.quake, row.exact) for name, row in FUNCTIONS.items()},
    **{name: _fused(row) for name, row in FUSED.items()},
    "logaddexp": _Function(quake_jax.logaddexp, jnp.logaddexp, _with_another),
    "softmax": _Function(quake_jax.softmax, jax.nn.softmax),
    "log_softmax": _Function(quake_jax.log_softmax, jax.nn.log_softmax),
    "logsumexp": _Function(
        partial(quake_jax.logsumexp, axis=-1), partial(jax.nn.logsumexp, axis=-1)
    ),
}


def _bound(name: str, order: int) -> float:
    """The bound of `_largest_error`."""
    if name in MAX_ABS_ERROR:
        return MAX_ABS_ERROR[name][order] + 2.0**-18  # of results of up to 16
    if name in FUNCTIONS:
        return MAX_REL_ERROR[FUNCTIONS[name].kernel.shares or name][order]
    other = _FUNCTIONS[name].bound_of
    return MAX_REL_ERROR[name][order] if other is None else MAX_REL_ERROR[other][order] + 2.0**-23


def _largest_errors(name: str, x: np.ndarray) -> dict[int, float]:
    """Largest error by order, in units of |exact| where that exceeds 2^-20, else of 2^-20.

    For logarithms the error is absolute.
    """
    function = _FUNCTIONS[name]
    operands = function.operands(x)
    with jax.enable_x64(True):
        expected = np.asarray(function.exact(*(jnp.asarray(a, jnp.float64) for a in operands)))
    unit = 1.0 if name in MAX_ABS_ERROR else np.maximum(np.abs(expected), 2.0**-20)
    results = jax.jit(lambda *a: {n: function.quake(*a, order=n) for n in ORDERS})(*operands)
    return {
        order: float(np.max(np.abs(np.asarray(y, np.float64) - expected) / unit))
        for order, y in results.items()
    }


def _seconds(function, operands) -> Callable[[], float]:
    """Return a timer of one call of the compiled `function`, warm."""
    # The output goes into a buffer that is given back: a fresh one would measure page faults.
    compiled = jax.jit(lambda out, *a: function(*a), donate_argnums=0, keep_unused=True)
    result = jax.eval_shape(function, *operands)
    out = compiled(jnp.zeros(result.shape, result.dtype), *operands).block_until_ready()

    def timing() -> float:
        nonlocal out
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _SECONDS_PER_TIMING or count == 0:
            out = compiled(out, *operands).block_until_ready()
            count += 1
        return elapsed / count

    return timing


def _speed_ratios(name: str, x) -> list[tuple[float, float]]:
    """For each of the timed orders, median seconds and how many times faster than the exact."""
    function = _FUNCTIONS[name]
    operands = [jnp.asarray(a) for a in function.operands(x)]
    timers = [_seconds(partial(function.quake, order=n), operands) for n in _TIMED_ORDERS]
    exact = _seconds(function.exact, operands)
    # Interleaved, so that all see the same load.
    rounds = [(exact(), [timer() for timer in timers]) for _ in range(3)]
    return [
        (
            statistics.median(times[k] for _, times in rounds),
            statistics.median(theirs / times[k] for theirs, times in rounds),
        )
        for k in range(len(timers))
    ]


def _print(table: Table) -> None:
    """Print a table, with rich where it is installed."""
    print()
    try:
        from rich.console import Console
    except ImportError:
        print(table)
    else:
        Console().print(table)


def _facts() -> list[tuple[str, str]]:
    try:
        threads = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        threads = os.cpu_count() or 1
    isas = ", ".join(quake_jax.supported_isas())
    return [
        ("quake_jax", quake_jax.__version__),
        ("jax", f"{jax.__version__} on {jax.default_backend()}"),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("instruction set", f"{quake_jax.isa()} (supported: {isas})"),
        ("threads", str(threads)),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the self-check; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m quake_jax",
        description="Print versions and instruction sets, then check accuracy and speed "
        "against jax.nn. Exit code 1 means that an error exceeds its bound.",
    )
    parser.parse_args(arguments)
    for name, value in _facts():
        print(f"{name:<16} {value}")
    if DISABLED:
        print("QUAKE_JAX_DISABLE is set: every function is the exact one, nothing to check")
        return 0

    # Multiples of 2^-12, so that the sum with a bias is exact.
    x = np.random.default_rng(0).integers(-(2**15), 2**15, _SHAPE) / np.float32(2**12)
    x = x.astype(np.float32)
    accurate = True
    errors, speeds = [], []
    for name in _FUNCTIONS:
        row = [name]
        for order, error in _largest_errors(name, x[:16]).items():
            within = error <= _bound(name, order)
            accurate &= within
            row.append(f"{error:.1e}" + ("" if within else " !"))
        errors.append(row)
        speeds.append(
            [name, *(f"{1e9 * t / x.size:.2f} ({r:.1f}x)" for t, r in _speed_ratios(name, x))]
        )
    numbers = range(1, 1 + len(ORDERS))
    title = "Largest relative error, inputs from -8 to 8"
    _print(Table(["function", *(f"order {n}" for n in ORDERS)], errors, numbers, title=title))
    print(f"(absolute: {', '.join(name for name in _FUNCTIONS if name in MAX_ABS_ERROR)})")
    rows, columns = _SHAPE
    title = f"ns per element, {rows} x {columns} (times jax.nn's speed)"
    _print(
        Table(["function", *(f"order {n}" for n in _TIMED_ORDERS)], speeds, numbers, title=title)
    )
    print("\naccuracy: " + ("ok" if accurate else "FAILED: errors marked ! exceed their bound"))
    return 0 if accurate else 1


if __name__ == "__main__":
    sys.exit(main())
