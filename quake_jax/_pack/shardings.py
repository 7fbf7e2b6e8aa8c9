"""How packed parameters are split over a mesh, from how the parameters are."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from quake_jax._core.drop_in import refusal
from quake_jax._dense.packed import ARRAYS, PackedWeight
from quake_jax._dense.sharding import split_in_panels

# What packed weights have by column.
_BY_COLUMN = ("codes", "scales", "sums", "offsets")


def packed_shardings(packed: Any, shardings: Any) -> Any:
    """The shardings of packed parameters, from those of the parameters that were packed.

    A packed weight is split by columns, in panels of 16, over every mesh axis that splits its
    parameter, be it by columns or by rows: a layer that is divided by its inputs elsewhere is
    divided by its outputs here. Leading axes, of stacked layers or experts, are split as the
    parameter's are. A mesh axis that does not divide the panels is left out, and all are if N is
    no multiple of 16: what is not split is on every device.

    Args:
      packed: what `pack` or `pack_weight` returned, or a tree of packed weights and arrays.
      shardings: a tree of the parameters' structure, or of the first levels of it, whose leaves are
        `NamedSharding`, or `PartitionSpec` for the mesh of `jax.set_mesh`, or another Sharding that
        splits nothing.

    Returns:
      `packed` with a sharding (or a PartitionSpec) in place of each array: for `jax.device_put`,
      `in_shardings` of `jax.jit`, and `in_specs` of `jax.shard_map`.

    Raises:
      TypeError: if a leaf of shardings is neither a Sharding nor a PartitionSpec.
      ValueError: if shardings have another structure; if there is no mesh for a PartitionSpec, or
        it lacks an axis; if a Sharding that is no NamedSharding splits arrays.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> packed = {"up": quake_jax.pack_weight(jnp.ones((64, 128)), "int8")}
      >>> shardings = {"up": NamedSharding(mesh, PartitionSpec(None, "model"))}
      >>> packed = jax.device_put(packed, quake_jax.packed_shardings(packed, shardings))
      >>> packed["up"].codes.sharding.spec == PartitionSpec("model")
      True
    """

    def of_tree(sharding, entries):
        if not isinstance(sharding, (Sharding, PartitionSpec)):
            expected = "a tree of Sharding or PartitionSpec"
            raise refusal("packed_shardings", "shardings", expected, repr(sharding), TypeError)
        return jax.tree.map(
            functools.partial(_of_entry, sharding), entries, is_leaf=_is_packed_weight
        )

    try:
        tree = jax.tree.structure(shardings, is_leaf=_is_sharding)
        parts = tree.flatten_up_to(packed)
    except (ValueError, TypeError) as error:
        expected = "of the structure of packed"
        raise refusal("packed_shardings", "shardings", expected, f"another: {error}") from None
    leaves = jax.tree.leaves(shardings, is_leaf=_is_sharding)
    return jax.tree.unflatten(tree, [*map(of_tree, leaves, parts)])


def _is_sharding(x) -> bool:
    return isinstance(x, (Sharding, PartitionSpec))


def _is_packed_weight(x) -> bool:
    return isinstance(x, PackedWeight)


def _of_entry(sharding, entry):
    """The sharding of an array, or those of a packed weight's leaves."""
    if not _is_packed_weight(entry):
        return sharding
    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec

        def made(spec):
            return NamedSharding(mesh, spec, memory_kind=sharding.memory_kind)

    elif isinstance(sharding, PartitionSpec):
        mesh, spec = jax.sharding.get_abstract_mesh(), sharding

        def made(spec):
            return spec

    elif sharding.is_fully_replicated:
        return jax.tree.map(lambda leaf: sharding, entry)
    else:
        expected = "a NamedSharding, a PartitionSpec or one that splits nothing"
        raise refusal("packed_shardings", "shardings", expected, repr(sharding))
    *lead, _, n = entry.shape
    names = [name for x in spec for name in (x if isinstance(x, tuple) else (x,)) if x is not None]
    missing = [name for name in names if name not in mesh.shape]
    if missing:
        expected = f"of axes of the mesh, {tuple(mesh.shape)} (see jax.set_mesh)"
        raise refusal("packed_shardings", "shardings", expected, repr(spec))
    spec = (*spec, *[None] * len(lead))
    stacked, columns = spec[: len(lead)], split_in_panels(n, mesh, spec[len(lead) :])
    arrays = {
        name: made(PartitionSpec(*stacked, *columns if name in _BY_COLUMN else ()))
        for name in ARRAYS
        if getattr(entry, name) is not None
    }
    return dataclasses.replace(entry, **arrays)
