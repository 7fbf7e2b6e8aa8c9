"""Sums of integers are exact, and codes that others have made are what they say."""

import dense_oracle as oracle
import numpy as np
import pytest
from dense_oracle import SHAPES, normal

import quake_jax


def _integers(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-127, 128, (k, n)).astype(np.int8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ["normal", "gelu", "negative", "zero"])
def test_integer_sums_are_exact(shape, rows):
    m, n, k = shape
    x = np.array(normal((m, k), 3))
    x = {"normal": x, "gelu": np.maximum(x, -0.17), "negative": -np.abs(x), "zero": 0 * x}[rows]
    codes, scales = _integers(k, n), np.abs(np.array(normal(n, 4))) + 0.5
    q, s, z = oracle.quantized(x, zero_point=True)
    sums = (q - z) @ codes.astype(np.int64)
    exactly = quake_jax.PackedWeight.from_codes(codes, np.ones(n, np.float32), "int8")
    y = np.asarray(quake_jax.dense(x, exactly), np.float64)
    # float32 has room for them, so a quotient of two roundings is nearest to the sum.
    assert np.abs(sums).max(initial=0) < 2**22
    np.testing.assert_array_equal(np.rint(y / s), sums)
    packed = quake_jax.PackedWeight.from_codes(codes, scales, "int8")
    expected = sums * s.astype(np.float64) * scales
    np.testing.assert_allclose(quake_jax.dense(x, packed), expected, rtol=2.0**-22)


@pytest.mark.parametrize("k, code", [(66_311, 127), (66_311, -127), (65_793, -128)])
def test_longest_integer_sum(k, code):
    """At the largest depth that is allowed the largest sum still fits into an int32."""
    x = np.full((2, k), 255.0, np.float32) * np.array([[1], [-1]], np.float32)
    packed = quake_jax.PackedWeight.from_codes(np.full((k, 3), code, np.int8), np.ones(3), "int8")
    expected = np.full((2, 3), 255.0 * code * k) * [[1], [-1]]
    np.testing.assert_allclose(quake_jax.dense(x, packed), expected, rtol=2.0**-23)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_group_sums_are_exact(dtype, group, has_offsets):
    m, n, k = 5, 19, 256
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (k, n)) if dtype == "int4" else rng.integers(-128, 128, (k, n))
    scales = np.ones((k // group, n), np.float32)
    offsets = np.full((k // group, n), -3, np.float32) if has_offsets else None
    packed = quake_jax.PackedWeight.from_codes(codes, scales, dtype, offsets=offsets)
    x = normal((m, k), 3)
    q, s, _ = oracle.quantized(x, zero_point=False)
    values = codes - 8 * (dtype == "int4")
    sums = q @ values - 3 * has_offsets * q.sum(-1, keepdims=True)
    # All that is added up are whole numbers below 2^24.
    y = np.asarray(quake_jax.dense(x, packed), np.float64)
    np.testing.assert_array_equal(np.rint(y / s), sums)


@pytest.mark.parametrize("activations", ["int8", None])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("parts", ["offsets", "permutation", "table", "all"])
def test_codes_of_others(dtype, activations, parts):
    """Scales and offsets of groups, a permutation of K, a table: what GPTQ, AWQ and Q4_1 have."""
    m, n, k, group = 4, 21, 128, 32
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (k, n)) if dtype == "int4" else rng.integers(-128, 128, (k, n))
    scales = rng.uniform(-1, 1, (k // group, n)).astype(np.float16)
    values, keywords = codes - 8 * (dtype == "int4"), {}
    if parts in ("table", "all") and dtype == "int4":
        table = rng.permutation(np.arange(-120, 120, 15)).astype(np.float32)
        values, keywords["table"] = table[codes], table
    weight = (values.reshape(-1, group, n) * scales.astype(np.float64)[:, None]).reshape(k, n)
    if parts in ("offsets", "all"):
        offsets = rng.uniform(-1, 1, scales.shape).astype(np.float16)
        weight = weight + np.repeat(offsets.astype(np.float64), group, 0)
        keywords["offsets"] = offsets
    if parts in ("permutation", "all"):
        keywords["permutation"] = rng.permutation(k)
        original = np.empty_like(weight)
        original[keywords["permutation"]] = weight
        weight = original
    packed = quake_jax.PackedWeight.from_codes(
        codes, scales, dtype, activations=activations, **keywords
    )
    np.testing.assert_allclose(packed.unpack(), weight, rtol=2.0**-22, atol=2.0**-20)
    x = normal((m, k), 3)
    oracle.assert_close(quake_jax.dense(x, packed), oracle.dense(x, packed))
    norm = quake_jax.LayerNorm(1 + normal(k, 5) / 4, normal(k, 6), 1e-3)
    y = quake_jax.dense(x, packed, norm=norm)
    oracle.assert_close(y, oracle.dense(x, packed, norm=norm))
