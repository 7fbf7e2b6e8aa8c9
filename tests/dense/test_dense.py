"""The values of dense layers: every format against double precision, sums of integers exactly."""

import functools

import dense_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import FORMATS, SHAPES, depth, normal, pack
from support import DTYPES

import quake_jax

formats = pytest.mark.parametrize("format", FORMATS)


@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(format, shape):
    m, n, k = shape
    k = depth(format, k)
    x, packed = normal((m, k)), pack(normal((k, n), 1), format)
    y = quake_jax.dense(x, packed)
    assert y.shape == (m, n) and y.dtype == x.dtype
    oracle.assert_close(y, oracle.dense(x, packed))


# More words of the rows of a task than the second-level cache has room for (kBlockWords in
# driver.cc): sums of all columns wait for the next ones. A word has 2/3 to 4 elements of x.
@pytest.mark.parametrize(
    ("format", "k"), [("float32", 1100), ("bfloat16", 2100), ("int8", 4200), ("int4", 4224)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_sums_that_wait(format, k, gated):
    x = normal((205, k))
    packed, gate = (pack(normal((k, 70), seed), format) for seed in (1, 2))
    keywords = {"gate": gate, "activation": "silu"} if gated else {}
    oracle.assert_close(quake_jax.dense(x, packed, **keywords), oracle.dense(x, packed, **keywords))


@pytest.mark.parametrize(
    ("finer", "coarser"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "int8_weight_only"),
        ("int8_weight_only", "int4_weight_only"),
    ],
)
def test_bounds_are_not_loose(finer, coarser):
    """What another format gives is outside."""
    x, weight = normal((16, 96)), normal((96, 33), 1)
    y = quake_jax.dense(x, pack(weight, coarser))
    with pytest.raises(AssertionError, match="expected .* within"):
        oracle.assert_close(y, oracle.dense(x, pack(weight, finer)))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4", "int4_weight_only"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", [None, "float32", "bfloat16", "float16"])
def test_dtypes(format, dtype, out):
    x, packed = normal((3, 96), dtype=dtype), pack(normal((96, 21), 1), format)
    y = quake_jax.dense(x, packed, preferred_element_type=out)
    assert y.dtype == (out or dtype)
    oracle.assert_close(y, oracle.dense(x, packed))


_K, _N = 64, 40
_NORMS = {
    "layer": quake_jax.LayerNorm(1 + normal(_K, 11) / 4, normal(_K, 12), 1e-3),
    "rms": quake_jax.RMSNorm(1 + normal(_K, 13) / 4, 1e-3),
}
EPILOGUES = {
    "bias": {"bias": normal(_N, 5)},
    "activation": {"activation": "silu"},
    "bias_activation": {"bias": normal(_N, 5), "activation": "gelu_tanh"},
    "residual": {"residual": normal((9, _N), 6)},
    "gate": {"gate": True, "activation": "silu"},
    "everything": {
        "bias": normal(_N, 5),
        "activation": "gelu_erf",
        "gate": True,
        "gate_bias": normal(_N, 7),
        "residual": normal((9, _N), 6),
        "norm": "layer",
    },
    "layer_norm": {"norm": "layer"},
    "rms_norm": {"norm": "rms", "bias": normal(_N, 5)},
}


def _keywords(epilogue: str, format: str, gate_seed: int = 2) -> dict:
    keywords = dict(EPILOGUES[epilogue])
    if "gate" in keywords:
        keywords["gate"] = pack(normal((_K, _N), gate_seed), format)
    if "norm" in keywords:
        keywords["norm"] = _NORMS[keywords["norm"]]
    return keywords


@formats
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_fused(format, epilogue):
    x, packed = 1 + normal((9, _K)), pack(normal((_K, _N), 1) / 8, format)
    keywords = _keywords(epilogue, format)
    y = quake_jax.dense(x, packed, order=5, **keywords)
    oracle.assert_close(y, oracle.dense(x, packed, **keywords))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_everything_is_rounded_once(dtype):
    x, packed = normal((9, _K), dtype=dtype), pack(normal((_K, _N), 1) / 8, "float32")
    keywords = _keywords("everything", "float32")
    y = quake_jax.dense(x, packed, order=5, **keywords)  # the residual is float32
    assert y.dtype == dtype
    oracle.assert_close(y, oracle.dense(x, packed, **keywords))


_ROWS = quake_jax._elementwise.table.FUNCTIONS


@pytest.mark.parametrize("name", _ROWS)
@pytest.mark.parametrize("order", [1, 3, None])
def test_activations(name, order):
    """Each is that of the public function."""
    x, packed = normal((5, 32)), _weights_of_activations()
    y = quake_jax.dense(x, packed, activation=name, order=order)
    expected = _ROWS[name].quake(quake_jax.dense(x, packed), order=order)
    np.testing.assert_allclose(y, expected, rtol=3e-6, atol=1e-6)


@functools.cache
def _weights_of_activations():
    return pack(normal((32, 18), 1) / 4, "float32")


def test_names_of_activations():
    x, packed = normal((5, 32)), _weights_of_activations()
    for alias, name in (("gelu", "gelu_tanh"), ("swish", "silu"), ("celu", "elu")):
        np.testing.assert_array_equal(
            quake_jax.dense(x, packed, activation=alias),
            quake_jax.dense(x, packed, activation=name),
        )


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int8_groups", "int4"])
@pytest.mark.parametrize("norm", [None, "rms"])
def test_query_key_value(format, norm):
    """Several weights give what each gives alone, bit for bit where sums are integers."""
    x, norm = normal((6, _K)), norm and _NORMS[norm]
    weights = [pack(normal((_K, n), n), format) for n in (48, 16, 5)]
    biases = [normal(48, 3), None, normal(5, 4)]
    together = quake_jax.dense(x, weights, biases, norm=norm)
    assert isinstance(together, tuple)
    for y, weight, bias in zip(together, weights, biases, strict=True):
        oracle.assert_close(y, oracle.dense(x, weight, bias, norm=norm))
        if format == "int8":
            np.testing.assert_array_equal(y, quake_jax.dense(x, weight, bias, norm=norm))
    without = quake_jax.dense(x, tuple(weights), norm=norm)
    assert [y.shape for y in without] == [(6, 48), (6, 16), (6, 5)]


def test_weights_of_several_kinds():
    """Formats, tables and permutations may differ between weights that share x."""
    x = normal((6, _K))
    codes, scales = np.random.default_rng(0).integers(0, 16, (_K, 16)), normal((2, 16), 1)
    table = np.linspace(-1, 1, 16, dtype=np.float32)
    of_table = quake_jax.PackedWeight.from_codes(
        codes, scales, "int4", table=table, activations=None
    )
    permuted = quake_jax.PackedWeight.from_codes(
        codes, scales, "int4", permutation=np.arange(_K)[::-1], activations=None
    )
    weights = [of_table, permuted, pack(normal((_K, 16), 3), "int4_weight_only"), normal((_K, 3))]
    results = quake_jax.dense(x, weights)
    for y, weight in zip(results[:3], weights, strict=False):
        oracle.assert_close(y, oracle.dense(x, weight))
    np.testing.assert_array_equal(results[3], x @ weights[3])
    keywords = {"gate": permuted, "activation": "silu", "residual": normal((6, 16), 5)}
    y = quake_jax.dense(x, of_table, order=5, **keywords)
    oracle.assert_close(y, oracle.dense(x, of_table, **keywords))


# Weights that are not packed, and what stands for the kernel.


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("int8",) * 2])
def test_plain_arrays(dtypes):
    """The layer of jax.numpy, with its promotion."""
    x, w = (jnp.asarray(4 * normal(s, 1), d) for s, d in zip(((5, 8), (8, 3)), dtypes, strict=True))
    np.testing.assert_array_equal(quake_jax.dense(x, w), jnp.dot(x, w))
    assert quake_jax.dense(x, w).dtype == jnp.dot(x, w).dtype
    assert quake_jax.dense(x, w, preferred_element_type="float32").dtype == jnp.float32
    if dtypes[0] == "int8":
        return
    bias, residual, norm = jnp.ones(3), normal((5, 3)), quake_jax.LayerNorm(epsilon=1e-5)
    y = quake_jax.dense(x, w, bias, activation="silu", gate=w, residual=residual, norm=norm)
    v = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5).astype(x.dtype)
    product = jnp.dot(v, w)
    expected = quake_jax.silu(product) * (product + bias) + residual
    np.testing.assert_allclose(y, expected, rtol=1e-2 if dtypes[0] == "bfloat16" else 1e-5)
    several = quake_jax.dense(x, (w, w[:, :2]), [bias, None])
    np.testing.assert_array_equal(several[1], jnp.dot(x, w[:, :2]))


@formats
@pytest.mark.parametrize("epilogue", ["activation", "everything"])
def test_exact_order_has_no_kernel(format, epilogue):
    x, packed = normal((9, _K)), pack(normal((_K, _N), 1) / 8, format)
    keywords = _keywords(epilogue, format)

    def call(x):
        return quake_jax.dense(x, packed, order="exact", **keywords)

    assert "quake_" not in str(jax.make_jaxpr(call)(x)).replace("quake_jax", "")
    oracle.assert_close(call(x), oracle.dense(x, packed, **keywords))


def test_reference_is_the_algorithm():
    """What other platforms run has the kernel's integers."""
    x, packed = normal((9, _K)), pack(normal((_K, _N), 1), "int8")
    np.testing.assert_allclose(
        quake_jax.dense(x, packed, order="exact"), quake_jax.dense(x, packed), rtol=2.0**-22
    )
