"""Registers classes of arrays and static values with JAX: as pytrees, and for jax.export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import jax
from jax import export


def pytree(arrays: Sequence[str], static: Sequence[str]) -> Callable[[type], type]:
    """A decorator of a class whose fields are `arrays`, then `static`.

    Nothing is validated when a tree is put together: leaves may be anything.
    """

    def decorate(cls: type) -> type:
        def meta(tree):
            return tuple(getattr(tree, name) for name in static)

        def flatten(tree):
            return tuple(getattr(tree, name) for name in arrays), meta(tree)

        def flatten_with_keys(tree):
            keys = map(jax.tree_util.GetAttrKey, arrays)
            return tuple((key, getattr(tree, key.name)) for key in keys), meta(tree)

        jax.tree_util.register_pytree_with_keys(
            cls, flatten_with_keys, lambda meta, leaves: cls(*leaves, *meta), flatten
        )
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"quake_jax.{cls.__name__}",
            serialize_auxdata=lambda meta: json.dumps(meta).encode(),
            deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
        )
        return cls

    return decorate
