"""What packing did: the report of `quake_jax.pack`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from quake_jax._core.tables import Table, rich_group
from quake_jax._rewrite import Report


@dataclasses.dataclass(frozen=True)
class Layer:
    """A packed weight.

    Attributes:
      paths: of the parameters that it is made of.
      shape: (…, K, N), with the axes of stacked layers in front.
      dtype, group_size, activations: as in `quake_jax.pack_weight`.
      is_calibrated: whether the rows that it multiplies have a range, of `calibrate`.
      bytes_before: of the parameters that it takes the place of; those that are kept count as 0.
      bytes_after: of the packed weight.
      error: the norm of what packing changed, relative to the norm of the weight; None where
        parameters were abstract or traced.
      is_kept: whether a parameter is kept as it was too, for another use.
    """

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    group_size: int | None
    activations: str | None
    is_calibrated: bool
    bytes_before: int
    bytes_after: int
    error: float | None
    is_kept: bool

    @property
    def format(self) -> str:
        group = f", groups of {self.group_size}" if self.group_size else ""
        rows = ", int8 rows" if self.activations else ""
        return f"{self.dtype}{group}{rows}" + (", calibrated" if self.is_calibrated else "")


@dataclasses.dataclass(frozen=True)
class Kept:
    """A parameter that stays as it is: its path, shape, dtype and bytes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


class PackReport:
    """What `quake_jax.pack` or `quake_jax.nnx.pack` did; `print` and `rich.print` give tables.

    Attributes:
      layers: list of `Layer`, the packed weights.
      kept: list of `Kept`, the parameters that stay as they are.
      dropped: paths of parameters that no function needs any more, nor any packed weight.
      together: tuples of paths, the packed weights that one call reads together: of query, key and
        value, or of a gate.
      programs: for each function what `quake_jax.explain` says: what was replaced in its program,
        with what is fused, and what was left and why. Of an NNX model: one, of its layers.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> def layer(w, x):
      ...     return x @ w
      >>> fast, _ = quake_jax.pack(layer, jnp.ones((64, 64)), jnp.ones((1, 64)), weights="int8")
      >>> fast.report
      <quake_jax pack report: 1 packed, 0 kept; print it for the tables>
      >>> fast.report.bytes_before, fast.report.bytes_after
      (16384, 4608)
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        kept: Sequence[Kept],
        dropped: Sequence[str],
        programs: Sequence[Report],
        together: Sequence[tuple[str, ...]] = (),
    ):
        self.layers = list(layers)
        self.kept = list(kept)
        self.dropped = list(dropped)
        self.programs = list(programs)
        self.together = list(together)

    @property
    def bytes_before(self) -> int:
        """Of all parameters that are packed or kept."""
        return sum(x.bytes_before for x in self.layers) + sum(x.bytes for x in self.kept)

    @property
    def bytes_after(self) -> int:
        """Of all that takes their place."""
        return sum(x.bytes_after for x in self.layers) + sum(x.bytes for x in self.kept)

    def __repr__(self) -> str:
        return (
            f"<quake_jax pack report: {len(self.layers)} packed, {len(self.kept)} kept; "
            "print it for the tables>"
        )

    def _parts(self) -> list[Table | Report | str]:
        rows = []
        for x in self.layers:
            error = "" if x.error is None else f"{x.error:.1e}"
            path = joined_paths(x.paths) + (" (kept too)" if x.is_kept else "")
            sizes = _megabytes(x.bytes_before), _megabytes(x.bytes_after)
            rows.append((path, _shape(x.shape), x.format, *sizes, error))
        for x in self.kept:
            size = _megabytes(x.bytes)
            rows.append((x.path, _shape(x.shape), x.dtype, size, size, ""))
        totals = _megabytes(self.bytes_before), _megabytes(self.bytes_after)
        rows.append(("total", "", "", *totals, ""))
        header = ("parameter", "shape", "format", "MB before", "MB after", "error")
        parts = [Table(header, rows, numbers=(3, 4, 5), has_total=True)]
        if self.together:
            parts.append("\n".join(f"one call: {_in_common(paths)}" for paths in self.together))
        if self.dropped:
            parts.append("dropped: " + ", ".join(self.dropped))
        return [*parts, *self.programs]

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._parts()))

    def __rich__(self):
        return rich_group(self._parts())


def joined_paths(paths: Iterable[str]) -> str:
    """The name of a weight that is made of some parameters."""
    return " + ".join(paths)


def _in_common(paths: tuple[str, ...]) -> str:
    """Paths as one, if they differ in one name: "attention/{query, key, value}/kernel"."""
    names = [*zip(*(path.split("/") for path in paths), strict=False)]
    differ = [i for i, those in enumerate(names) if len(set(those)) > 1]
    if len(differ) != 1 or len({path.count("/") for path in paths}) > 1:
        return ", ".join(paths)
    return "/".join("{" + ", ".join(n) + "}" if i in differ else n[0] for i, n in enumerate(names))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f}"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
