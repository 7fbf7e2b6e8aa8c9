"""Checks of arguments, and their errors, for the functions of quake_jax.approximations."""

from __future__ import annotations

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._core.axes import check_axes, check_where, static_axis


def _where(function: str) -> str:
    return f"quake_jax.approximations.{function}"


def real_array(x, function: str, name: str = "x") -> jax.Array:
    """Return x as an array of a floating-point dtype; raise TypeError for anything else."""
    if isinstance(x, float):
        return jnp.asarray(x, jnp.float32)
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"{_where(function)}: {name} must be an array of a floating-point dtype; "
            f"got {type(x).__name__}"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{_where(function)}: {name} must have a floating-point dtype; got {dtype} (integers "
            "with a scale are arguments of the functions whose names end in _int)"
        )
    return jnp.asarray(x)


def integer_array(x, function: str, name: str = "x", dtypes=(jnp.int8, jnp.int16, jnp.int32)):
    """Return x as int32; raise TypeError unless it is an array of one of `dtypes`."""
    dtype = getattr(x, "dtype", None)
    if dtype not in [jnp.dtype(d) for d in dtypes]:
        expected = ", ".join(jnp.dtype(d).name for d in dtypes)
        got = type(x).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"{_where(function)}: {name} must be an array of {expected}; got {got}")
    return jnp.asarray(x).astype(jnp.int32)


def one_axis(axis, ndim: int, function: str, array: str = "x") -> int:
    """Return `axis`, one integer, counted from the front."""
    axis = static_axis(axis, f"approximations.{function}")
    if not isinstance(axis, int):
        raise TypeError(f"{_where(function)}: axis must be one integer; got {axis!r}")
    check_axes(axis, ndim, f"approximations.{function}", array)
    return axis % ndim


def integer(value, function: str, name: str, low: int, high: int) -> int:
    """Return a static integer from low to high."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{_where(function)}: {name} must be an integer, known when the function is traced; "
            f"got {value!r}"
        )
    if not low <= value <= high:
        raise ValueError(f"{_where(function)}: {name} must be from {low} to {high}; got {value}")
    return int(value)


def positive(value, function: str, name: str) -> float:
    """Return a static positive number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{_where(function)}: {name} must be a number, known when the function is traced; "
            f"got {value!r}"
        )
    if not 0 < value < math.inf:
        raise ValueError(f"{_where(function)}: {name} must be positive and finite; got {value}")
    return float(value)


def choice(value, function: str, name: str, allowed) -> str:
    """Return a value that is one of those allowed."""
    if value not in allowed:
        raise ValueError(
            f"{_where(function)}: {name} must be one of {', '.join(map(repr, allowed))}; "
            f"got {value!r}"
        )
    return value


def flag(value, function: str, name: str) -> bool:
    """Return a static truth value."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{_where(function)}: {name} must be True or False; got {value!r}")
    return bool(value)


def scalar(value, function: str, name: str) -> jax.Array:
    """Return a positive number or array of one, which may be traced, as a float32 scalar.

    Whether it is positive is checked where its value is known without waiting for a device.
    """
    known = isinstance(value, (numbers.Real, np.ndarray, np.generic))
    if isinstance(value, (bool, np.bool_)) or not (known or isinstance(value, jax.Array)):
        raise TypeError(f"{_where(function)}: {name} must be a positive number; got {value!r}")
    if jnp.shape(value) != ():
        raise ValueError(
            f"{_where(function)}: {name} must be one number; got an array of shape "
            f"{jnp.shape(value)}"
        )
    if known and not 0 < float(value) < math.inf:
        raise ValueError(f"{_where(function)}: {name} must be positive and finite; got {value}")
    return jnp.asarray(value, jnp.float32)


def optional_scalar(value, function: str, name: str) -> jax.Array | None:
    return None if value is None else scalar(value, function, name)


def channels(value, x, axis: int, function: str, name: str) -> jax.Array | None:
    """Return None, or a vector with one number per element of x's axis, shaped to broadcast."""
    if value is None:
        return None
    if jnp.shape(value) != (x.shape[axis],):
        raise ValueError(
            f"{_where(function)}: {name} must have shape ({x.shape[axis]},), one number for each "
            f"element of axis {axis} of x, of shape {x.shape}; got {jnp.shape(value)}"
        )
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return jnp.asarray(value).reshape(shape)


def masks(where, x, function: str) -> None:
    """Raise unless `where` is None or a boolean array that broadcasts with x."""
    if where is not None:
        check_where(where, x, f"approximations.{function}")
