"""The primitive of dense layers: shapes, lowering, batching, and what it is on other platforms.

Its parameters are the fields of `Call`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._core import jax_names, partitioning
from quake_jax._core.jax_names import mlir
from quake_jax._core.primitive import custom_call_of_batch, make_primitive, merged, typed
from quake_jax._dense import reference
from quake_jax._dense.layout import PANEL
from quake_jax._dense.operands import Call, Operands


def _shapes(*avals, **parameters):
    call, x = Call(**parameters), avals[0]
    # Stacked weights may be split where x is not.
    stack = next((a.sharding.spec[0] for a in avals if a.sharding.spec[0] is not None), None)
    rows = x.sharding.spec[1:-1]
    stack = None if stack in rows else stack
    panels = [w.codes.sharding.spec[1] for w in call.by_name(avals).weights]
    # Beside arrays of a mesh there may be some of none.
    known = next((a.sharding for a in avals if not a.sharding.mesh.empty), x.sharding)
    return tuple(
        x.update(
            shape=(*x.shape[:-1], n),
            dtype=np.dtype(call.dtype),
            sharding=known.update(spec=(stack, *rows, columns)),
            weak_type=False,
        )
        for n, columns in zip(call.columns, panels, strict=False)
    )


def _are_rows(operands, call: Call) -> list[bool]:
    """Which operands have rows of their own, x and residual; the others belong to the weights."""
    last = len(operands) - 1
    return [i == 0 or (call.has_residual and i == last) for i in range(len(operands))]


def _axes(operands: Operands, results: Sequence, panels: str | None) -> tuple[list, list]:
    """Along which axes a call may be split: stacked weights, and all axes of x but the last.

    And `panels`, if columns have two axes, [panels][columns of a panel].
    """
    lead = ("stack", *range(1, len(operands.x.shape) - 1))

    def of(x, *first):
        return [*first, *[None] * (len(x.shape) - len(first))]

    axes = jax.tree.map(lambda x: of(x, "stack"), operands)
    axes = axes._replace(
        x=of(operands.x, *lead),
        weights=jax.tree.map(lambda x: of(x, "stack", panels), operands.weights),
        residual=jax.tree.map(lambda x: of(x, *lead, panels), operands.residual),
    )
    inputs = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, list))
    return inputs, [of(y, *lead, panels) for y in results]


def _with_columns(operands: Operands, change: Callable) -> Operands:
    """The operands, with a change of those whose last axis is that of columns."""
    weights = tuple(w._replace(bias=jax.tree.map(change, w.bias)) for w in operands.weights)
    return operands._replace(weights=weights, residual=jax.tree.map(change, operands.residual))


def _lower_split(context, *operands, target: str, **parameters):
    """The call as one that XLA may split, columns too where all panels are full."""
    call = Call(**parameters)
    is_full = all(n % PANEL == 0 for n in call.columns)

    def cut(aval):
        if not is_full:
            return aval
        *lead, n = aval.shape
        sharding = aval.sharding.update(spec=(*aval.sharding.spec, None))
        return aval.update(shape=(*lead, n // PANEL, PANEL), sharding=sharding)

    named = _with_columns(call.by_name(context.avals_in), cut)
    avals, results = jax.tree.leaves(named), [*map(cut, context.avals_out)]
    inputs, outputs = _axes(named, results, "panels" if is_full else None)
    inner = context.replace(avals_in=avals, avals_out=results)
    values = partitioning.lower_split_along_axes(
        inner,
        *(jax_names.reshape(inner, x, aval) for x, aval in zip(operands, avals, strict=True)),
        function=functools.partial(_of_panels if is_full else dense, **parameters),
        inputs=inputs,
        results=outputs,
        description=f"{target} {call}",
        firm=[i for i, has_rows in enumerate(_are_rows(operands, call)) if not has_rows],
    )
    return [
        jax_names.reshape(context, y, aval)
        for y, aval in zip(values, context.avals_out, strict=True)
    ]


def _of_panels(*operands, **parameters):
    """`dense` of arrays whose columns have two axes, and of as many panels as there are."""
    call = Call(**parameters)
    named = _with_columns(
        call.by_name(operands), lambda x: x.reshape(*x.shape[:-2], x.shape[-2] * PANEL)
    )
    columns = tuple(
        w.codes.shape[1] * PANEL for w, _ in zip(named.weights, call.columns, strict=False)
    )
    results = dense(*jax.tree.leaves(named), **parameters | {"columns": columns})
    return [y.reshape(*y.shape[:-1], y.shape[-1] // PANEL, PANEL) for y in results]


def _lower(context, *operands, target: str, **parameters):
    call, avals = Call(**parameters), context.avals_in
    sizes = [size for x in (*avals, *context.avals_out) for size in x.shape]
    if any(isinstance(size, int) and size == 0 for size in sizes):
        # XLA calls no kernel for empty arrays, and a product over nothing is not empty.
        return mlir.lower_fun(_elsewhere, multiple_results=True)(context, *operands, **parameters)
    if partitioning.can_split_along_axes(context):
        return typed(context, _lower_split(context, *operands, target=target, **parameters))
    if len(avals[0].shape) != 3:
        lowered = mlir.lower_fun(_of_one_axis_of_rows, multiple_results=True)
        return lowered(context, *operands, **parameters)
    stack = avals[0].shape[0]
    is_split = stack != 1 and all(x.shape[0] == stack for x in avals)
    values = custom_call_of_batch(
        context, *operands, target=target, is_split=is_split, **call.attributes()
    )
    return typed(context, values)


def _of_one_axis_of_rows(*operands, **parameters):
    are_rows = _are_rows(operands, Call(**parameters))
    lead = operands[0].shape[:-1]
    flat = [
        x.reshape(lead[0], math.prod(lead[1:]), x.shape[-1]) if has_rows else x
        for x, has_rows in zip(operands, are_rows, strict=True)
    ]
    return [y.reshape(*lead, y.shape[-1]) for y in dense(*flat, **parameters)]


def _batch(bind, operands, axes, **parameters):
    call = Call(**parameters)
    are_rows = _are_rows(operands, call)
    parts = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    if all(a is None or rows for a, rows in zip(axes, are_rows, strict=True)):
        # More rows of the same weights.
        moved = []
        for x, a, rows in zip(operands, axes, are_rows, strict=True):
            if a is not None:
                x = jnp.moveaxis(x, a, 1)
            elif rows:
                x = jnp.broadcast_to(x[:, None], (x.shape[0], parts, *x.shape[1:]))
            moved.append(x)
        return bind(*moved, **parameters), [1] * len(call.columns)
    # More weights, in front of those that are stacked already.
    moved = [
        x[None] if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)
    ]
    stack = moved[0].shape[1]
    moved = [
        # What all weights share stays one.
        x[0]
        if x.shape[:2] == (1, 1) and not rows
        else merged(jnp.broadcast_to(x, (parts, stack, *x.shape[2:])))
        for x, rows in zip(moved, are_rows, strict=True)
    ]
    results = bind(*moved, **parameters)
    return [y.reshape(parts, stack, *y.shape[1:]) for y in results], [0] * len(call.columns)


def _elsewhere(*operands, **parameters):
    call = Call(**parameters)
    return reference.dense(call, call.by_name(operands))


dense = make_primitive(
    "dense",
    shape=_shapes,
    lower=_lower,
    batch=_batch,
    multiple_results=True,
    elsewhere=_elsewhere,
)
