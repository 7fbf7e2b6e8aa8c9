"""The primitives of element-wise kernels: of arrays of one shape, of one array that holds a gate
and a value, and of an array and a bias.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.primitive import (
    custom_call,
    in_front,
    lower_function,
    make_primitive,
    not_last,
    typed,
)
from quake_jax._elementwise.reference import on_last_axis

# Element by element: operands and result have one shape, and every axis may be split.


def _shape(*avals, order: int):
    x = avals[0]
    # update() keeps sharding, varying mesh axes and weak type.
    if any(a.sharding != x.sharding for a in avals):
        return x.update(sharding=jax_names.broadcasting_sharding_rule("quake_jax", *avals))
    return x.update()


def _lower(context, *operands, target: str, order: int):
    if not jax_names.is_partitioned(context):
        return typed(context, custom_call(context, *operands, target=target, order=order))
    # The partitioners gather any call all of whose axes are batch axes. With a unit axis at the
    # end, every true axis stays split. (Not elsewhere: XLA copies a bfloat16 operand for it.)
    (aval,) = context.avals_out
    extended = aval.update(
        shape=(*aval.shape, 1),
        sharding=aval.sharding.update(spec=(*aval.sharding.spec, None)),
    )
    inner = context.replace(avals_in=[extended] * len(operands), avals_out=[extended])
    operands = [jax_names.reshape(inner, x, extended) for x in operands]
    labels = range(extended.ndim)
    (result,) = custom_call(
        inner,
        *operands,
        target=target,
        batch_axes=aval.ndim,
        axes=([labels] * len(operands), [labels]),
        whole=[aval.ndim],
        order=order,
    )
    return typed(context, [jax_names.reshape(context, result, aval)])


def _batch(bind, operands, axes, *, order: int):
    if len(set(axes)) == 1:  # also of one operand
        return bind(*operands, order=order), axes[0]
    operands = in_front(operands, axes)
    shape = jnp.broadcast_shapes(*(x.shape for x in operands))
    return bind(*(jnp.broadcast_to(x, shape) for x in operands), order=order), 0


def elementwise(name: str, elsewhere: Callable) -> Callable:
    return make_primitive(name, shape=_shape, lower=_lower, batch=_batch, elsewhere=elsewhere)


# Two halves of the last axis: x of shape (…, 2n) gives (…, n).


def _split_shape(x, *, order: int, gate_first: int):
    spec = (*x.sharding.spec[:-1], None)
    return x.update(shape=(*x.shape[:-1], x.shape[-1] // 2), sharding=x.sharding.update(spec=spec))


def _lower_split(context, x, *, target: str, order: int, gate_first: int):
    batch = range(context.avals_out[0].ndim - 1)
    results = custom_call(
        context,
        x,
        target=target,
        batch_axes=len(batch),
        axes=([[*batch, "both"]], [[*batch, "half"]]),
        whole=["both", "half"],
        order=order,
        gate_first=gate_first,
    )
    return typed(context, results)


def _batch_split(bind, operands, axes, **parameters):
    x, axis = not_last(*operands, *axes)
    return bind(x, **parameters), axis


def split(name: str, elsewhere: Callable) -> Callable:
    return make_primitive(
        name, shape=_split_shape, lower=_lower_split, batch=_batch_split, elsewhere=elsewhere
    )


# A bias on the last axis: x of shape (…, n), bias of shape (n,).


def _biased_shape(x, bias, *, order: int):
    ones = (1,) * (x.ndim - 1)
    spec = (*(None for _ in ones), *bias.sharding.spec)
    row = bias.update(shape=(*ones, *bias.shape), sharding=bias.sharding.update(spec=spec))
    return _shape(x, row, order=order)


def biased(name: str, activation: Callable, elsewhere: Callable) -> Callable:
    """The kernel `name`, which is activation(x + bias, order=…)."""

    def in_two_steps(x, bias, *, order):
        bias = on_last_axis(bias, x)
        total = x.astype(jnp.float32) + bias.astype(jnp.float32)
        return activation(total, order=order).astype(x.dtype)

    def lower(context, x, bias, *, target: str, order: int):
        if jax_names.is_partitioned(context):
            # XLA cannot split x along its last axis together with a bias of another rank. The
            # activation alone splits along every axis.
            return lower_function(in_two_steps)(context, x, bias, order=order)
        return typed(context, custom_call(context, x, bias, target=target, order=order))

    def batch(bind, operands, axes, *, order: int):
        (x, bias), (x_axis, bias_axis) = operands, axes
        if bias_axis is None:
            x, x_axis = not_last(x, x_axis)
            return bind(x, bias, order=order), x_axis
        return jax.vmap(functools.partial(in_two_steps, order=order), axes)(x, bias), 0

    return make_primitive(name, shape=_biased_shape, lower=lower, batch=batch, elsewhere=elsewhere)
