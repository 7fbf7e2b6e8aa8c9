"""Dense layers and weights of what is not finite, very large or small, empty, or of many axes."""

import functools
import re

import dense_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import FORMATS, depth, normal, pack

import quake_jax

# XLA's optimizations lose some NaN.
pytestmark = pytest.mark.usefixtures("optimized")

formats = pytest.mark.parametrize("format", FORMATS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", ["int8", "int8_groups", "int4"])
@pytest.mark.parametrize("order", [None, "exact"])
def test_quantised_row_that_is_not_finite(value, format, order):
    """Its result is NaN, and that of other rows what it is without it."""
    x = np.array(normal((5, 128)))
    packed = pack(normal((128, 18), 1), format)
    expected = np.array(quake_jax.dense(x, packed, order=order))
    # XLA's maximum loses some NaN, by their place among 64 and more.
    for row, column in ((1, 0), (2, 5), (4, 127)):
        x[row, column], expected[row] = value, np.nan
    np.testing.assert_array_equal(quake_jax.dense(x, packed, order=order), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "format", [f for f in FORMATS if f.endswith("weight_only") or "float" in f]
)
def test_float_row_that_is_not_finite(value, format):
    """As XLA's product."""
    x = np.array(normal((4, 64)))
    x[2, 5] = value
    packed = pack(normal((64, 18), 1), format)
    with np.errstate(invalid="ignore"):
        expected = x @ np.asarray(packed.unpack())
    y = np.asarray(quake_jax.dense(x, packed))
    assert np.isfinite(y[[0, 1, 3]]).all()
    np.testing.assert_array_equal(y[2], expected[2])


@functools.cache
def traced_pack(format):
    return jax.jit(functools.partial(pack, format=format))


@formats
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 40])  # XLA's maximum may lose a NaN in the first one
def test_weights_that_are_not_finite(format, value, row):
    k = depth(format, 64)
    weight = np.array(normal((2, k, 20)))
    weight[1, row, 7] = value
    text = f"weight must be finite; got {value} at row {row}, column 7 of the weight at (1,)"
    with pytest.raises(ValueError, match=re.escape(text)):
        pack(weight, format)
    with pytest.raises(ValueError, match=re.escape(f"got {value} at row {row}, column 7") + "$"):
        pack(weight[1], format)
    packed = traced_pack(format)(weight[1])
    found = np.isnan(np.asarray(quake_jax.dense(jnp.ones((3, k)), packed)))
    if np.isnan(value) or format.startswith("int"):
        assert found[:, 7].all()
    found[:, 7] = False
    assert not found.any()


def test_weights_too_large_for_scales_of_groups():
    weight = np.array(normal((64, 20)))
    weight[40, 7] = 1e7
    for dtype in ("int8", "int4"):
        with pytest.raises(ValueError, match="small enough for float16.*row 40, column 7"):
            quake_jax.pack_weight(weight, dtype, group_size=32)


@formats
@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-30, 1e30])
def test_magnitudes(format, magnitude):
    """Quantised rows of any size give finite results."""
    x, packed = magnitude * normal((3, 64)), pack(normal((64, 18), 1), format)
    y = quake_jax.dense(x, packed)
    expected = oracle.dense(x, packed)
    # Subnormal numbers count as zero.
    error = expected.error + 2.0**-118 * 64 * 8
    oracle.assert_close(y, expected._replace(error=error))


@formats
@pytest.mark.parametrize("shape", [(0, 5, 32), (3, 0, 32), (3, 5, 0), (0, 0, 0)], ids=str)
def test_empty(format, shape):
    m, n, k = shape
    k = depth(format, k)
    packed = pack(jnp.ones((k, n)), format)
    bias = jnp.full(n, 2.0)
    for call in (quake_jax.dense, jax.jit(quake_jax.dense)):
        y = call(jnp.ones((m, k)), packed, bias)
        np.testing.assert_allclose(y, np.full((m, n), k + 2.0), rtol=1e-2)
    both = quake_jax.dense(jnp.ones((2, m, k)), [packed, packed], norm=quake_jax.RMSNorm())
    assert [y.shape for y in both] == [(2, m, n)] * 2


@pytest.mark.parametrize("format", ["float32", "int8", "int4"])
def test_leading_axes_of_x(format):
    packed = pack(normal((32, 18), 1), format)
    x = normal((2, 3, 4, 32))
    y = quake_jax.dense(x, packed, residual=jnp.ones((2, 3, 4, 18)))
    flat = quake_jax.dense(x.reshape(24, 32), packed, residual=jnp.ones((24, 18)))
    np.testing.assert_allclose(y.reshape(24, 18), flat, rtol=1e-5, atol=1e-5)
    one = quake_jax.dense(x[0, 0, 0], packed)
    assert one.shape == (18,)
    np.testing.assert_allclose(one + 1, y[0, 0, 0], rtol=1e-5, atol=1e-5)
