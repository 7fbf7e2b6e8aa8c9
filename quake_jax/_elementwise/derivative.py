"""Derivatives of the exact functions, written with the approximate outputs.

Each slope(x, y, order) is dy/dx in float32. It is finite wherever the function's is: a factor that
vanishes meets an argument clipped to where it has already vanished, never inf. The order of a
nested call is the one resolved for the primal, whatever default is in force when the rule is
traced.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quake_jax._elementwise.reference import on_last_axis

_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)
_ONE_OVER_SQRT_2PI = 1 / math.sqrt(2 * math.pi)

# The differentiable kernels by name, which slopes call: f(*arrays, order=…). The table fills it.
KERNELS: dict[str, Callable] = {}


def sigmoid(x, y, order):
    return y * (1 - y)


def silu(x, y, order):
    s = KERNELS["sigmoid"](x, order=order)
    return s + jnp.clip(x, -104.0, 104.0) * (s * (1 - s))


def gelu_tanh(x, y, order):
    # y = x·σ(v) with v = √(8/π)·(x + 0.044715·x³); σ(v)·(1 - σ(v)) is 0 in float32 for |x| > 12.
    x = jnp.clip(x, -12.0, 12.0)
    s = KERNELS["sigmoid"](_SQRT_8_OVER_PI * (x + 0.044715 * x**3), order=order)
    return s + x * (s * (1 - s)) * (_SQRT_8_OVER_PI * (1 + 3 * 0.044715 * x**2))


def _normal_density(x, order):
    return _ONE_OVER_SQRT_2PI * KERNELS["exp"](-0.5 * x * x, order=order)


# Φ as a function of its own, because differentiating gelu(x) / x cancels near 0; Φ' = φ does not.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _normal_cdf(x, gelu_of_x, order):
    quotient = gelu_of_x / jnp.where(x == 0, 1.0, x)
    # Where x has been clipped it no longer fits gelu(x); Φ is 1 in float32 long before.
    return jnp.where(x == 0, 0.5, jnp.where(x >= 14, 1.0, quotient))


@_normal_cdf.defjvp
def _normal_cdf_jvp(order, primals, tangents):
    x, gelu_of_x = primals
    return _normal_cdf(x, gelu_of_x, order), tangents[0] * _normal_density(x, order)


def gelu_erf(x, y, order):
    x = jnp.clip(x, -14.0, 14.0)  # there φ(x) is 0 in float32, and Φ(x) is 0 or 1
    return _normal_cdf(x, y, order) + x * _normal_density(x, order)


def mish(x, y, order):
    # y = x·T with T = tanh(softplus(x)); 1 - T² is 0 in float32 for x > 10.
    t = KERNELS["tanh"](KERNELS["softplus"](x, order=order), order=order)
    s = KERNELS["sigmoid"](x, order=order)
    return t + jnp.clip(x, -104.0, 104.0) * ((1 - t) * (1 + t) * s)


def quick_gelu(x, y, order):
    s = KERNELS["sigmoid"](1.702 * x, order=order)
    return s + jnp.clip(1.702 * x, -104.0, 104.0) * (s * (1 - s))


# Tangents, as `_core.drop_in.differentiable` takes them, of functions of several arrays.


def _float32(arrays) -> list[jax.Array]:
    return [x.astype(jnp.float32) for x in arrays]


def of_biased(slope: Callable) -> Callable:
    """The tangent of activation(x + bias) from the activation's slope."""

    def tangent(operands, tangents, y, *, order):
        rows = (on_last_axis(b, operands[0]) for b in (operands[1], tangents[1]))
        x, x_tangent, bias, bias_tangent = _float32((operands[0], tangents[0], *rows))
        slopes = slope(x + bias, y.astype(jnp.float32), order)
        return (slopes * (x_tangent + bias_tangent)).astype(y.dtype)

    return tangent


def halves(x, gate_first: bool, axis: int = -1):
    """The gate and the value that are the halves of one axis of x."""
    first, second = jnp.split(x, 2, axis)
    return (first, second) if gate_first else (second, first)


def of_gated(activation: str, slope: Callable) -> tuple[Callable, Callable]:
    """The tangents of activation(gate) · value, and of the same for one array that holds both."""

    def of_pair(operands, tangents, y, *, order):
        gate, value, gate_tangent, value_tangent = _float32((*operands, *tangents))
        a = KERNELS[activation](gate, order=order)
        from_gate = slope(gate, a, order) * value * gate_tangent
        return (from_gate + a * value_tangent).astype(y.dtype)

    def of_split(operands, tangents, y, *, order, gate_first):
        parts = (halves(x, gate_first) for x in (*operands, *tangents))
        return of_pair(*parts, y, order=order)

    return of_pair, of_split


def logaddexp(operands, tangents, y, *, order):
    x1, x2, t1, t2 = _float32((*operands, *tangents))
    # Equal infinities have no difference; their weights are 1/2, as for other equal numbers.
    distance = jnp.where((x1 == x2) & jnp.isinf(x1), 0, x1 - x2)
    first, second = (KERNELS["sigmoid"](d, order=order) for d in (distance, -distance))
    return (first * t1 + second * t2).astype(y.dtype)
