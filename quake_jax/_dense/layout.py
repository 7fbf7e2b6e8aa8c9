"""How a packed weight lies in memory, and what its codes stand for.

Columns lie in panels of 16, a panel in words of 32 bits: [panels][words][16]. A word has 1, 2, 4 or
8 neighbouring rows of a column. It is the same on all machines, and cpu_kernels/dense reads it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

PANEL = 16
# Groups along K are whole vectors of every instruction set.
GROUP_MULTIPLE = 32
# The formats, in the kernel's order, and the rows of a word.
ROWS = {"float32": 1, "bfloat16": 2, "int8": 4, "int4": 8}
CODES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8, "int4": jnp.uint8}
# The largest magnitude of a code.
LARGEST = {"int8": 127, "int4": 7}


def default_table():
    """What 4-bit codes stand for where a weight has no table of its own.

    Computed, so that no program has a constant for it.
    """
    return jnp.arange(16, dtype=jnp.float32) - 8


def shapes_of(dtype: str, k: int, n: int, group_size: int | None, activations: str | None) -> dict:
    """For each leaf its shape without leading axes and its dtype; those left out are None."""
    panels, groups = -(-n // PANEL), k // group_size if group_size else 0
    words = (panels, -(-k // ROWS[dtype]), PANEL)
    bytes_of_word = {"float32": (), "bfloat16": (2,)}.get(dtype, (4,))
    shapes = {"codes": ((*words, *bytes_of_word), CODES[dtype])}
    if group_size:
        shapes["scales"] = shapes["offsets"] = ((panels, groups, PANEL), jnp.float16)
    elif dtype == "int8":
        shapes["scales"] = ((panels, PANEL), jnp.float32)
        if activations == "int8":
            shapes["sums"] = ((panels, PANEL), jnp.int32)
            shapes["activation_range"] = ((2,), jnp.float32)
    if dtype == "int4":
        shapes["table"] = ((16,), jnp.float32)
    shapes["permutation"] = ((k,), jnp.int32)
    return shapes


def _padded(x, axis: int, size: int):
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def to_words(values, dtype: str):
    """The codes (…, K, N) of a format in panels."""
    *lead, k, n = values.shape
    rows, panels = ROWS[dtype], -(-n // PANEL)
    words = -(-k // rows)
    x = _padded(_padded(values, -2, words * rows), -1, panels * PANEL)
    # One axis after the other, which arrays can whose types say how they are split over a mesh.
    x = x.astype(CODES[dtype]).reshape(*lead, words * rows, panels, PANEL)
    x = x.reshape(*lead, words, rows, panels, PANEL)
    if dtype == "int4":
        x = x[..., :4, :, :] | x[..., 4:, :, :] << 4
    axes = len(lead)
    x = jnp.transpose(x, (*range(axes), axes + 2, axes, axes + 3, axes + 1))
    return x[..., 0] if dtype == "float32" else x


def from_words(codes, dtype: str, k: int, n: int):
    """The codes (…, K, N) that lie in panels."""
    if dtype == "float32":
        codes = codes[..., None]
    elif dtype == "int4":
        codes = jnp.concatenate([codes & 15, codes >> 4], -1)
    *lead, panels, words, _, rows = codes.shape
    axes = len(lead)
    x = jnp.transpose(codes, (*range(axes), axes + 1, axes + 3, axes, axes + 2))
    x = x.reshape(*lead, words * rows, panels, PANEL)
    return x.reshape(*lead, words * rows, panels * PANEL)[..., :k, :n]


def columns(codes, indices, dtype: str, k: int):
    """The columns of codes without leading axes, of "float32" or "bfloat16", as rows (…, K)."""
    # Where types say how arrays are split, those of panels would not say how the rows are.
    to = PartitionSpec() if jax.sharding.get_abstract_mesh().explicit_axes else None
    places = codes.at[indices // PANEL, :, indices % PANEL]
    words = places.get(mode="promise_in_bounds", out_sharding=to)
    return words.reshape(*indices.shape, codes.shape[1] * ROWS[dtype])[..., :k]


def columns_to_panels(x, *, groups: bool):
    """What is by column (…, N), or by group and column (…, G, N), in panels."""
    panels = -(-x.shape[-1] // PANEL)
    x = _padded(x, -1, panels * PANEL).reshape(*x.shape[:-1], panels, PANEL)
    return jnp.swapaxes(x, -3, -2) if groups else x


def columns_from_panels(x, n: int, *, groups: bool):
    """The inverse of `columns_to_panels`."""
    x = jnp.swapaxes(x, -3, -2) if groups else x
    return x.reshape(*x.shape[:-2], x.shape[-2] * PANEL)[..., :n]


def values_of(codes, table, dtype: str, k: int, n: int):
    """What the codes stand for before they are scaled: (…, K, N) float32."""
    values = from_words(codes, dtype, k, n)
    if dtype != "int4" or table is None:
        values = values.astype(jnp.float32)
        return values - 8 if dtype == "int4" else values

    def looked_up(table, values):
        sharding = jax.typeof(values).sharding
        to = sharding if any(sharding.spec) else None
        return table.at[values].get(mode="promise_in_bounds", out_sharding=to)

    for _ in table.shape[:-1]:
        looked_up = jax.vmap(looked_up)
    return looked_up(table, values)


def unpacked(codes, scales, offsets, table, dtype: str, k: int, n: int, group_size: int | None):
    """The weight (…, K, N) in float32, its rows in the packed order."""
    values = values_of(codes, table, dtype, k, n)
    if scales is None:
        return values
    scales = columns_from_panels(scales, n, groups=bool(group_size)).astype(jnp.float32)
    if not group_size:
        return values * scales[..., None, :]
    groups = values.reshape(*values.shape[:-2], k // group_size, group_size, n)
    groups = groups * scales[..., None, :]
    if offsets is not None:
        offsets = columns_from_panels(offsets, n, groups=True).astype(jnp.float32)
        groups = groups + offsets[..., None, :]
    return groups.reshape(values.shape)


def with_axes_in_front(x, rank: int):
    """x with as many axes as `rank`, which jax_numpy_rank_promotion cannot forbid."""
    return lax.expand_dims(x, range(rank - x.ndim))
