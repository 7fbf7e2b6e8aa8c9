"""The call of a dense layer: which operands it has, in which order, and what is static.

The public function makes a call; derivative, primitive and reference read it, and so does
cpu_kernels/dense. x is (B, …, K) and residual (B, …, N), where B counts the weights that are
stacked; all others have an axis of B or 1 in front. x may be int8, the codes that a call before it
has given as its result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax

from quake_jax._dense.layout import ROWS

NORMS = ("", "layer", "rms")


class Weight(NamedTuple):
    """A packed weight and its bias (B, N) in float32; None for what it has not."""

    codes: jax.Array
    scales: jax.Array | None = None
    sums: jax.Array | None = None
    offsets: jax.Array | None = None
    bias: jax.Array | None = None


class Operands(NamedTuple):
    """The operands by name, in the kernel's order; None for what a call has not.

    The leaves of this tree are the operands of the primitive.
    """

    x: jax.Array
    permutation: jax.Array | None
    norm_scale: jax.Array | None
    norm_offset: jax.Array | None
    table: jax.Array | None
    x_range: jax.Array | None  # (B, 2) float32, that the elements of x are quantised to
    out_range: jax.Array | None  # the same of the result
    weights: tuple[Weight, ...]  # the gate is the last one
    residual: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static. Its fields are the parameters of the primitive."""

    order: int | str
    activation: str  # a row of the element-wise table, or ""
    format: str
    group_size: int  # 0 is none
    quantized: bool  # whether the rows of x are
    columns: tuple[int, ...]  # N of each result
    dtype: str  # of the results
    norm: str  # of NORMS
    epsilon: float
    has_permutation: bool
    has_bias: bool
    has_offsets: bool
    has_gate: bool
    has_gate_bias: bool
    has_residual: bool
    has_range: bool
    has_out_range: bool  # then dtype is "int8"

    def attributes(self) -> dict[str, int | float | str]:
        """What the kernel is told; the rest it knows from shapes."""
        values = dataclasses.asdict(self)
        del values["dtype"]
        values["format"] = list(ROWS).index(self.format)
        values["norm"] = NORMS.index(self.norm)
        values["weights"] = len(values.pop("columns"))
        values["quantized"] = int(self.quantized)
        return {k: int(v) if k.startswith("has_") else v for k, v in values.items()}

    def by_name(self, operands: Sequence) -> Operands:
        """The operands of the primitive by name."""
        rest = iter(operands)

        def optional(is_there):
            return next(rest) if is_there else None

        x = next(rest)
        permutation = optional(self.has_permutation)
        norm_scale = optional(self.norm)
        norm_offset = optional(self.norm == "layer")
        table = optional(self.format == "int4")
        x_range, out_range = optional(self.has_range), optional(self.has_out_range)
        has_scales = self.format in ("int8", "int4")
        biases = [self.has_bias] * len(self.columns) + [self.has_gate_bias] * self.has_gate
        weights = tuple(
            Weight(
                next(rest),
                optional(has_scales),
                optional(has_scales and self.quantized and not self.group_size),
                optional(self.has_offsets),
                optional(has_bias),
            )
            for has_bias in biases
        )
        rows = x, permutation, norm_scale, norm_offset, table, x_range, out_range
        return Operands(*rows, weights, optional(self.has_residual))
