"""Activations fused with what stands beside them in a feed-forward layer: a bias before, or a
second array that they gate.

Each is one pass over memory in the forward direction. Sums and products are taken in float32, so
16-bit results are rounded once.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from quake_jax import activations, reference
from quake_jax._config import Order, resolved_order
from quake_jax._drop_in import differentiable, drop_in, static_bool

_exact_gelu_erf = functools.partial(jax.nn.gelu, approximate=False)


def _float32(arrays) -> list[jax.Array]:
    return [x.astype(jnp.float32) for x in arrays]


# activation(x + bias)


def _biased(name: str, kernel: str, slope: Callable, exact: Callable) -> Callable:
    """Make f(order, x, bias) from a kernel, the activation's slope and the exact activation."""

    def tangent(operands, tangents, y, *, order):
        rows = (reference.on_last_axis(b, operands[0]) for b in (operands[1], tangents[1]))
        x, x_tangent, bias, bias_tangent = _float32((operands[0], tangents[0], *rows))
        slopes = slope(x + bias, y.astype(jnp.float32), order)
        return (slopes * (x_tangent + bias_tangent)).astype(y.dtype)

    def check(x, bias):
        if x.ndim == 0:
            raise ValueError(f"quake_jax.{name}: x must have an axis for the bias; got a scalar")
        if bias.shape != x.shape[-1:]:
            raise ValueError(
                f"quake_jax.{name}: bias must have shape {x.shape[-1:]}, for the last axis of x of "
                f"shape {x.shape}; got {bias.shape}"
            )

    def exactly(x, bias):
        return exact(x + reference.on_last_axis(bias, x))

    function = differentiable(kernel, tangent)
    return drop_in(name, function, exactly, arrays=["x", "bias"], check=check)


_bias_silu_call = _biased("bias_silu", "bias_silu", activations.silu_slope, jax.nn.silu)
_bias_gelu_calls = {
    True: _biased("bias_gelu", "bias_gelu_tanh", activations.gelu_tanh_slope, jax.nn.gelu),
    False: _biased("bias_gelu", "bias_gelu_erf", activations.gelu_erf_slope, _exact_gelu_erf),
}


# activation(gate) · value


def _halves(x, gate_first: bool, axis: int = -1):
    """The gate and the value that are the halves of one axis of x."""
    first, second = jnp.split(x, 2, axis)
    return (first, second) if gate_first else (second, first)


def _gated(kernel: str, activation: Callable, slope: Callable) -> tuple[Callable, Callable]:
    """Make the differentiable f(gate, value) and f(x), which splits x, from an activation."""

    def pair_tangent(operands, tangents, y, *, order):
        gate, value, gate_tangent, value_tangent = _float32((*operands, *tangents))
        a = activation(gate, order=order)
        from_gate = slope(gate, a, order) * value * gate_tangent
        return (from_gate + a * value_tangent).astype(y.dtype)

    def split_tangent(operands, tangents, y, *, order, gate_first):
        halves = (_halves(x, gate_first) for x in (*operands, *tangents))
        return pair_tangent(*halves, y, order=order)

    pair = differentiable(kernel, pair_tangent)
    return pair, differentiable(f"{kernel}_split", split_tangent)


def _gated_calls(name: str, kernel: str, activation: Callable, slope: Callable, exact: Callable):
    """Make f(order, gate, value) and f(order, x, gate_first=…)."""
    pair, split = _gated(kernel, activation, slope)

    def check_split(x, gate_first):
        if x.ndim == 0 or x.shape[-1] % 2 != 0:
            raise ValueError(
                f"quake_jax.{name}: without value, gate must have a last axis of even size, which "
                f"holds both; got shape {x.shape}"
            )

    def exact_pair(gate, value):
        return exact(gate) * value

    def exact_split(x, gate_first):
        return exact_pair(*_halves(x, gate_first))

    def broadcast_pair(gate, value, *, order):
        return pair(*jnp.broadcast_arrays(gate, value), order=order)

    return (
        drop_in(name, broadcast_pair, exact_pair, arrays=["gate", "value"]),
        drop_in(
            name,
            split,
            exact_split,
            arrays=["gate"],
            check=check_split,
            parameters=["gate_first"],
        ),
    )


_swiglu_calls = _gated_calls(
    "swiglu", "swiglu", activations.silu_kernel, activations.silu_slope, jax.nn.silu
)
_geglu_calls = {
    True: _gated_calls(
        "geglu",
        "geglu_tanh",
        activations.gelu_tanh_kernel,
        activations.gelu_tanh_slope,
        jax.nn.gelu,
    ),
    False: _gated_calls(
        "geglu",
        "geglu_erf",
        activations.gelu_erf_kernel,
        activations.gelu_erf_slope,
        _exact_gelu_erf,
    ),
}
_glu_pair, _glu_split = _gated("glu", activations.sigmoid_kernel, activations.sigmoid_slope)


def _glu(x, *, order, axis):
    axis %= x.ndim
    if axis == x.ndim - 1:
        return _glu_split(x, order=order, gate_first=False)
    spec = jax.typeof(x).sharding.spec
    if any(entry is not None for entry in spec[axis:]):
        # Axes with explicit sharding cannot be merged, and a split axis has no halves at hand.
        x = jax.sharding.reshard(x, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :]))
        return _glu_pair(*_halves(x, False, axis), order=order)
    # Merged with the axes behind it, the halves of the axis are those of the last one.
    rows = x.reshape(*x.shape[:axis], math.prod(x.shape[axis:]))
    y = _glu_split(rows, order=order, gate_first=False)
    return y.reshape(*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :])


def _check_glu(x, axis):
    if not -x.ndim <= axis < x.ndim:
        allowed = f"from {-x.ndim} to {x.ndim - 1}" if x.ndim else "none, for a scalar"
        raise ValueError(
            f"quake_jax.glu: axis {axis} is out of bounds for x of {x.ndim} dimensions; "
            f"allowed: {allowed}"
        )
    if x.shape[axis] % 2 != 0:
        raise ValueError(
            f"quake_jax.glu: axis {axis} of x must have an even size; got shape {x.shape}"
        )


_glu_call = drop_in("glu", _glu, jax.nn.glu, check=_check_glu, parameters=["axis"])


def bias_silu(x: ArrayLike, bias: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """silu(x + bias) in one pass over memory, with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of shape (…, n).
      bias: real array of shape (n,).
      order: accuracy, as in `exp`. "exact" is `jax.nn.silu(x + bias)`.

    Returns:
      An array of x's shape and the promoted dtype of x and bias. The sum is not rounded to a
      16-bit dtype.

    Raises:
      TypeError: if x or bias is complex or no array, or if both are integers.
      ValueError: if the shape of bias is not that of x's last axis.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.bias_silu(jnp.ones((2, 3)), jnp.array([-1.0, 0.0, 1.0]))
    """
    return _bias_silu_call(resolved_order(order, "bias_silu"), x, bias)


def bias_gelu(
    x: ArrayLike, bias: ArrayLike, approximate: bool = True, *, order: Order | None = None
) -> jax.Array:
    """gelu(x + bias) in one pass over memory, with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of shape (…, n).
      bias: real array of shape (n,).
      approximate: which form of GELU, as in `gelu`.
      order: accuracy, as in `exp`. "exact" is `jax.nn.gelu(x + bias, approximate)`.

    Returns:
      An array of x's shape and the promoted dtype of x and bias. The sum is not rounded to a
      16-bit dtype.

    Raises:
      TypeError: if x or bias is complex or no array.
      ValueError: if the shape of bias is not that of x's last axis.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.bias_gelu(jnp.ones((2, 3)), jnp.array([-1.0, 0.0, 1.0]))
    """
    call = _bias_gelu_calls[static_bool(approximate, "bias_gelu", "approximate")]
    return call(resolved_order(order, "bias_gelu"), x, bias)


def glu(x: ArrayLike, axis: int = -1, *, order: Order | None = None) -> jax.Array:
    """Gated linear unit, value · sigmoid(gate): `jax.nn.glu` with QuAKE (arXiv 2412.00408).

    Dauphin et al., arXiv 1612.08083. The value is the first half of an axis, the gate the second.

    Args:
      x: floating-point array of any shape.
      axis: the axis that holds both; its size is even.
      order: accuracy of the sigmoid, as in `exp`.

    Returns:
      An array of x's shape with half as many elements along the axis, and x's dtype.

    Raises:
      TypeError: if x is complex, integer or no array; if axis is no integer.
      ValueError: if axis is out of bounds or of odd size.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.glu(jnp.array([[1.0, 2.0, -1.0, 0.0]]))
    """
    try:
        axis = operator.index(axis)
    except TypeError:
        raise TypeError(f"quake_jax.glu: axis must be an integer; got {axis!r}") from None
    return _glu_call(resolved_order(order, "glu"), x, axis=axis)


def swiglu(
    gate: ArrayLike,
    value: ArrayLike | None = None,
    *,
    gate_first: bool = True,
    order: Order | None = None,
) -> jax.Array:
    """silu(gate) · value in one pass over memory, with QuAKE (arXiv 2412.00408).

    Shazeer, arXiv 2002.05202. The gate is what the activation is applied to.

    Args:
      gate: floating-point array; without `value` it holds both, as the halves of its last axis.
      value: real array that broadcasts with gate, or None.
      gate_first: which half is the gate, when value is None. True, the first: the fused
        projections of Phi-3 and DINOv2, and LLaMA's gate_proj and up_proj put side by side. False,
        the second: the order of `glu`, and of lucidrains' PaLM.
      order: accuracy, as in `exp`. "exact" is `jax.nn.silu(gate) * value`.

    Returns:
      An array of the broadcast shape (or of gate's with half the last axis) and promoted dtype.

    Raises:
      TypeError: if an argument is complex or no array, or if gate is integer.
      ValueError: if gate and value do not broadcast; without value, if gate's last axis is odd.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> gate, value = jnp.array([[-1.0, 1.0]]), jnp.array([[2.0, 3.0]])
      >>> y = quake_jax.swiglu(gate, value)
      >>> y = quake_jax.swiglu(jnp.concatenate([gate, value], axis=-1))
    """
    order = resolved_order(order, "swiglu")
    pair, split = _swiglu_calls
    gate_first = static_bool(gate_first, "swiglu", "gate_first")
    if value is None:
        return split(order, gate, gate_first=gate_first)
    return pair(order, gate, value)


def geglu(
    gate: ArrayLike,
    value: ArrayLike | None = None,
    approximate: bool = True,
    *,
    gate_first: bool = True,
    order: Order | None = None,
) -> jax.Array:
    """gelu(gate) · value in one pass over memory, with QuAKE (arXiv 2412.00408).

    Shazeer, arXiv 2002.05202. The gate is what the activation is applied to.

    Args:
      gate: real array; without `value` it holds both, as the halves of its last axis.
      value: real array that broadcasts with gate, or None.
      approximate: which form of GELU, as in `gelu`. Gemma and T5 1.1 use the tanh form.
      gate_first: which half is the gate, when value is None. True, the first: ModernBERT, and
        Gemma's gate_proj and up_proj put side by side. False, the second: Stable Diffusion.
      order: accuracy, as in `exp`. "exact" is `jax.nn.gelu(gate, approximate) * value`.

    Returns:
      An array of the broadcast shape (or of gate's with half the last axis) and promoted dtype.

    Raises:
      TypeError: if an argument is complex or no array.
      ValueError: if gate and value do not broadcast; without value, if gate's last axis is odd.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> gate, value = jnp.array([[-1.0, 1.0]]), jnp.array([[2.0, 3.0]])
      >>> y = quake_jax.geglu(gate, value, approximate=False)
      >>> y = quake_jax.geglu(jnp.concatenate([gate, value], axis=-1))
    """
    order = resolved_order(order, "geglu")
    pair, split = _geglu_calls[static_bool(approximate, "geglu", "approximate")]
    gate_first = static_bool(gate_first, "geglu", "gate_first")
    if value is None:
        return split(order, gate, gate_first=gate_first)
    return pair(order, gate, value)
