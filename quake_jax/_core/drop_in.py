"""What turns a kernel into a drop-in function: its derivative, and the types and errors of the
exact function that it replaces.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.config import EXACT

_NUMERIC_KINDS = frozenset("biufc")  # of NumPy's own dtypes; bfloat16 is none of these
# The dtypes that the kernels read and write.
KERNEL_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def refusal(
    function: str, argument: str, expected: str, given: str, kind: type = ValueError
) -> Exception:
    """The error of an argument that a function does not take."""
    return kind(f"quake_jax.{function}: {argument} must be {expected}; got {given}")


def differentiable(name: str, kernel: Callable, tangent: Callable) -> Callable:
    """Give a kernel(*operands, **parameters) a name and a derivative, in both modes, to any order.

    `tangent(operands, tangents, y, **parameters)` is the derivative of y = kernel(…). It is itself
    differentiated for higher orders, so it may use differentiable kernels and jax.numpy only.
    """

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


def unary(name: str, kernel: Callable, slope: Callable) -> Callable:
    """`differentiable` for an element-wise function with dy/dx = slope(x, y, order), in float32."""

    def tangent(operands, tangents, y, *, order):
        (x,), (t,) = operands, tangents
        return t * slope(x.astype(jnp.float32), y.astype(jnp.float32), order).astype(y.dtype)

    return differentiable(name, kernel, tangent)


def unwrapped(x):
    """x, or the array that it stands for by its `__jax_array__`, as flax.nnx.Param does.

    jax.jit takes no such object, or takes it apart if it is a pytree.
    """
    make_array = None if isinstance(x, type) else getattr(x, "__jax_array__", None)
    return x if make_array is None else make_array()


def is_numeric(x) -> bool:
    """Whether x is a number or an array of numbers or truth values, as far as JAX knows any."""
    dtype = None if isinstance(x, type) else getattr(x, "dtype", None)
    if dtype is None:
        return isinstance(x, (int, float, complex)) or hasattr(x, "__jax_array__")
    if getattr(dtype, "kind", None) in _NUMERIC_KINDS:  # 20 times faster than what follows
        return True
    return dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.number)


def kind_of(x) -> str:
    """What x is, for errors."""
    dtype = None if isinstance(x, type) else getattr(x, "dtype", None)
    if x is None or isinstance(x, str):
        return repr(x)
    return type(x).__name__ if dtype is None else f"an array of dtype {dtype}"


def refuse_other_than_numbers(x, function: str, array: str) -> None:
    """Raise TypeError if x is no array of numbers, OverflowError if it is too large an integer."""
    where = f"quake_jax.{function}: {array} must be"
    if not is_numeric(x):
        wanted = "None or a boolean array" if array == "where" else "an array or a number"
        raise TypeError(f"{where} {wanted}; got {kind_of(x)}")
    if isinstance(x, int):
        dtype = jax.dtypes.canonicalize_dtype(int)
        if not jnp.iinfo(dtype).min <= x <= jnp.iinfo(dtype).max:
            raise OverflowError(f"{where} within the range of {dtype}; got {x}")


def as_array(x, function: str, name: str):
    """x if it is an array, else the array that it makes; raise TypeError if it makes none."""
    try:
        x = unwrapped(x)
        array = x if hasattr(x, "dtype") and not isinstance(x, type) else jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"quake_jax.{function}: {name} must be an array; got {x!r}") from error
    if not is_numeric(array):
        raise TypeError(
            f"quake_jax.{function}: {name} must be an array of numbers; got {kind_of(array)}"
        )
    return array


def optional_array(x, function: str, name: str):
    """`as_array`, but for None."""
    return None if x is None else as_array(x, function, name)


def naming_arguments(name: str, call: Callable, arrays: dict[str, int]) -> Callable:
    """`call`, given arrays for what stands for them, whose errors name the argument at fault.

    Args:
      name: the public function's.
      call: a compiled function, whose own errors would come from within JAX. Whether arguments
        are numbers is not looked at before it raises one.
      arrays: positions of its array arguments by name; None is left to `call`.
    """

    @functools.wraps(call)
    def checked(*arguments, **parameters):
        arguments = [unwrapped(x) for x in arguments]
        try:
            return call(*arguments, **parameters)
        except (TypeError, OverflowError) as error:
            if not str(error).startswith("quake_jax."):
                for array, position in arrays.items():
                    if arguments[position] is not None:
                        refuse_other_than_numbers(arguments[position], name, array)
            raise

    return checked


def same_kind(error: Exception, message: str) -> Exception:
    """An error of the kind of one of JAX's, with another message."""
    kinds = (jax.dtypes.TypePromotionError, TypeError, ValueError)
    return next(kind for kind in kinds if isinstance(error, kind))(message)


def static_bool(value, function: str, argument: str) -> bool:
    """Return whether `value` is true; raise TypeError where that is not known, or means nothing.

    In Python "none", a list and a mask that came to the wrong place are true as well.
    """
    if value is None or isinstance(value, int):
        return bool(value)
    if getattr(value, "dtype", None) == jnp.bool_ and value.shape == ():
        try:
            return bool(value)
        except jax.errors.TracerBoolConversionError:
            pass
    raise TypeError(
        f"quake_jax.{function}: {argument} must be True or False, known when the function is "
        f"traced; got {value!r}"
    )


def refuse_complex(x: jax.Array, function: str, array: str = "x") -> None:
    """Raise TypeError if x is complex: the kernels' functions are those of a real variable."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"quake_jax.{function}: {array} must be real; got an array of dtype {x.dtype}"
        )


def without_sharding(x) -> jax.ShapeDtypeStruct:
    """The shape, dtype and weak type of x, to be asked what a function makes of them."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=jax.typeof(x).weak_type)


def _check_broadcast(function: str, operands: dict[str, jax.Array]) -> None:
    try:
        jnp.broadcast_shapes(*(x.shape for x in operands.values()))
    except ValueError as error:
        given = " and ".join(f"{name} of shape {x.shape}" for name, x in operands.items())
        raise ValueError(
            f"quake_jax.{function}: {given} do not broadcast; each pair of trailing dimensions "
            "must be equal or contain a 1"
        ) from error


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
        for x, array in zip(operands, arrays, strict=True):
            refuse_other_than_numbers(x, name, array)
            refuse_complex(x, name, array)
        if check is not None:
            check(*operands, **parameters)
        else:
            _check_broadcast(name, dict(zip(arrays, operands, strict=True)))
        exactly = functools.partial(exact, **parameters) if parameters else exact
        try:
            result = jax.eval_shape(exactly, *map(without_sharding, operands))
        except (TypeError, ValueError) as error:
            given = " and ".join(
                f"{array} of shape {x.shape} and dtype {x.dtype}"
                for x, array in zip(operands, arrays, strict=True)
            )
            raise same_kind(error, f"quake_jax.{name}: cannot take {given}: {error}") from error
        if order == EXACT or result.dtype not in KERNEL_DTYPES:
            return exactly(*operands)
        operands = [x.astype(result.dtype) for x in operands]
        return jax_names.with_weak_type(
            function(*operands, order=order, **parameters), result.weak_type
        )

    call.__name__ = call.__qualname__ = f"quake_{name}"
    # Compiled, so that a call outside jit takes JAX's fast path; inlined, so that inside jit
    # the program shows the kernel and nothing around it.
    compiled = jax.jit(call, static_argnums=0, static_argnames=parameters, inline=jax_names.INLINE)
    return naming_arguments(name, compiled, {array: k + 1 for k, array in enumerate(arrays)})
