"""Registers classes of arrays and static values with JAX: as pytrees, and for jax.export."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import jax
from jax import export


def pytree(arrays: Sequence[str], static: Sequence[str]) -> Callable[[type], type]:
    """A decorator of a dataclass whose fields are `arrays`, then `static`.

    Nothing is validated when a tree is put together: leaves may be anything.
    """

    def decorate(cls: type) -> type:
        # Of all ways to register a class the one that JAX takes apart without calling Python.
        jax.tree_util.register_dataclass(cls, arrays, static)
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"quake_jax.{cls.__name__}",
            serialize_auxdata=lambda meta: json.dumps(meta).encode(),
            deserialize_auxdata=lambda data: tuple(json.loads(bytes(data))),
        )
        return cls

    return decorate
