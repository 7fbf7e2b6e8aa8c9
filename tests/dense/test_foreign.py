"""Weights that GPTQ, AWQ and qwix have quantised are taken over exactly."""

import re
from types import SimpleNamespace

import dense_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import normal

import quake_jax

PackedWeight = quake_jax.PackedWeight
# Column of the i-th code of a word, the lowest bits first.
IN_ORDER, OF_AWQ = range(8), (0, 2, 4, 6, 1, 3, 5, 7)
K, N, GROUP = 128, 40, 32


def words(codes, columns=IN_ORDER):
    """Eight codes along the last axis a word, by arithmetic with Python's integers."""
    by_word = codes.reshape(-1, 8)
    numbers = [sum(int(code[c]) << 4 * i for i, c in enumerate(columns)) for code in by_word]
    return np.array(numbers, np.uint32).view(np.int32).reshape(*codes.shape[:-1], -1)


def integers(shape, low=0, high=16, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape)


def half_scales(shape, seed=1):
    scales = np.random.default_rng(seed).uniform(-1, 1, shape) * 10.0 ** integers(shape, -7, 3)
    return scales.astype(np.float16)


def dequantised(codes, zeros, scales, groups):
    """scale · (code - zero point), one row after the other; groups has the group of each row."""
    rows = [
        scales[g].astype(np.float32) * (codes[k] - zeros[g]).astype(np.float32)
        for k, g in enumerate(groups)
    ]
    return np.array(rows, np.float32)


def gptq(codes, zeros, scales, checkpoint_format="gptq", **keywords):
    stored = zeros - (checkpoint_format == "gptq")
    tensors = {
        "qweight": np.swapaxes(words(np.swapaxes(codes, -1, -2)), -1, -2),
        "qzeros": words(stored),
        "scales": scales,
    }
    return tensors | {"checkpoint_format": checkpoint_format} | keywords


def awq(codes, zeros, scales):
    return {"qweight": words(codes, OF_AWQ), "qzeros": words(zeros, OF_AWQ), "scales": scales}


def check(packed, weight, dtype):
    """It is the weight, bit for bit, and `dense` multiplies by it."""
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packed.unpack(), weight)
    if len(packed.shape) == 2:
        x = normal((3, packed.k), 7)
        oracle.assert_close(quake_jax.dense(x, packed), oracle.dense(x, packed))


ZEROS = {
    # Zero points, and the format that has them exactly.
    "symmetric": (lambda shape: np.full(shape, 8), "int4"),
    "one": (lambda shape: np.full(shape, 3), "int4"),
    "several": (lambda shape: integers(shape, 1, 16, 5), "int8"),
    "powers": (lambda shape: np.array([8, 4, 9, 10])[integers(shape, 0, 4, 5)], "int4"),
}


@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize("order", [None, "neighbours", "act-order"])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", ZEROS)
def test_gptq(kind, checkpoint_format, order, activations):
    make, dtype = ZEROS[kind]
    codes, scales = integers((K, N)), half_scales((K // GROUP, N))
    if kind == "powers":  # of which float16 has all multiples
        scales = 2.0 ** integers(scales.shape, -9, 0).astype(np.float16)
    zeros, groups = make(scales.shape), np.arange(K) // GROUP
    if order == "act-order":
        groups = np.random.default_rng(2).permutation(groups)
    g_idx = {} if order is None else {"g_idx": groups.astype(np.int32)}
    tensors = gptq(codes, zeros, scales, checkpoint_format, **g_idx)
    packed = PackedWeight.from_gptq(**tensors, activations=activations)
    check(packed, dequantised(codes, zeros, scales, groups), dtype)
    assert (packed.permutation is not None) == (order == "act-order")
    # Only such weights share a call with others.
    assert (packed.table is None) == (kind != "one")
    assert packed.group_size == GROUP and packed.activations == activations


@pytest.mark.parametrize("kind", ZEROS)
def test_awq(kind):
    make, dtype = ZEROS[kind]
    codes, scales = integers((K, N)), half_scales((K // GROUP, N))
    if kind == "powers":
        scales = np.ones_like(scales)
    zeros = make(scales.shape)
    packed = PackedWeight.from_awq(**awq(codes, zeros, scales))
    check(packed, dequantised(codes, zeros, scales, np.arange(K) // GROUP), dtype)


def test_a_gptq_v2_zero_point_of_0_and_15():
    codes, scales = integers((K, 8)), half_scales((1, 8))
    zeros = np.array([[0, 15, 0, 15, 15, 0, 1, 14]])
    packed = PackedWeight.from_gptq(**gptq(codes, zeros, scales, "gptq_v2"))
    # A single group is a scale a column, and needs no multiple of 32.
    assert packed.group_size is None
    check(packed, dequantised(codes, zeros, scales, np.zeros(K, int)), "int8")


def test_offsets_are_rounded_only_if_asked_for():
    codes, zeros = integers((K, N)), integers((K // GROUP, N), 0, 16, 5)
    scales = np.random.default_rng(3).uniform(0.01, 1, zeros.shape).astype(np.float16)
    packed = PackedWeight.from_awq(**awq(codes, zeros, scales), exact=False)
    assert packed.dtype == "int4" and packed.table is None
    weight = dequantised(codes, zeros, scales, np.arange(K) // GROUP)
    error = np.abs(packed.unpack() - weight) / np.repeat(scales, GROUP, 0)
    assert 0 < error.max() <= 2.0**-8 * (1 + 2.0**-10)


@pytest.mark.parametrize("kind", ["symmetric", "one", "several"])
def test_stacked_layers(kind):
    make, dtype = ZEROS[kind]
    codes, scales = integers((2, K, 16)), half_scales((2, K // GROUP, 16))
    zeros = make(scales.shape)
    zeros[1] = zeros[1] if kind == "several" else 8
    groups = np.array([np.random.default_rng(s).permutation(K) // GROUP for s in range(2)])
    weights = [dequantised(*parts) for parts in zip(codes, zeros, scales, groups, strict=True)]
    packed = PackedWeight.from_gptq(**gptq(codes, zeros, scales, g_idx=groups))
    check(packed, weights, dtype)
    check(packed[1], weights[1], dtype)
    by_neighbours = np.tile(np.arange(K) // GROUP, (2, 1))
    weights = [dequantised(*p) for p in zip(codes, zeros, scales, by_neighbours, strict=True)]
    check(PackedWeight.from_awq(**awq(codes, zeros, scales)), weights, dtype)


def qarray(qvalue, scale, zero_point=None):
    qvalue, scale = jnp.asarray(qvalue), jnp.asarray(scale)
    if zero_point is not None:
        zero_point = jnp.asarray(zero_point, qvalue.dtype)
    return SimpleNamespace(qvalue=qvalue, scale=scale, zero_point=zero_point, qtype=qvalue.dtype)


def expanded(x, shape):
    """What stands for each element of an array of that shape, by its index."""
    at = [np.arange(size) * part // size for size, part in zip(shape, x.shape, strict=True)]
    return x[np.ix_(*at)]


# dtype of qvalue, dtype of the scales, shapes of scales and zero points, what it is packed as.
QARRAYS = [
    ("int8", "float32", (1, N), None, "int8"),
    ("int8", "float32", (1, 1), None, "int8"),
    ("int8", "bfloat16", (4, N), None, "int8"),
    ("int8", "float32", (1, N), (1, N), "int8"),
    ("int8", "float16", (2, N), (4, 1), "int8"),
    ("int4", "bfloat16", (4, N), None, "int4"),
    ("int4", "float16", (2, 10), None, "int4"),
    ("int4", "bfloat16", (1, N), None, "int4"),
    ("int4", "float32", (1, N), None, "int8"),
    ("uint4", "float16", (2, N), (1, 1), "int4"),
    ("int4", "float16", (2, N), (4, N), "int8"),
    ("int8", "float32", (1, 1), (1, N), "int8"),
]


@pytest.mark.parametrize("case", QARRAYS, ids=lambda case: "-".join(map(str, case)))
def test_qarray(case):
    dtype, of_scales, by_scale, by_zero, expected = case
    limits = jnp.iinfo(dtype)
    zeros = np.zeros((1, 1), int)
    low, high = int(limits.min), int(limits.max)
    if by_zero:
        zeros = integers(by_zero, max(low, -8), 8, 4)
        low, high = (low, high) if limits.bits == 4 else (-120, 119)
    q = integers((K, N), low, high + 1)
    q[0, 0] = low
    scale = np.random.default_rng(1).uniform(0.01, 1, by_scale).astype(np.float32)
    scale = np.asarray(jnp.asarray(scale).astype(of_scales))
    packed = PackedWeight.from_qarray(
        qarray(jnp.asarray(q).astype(dtype), scale, zeros if by_zero else None)
    )
    values = (q - expanded(zeros, q.shape)).astype(np.float32)
    check(packed, values * expanded(scale.astype(np.float32), q.shape), expected)


def test_arrays_of_qwix():
    qwix = pytest.importorskip("qwix")
    weight = normal((K, N))
    for keywords in (
        {"qtype": jnp.int8, "channelwise_axes": (1,)},
        {"qtype": jnp.int8, "channelwise_axes": (1,), "calibration_method": "fixed,-4,4"},
        {"qtype": jnp.int4, "channelwise_axes": (1,), "tiled_axes": {0: 32}, "scale_dtype": "f2"},
        {"qtype": jnp.int4, "channelwise_axes": (1,), "calibration_method": "minmax"},
    ):
        quantised = qwix.quantize(weight, **keywords)
        exactly = qwix.dequantize(quantised.astype(jnp.float32))
        np.testing.assert_array_equal(PackedWeight.from_qarray(quantised).unpack(), exactly)


# Errors.

CODES, SCALES = np.zeros((64, 16), int), np.ones((2, 16), np.float16)
GPTQ = gptq(CODES, np.full((2, 16), 8), SCALES)
AWQ = awq(CODES, np.full((2, 16), 8), SCALES)
MIXED = awq(CODES, integers((2, 16)), SCALES)
QARRAY = vars(qarray(np.zeros((64, 16), np.int8), np.ones((1, 16))))
BAD = {
    "bits": ("gptq", {"qzeros": np.zeros((2, 4), np.int32)}, "qzeros must be of shape (2, 2), for"),
    "bits of awq": ("awq", {"qweight": np.zeros((64, 4), np.int32)}, "scales must be of shape"),
    "dtype": (
        "gptq",
        {"qweight": np.zeros((8, 16))},
        "qweight must be int32, words of eight 4-bit",
    ),
    "axes": ("gptq", {"qweight": np.zeros(8, np.int32)}, "qweight must be of two axes or more"),
    "odd N": (
        "gptq",
        {"qweight": np.zeros((8, 15), np.int32), "scales": SCALES[:, :15]},
        "qweight must be of shape (…, K / 8, N), N a multiple of 8; got shape (8, 15)",
    ),
    "scales": ("gptq", {"scales": SCALES[:, :3]}, "scales must be of shape (G, 16), G dividing K"),
    "groups": (
        "awq",
        {"scales": np.ones((3, 16), "f2")},
        "scales must be of shape (G, 16), G dividing K = 64, as qweight has shape (64, 2); got "
        "shape (3, 16)",
    ),
    "short groups": (
        "awq",
        {"scales": np.ones((4, 16), "f2"), "qzeros": np.zeros((4, 2), np.int32)},
        "scales must be such that K / G is a multiple of 32; got K = 64 and G = 4",
    ),
    "integer scales": ("awq", {"scales": SCALES.astype(int)}, "scales must be floating-point"),
    "scales of float32": (
        "awq",
        {"scales": SCALES.astype(np.float32) / 3},
        "scales must be values of float16, in which scales of groups are kept (or exact=False)",
    ),
    "NaN": ("awq", {"scales": SCALES * np.float16("nan")}, "must be finite in float16; got nan at"),
    "large": (
        "awq",
        {"scales": np.full((2, 16), 7e4, np.float32), "exact": False},
        "scales must be finite in float16; got 70000.0 at (0, 0)",
    ),
    "format": ("gptq", {"checkpoint_format": "marlin"}, 'must be "gptq" or "gptq_v2"; got'),
    "15": ("gptq", {"qzeros": np.full((2, 2), -1, np.int32)}, "programs differ in whether 15"),
    "g_idx": ("gptq", {"g_idx": np.zeros(64, int)}, "the groups 0 to 1 of rows, 32 rows in each"),
    "g_idx shape": ("gptq", {"g_idx": [0, 1]}, "g_idx must be of shape (64,); got shape (2,)"),
    "activations": ("gptq", {"activations": "int4"}, "from_gptq: activations must be"),
    "exact": ("awq", {"exact": "no"}, "exact must be True or False"),
    "nf4": ("qarray", {"qtype": "nf4"}, "qvalue must be integers of at most 8 bits; got"),
    "float8": ("qarray", {"qvalue": np.ones((64, 16), "f4")}, "integers of at most 8 bits; got"),
    "one axis": ("qarray", {"qvalue": np.ones(64, np.int8)}, "must be of shape (…, K, N); got"),
    "tiles": ("qarray", {"scale": np.ones((3, 16))}, "scale must be of a shape that divides that"),
    "range": (
        "qarray",
        {"zero_point": np.full((1, 1), 127, np.int8), "qvalue": np.full((64, 16), -2, np.int8)},
        "codes less zero points are from -128 to 127; got -129 at (0, 0)",
    ),
    "no qarray": ("qarray", None, "qarray must be a QArray of qwix; got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    kind, changes, text = BAD[case]
    with pytest.raises((TypeError, ValueError), match=re.escape(text)) as error:
        if kind == "qarray":
            given = 1 if changes is None else SimpleNamespace(**(QARRAY | changes))
            PackedWeight.from_qarray(given)
        elif kind == "gptq":
            PackedWeight.from_gptq(**(GPTQ | changes))
        else:
            PackedWeight.from_awq(**(MIXED | changes))
    assert str(error.value).startswith(f"quake_jax.PackedWeight.from_{kind}: ")


def test_traced_tensors():
    with pytest.raises(TypeError, match="qweight must be an array whose values are known"):
        jax.jit(lambda q: PackedWeight.from_awq(**(AWQ | {"qweight": q})))(AWQ["qweight"])
