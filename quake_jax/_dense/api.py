"""The dense layer: checks of its arguments, and what it is of weights that are not packed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from quake_jax._core import jax_names
from quake_jax._core.config import Order
from quake_jax._core.drop_in import KERNEL_DTYPES, as_array, optional_array, refusal, unwrapped
from quake_jax._core.exports import defined_in
from quake_jax._core.norm import static_epsilon
from quake_jax._dense import derivative, layout, packed, reference, sharding
from quake_jax._dense.call import in_one_stack, kind_of_norm, order_of, prepared
from quake_jax._dense.norms import LayerNorm, RMSNorm
from quake_jax._dense.packed import PackedWeight
from quake_jax._elementwise import functions

# Sums of K products of int8 values are int32: 255 · 127 · K with a zero point, 127 · 128 · K
# without.
LONGEST = {False: 66_311, True: 131_072}


def _activations() -> dict[str, str]:
    """Rows of the element-wise table by the names of public functions and of rows."""
    rows = functions.FUNCTIONS
    public = {
        alias: name
        for alias in functions.__all__
        for name, row in rows.items()
        if row.public is getattr(functions, alias) and not row.kernel.keywords
    }
    return public | {name: name for name in rows}


_ACTIVATIONS = _activations()


def dense(
    x: ArrayLike,
    weight: ArrayLike | PackedWeight | Sequence[ArrayLike | PackedWeight],
    bias: ArrayLike | Sequence[ArrayLike | None] | None = None,
    *,
    activation: str | None = None,
    gate: ArrayLike | PackedWeight | None = None,
    gate_bias: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    norm: LayerNorm | RMSNorm | None = None,
    order: Order | None = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Dense layer, activation(norm(x)·W + bias) + residual, in one pass for packed weights.

    With a gate it is activation(norm(x)·G + gate_bias) · (norm(x)·W + bias) + residual: GLU, SwiGLU
    and GeGLU (Shazeer, arXiv 2002.05202). What stands beside the product is computed in float32 and
    rounded once. Derivatives are those of the product with the unpacked weight, in float32; a
    packed weight is a constant.

    Args:
      x: array of shape (…, K); float32, bfloat16 or float16 for packed weights.
      weight: a `PackedWeight` without leading axes (see `pack_weight`), or an array (K, N), whose
        product is that of `jax.numpy.dot`. Several that read the same x, such as query, key and
        value, may be given as a sequence: then bias is a sequence too (or None), there is no gate
        and no residual, and the result is a tuple.
      bias: array of shape (N,), or None.
      activation: the name of an element-wise function of this package, such as "gelu" (the tanh
        form), "gelu_erf" or "silu", or None.
      gate: a second weight of the same shape and format, or None.
      gate_bias: array of shape (N,), or None.
      residual: array of the result's shape, or None.
      norm: `LayerNorm` or `RMSNorm`, which is applied to the rows of x before the product, or None.
      order: accuracy of the activation, as in `exp`. "exact" is the exact function, and all of it
        in jax.numpy. None is the default in force (see `default_order`).
      preferred_element_type: the result's dtype: float32, bfloat16 or float16 for packed weights;
        None is that of x.

    Returns:
      An array of shape (…, N), of x's dtype if the weight is packed, else by `jax.numpy`'s
      promotion. Where the rows of x are quantised, a row with NaN or an infinity is NaN; where the
      weight has an `activation_range`, what is outside of it is clipped.

    Raises:
      TypeError: if an argument is no array; for packed weights if x has another dtype than these;
        if one differentiates with respect to a packed weight.
      ValueError: if shapes do not fit; if a packed weight has leading axes; if there is no such
        activation; if weights that are summed up in int32 have more than 66,311 rows, or 131,072
        in groups.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> x, w = jnp.ones((2, 64)), quake_jax.pack_weight(jnp.ones((64, 32)), "int8")
      >>> y = quake_jax.dense(x, w, jnp.zeros(32), activation="gelu")
      >>> q, k, v = quake_jax.dense(x, [w, w, w], norm=quake_jax.RMSNorm(jnp.ones(64)))
    """
    name, order = _checked_activation(activation, order)
    several = isinstance(weight, (list, tuple))
    if several:
        if not weight:
            raise _refusal("weight", "an array, or a sequence of at least one", repr(weight))
        biases = [None] * len(weight) if bias is None else bias
        if not isinstance(biases, (list, tuple)) or len(biases) != len(weight):
            expected = f"None or a sequence of {len(weight)}, as weight is"
            given = (
                f"a sequence of {len(bias)}" if isinstance(bias, (list, tuple)) else "no sequence"
            )
            raise _refusal("bias", expected, given)
        for argument, value in (("gate", gate), ("gate_bias", gate_bias), ("residual", residual)):
            if value is not None:
                raise _refusal(argument, "None where weight is a sequence", _described(value))
    weights, biases = (weight, biases) if several else ([weight], [bias])
    if gate is None and gate_bias is not None:
        raise _refusal("gate_bias", "None without a gate", _described(gate_bias))
    names = [f"weight[{i}]" for i in range(len(weights))] if several else ["weight"]
    results = _dense(
        as_array(x, "dense", "x"),
        tuple(_as_weight(w, argument) for w, argument in zip(weights, names, strict=True)),
        tuple(optional_array(b, "dense", "bias") for b in biases),
        None if gate is None else _as_weight(gate, "gate"),
        optional_array(gate_bias, "dense", "gate_bias"),
        optional_array(residual, "dense", "residual"),
        _checked_norm(norm),
        names=tuple(names),
        activation=name,
        order=order,
        dtype=_dtype_name(preferred_element_type),
    )
    return tuple(results) if several else results[0]


_refusal = functools.partial(refusal, "dense")


def _checked_activation(activation, order) -> tuple[str, Order]:
    """The row of an activation, "" for none, and the order in force."""
    if activation is None:
        return "", order_of("", order)
    name = _ACTIVATIONS.get(activation) if isinstance(activation, str) else None
    if name is None:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise _refusal("activation", f"None or one of {known}", repr(activation))
    return name, order_of(name, order)


def _described(x) -> str:
    if isinstance(x, PackedWeight):
        return repr(x)
    return f"shape {x.shape} and dtype {x.dtype}" if hasattr(x, "shape") else repr(x)


def _as_weight(weight, argument: str):
    weight = unwrapped(weight)
    if isinstance(weight, PackedWeight):
        return sharding.part_of(weight)
    return as_array(weight, "dense", argument)


def _checked_norm(norm):
    if norm is None:
        return None
    if not isinstance(norm, (LayerNorm, RMSNorm)):
        raise _refusal("norm", "None, a LayerNorm or an RMSNorm", repr(norm), TypeError)
    epsilon = static_epsilon(norm.epsilon, "quake_jax.dense: norm.epsilon")
    arrays = {
        field.name: optional_array(getattr(norm, field.name), "dense", f"norm.{field.name}")
        for field in dataclasses.fields(norm)
        if field.name != "epsilon"
    }
    return type(norm)(**arrays, epsilon=epsilon)


def _dtype_name(dtype) -> str | None:
    if dtype is None:
        return None
    try:
        return np.dtype(dtype).name
    except TypeError:
        raise _refusal("preferred_element_type", "a dtype", repr(dtype), TypeError) from None


def _quake_dense(
    x, weights, biases, gate, gate_bias, residual, norm, *, names, activation, order, dtype
):
    """The results, one for each weight. Arguments are arrays, but for packed weights."""
    if x.ndim == 0:
        raise _refusal("x", "of shape (…, K)", "a scalar")
    _check_shapes(x, dict(zip(names, weights, strict=True)), biases, gate, gate_bias, norm)
    lead = x.shape[:-1]
    if residual is not None and residual.shape != (*lead, weights[0].shape[-1]):
        expected = f"of the result's shape, {(*lead, weights[0].shape[-1])}"
        raise _refusal("residual", expected, f"shape {residual.shape}")
    static = {"activation": activation, "order": order, "dtype": dtype}
    if gate is not None and isinstance(gate, PackedWeight) != isinstance(weights[0], PackedWeight):
        raise _refusal("gate", "packed if weight is, and an array if not", _described(gate))
    if any(isinstance(w, PackedWeight) for w in weights):
        _check_packed_call(x, dict(zip(names, weights, strict=True)), gate, dtype, residual, norm)
    if not all(isinstance(w, PackedWeight) for w in weights) or not _share_a_call(weights):
        if len(weights) > 1:
            return [
                _quake_dense(x, (w,), (b,), None, None, None, norm, names=(name,), **static)[0]
                for name, w, b in zip(names, weights, biases, strict=True)
            ]
        return [_of_arrays(x, weights[0], biases[0], gate, gate_bias, residual, norm, **static)]
    if gate is not None and not _share_a_call((weights[0], gate)):
        return [_in_two_calls(x, weights, biases, gate, gate_bias, residual, norm, names, static)]
    return _of_packed(x, weights, biases, gate, gate_bias, residual, norm, **static)


_quake_dense.__name__ = _quake_dense.__qualname__ = "quake_dense"
_dense = jax.jit(
    _quake_dense,
    static_argnames=("names", "activation", "order", "dtype"),
    inline=jax_names.INLINE,
)


def _check_shapes(x, weights: dict, biases, gate, gate_bias, norm) -> None:
    k = x.shape[-1]
    everything = weights if gate is None else weights | {"gate": gate}
    for name, weight in everything.items():
        if isinstance(weight, PackedWeight):
            _check_leaves(name, weight)
        elif weight.ndim != 2:
            expected = "of shape (K, N); use jax.vmap, jax.lax.scan or indexing for stacked ones"
            raise _refusal(name, expected, f"shape {weight.shape}")
        if weight.shape[0] != k:
            expected = f"of shape ({k}, N), as x has shape {x.shape}"
            raise _refusal(name, expected, f"shape {weight.shape}")
    first = next(iter(weights.values()))
    if gate is not None and gate.shape != first.shape:
        raise _refusal("gate", f"of the shape of weight, {first.shape}", f"shape {gate.shape}")
    for i, (name, weight, bias) in enumerate(
        zip((*weights, "gate"), (*weights.values(), gate), (*biases, gate_bias), strict=True)
    ):
        if bias is not None and bias.shape != weight.shape[1:]:
            argument = "gate_bias" if name == "gate" else "bias"
            argument += f"[{i}]" if len(weights) > 1 else ""
            expected = f"of shape {weight.shape[1:]}, as {name} has shape {weight.shape}"
            raise _refusal(argument, expected, f"shape {bias.shape}")
    for field in ("scale", "offset"):
        array = getattr(norm, field, None)
        if array is not None and array.shape != (k,):
            raise _refusal(f"norm.{field}", f"of shape {(k,)}", f"shape {array.shape}")


def _check_leaves(name: str, weight: PackedWeight) -> None:
    """Raise unless the leaves are those of one weight, without leading axes."""
    known = layout.shapes_of(
        weight.dtype, weight.k, weight.n, weight.group_size, weight.activations
    )
    for field in packed.ARRAYS:
        leaf, (shape, dtype) = getattr(weight, field), known.get(field, (None, None))
        if leaf is None and (shape is None or field in packed.OPTIONAL):
            continue
        if shape is None or getattr(leaf, "shape", None) is None:
            expected = "None" if shape is None else "an array"
            raise _refusal(f"{name}.{field}", expected, _described(leaf), TypeError)
        if field == "codes" and leaf.ndim > len(shape) and leaf.shape[-len(shape) :] == shape:
            expected = "one weight; use jax.vmap, jax.lax.scan or indexing for stacked ones"
            raise _refusal(name, expected, f"shape {weight.shape}")
        if leaf.shape != shape or leaf.dtype != dtype:
            expected = f"of shape {shape} and dtype {np.dtype(dtype).name}"
            raise _refusal(f"{name}.{field}", expected, _described(leaf))


def _check_packed_call(x, weights: dict, gate, dtype: str | None, residual, norm) -> None:
    names = [np.dtype(d).name for d in KERNEL_DTYPES]
    expected = f"one of {', '.join(names)}"
    if x.dtype not in KERNEL_DTYPES:
        given = f"dtype {x.dtype}"
        raise _refusal("x for a packed weight", expected, given, TypeError)
    if dtype is not None and dtype not in names:
        raise _refusal("preferred_element_type", f"{expected} for packed weights", dtype, TypeError)
    if residual is not None and not jnp.issubdtype(residual.dtype, jnp.floating):
        raise _refusal("residual", "a floating-point array", _described(residual), TypeError)
    for name, weight in weights.items():
        if not isinstance(weight, PackedWeight) or weight.activations is None:
            continue
        longest = LONGEST[weight.group_size is not None]
        if weight.k > longest:
            expected = (
                f"of at most {longest} rows, whose sum of int8 products is an int32; pack it with "
                "activations=None, or split it"
            )
            raise _refusal(name, expected, repr(weight))
    if gate is not None:
        weight = next(iter(weights.values()))
        if _format(gate) != _format(weight):
            raise _refusal("gate", f"of the format of weight, {weight!r}", repr(gate))


def _format(weight: PackedWeight) -> tuple:
    return weight.dtype, weight.k, weight.group_size, weight.activations


def _share_a_call(weights: Sequence) -> bool:
    """Whether one call of the kernel can take the weights."""
    if len(weights) == 1:
        return isinstance(weights[0], PackedWeight)
    first = weights[0]
    return all(
        isinstance(w, PackedWeight)
        and _format(w) == _format(first)
        and (w.offsets is None) == (first.offsets is None)
        # A call has one of these, and whether arrays are equal is not known.
        and w.permutation is None
        and w.table is None
        and (w.activation_range is None) == (first.activation_range is None)
        for w in weights
    )


def _in_two_calls(x, weights, biases, gate, gate_bias, residual, norm, names, static):
    """What a gate makes of a weight with another table or permutation."""
    dtype = static["dtype"] or x.dtype.name
    static = static | {"dtype": "float32"}
    linear = static | {"activation": ""}
    (gated,) = _quake_dense(x, (gate,), (gate_bias,), None, None, None, norm, names=names, **static)
    (y,) = _quake_dense(x, weights, biases, None, None, None, norm, names=names, **linear)
    y = gated * y
    return (y if residual is None else y + residual.astype(jnp.float32)).astype(dtype)


def _of_arrays(x, weight, bias, gate, gate_bias, residual, norm, *, activation, order, dtype):
    """The layer with weights that are not packed, in jax.numpy."""
    if norm is not None:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise _refusal("x", "a floating-point array for a norm", _described(x), TypeError)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        arrays = [getattr(norm, field, None) for field in ("scale", "offset")]
        arrays = [a if a is None else a.astype(wide) for a in arrays]
        kind = kind_of_norm(norm)
        v = reference.normalized(x.astype(wide), kind, *arrays, norm.epsilon).astype(x.dtype)
    else:
        v = x

    def product(weight, bias):
        y = jnp.dot(v, weight, preferred_element_type=dtype)
        return y if bias is None else y + layout.with_axes_in_front(bias, y.ndim)

    def activated(y):
        return functions.FUNCTIONS[activation].call(order, y) if activation else y

    y = product(weight, bias)
    y = activated(y) if gate is None else activated(product(gate, gate_bias)) * y
    return y if residual is None else y + residual


def _of_packed(x, weights, biases, gate, gate_bias, residual, norm, *, activation, order, dtype):
    """The layer as one call of the kernel."""
    out = np.dtype(dtype or x.dtype)
    call, operands = prepared(
        *(x, weights, biases, gate, gate_bias, residual, norm),
        activation=activation,
        order=order,
        dtype=out,
    )
    results = derivative.dense((call,), (in_one_stack(operands, call.columns),))
    return [jnp.squeeze(y, 0).astype(out) for y in results]


__all__ = defined_in(globals())
