"""Layer norm and RMS norm, with a sum in front of them where there is a residual."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._core import jax_names, norm
from quake_jax._core.drop_in import KERNEL_DTYPES, naming_arguments, refuse_other_than_numbers
from quake_jax._core.exports import defined_in
from quake_jax._core.switches import DISABLED
from quake_jax._rows import derivative


def _check(name: str, x, residual, scale, offset) -> None:
    arrays = {"x": x, "residual": residual, "scale": scale, "offset": offset}
    for array, value in arrays.items():
        if value is None and array != "x":
            continue
        refuse_other_than_numbers(value, name, array)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(
                f"quake_jax.{name}: {array} must have a floating-point dtype; got {value.dtype}"
            )
    if x.ndim == 0:
        raise ValueError(f"quake_jax.{name}: x must have at least one axis; got a scalar")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"quake_jax.{name}: residual must have x's shape {x.shape} and dtype {x.dtype}; got "
            f"shape {residual.shape} and dtype {residual.dtype}"
        )
    for array in ("scale", "offset"):
        value = arrays[array]
        if value is not None and value.shape != x.shape[-1:]:
            raise ValueError(
                f"quake_jax.{name}: {array} must have shape {x.shape[-1:]}, for the last axis of x "
                f"of shape {x.shape}; got shape {value.shape}"
            )


def _norm(name: str, exact, kernel, kernel_of_sum, *, has_offset: bool):
    """Make f(x, residual, scale, offset, epsilon) from the formula and the kernels."""

    def call(x, residual, scale, offset, epsilon):
        _check(name, x, residual, scale, offset)
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        of_columns = x.shape[-1:]
        parameters = [jnp.ones(of_columns, wide) if scale is None else scale.astype(wide)]
        if has_offset:
            parameters.append(
                jnp.zeros(of_columns, wide) if offset is None else offset.astype(wide)
            )
        if DISABLED or x.dtype not in KERNEL_DTYPES:
            v = x.astype(wide) if residual is None else x.astype(wide) + residual.astype(wide)
            y = exact(v, *parameters, epsilon).astype(x.dtype)
            return y if residual is None else (y, v.astype(x.dtype))
        if residual is None:
            return kernel(epsilon, x, *parameters)
        return kernel_of_sum(epsilon, x, residual, *parameters)

    call.__name__ = call.__qualname__ = f"quake_{name}"
    compiled = jax.jit(call, static_argnums=4, inline=jax_names.INLINE)
    return naming_arguments(name, compiled, {"x": 0, "residual": 1, "scale": 2, "offset": 3})


_layer_norm_call = _norm(
    "layer_norm",
    norm.layer_norm,
    derivative.layer_norm,
    derivative.layer_norm_residual,
    has_offset=True,
)
_rms_norm_call = _norm(
    "rms_norm",
    norm.rms_norm,
    derivative.rms_norm,
    derivative.rms_norm_residual,
    has_offset=False,
)


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    offset: ArrayLike | None = None,
    *,
    residual: ArrayLike | None = None,
    epsilon: float = 1e-6,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """(x - mean)/√(variance + epsilon) · scale + offset over the last axis (Ba et al., 1607.06450).

    Computed in float32 and rounded once; the variance is the mean square of the differences from
    the mean. float32, bfloat16 and float16 use the kernel; other floating-point dtypes get the
    formula from XLA.

    Args:
      x: floating-point array of shape (…, K).
      scale: floating-point array of shape (K,), or None for 1. It is converted to float32 (to
        float64 for such an x), as the offset is.
      offset: floating-point array of shape (K,), or None for 0.
      residual: array of x's shape and dtype, or None. With one the sum x + residual is normalised,
        before it is rounded, and returned too: one pass over memory.
      epsilon: a number of at least 0, known when the function is traced. 1e-6 is Flax's default;
        torch's is 1e-5.

    Returns:
      An array of x's shape and dtype; with a residual the pair of that and x + residual, rounded to
      the same dtype. A row with NaN or infinities is NaN; one of equal elements is the offset, or
      NaN if epsilon is 0.

    Raises:
      TypeError: if an array is no floating-point one; if epsilon is no number.
      ValueError: if scale, offset or residual do not fit x; if x has no axis; if epsilon is
        negative, infinite or NaN.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> x, scale, offset = jnp.arange(6.0).reshape(2, 3), jnp.ones(3), jnp.zeros(3)
      >>> y = quake_jax.layer_norm(x, scale, offset)
      >>> y, total = quake_jax.layer_norm(x, scale, offset, residual=2 * x)
    """
    epsilon = norm.static_epsilon(epsilon, "quake_jax.layer_norm: epsilon")
    return _layer_norm_call(x, residual, scale, offset, epsilon)


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    residual: ArrayLike | None = None,
    epsilon: float = 1e-6,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """x/√(mean square + epsilon) · scale over the last axis (Zhang and Sennrich, 1910.07467).

    Computed in float32 and rounded once. float32, bfloat16 and float16 use the kernel; other
    floating-point dtypes get the formula from XLA.

    Args:
      x: floating-point array of shape (…, K).
      scale: floating-point array of shape (K,), or None for 1. It is converted to float32 (to
        float64 for such an x). Models that store it less 1 take `1 + weight`.
      residual: array of x's shape and dtype, or None, as in `layer_norm`.
      epsilon: a number of at least 0, as in `layer_norm`.

    Returns:
      An array of x's shape and dtype; with a residual the pair of that and x + residual, rounded to
      the same dtype. A row with NaN is NaN; one of zeros is 0, or NaN if epsilon is 0.

    Raises:
      TypeError, ValueError: as `layer_norm`.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.rms_norm(jnp.arange(6.0).reshape(2, 3), jnp.ones(3))
    """
    epsilon = norm.static_epsilon(epsilon, "quake_jax.rms_norm: epsilon")
    return _rms_norm_call(x, residual, scale, None, epsilon)


__all__ = defined_in(globals())
