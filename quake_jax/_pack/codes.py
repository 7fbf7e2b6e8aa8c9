"""Weights whose parameters are quantised already, such as a `QArray` of qwix: packed by the codes
and scales that they have.

A program makes such a weight: codes, less zero points, times scales, arranged in some way. That it
is no more than that need not be read off its equations: of scales that are 1 it makes the codes,
and of codes that are 1 and zero points that are 0 the scales, where these lie in the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from quake_jax._dense import foreign, layout
from quake_jax._dense.packed import PackedWeight
from quake_jax._dense.sharding import with_split_columns
from quake_jax._rewrite import views
from quake_jax._rewrite.weights import CALLS

CODES, ZEROS, SCALES = "qvalue", "zero_point", "scale"
# Equations that make weights of codes. What they make is compared with codes · scales.
_ARRANGING = {
    *("reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "concatenate"),
    *("slice", "split", "unstack", "rev", *views.IDENTITIES),
}
_ARITHMETIC = {"mul", "sub", "add"}


def roles(leaves: Sequence, qarray=None) -> list[str]:
    """What each of some parameters is in a weight; `qarray` is what they are the leaves of."""
    found = []
    for leaf in leaves:
        names = (name for name in (CODES, ZEROS, SCALES) if getattr(qarray, name, None) is leaf)
        is_integer = jnp.issubdtype(getattr(leaf, "dtype", float), jnp.integer)
        found.append(next(names, CODES if is_integer else SCALES))
    return found


def is_quantized(node) -> bool:
    """Whether a node of the parameters is an array of qwix."""
    return foreign.is_qarray(node) and all(
        hasattr(getattr(node, x), "shape") for x in (CODES, SCALES)
    )


def has_four_bits(qarray) -> bool:
    dtype = qarray.qvalue.dtype
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits <= 4


def tile_of(qarray) -> int | None:
    """How many rows share a scale of an array of qwix, if groups of a packed weight can be so."""
    shapes = zip(qarray.qvalue.shape, qarray.scale.shape, strict=False)
    tiles = {whole // part for whole, part in shapes if 1 < part < whole}
    size = tiles.pop() if len(tiles) == 1 else 0
    return size if size and size % layout.GROUP_MULTIPLE == 0 else None


def taken_over(program, arrays: Sequence, kinds: Sequence[str]):
    """Whether a weight is codes · scales as a format has them, the weight, and it packed so.

    Args:
      program: the closed jaxpr that packs the weight.
      arrays: what it takes.
      kinds: the roles of these.

    Returns:
      None if none of its arrays are codes, or the program does other things than these need.
    """
    if CODES not in kinds:
        return None
    *before, packing = program.eqns
    (result,) = packing.invars
    parameters = {name: packing.params[name] for name in ("dtype", "group_size", "activations")}
    wide = [_wide(x) for x in arrays]

    def made(keep: str | None):
        replaced = [
            x
            if keep in (None, CODES if kind == ZEROS else kind)
            # Without codes and zero points, or without scales.
            else (jnp.zeros_like if kind == ZEROS else jnp.ones_like)(x)
            for x, kind in zip(wide, kinds, strict=True)
        ]
        found = _exactly(program.jaxpr, before, program.consts, replaced, [result])
        return None if found is None else with_split_columns(found[0])

    weight = made(None)
    if weight is None:
        return None
    return _packed(weight, made(CODES), made(SCALES), **parameters)


@functools.partial(jax.jit, static_argnames=("dtype", "group_size", "activations"))
def _packed(weight, codes, scales, *, dtype: str, group_size: int | None, activations: str | None):
    *lead, k, n = weight.shape
    by_group = scales.reshape(*lead, k // group_size if group_size else 1, group_size or k, n)
    one = by_group[..., :1, :]
    # As in `PackedWeight.from_codes`.
    is_long = group_size is None and activations is not None and k * 255 * 128 >= 2**31
    low, high = (-8, 7) if dtype == "int4" else (-127 if is_long else -128, 127)
    agrees = (codes * scales == weight) & (codes == jnp.rint(codes)) & (low <= codes)
    agrees &= codes <= high
    # Scales of groups are rounded to float16: that must not cost more than its last bit.
    kept = one.astype(jnp.float16).astype(jnp.float32) if group_size else one
    near = jnp.abs(kept - one) <= jnp.abs(one) * 2.0**-11
    is_same = jnp.all(agrees) & jnp.all(by_group == one) & jnp.all(near)
    codes = jnp.clip(codes, low, high) + (8 if dtype == "int4" else 0)
    scales = kept[..., 0, :] if group_size else kept[..., 0, 0, :]
    codes = codes.astype(layout.CODES[dtype])
    return is_same, weight, PackedWeight.from_codes(codes, scales, dtype, activations=activations)


def _wide(x):
    """In float32, which has all codes of 8 bits."""
    return jnp.asarray(x, jnp.float32)


def _exactly(jaxpr, equations, consts, arrays, results) -> list | None:
    """What equations of a jaxpr make, in float32 throughout, without roundings in between.

    None if there is one among them of which that is not known to be the same.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arrays), strict=True))
    # Stacks of layers are large: no more of them than needed.
    last = {v: e for e in equations for v in e.invars if not hasattr(v, "val")}

    def value(atom):
        return _wide(atom.val if hasattr(atom, "val") else values[atom])

    for equation in equations:
        name, params = equation.primitive.name, equation.params
        operands = [value(v) for v in equation.invars]
        if name in CALLS and "jaxpr" in params:
            inner = params["jaxpr"]
            constants = getattr(inner, "consts", ())
            inner = getattr(inner, "jaxpr", inner)
            made = _exactly(inner, inner.eqns, constants, operands, inner.outvars)
            if made is None:
                return None
        elif name == "convert_element_type":
            if not _widens(equation.invars[0].aval.dtype, params["new_dtype"]):
                return None
            made = operands
        elif name in _ARRANGING or name in _ARITHMETIC and _has_room(equation.outvars[0].aval):
            made = equation.primitive.bind(*operands, **params)
            made = made if equation.primitive.multiple_results else [made]
        else:
            return None
        values.update(zip(equation.outvars, made, strict=True))
        for v in {v for v in equation.invars if not hasattr(v, "val")}:
            if last[v] is equation and v not in results:
                del values[v]
    return [value(v) for v in results]


def _has_room(aval) -> bool:
    """Whether sums and products of codes do not overflow."""
    return jnp.issubdtype(aval.dtype, jnp.floating) or aval.dtype.itemsize >= 4


def _widens(before, after) -> bool:
    """Whether a cast keeps codes, as one to a floating-point number of 16 bits or more does."""
    if jnp.issubdtype(after, jnp.floating):
        return jnp.finfo(after).bits >= 16
    is_integer = jnp.issubdtype(before, jnp.integer) and jnp.issubdtype(after, jnp.integer)
    return is_integer and (
        jnp.iinfo(before).min >= jnp.iinfo(after).min
        and jnp.iinfo(before).max <= jnp.iinfo(after).max
    )
