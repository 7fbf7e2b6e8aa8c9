"""Calls that XLA splits over devices along axes of our choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from quake_jax._core.jax_names import (
    GSPMDSharding,
    ShardingContext,
    custom_partitioning,
    mlir,
    use_shardy_partitioner,
    without_mesh,
    xla_client,
)

_SHARE = xla_client.OpSharding.Type.REPLICATED

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
    firm: Sequence[int] = (),
) -> list:
    """Lower a function to a call that XLA may split over devices: each runs it on parts of arrays.

    Args:
      context, operands: as any lowering has them.
      function: of arrays, and returns a sequence of them; the same for each part.
      inputs, results: for each array and axis a label, or None for an axis that must be whole. Axes
        of one label are split alike. Where their sizes differ the smaller ones have fewer parts,
        and devices share these: one if the size is 1.
      description: of what `function` does, different for different ones.
      firm: the inputs that stay split as they are, whatever the others are.
    """
    module = context.module_context
    axes = module.axis_context
    # Any devices will do: they do not become part of the program.
    devices = axes.device_assignment or tuple(jax.devices("cpu")[: axes.num_devices])
    axes = ShardingContext(axes.num_devices, devices, axes.abstract_mesh)
    kept: list = []
    inner = context.replace(module_context=module.replace(axis_context=axes, keepalives=kept))
    call = _split_along_axes(function, inputs, results, firm)
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


def _split_along_axes(
    function: Callable, inputs: Sequence, results: Sequence, firm: Sequence[int]
) -> Callable:
    call = custom_partitioning(lambda *operands: tuple(function(*operands)))
    labels = (*inputs, *results)

    def rule(mesh, operand_types, result_types):
        shapes = [kind.shape for kind in (*operand_types, *result_types)]
        return _rule_of_labels(labels, shapes, len(inputs))

    def partition(mesh, arguments, outputs):
        arrays = (*arguments, *outputs)
        tiles = _tiles(labels, arrays, firm)
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


def _tiles(labels: Sequence, arrays: Sequence, firm: Sequence[int]) -> tuple[np.ndarray, list]:
    """The numbers of the devices, by part of each label that is split; and these labels.

    The last axis has the devices that share a part. Firm arrays come first, then those that are
    split most; of the others counts what agrees with these.
    """
    sizes: dict = {}
    for axes, x in zip(labels, arrays, strict=True):
        for label, size in zip(axes, x.shape, strict=True):
            sizes.setdefault(label, set()).add(size)

    def fits(label, parts: int) -> bool:
        larger = [size for size in sizes[label] if size != 1]
        # XLA fills up axes that it splits unevenly; those of one size alike.
        return len(larger) == 1 or all(n % parts == 0 or parts % n == 0 for n in larger)

    grids = [_devices_by_tile(x) for x in arrays]
    order = sorted(
        (i for i, grid in enumerate(grids) if grid is not None),
        key=lambda i: (i not in firm, -math.prod(grids[i].shape[:-1])),
    )
    found: dict = {}  # for each label the part that a device has
    for i in order:
        grid = grids[i]
        place = np.empty((grid.ndim, grid.size), int)
        place[:, grid.reshape(-1)] = np.indices(grid.shape).reshape(grid.ndim, -1)
        for k, (label, size) in enumerate(zip(labels[i], arrays[i].shape, strict=True)):
            if label is None or label in found or size == 1:
                continue
            parts = grid.shape[k]
            for together in range(1, parts):
                # So many neighbouring parts may have to become one.
                part = place[k] // together
                if (
                    parts % together == 0
                    and fits(label, parts // together)
                    and _are_independent([*found.values(), part])
                ):
                    found[label] = part
                    break
    if not found:
        return np.zeros(1, int), []
    counts = [part.max() + 1 for part in found.values()]
    return np.lexsort([*found.values()][::-1]).reshape(*counts, -1), [*found]


def _are_independent(parts: Sequence[np.ndarray]) -> bool:
    """Whether as many devices have any one combination of parts as any other."""
    _, counts = np.unique(np.stack(parts), axis=1, return_counts=True)
    every = math.prod(int(part.max()) + 1 for part in parts)
    return len(counts) == every and counts.min() == counts.max()


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
