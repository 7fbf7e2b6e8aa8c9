"""The attention call: which arrays it has, in which order, along which axes, and its limits.

The public functions make a call; derivative, primitive and reference read it, and so does
cpu_kernels/attention. Its operands are query (B, T, N, H), key (B, S, K, H) and value (B, S, K, V),
or one array of all three, of shape (B, T, 3, N, H) or (B, T, N, 3, H); then those that `Present`
names. Its results are (B, T, N, V) in query's dtype and the log-sum-exp of the logits (B, T, N) in
float32. Key and value share a dtype, which may be another than query's; if it is int8, they are
codes, and have scales.

What jax.vmap maps has one more axis in front, of operands and then of both results. Whether it
becomes part of the batch is decided at the end, when it is known what is split over devices.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# The kernel's tiles are cut for sizes of heads up to this one.
LARGEST_HEAD = 512
# Positions are int32, and a window is added to them.
LONGEST = 2**30
# A window without a limit on one side.
NO_LIMIT = -1
# What the kernel may multiply: `compute_dtype`, and the number of the format that it has there. Of
# int8 it makes the codes.
FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}


def format_of(compute_dtype: str | None, dtype) -> int:
    """The format of the products of arrays of a dtype."""
    if compute_dtype is None:
        compute_dtype = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    return FORMATS[compute_dtype]


class Present(enum.IntFlag):
    """Which of the optional operands a call has, in this order."""

    BIAS = 1  # (B, N, T, S) or with axes of size 1
    MASK = 2  # the same
    QUERY_LENGTHS = 4  # int32 (B,)
    KEY_LENGTHS = 8  # int32 (B,)
    QUERY_SEGMENTS = 16  # int32 (B, T)
    KEY_SEGMENTS = 32  # int32 (B, S); a call has both or neither
    KEY_SCALES = 64  # float32 (B, K, S), if key and value are int8
    VALUE_SCALES = 128  # the same


class Operands(NamedTuple):
    """The arrays of a call by name; None for what it has not."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    query_segments: jax.Array | None = None
    key_segments: jax.Array | None = None
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @property
    def optional(self) -> tuple[jax.Array | None, ...]:
        return self[3:]

    @property
    def present(self) -> int:
        return sum(flag for flag, x in zip(Present, self.optional, strict=True) if x is not None)

    def without_codes(self) -> Operands:
        """The same with int8 keys and values as float32, in arrays of their own."""
        if self.key_scales is None or self.value_scales is None:
            return self
        key = decoded(self.key, self.key_scales)
        value = decoded(self.value, self.value_scales)
        return self._replace(key=key, value=value, key_scales=None, value_scales=None)


def decoded(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """What codes of shape (B, S, K, H) with scales (B, K, S) stand for, in float32."""
    return codes.astype(jnp.float32) * jnp.swapaxes(scales, 1, 2)[..., None]


def count_of_arrays(packed_axis: int) -> int:
    """How many operands hold query, key and value."""
    return 1 if packed_axis else 3


def parts_of_packed(packed: jax.Array, packed_axis: int) -> list[jax.Array]:
    """Query, key and value of the array that holds them along axis 2 or 3."""
    return [lax.index_in_dim(packed, i, packed_axis, keepdims=False) for i in range(3)]


def by_name(operands: Sequence[jax.Array], packed_axis: int, present: int) -> Operands:
    """The operands of the primitive, which takes only what there is, by name.

    Args:
      operands: those of the primitive.
      packed_axis: 2 or 3, of the one operand that holds query, key and value; or 0.
      present: a sum of `Present`.
    """
    arrays = parts_of_packed(operands[0], packed_axis) if packed_axis else operands[:3]
    rest = iter(operands[count_of_arrays(packed_axis) :])
    return Operands(*arrays, *(next(rest) if present & flag else None for flag in Present))


def without_mask(
    operands: Sequence[jax.Array], packed_axis: int, present: int
) -> tuple[Sequence[jax.Array], int]:
    """The operands of the primitive but for a mask, and which of the optional ones those have."""
    if not present & Present.MASK:
        return operands, present
    at = count_of_arrays(packed_axis) + bool(present & Present.BIAS)
    return (*operands[:at], *operands[at + 1 :]), present - Present.MASK


# Of a bias or a mask, which broadcast.
OF_LOGITS = ("batch", "heads", None, None)


def axes_of(ranks: Sequence[int], packed_axis: int, present: int) -> tuple[list, list]:
    """Along which axes a call may be split, of operands of these ranks and of the results.

    Each is "map" (that of `jax.vmap`), "batch" or "heads", or None where it must be whole.
    """
    of_query = ("batch", None, "heads", None)
    packed = {2: ("batch", None, None, "heads", None), 3: ("batch", None, "heads", None, None)}
    operands = [packed[packed_axis]] if packed_axis else [of_query] * 3
    of_positions, of_scales = ("batch", None), ("batch", "heads", None)
    optional = (OF_LOGITS,) * 2 + (("batch",),) * 2 + (of_positions,) * 2 + (of_scales,) * 2
    operands += [axes for flag, axes in zip(Present, optional, strict=True) if present & flag]
    operands = [
        axes if rank == len(axes) else ("map", *axes)
        for rank, axes in zip(ranks, operands, strict=True)
    ]
    if any(axes[0] == "map" for axes in operands):
        of_query = ("map", *of_query)
    return operands, [of_query, of_query[:-1]]
