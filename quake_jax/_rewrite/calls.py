"""Calls of functions: their arguments as arrays and what is static, and the programs that they
trace to.
"""

from __future__ import annotations

import enum
import functools
import itertools
import types
from collections.abc import Callable, Sequence

import jax
import numpy as np

from quake_jax._core import jax_names
from quake_jax._rewrite import jaxprs, variables

# What compares by identity and yet has nothing in it that a program could read and that changes
# (for functions: nothing that jax.jit would not take for a constant too).
_CONSTANT_TYPES = (
    enum.Enum,
    type,
    types.BuiltinFunctionType,
    types.EllipsisType,
    types.FunctionType,
    types.ModuleType,
    np.ufunc,
)


class Static:
    """The structure of a call's arguments, with those in it that are no arrays: a key of caches."""

    def __init__(self, tree, leaves: tuple):
        self.tree = tree
        self.leaves = leaves
        # 1, 1.0 and True are equal but make different programs, as 0.0 and -0.0 do.
        exact = (float, complex)
        self._key = (
            tree,
            tuple((type(x), repr(x) if isinstance(x, exact) else x) for x in leaves),
        )

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, Static) and self._key == other._key

    def arrays_of(self, argnums: Sequence[int]) -> list[bool]:
        """For each array of the call, whether it is in one of these positional arguments.

        Raises:
          IndexError: if there is no such argument.
        """
        arguments = self.tree.children()[0].children()
        chosen = {range(len(arguments))[i] for i in argnums}
        inside = (i in chosen for i, tree in enumerate(arguments) for _ in range(tree.num_leaves))
        inside = itertools.chain(inside, itertools.repeat(False))  # those by keyword
        return [x for x, leaf in zip(inside, self.leaves, strict=False) if leaf is _ARRAY]

    def is_key(self) -> bool:
        """Whether calls with an equal one have the same program."""
        return _is_hashable(self) and all(map(_is_constant, self.leaves))


class _Array:
    """Stands for an array among static leaves."""

    def __repr__(self):
        return "array"


_ARRAY = _Array()


def _is_hashable(x) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _is_constant(x) -> bool:
    """Whether something hashable that is no array means the same as long as it is equal.

    An object that compares by identity stays equal when its attributes change: what a program
    reads of it may be old in the next call. One with an equality of its own is taken at its word.
    """
    if isinstance(x, functools.partial):
        parts = (x.func, *x.args, *x.keywords.values())
        return all(_is_hashable(part) and _is_constant(part) for part in parts)
    if isinstance(x, (types.MethodType, types.BuiltinFunctionType)):
        return _is_hashable(x.__self__) and _is_constant(x.__self__)
    if type(x).__eq__ is not object.__eq__ or isinstance(x, _CONSTANT_TYPES):
        return True
    return type(x) is _Array or type(x).__module__.partition(".")[0] in ("jax", "jaxlib")


def _is_array(x) -> bool:
    if isinstance(x, (np.ndarray, np.generic)):
        return x.dtype.kind in "biufcV"
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) or jax_names.is_reference(x)


def split(args, kwargs) -> tuple[list, Static]:
    """The arrays among arguments, and everything else about them."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    arrays = [x for x in leaves if _is_array(x)]
    return arrays, Static(tree, tuple(_ARRAY if _is_array(x) else x for x in leaves))


def joined(arrays, static: Static):
    remaining = iter(arrays)
    leaves = [next(remaining) if x is _ARRAY else x for x in static.leaves]
    return jax.tree.unflatten(static.tree, leaves)


def traced(fun: Callable, static: Static, arrays):
    """The program of a call of `fun`, and the structure of its result."""
    origins: dict[str, int | None] = {}  # of changed variables: which of the arrays they were

    def flat(*arrays):
        args, kwargs = joined(arrays, static)
        before = variables.of_models(args, kwargs)
        y = fun(*args, **kwargs)
        after = variables.of_models(args, kwargs)
        changed = {name: x for name, x in after.items() if x is not before.get(name)}
        places = {id(x): i for i, x in enumerate(arrays)}
        origins.update({name: places.get(id(before.get(name))) for name in changed})
        return (y, changed) if changed else y

    flat = jaxprs.name_like(flat, fun)
    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
    tree = jax.tree.structure(shapes[0] if origins else shapes)
    if origins:
        closed, lost = variables.without_changes(closed, tree.num_leaves, origins)
        if lost:
            variables.warn_of_changes(fun, lost)
    return closed, tree
