"""The packed parameters that several functions share: where each weight is, and how it is made.

What is packed, and how, depends on the parameters, the rules and the products in the programs, not
on the shapes of other arguments.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._core import jax_names, pages
from quake_jax._core.drop_in import refusal
from quake_jax._core.progress import progress
from quake_jax._dense import pack_primitive
from quake_jax._dense.layout import LARGEST
from quake_jax._dense.packed import PackedWeight, pack_weight
from quake_jax._dense.sharding import with_split_columns
from quake_jax._dense.trees import pytree
from quake_jax._pack import codes
from quake_jax._pack.report import Kept, Layer, joined_paths
from quake_jax._pack.rules import Rules
from quake_jax._rewrite.dense import Format, origin


@pytree(("array", "weights"), ())
@dataclasses.dataclass(frozen=True, eq=False)
class PackedLeaf:
    """What stands in the place of a parameter that is packed more than once, or kept besides.

    Attributes:
      array: the parameter, or None if nothing needs it any more.
      weights: tuple of `PackedWeight`.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> def tied(embedding, tokens):
      ...     return embedding[tokens] @ embedding.T
      >>> tokens = jnp.arange(3)
      >>> _, packed = quake_jax.pack(tied, jnp.ones((64, 64)), tokens, weights="int8")
      >>> packed.weights
      (PackedWeight(shape=(64, 64), dtype='int8', group_size=None, activations='int8'),)
    """

    array: jax.Array | None
    weights: tuple[PackedWeight, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Slot:
    """A packed weight: the `index`-th of those at the first parameter that it is made of."""

    leaf: int
    index: int
    program: object  # closed jaxpr that makes its leaves
    inputs: tuple[int, ...]  # the parameters that this takes
    static: PackedWeight  # of abstract arrays


def _key(program, inputs) -> tuple:
    """What is equal for two packings of the same parameters in the same way."""
    # Without addresses, the mesh in force, and its axes along which values vary in a shard_map.
    text = re.sub(r"0x[0-9a-f]+|\n *ctx_mesh=.*|\{V:[^}]*\}", "", str(program))
    digest = hashlib.sha256(text.encode())
    for constant in program.consts:
        digest.update(np.asarray(constant).tobytes())
    return inputs, digest.hexdigest()


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _format(node, chosen: Format) -> Format:
    """How weights of a parameter are packed, from what is chosen for it.

    Those of an array of qwix in its own groups.
    """
    size = codes.tile_of(node) if codes.is_quantized(node) else None
    if size is None or chosen.dtype not in LARGEST:
        return chosen
    # The exceptions of "int4" would take 4 bits, in groups, for 8, in none.
    is_rule = chosen.is_rule or codes.has_four_bits(node)
    return dataclasses.replace(chosen, group_size=size, is_rule=is_rule)


def abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _is_array(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


class Plan:
    """How parameters of one structure are packed.

    Attributes:
      params: the parameters, abstract.
      slots: the packed weights.
      is_measured: whether programs are for calibration (see `Format`).
      ranges: those of activations, by slot; while they are measured, names in their place.
    """

    def __init__(self, params, rules: Rules):
        found, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self.paths = [_path(path) for path, _ in found]
        self._leaves = [abstract(x) if _is_array(x) else x for _, x in found]
        self.params = jax.tree.unflatten(self._tree, self._leaves)
        # Of the leaves that are arrays, which alone are inputs of programs.
        self._arrays = [i for i, x in enumerate(self._leaves) if _is_array(x)]
        # What reports and rules call them, how weights that are made of them are packed, and what
        # they are in weights that are quantised already.
        self._names, self._formats, self._roles = [], [], []
        nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=codes.is_quantized)
        for path, node in nodes:
            leaves = jax.tree.leaves(node)
            name = _path(path)
            self._names += [name] * len(leaves)
            self._formats += [_format(node, rules.format_of(name))] * len(leaves)
            self._roles += codes.roles(leaves, node)
        self.slots: list[Slot] = []
        self.is_measured = False
        self.ranges: dict[Slot, np.ndarray] = {}
        self._by_key: dict[tuple, Slot] = {}
        self._kept: set[int] = set()
        self._is_final = False

    @property
    def origins(self) -> list[frozenset]:
        """For each array of the parameters the format of the weights that are made of it."""
        return [self._origin(i) for i in self._arrays]

    def _origin(self, i: int) -> frozenset:
        chosen = dataclasses.replace(self._formats[i], measured=self.is_measured)
        if self._names[i] != self.paths[i]:  # the codes of an array of qwix are a weight
            return frozenset((chosen,))
        return origin(self._leaves[i], chosen)

    def slot(self, program, inputs: tuple[int, ...]) -> Slot:
        """Where a packed weight is; `inputs` counts the arrays of the parameters."""
        inputs = tuple(self._arrays[i] for i in inputs)
        key = _key(program, inputs)
        if key not in self._by_key:
            if self._is_final:
                named = ", ".join(self.paths[i] for i in inputs)
                raise ValueError(
                    f"quake_jax.pack: this call packs {named} as no function that was given to "
                    "pack did; give pack the tuple of all (function, arguments) that share the "
                    "weights"
                )
            leaf = inputs[0]
            index = sum(slot.leaf == leaf for slot in self.slots)
            packing = program.eqns[-1]
            static = _assembled(packing, [abstract(v.aval) for v in packing.outvars])
            self._by_key[key] = Slot(leaf, index, program, inputs, static)
            self.slots.append(self._by_key[key])
        return self._by_key[key]

    def name(self, slot: Slot) -> str:
        return joined_paths(self._named(slot))

    def _named(self, slot: Slot) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._names[i] for i in slot.inputs))

    def keep(self, index: int) -> None:
        """Say that a program needs one of the arrays of the parameters as it is."""
        self._kept.add(self._arrays[index])

    def finish(self) -> None:
        self._is_final = True

    def packed(self, params):
        """Packed parameters, and what there is to report of each weight."""
        leaves, tree = jax.tree.flatten(params)
        if tree != self._tree:
            raise refusal("pack", "params", f"of the structure {self._tree}", str(tree))
        for path, leaf, known in zip(self.paths, leaves, self._leaves, strict=True):
            if _is_array(known) and (leaf.shape, leaf.dtype) != (known.shape, known.dtype):
                expected = f"of shape {known.shape} and dtype {known.dtype}"
                raise refusal("pack", f"params {path}", expected, f"{leaf.shape} and {leaf.dtype}")
        weights: dict[int, list] = {}
        layers = []
        with progress("packing", len(self.slots), after=1.0) as advance:
            for slot in self.slots:
                made, error = self._made(slot, [leaves[i] for i in slot.inputs])
                weights.setdefault(slot.leaf, []).append(made)
                layers.append(self._layer(slot, error))
                advance()
        pages.gather(weights)  # small ones fill a page together
        entries = [self._entry(i, leaf, tuple(weights.get(i, ()))) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(self._tree, entries), layers

    def kept(self) -> list[Kept]:
        """The parameters that functions read as they are."""
        leaves = ((i, self._leaves[i]) for i in sorted(self._kept))
        return [Kept(self.paths[i], x.shape, x.dtype.name, bytes_of(x)) for i, x in leaves]

    def dropped(self) -> list[str]:
        """The parameters that nothing needs."""
        used = self._kept.union(*(slot.inputs for slot in self.slots))
        return [self.paths[i] for i in self._arrays if i not in used]

    @property
    def with_ranges(self) -> list[Slot]:
        """The packed weights whose rows have a range."""
        return [slot for slot in self.slots if slot.static.activation_range is not None]

    def ranged(self, packed):
        """Packed parameters with `ranges`."""
        found = {(slot.leaf, slot.index): x for slot, x in self.ranges.items()}

        def entry(i, old):
            if isinstance(old, PackedLeaf):
                weights = (weight(i, j, w) for j, w in enumerate(old.weights))
                return dataclasses.replace(old, weights=tuple(weights))
            return weight(i, 0, old)

        def weight(i, index, old):
            known = found.get((i, index))
            return old if known is None else _with_range(old, known)

        entries = [entry(i, old) for i, old in enumerate(self.entries(packed))]
        return jax.tree.unflatten(self._tree, entries)

    def _layer(self, slot: Slot, error: float | None) -> Layer:
        before = sum(bytes_of(self._leaves[i]) for i in slot.inputs if i not in self._kept)
        after = sum(map(bytes_of, jax.tree.leaves(slot.static)))
        return Layer(
            self._named(slot),
            slot.static.shape,
            slot.static.dtype,
            slot.static.group_size,
            slot.static.activations,
            slot.static.activation_range is not None,
            before,
            after,
            error,
            any(i in self._kept for i in slot.inputs),
        )

    def _entry(self, i: int, leaf, weights: tuple):
        if not _is_array(leaf):
            return leaf
        kept = leaf if i in self._kept else None
        if not weights:
            return kept
        return weights[0] if kept is None and len(weights) == 1 else PackedLeaf(kept, weights)

    def _made(self, slot: Slot, arrays) -> tuple[PackedWeight, float | None]:
        """A packed weight and its relative error; abstract, and none, for abstract arrays."""
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
            return slot.static, None
        weight = _before_packing(slot.program)(*arrays)
        parameters = dict(slot.program.eqns[-1].params)
        del parameters["calibrated"]
        try:
            made = pack_weight(weight, parameters.pop("dtype"), **parameters)
        except ValueError as error:
            raise ValueError(f"quake_jax.pack: params {self.name(slot)}: {error}") from error
        if slot.static.dtype in LARGEST:
            own = codes.taken_over(slot.program, arrays, [self._roles[i] for i in slot.inputs])
            if own is not None:
                is_same, *own = own
                general = [weight.astype(jnp.float32), made]
                weight, made = jax.tree.map(lambda a, b: jnp.where(is_same, a, b), own, general)
        is_traced = isinstance(weight, jax_names.Tracer)
        error = None if is_traced else relative_error(weight, made)
        if slot.static.activation_range is None:
            return made, error
        return _with_range(made, self.ranges[slot]), error

    def entries(self, packed) -> list:
        """What stands in the places of the parameters."""
        try:
            return self._tree.flatten_up_to(packed)
        except (ValueError, TypeError) as error:
            raise refusal(
                "pack",
                "packed",
                "the tree that quake_jax.pack returned",
                f"another structure: {error}",
            ) from None

    def array(self, entries, index: int):
        """One of the arrays of the parameters, as it is."""
        i = self._arrays[index]
        entry = entries[i]
        array = entry.array if isinstance(entry, PackedLeaf) else entry
        if array is None or isinstance(array, PackedWeight):
            raise ValueError(
                f"quake_jax.pack: this call needs the parameter {self.paths[i]} as it was, which "
                "no function that was given to pack did; give pack the tuple of all (function, "
                "arguments) that share the weights, or a rule that leaves it alone"
            )
        _check_whole(self.paths[i], array, self._leaves[i])
        return array

    def weight(self, entries, slot: Slot) -> list:
        """The leaves of a packed weight."""
        entry = entries[slot.leaf]
        weights = entry.weights if isinstance(entry, PackedLeaf) else (entry,)
        found = weights[slot.index] if slot.index < len(weights) else None
        wanted = jax.tree.structure(slot.static)
        if not isinstance(found, PackedWeight) or jax.tree.structure(found) != wanted:
            raise refusal("pack", f"packed {self.paths[slot.leaf]}", repr(slot.static), repr(found))
        leaves = jax.tree.leaves(found)
        for leaf, whole in zip(leaves, jax.tree.leaves(slot.static), strict=True):
            _check_whole(self.paths[slot.leaf], leaf, whole)
        return leaves


def _with_range(weight: PackedWeight, activation_range: np.ndarray) -> PackedWeight:
    return dataclasses.replace(weight, activation_range=jnp.asarray(activation_range))


def _check_whole(path: str, array, known) -> None:
    """Raise unless an array has the shape that it had when the functions were packed."""
    if array.shape != known.shape:
        expected = f"an array of shape {known.shape} (whole, in the body of jax.shard_map)"
        raise refusal("pack", f"packed {path}", expected, f"shape {array.shape}")


def bytes_of(x) -> int:
    return int(np.prod(x.shape)) * x.dtype.itemsize


def _assembled(packing, leaves) -> PackedWeight:
    return pack_primitive.assembled(leaves, packing.invars[0].aval.shape, **packing.params)


def _before_packing(program):
    """The function of what is packed."""
    (weight,) = program.eqns[-1].invars
    inner = program.jaxpr.replace(
        eqns=program.eqns[:-1],
        outvars=[weight],
        debug_info=jax_names.unnamed("weight", len(program.jaxpr.invars), 1),
    )
    function = jax_names.jaxpr_as_fun(jax_names.ClosedJaxpr(inner, program.consts))
    return lambda *arrays: function(*arrays)[0]


def relative_error(weight, packed: PackedWeight) -> float:
    """The norm of what packing changed, relative to that of a weight."""
    weight = with_split_columns(jnp.asarray(weight))
    # Of the layers of a stack one after the other: unpacked they take the memory of the model.
    is_whole = len(weight.devices()) > 1
    layers = [()] if is_whole else np.ndindex(weight.shape[:-2])
    squares = [_squares(weight, packed, index) for index in layers]
    size, difference = np.sum(squares, axis=0) if squares else (0.0, 0.0)
    return float(np.sqrt(difference / size)) if size > 0 else 0.0


@jax.jit
def _squares(weight, packed: PackedWeight, index):
    """The sums of the squares of a weight, or of one of a stack, and of what packing changed."""
    weight, packed = weight[index].astype(jnp.float32), packed[index]
    return jnp.sum(weight**2), jnp.sum((packed.unpack() - weight) ** 2)
