"""pack of parameters that are quantised already: their codes and scales are taken over."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quake_jax

K, N = 64, 96
X = np.random.default_rng(1).normal(size=(8, K)).astype(np.float32)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["qvalue", "scale", "zero_point"],
    meta_fields=["qtype"],
)
@dataclasses.dataclass
class QArray:
    """In place of qwix's."""

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    qtype: object = None


def broadcast(x, shape):
    for axis, size in enumerate(shape):
        x = jnp.repeat(x, size // x.shape[axis], axis)
    return x


def dequantized(q):
    """As qwix does it, in the dtype of the scales, axes in tiles apart."""
    values, shape, parts = q.qvalue.astype(q.scale.dtype), [], []
    for whole, part in zip(q.qvalue.shape, q.scale.shape, strict=True):
        is_tiled = 1 < part < whole
        shape += [part, whole // part] if is_tiled else [whole]
        parts += [part, 1] if is_tiled else [part]
    if q.zero_point is not None:
        values = values - broadcast(q.zero_point, q.qvalue.shape).astype(values.dtype)
    return (values.reshape(shape) * q.scale.reshape(parts)).reshape(q.qvalue.shape)


def exact(q):
    """What it stands for, in float32."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), q)
    return np.asarray(dequantized(wide))


def quantized(shape=(K, N), dtype="int8", by_scale=(1, N), of_scale="float32", zeros=False):
    rng = np.random.default_rng(len(shape))
    low, high = (-8, 8) if dtype == "int4" else (-90, 91)  # not the largest code
    codes = jnp.asarray(rng.integers(low, high, shape), jnp.int8).astype(dtype)
    scale = jnp.asarray(rng.uniform(0.5, 1, by_scale) / 8 / high).astype(of_scale)
    points = rng.integers(-6, 7, by_scale) if zeros else None
    points = None if points is None else jnp.asarray(points, jnp.int8).astype(dtype)
    return QArray(codes, scale, points, codes.dtype)


def dense(w, x):
    return x @ dequantized(w["w"])


# The array, how it is used, weights= and the packed dtype and groups.
CASES = {
    "by column": (quantized(), dense, "int8", ("int8", None)),
    "by column, 4 bits in 8": (quantized(dtype="int4"), dense, "int8", ("int8", None)),
    "one scale": (quantized(by_scale=(1, 1)), dense, "int8", ("int8", None)),
    "zero points": (quantized(zeros=True), dense, "int8", ("int8", None)),
    "groups": (quantized(by_scale=(2, N), of_scale="float16"), dense, "int8", ("int8", 32)),
    "groups, zero points": (
        quantized(dtype="int4", by_scale=(2, N), of_scale="bfloat16", zeros=True),
        lambda w, x: x @ dequantized(w["w"]).astype(jnp.float32),
        "int8",
        ("int8", 32),
    ),
    "4 bits": (
        quantized(dtype="int4", by_scale=(2, N), of_scale="float16"),
        dense,
        "int4",
        ("int4", 32),
    ),
    "4 bits, few outputs": (
        quantized((K, 32), "int4", (2, 32), "float16"),
        dense,
        "int4",
        ("int4", 32),
    ),
    "4 bits by column": (
        quantized(dtype="int4", of_scale="float16"),
        dense,
        "int4",
        ("int4", 32),
    ),
    "transposed": (
        quantized((N, K), by_scale=(N, 1)),
        lambda w, x: x @ dequantized(w["w"]).T,
        "int8",
        ("int8", None),
    ),
    "several axes": (
        quantized((K, 4, 24), by_scale=(1, 4, 24)),
        lambda w, x: jnp.einsum("bd,dhk->bhk", x, dequantized(w["w"])),
        "int8",
        ("int8", None),
    ),
    "cast": (
        quantized(),
        lambda w, x: x.astype(jnp.bfloat16) @ dequantized(w["w"]).astype(jnp.bfloat16),
        "int8",
        ("int8", None),
    ),
    "scaled after the product": (
        quantized(),
        lambda w, x: (x @ w["w"].qvalue.astype(jnp.float32)) * w["w"].scale,
        "int8",
        ("int8", None),
    ),
    "scan": (
        quantized((3, K, K), by_scale=(3, 1, K)),
        lambda w, x: lax.scan(lambda h, q: (h @ dequantized(q), None), x, w["w"])[0],
        "int8",
        ("int8", None),
    ),
    "in a call": (quantized(), jax.jit(dense), "int8", ("int8", None)),
    "dequantised": (quantized(), dense, "float32", ("float32", None)),
}


@pytest.mark.parametrize("case", CASES)
def test_takes_over(case):
    w, fun, weights, (dtype, group_size) = CASES[case]
    params, x = {"w": w}, X
    keywords = {} if weights == "float32" else {"activations": None}
    fast, packed = quake_jax.pack(fun, params, x, weights=weights, **keywords)
    (layer,) = fast.report.layers
    assert layer.paths == ("w",)
    assert (layer.dtype, layer.group_size, layer.error) == (dtype, group_size, 0.0)
    (weight,) = jax.tree.leaves(packed, is_leaf=lambda x: isinstance(x, quake_jax.PackedWeight))[:1]
    wanted = exact(w)
    if case.startswith("scaled"):
        wanted = np.asarray(w.qvalue, np.float32)
    wanted = wanted.T if case == "transposed" else wanted
    np.testing.assert_array_equal(weight.unpack(), wanted.reshape(weight.shape))
    # In 16 bits the program rounds the weight, or rows too.
    tolerance = 1e-4 if case != "cast" and w.scale.dtype == jnp.float32 else 0.02
    got, wanted = (np.asarray(f(p, x), np.float32) for f, p in ((fast, packed), (fun, params)))
    np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_others_of_the_same_shapes(weights):
    w = quantized(dtype="int4", by_scale=(2, N), of_scale="float16")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), w)
    fast, abstract = quake_jax.pack(dense, {"w": shapes}, X, weights=weights)
    repacked = fast.repack({"w": w})
    assert jax.tree.structure(repacked) == jax.tree.structure(abstract)
    np.testing.assert_array_equal(repacked["w"].qvalue.unpack(), exact(w))
    # Whether they are exact is known when they are packed, also while that is traced.
    jitted = jax.jit(fast.repack)({"w": w})
    jax.tree.map(np.testing.assert_array_equal, repacked, jitted)


@pytest.mark.parametrize(
    "w, fun",
    [
        (quantized(by_scale=(K, 1)), dense),  # a scale for each row
        (quantized(by_scale=(4, N)), dense),  # groups of 16
        (quantized(), lambda w, x: x @ jnp.sin(dequantized(w["w"]))),
        (quantized(), lambda w, x: x @ (dequantized(w["w"]) * w["w"].scale + 1)),
    ],
    ids=["rows", "small groups", "another function", "another weight"],
)
def test_what_is_quantised_again(w, fun):
    fast, packed = quake_jax.pack(fun, {"w": w}, X, weights="int8", activations=None)
    (layer,) = fast.report.layers
    assert 0 < layer.error < 0.02
    wanted = fun({"w": w}, X)
    np.testing.assert_allclose(fast(packed, X), wanted, atol=0.03 * np.abs(wanted).max())


def test_scales_that_float16_has_not():
    w = quantized(by_scale=(2, N))
    fast, packed = quake_jax.pack(dense, {"w": w}, X, weights="int8")
    assert 0 < fast.report.layers[0].error < 2.0**-11
    np.testing.assert_allclose(packed["w"].qvalue.unpack(), exact(w), rtol=2.0**-11)


def test_rules_name_the_array():
    params = {"a": quantized(), "b": quantized()}

    def fun(p, x):
        return x @ dequantized(p["a"]), x @ dequantized(p["b"])

    rules = [("a", None), ("b", "bfloat16")]
    fast, packed = quake_jax.pack(fun, params, X, weights="int8", rules=rules)
    assert {x.path for x in fast.report.kept} == {"a/qvalue", "a/scale"}
    assert [(x.paths, x.dtype) for x in fast.report.layers] == [(("b",), "bfloat16")]
    assert packed["a"].qvalue is params["a"].qvalue and packed["b"].scale is None


def test_codes_and_scales_of_ones_own():
    w = quantized()
    params = {"codes": w.qvalue, "scale": w.scale}
    fast, packed = quake_jax.pack(
        lambda p, x: x @ (p["codes"] * p["scale"]), params, X, weights="int8"
    )
    assert fast.report.layers[0].error == 0
    np.testing.assert_array_equal(packed["codes"].unpack(), exact(w))
    # Integers that nobody calls codes are no weight, but no obstacle to one.
    fast, _ = quake_jax.pack(
        lambda p, x: x @ p["codes"].astype(jnp.float32), params, X, weights="int8"
    )
    (left,) = fast.report.programs[0].left
    assert "made of integers alone" in left.reason and not fast.report.layers


def test_a_model_of_qwix():
    qwix = pytest.importorskip("qwix")
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.DenseGeneral((4, 16), name="heads")(x).reshape(x.shape)
            return nn.Dense(K)(nn.gelu(nn.Dense(2 * K)(x)))

    model = Block()
    params = model.init(jax.random.key(0), X)
    for weights, tile in (("int8", None), ("int4", 32)):
        rule = qwix.QuantizationRule(weight_qtype=weights, tile_size=tile)
        ptq = qwix.quantize_model(model, qwix.PtqProvider([rule]))
        quantised = qwix.quantize_params(
            params["params"], jax.eval_shape(ptq.init, jax.random.key(0), X)["params"]
        )
        variables = {"params": quantised}
        fast, packed = quake_jax.pack(
            ptq.apply, variables, X, weights=weights, activations=None, order=5
        )
        assert len(fast.report.layers) == 3
        # Of groups, whose scales are of float32 here.
        assert all(x.dtype == weights for x in fast.report.layers)
        assert all(x.error < (2.0**-11 if tile else 1e-9) for x in fast.report.layers)
        got, wanted = jax.jit(fast)(packed, X), ptq.apply(variables, X)
        np.testing.assert_allclose(got, wanted, atol=3e-3 if tile else 1e-4)
