"""Looking through equations that only arrange elements, and evaluating those that need no input.

A view says which axis of a source each axis of a value is: None for one along which the value is
constant. Axes of size 1 are None too.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import threading
from collections.abc import Callable, Sequence

import numpy as np

from quake_jax._rewrite.graph import Node, Value
from quake_jax._rewrite.labels import Axes, regrouped

# A mask is evaluated when the program is rewritten if it has at most so many elements.
LARGEST_CONSTANT = 1 << 24

# Equations whose result is their operand, as far as values go.
IDENTITIES = ("copy", "copy_p", "pvary", "pcast")


@dataclasses.dataclass(frozen=True)
class View:
    """`axes[i]` is the axis of `source` that axis i is, or None; `nodes` lie between them."""

    source: Value
    axes: tuple[int | None, ...]
    nodes: tuple[Node, ...] = ()


def _axes_of_reshape(old: Sequence[int], new: Sequence[int]) -> tuple[int | None, ...] | None:
    """The axes of a reshape that only adds and drops axes of size 1; None for another."""
    kept = [i for i, n in enumerate(old) if n != 1]
    if [old[i] for i in kept] != [n for n in new if n != 1]:
        return None
    remaining = iter(kept)
    return tuple(next(remaining) if n != 1 else None for n in new)


def axes_of(node: Node) -> tuple[int | None, ...] | None:
    """Which axis of its operand each axis of a node's result is; None if it rearranges elements."""
    name, params = node.primitive, node.params
    if not node.inputs:
        return None
    old, new = node.inputs[0].shape, node.output.shape
    if name == "broadcast_in_dim":
        axes: list[int | None] = [None] * len(new)
        for i, d in enumerate(params["broadcast_dimensions"]):
            if old[i] != 1 and old[i] == new[d]:
                axes[d] = i
        return tuple(axes)
    if name == "transpose":
        axes = list(params["permutation"])
    elif name == "squeeze":
        dropped = {d % len(old) for d in params["dimensions"]}
        axes = [d for d in range(len(old)) if d not in dropped]
    elif name == "expand_dims":
        return _axes_of_reshape(old, new)
    elif name == "reshape":
        return None if params.get("dimensions") else _axes_of_reshape(old, new)
    elif name in IDENTITIES:
        axes = list(range(len(new)))
    else:
        return None
    return tuple(None if old[d] == 1 else int(d) for d in axes)


def compose(outer: Sequence[int | None], inner: Sequence[int | None]) -> tuple[int | None, ...]:
    return tuple(None if a is None else inner[a] for a in outer)


def view(value: Value, through: Callable[[Node], bool] = lambda node: False) -> View:
    """Look as far back as elements are only arranged, and through nodes that `through` accepts.

    Those take the shape of their first operand.
    """
    axes: tuple[int | None, ...] = tuple(None if n == 1 else i for i, n in enumerate(value.shape))
    nodes = []
    while value.node is not None:
        step = axes_of(value.node)
        if step is None and through(value.node):
            step = tuple(range(value.ndim))
        if step is None:
            break
        nodes.append(value.node)
        axes = compose(axes, step)
        value = value.node.inputs[0]
    return View(value, axes, tuple(nodes))


def repeated(value: Value, shape: Sequence[int], along: range) -> View | None:
    """The view of an array that a value repeats along all axes but those in `along`, if it has all
    of these, in their order, and nothing else; None if it is another. `shape` is what the value
    broadcasts to."""
    if value.ndim != len(shape):
        return None
    found = view(value)
    others = (a for i, a in enumerate(found.axes) if i not in along)
    kept = [found.axes[i] for i in along if found.axes[i] is not None]
    # Axes of size 1 have no label.
    sizes = [shape[i] for i in along if shape[i] != 1]
    if any(a is not None for a in others) or kept != sorted(kept):
        return None
    if [found.source.shape[a] for a in kept] != sizes:
        return None
    return found if math.prod(found.source.shape) == math.prod(sizes) else None


def repeated_rows(value: Value, axes: int, shape: Sequence[int]) -> Value | None:
    """The array that a value repeats along all but its last `axes` axes, or None."""
    found = repeated(value, shape, range(len(shape) - axes, len(shape))) if axes else None
    return None if found is None else found.source


def followed(
    value: Value, axes: Axes, sizes: dict, through=lambda node: False, may_cut: bool = False
) -> tuple[Value, Axes, dict, list[Node]]:
    """Look back as `view` does, and through equations that merge axes or cut them up.

    Args:
      value: with the labels `axes`, whose sizes are `sizes`.
      through: see `view`.
      may_cut: see `labels.regrouped`.

    Returns:
      The source, its axes by label without those along which the value is constant, the labels'
      sizes, and the nodes between.
    """
    nodes: list[Node] = []
    axes = {label: a for label, a in axes.items() if value.ndim and value.shape[a] != 1}
    while value.node is not None:
        node = value.node
        step = axes_of(node)
        if step is None and through(node):
            step = tuple(range(value.ndim))
        if step is not None:
            axes = {label: step[a] for label, a in axes.items() if step[a] is not None}
        elif merges_or_cuts(node):
            found = regrouped(value.shape, node.inputs[0].shape, axes, sizes, may_cut)
            if found is None:
                break
            axes, sizes = found
        else:
            break
        nodes.append(node)
        value = node.inputs[0]
    return value, axes, sizes, nodes


def merges_or_cuts(node: Node) -> bool:
    """Whether a node is a reshape that keeps the order of the axes."""
    return node.primitive == "reshape" and not node.params.get("dimensions")


def has_steps(node: Node) -> bool:
    """Whether a slice leaves out elements between its first and its last."""
    return any(n != 1 for n in node.params["strides"] or ())


def is_cast(node: Node) -> bool:
    """Whether a node converts floating-point numbers to others, of at least 16 bits.

    What has fewer bits is quantized, which is to show in the result.
    """
    return node.primitive == "convert_element_type" and all(
        is_float(value) and value.dtype.itemsize >= 2 for value in (node.inputs[0], node.output)
    )


def is_name(node: Node) -> bool:
    """Whether a node only says what remat's policies call an array: jax.ad_checkpoint's.

    It is none of IDENTITIES, whose operands may be read in their place: then it would be lost to
    the policy.
    """
    return node.primitive == "name"


def kind(value: Value) -> str:
    """NumPy's letter for the kind of dtype, "V" for the floating-point ones that NumPy lacks."""
    return getattr(getattr(value.aval, "dtype", None), "kind", "O")


def is_float(value: Value) -> bool:
    return str(value.dtype).startswith(("float", "bfloat"))


def same(a: Value, b: Value, depth: int = 12) -> bool:
    """Whether two values are the same, by name or because the same equations make them."""
    if a is b:
        return True
    if a.aval.shape != b.aval.shape or a.dtype != b.dtype:
        return False
    if a.const is not None or b.const is not None:
        return (
            a.const is not None
            and b.const is not None
            and a.ndim == 0
            and bool(np.asarray(a.const) == np.asarray(b.const))
        )
    if a.node is None or b.node is None or depth == 0:
        return False
    m, n = a.node, b.node
    if m.primitive != n.primitive or m.acts or len(m.inputs) != len(n.inputs):
        return False
    if m.outputs.index(a) != n.outputs.index(b) or m.params != n.params:
        return False
    return all(same(x, y, depth - 1) for x, y in zip(m.inputs, n.inputs, strict=True))


_BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "max": np.maximum,
    "min": np.minimum,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_UNARY = {"neg": operator.neg, "not": np.invert, "abs": np.abs}
# Of scalars only: they make factors.
_SCALAR = {
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "log": np.log,
    "exp": np.exp,
    "square": np.square,
    "tanh": np.tanh,
}


def uniform(value: Value) -> float | None:
    """The number that all elements of a value are, if it is known before the program runs."""
    if "uniform" not in value.memo:
        value.memo["uniform"] = _uniform(value)
    return value.memo["uniform"]


def _uniform(value: Value) -> float | None:
    if value.const is not None:
        if math.prod(value.shape) != 1 or kind(value) not in "biufV":
            return None
        return float(np.asarray(value.const).reshape(()).astype(np.float64))
    node = value.node
    if node is None or not node.inputs or len(node.outputs) != 1:
        return None
    name = node.primitive
    known = (*_BINARY, *_UNARY, *_SCALAR, *IDENTITIES, "div", "pow", "integer_pow")
    arranging = ("broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "stop_gradient")
    if name not in (*known, *arranging, "convert_element_type"):
        return None
    numbers = [uniform(v) for v in node.inputs]
    if any(n is None for n in numbers):
        return None
    if name in arranging or name in IDENTITIES:
        return numbers[0]
    dtype = np.dtype(value.dtype)
    with np.errstate(all="ignore"):
        arrays = [np.float64(n) for n in numbers]
        if name == "div":
            exact = dtype.kind != "i"
            result = arrays[0] / arrays[1] if exact else np.trunc(arrays[0] / arrays[1])
        elif name == "pow":
            result = arrays[0] ** arrays[1]
        elif name == "integer_pow":
            result = arrays[0] ** node.params["y"]
        elif name == "convert_element_type":
            result = arrays[0]
        elif name in ("and", "or", "xor", "not"):
            return None
        else:
            result = {**_BINARY, **_UNARY, **_SCALAR}[name](*arrays)
        return float(np.asarray(result).astype(dtype).astype(np.float64))


def constant(value: Value) -> np.ndarray | None:
    """The elements of a value of integers or booleans, if they are known before the program runs.

    Floating-point values count if masks are made of them: 0 and 1, compared or selected.
    """
    if "constant" not in value.memo:
        value.memo["constant"] = _constant(value)
    return value.memo["constant"]


# What has been evaluated in this thread, by how it is made: the layers of a model make the same
# mask, each on its own. `forget_constants` empties it.
_evaluated = threading.local()


def remembered(key, compute: Callable):
    """The result of `compute()`, evaluated once for a key until constants are forgotten.

    If the key is None it is not remembered.
    """
    if key is None:
        return compute()
    known = _evaluated.__dict__
    if key not in known:
        known[key] = compute()
    return known[key]


def forget_constants() -> None:
    _evaluated.__dict__.clear()


def recipe(value: Value, depth: int = 16):
    """A hashable description of how a constant is made of scalars, or None."""
    if value.const is not None:
        is_scalar = value.ndim == 0
        return (str(value.dtype), np.asarray(value.const).item()) if is_scalar else None
    node = value.node
    if node is None or depth == 0:
        return None
    inputs = tuple(recipe(v, depth - 1) for v in node.inputs)
    if None in inputs:
        return None
    params = tuple(sorted((k, str(v)) for k, v in node.params.items()))
    return (node.primitive, params, value.shape, str(value.dtype), inputs)


def _constant(value: Value) -> np.ndarray | None:
    return remembered(recipe(value), lambda: _evaluate(value))


def _evaluate(value: Value) -> np.ndarray | None:
    if not all(isinstance(n, int) for n in value.shape):
        return None
    if math.prod(value.shape) > LARGEST_CONSTANT or kind(value) not in "biufV":
        return None
    if value.const is not None:
        # An array may be spread over several processes.
        whole = getattr(value.const, "is_fully_addressable", True)
        return np.asarray(value.const) if whole else None
    node = value.node
    if node is None or len(node.outputs) != 1 or node.acts:
        return None
    if node.primitive == "iota":
        d = node.params["dimension"]
        line = np.arange(value.shape[d], dtype=value.dtype)
        line = line.reshape([-1 if i == d else 1 for i in range(value.ndim)])
        return np.broadcast_to(line, value.shape)
    if node.primitive not in _EVALUATORS:
        return None
    inputs = []
    for v in node.inputs:
        inputs.append(constant(v))
        if inputs[-1] is None:
            return None
    with np.errstate(all="ignore"):
        result = _EVALUATORS[node.primitive](node, *inputs)
    if result is None:
        return None
    result = np.asarray(result, value.dtype)
    return result if result.shape == value.shape else np.broadcast_to(result, value.shape)


def _broadcast(node, x):
    shape = [1] * node.output.ndim
    for n, d in zip(x.shape, node.params["broadcast_dimensions"], strict=True):
        shape[d] = n
    return np.broadcast_to(x.reshape(shape), node.output.shape)


def _slice(node, x):
    p = node.params
    strides = p["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


def _rearranged(node, x):
    if node.params.get("dimensions") and node.primitive == "reshape":
        return None
    return x.reshape(node.output.shape)


_EVALUATORS: dict[str, Callable] = {
    **{name: (lambda node, x, y, f=f: f(x, y)) for name, f in _BINARY.items()},
    **{name: (lambda node, x, f=f: f(x)) for name, f in _UNARY.items()},
    **{name: (lambda node, x: x) for name in (*IDENTITIES, "convert_element_type")},
    "stop_gradient": lambda node, x: x,
    "broadcast_in_dim": _broadcast,
    "reshape": _rearranged,
    "squeeze": _rearranged,
    "expand_dims": _rearranged,
    "transpose": lambda node, x: x.transpose(node.params["permutation"]),
    "slice": _slice,
    "select_n": lambda node, which, *cases: (
        np.where(which, cases[1], cases[0]) if len(cases) == 2 and which.dtype == bool else None
    ),
    "concatenate": lambda node, *xs: np.concatenate(xs, node.params["dimension"]),
}
