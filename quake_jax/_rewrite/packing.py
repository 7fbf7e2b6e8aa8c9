"""Where arrays lie in memory: query, key and value that are parts of one array, side by side."""

from __future__ import annotations

import math

from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Value
from quake_jax._rewrite.labels import SIZE, Labels

_ARRANGING = (
    "transpose",
    "reshape",
    "slice",
    "squeeze",
    "split",
    "unstack",
    "expand_dims",
    "broadcast_in_dim",
)


def _strided(value: Value):
    """(root, offset, strides) of a value as a part of an array in row-major order, or None."""
    chain = []
    root = value
    while root.node is not None and root.node.primitive in _ARRANGING:
        chain.append(root)
        root = root.node.inputs[0]
    shape, offset = list(root.shape), 0
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    for step in reversed(chain):
        node, p = step.node, step.node.params
        new = list(step.shape)
        if node.primitive == "transpose":
            strides = [strides[d] for d in p["permutation"]]
        elif node.primitive == "slice":
            if views.has_steps(node):
                return None
            offset += sum(n * s for n, s in zip(p["start_indices"], strides, strict=True))
        elif node.primitive == "unstack":
            axis = p["axis"] % len(shape)
            offset += node.outputs.index(step) * strides[axis]
            strides = [*strides[:axis], *strides[axis + 1 :]]
        elif node.primitive == "split":
            sizes = p["sizes"][: node.outputs.index(step)]
            offset += int(sum(sizes)) * strides[p["axis"]]
        else:
            transposes = node.primitive == "reshape" and p.get("dimensions")
            if math.prod(new) != math.prod(shape) or transposes:
                return None
            strides = _reshaped(shape, strides, new)
            if strides is None:
                return None
        shape = new
    return root, int(offset), strides


def _reshaped(shape, strides, new) -> list[int] | None:
    """The strides of a reshaped array, if it needs no copy. Those of axes of size 1 are 0."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    result, i = [], 0
    rest, stride = 1, 0  # of the old axes that are being cut up
    for n in new:
        if n == 1:
            result.append(0)
            continue
        while rest < n:
            if i == len(old):
                return None
            size, s = old[i]
            if rest > 1 and stride != size * s:
                return None
            rest, stride, i = rest * size, s, i + 1
        if rest % n:
            return None
        rest //= n
        result.append(stride * rest)
    return result


def places_in_memory(x) -> dict:
    """The labels of an array's axes, numbered from the outermost in memory."""
    found = _strided(x.value)
    if found is None:
        return x.axes
    _, _, strides = found
    order = sorted(x.axes, key=lambda label: (-strides[x.axes[label]], x.axes[label], label))
    return {label: i for i, label in enumerate(order)}


def packed(query, key, value, labels: Labels) -> tuple[Value, int] | None:
    """(array, axis) if query, key and value lie side by side in one array; axis is -3 or -2."""
    found = [_strided(x.value) for x in (query, key, value)]
    if None in found or labels.groups or len({id(root) for root, _, _ in found}) != 1:
        return None
    if any(SIZE not in x.axes for x in (query, key, value)):
        return None
    root = found[0][0]
    sizes = dict(labels.sizes)
    heads, size = labels.size(labels.heads), query.value.shape[query.axes[SIZE]]
    length = labels.size(labels.length)
    row = 3 * heads * size
    if not labels.length or sizes[labels.keys] != length:
        return None
    if math.prod(root.shape) != labels.size(labels.batch) * length * row:
        return None
    for axis, step, head in ((-3, heads * size, size), (-2, size, 3 * size)):
        places = {SIZE: 1}
        for stride, part in (
            (head, labels.heads),
            (row, labels.length),
            (row * length, labels.batch),
        ):
            for label in reversed(part):
                places[label] = stride
                stride *= sizes[label]
        keysplaces_in_memory = {**places, labels.keys: places[labels.length[0]]}
        del keysplaces_in_memory[labels.length[0]]
        if all(
            offset == i * step
            and x.value.shape[x.axes[SIZE]] == size
            and all(j in x.axes and strides[x.axes[j]] == s for j, s in wanted.items())
            for i, (x, (_, offset, strides), wanted) in enumerate(
                zip(
                    (query, key, value),
                    found,
                    (places, keysplaces_in_memory, keysplaces_in_memory),
                    strict=True,
                )
            )
        ):
            return root, axis
    return None
