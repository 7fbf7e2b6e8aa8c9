"""What makes a JAX primitive of a kernel: shapes, lowering to the CPU custom call, batching,
partitioning.

This is the only module that knows XLA's foreign function interface. Each primitive takes arrays
and static parameters, `order` among them; the families say what their shapes, batches and parts
are, and which function of jax.numpy stands for the kernel on other platforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Importing extension registers the custom-call targets that the lowerings below name.
from quake_jax._core import extension, jax_names
from quake_jax._core.jax_names import batching, mlir


def make_primitive(
    name: str,
    *,
    shape: Callable,
    lower: Callable,
    batch: Callable,
    multiple_results: bool = False,
    elsewhere: Callable,
) -> Callable:
    """Make the primitive of the kernel `name`, and return the function that binds it.

    Args:
      name: "quake_jax_" before it makes the FFI target.
      shape: `shape(*avals, **parameters)`, the abstract value of the result.
      lower: `lower(context, *operands, target=…, **parameters)`, its lowering for CPUs.
      batch: `batch(bind, operands, axes, **parameters)`, the batched result and its batch axis.
      multiple_results: whether results, and what comes of `shape` and `batch`, are sequences.
      elsewhere: what it is on other platforms, of the same operands and parameters.
    """
    primitive = jax_names.Primitive(f"quake_{name}")
    primitive.multiple_results = multiple_results
    primitive.def_impl(functools.partial(jax_names.apply_primitive, primitive))

    @primitive.def_abstract_eval
    def shape_rule(*avals, **parameters):
        if any(map(jax_names.has_unreduced_axes, avals)):
            raise TypeError(f"quake_jax.{name}: x is a partial sum, unreduced over a mesh axis")
        result = shape(*avals, **parameters)
        if multiple_results:
            return tuple(map(jax_names.in_current_mesh, result))
        return jax_names.in_current_mesh(result)

    def bind(*operands: jax.Array, **parameters) -> jax.Array | list[jax.Array]:
        # Within jax.shard_map a replicated operand beside a split one needs a cast, whose
        # transpose adds up its gradient over the devices.
        return primitive.bind(*jax_names.auto_insert_reshard(*operands), **parameters)

    target = f"quake_jax_{name}"
    if target not in extension.targets:
        raise ImportError(
            f"quake_jax's compiled module has no kernel {name}: add it to the table of its "
            "family in cpu_kernels, and run `pip install .` in the source folder of quake_jax"
        )
    batching.primitive_batchers[primitive] = functools.partial(batch, bind)
    jax_names.check_for_nan(primitive)
    mlir.register_lowering(primitive, functools.partial(lower, target=target), platform="cpu")
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


def _attribute(value: int | float | str):
    """A parameter as an attribute of the call; text stays text."""
    if isinstance(value, str):
        return value
    return np.float32(value) if isinstance(value, float) else np.int32(value)


def custom_call(
    context,
    *operands,
    target: str,
    batch_axes: int | None = None,
    axes: tuple[Sequence, Sequence] | None = None,
    whole: Sequence = (),
    **parameters: int | float | str,
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
        **{name: _attribute(value) for name, value in parameters.items()},
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


def custom_call_of_batch(
    context, *operands, target: str, is_split: bool, **parameters: int | float | str
) -> Sequence:
    """`custom_call` whose operands and results have a batch as their first axis, and nothing else
    in common; `is_split` says whether devices may split it.
    """

    def labels(kind, avals):
        # XLA splits leading axes alone. The others have labels of their own.
        return [
            ["batch", *((kind, i, k) for k in range(1, len(x.shape)))] for i, x in enumerate(avals)
        ]

    axes = labels("in", context.avals_in), labels("out", context.avals_out)
    return custom_call(
        context,
        *operands,
        target=target,
        batch_axes=1 if is_split else None,
        axes=axes,
        whole=[label for arrays in axes for array in arrays for label in array[1:]],
        **parameters,
    )


def typed(context, results: Sequence) -> list:
    """The results of a lowering, with the shardings that their abstract values have."""
    return [
        jax_names.lower_with_sharding_in_types(context, result, aval)
        for result, aval in zip(results, context.avals_out, strict=True)
    ]


def lower_function(function: Callable) -> Callable:
    return mlir.lower_fun(function, multiple_results=False)


# Batching.


def in_front(operands, axes) -> list[jax.Array]:
    """Move every batch axis to the front; what has none gets one of size 1."""
    return [
        x[None] if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]


def merged(x: jax.Array) -> jax.Array:
    """x with its first two axes as one, split only as the first one is."""
    spec = jax.typeof(x).sharding.spec
    if spec[1] is not None:
        x = jax.sharding.reshard(x, jax.sharding.PartitionSpec(spec[0], None, *spec[2:]))
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def not_last(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """Move the batch axis to the front if it is the last one, which is the kernel's."""
    return (jnp.moveaxis(x, axis, 0), 0) if axis == x.ndim - 1 else (x, axis)
