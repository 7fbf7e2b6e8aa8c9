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

import jax
import jax.numpy as jnp
import numpy as np

import quake_jax
from quake_jax._config import DISABLED, ORDERS
from quake_jax._constants import MAX_REL_ERROR

_SHAPE = (128, 1024)
# Long enough that a clock tick does not matter, short enough for the whole to take seconds.
_SECONDS_PER_TIMING = 0.02

_FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "exp": (quake_jax.exp, jnp.exp),
    "sigmoid": (quake_jax.sigmoid, jax.nn.sigmoid),
    "silu": (quake_jax.silu, jax.nn.silu),
    "tanh": (quake_jax.tanh, jnp.tanh),
    "gelu_tanh": (quake_jax.gelu, jax.nn.gelu),
    "gelu_erf": (
        lambda x, order: quake_jax.gelu(x, approximate=False, order=order),
        lambda x: jax.nn.gelu(x, approximate=False),
    ),
    "softmax": (quake_jax.softmax, jax.nn.softmax),
}


def _largest_error(function, exact, x: np.ndarray, order: int) -> float:
    """Largest error of `function`, in units of |exact| where that exceeds 2^-20, else of 2^-20."""
    with jax.enable_x64(True):
        expected = np.asarray(exact(jnp.asarray(x, jnp.float64)))
    actual = np.asarray(jax.jit(function, static_argnames="order")(x, order=order), np.float64)
    return float(np.max(np.abs(actual - expected) / np.maximum(np.abs(expected), 2.0**-20)))


def _seconds(function, x) -> Callable[[], float]:
    """Return a timer of one call of the compiled `function`, warm."""
    # The output goes into a buffer that is given back: a fresh one would measure page faults.
    compiled = jax.jit(lambda x, out: function(x), donate_argnums=1, keep_unused=True)
    out = compiled(x, jnp.zeros_like(x)).block_until_ready()

    def timing() -> float:
        nonlocal out
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < _SECONDS_PER_TIMING or count == 0:
            out = compiled(x, out).block_until_ready()
            count += 1
        return elapsed / count

    return timing


def _speed_ratio(function, exact, x) -> tuple[float, float]:
    """Median time of `function` in seconds, and how many times faster it is than `exact`."""
    ours, theirs = _seconds(function, x), _seconds(exact, x)
    pairs = [(ours(), theirs()) for _ in range(3)]  # interleaved, so that both see the same load
    return statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(f"\n{title}")
        for row in [header, *rows]:
            cells = [row[0].ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            print("  ".join(cells).rstrip())
        return
    table = Table(title=title, title_justify="left", title_style="bold")
    for k, column in enumerate(header):
        table.add_column(column, justify="left" if k == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print()
    console.print(table)


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

    rng = np.random.default_rng(0)
    x = rng.uniform(-8, 8, _SHAPE).astype(np.float32)
    accurate = True
    errors, speeds = [], []
    for name, (function, exact) in _FUNCTIONS.items():
        row = [name]
        for order in ORDERS:
            error = _largest_error(function, exact, x[:16], order)
            within = error <= MAX_REL_ERROR[name][order]
            accurate &= within
            row.append(f"{error:.1e}" + ("" if within else " !"))
        errors.append(row)
        row = [name]
        for order in (1, 3, 5):
            seconds, ratio = _speed_ratio(
                lambda a, f=function, n=order: f(a, order=n), exact, jnp.asarray(x)
            )
            row.append(f"{1e9 * seconds / x.size:.2f} ({ratio:.1f}x)")
        speeds.append(row)
    _table(
        "Largest relative error, inputs from -8 to 8",
        ["function", *(f"order {n}" for n in ORDERS)],
        errors,
    )
    rows, columns = _SHAPE
    _table(
        f"ns per element, {rows} x {columns} (times jax.nn's speed)",
        ["function", "order 1", "order 3", "order 5"],
        speeds,
    )
    print("\naccuracy: " + ("ok" if accurate else "FAILED: errors marked ! exceed their bound"))
    return 0 if accurate else 1


if __name__ == "__main__":
    sys.exit(main())
