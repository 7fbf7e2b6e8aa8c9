"""Functions of two arrays: activations fused with what stands beside them in a feed-forward layer
(a bias before, or a second array that they gate), and logaddexp.

Each is one pass over memory in the forward direction. Sums and products are taken in float32, so
16-bit results are rounded once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from quake_jax._core.config import Order, resolved_order
from quake_jax._core.drop_in import differentiable, drop_in, static_bool
from quake_jax._core.exports import defined_in
from quake_jax._elementwise import derivative, primitive, reference
from quake_jax._elementwise.derivative import halves
from quake_jax._elementwise.reference import on_last_axis
from quake_jax._elementwise.table import FUNCTIONS, FUSED, Fused

# activation(x + bias)


def _biased(name: str, kernel: str, activation: str) -> Callable:
    """Make f(order, x, bias) from a kernel, which fuses an activation of the table."""
    row = FUNCTIONS[activation]

    def check(x, bias):
        if x.ndim == 0:
            raise ValueError(f"quake_jax.{name}: x must have an axis for the bias; got a scalar")
        if bias.shape != x.shape[-1:]:
            raise ValueError(
                f"quake_jax.{name}: bias must have shape {x.shape[-1:]}, for the last axis of x of "
                f"shape {x.shape}; got {bias.shape}"
            )

    def exactly(x, bias):
        return row.exact(x + on_last_axis(bias, x))

    bind = primitive.biased(kernel, row.primitive, getattr(reference, kernel))
    function = differentiable(kernel, bind, derivative.of_biased(row.kernel.slope))
    return drop_in(name, function, exactly, arrays=["x", "bias"], check=check)


_bias_silu_call = _biased("bias_silu", "bias_silu", "silu")
_bias_gelu_calls = {
    True: _biased("bias_gelu", "bias_gelu_tanh", "gelu_tanh"),
    False: _biased("bias_gelu", "bias_gelu_erf", "gelu_erf"),
}


# activation(gate) · value


def _gated(kernel: str, activation: str) -> tuple[Callable, Callable]:
    """Make the differentiable f(gate, value) and f(x), which splits x, from an activation."""
    of_pair, of_split = derivative.of_gated(activation, FUNCTIONS[activation].kernel.slope)
    pair = primitive.elementwise(kernel, getattr(reference, kernel))
    both = f"{kernel}_split"
    split = primitive.split(both, getattr(reference, both))
    return differentiable(kernel, pair, of_pair), differentiable(both, split, of_split)


def _gated_calls(name: str, kernel: str, activation: str) -> tuple[Callable, Callable]:
    """Make f(order, gate, value) and f(order, x, gate_first=…)."""
    pair, split = _gated(kernel, activation)
    exact = FUNCTIONS[activation].exact

    def check_split(x, gate_first):
        if x.ndim == 0 or x.shape[-1] % 2 != 0:
            raise ValueError(
                f"quake_jax.{name}: without value, gate must have a last axis of even size, which "
                f"holds both; got shape {x.shape}"
            )

    def exact_pair(gate, value):
        return exact(gate) * value

    def exact_split(x, gate_first):
        return exact_pair(*halves(x, gate_first))

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


_swiglu_calls = _gated_calls("swiglu", "swiglu", "silu")
_geglu_calls = {
    True: _gated_calls("geglu", "geglu_tanh", "gelu_tanh"),
    False: _gated_calls("geglu", "geglu_erf", "gelu_erf"),
}
_glu_pair, _glu_split = _gated("glu", "sigmoid")


def _glu(x, *, order, axis):
    axis %= x.ndim
    if axis == x.ndim - 1:
        return _glu_split(x, order=order, gate_first=False)
    spec = jax.typeof(x).sharding.spec
    if any(entry is not None for entry in spec[axis:]):
        # Axes with explicit sharding cannot be merged, and a split axis has no halves at hand.
        x = jax.sharding.reshard(x, PartitionSpec(*spec[:axis], None, *spec[axis + 1 :]))
        return _glu_pair(*halves(x, False, axis), order=order)
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


# log(e^x1 + e^x2)


_logaddexp_kernel = differentiable(
    "logaddexp",
    primitive.elementwise("logaddexp", reference.logaddexp),
    derivative.logaddexp,
)


def _logaddexp(x1, x2, *, order):
    return _logaddexp_kernel(*jnp.broadcast_arrays(x1, x2), order=order)


# jax.numpy.logaddexp is an object that jax.eval_shape cannot tell from another of its kind.
_logaddexp_call = drop_in(
    "logaddexp", _logaddexp, lambda x1, x2: jnp.logaddexp(x1, x2), arrays=["x1", "x2"]
)


def logaddexp(x1: ArrayLike, x2: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """log(e^x1 + e^x2) without overflow: `jax.numpy.logaddexp` with QuAKE (arXiv 2412.00408).

    Args:
      x1, x2: real arrays that broadcast with each other; integers and bool are promoted as by
        `jax.numpy.logaddexp`.
      order: accuracy, as in `exp`. The absolute error is at most half the relative error of `exp`.

    Returns:
      An array of the broadcast shape and promoted dtype. The derivatives at equal infinities are
      1/2.

    Raises:
      TypeError: if an argument is complex or no array.
      ValueError: if x1 and x2 do not broadcast.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.logaddexp(jnp.array([1.0, 2.0]), 0.0)
    """
    return _logaddexp_call(resolved_order(order, "logaddexp"), x1, x2)


_ERF = {"approximate": False}
for _row in (
    Fused("glu_split", "split", "sigmoid", glu, gate_first=False),
    Fused("bias_silu", "biased", "silu", bias_silu),
    Fused("bias_gelu_tanh", "biased", "gelu_tanh", bias_gelu),
    Fused("bias_gelu_erf", "biased", "gelu_erf", bias_gelu, _ERF),
    Fused("swiglu", "gated", "silu", swiglu),
    Fused("swiglu_split", "split", "silu", swiglu),
    Fused("geglu_tanh", "gated", "gelu_tanh", geglu),
    Fused("geglu_tanh_split", "split", "gelu_tanh", geglu),
    Fused("geglu_erf", "gated", "gelu_erf", geglu, _ERF),
    Fused("geglu_erf_split", "split", "gelu_erf", geglu, _ERF),
):
    FUSED[_row.name] = _row


__all__ = defined_in(globals())
