"""The memory that all contestants of a case share, and the contestants that run in JAX or copy.

Every contestant reads the same operands and writes the same output buffer, so that neither fresh
pages nor a lucky placement in the cache decides; `peers` has the other libraries.
"""

from __future__ import annotations

import ctypes
import functools
import math
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
    """Operands and output of one case.

    The output is donated to every JAX call, whose result then takes its place at the same
    address; libraries outside JAX write to it through a NumPy view.

    Attributes:
        case: The case.
        sources: NumPy views of the operands.
        target: NumPy view of the output.
    """

    def __init__(self, case: Case):
        self.case = case
        self._operands = tuple(jnp.array(operand) for operand in operators.inputs(case))
        dtype = jnp.dtype(case.dtype)
        self._out = jnp.zeros(case.out_shape, dtype).block_until_ready()
        self._address = self._out.unsafe_buffer_pointer()
        self.sources = [
            view(operand.unsafe_buffer_pointer(), operand.shape, dtype)
            for operand in self._operands
        ]
        self.target = view(self._address, case.out_shape, dtype)

    def runner(self, operator: Callable[..., jax.Array]) -> Callable[[int], None]:
        """Compile `operator` so that calling the result with n runs it n times.

        The loop is inside the compiled program: an operator costs what it costs between others in
        a model, without the 3 to 5 µs that Python and JAX take to start a program. The barrier
        keeps XLA from taking the operator out of the loop. The loop's output buffer is the
        donated one in every iteration.
        """

        def loop(operands, out, calls):
            def body(_, carry):
                operands, _ = lax.optimization_barrier(carry)
                return operands, operator(*operands)

            return lax.fori_loop(0, calls, body, (operands, out))[1]

        compiled = jax.jit(loop, donate_argnums=1)

        def run(calls: int) -> None:
            self._out = compiled(self._operands, self._out, np.int32(calls)).block_until_ready()
            if self._out.unsafe_buffer_pointer() != self._address:
                raise RuntimeError("XLA did not reuse the donated output buffer")

        return run

    def error(self) -> float:
        """Largest relative error of what the last contestant wrote, on the first rows."""
        wanted = self._exact
        written = self.target.reshape(-1, wanted.shape[-1])[: len(wanted)]
        return operators.relative_error(self.case.function, wanted, written)

    @functools.cached_property
    def _exact(self) -> np.ndarray:
        rows = max(1, CHECKED_ELEMENTS // self.case.shape[-1])
        first = [source.reshape(-1, source.shape[-1])[:rows] for source in self.sources]
        return operators.exact(self.case.function, first)


def view(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A writable NumPy view that does not hold the JAX array (a held one cannot be donated)."""
    memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


def for_copies(buffers: Buffers) -> Buffers:
    """Buffers for a copy of an array of the case's shape: the same ones where they fit."""
    case = buffers.case
    if case.operand_shapes[0] == case.out_shape:
        return buffers
    return Buffers(Case("exp", case.shape, case.dtype))


def jax_nn(buffers: Buffers, name: str = "jax.nn") -> Contestant:
    """XLA's own operator."""
    return Contestant(name, buffers.runner(operators.JAX_NN[buffers.case.function]))


def quake(buffers: Buffers, order: int) -> Contestant:
    """The operator of quake_jax at one order."""
    operator = operators.quake(buffers.case.function, order)
    return Contestant(f"order {order}", buffers.runner(operator))


def copies(buffers: Buffers) -> list[Contestant]:
    """Copies of the operand to the output; the fastest one is the limit for the operators."""

    def numpy_copy(calls: int) -> None:
        for _ in range(calls):
            np.copyto(buffers.target, buffers.sources[0])

    return [
        Contestant("copy (XLA)", buffers.runner(lambda x, *_: x)),
        Contestant("copy (NumPy)", numpy_copy),
    ]
