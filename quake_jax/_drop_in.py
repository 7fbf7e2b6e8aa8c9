"""What turns a kernel into a drop-in function: its derivative, and the types and errors of the
exact function that it replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from quake_jax import _compat, _primitives
from quake_jax._config import EXACT

# The dtypes that the kernels read and write.
KERNEL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def differentiable(name: str, tangent: Callable) -> Callable:
    """Give the kernel `name(*operands, **parameters)` a derivative, in both modes, to any order.

    `tangent(operands, tangents, y, **parameters)` is the derivative of y = kernel(…). It is itself
    differentiated for higher orders, so it may use differentiable kernels and jax.numpy only.
    """
    kernel = getattr(_primitives, name)

    def call(parameters, *operands):
        return kernel(*operands, **dict(parameters))

    call.__name__ = call.__qualname__ = name  # what a printed jaxpr shows
    function = jax.custom_jvp(call, nondiff_argnums=(0,))

    @function.defjvp
    def tangent_rule(parameters, operands, tangents):
        y = function(parameters, *operands)
        return y, tangent(operands, tangents, y, **dict(parameters))

    def bound(*operands, **parameters):
        return function(tuple(parameters.items()), *operands)

    return bound


def unary(name: str, slope: Callable) -> Callable:
    """`differentiable` for an element-wise function with dy/dx = slope(x, y, order), in float32."""

    def tangent(operands, tangents, y, *, order):
        (x,), (t,) = operands, tangents
        return t * slope(x.astype(jnp.float32), y.astype(jnp.float32), order).astype(y.dtype)

    return differentiable(name, tangent)


def refuse_complex(x: jax.Array, function: str, array: str = "x") -> None:
    """Raise TypeError if x is complex: the kernels' functions are those of a real variable."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"quake_jax.{function}: {array} must be real; got an array of dtype {x.dtype}"
        )


def without_sharding(x) -> jax.ShapeDtypeStruct:
    """The shape, dtype and weak type of x, to be asked what a function makes of them."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type)


def drop_in(
    name: str,
    function: Callable,
    exact: Callable,
    *,
    arrays: Sequence[str] = ("x",),
    check: Callable | None = None,
    parameters: Sequence[str] = (),
) -> Callable:
    """Make f(order, *arrays) from function(*arrays, order=…) and what it replaces.

    Result types and errors are those of `exact`, and what the kernel has no dtype for goes there.

    Args:
      name: the public function's, for its errors.
      function: differentiable, of `arrays` in one of KERNEL_DTYPES.
      exact: what it replaces, without `order`.
      arrays: the names of the array arguments.
      check: `check(*arrays)` may raise a clearer error than `exact` does.
      parameters: static keyword arguments that the three functions take too.
    """

    def call(order, *operands, **parameters):
        if not all(hasattr(x, "dtype") for x in operands):
            return exact(*operands, **parameters)  # raises: a list, None, or another container
        for x, array in zip(operands, arrays, strict=True):
            refuse_complex(x, name, array)
        if check is not None:
            check(*operands, **parameters)
        exactly = functools.partial(exact, **parameters) if parameters else exact
        result = jax.eval_shape(exactly, *map(without_sharding, operands))
        if order == EXACT or result.dtype not in KERNEL_DTYPES:
            return exactly(*operands)
        operands = [x.astype(result.dtype) for x in operands]
        return _compat.with_weak_type(
            function(*operands, order=order, **parameters), result.weak_type
        )

    call.__name__ = call.__qualname__ = f"quake_{name}"
    # Compiled, so that a call outside jit takes JAX's fast path; inlined, so that inside jit
    # the program shows the kernel and nothing around it.
    return jax.jit(call, static_argnums=0, static_argnames=parameters, inline=_compat.INLINE)
