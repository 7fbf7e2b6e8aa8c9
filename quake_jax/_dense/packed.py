"""Packed weights: arrays in the layout and the precision in which the kernels of dense layers read
them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from quake_jax._core import jax_names, pages
from quake_jax._core.drop_in import as_array, optional_array, refusal, static_bool
from quake_jax._core.exports import defined_in
from quake_jax._dense import foreign, layout, sharding
from quake_jax._dense.trees import pytree

ARRAYS = ("codes", "scales", "sums", "offsets", "permutation", "table", "activation_range")
# Of these a weight may have none.
OPTIONAL = ("offsets", "permutation", "table", "activation_range")
STATIC = ("k", "n", "dtype", "group_size", "activations")
# Of int4 where none is asked for.
_DEFAULT_GROUP = 32
# By which "mse" tries to shrink the range that codes cover; what is outside is clipped.
_SHRINK = tuple(1 - 0.04 * i for i in range(1, 11))
_LARGEST_FLOAT16 = 65504.0


@pytree(ARRAYS, STATIC)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PackedWeight:
    """A weight (…, K, N) as `dense` reads it: what `pack_weight` returns.

    A pytree. Its leaves are arrays with the leading axes of the weight, such as layers or experts,
    so `jax.lax.scan`, `jax.vmap` and indexing (`packed[i]`) take one weight out of a stack. It is
    the same on all machines. `jax.export` and pickle know it.

    Attributes:
      codes: float32, bfloat16, int8, or uint8 of two 4-bit codes each. Columns are in panels of 16,
        and these in words of 32 bits: [panels][words][16][values of a word].
      scales: float32 by column; float16 by group and column, where there are groups; else None.
      sums: int32 sums of the codes of a column, for int8 without groups whose activations are
        int8; else None.
      offsets: float16 by group and column, or None: a weight is scale · value + offset.
      permutation: int32 of shape (…, K), or None: row i here is row permutation[i] of the weight.
      table: float32 of shape (…, 16), the values of 4-bit codes; None is -8 to 7.
      activation_range: float32 of shape (…, 2), the least and the largest element of x that `dense`
        need tell apart, for int8 without groups whose activations are int8: all rows of x are then
        quantised alike, to 255 steps from min(least, 0) to max(largest, 0), and what is outside is
        clipped. None, as `pack_weight` gives it, is that each row has a scale of its own.
        `pack(…, calibrate=…)` measures it; `dataclasses.replace` sets it.
      k, n: the shape of one weight. Static, as all that follows; in the body of a `jax.shard_map`
        that splits panels, n still counts all columns, and `shape` those that are there.
      dtype: "float32", "bfloat16", "int8" or "int4".
      group_size: how many rows share a scale, or None.
      activations: "int8" if `dense` quantises the rows that it multiplies, or None.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> packed = quake_jax.pack_weight(jnp.ones((2, 64, 48)), "int8")
      >>> packed[0]
      PackedWeight(shape=(64, 48), dtype='int8', group_size=None, activations='int8')
    """

    codes: jax.Array
    scales: jax.Array | None
    sums: jax.Array | None
    offsets: jax.Array | None
    permutation: jax.Array | None
    table: jax.Array | None
    activation_range: jax.Array | None
    k: int
    n: int
    dtype: str
    group_size: int | None
    activations: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it stands for, (…, K, N)."""
        return (*self._leading(), self.k, sharding.part_of(self).n)

    def _leading(self) -> tuple[int, ...]:
        known = layout.shapes_of(self.dtype, self.k, self.n, self.group_size, self.activations)
        shape = self.codes.shape
        return shape[: len(shape) - len(known["codes"][0])]

    def __repr__(self) -> str:
        try:
            shape = f"shape={self.shape}"
        except (AttributeError, TypeError):  # leaves may be anything
            shape = f"k={self.k}, n={self.n}"
        static = ", ".join(f"{name}={getattr(self, name)!r}" for name in STATIC[2:])
        ranged = "" if self.activation_range is None else ", activation_range=…"
        return f"PackedWeight({shape}, {static}{ranged})"

    def __getitem__(self, index) -> PackedWeight:
        """Index the leading axes, as one indexes an array of weights."""
        leading = len(self._leading())
        parts = index if isinstance(index, tuple) else (index,)
        axes = sum(getattr(part, "ndim", 1) if part is not None else 0 for part in parts)
        if Ellipsis in [p for p in parts if not hasattr(p, "dtype")] or axes > leading:
            raise IndexError(
                f"quake_jax.PackedWeight: index {index!r} is for more than the {leading} leading "
                f"axes of shape {self.shape}"
            )
        if isinstance(index, int) and not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(
                f"quake_jax.PackedWeight: index {index} is out of bounds for shape {self.shape}"
            )
        return jax.tree.map(lambda leaf: leaf[index], self)

    def unpack(self) -> jax.Array:
        """The array that it stands for: (…, K, N), float32."""
        *_, k, n = self.shape
        weight = layout.unpacked(
            *(self.codes, self.scales, self.offsets, self.table),
            *(self.dtype, k, n, self.group_size),
        )
        if self.permutation is None:
            return weight
        return jnp.take_along_axis(weight, jnp.argsort(self.permutation, -1)[..., None], -2)

    @classmethod
    def from_codes(
        cls,
        codes: ArrayLike,
        scales: ArrayLike,
        dtype: DTypeLike,
        *,
        offsets: ArrayLike | None = None,
        permutation: ArrayLike | None = None,
        table: ArrayLike | None = None,
        activations: str | None = "auto",
    ) -> PackedWeight:
        """Pack a weight that is quantised already, such as one of a GGUF file.

        For those of GPTQ, AWQ and qwix see `from_gptq`, `from_awq` and `from_qarray`.

        Args:
          codes: integers of shape (…, K, N): -128 to 127 for "int8" (-127 to 127 by column with
            activations "int8" and K above 65,793), 0 to 15 for "int4".
          scales: by column, of shape (…, N), for "int8"; or by group and column (…, G, N), where a
            group is K / G rows, a multiple of 32. These are rounded to float16.
          dtype: "int8" or "int4".
          offsets: by group and column, or None. Weights are scale · value + offset; for unsigned
            codes with a zero point z, -scale · z.
          permutation: integers of shape (…, K), or None: row i of codes multiplies element
            permutation[i] of x.
          table: the 16 values of 4-bit codes, of shape (16,) or (…, 16), or None for -8 to 7.
          activations: as in `pack_weight`. With "int8" the table's values are integers from -128 to
            127.

        Returns:
          A `PackedWeight`.

        Raises:
          TypeError: if an argument is no array of numbers, or codes are no integers.
          ValueError: if shapes, dtype or values are none of these. Values are not looked at while
            a function is traced.

        Example:
          >>> import jax.numpy as jnp, quake_jax
          >>> codes = jnp.full((64, 16), 9, jnp.uint8)
          >>> packed = quake_jax.PackedWeight.from_codes(codes, jnp.full((2, 16), 0.5), "int4")
          >>> float(packed.unpack()[0, 0])
          0.5
        """
        name = "PackedWeight.from_codes"
        dtype = _checked_dtype(name, dtype)
        codes, scales = as_array(codes, name, "codes"), as_array(scales, name, "scales")
        offsets, permutation, table = (
            optional_array(x, name, argument)
            for x, argument in (
                (offsets, "offsets"),
                (permutation, "permutation"),
                (table, "table"),
            )
        )
        if dtype not in layout.LARGEST:
            raise refusal(name, "dtype", '"int8" or "int4"', repr(dtype))
        if not jnp.issubdtype(codes.dtype, jnp.integer):
            raise TypeError(f"quake_jax.{name}: codes must be integers; got dtype {codes.dtype}")
        if codes.ndim < 2:
            raise refusal(name, "codes", "of shape (…, K, N)", f"shape {codes.shape}")
        *lead, k, n = codes.shape
        lead = tuple(lead)
        group_size = None
        if scales.shape != (*lead, n) or dtype == "int4":
            groups = scales.shape[-2] if scales.ndim == codes.ndim else 0
            fits = groups and k % groups == 0 and scales.shape == (*lead, groups, n)
            if not fits:
                by_column = f"{(*lead, n)} or " if dtype == "int8" else ""
                in_groups = ", ".join(map(str, (*lead, "G", n)))
                expected = f"of shape {by_column}({in_groups}), G dividing K = {k}"
                raise refusal(name, "scales", expected, f"shape {scales.shape}")
            group_size = _checked_group(name, "K / G", k // groups, k)
        activations = _checked_activations(name, dtype, activations)
        for argument, x, shape in (
            ("offsets", offsets, scales.shape if group_size else None),
            ("permutation", permutation, (*lead, k)),
            ("table", table, (*lead, 16) if dtype == "int4" else None),
        ):
            if x is None:
                continue
            if shape is None:
                expected = {"offsets": "None without groups", "table": 'None but for "int4"'}
                raise refusal(name, argument, expected[argument], f"shape {x.shape}")
            if x.shape not in (shape, shape[-1:] if argument == "table" else shape):
                raise refusal(name, argument, f"of shape {shape}", f"shape {x.shape}")
        # Products with rows that have a zero point are up to 255 · 128, their sums int32.
        is_long = group_size is None and activations is not None and k * 255 * 128 >= 2**31
        low, high = (0, 15) if dtype == "int4" else (-127 if is_long else -128, 127)
        _check_range(name, "codes", codes, low, high)
        if permutation is not None and not isinstance(permutation, jax_names.Tracer):
            if (np.sort(permutation, -1) != np.arange(k)).any():
                raise refusal(name, "permutation", f"one of 0 to {k - 1}", repr(permutation))
        if table is not None:
            if activations is not None:
                _check_range(name, "table", table, -128, 127, whole=True)
            table = jnp.broadcast_to(jnp.asarray(table, jnp.float32), (*lead, 16))
        packed = _assembled(
            jnp.asarray(codes),
            jnp.asarray(scales),
            None if offsets is None else jnp.asarray(offsets),
            None if permutation is None else jnp.asarray(permutation, jnp.int32),
            table,
            dtype=dtype,
            group_size=group_size,
            activations=activations,
        )
        pages.gather(packed)
        return packed

    @classmethod
    def from_gptq(
        cls,
        qweight: ArrayLike,
        qzeros: ArrayLike,
        scales: ArrayLike,
        g_idx: ArrayLike | None = None,
        *,
        checkpoint_format: str = "gptq",
        exact: bool = True,
        activations: str | None = "auto",
    ) -> PackedWeight:
        """Take over a weight of 4 bits that GPTQ has quantised (AutoGPTQ, GPTQModel).

        Its elements are scales[g, n] · (code - zero point), g the row's group. Where they all have
        one zero point, as symmetric ones do, it is "int4". Else scale · zero point seldom is a
        float16, which offsets are: then it is "int8", which holds code - zero point, in twice the
        memory; or, with exact=False, "int4".

        Args:
          qweight: int32 of shape (…, K / 8, N): 8 codes of neighbouring rows, the lowest bits
            first. Leading axes, of stacked layers, stay leading axes and share a format.
          qzeros: int32 of shape (…, G, N / 8): 8 zero points of neighbouring columns.
          scales: of shape (…, G, N); numbers that float16 has.
          g_idx: integers of shape (…, K), the group of each row ("desc_act"), or None for groups of
            neighbours. Each group has K / G rows, a multiple of 32.
          checkpoint_format: as in the checkpoint's quantization_config: "gptq", zero points are
            stored less one, or "gptq_v2".
          exact: False if scales, and offsets of up to 8 scales, may be rounded to float16.
          activations: as in `pack_weight`.

        Returns:
          A `PackedWeight`, to which `unpack` is the float32 weight that GPTQ means.

        Raises:
          TypeError: if an argument is no array of such numbers; if it is traced.
          ValueError: if shapes do not fit, which they do not for other than 4 bits; if a group is
            no multiple of 32 rows; if float16 has not the scales; if "gptq" stores a zero point as
            15, which programs read differently.

        Example:
          >>> import numpy as np, quake_jax
          >>> qweight = np.full((8, 16), 0x99999999, np.uint32).view(np.int32)
          >>> qzeros, scales = np.full((2, 2), 0x77777777, np.int32), np.ones((2, 16), np.float16)
          >>> packed = quake_jax.PackedWeight.from_gptq(qweight, qzeros, scales)
          >>> packed
          PackedWeight(shape=(64, 16), dtype='int4', group_size=32, activations='int8')
          >>> float(packed.unpack()[0, 0])
          1.0
        """
        name = "PackedWeight.from_gptq"
        activations = _checked_activations(name, "int4", activations)
        exact = static_bool(exact, name, "exact")
        codes, zeros, scales, permutation = foreign.of_gptq(
            name, qweight, qzeros, scales, g_idx, checkpoint_format
        )
        parts = foreign.parts(name, codes, zeros, scales, four_bits=True, exact=exact)
        return cls.from_codes(**parts, permutation=permutation, activations=activations)

    @classmethod
    def from_awq(
        cls,
        qweight: ArrayLike,
        qzeros: ArrayLike,
        scales: ArrayLike,
        *,
        exact: bool = True,
        activations: str | None = "auto",
    ) -> PackedWeight:
        """Take over a weight of 4 bits that AWQ has quantised (AutoAWQ's version "gemm").

        Its elements are scales[g, n] · (code - zero point), g the row's group. For what becomes of
        zero points see `from_gptq`: AWQ's differ, so it is "int8", or "int4" with exact=False.

        Args:
          qweight: int32 of shape (…, K, N / 8): 8 codes of neighbouring columns; from the lowest
            bits on, columns 0, 2, 4, 6, 1, 3, 5 and 7 of the eight.
          qzeros: int32 of shape (…, G, N / 8), in the same order. A group is K / G rows, a multiple
            of 32.
          scales: of shape (…, G, N); numbers that float16 has.
          exact, activations: as in `from_gptq`.

        Returns:
          A `PackedWeight`, to which `unpack` is the float32 weight that AWQ means.

        Raises:
          TypeError, ValueError: as `from_gptq`.

        Example:
          >>> import numpy as np, quake_jax
          >>> qweight = np.full((64, 2), 0x55555555, np.int32)
          >>> qzeros, scales = np.full((2, 2), 0x43434343, np.int32), np.full((2, 16), 0.3, "f2")
          >>> packed = quake_jax.PackedWeight.from_awq(qweight, qzeros, scales)
          >>> packed
          PackedWeight(shape=(64, 16), dtype='int8', group_size=32, activations='int8')
          >>> quake_jax.PackedWeight.from_awq(qweight, qzeros, scales, exact=False).dtype
          'int4'
        """
        name = "PackedWeight.from_awq"
        activations = _checked_activations(name, "int4", activations)
        exact = static_bool(exact, name, "exact")
        codes, zeros, scales = foreign.of_awq(name, qweight, qzeros, scales)
        parts = foreign.parts(name, codes, zeros, scales, four_bits=True, exact=exact)
        return cls.from_codes(**parts, activations=activations)

    @classmethod
    def from_qarray(
        cls, qarray, *, exact: bool = True, activations: str | None = "auto"
    ) -> PackedWeight:
        """Take over a weight that qwix has quantised, a `QArray`.

        Its elements are scale · (qvalue - zero_point). Of 8 bits, or with one scale a column that
        float16 has not, it is "int8"; of 4 bits "int4", if as in `from_gptq` that is exact.

        Args:
          qarray: what has qwix's qvalue, integers of at most 8 bits and of shape (…, K, N); scale
            and zero_point (or None), of shapes that divide that one; and qtype. Scales of groups of
            rows, multiples of 32, are numbers that float16 has: those of bfloat16 weights are, if
            they are above 1e-5.
          exact, activations: as in `from_gptq`.

        Returns:
          A `PackedWeight`, to which `unpack` is the weight that qarray means, in float32.

        Raises:
          TypeError: if qarray is none; if it is traced.
          ValueError: if qvalue is of other numbers, such as "nf4" and floating-point ones; if
            shapes do not fit; if qvalue less zero_point is not within -128 to 127; if float16 has
            not the scales of groups.

        Example:
          >>> import types, jax.numpy as jnp, quake_jax
          >>> qarray = types.SimpleNamespace(  # in place of a QArray
          ...     qvalue=jnp.full((64, 16), 3, jnp.int8),
          ...     scale=jnp.full((1, 16), 0.1),
          ...     zero_point=None,
          ...     qtype=jnp.int8,
          ... )
          >>> quake_jax.PackedWeight.from_qarray(qarray)
          PackedWeight(shape=(64, 16), dtype='int8', group_size=None, activations='int8')
        """
        name = "PackedWeight.from_qarray"
        activations = _checked_activations(name, "int8", activations)
        exact = static_bool(exact, name, "exact")
        codes, zeros, scales, four_bits = foreign.of_qarray(name, qarray)
        parts = foreign.parts(name, codes, zeros, scales, four_bits=four_bits, exact=exact)
        return cls.from_codes(**parts, activations=activations)


def _checked_dtype(function: str, dtype) -> str:
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in layout.ROWS:
        raise refusal(function, "dtype", f"one of {', '.join(layout.ROWS)}", repr(dtype))
    return name


def _checked_group(function: str, argument: str, group_size, k: int) -> int:
    try:
        size = operator.index(group_size)
    except TypeError:
        raise TypeError(
            f"quake_jax.{function}: {argument} must be an integer or None; got {group_size!r}"
        ) from None
    if size <= 0 or size % layout.GROUP_MULTIPLE or k % size:
        expected = f"a multiple of {layout.GROUP_MULTIPLE} that divides K = {k}"
        raise refusal(function, argument, expected, repr(group_size))
    return size


def _checked_activations(function: str, dtype: str, activations) -> str | None:
    is_float = dtype not in layout.LARGEST
    if isinstance(activations, str) and activations == "auto":
        return None if is_float else "int8"
    if activations is not None and (not isinstance(activations, str) or activations != "int8"):
        raise refusal(function, "activations", 'None, "int8" or "auto"', repr(activations))
    if activations is not None and is_float:
        raise refusal(function, "activations", f'None for dtype "{dtype}"', repr(activations))
    return activations


def _check_range(function: str, argument: str, x, low: int, high: int, whole=False) -> None:
    if isinstance(x, jax_names.Tracer) or x.size == 0:
        return
    values = np.asarray(x)
    inside = (values >= low) & (values <= high)
    if whole:
        inside &= values == np.round(values)
    if not inside.all():
        at = tuple(map(int, np.argwhere(~inside)[0]))
        expected = f"integers from {low} to {high}"
        raise refusal(function, argument, expected, f"{values[at]} at {at}")


@functools.partial(jax.jit, static_argnames=("dtype", "group_size", "activations"))
def _assembled(
    codes, scales, offsets, permutation, table, *, dtype, group_size, activations
) -> PackedWeight:
    k, n = codes.shape[-2:]
    sums = None
    if dtype == "int8" and not group_size and activations == "int8":
        sums = jnp.sum(codes, -2, dtype=jnp.int32)
        sums = layout.columns_to_panels(sums, groups=False)
    of_scales = jnp.float16 if group_size else jnp.float32
    scales, offsets = (
        None
        if x is None
        else layout.columns_to_panels(x.astype(of_scales), groups=bool(group_size))
        for x in (scales, offsets)
    )
    words = layout.to_words(codes, dtype)
    return PackedWeight(
        *(words, scales, sums, offsets, permutation, table, None),
        *(k, n, dtype, group_size, activations),
    )


def pack_weight(
    weight: ArrayLike,
    dtype: DTypeLike,
    *,
    group_size: int | None = None,
    activations: str | None = "auto",
    scale_method: str = "max",
) -> PackedWeight:
    """Pack a weight for `dense`.

    Packing is jax.numpy: it may be traced, and works on any platform. An array that is split over a
    mesh gives a packed weight that is split along panels, as by `packed_shardings`. Large ones are
    moved into huge pages where Linux (6.1 or newer) has them.

    Args:
      weight: floating-point array of shape (…, K, N). Leading axes, of stacked layers or experts,
        stay leading axes.
      dtype: "float32"; "bfloat16", products of bfloat16 pairs with float32 sums; "int8", with a
        scale for each column, or for each group of a column; or "int4", in groups.
      group_size: how many rows of a column share a scale, a float16: a multiple of 32 that divides
        K. None is no groups for "int8", and 32 for "int4". Not for "float32" and "bfloat16".
      activations: "int8", `dense` quantises each row of x, and sums of products are exact
        integers; or None, only the weight is quantised. "auto" is "int8" for integer formats and
        None for the others, which know no "int8".
      scale_method: how the scale of integer formats is found. "max": no weight is clipped. "mse":
        the best of a few smaller ones by the sum of squared errors of its column or group.

    Returns:
      A `PackedWeight`. If the weight is traced, a column (group) with NaN or infinity is NaN.

    Raises:
      TypeError: if weight is no floating-point array; if group_size is no integer.
      ValueError: if weight has fewer than two axes, or has NaN or an infinity; if dtype,
        group_size, activations or scale_method is none of these.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> packed = quake_jax.pack_weight(jnp.ones((64, 32)), "int4", group_size=64)
      >>> y = quake_jax.dense(jnp.ones((2, 64)), packed)
    """
    name = "pack_weight"
    dtype = _checked_dtype(name, dtype)
    weight = as_array(weight, name, "weight")
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise TypeError(
            f"quake_jax.{name}: weight must be a floating-point array; got an array of dtype "
            f"{weight.dtype}"
        )
    if weight.ndim < 2:
        raise refusal(name, "weight", "of shape (…, K, N)", f"shape {weight.shape}")
    activations = _checked_activations(name, dtype, activations)
    if scale_method not in ("max", "mse"):
        raise refusal(name, "scale_method", '"max" or "mse"', repr(scale_method))
    if dtype in layout.LARGEST:
        if group_size is None and dtype == "int4":
            group_size = _DEFAULT_GROUP
        if group_size is not None:
            group_size = _checked_group(name, "group_size", group_size, weight.shape[-2])
    elif group_size is not None:
        raise refusal(name, "group_size", f'None for dtype "{dtype}"', repr(group_size))
    static = {"dtype": dtype, "group_size": group_size, "activations": activations}
    split = sharding.with_split_columns(jnp.asarray(weight))
    # One layer of a stack after the other takes the memory of one besides that of the result.
    is_here = not isinstance(split, jax_names.Tracer) and len(split.devices()) == 1
    packing = _pack_stack if split.ndim > 2 and is_here else _pack
    packed, is_finite = packing(split, method=scale_method, **static)
    if not isinstance(is_finite, jax_names.Tracer) and not is_finite:
        _refuse_values(np.asarray(weight), dtype)
    pages.gather(packed)
    return packed


_STATIC = ("dtype", "group_size", "activations", "method")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _pack_stack(weight, **static):
    """As `_pack`."""
    *lead, k, n = weight.shape
    weights = weight.reshape(math.prod(lead), k, n)
    packed, is_finite = lax.map(lambda w: _pack(w, **static), weights)
    packed = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), packed)
    return packed, jnp.all(is_finite)


def _refuse_values(weight: np.ndarray, dtype: str) -> None:
    """Say which element of a weight cannot be packed."""
    weight = weight.astype(np.float32)
    finite = np.isfinite(weight)
    what = "finite"
    if finite.all():  # a group's scale is not
        finite = np.abs(weight) <= _LARGEST_FLOAT16 * layout.LARGEST[dtype]
        what = "small enough for float16 scales of its groups"
    at = tuple(map(int, np.argwhere(~finite)[0]))
    *lead, row, column = at
    where = f"row {row}, column {column}" + (f" of the weight at {tuple(lead)}" if lead else "")
    raise refusal("pack_weight", "weight", what, f"{weight[at]} at {where}")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _pack(weight, *, dtype, group_size, activations, method):
    """The packed weight, and whether all of it is finite."""
    static = {"dtype": dtype, "group_size": group_size, "activations": activations}
    if dtype not in layout.LARGEST:
        is_finite = jnp.all(jnp.isfinite(weight))
        return _assembled(weight, None, None, None, None, **static), is_finite
    *lead, k, n = weight.shape
    size = group_size or k
    groups = weight.reshape(*lead, k // group_size if group_size else 1, size, n)
    groups = groups.astype(jnp.float32)
    largest = jnp.max(jnp.abs(groups), -2, keepdims=True, initial=0.0)
    # XLA's maximum of 64 and more may lose a NaN on CPUs.
    is_finite = jnp.all(jnp.isfinite(groups), -2, keepdims=True)
    largest = jnp.where(is_finite, largest, jnp.nan)
    steps = layout.LARGEST[dtype]
    scales = _scales(largest / steps, in_groups=bool(group_size))
    codes = _codes(groups, scales, steps)
    if method == "mse":
        error = jnp.sum((codes * scales - groups) ** 2, -2, keepdims=True)

        def better(shrink, best):
            scales, error = best
            smaller = _scales(largest * shrink / steps, in_groups=bool(group_size))
            codes = _codes(groups, smaller, steps)
            other = jnp.sum((codes * smaller - groups) ** 2, -2, keepdims=True)
            return jnp.where(other < error, smaller, scales), jnp.minimum(other, error)

        def step(best, shrink):
            return better(shrink, best), None

        (scales, _), _ = lax.scan(step, (scales, error), jnp.asarray(_SHRINK, jnp.float32))
        codes = _codes(groups, scales, steps)
    codes = codes.reshape(weight.shape)
    codes = (codes + 8).astype(jnp.uint8) if dtype == "int4" else codes.astype(jnp.int8)
    by_column = jnp.squeeze(scales, -2)
    by_column = by_column if group_size else jnp.squeeze(by_column, -2)
    packed = _assembled(codes, by_column, None, None, None, **static)
    return packed, jnp.all(jnp.isfinite(by_column))


def _scales(scales, *, in_groups: bool):
    """Scales as they are stored, but in float32: 1 for zeros, NaN for what is not finite."""
    if in_groups:
        # Upwards, so that no code leaves its range.
        half = scales.astype(jnp.float16)
        bits = lax.bitcast_convert_type(half, jnp.uint16)
        up = lax.bitcast_convert_type(bits + jnp.uint16(1), jnp.float16)
        scales = jnp.where(half.astype(jnp.float32) < scales, up, half).astype(jnp.float32)
    return jnp.where(jnp.isfinite(scales), jnp.where(scales == 0, 1.0, scales), jnp.nan)


def _codes(groups, scales, steps: int):
    """The nearest codes, as float32; 0 where there is none."""
    codes = jnp.clip(jnp.rint(groups / scales), -steps, steps)
    return jnp.where(jnp.isnan(codes), 0.0, codes)


__all__ = defined_in(globals())
