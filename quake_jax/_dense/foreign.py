"""Weights that other programs have quantised, as what `PackedWeight.from_codes` takes: GPTQ and AWQ
of four bits, and qwix's arrays.

A weight is scale · (code - zero point) everywhere. Whether that can be had exactly, and in four
bits, depends on the values, so all of this is NumPy.
"""

from __future__ import annotations

import numpy as np
from jax import numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.drop_in import as_array, optional_array, refusal
from quake_jax._dense import layout

FORMATS_OF_GPTQ = ("gptq", "gptq_v2")
_CODES_OF_A_WORD = 8
# The columns of the codes of a word of AWQ, the lowest bits first, are 0, 2, 4, 6, 1, 3, 5, 7; so
# these are the places of columns 0 to 7.
_PLACES_OF_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
# What a code of the default table stands for is code - 8.
_MIDDLE = 8


def of_gptq(name: str, qweight, qzeros, scales, g_idx, checkpoint_format: str) -> tuple:
    """Codes (…, K, N) and zero points (…, G, N) from 0 to 15, scales, and an order of rows or None.

    With one, row i of the codes is row order[i] of the weight.
    """
    if checkpoint_format not in FORMATS_OF_GPTQ:
        expected = " or ".join(f'"{known}"' for known in FORMATS_OF_GPTQ)
        raise refusal(name, "checkpoint_format", expected, repr(checkpoint_format))
    qweight, qzeros = _words(name, "qweight", qweight), _words(name, "qzeros", qzeros)
    scales = _floats(name, "scales", scales)
    *lead, words, n = qweight.shape
    k = words * _CODES_OF_A_WORD
    _check_groups(name, lead, k, n, qzeros, scales, qweight)
    codes = np.swapaxes(_codes(np.swapaxes(qweight, -1, -2)), -1, -2)
    zeros = _codes(qzeros)
    if checkpoint_format == "gptq":
        if (zeros == 15).any():
            at = tuple(map(int, np.argwhere(zeros == 15)[0]))
            raise refusal(
                name,
                "qzeros",
                'zero points less one from 0 to 14 in checkpoint_format "gptq": programs differ in '
                "whether 15 stands for 0 or 16, so convert it to gptq_v2",
                f"15 for group and column {at}",
            )
        zeros = zeros + 1
    if g_idx is None:
        return codes, zeros, scales, None
    order = _order(name, g_idx, (*lead, k), scales.shape[-2])
    return (
        codes if order is None else np.take_along_axis(codes, order[..., None], -2),
        zeros,
        scales,
        order,
    )


def of_awq(name: str, qweight, qzeros, scales) -> tuple:
    """Codes (…, K, N) and zero points (…, G, N) from 0 to 15, and scales."""
    qweight, qzeros = _words(name, "qweight", qweight), _words(name, "qzeros", qzeros)
    scales = _floats(name, "scales", scales)
    *lead, k, words = qweight.shape
    n = words * _CODES_OF_A_WORD
    _check_groups(name, lead, k, n, qzeros, scales, qweight)

    def in_order(words):
        codes = _codes(words)
        by_word = codes.reshape(*words.shape, _CODES_OF_A_WORD)
        return by_word[..., _PLACES_OF_AWQ].reshape(codes.shape)

    return in_order(qweight), in_order(qzeros), scales


def is_qarray(x) -> bool:
    """Whether x has what qwix's arrays have."""
    return all(hasattr(x, field) for field in ("qvalue", "scale", "zero_point", "qtype"))


def of_qarray(name: str, qarray) -> tuple:
    """Codes (…, K, N), zero points and scales (…, G, N), and whether codes are from 0 to 15."""
    if not is_qarray(qarray):
        raise TypeError(f"quake_jax.{name}: qarray must be a QArray of qwix; got {qarray!r}")
    codes = _known(name, "qarray.qvalue", as_array(qarray.qvalue, name, "qarray.qvalue"))
    zeros = optional_array(qarray.zero_point, name, "qarray.zero_point")
    scales = _floats(name, "qarray.scale", qarray.scale)
    is_nf4 = isinstance(qarray.qtype, str) and qarray.qtype == "nf4"
    if not jnp.issubdtype(codes.dtype, jnp.integer) or jnp.iinfo(codes.dtype).bits > 8 or is_nf4:
        given = f"dtype {codes.dtype} and qtype {qarray.qtype!r}"
        raise refusal(name, "qarray.qvalue", "integers of at most 8 bits", given)
    if codes.ndim < 2:
        raise refusal(name, "qarray.qvalue", "of shape (…, K, N)", f"shape {codes.shape}")
    limits = jnp.iinfo(codes.dtype)
    four_bits = limits.bits <= 4
    shift = _MIDDLE if four_bits and limits.min < 0 else 0
    codes = codes.astype(np.int16)
    zeros = np.zeros_like(codes, shape=(1,) * codes.ndim) if zeros is None else zeros
    zeros = _known(name, "qarray.zero_point", zeros).astype(np.int16)
    for argument, x in (("scale", scales), ("zero_point", zeros)):
        if x.ndim != codes.ndim or any(
            part == 0 or whole % part for whole, part in zip(codes.shape, x.shape, strict=True)
        ):
            expected = f"of a shape that divides that of qvalue, {codes.shape}"
            raise refusal(name, f"qarray.{argument}", expected, f"shape {x.shape}")
    groups = int(np.lcm(scales.shape[-2], zeros.shape[-2]))
    shape = (*codes.shape[:-2], groups, codes.shape[-1])
    zeros, scales = _repeated(zeros, shape), _repeated(scales, shape)
    return codes + shift, zeros + shift, scales, four_bits


def parts(name: str, codes, zeros, scales, *, four_bits: bool, exact: bool) -> dict:
    """What `PackedWeight.from_codes` makes the weight scale · (code - zero) of, in as few bits as
    is exact."""
    *_, k, n = codes.shape
    groups = scales.shape[-2]
    size = k // groups
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    finite = bool(np.isfinite(half).all())
    in_groups = size > 0 and size % layout.GROUP_MULTIPLE == 0
    as_half = finite and (not exact or bool((half == scales).all()))
    if four_bits and in_groups and as_half:
        made = {"codes": codes.astype(np.uint8), "scales": half, "dtype": "int4"}
        one = zeros[..., :1, :1]
        if (zeros == one).all():
            if (one != _MIDDLE).any():
                made["table"] = np.arange(16, dtype=np.float32) - one[..., 0]
            return made
        # Exact in float32, but seldom in float16, which has 11 bits.
        offsets = half.astype(np.float32) * (_MIDDLE - zeros.astype(np.float32))
        with np.errstate(over="ignore"):
            rounded = offsets.astype(np.float16)
        if (rounded == offsets).all() or not exact and np.isfinite(rounded).all():
            return made | {"offsets": rounded}
    values = codes.astype(np.int16) - np.repeat(zeros.astype(np.int16), size, -2)
    made = {"codes": values.astype(np.int8), "dtype": "int8"}
    if not (made["codes"] == values).all():
        at = tuple(map(int, np.argwhere(made["codes"] != values)[0]))
        expected = "such that codes less zero points are from -128 to 127"
        raise refusal(name, "the weight", expected, f"{values[at]} at {at}")
    if groups == 1:
        by_column = scales[..., 0, :].astype(np.float32)
        if (by_column == scales[..., 0, :]).all() and np.isfinite(by_column).all():
            return made | {"scales": by_column}
    if not in_groups:
        expected = f"such that K / G is a multiple of {layout.GROUP_MULTIPLE}"
        raise refusal(name, "scales", expected, f"K = {k} and G = {groups}")
    if not as_half:
        wrong = ~np.isfinite(half) if not finite else half != scales
        at = tuple(map(int, np.argwhere(wrong)[0]))
        expected = "finite in float16"
        if finite:
            expected = "values of float16, in which scales of groups are kept (or exact=False)"
        raise refusal(name, "scales", expected, f"{scales[at]} at {at}")
    return made | {"scales": half}


def _known(function: str, argument: str, x) -> np.ndarray:
    if isinstance(x, jax_names.Tracer):
        raise TypeError(
            f"quake_jax.{function}: {argument} must be an array whose values are known, as they "
            "decide on the format; got a traced one"
        )
    return np.asarray(x)


def _words(function: str, argument: str, x) -> np.ndarray:
    x = _known(function, argument, as_array(x, function, argument))
    if x.dtype not in (np.int32, np.uint32):
        raise TypeError(
            f"quake_jax.{function}: {argument} must be int32, words of eight 4-bit codes; got "
            f"dtype {x.dtype}"
        )
    if x.ndim < 2:
        raise refusal(function, argument, "of two axes or more", f"shape {x.shape}")
    return x


def _floats(function: str, argument: str, x) -> np.ndarray:
    x = _known(function, argument, as_array(x, function, argument))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"quake_jax.{function}: {argument} must be floating-point numbers; got dtype {x.dtype}"
        )
    return x if x.dtype == np.float64 else x.astype(np.float32)


def _check_groups(function: str, lead, k: int, n: int, qzeros, scales, qweight) -> None:
    why = f"qweight has shape {qweight.shape}"
    expected = (*lead, "G", n)
    groups = scales.shape[-2] if scales.ndim == len(lead) + 2 else 0
    if not groups or k % groups or scales.shape != (*lead, groups, n):
        shape = f"of shape ({', '.join(map(str, expected))}), G dividing K = {k}, as {why}"
        raise refusal(function, "scales", shape, f"shape {scales.shape}")
    if n % _CODES_OF_A_WORD:
        expected = f"of shape (…, K / 8, N), N a multiple of {_CODES_OF_A_WORD}"
        raise refusal(function, "qweight", expected, f"shape {qweight.shape}")
    expected = (*lead, groups, n // _CODES_OF_A_WORD)
    if qzeros.shape != expected:
        shape = f"of shape {expected}, for 4 bits, as {why} and scales have {scales.shape}"
        raise refusal(function, "qzeros", shape, f"shape {qzeros.shape}")


def _codes(words: np.ndarray) -> np.ndarray:
    """The codes of words along the last axis, the lowest bits first."""
    pairs = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], -1).reshape(*words.shape[:-1], -1)


def _order(function: str, g_idx, shape: tuple, groups: int) -> np.ndarray | None:
    """The rows by their groups, None if they are so already."""
    g_idx = _known(function, "g_idx", as_array(g_idx, function, "g_idx"))
    if g_idx.shape != shape:
        raise refusal(function, "g_idx", f"of shape {shape}", f"shape {g_idx.shape}")
    by_group = np.repeat(np.arange(groups), shape[-1] // groups)
    if (g_idx == by_group).all():
        return None
    order = np.argsort(g_idx, -1, kind="stable")
    if (np.take_along_axis(g_idx, order, -1) != by_group).any():
        expected = f"the groups 0 to {groups - 1} of rows, {shape[-1] // groups} rows in each"
        numbers, counts = np.unique(g_idx, return_counts=True)
        wrong = [f"{c} of group {g}" for g, c in zip(numbers, counts, strict=True)][:4]
        raise refusal(function, "g_idx", expected, ", ".join(wrong) + ", …")
    return order


def _repeated(x: np.ndarray, shape: tuple) -> np.ndarray:
    """x with each element for as many neighbours as shape has for it."""
    for axis, size in enumerate(shape):
        x = np.repeat(x, size // x.shape[axis], axis)
    return x
