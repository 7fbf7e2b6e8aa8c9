"""The dense layer with its derivative, which is that of x · unpack(W) in float32: rounding and
quantisation count as the identity.

A packed weight is a constant. What the derivative needs of the product is computed again, so that a
gradient keeps the packed weight and not the array that it stands for.

Layers one after the other are one function here if there are codes between them: integers have no
derivatives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from quake_jax._core.config import EXACT
from quake_jax._dense import primitive, reference
from quake_jax._dense.operands import Call, Operands


def _call(call: Call, operands: Operands) -> list[jax.Array]:
    if call.order == EXACT:
        return reference.dense(call, operands)
    return list(primitive.dense(*jax.tree.leaves(operands), **vars(call)))


def _one_by_one(
    function: Callable, calls: Sequence[Call], layers: Sequence[Operands]
) -> list[jax.Array]:
    """The results of the last call, where each takes the result of the one before it as x."""
    results = [layers[0].x]
    for call, operands in zip(calls, layers, strict=True):
        results = function(call, operands._replace(x=results[0]))
    return results


def _dense(calls: tuple[Call, ...], layers: tuple[Operands, ...]) -> list[jax.Array]:
    return _one_by_one(_call, calls, layers)


_dense.__name__ = _dense.__qualname__ = "dense"
#: of the calls and their operands; x is None but in the first
dense = jax.custom_jvp(_dense, nondiff_argnums=(0,))


def _parts(operands: Operands) -> tuple[dict, dict]:
    """What has derivatives, and what has not, of a layer, each by name."""
    rows = ("x", "norm_scale", "norm_offset", "residual")
    moving = {name: getattr(operands, name) for name in rows}
    moving["biases"] = [w.bias for w in operands.weights]
    others = ("permutation", "table", "x_range", "out_range")
    fixed = {name: getattr(operands, name) for name in others}
    fixed["weights"] = [w._replace(bias=None) for w in operands.weights]
    return moving, fixed


def _joined(moving: dict, fixed: dict) -> Operands:
    weights = zip(fixed["weights"], moving["biases"], strict=True)
    return Operands(
        **{k: v for k, v in (moving | fixed).items() if k not in ("weights", "biases")},
        weights=tuple(w._replace(bias=bias) for w, bias in weights),
    )


@functools.partial(dense.defjvp, symbolic_zeros=True)
def _tangent_rule(calls, primals, tangents):
    (layers,), (tangents,) = primals, tangents
    moving, fixed = zip(*map(_parts, layers), strict=True)
    moving_tangents, fixed_tangents = zip(*map(_parts, tangents), strict=True)
    for tangent in jax.tree.leaves(fixed_tangents):
        if not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0:
            raise TypeError(
                "quake_jax.dense: a packed weight is a constant, which has no derivative; "
                "differentiate with respect to x, bias, gate_bias, residual or norm, or with an "
                "array in place of the packed weight"
            )
    leaves, tree = jax.tree.flatten(moving)
    directions = jax.tree.leaves(moving_tangents)
    at = [i for i, t in enumerate(directions) if not isinstance(t, SymbolicZero)]

    @jax.checkpoint
    def of_those_that_move(values, leaves, fixed):
        leaves = list(leaves)
        for i, value in zip(at, values, strict=True):
            leaves[i] = value
        layers = [*map(_joined, jax.tree.unflatten(tree, leaves), fixed)]
        return _one_by_one(reference.straight_through, calls, layers)

    results = dense(calls, layers)
    if not at:
        return results, [jnp.zeros_like(y) for y in results]
    _, derivatives = jax.jvp(
        lambda *values: of_those_that_move(values, leaves, fixed),
        [leaves[i] for i in at],
        [directions[i] for i in at],
    )
    return results, [t.astype(y.dtype) for t, y in zip(derivatives, results, strict=True)]
