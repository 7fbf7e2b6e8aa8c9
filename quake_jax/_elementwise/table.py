"""What the rows of the table in `functions` are, and what is made of each: primitive, derivative,
call.

Everything that lists functions derives from what is gathered here: exports, default orders, the
rewriter, Flax's fields, `python -m quake_jax`, the accuracy sweep, tests and benchmarks.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._core.config import DEFAULT_ORDERS, Order, resolved_order
from quake_jax._core.drop_in import drop_in, unary
from quake_jax._elementwise import derivative, primitive, reference


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of one array, as a row of the table states it.

    Attributes:
      formula: formula(m, x), the function in a form that keeps its relative accuracy. `m` has the
        mathematical functions of numbers of any kind: `FLOAT64` here, mpmath in the tests.
      limits: the values at 0, +inf and -inf.
      slope: slope(x, y, order) is dy/dx in float32; see `derivative`.
      forms: how programs write it, beside `exact`, for the rewriter: functions of jax.numpy.
      alpha_forms: the same of functions of x and a constant, the public function's `alpha`.
      name: that of the kernel and of the row; None is the public function's.
      keywords: those with which the public function uses this kernel.
      exact: what it replaces, a function of x alone; None is what the public function replaces.
      shares: the row whose kernel it uses instead of one of its own.
    """

    formula: Callable
    limits: tuple[float, float, float]
    slope: Callable | None = None
    forms: tuple[Callable, ...] = ()
    alpha_forms: tuple[Callable, ...] = ()
    name: str | None = None
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    exact: Callable | None = None
    shares: str | None = None


@dataclasses.dataclass(frozen=True)
class Function:
    """A row of the table: a kernel, completed, and the public function that uses it.

    Attributes:
      name: of the row.
      public: the public function; with `keywords` it is the function of this row.
      replaces: the function of JAX in whose place `public` stands, or None.
      on_request: whether the rewriter leaves it alone unless asked: its exactness may matter.
      kernel: what the row states.
      exact: what it replaces, of x alone.
      primitive: binds the kernel's primitive: f(x, order=…).
      call: call(order, x), with the types and errors of `exact`.
    """

    name: str
    public: Callable
    replaces: Callable | None
    on_request: bool
    kernel: Kernel
    exact: Callable
    primitive: Callable
    call: Callable

    @property
    def quake(self) -> Callable:
        """The public function as this row has it."""
        keywords = self.kernel.keywords
        return functools.partial(self.public, **keywords) if keywords else self.public

    @property
    def differentiable(self) -> Callable:
        """The kernel with its derivative: f(x, order=…) of arrays of the kernels' dtypes."""
        return derivative.KERNELS[self.kernel.shares or self.name]


# The rows by name, in the order of the table.
FUNCTIONS: dict[str, Function] = {}


def elementwise(
    *kernels: Kernel,
    replaces: Callable | None = None,
    default_order: Order | None = None,
    on_request: bool = False,
) -> Callable:
    """A decorator: makes rows of a public function of one array and the kernels that it uses.

    Args:
      kernels: one, or one for each choice of the function's `keywords`.
      replaces: the function of JAX in whose place it stands, with the same arguments, or None.
      default_order: of calls that give none, if not that of all functions: the highest order that
        the operator benchmark shows within 5 % of the time of order 3.
      on_request: as in `Function`.
    """

    def decorate(public: Callable) -> Callable:
        if default_order is not None:
            DEFAULT_ORDERS[public.__name__] = default_order
        for kernel in kernels:
            name = kernel.name or public.__name__
            exact = kernel.exact or replaces
            if kernel.shares:
                bind = FUNCTIONS[kernel.shares].primitive
            else:
                bind = primitive.elementwise(name, _elsewhere(name, exact))
                derivative.KERNELS[name] = unary(name, bind, kernel.slope)
            call = drop_in(public.__name__, derivative.KERNELS[kernel.shares or name], exact)
            FUNCTIONS[name] = Function(
                name, public, replaces, on_request, kernel, exact, bind, call
            )
        return public

    return decorate


def _elsewhere(name: str, exact: Callable) -> Callable:
    """What a kernel is on other platforms: the algorithm in `reference`, or the exact function."""
    algorithm = getattr(reference, name, None)
    return algorithm or (lambda x, *, order: exact(x.astype(jnp.float32)).astype(x.dtype))


def apply(name: str, order: Order | None, x) -> jax.Array:
    """What a public function returns: the function of the row `name`, at an order."""
    row = FUNCTIONS[name]
    return row.call(resolved_order(order, row.public.__name__), x)


# The functions that `Kernel.formula` uses, of arrays of float64 (or of any dtype).
FLOAT64 = types.SimpleNamespace(**vars(jnp), erfc=jax.scipy.special.erfc)


def in_float64(function: Function, x) -> np.ndarray:
    """The exact values of a row at x, in double precision."""
    with jax.enable_x64(True):
        return np.asarray(function.kernel.formula(FLOAT64, jnp.asarray(x, jnp.float64)))


# Kernels of several arrays, each of which belongs to an activation in the table.


@dataclasses.dataclass(frozen=True)
class Fused:
    """A kernel that fuses the function of a row with what stands beside it.

    Attributes:
      name: of the kernel.
      kind: "gated", "split" (a gate and a value in one array) or "biased".
      activation: the name of the row.
      public: the public function, which with `keywords` uses this kernel.
      keywords: those.
      gate_first: whether the first half of the array is the gate, unless the caller says.
    """

    name: str
    kind: str
    activation: str
    public: Callable
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    gate_first: bool = True

    @property
    def quake(self) -> Callable:
        return functools.partial(self.public, **self.keywords) if self.keywords else self.public


# By name, in the order of `gated`.
FUSED: dict[str, Fused] = {}


def fused(activation: str, kind: str) -> Fused | None:
    """The kernel of a kind that belongs to an activation, if there is one."""
    found = (f for f in FUSED.values() if (f.activation, f.kind) == (activation, kind))
    return next(found, None)
