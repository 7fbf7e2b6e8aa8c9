"""One JAX primitive per kernel: shapes, lowering to the CPU custom call, batching, partitioning.

This is the only module that knows XLA's foreign function interface. Each primitive takes arrays
and static parameters, `order` among them; on platforms other than CPU it lowers to the function of
its name in `quake_jax.reference`.

A new kernel is one more name at the end of this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Importing _extension registers the custom-call targets that the lowerings below name.
from quake_jax import _compat, _extension, reference
from quake_jax._compat import batching, mlir


def _primitive(
    name: str,
    *,
    shape: Callable,
    lower: Callable,
    batch: Callable,
    multiple_results: bool = False,
    elsewhere: Callable | None = None,
) -> Callable:
    """Make the primitive of the kernel `name`, and return the function that binds it.

    Args:
      name: that of the function in `reference`; "quake_jax_" before it makes the FFI target.
      shape: `shape(*avals, **parameters)`, the abstract value of the result.
      lower: `lower(context, *operands, target=…, **parameters)`, its lowering for CPUs.
      batch: `batch(bind, operands, axes, **parameters)`, the batched result and its batch axis.
      multiple_results: whether results, and what comes of `shape` and `batch`, are sequences.
      elsewhere: what it is on other platforms, if not the function in `reference` as it is.
    """
    primitive = _compat.Primitive(f"quake_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(_compat.apply_primitive, primitive))

    @primitive.def_abstract_eval
    def shape_rule(*avals, **parameters):
        if any(map(_compat.has_unreduced_axes, avals)):
            raise TypeError(f"quake_jax.{name}: x is a partial sum, unreduced over a mesh axis")
        result = shape(*avals, **parameters)
        if multiple_results:
            return tuple(map(_compat.in_current_mesh, result))
        return _compat.in_current_mesh(result)

    def bind(*operands: jax.Array, **parameters: int | float) -> jax.Array | list[jax.Array]:
        # Within jax.shard_map a replicated operand beside a split one needs a cast, whose
        # transpose adds up its gradient over the devices.
        return primitive.bind(*_compat.auto_insert_reshard(*operands), **parameters)

    target = f"quake_jax_{name}"
    assert target in _extension.targets, target
    batching.primitive_batchers[primitive] = functools.partial(batch, bind)
    _compat.check_for_nan(primitive)
    mlir.register_lowering(primitive, functools.partial(lower, target=target), platform="cpu")
    elsewhere = elsewhere or getattr(reference, name)
    mlir.register_lowering(primitive, mlir.lower_fun(elsewhere, multiple_results=multiple_results))
    return bind


# Lowering.


def _sharding_rule(operands: Sequence, results: Sequence, sizes: dict, whole: set):
    """A Shardy rule.

    Args:
      operands, results: for each array a label per axis; axes of one label are split alike.
      sizes: the size of each label's axes.
      whole: labels of axes that must not be split.
    """
    labels = list(dict.fromkeys(label for axes in (*operands, *results) for label in axes))
    letters = [chr(c) for c in range(ord("i"), ord("z") + 1)]
    letters += [f"z_{k}" for k in range(1, len(labels) - len(letters) + 1)]
    names = dict(zip(labels, letters, strict=False))

    def listed(axes) -> str:
        return "[" + ", ".join(names[label] for label in axes) + "]"

    inputs, outputs = (", ".join(map(listed, arrays)) for arrays in (operands, results))
    factors = ", ".join(f"{names[label]}={sizes[label]}" for label in labels)
    # In the order of the factors, as the syntax demands.
    kept = ", ".join(names[label] for label in labels if label in whole)
    return mlir.ir.Attribute.parse(
        f"#sdy.op_sharding_rule<({inputs})->({outputs}) {{{factors}}} "
        f"need_replication={{{kept}}}, custom>"
    )


def _custom_call(
    context,
    *operands,
    target: str,
    batch_axes: int | None = None,
    axes: tuple[Sequence, Sequence] | None = None,
    whole: Sequence = (),
    **parameters: int | float,
) -> Sequence:
    """Emit the custom call `target`, and return its results.

    The first `batch_axes` axes of all operands and results may be split over devices; None means
    that the call needs its operands whole. `axes` are the labels of `_sharding_rule`.
    """
    attributes = {}
    if batch_axes is not None:
        # Both are needed: by its rule Shardy decides how to split the call, and by this attribute
        # XLA knows that it may run the call on parts of its leading axes.
        count = mlir.ir.StringAttr.get(str(batch_axes))
        attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get({"num_batch_dims": count})
    call = jax.ffi.build_ffi_lowering_function(target, extra_attributes=attributes)(
        context,
        *operands,
        **{
            name: np.float32(value) if isinstance(value, float) else np.int32(value)
            for name, value in parameters.items()
        },
    )
    if batch_axes is not None:
        inputs, results = axes
        sizes = {}
        for labels, aval in (
            *zip(results, context.avals_out, strict=True),
            *zip(inputs, context.avals_in, strict=True),
        ):
            sizes.update(zip(labels, aval.shape, strict=True))
        # A Shardy rule needs numbers, and its syntax knows none from 2^31 on. Programs exported
        # with symbolic dimensions, and calls with longer axes, go without.
        if all(isinstance(size, int) and size < 2**31 for size in sizes.values()):
            rule = _sharding_rule(inputs, results, sizes, set(whole))
            call.operation.attributes["sdy.sharding_rule"] = rule
    return call.results


def _typed(context, results: Sequence) -> list:
    """The results of a lowering, with the shardings that their abstract values have."""
    return [
        _compat.lower_with_sharding_in_types(context, result, aval)
        for result, aval in zip(results, context.avals_out, strict=True)
    ]


def _lower_function(function: Callable) -> Callable:
    return mlir.lower_fun(function, multiple_results=False)


# Batching.


def _in_front(operands, axes) -> list[jax.Array]:
    """Move every batch axis to the front; what has none gets one of size 1."""
    return [
        x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]


def _not_last(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """Move the batch axis to the front if it is the last one, which is the kernel's."""
    return (jnp.moveaxis(x, axis, 0), 0) if axis == x.ndim - 1 else (x, axis)


# Element by element: operands and result have one shape, and every axis may be split.


def _elementwise_shape(*avals, order: int):
    x = avals[0]
    # update() keeps sharding, varying mesh axes and weak type.
    if any(a.sharding != x.sharding for a in avals):
        return x.update(sharding=_compat.broadcasting_sharding_rule("quake_jax", *avals))
    return x.update()


def _lower_elementwise(context, *operands, target: str, order: int):
    if not _compat.is_partitioned(context):
        return _typed(context, _custom_call(context, *operands, target=target, order=order))
    # The partitioners gather any call all of whose axes are batch axes. With a unit axis at the
    # end, every true axis stays split. (Not elsewhere: XLA copies a bfloat16 operand for it.)
    (aval,) = context.avals_out
    extended = aval.update(
        shape=(*aval.shape, 1),
        sharding=aval.sharding.update(spec=(*aval.sharding.spec, None)),
    )
    inner = context.replace(avals_in=[extended] * len(operands), avals_out=[extended])
    operands = [_compat.reshape(inner, x, extended) for x in operands]
    labels = range(extended.ndim)
    (result,) = _custom_call(
        inner,
        *operands,
        target=target,
        batch_axes=aval.ndim,
        axes=([labels] * len(operands), [labels]),
        whole=[aval.ndim],
        order=order,
    )
    return _typed(context, [_compat.reshape(context, result, aval)])


def _batch_elementwise(bind, operands, axes, *, order: int):
    if len(set(axes)) == 1:  # also of one operand
        return bind(*operands, order=order), axes[0]
    operands = _in_front(operands, axes)
    shape = jnp.broadcast_shapes(*(x.shape for x in operands))
    return bind(*(jnp.broadcast_to(x, shape) for x in operands), order=order), 0


def _elementwise(name: str) -> Callable:
    return _primitive(
        name, shape=_elementwise_shape, lower=_lower_elementwise, batch=_batch_elementwise
    )


# Two halves of the last axis: x of shape (…, 2n) gives (…, n).


def _split_shape(x, *, order: int, gate_first: int):
    spec = (*x.sharding.spec[:-1], None)
    return x.update(shape=(*x.shape[:-1], x.shape[-1] // 2), sharding=x.sharding.update(spec=spec))


def _lower_split(context, x, *, target: str, order: int, gate_first: int):
    batch = range(context.avals_out[0].ndim - 1)
    results = _custom_call(
        context,
        x,
        target=target,
        batch_axes=len(batch),
        axes=([[*batch, "both"]], [[*batch, "half"]]),
        whole=["both", "half"],
        order=order,
        gate_first=gate_first,
    )
    return _typed(context, results)


def _batch_split(bind, operands, axes, **parameters):
    x, axis = _not_last(*operands, *axes)
    return bind(x, **parameters), axis


def _split(name: str) -> Callable:
    return _primitive(name, shape=_split_shape, lower=_lower_split, batch=_batch_split)


# A bias on the last axis: x of shape (…, n), bias of shape (n,).


def _biased_shape(x, bias, *, order: int):
    ones = (1,) * (x.ndim - 1)
    spec = (*(None for _ in ones), *bias.sharding.spec)
    row = bias.update(shape=(*ones, *bias.shape), sharding=bias.sharding.update(spec=spec))
    return _elementwise_shape(x, row, order=order)


def _biased(name: str, activation: Callable) -> Callable:
    """The kernel `name`, which is activation(x + bias, order=…)."""

    def in_two_steps(x, bias, *, order):
        bias = reference.on_last_axis(bias, x)
        total = x.astype(jnp.float32) + bias.astype(jnp.float32)
        return activation(total, order=order).astype(x.dtype)

    def lower(context, x, bias, *, target: str, order: int):
        if _compat.is_partitioned(context):
            # XLA cannot split x along its last axis together with a bias of another rank. The
            # activation alone splits along every axis.
            return _lower_function(in_two_steps)(context, x, bias, order=order)
        return _typed(context, _custom_call(context, x, bias, target=target, order=order))

    def batch(bind, operands, axes, *, order: int):
        (x, bias), (x_axis, bias_axis) = operands, axes
        if bias_axis is None:
            x, x_axis = _not_last(x, x_axis)
            return bind(x, bias, order=order), x_axis
        return jax.vmap(functools.partial(in_two_steps, order=order), axes)(x, bias), 0

    return _primitive(name, shape=_biased_shape, lower=lower, batch=batch)


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
        if _compat.is_partitioned(context) and axis != labels[-1]:
            # XLA splits leading axes only; with the kernel's axis at the end, these are all others.
            return _lower_function(over_last_axis)(context, x, order=order, axis=axis)
        results = _custom_call(
            context,
            x,
            target=target,
            batch_axes=axis,
            axes=([labels], [labels if keeps_axis else without(labels, axis)]),
            whole=[axis],
            order=order,
            axis=axis,
        )
        return _typed(context, results)

    def batch(bind, operands, axes, *, order: int, axis: int):
        (x,), (batch_axis,) = operands, axes
        axis += batch_axis <= axis
        y = bind(x, order=order, axis=axis)
        return y, batch_axis if keeps_axis or batch_axis < axis else batch_axis - 1

    bind = _primitive(name, shape=shape, lower=lower, batch=batch)
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
        if _compat.is_partitioned(context) and mask.shape != aval.shape:
            # XLA would split the mask's axes of size 1 together with x's.
            return _lower_function(with_whole_mask)(context, x, where, order=order, axis=axis)
        whole_mask = mask.shape == aval.shape
        results = _custom_call(
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
        return _typed(context, results)

    def batch(bind, operands, axes, *, order: int, axis: int):
        x, where = _in_front(operands, axes)
        if axes[0] is None:
            x = jnp.broadcast_to(x, (where.shape[0], *x.shape[1:]))
        return bind(x, where, order=order, axis=axis + 1), 0

    bind = _primitive(name, shape=shape, lower=lower, batch=batch)
    return bind


# Attention. The operands are query (B, T, N, H), key (B, S, K, H) and value (B, S, K, V), or one
# array of all three, of shape (B, T, 3, N, H) or (B, T, N, 3, H); then those that the bits of
# `present` name: 1 bias and 2 mask, of shape (B, N, T, S) or with axes of size 1; 4 query lengths
# and 8 key lengths, int32 of shape (B,). The results are (B, T, N, V) in the operands' dtype and
# the log-sum-exp of the logits (B, T, N) in float32.
#
# What jax.vmap maps has one more axis in front, of operands and then of both results. Whether it
# becomes part of the batch is decided at the end, when it is known what is split over devices.


def attention_axes(ranks: Sequence[int], packed_axis: int, present: int) -> tuple[list, list]:
    """Along which axes a call may be split, of operands of these ranks and of the results.

    Each is "map" (that of `jax.vmap`), "batch" or "heads", or None where it must be whole.
    """
    of_query, of_logits = ("batch", None, "heads", None), ("batch", "heads", None, None)
    packed = {2: ("batch", None, None, "heads", None), 3: ("batch", None, "heads", None, None)}
    operands = [packed[packed_axis]] if packed_axis else [of_query] * 3
    optional = (of_logits, of_logits, ("batch",), ("batch",))
    operands += [axes for k, axes in enumerate(optional) if present & 1 << k]
    operands = [
        axes if rank == len(axes) else ("map", *axes)
        for rank, axes in zip(ranks, operands, strict=True)
    ]
    if any(axes[0] == "map" for axes in operands):
        of_query = ("map", *of_query)
    return operands, [of_query, of_query[:-1]]


def _axes_of(operands: Sequence, parameters: dict) -> tuple[list, list]:
    ranks = [len(x.shape) for x in operands]
    return attention_axes(ranks, parameters["packed_axis"], parameters["present"])


def _merged(x: jax.Array) -> jax.Array:
    """x with its first two axes as one, split only as the first one is."""
    spec = jax.typeof(x).sharding.spec
    if spec[1] is not None:
        x = jax.sharding.reshard(x, jax.sharding.PartitionSpec(spec[0], None, *spec[2:]))
    return x.reshape(-1, *x.shape[2:])


def _unmapped(call: Callable, operands: Sequence, **parameters) -> list[jax.Array]:
    """The results of operands of which some are mapped, by one call of what are not."""
    axes, _ = _axes_of(operands, parameters)
    is_mapped = [labels[0] == "map" for labels in axes]
    if is_mapped[0] and not any(is_mapped[1:]) and not parameters["packed_axis"]:
        bias_and_mask = [x for x, k in zip(operands, axes, strict=True) if k[1:2] == ("heads",)]
        if not _do_positions_matter(bias_and_mask, **parameters):
            return _as_more_queries(call, *operands)
        if all(x.shape[1] == 1 for x in bias_and_mask):
            return _as_more_heads(call, *operands)
    return _as_more_batch(call, operands, axes)


def _do_positions_matter(
    bias_and_mask, *, is_causal, window_left, window_right, present, **_
) -> bool:
    """Whether it matters to the result of a query where in its sequence it is."""
    limits = is_causal or window_left >= 0 or window_right >= 0 or present & 4
    return bool(limits) or any(x.shape[2] != 1 for x in bias_and_mask)


def _as_more_queries(call, query, *rest) -> list[jax.Array]:
    """All parts of a mapped query as one sequence: they share keys and values without copies."""
    parts, batch, length, *sizes = query.shape
    query = jnp.moveaxis(query, 0, 1).reshape(batch, parts * length, *sizes)
    return [
        jnp.moveaxis(y.reshape(batch, parts, length, *y.shape[2:]), 1, 0)
        for y in call(query, *rest)
    ]


def _as_more_heads(call, query, key, *rest) -> list[jax.Array]:
    """The same as heads that share those of keys and values."""
    parts, batch, length, heads, size = query.shape
    kv_heads = key.shape[2]
    group = heads // kv_heads
    query = query.reshape(parts, batch, length, kv_heads, group, size)
    query = jnp.moveaxis(query, 0, 3).reshape(batch, length, parts * heads, size)
    results = []
    for y in call(query, key, *rest):
        y = y.reshape(batch, length, kv_heads, parts, group, *y.shape[3:])
        results.append(jnp.moveaxis(y, 3, 0).reshape(parts, batch, length, heads, *y.shape[5:]))
    return results


def _as_more_batch(call, operands, axes) -> list[jax.Array]:
    """What is mapped as part of the batch. Copies what is not, but for masks of the whole batch."""
    sizes = [
        dict(zip(labels, x.shape, strict=True)) for labels, x in zip(axes, operands, strict=True)
    ]
    parts = next(s["map"] for s in sizes if "map" in s)
    batch = sizes[0]["batch"]
    flat = []
    for x, labels in zip(operands, axes, strict=True):
        if labels[0] != "map" and x.shape[0] == 1 and labels[1:2] == ("heads",):
            flat.append(x)
            continue
        x = x if labels[0] == "map" else x[None]
        flat.append(_merged(jnp.broadcast_to(x, (parts, batch, *x.shape[2:]))))
    return [y.reshape(parts, batch, *y.shape[1:]) for y in call(*flat)]


def _attention(name: str) -> Callable:
    def shapes(*avals, **parameters):
        inputs, results = _axes_of(avals, parameters)
        extents, split = {}, {None: None}
        for labels, x in zip(inputs, avals, strict=True):
            for label, size, entry in zip(labels, x.shape, x.sharding.spec, strict=True):
                extents.setdefault(label, size)  # the query, which comes first, has whole ones
                if entry is not None:
                    # What one operand is split over, the others have to be too.
                    split.setdefault(label, entry)
        first, packed_axis = avals[0], parameters["packed_axis"]
        length = first.shape[inputs[0].index("batch") + 1]
        size = (first if packed_axis else avals[2]).shape[-1]

        def result(labels, unlabelled, dtype):
            unlabelled = iter(unlabelled)
            shape = tuple(next(unlabelled) if k is None else extents[k] for k in labels)
            sharding = first.sharding.update(spec=tuple(map(split.get, labels)))
            return first.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)

        return (
            result(results[0], (length, size), first.dtype),
            result(results[1], (length,), np.dtype(np.float32)),
        )

    def lower(context, *operands, target: str, **parameters):
        avals = context.avals_in
        inputs, results = _axes_of(avals, parameters)
        if _compat.can_split_along_axes(context):
            values = _compat.lower_split_along_axes(
                context,
                *operands,
                function=functools.partial(bind, **parameters),
                inputs=inputs,
                results=results,
                description=f"{target} {sorted(parameters.items())}",
            )
            return _typed(context, values)
        if results[0][0] == "map":
            return mlir.lower_fun(unmapped)(context, *operands, **parameters)
        batch = avals[0].shape[0]
        whole_batch = all(x.shape[0] == batch for x in avals)
        if _compat.is_partitioned(context) and not whole_batch:
            # XLA would split a bias' or mask's first axis of size 1 together with the others'.
            return mlir.lower_fun(with_batch_axes)(context, *operands, **parameters)

        def labels(arrays, kind):
            # XLA splits leading axes alone. The others may have labels of their own.
            return [
                ["batch", *((kind, i, k) for k in range(1, len(x)))] for i, x in enumerate(arrays)
            ]

        axes = labels(inputs, "in"), labels(results, "out")
        return _typed(
            context,
            _custom_call(
                context,
                *operands,
                target=target,
                batch_axes=1 if whole_batch else None,
                axes=axes,
                whole=[label for arrays in axes for array in arrays for label in array[1:]],
                **parameters,
            ),
        )

    def unmapped(*operands, **parameters):
        return _unmapped(functools.partial(bind, **parameters), operands, **parameters)

    def with_batch_axes(*operands, **parameters):
        batch = operands[0].shape[0]
        return bind(*(jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in operands), **parameters)

    def batch(bind, operands, axes, **parameters):
        parts = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
        operands = [
            x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)
        ]
        ranks = [x.ndim - (a is not None) for x, a in zip(operands, axes, strict=True)]
        labels, results = attention_axes(ranks, parameters["packed_axis"], parameters["present"])
        if results[0][0] != "map":
            return bind(*operands, **parameters), [0, 0]
        # Two axes of vmap become one.
        inner_parts = next(
            x.shape[a is not None]
            for x, a, k in zip(operands, axes, labels, strict=True)
            if k[0] == "map"
        )
        both = []
        for x, a, k in zip(operands, axes, labels, strict=True):
            if a is not None or k[0] == "map":
                x = x[None] if a is None else x
                x = x if k[0] == "map" else x[:, None]
                x = _merged(jnp.broadcast_to(x, (parts, inner_parts, *x.shape[2:])))
            both.append(x)
        values = bind(*both, **parameters)
        return [y.reshape(parts, inner_parts, *y.shape[1:]) for y in values], [0, 0]

    def on_other_platforms(*operands, **parameters):
        call = functools.partial(getattr(reference, name), **parameters)
        _, results = _axes_of(operands, parameters)
        if results[0][0] == "map":
            return tuple(_unmapped(call, operands, **parameters))
        return call(*operands)

    bind = _primitive(
        name,
        shape=shapes,
        lower=lower,
        batch=batch,
        multiple_results=True,
        elsewhere=on_other_platforms,
    )
    return bind


exp = _elementwise("exp")
exp2 = _elementwise("exp2")
expm1 = _elementwise("expm1")
sigmoid = _elementwise("sigmoid")
log_sigmoid = _elementwise("log_sigmoid")
softplus = _elementwise("softplus")
silu = _elementwise("silu")
mish = _elementwise("mish")
quick_gelu = _elementwise("quick_gelu")
elu = _elementwise("elu")
selu = _elementwise("selu")
tanh = _elementwise("tanh")
gelu_tanh = _elementwise("gelu_tanh")
gelu_erf = _elementwise("gelu_erf")

logaddexp = _elementwise("logaddexp")
glu = _elementwise("glu")
swiglu = _elementwise("swiglu")
geglu_tanh = _elementwise("geglu_tanh")
geglu_erf = _elementwise("geglu_erf")

glu_split = _split("glu_split")
swiglu_split = _split("swiglu_split")
geglu_tanh_split = _split("geglu_tanh_split")
geglu_erf_split = _split("geglu_erf_split")

bias_silu = _biased("bias_silu", silu)
bias_gelu_tanh = _biased("bias_gelu_tanh", gelu_tanh)
bias_gelu_erf = _biased("bias_gelu_erf", gelu_erf)

softmax = _over_axis("softmax")
log_softmax = _over_axis("log_softmax")
logsumexp = _over_axis("logsumexp", keeps_axis=False)
softmax_where = _masked("softmax_where")
log_softmax_where = _masked("log_softmax_where")

dot_product_attention = _attention("dot_product_attention")
