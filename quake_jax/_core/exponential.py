"""The exponential of the kernels in jax.numpy, on float32 arrays: what the families' references
compute with.

The method is QuAKE (Narayanaswami, Srinivasan, Ravindran, arXiv 2412.00408, 2024). No step depends
on whether the compiler fuses a multiplication with an addition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from quake_jax._core import constants
from quake_jax._core.drop_in import KERNEL_DTYPES

_SMALLEST_NORMAL = 2.0**-126


def polynomial(x, coefficients):
    """c[0] + c[1]·x + … by Horner's rule."""
    value = jnp.float32(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * x + c
    return value


def power_of_two(n):
    """2^n for whole n from -127 to 127, where 2^-127 comes out as 0."""
    # A conversion of NaN to an integer is undefined on some platforms. It may give anything here:
    # what it would scale is NaN too.
    n = jnp.where(jnp.isnan(n), 0, n)
    return lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)


def times_power_of_two(p, n):
    """p · 2^n for p from 1 to 3, or 0 where that would be subnormal."""
    value = p * power_of_two(jnp.maximum(n, -127.0))
    return jnp.where(value < _SMALLEST_NORMAL, 0, value)


def split_power(t, order, shift, largest):
    """p and n with 2^t ≈ p · 2^n, for orders 1 to 3; n is at most `largest`."""
    if order == 1:
        # int32((t + 127 - shift) · 2^23) reinterpreted as float32, taken apart: its integer part
        # is the exponent field, its fraction the mantissa field.
        t = t - shift
        n = jnp.minimum(jnp.floor(t), largest)
        return 1 + (t - n), n
    n = jnp.minimum(jnp.floor(t), largest)
    return polynomial(t - n, [1.0, *constants.EXP2_POLY[order]]), n


def exponential(x, order, *, shift=constants.ORDER1_SHIFT, low=0.0, scale=0):
    """e^(x + low) · 2^scale; inf on overflow, 0 where that would be subnormal.

    `low`, small, carries what does not fit into x (orders 4 and 5 only). `shift` is the constant C
    of order 1 in units of the exponent. `scale` is a whole number.
    """
    # Beyond these bounds the result is 0 or inf all the same, and inf - inf must not arise.
    x = jnp.clip(x, -88.0 - scale, 89.0)
    # n is cut where 2^(n + scale) would overflow: the polynomial then exceeds 2 and makes it inf.
    largest = 127.0 - scale
    if order <= 3:
        p, n = split_power(x * constants.LOG2E, order, shift, largest)
    else:
        # Cody and Waite: n · LN2_HI is exact, so r is as accurate as x.
        n = jnp.minimum(jnp.floor((x + low) * constants.LOG2E), largest)
        r = (x - n * constants.LN2_HI) - n * constants.LN2_LO + low
        p = polynomial(r, [1.0, *constants.EXP_POLY[order]])
    return times_power_of_two(p, n + scale)


def in_float32(function: Callable) -> Callable:
    """Make a function of float32 arrays one of float32, bfloat16 and float16 arrays."""

    @functools.wraps(function)
    def wrapped(*operands: jax.Array, order: int, **parameters) -> jax.Array:
        operands = [jnp.asarray(x) for x in operands]
        dtype = operands[0].dtype
        if dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"reference.{function.__name__}: x must be float32, bfloat16 or float16; "
                f"got {dtype}"
            )
        if order not in (1, 2, 3, 4, 5):
            raise ValueError(
                f"reference.{function.__name__}: order must be an integer from 1 to 5; "
                f"got {order!r}"
            )
        wide = [x if x.dtype == jnp.bool_ else x.astype(jnp.float32) for x in operands]
        return function(*wide, order=order, **parameters).astype(dtype)

    return wrapped
