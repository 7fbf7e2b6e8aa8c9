"""The private and version-dependent names of JAX that quake_jax needs, each under one name.

No other module uses `jax._src`, `jax.interpreters`, `jax.extend`, `jax.experimental` or jaxlib, or
asks what JAX has: when a new JAX moves something, this file alone changes.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from quake_jax import _versions

try:
    from jaxlib.version import __version__ as jaxlib_version
except ImportError as error:
    raise _versions.lacking(error) from error
_versions.refuse_older(jaxlib_version)
try:
    from jax import make_user_context
    from jax._src import source_info_util
    from jax._src.config import _check_vma, trace_context, use_shardy_partitioner
    from jax._src.core import auto_insert_reshard, extend_axis_env_nd
    from jax._src.dispatch import apply_primitive
    from jax._src.interpreters.mlir import lower_with_sharding_in_types, reshape
    from jax._src.lax.lax import _convert_element_type, broadcasting_sharding_rule
    from jax._src.lib import xla_client
    from jax._src.numpy.util import promote_args_inexact
    from jax._src.sharding_impls import GSPMDSharding, ShardingContext, SPMDAxisContext
    from jax._src.state.types import AbstractRef
    from jax.core import Tracer
    from jax.experimental.custom_partitioning import custom_partitioning
    from jax.extend.core import DropVar, Primitive, Var, jaxpr_as_fun
    from jax.interpreters import batching, mlir

    # What is used of the modules among these; tests/test_versions.py finds what is missing here.
    _SHARE = xla_client.OpSharding.Type.REPLICATED
    _USED_LATER = (
        batching.primitive_batchers,
        mlir.ir,
        mlir.lower_fun,
        mlir.register_lowering,
        source_info_util.user_frames,
        xla_client.HloSharding,
    )
except (ImportError, AttributeError) as error:
    raise _versions.lacking(error) from error
_versions.warn_of_newer()

__all__ = [
    "INLINE",
    "DropVar",
    "Primitive",
    "Tracer",
    "Var",
    "apply_primitive",
    "auto_insert_reshard",
    "batching",
    "broadcasting_sharding_rule",
    "can_split_along_axes",
    "equation_context",
    "has_unreduced_axes",
    "in_current_mesh",
    "is_partitioned",
    "is_reference",
    "is_rule_of_jax",
    "is_unspecified",
    "jaxpr_as_fun",
    "lower_split_along_axes",
    "lower_with_sharding_in_types",
    "make_user_context",
    "mlir",
    "name_like",
    "only_names_mesh",
    "promote_args_inexact",
    "reshape",
    "trace_context",
    "user_frames",
    "with_equations",
    "with_weak_type",
    "without_constants",
    "without_mesh",
]

# The value of jax.jit's `inline` that leaves no trace of a call in a jaxpr: newer JAX has a choice
# of moments, and True there keeps the call until the program is lowered.
INLINE = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def has_unreduced_axes(aval) -> bool:
    """Whether an abstract value is a partial sum, still to be added up over some mesh axes."""
    return bool(aval.sharding.spec.unreduced) or bool(aval.manual_axis_type.unreduced)


def without_mesh():
    """A context manager: what is traced inside knows of no mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def in_current_mesh(aval):
    """An abstract value as JAX's own functions give it: if it is of no mesh, of the one in force.

    That is so where no axis of the mesh is of type Explicit.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh._are_all_axes_auto_or_manual or not aval.sharding.mesh.empty:
        return aval
    return aval.update(sharding=aval.sharding.update(mesh=mesh))


def with_weak_type(x: jax.Array, weak_type: bool) -> jax.Array:
    """Return x with a weak type, or with none."""
    return _convert_element_type(x, x.dtype, weak_type)


def is_partitioned(context) -> bool:
    """Whether XLA may split the arrays of a program that is being lowered over several devices.

    Not so within `jax.shard_map` over all axes of its mesh: there an array is what one device has.
    """
    axes = context.module_context.axis_context
    if isinstance(axes, ShardingContext):
        return axes.num_devices > 1
    if isinstance(axes, SPMDAxisContext):
        return axes.mesh.size > 1 and set(axes.mesh.axis_names) != set(axes.manual_axes)
    return False


# Calls that XLA splits over devices along axes of our choice.


def can_split_along_axes(context) -> bool:
    """Whether `lower_split_along_axes` works in a program that is being lowered.

    It needs Shardy, and this process when the program is compiled: not so in exported programs,
    nor in the body of a `jax.shard_map` over some axes of a mesh.
    """
    axes = context.module_context.axis_context
    return (
        isinstance(axes, ShardingContext)
        and 1 < axes.num_devices <= len(jax.devices("cpu"))
        and not context.module_context.lowering_parameters.for_export
        and use_shardy_partitioner.value
    )


def lower_split_along_axes(
    context,
    *operands,
    function: Callable,
    inputs: Sequence[Sequence],
    results: Sequence[Sequence],
    description: str,
) -> list:
    """Lower a function to a call that XLA may split over devices: each runs it on parts of arrays.

    Args:
      context, operands: as any lowering has them.
      function: of arrays, and returns a sequence of them; the same for each part.
      inputs, results: for each array and axis a label, or None for an axis that must be whole. Axes
        of one label are split alike. Where their sizes differ the smaller ones have fewer parts,
        and devices share these: one if the size is 1.
      description: of what `function` does, different for different ones.
    """
    module = context.module_context
    axes = module.axis_context
    # Any devices will do: they do not become part of the program.
    devices = axes.device_assignment or tuple(jax.devices("cpu")[: axes.num_devices])
    axes = ShardingContext(axes.num_devices, devices, axes.abstract_mesh)
    kept: list = []
    inner = context.replace(module_context=module.replace(axis_context=axes, keepalives=kept))
    call = _split_along_axes(function, inputs, results)
    values = mlir.lower_fun(call, multiple_results=True)(inner, *operands)
    module.add_keepalive(_UntilCompiled(kept))
    # To JAX's cache of compiled programs the call is a number that may mean another function in
    # another process.
    attributes = values[0].owner.attributes
    name = "mhlo.frontend_attributes"
    known = {a.name: a.attr for a in attributes[name]} if name in attributes else {}
    known["quake_jax"] = mlir.ir.StringAttr.get(description)
    attributes[name] = mlir.ir.DictAttr.get(known)
    return values


class _UntilCompiled:
    """Keeps alive what compiling a program needs; a pickle of the compiled one goes without."""

    def __init__(self, *contents):
        self.contents = contents

    def __reduce__(self):
        return _UntilCompiled, ()


def _split_along_axes(function: Callable, inputs: Sequence, results: Sequence) -> Callable:
    call = custom_partitioning(lambda *operands: tuple(function(*operands)))
    labels = (*inputs, *results)

    def rule(mesh, operand_types, result_types):
        shapes = [kind.shape for kind in (*operand_types, *result_types)]
        return _rule_of_labels(labels, shapes, len(inputs))

    def partition(mesh, arguments, outputs):
        arrays = (*arguments, *outputs)
        tiles = _tiles(labels, arrays)
        devices = arrays[0].sharding._internal_device_list
        shardings = [
            GSPMDSharding(devices, _sharding_of_tiles(tiles, axes, x.shape))
            for axes, x in zip(labels, arrays, strict=True)
        ]

        def on_parts(*parts):
            # A part knows of no mesh.
            with without_mesh():
                return tuple(function(*parts))

        return mesh, on_parts, tuple(shardings[len(inputs) :]), tuple(shardings[: len(inputs)])

    # Not decoded: shardings need not be over whole axes of a mesh.
    call.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return call


def _rule_of_labels(labels: Sequence, shapes: Sequence, inputs: int) -> tuple[str, dict]:
    """The rule by which Shardy spreads shardings, in the notation of `custom_partitioning`."""
    factors: dict = {}
    arrays = []
    for i, (axes, shape) in enumerate(zip(labels, shapes, strict=True)):
        names = []
        for k, (label, size) in enumerate(zip(axes, shape, strict=True)):
            # Shardy spreads splits among axes of one factor, which have one size.
            factor = (i, k) if label is None or size == 1 else (label, size)
            names.append(factors.setdefault(factor, (f"f{len(factors)}", label is None))[0])
        arrays.append(" ".join(names))
    text = f"{', '.join(arrays[:inputs])} -> {', '.join(arrays[inputs:])}"
    whole = tuple(name for name, is_whole in factors.values() if is_whole)
    return text, {"need_replication_factors": whole}


def _tiles(labels: Sequence, arrays: Sequence) -> tuple[np.ndarray, list]:
    """The numbers of the devices, by part of each label that is split; and these labels.

    The last axis has the devices that share a part. The array that is split most decides.
    """
    sizes: dict = {}
    for axes, x in zip(labels, arrays, strict=True):
        for label, size in zip(axes, x.shape, strict=True):
            sizes.setdefault(label, set()).add(size)

    def fits(label, parts: int) -> bool:
        larger = [size for size in sizes[label] if size != 1]
        # XLA fills up axes that it splits unevenly; those of one size alike.
        return len(larger) == 1 or all(n % parts == 0 or parts % n == 0 for n in larger)

    best, split = np.zeros(1, int), []
    for axes, x in zip(labels, arrays, strict=True):
        devices = _devices_by_tile(x)
        if devices is None:
            continue
        kept = [
            k
            for k, (label, size) in enumerate(zip(axes, x.shape, strict=True))
            if label is not None and size > 1 < devices.shape[k] and fits(label, devices.shape[k])
        ]
        rest = [k for k in range(devices.ndim) if k not in kept]
        parts = [devices.shape[k] for k in kept]
        if math.prod(parts) > math.prod(best.shape[:-1]):
            best = devices.transpose(*kept, *rest).reshape(*parts, -1)
            split = [axes[k] for k in kept]
    return best, split


def _devices_by_tile(x) -> np.ndarray | None:
    """The numbers of the devices by tile along each axis of an array, then those that share it.

    None if it is not split, or in ways that have no tiles.
    """
    sharding = x.sharding._to_xla_hlo_sharding(len(x.shape)).v3_to_v2_sharding()
    if not sharding.is_tiled() or any(kind != _SHARE for kind in sharding.subgroup_types()):
        return None
    devices = np.asarray(sharding.tile_assignment_devices())
    devices = devices.reshape(sharding.tile_assignment_dimensions())
    return devices.reshape(*devices.shape[: len(x.shape)], -1)


def _sharding_of_tiles(tiles: tuple[np.ndarray, list], axes: Sequence, shape: Sequence[int]):
    """The sharding of an array whose axes have the labels `axes`."""
    devices, split = tiles
    # By label one axis of parts, and one of the devices that share a part.
    counts, grid = [], []
    for label, parts in zip(split, devices.shape, strict=False):
        size = shape[axes.index(label)] if label in axes else 1
        count = size if parts % size == 0 else parts
        grid += [count, parts // count]
        counts.append(count)
    devices = devices.reshape(*grid, -1)
    kept = [2 * split.index(label) for label in axes if label in split]
    rest = [k for k in range(devices.ndim) if k not in kept]
    tile = [counts[split.index(label)] if label in split else 1 for label in axes]
    if math.prod(tile) == 1:
        return xla_client.HloSharding.replicate()
    devices = devices.transpose(*kept, *rest).reshape(*tile, -1)
    return xla_client.HloSharding.subgroup_with_device_ordering(devices, subgroup_types=[_SHARE])


# Jaxprs, which quake_jax._rewrite edits.

_JAX_FOLDER = os.path.join(jax.__path__[0], "")


def is_unspecified(sharding) -> bool:
    """Whether an element of a jit equation's in_shardings or out_shardings says nothing."""
    return type(sharding).__name__ == "UnspecifiedValue"


def without_constants(jaxpr):
    """The inner jaxpr of an equation's parameter, if all its inputs are arguments; else None."""
    if getattr(jaxpr, "consts", None):
        return None
    open_jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return None if open_jaxpr.constvars else open_jaxpr


def with_equations(jaxpr, equations, outvars):
    """A Jaxpr or ClosedJaxpr with other equations and results, of the same types and names.

    There may be fewer results: the first ones.
    """

    def edited(inner):
        names = inner.debug_info
        if len(outvars) < len(inner.outvars):
            names = names._replace(result_paths=names.result_paths[: len(outvars)])
        return inner.replace(eqns=equations, outvars=outvars, debug_info=names)

    return jaxpr.map_jaxpr(edited) if hasattr(jaxpr, "consts") else edited(jaxpr)


def is_rule_of_jax(rule) -> bool:
    """Whether the differentiation rule of a custom_jvp_call equation is one of JAX's own."""
    function = getattr(rule.debug_info, "func_src_info", None) or ""
    _, _, place = function.partition(" at ")
    # `defjvps` makes a rule there of those that it is given.
    return place.startswith(_JAX_FOLDER) and "custom_derivatives.py" not in place


def only_names_mesh(equation) -> bool:
    """Whether an equation does no more than say that an array of no mesh is one of some mesh.

    Under `jax.set_mesh` jax.numpy has these where it broadcasts an argument made outside.
    """
    if equation.primitive.name != "reshard":
        return False
    (before,), (after,) = equation.invars, equation.outvars
    return before.aval.sharding.mesh.empty and not any(after.aval.sharding.spec)


def user_frames(source_info) -> list[tuple[str, int, str]]:
    """File, line and function of the frames outside JAX that made an equation, innermost first."""
    return [
        (frame.file_name, frame.start_line, frame.function_name)
        for frame in source_info_util.user_frames(source_info.traceback)
    ]


@contextlib.contextmanager
def equation_context(equation):
    """A context manager: the mesh and other settings that an equation was traced in."""
    avals = (v.aval for v in (*equation.invars, *equation.outvars))
    # Within shard_map types may say along which axes of the mesh arrays vary; equations there are
    # traced so that those of their results do too.
    types = [getattr(aval, "manual_axis_type", None) for aval in avals]
    varies = any(kind is not None and kind.varying for kind in types)
    with equation.ctx.manager, _check_vma(varies):
        mesh = jax.sharding.get_abstract_mesh()
        axes = [(name, mesh.shape[name]) for name in mesh.manual_axes] if varies else []
        with extend_axis_env_nd(axes):
            yield


def is_reference(x) -> bool:
    """Whether x is a mutable array."""
    return isinstance(getattr(x, "aval", None), AbstractRef)


def name_like(function, original):
    """A function with the name of another, which profiles and printed programs show."""
    name = getattr(original, "__name__", None) or type(original).__name__
    function.__name__ = name
    function.__qualname__ = getattr(original, "__qualname__", name)
    return function
