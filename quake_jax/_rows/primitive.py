"""The primitives of softmax, log-softmax and log-sum-exp over one axis, plain and with a mask, and
of layer norm and RMS norm.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from quake_jax._core import jax_names, norm, partitioning
from quake_jax._core.jax_names import mlir
from quake_jax._core.primitive import custom_call, in_front, lower_function, make_primitive, typed
from quake_jax._rows import reference

# Over one axis, `axis`, of any rank: the others are a batch.


def _over_axis(name: str, *, keeps_axis: bool = True) -> Callable:
    """The kernel `name` over one axis, which the result has too or lacks."""

    def without(sequence, axis: int) -> tuple:
        return (*sequence[:axis], *sequence[axis + 1 :])

    def shape(x, *, order: int, axis: int):
        if keeps_axis:
            return x.update()
        spec = without(x.sharding.spec, axis)
        return x.update(shape=without(x.shape, axis), sharding=x.sharding.update(spec=spec))

    def over_last_axis(x, *, order, axis):
        y = bind(jnp.moveaxis(x, axis, -1), order=order, axis=x.ndim - 1)
        return jnp.moveaxis(y, -1, axis) if keeps_axis else y

    def lower(context, x, *, target: str, order: int, axis: int):
        labels = range(context.avals_in[0].ndim)
        if jax_names.is_partitioned(context) and axis != labels[-1]:
            # XLA splits leading axes only; with the kernel's axis at the end, these are all others.
            return lower_function(over_last_axis)(context, x, order=order, axis=axis)
        results = custom_call(
            context,
            x,
            target=target,
            batch_axes=axis,
            axes=([labels], [labels if keeps_axis else without(labels, axis)]),
            whole=[axis],
            order=order,
            axis=axis,
        )
        return typed(context, results)

    def batch(bind, operands, axes, *, order: int, axis: int):
        (x,), (batch_axis,) = operands, axes
        axis += batch_axis <= axis
        y = bind(x, order=order, axis=axis)
        return y, batch_axis if keeps_axis or batch_axis < axis else batch_axis - 1

    bind = make_primitive(
        name, shape=shape, lower=lower, batch=batch, elsewhere=getattr(reference, name)
    )
    return bind


# Over the last axis, `axis`, where a mask is True. It has the rank of x, and each of its axes but
# the last may have size 1 instead of x's.


def _masked(name: str) -> Callable:
    def shape(x, where, *, order: int, axis: int):
        return x.update()

    def with_whole_mask(x, where, *, order, axis):
        return bind(x, jnp.broadcast_to(where, x.shape), order=order, axis=axis)

    def lower(context, x, where, *, target: str, order: int, axis: int):
        aval, mask = context.avals_in
        labels = range(aval.ndim)
        if jax_names.is_partitioned(context) and mask.shape != aval.shape:
            # XLA would split the mask's axes of size 1 together with x's.
            return lower_function(with_whole_mask)(context, x, where, order=order, axis=axis)
        whole_mask = mask.shape == aval.shape
        results = custom_call(
            context,
            x,
            where,
            target=target,
            batch_axes=axis if whole_mask else None,
            axes=([labels, labels], [labels]),
            whole=[axis],
            order=order,
            axis=axis,
        )
        return typed(context, results)

    def batch(bind, operands, axes, *, order: int, axis: int):
        x, where = in_front(operands, axes)
        if axes[0] is None:
            x = jnp.broadcast_to(x, (where.shape[0], *x.shape[1:]))
        return bind(x, where, order=order, axis=axis + 1), 0

    bind = make_primitive(
        name, shape=shape, lower=lower, batch=batch, elsewhere=getattr(reference, name)
    )
    return bind


# Over the last axis. The operands are x, in the residual forms what is added to it, the scale, and
# in layer norm an offset, of the scale's shape: some first axes of x (mostly none) and the last.


def _norm(name: str, *, rows: int = 1) -> Callable:
    """The kernel `name` of the rows of so many arrays; it has as many results."""
    several = rows > 1

    def listed(result) -> tuple:
        return tuple(result) if several else (result,)

    def shape(x, *others, epsilon: float):
        y = x.update(weak_type=False)
        return (y,) * rows if several else y

    def with_whole_parameters(*operands, epsilon):
        x = operands[0]
        whole = [jnp.broadcast_to(norm.beside(p, x.ndim), x.shape) for p in operands[rows:]]
        return listed(bind(*operands[:rows], *whole, epsilon=epsilon))

    def lower(context, *operands, target: str, epsilon: float):
        x, scale = context.avals_in[0], context.avals_in[rows]
        *batch, last = range(x.ndim)
        first = batch[: scale.ndim - 1]
        parameters = len(operands) - rows
        if jax_names.is_partitioned(context) and first != batch:
            if not partitioning.can_split_along_axes(context):
                # XLA would split the scale's last axis as the first one of x.
                whole = mlir.lower_fun(with_whole_parameters, multiple_results=True)
                return whole(context, *operands, epsilon=epsilon)
            split = [*batch, None]
            results = partitioning.lower_split_along_axes(
                context,
                *operands,
                function=lambda *parts: listed(bind(*parts, epsilon=epsilon)),
                inputs=[split] * rows + [[*first, None]] * parameters,
                results=[split] * rows,
                description=f"{target} {epsilon}",
            )
            return typed(context, results)
        results = custom_call(
            context,
            *operands,
            target=target,
            batch_axes=len(batch) if first == batch else None,
            axes=([[*batch, last]] * rows + [[*first, last]] * parameters, [[*batch, last]] * rows),
            whole=[last],
            epsilon=epsilon,
        )
        return typed(context, results)

    def batch(bind, operands, axes, *, epsilon: float):
        size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)

        def moved(x, axis, to: int):
            if axis is not None:
                return jnp.moveaxis(x, axis, to)
            return jnp.broadcast_to(jnp.expand_dims(x, to), (*x.shape[:to], size, *x.shape[to:]))

        # Behind the axes that the scale has too, or as one of them.
        own = any(a is not None for a in axes[rows:])
        to = 0 if own else operands[rows].ndim - 1
        arrays = [
            moved(x, a, to) if own or k < rows else x
            for k, (x, a) in enumerate(zip(operands, axes, strict=True))
        ]
        result = bind(*arrays, epsilon=epsilon)
        return (result, (to,) * rows) if several else (result, to)

    bind = make_primitive(
        name,
        shape=shape,
        lower=lower,
        batch=batch,
        multiple_results=several,
        elsewhere=getattr(reference, name),
    )
    return bind


softmax = _over_axis("softmax")
log_softmax = _over_axis("log_softmax")
logsumexp = _over_axis("logsumexp", keeps_axis=False)
softmax_where = _masked("softmax_where")
log_softmax_where = _masked("log_softmax_where")
layer_norm = _norm("layer_norm")
rms_norm = _norm("rms_norm")
layer_norm_residual = _norm("layer_norm_residual", rows=2)
rms_norm_residual = _norm("rms_norm_residual", rows=2)
