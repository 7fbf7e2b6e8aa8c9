"""What the float fronts of the approximations of one kind have in common: the uniform call, masks,
special values, the dtype of the result, and the derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from quake_jax._core.axes import check_axes, positive_axes, static_axis
from quake_jax.approximations import _arguments
from quake_jax.approximations._derivative import (
    exact_exp,
    exact_gelu,
    exact_layer_norm,
    exact_sigmoid,
    exact_softmax,
    with_derivative_of,
)

# A logit that is lower than the largest of its row by this much stands for a masked one: programs
# put -inf, -1e9 or the lowest number of a dtype there, and a quantiser would saturate it to one
# that counts.
_MASKED = 1e8
_MASKED_FLOAT16 = 3e4


def _masking(approximate: Callable) -> Callable:
    """Handle masks and special values around approximate(x, keep, *constants, axis=…, …).

    That gets float32 numbers, all finite, and which of them count; each of the others is the
    largest of its row.
    """

    def masked(x, where, *constants, axis, **parameters):
        threshold = _MASKED_FLOAT16 if x.dtype == jnp.float16 else _MASKED
        dtype, x = x.dtype, x.astype(jnp.float32)
        valid = jnp.ones_like(x, bool) if where is None else where
        largest = jnp.max(x, axis, keepdims=True, where=valid, initial=-jnp.inf)
        keep = valid & jnp.isfinite(x) & (x >= largest - threshold)
        some = jnp.any(keep, axis, keepdims=True)
        undefined = jnp.any(valid, axis, keepdims=True) & ~some
        x = jnp.where(keep, x, jnp.where(some, largest, 0))
        # Softmax does not change if a number is added to a row; the scale of quantised ones would.
        x = jnp.where(largest < -threshold, x - largest, x)
        y = jnp.where(keep, approximate(x, keep, *constants, axis=axis, **parameters), 0)
        return jnp.where(valid & undefined, jnp.nan, y).astype(dtype)

    masked.__name__ = approximate.__name__
    return masked


def softmax_front(name: str, approximate: Callable) -> Callable:
    """Make call(x, axis, where, *constants, **static) from approximate(x, keep, *constants, …).

    Args:
      name: the public function's, for errors.
      approximate: of float32 numbers, all finite, and booleans (which of them count), of one
        shape, and scalars; with `axis`, counted from the front, and the static parameters. It
        returns numbers that sum to about 1 over those that count; the others are ignored.
    """
    function = with_derivative_of(exact_softmax, _masking(approximate))

    def call(x, axis, where, *constants, **static):
        x = _arguments.real_array(x, name)
        axis = static_axis(axis, f"approximations.{name}")
        check_axes(axis, x.ndim, f"approximations.{name}")
        _arguments.masks(where, x, name)
        if where is not None:
            shape = jnp.broadcast_shapes(x.shape, where.shape)
            x, where = jnp.broadcast_to(x, shape), jnp.broadcast_to(where, shape)
        if x.size == 0:
            return x
        axes = positive_axes(axis, x.ndim)
        if len(axes) == 1:
            return function((("axis", axes[0]), *static.items()), x, where, *constants)
        # Several axes are brought together, and are then one.
        last = tuple(range(-len(axes), 0))
        kept = tuple(n for d, n in enumerate(x.shape) if d not in axes)
        moved = jnp.moveaxis(x, axes, last)
        if where is not None:
            where = jnp.moveaxis(where, axes, last).reshape(*kept, -1)
        static = (("axis", len(kept)), *static.items())
        y = function(static, moved.reshape(*kept, -1), where, *constants)
        return jnp.moveaxis(y.reshape(moved.shape), last, axes)

    return call


def softmax_from_exp(exp: Callable) -> Callable:
    """Softmax with an approximate exponential: exp(x - max x) / Σ exp(x - max x).

    The papers on exponentials alone do not define one; this is the obvious use, with an exact
    division.

    Args:
      exp: f(x) of a float32 array of numbers of at most 0, such as the functions of kind "exp".

    Returns:
      f(x, axis=-1, where=None), as all functions of kind "softmax": the result has the dtype of
      x, and the shape of x and where together. Its derivative is the exact softmax's.

    Raises:
      TypeError: if exp cannot be called; later, as the functions of kind "softmax".

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> softmax = approximations.softmax_from_exp(approximations.ratio_exp)
      >>> y = softmax(jnp.array([1.0, 2.0, 3.0]))
    """
    if not callable(exp):
        raise TypeError(
            "quake_jax.approximations.softmax_from_exp: exp must be a function; "
            f"got {type(exp).__name__}"
        )

    def approximate(x, keep, *, axis):
        e = jnp.where(keep, exp(x - jnp.max(x, axis, keepdims=True)), 0)
        return e / jnp.sum(e, axis, keepdims=True)

    call = softmax_front("softmax_from_exp", approximate)

    def softmax(x: jax.Array, axis=-1, where: jax.Array | None = None) -> jax.Array:
        return call(x, axis, where)

    softmax.__doc__ = f"Softmax with the exponential `{getattr(exp, '__name__', exp)}`."
    return softmax


def _elementwise_front(name: str, exact: Callable, approximate: Callable) -> Callable:
    def rounded(x, *constants, **parameters):
        return approximate(x.astype(jnp.float32), *constants, **parameters).astype(x.dtype)

    rounded.__name__ = approximate.__name__
    function = with_derivative_of(exact, rounded)

    def call(x, *constants, **static):
        x = _arguments.real_array(x, name)
        return x if x.size == 0 else function(tuple(static.items()), x, *constants)

    return call


def gelu_front(name: str, approximate: Callable) -> Callable:
    """Make call(x, *constants, **static) from approximate(x, *constants, **static), in float32.

    approximate gets finite numbers only.
    """

    def limited(x, *constants, **parameters):
        finite = jnp.isfinite(x)
        y = approximate(jnp.where(finite, x, 0), *constants, **parameters)
        return jnp.where(finite, y, jnp.where(x == -jnp.inf, 0, x))

    limited.__name__ = approximate.__name__
    return _elementwise_front(name, exact_gelu, limited)


def exp_front(name: str, approximate: Callable) -> Callable:
    """Make call(x, **static) from approximate(x, **static), in float32; NaN gives NaN."""

    def limited(x, *constants, **parameters):
        y = approximate(jnp.where(jnp.isnan(x), 0, x), *constants, **parameters)
        return jnp.where(jnp.isnan(x), x, y)

    limited.__name__ = approximate.__name__
    return _elementwise_front(name, exact_exp, limited)


def sigmoid_front(name: str, approximate: Callable) -> Callable:
    """Make call(x, **static) from approximate(x, **static), in float32; NaN gives NaN."""

    def limited(x, **parameters):
        return jnp.where(jnp.isnan(x), x, approximate(jnp.where(jnp.isnan(x), 0, x), **parameters))

    limited.__name__ = approximate.__name__
    return _elementwise_front(name, exact_sigmoid, limited)


def layer_norm_front(name: str, approximate: Callable) -> Callable:
    """Make call(x, scale, bias, axis, epsilon, *constants, **static) from approximate(x, scale, …).

    approximate gets float32 arrays: x with finite numbers, scale and bias or None for them,
    shaped to broadcast with x, and scalars; and `axis`, counted from the front, and `epsilon`.
    """

    def finite_rows(x, scale, bias, *constants, axis, **parameters):
        dtype, x = x.dtype, x.astype(jnp.float32)
        bad = jnp.any(~jnp.isfinite(x), axis, keepdims=True)
        scale, bias = (None if a is None else a.astype(jnp.float32) for a in (scale, bias))
        y = approximate(jnp.where(bad, 0, x), scale, bias, *constants, axis=axis, **parameters)
        return jnp.where(bad, jnp.nan, y).astype(dtype)

    finite_rows.__name__ = approximate.__name__
    function = with_derivative_of(exact_layer_norm, finite_rows, active=3)

    def call(x, scale, bias, axis, epsilon, *constants, **static):
        x = _arguments.real_array(x, name)
        axis = _arguments.one_axis(axis, x.ndim, name)
        for array, array_name in ((scale, "scale"), (bias, "bias")):
            if array is not None:
                _arguments.real_array(array, name, array_name)
        scale = _arguments.channels(scale, x, axis, name, "scale")
        bias = _arguments.channels(bias, x, axis, name, "bias")
        epsilon = 0.0 if epsilon == 0 else _arguments.positive(epsilon, name, "epsilon")
        if x.size == 0:
            return x
        static = (("axis", axis), ("epsilon", epsilon), *static.items())
        return function(static, x, scale, bias, *constants)

    return call
