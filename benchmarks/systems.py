"""The memory that all contestants of a case share, and the contestants that run in JAX or copy.

Every contestant reads the same input and writes the same output buffer, so that neither fresh
pages nor a lucky placement in the cache decides; `peers` has the other libraries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import operators
from benchmarks.cases import Case
from benchmarks.timing import Contestant

# Results are checked on so many elements; a float64 reference of everything would take too long.
CHECKED_ELEMENTS = 1 << 20


class Buffers:
    """Input and output of one case.

    The output is donated to every JAX call, whose result then takes its place at the same
    address; libraries outside JAX write to it through a NumPy view.

    Attributes:
        source: NumPy view of the input.
        target: NumPy view of the output.
    """

    def __init__(self, case: Case):
        self._x = jnp.array(operators.inputs(case))
        self._out = jnp.zeros_like(self._x).block_until_ready()
        self._address = self._out.unsafe_buffer_pointer()
        self.source = _view(self._x.unsafe_buffer_pointer(), case)
        self.target = _view(self._address, case)

    def runner(self, operator: Callable[[jax.Array], jax.Array]) -> Callable[[int], None]:
        """Compile `operator` so that calling the result with n runs it n times.

        The loop is inside the compiled program: an operator costs what it costs between others in
        a model, without the 3 to 5 µs that Python and JAX take to start a program. The barrier
        keeps XLA from taking the operator out of the loop. The loop's output buffer is the
        donated one in every iteration.
        """

        def loop(x, out, calls):
            def body(_, carry):
                x, _ = lax.optimization_barrier(carry)
                return x, operator(x)

            return lax.fori_loop(0, calls, body, (x, out))[1]

        compiled = jax.jit(loop, donate_argnums=1)

        def run(calls: int) -> None:
            self._out = compiled(self._x, self._out, np.int32(calls)).block_until_ready()
            if self._out.unsafe_buffer_pointer() != self._address:
                raise RuntimeError("XLA did not reuse the donated output buffer")

        return run

    def error(self, function: str) -> float:
        """Largest relative error of what the last contestant wrote, on the first rows."""
        columns = self.source.shape[-1]
        rows = max(1, CHECKED_ELEMENTS // columns)
        x, y = (a.reshape(-1, columns)[:rows] for a in (self.source, self.target))
        return operators.relative_error(function, x, y)


def _view(address: int, case: Case) -> np.ndarray:
    """A writable NumPy view that does not hold the JAX array (a held one cannot be donated)."""
    dtype = jnp.dtype(case.dtype)
    memory = (ctypes.c_char * (case.elements * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype=dtype).reshape(case.shape)


def jax_nn(case: Case, buffers: Buffers, name: str = "jax.nn") -> Contestant:
    """XLA's own operator."""
    return Contestant(name, buffers.runner(operators.JAX_NN[case.function]))


def quake(case: Case, buffers: Buffers, order: int) -> Contestant:
    """The operator of quake_jax at one order."""
    return Contestant(f"order {order}", buffers.runner(operators.quake(case.function, order)))


def copies(buffers: Buffers) -> list[Contestant]:
    """Copies of the input to the output; the fastest one is the limit for the operators."""

    def numpy_copy(calls: int) -> None:
        for _ in range(calls):
            np.copyto(buffers.target, buffers.source)

    return [
        Contestant("copy (XLA)", buffers.runner(lambda x: x)),
        Contestant("copy (NumPy)", numpy_copy),
    ]
