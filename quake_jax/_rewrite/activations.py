"""Activations: the forms in which programs write them, and what replaces each.

The forms are functions of jax.numpy, which the table of functions states; they are traced and
brought into the normal form of `expressions`, as the program is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._elementwise import gated, table
from quake_jax._rewrite import expressions, views
from quake_jax._rewrite.graph import Graph, Node, Value
from quake_jax._rewrite.match import Match, Reject, check_unused

# The value that stands for a free constant, alpha, in the forms of the table.
_ALPHA = 0.7310585786300049


@dataclasses.dataclass(frozen=True)
class Activation:
    """A row of the table of functions, as the rewriter needs it.

    Attributes:
      name: as `only` takes it.
      row: its name in the table.
      function: the public function that replaces it: f(x, order=…), and alpha=… if it has one.
      forms: what it looks like in programs.
      biased, gated: the public functions of x + bias, and of a gate and a value, or None.
    """

    name: str
    row: str
    function: Callable
    forms: tuple[Callable, ...]
    biased: Callable | None = None
    gated: Callable | None = None


@functools.cache
def _table() -> tuple[Activation, ...]:
    rows, with_alpha = [], []
    # What shares a kernel comes first: where both write the same, it says more.
    for row in sorted(table.FUNCTIONS.values(), key=lambda row: row.kernel.shares is None):
        if row.on_request:
            continue
        name, kernel = row.public.__name__, row.kernel
        alpha_forms = {
            alpha: tuple(functools.partial(form, alpha=alpha) for form in kernel.alpha_forms)
            for alpha in (1.0, _ALPHA)
        }
        forms = (row.exact, *kernel.forms, *alpha_forms[1.0])
        fused = (table.fused(row.name, kind) for kind in ("biased", "gated"))
        rows.append(Activation(name, row.name, row.quake, forms, *(f and f.quake for f in fused)))
        if kernel.alpha_forms:
            with_alpha.append(Activation(name, row.name, row.quake, alpha_forms[_ALPHA]))
    return (*rows, *with_alpha)


def names() -> set[str]:
    return {row.name for row in _table()}


@functools.cache
def _known(dtype) -> dict[tuple, list[tuple[tuple[float, ...], Activation]]]:
    """The rows by structure, with the constants that their forms have in programs of a dtype."""
    known: dict = {}
    x = jax.ShapeDtypeStruct((2,), dtype)
    for row in _table():
        for form in row.forms:
            with jax_names.without_mesh():  # the rows serve every program
                graph = Graph(jax.make_jaxpr(form)(x))
            root = graph.outputs[0]
            poly, _ = expressions.expression(root, _input_of(graph))
            structure, constants = expressions.split(poly)
            known.setdefault(structure, []).append((constants, row))
    return known


def _input_of(graph: Graph) -> Value:
    (variable,) = graph.jaxpr.invars
    for node in graph.nodes:
        for value in node.inputs:
            if value.variable is variable:
                return value
    raise ValueError("a form that does not use its argument")


def _tolerance(dtype) -> float:
    # Constants are products of rounded ones. In 16 bits those that differ by less are the same.
    return 2.0**-10 if jnp.dtype(dtype).itemsize == 2 else 2.0**-20


def _agree(found, wanted, tolerance: float) -> tuple[bool, float | None]:
    """Whether constants agree, and the one that stands where the table has alpha."""
    alpha = None
    for c, reference in zip(found, wanted, strict=True):
        for power, sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            if abs(reference - sign * _ALPHA**power) < 1e-3:
                value = (sign * c) ** power if c else 0.0
                if value <= 0 or (alpha is not None and abs(alpha - value) > tolerance * value):
                    return False, None
                alpha = value
                break
        else:
            if abs(c - reference) > tolerance * abs(reference):
                return False, None
    return True, alpha


def _look_up(poly, dtypes) -> tuple[Activation, float | None] | None:
    structure, constants = expressions.split(poly)
    for dtype in dtypes:
        for wanted, row in _known(jnp.dtype(dtype)).get(structure, ()):
            agrees, alpha = _agree(constants, wanted, _tolerance(dtype))
            if agrees:
                return row, alpha
    return None


_FARTHEST = 24


def _cone(root: Node) -> list[Value]:
    """The values that an expression with this root may be a function of, the farthest first."""
    seen: dict[Value, int] = {}
    front = [root]
    visited = {root}
    while front and len(visited) <= _FARTHEST:
        node = front.pop(0)
        for value in node.inputs:
            if value.shape != root.output.shape or views.uniform(value) is not None:
                continue
            # As deep as the program is long, so that the farthest one comes first.
            seen[value] = -1 if value.node is None else value.node.index
            inner = value.node
            if inner is not None and inner not in visited:
                if inner.primitive in expressions.ELEMENTWISE:
                    visited.add(inner)
                    front.append(inner)
    return sorted(seen, key=seen.__getitem__)


def find(root: Node) -> Match | None:
    """The activation whose last equation is `root`.

    Raises:
      Reject: if there is one that must stay.
    """
    value = root.output
    dtype = value.dtype
    if not views.is_float(value) or not isinstance(value.shape, tuple):
        return None
    rejected = None
    for variable in _cone(root):
        if variable.dtype != dtype:
            continue
        try:
            poly, nodes = expressions.expression(value, variable)
        except expressions.NoExpression:
            continue
        if not any(n.primitive in expressions.TRANSCENDENTAL for n in nodes):
            continue
        if any(_is_coarser(n.output, dtype) for n in nodes):
            continue
        found = _look_up(poly, dict.fromkeys((jnp.dtype(dtype), jnp.dtype(jnp.float32))))
        if found is None:
            continue
        row, alpha = found
        if not _is_kernel(dtype):
            raise Reject(f"dtype {dtype}", row.name, nodes)
        try:
            check_unused(nodes, root)
        except Reject as reason:
            rejected = rejected or Reject(str(reason), row.name, nodes)
            continue
        return Match(
            row.name,
            _public_name(row.function),
            root,
            frozenset(nodes),
            (variable,),
            _call,
            (("function", row.function), ("alpha", alpha)),
        )
    if rejected is not None:
        raise rejected
    return None


def _is_kernel(dtype) -> bool:
    return dtype in KERNEL_DTYPES


def _is_coarser(value: Value, dtype) -> bool:
    """Whether a step is computed in a dtype that holds less than the result's."""
    if not views.is_float(value) or value.dtype == dtype:
        return False
    return value.dtype.itemsize <= dtype.itemsize


def _public_name(function: Callable) -> str:
    if isinstance(function, functools.partial):
        keywords = ", ".join(f"{name}={value}" for name, value in function.keywords.items())
        return f"{_public_name(function.func)}({keywords})"
    return f"quake_jax.{function.__name__}"


def _call(*arrays, function, order, alpha=None, **keywords):
    if alpha is not None:
        keywords["alpha"] = alpha
    return function(*arrays, order=order, **keywords)


# With what stands beside them.


def _row_of(match: Match) -> Activation | None:
    function = dict(match.static).get("function")
    return next((row for row in _table() if row.function is function), None)


def row_and_kind(match: Match) -> tuple[str, str]:
    """The row of a match in the table, and "plain", "biased" or "gated"; both "" if it has none."""
    static = dict(match.static)
    function = static.pop("function", None)
    if any(value is not None for value in static.values()):
        return "", ""  # an alpha, or halves of one array
    for row in _table():
        functions = {"plain": row.function, "biased": row.biased, "gated": row.gated}
        for kind, of_kind in functions.items():
            if of_kind is not None and of_kind is function:
                return row.row, kind
    return "", ""


def with_bias(match: Match) -> Match:
    """The match with the addition of a bias before it, if there is one and a kernel for it."""
    row = _row_of(match)
    (x,) = match.inputs
    if row is None or row.biased is None or x.primitive != "add" or x.is_output:
        return match
    nodes = match.nodes | {x.node}
    if any(use not in nodes for use in x.uses):
        return match
    # Of one row either may be the bias: what was broadcast is.
    sides = (x.node.inputs, x.node.inputs[::-1])
    for bias, other in sorted(sides, key=lambda side: views.view(side[0]).source is side[0]):
        if other.shape != x.shape or other.dtype != x.dtype or bias.dtype != x.dtype:
            continue
        if views.uniform(bias) is not None:
            continue
        source = views.repeated_rows(bias, 1, x.shape) if x.ndim and x.shape[-1] != 1 else None
        if source is None:
            continue
        return dataclasses.replace(
            match,
            replacement=_public_name(row.biased),
            nodes=nodes,
            inputs=(other, source),
            function=_call_biased,
            static=(("function", row.biased),),
        )
    return match


def _call_biased(x, bias, *, function, order):
    return function(x, bias.reshape(-1), order=order)


def with_gate(match: Match) -> Match:
    """The match with the multiplication of its result by a value, if there is a kernel for it."""
    row = _row_of(match)
    result = match.root.output
    if row is None or len(match.inputs) != 1 or result.is_output or len(result.uses) != 1:
        return match
    (product,) = result.uses
    if product.primitive != "mul" or product.output.shape != result.shape:
        return match
    (value,) = (v for v in product.inputs if v is not result)
    if value.shape != result.shape or value.dtype != result.dtype:
        return match
    if views.uniform(value) is not None:
        return match
    (gate,) = match.inputs
    halves = _halves(gate, value)
    fused = {"root": product, "nodes": match.nodes | {product}}
    if row.name == "sigmoid":
        # There is no kernel but for a gate that is the second half of an array.
        if halves is None or halves[2]:
            return match
        source, axis, _ = halves
        return dataclasses.replace(
            match,
            name="glu",
            replacement="quake_jax.glu",
            inputs=(source,),
            static=(("function", gated.glu), ("axis", axis)),
            **fused,
        )
    if row.gated is None:
        return match
    static = (("function", row.gated),)
    inputs: tuple[Value, ...] = (gate, value)
    if halves is not None and halves[1] == gate.ndim - 1 and len(value.uses) == 1:
        inputs, static = (halves[0],), (*static, ("gate_first", halves[2]))
    return dataclasses.replace(
        match, replacement=_public_name(row.gated), inputs=inputs, static=static, **fused
    )


def _part(value: Value):
    """(source, axis, start, size) if a value is a part of a source along one axis."""
    node = value.node
    if node is None:
        return None
    source = node.inputs[0] if node.inputs else None
    if node.primitive == "split":
        sizes = [int(n) for n in node.params["sizes"]]
        i = node.outputs.index(value)
        return source, node.params["axis"], sum(sizes[:i]), sizes[i]
    if node.primitive == "slice" and not views.has_steps(node):
        starts = node.params["start_indices"]
        cut = [d for d in range(value.ndim) if value.shape[d] != source.shape[d]]
        if len(cut) == 1:
            return source, cut[0], starts[cut[0]], value.shape[cut[0]]
    return None


def _halves(gate: Value, value: Value) -> tuple[Value, int, bool] | None:
    """(source, axis, whether the gate comes first) if they are the halves of one array."""
    a, b = _part(gate), _part(value)
    if a is None or b is None or a[0] is not b[0] or a[1] != b[1] or a[3] != b[3]:
        return None
    source, axis, start, size = a
    if sorted((start, b[2])) != [0, size] or source.shape[axis] != 2 * size:
        return None
    return source, axis, start == 0
