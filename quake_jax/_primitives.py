"""One JAX primitive per kernel: shapes, lowering to the CPU custom call, batching, partitioning.

This is the only module that knows XLA's foreign function interface. Each primitive takes one array
and a static `order`; on platforms other than CPU it lowers to `quake_jax.reference`.

A new element-wise kernel is one more line at the end of this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching, mlir

# Importing this registers the custom-call targets that the lowerings below name.
from quake_jax import _compat, _extension, reference


def _factor_names(count: int) -> list[str]:
    """Names of the axes in a Shardy rule: i … z, then z_1, z_2, …"""
    letters = [chr(c) for c in range(ord("i"), ord("z") + 1)]
    return (letters + [f"z_{k}" for k in range(1, count - len(letters) + 1)])[:count]


def _sharding_rule(shape: tuple[int, ...]):
    """A Shardy rule: every axis may be split over devices, except the last."""
    names = _factor_names(len(shape))
    axes = ", ".join(names)
    sizes = ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True))
    return mlir.ir.Attribute.parse(
        f"#sdy.op_sharding_rule<([{axes}])->([{axes}]) {{{sizes}}} "
        f"need_replication={{{names[-1]}}}, custom>"
    )


def _custom_call(context, operand, *, target: str, order: int):
    """Emit the custom call `target` on an operand whose last axis must not be split."""
    (aval,) = context.avals_out
    # Both are needed: by the rule below Shardy decides how to split the call, and by this attribute
    # XLA knows that it may run the call on parts of its leading axes.
    batch = mlir.ir.DictAttr.get({"num_batch_dims": mlir.ir.StringAttr.get(str(aval.ndim - 1))})
    call = jax.ffi.build_ffi_lowering_function(
        target, extra_attributes={"mhlo.frontend_attributes": batch}
    )(context, operand, order=np.int32(order))
    # A Shardy rule needs numbers. Programs exported with symbolic dimensions go without.
    if all(isinstance(size, int) for size in aval.shape):
        call.operation.attributes["sdy.sharding_rule"] = _sharding_rule(aval.shape)
    return call.result


def _lower_elementwise(context, operand, *, target: str, order: int):
    # The partitioners gather any call all of whose axes are batch axes. With a unit axis at the
    # end, every true axis stays split.
    (aval,) = context.avals_out
    extended = aval.update(
        shape=(*aval.shape, 1),
        sharding=aval.sharding.update(spec=(*aval.sharding.spec, None)),
    )
    inner = context.replace(avals_in=[extended], avals_out=[extended])
    operand = _compat.reshape(inner, operand, extended)
    result = _custom_call(inner, operand, target=target, order=order)
    result = _compat.reshape(context, result, aval)
    return [_compat.lower_with_sharding_in_types(context, result, aval)]


def _lower_last_axis(context, operand, *, target: str, order: int):
    (aval,) = context.avals_out
    result = _custom_call(context, operand, target=target, order=order)
    return [_compat.lower_with_sharding_in_types(context, result, aval)]


def _batch_last_axis(primitive, arguments, axes, *, order: int):
    (x,), (axis,) = arguments, axes
    # Batch axes stand in front, so that the last axis stays the one that the kernel reduces.
    return primitive.bind(jnp.moveaxis(x, axis, 0), order=order), 0


def _kernel(name: str, reference_function: Callable, *, over_last_axis: bool = False) -> Callable:
    """Make the primitive of one kernel, and return the function that binds it."""
    primitive = _compat.Primitive(f"quake_{name}")
    primitive.def_impl(functools.partial(_compat.apply_primitive, primitive))

    @primitive.def_abstract_eval
    def shape_rule(x, *, order):
        if _compat.has_unreduced_axes(x):
            raise TypeError(f"quake_jax.{name}: x is a partial sum, unreduced over a mesh axis")
        # update() keeps sharding, varying mesh axes and weak type.
        return x.update()

    if over_last_axis:
        lower = _lower_last_axis
        batching.primitive_batchers[primitive] = functools.partial(_batch_last_axis, primitive)
    else:
        lower = _lower_elementwise
        batching.defvectorized(primitive)

    target = f"quake_jax_{name}"
    assert target in _extension.targets, target
    mlir.register_lowering(primitive, functools.partial(lower, target=target), platform="cpu")
    mlir.register_lowering(primitive, mlir.lower_fun(reference_function, multiple_results=False))

    def bind(x: jax.Array, order: int) -> jax.Array:
        return primitive.bind(x, order=order)

    return bind


exp = _kernel("exp", reference.exp)
sigmoid = _kernel("sigmoid", reference.sigmoid)
silu = _kernel("silu", reference.silu)
tanh = _kernel("tanh", reference.tanh)
gelu_tanh = _kernel("gelu_tanh", reference.gelu_tanh)
gelu_erf = _kernel("gelu_erf", reference.gelu_erf)
softmax = _kernel("softmax", reference.softmax, over_last_axis=True)
