"""The memory that all contestants of a case share.

Every contestant reads the same operands and writes the same output buffer, so that neither fresh
pages nor a lucky placement in the cache decides. Importing this module imports JAX.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Buffers:
    """Operands and output of one case.

    The output is donated to every JAX call, whose result then takes its place at the same
    address; libraries outside JAX write to it through a NumPy view.

    Attributes:
        sources: NumPy views of the operands.
        target: NumPy view of the output.
    """

    def __init__(self, operands: Sequence[jax.Array], out_shape: tuple[int, ...], dtype: str):
        self._operands = tuple(operands)
        self._out = jnp.zeros(out_shape, dtype).block_until_ready()
        self._address = self._out.unsafe_buffer_pointer()
        self.sources = [_view(x.unsafe_buffer_pointer(), x) for x in self._operands]
        self.target = _view(self._address, self._out)

    def runner(self, operator: Callable[..., jax.Array]) -> Callable[[int], None]:
        """Compile `operator` so that calling the result with n runs it n times.

        The loop is inside the compiled program: an operator costs what it costs between others in
        a model, without the 3 to 5 µs that Python and JAX take to start a program. The barrier
        keeps XLA from taking the operator out of the loop. The loop's output buffer is the
        donated one in every iteration.
        """
        return self.looped(lambda i, operands, more: operator(*operands), ())

    def looped(self, step: Callable[..., jax.Array], more: Any) -> Callable[[int], None]:
        """The same of `step`, of the iteration, the operands and `more` arguments, a pytree."""

        def loop(operands, more, out, calls):
            def body(i, carry):
                operands, more, _ = lax.optimization_barrier(carry)
                return operands, more, step(i, operands, more)

            return lax.fori_loop(0, calls, body, (operands, more, out))[2]

        return functools.partial(self._run, jax.jit(loop, donate_argnums=2), more)

    def _run(self, compiled: Callable, more: Any, calls: int) -> None:
        out = compiled(self._operands, more, self._out, np.int32(calls))
        self._out = out.block_until_ready()
        if self._out.unsafe_buffer_pointer() != self._address:
            raise RuntimeError("XLA did not reuse the donated output buffer")


def _view(address: int, array: jax.Array) -> np.ndarray:
    """A writable NumPy view that does not hold the JAX array (a held one cannot be donated)."""
    memory = (ctypes.c_char * (math.prod(array.shape) * array.dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype=array.dtype).reshape(array.shape)
