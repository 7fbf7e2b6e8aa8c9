"""How packed weights are split over a mesh: along panels, never along rows, whose codes share
scales and sums.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

from quake_jax._core import jax_names
from quake_jax._dense import layout


def part_of(weight):
    """What a device has of a weight in the body of a `jax.shard_map` that splits its panels."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes or weight.n % layout.PANEL:
        return weight
    panels = weight.codes.shape[len(weight._leading())] or 1
    parts, rest = divmod(weight.n // layout.PANEL, panels)
    if rest or math.prod(mesh.shape[name] for name in mesh.manual_axes) % max(parts, 1):
        return weight  # whose leaves do not fit
    return dataclasses.replace(weight, n=panels * layout.PANEL)


def split_in_panels(n: int, mesh, names: Sequence) -> PartitionSpec:
    """A PartitionSpec of one axis, n columns in panels or these panels.

    `names` are those of mesh axes, or tuples of them, as in a PartitionSpec, the outermost last.
    Only those split panels by which their number can be divided; and none if the last one is not
    full.
    """
    panels, chosen = n // layout.PANEL, []
    if n % layout.PANEL:
        return PartitionSpec(None)
    for entry in reversed(names):
        for name in entry if isinstance(entry, tuple) else (entry,):
            if name is not None and panels % mesh.shape[name] == 0:
                panels //= mesh.shape[name]
                chosen.append(name)
    return PartitionSpec(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)


def with_split_columns(weight: jax.Array) -> jax.Array:
    """A weight whose columns are split over a mesh by all that splits its rows or columns.

    Then its packed leaves are split along panels, and no column is cut into pieces.
    """
    is_traced = isinstance(weight, jax_names.Tracer)
    sharding = jax.typeof(weight).sharding if is_traced else weight.sharding
    if not isinstance(sharding, NamedSharding) or not any(sharding.spec):
        return weight
    spec = (*sharding.spec, *[None] * (weight.ndim - len(sharding.spec)))
    columns = split_in_panels(weight.shape[-1], sharding.mesh, spec[-2:])
    to = NamedSharding(sharding.mesh, PartitionSpec(*spec[:-2], None, *columns))
    return jax.sharding.reshard(weight, to) if is_traced else jax.device_put(weight, to)
