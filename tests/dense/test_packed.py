"""Packed weights: their layout, what packing rounds to, and their life as pytrees."""

import functools
import pickle

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import FORMATS, depth, normal, pack

import quake_jax
from quake_jax._dense import layout
from quake_jax._dense.packed import _pack_stack

formats = pytest.mark.parametrize("format", FORMATS)
INTEGERS = [f for f in FORMATS if f.startswith("int")]


# Layout.


def _code(packed, i: int, c: int):
    """The code of row i of column c, by the description of the layout."""
    codes, panel, c = np.asarray(packed.codes), c // 16, c % 16
    if packed.dtype == "float32":
        return codes[panel, i, c]
    if packed.dtype == "bfloat16":
        return codes[panel, i // 2, c, i % 2]
    if packed.dtype == "int8":
        return codes[panel, i // 4, c, i % 4]
    byte = int(codes[panel, i // 8, c, i % 4])
    return byte & 15 if i % 8 < 4 else byte >> 4


def _value(packed, i: int, c: int) -> float:
    code = float(_code(packed, i, c))
    if packed.dtype == "int4":
        code -= 8
    if packed.scales is None:
        return code
    scales, panel, c = np.asarray(packed.scales, np.float64), c // 16, c % 16
    if packed.group_size:
        return code * scales[panel, i // packed.group_size, c]
    return code * scales[panel, c]


@formats
def test_layout(format):
    k, n = depth(format, 45), 21
    packed = pack(normal((k, n)), format)
    expected = [[_value(packed, i, c) for c in range(n)] for i in range(k)]
    np.testing.assert_allclose(packed.unpack(), expected, rtol=2.0**-23)
    shapes = layout.shapes_of(packed.dtype, k, n, packed.group_size, packed.activations)
    for field in ("codes", "scales", "sums"):
        leaf = getattr(packed, field)
        found = None if leaf is None else (leaf.shape, leaf.dtype)
        assert found == shapes.get(field)
    # What fills up the last panel and the last word stands for nothing.
    full = quake_jax.PackedWeight(
        *jax.tree_util.tree_leaves(packed)[:1], *[None] * 6, k, n, *[0] * 3
    )
    rows = layout.from_words(full.codes, packed.dtype, -(-k // 8) * 8, 32)
    rows = np.asarray(rows.astype(jnp.float32))
    assert not rows[k:].any() and not rows[:, n:].any()
    if packed.scales is not None:
        assert not np.asarray(packed.scales)[-1, ..., n % 16 :].any()
    if packed.sums is not None:
        codes = layout.from_words(packed.codes, "int8", k, n)
        sums = layout.columns_from_panels(packed.sums, n, groups=False)
        np.testing.assert_array_equal(sums, np.asarray(codes, np.int32).sum(0))


# Precision.


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("format", INTEGERS)
def test_weights_are_rounded_to_the_nearest_code(format, method):
    dtype, keywords = FORMATS[format]
    k, n = depth(format, 128), 37
    weight = np.array(normal((k, n)) * np.exp(normal((1, n), 1)))
    weight[:, 5] = 0
    packed = quake_jax.pack_weight(weight, dtype, scale_method=method, **keywords)
    size = packed.group_size or k
    groups = weight.reshape(-1, size, n)
    largest = np.abs(groups).max(1, keepdims=True)
    step = largest / layout.LARGEST[dtype] * (1 + (2.0**-10 if packed.group_size else 2.0**-20))
    error = np.abs(np.asarray(packed.unpack()).reshape(groups.shape) - groups)
    if method == "max":
        assert (error <= step / 2 + 1e-7 * largest).all()
    else:
        nearest = pack(weight, format).unpack()
        columns = [
            ((np.asarray(w) - weight) ** 2).reshape(groups.shape).sum(1)
            for w in (packed.unpack(), nearest)
        ]
        assert (columns[0] <= columns[1] * (1 + 1e-6)).all()
        if dtype == "int4":
            assert columns[0].sum() < 0.95 * columns[1].sum()
    assert not np.asarray(packed.unpack())[:, 5].any()


def test_scales_of_groups_are_rounded_upwards():
    weight = np.array(normal((64, 48))) * 10.0 ** np.linspace(-7, 6, 48)
    packed = quake_jax.pack_weight(weight.astype(np.float32), "int8", group_size=32)
    largest = np.abs(weight.astype(np.float32)).reshape(2, 32, 48).max(1)
    scales = layout.columns_from_panels(packed.scales, 48, groups=True)
    assert (np.asarray(scales, np.float64) * 127 >= largest * (1 - 2.0**-22)).all()


@formats
def test_float_formats_and_dtypes_of_weights(format):
    weight = normal((depth(format, 32), 16), dtype="bfloat16")
    packed, wide = pack(weight, format), pack(weight.astype(jnp.float32), format)
    jax.tree.map(np.testing.assert_array_equal, packed, wide)
    if "float" in format:
        np.testing.assert_array_equal(packed.unpack(), weight.astype(jnp.float32))


# Pytrees.


@formats
def test_stacked_weights(format):
    """Leading axes stay in front; scan, vmap and indexing take one weight of them."""
    k = depth(format, 33)
    weights, x = normal((3, k, k), 1) / 8, normal((4, k))
    packed = pack(weights, format)
    assert packed.shape == (3, k, k) and packed[1].shape == (k, k)
    assert repr(packed[1]).startswith(f"PackedWeight(shape=({k}, {k}), dtype=")
    for i, one in enumerate(packed):
        jax.tree.map(np.testing.assert_array_equal, one, pack(weights[i], format))
        np.testing.assert_array_equal(packed.unpack()[i], one.unpack())
    each = [quake_jax.dense(x, packed[i]) for i in range(3)]
    mapped = jax.jit(jax.vmap(quake_jax.dense, (None, 0)))(x, packed)
    np.testing.assert_allclose(mapped, jnp.stack(each), rtol=1e-5, atol=1e-5)
    _, scanned = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (x, quake_jax.dense(x, w)), x, w))(
        x, packed
    )
    np.testing.assert_allclose(scanned, jnp.stack(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_stacks_are_packed_layer_by_layer(dtype, method):
    weight = jax.ShapeDtypeStruct((16, 256, 512), jnp.float32)
    size, activations = (32 if dtype == "int4" else None), ("int8" if "int" in dtype else None)
    static = {"dtype": dtype, "group_size": size, "activations": activations, "method": method}
    compiled = _pack_stack.lower(weight, **static).compile()
    # Besides what goes in and comes out, what a layer or two take.
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * 256 * 512 * 4
    weight = normal((2, 3, 64, 32))
    got = quake_jax.pack_weight(weight, dtype, scale_method=method)
    wanted = jax.jit(lambda w: quake_jax.pack_weight(w, dtype, scale_method=method))(weight)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_indexing():
    packed = pack(normal((2, 3, 32, 16)), "int4")
    assert packed[1].shape == (3, 32, 16) and packed[1, 2].shape == packed[-1][0].shape == (32, 16)
    assert packed[:, 1].shape == (2, 32, 16) and packed[None, 0].shape == (1, 3, 32, 16)
    assert packed[jnp.array([1, 0, 1])].shape == (3, 3, 32, 16)
    assert jax.jit(lambda p, i: p[i])(packed, 1).shape == (3, 32, 16)
    for index in (2, -3, (0, 1, 2), ...):
        with pytest.raises(IndexError, match="PackedWeight: index"):
            packed[index]
    with pytest.raises(IndexError, match="leading axes"):
        packed[0, 0][0]


@formats
def test_tree_functions(format):
    packed = pack(normal((depth(format, 32), 16)), format)
    leaves, tree = jax.tree.flatten(packed)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert jax.tree.structure(again) == tree and hash(tree) == hash(jax.tree.structure(again))
    # Nothing is validated, and all can be printed.
    for leaf in (None, True, object(), jax.ShapeDtypeStruct((3,), jnp.float32)):
        assert repr(jax.tree.unflatten(tree, [leaf] * len(leaves))).startswith("PackedWeight(")
    shapes = jax.eval_shape(functools.partial(pack, format=format), jnp.ones((2, *packed.shape)))
    assert shapes.shape == (2, *packed.shape)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
    assert names[0] == ".codes" and len(names) == len(leaves)


@formats
def test_packed_weights_through_jit_pickle_and_devices(format):
    k = depth(format, 32)
    packed, x = pack(normal((k, 16)), format), normal((2, k), 1)
    expected = quake_jax.dense(x, packed)
    again = pickle.loads(pickle.dumps(packed))
    assert again.__dict__.keys() == packed.__dict__.keys() and again.shape == packed.shape
    for other in (
        again,
        jax.jit(lambda p: p)(packed),
        jax.device_put(packed, jax.devices()[0]),
        jax.tree.map(np.asarray, packed),
        jax.jit(functools.partial(pack, format=format))(normal((k, 16))),
    ):
        np.testing.assert_array_equal(quake_jax.dense(x, other), expected)
    copy = jax.tree.map(jnp.copy, packed)
    assert jax.tree.structure(jax.jit(lambda p: p, donate_argnums=0)(copy)) == jax.tree.structure(
        packed
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(copy))


@pytest.mark.parametrize("format", ["bfloat16", "int8", "int4"])
def test_exported_with_a_packed_weight_as_argument(format):
    k = depth(format, 32)
    packed, x = pack(normal((k, 16)), format), normal((2, k), 1)
    norm = quake_jax.LayerNorm(jnp.ones(k), jnp.zeros(k), 1e-5)

    def f(x, weight, norm):
        return quake_jax.dense(x, weight, norm=norm, activation="silu")

    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(jax.jit(f), disabled_checks=checks, platforms=("cpu", "tpu"))
    loaded = jax.export.deserialize(exported(x, packed, norm).serialize())
    np.testing.assert_allclose(loaded.call(x, packed, norm), f(x, packed, norm), atol=1e-6)
    # A batch of any size.
    (batch,) = jax.export.symbolic_shape("batch")
    rows = jax.ShapeDtypeStruct((batch, 3, k), jnp.float32)
    exported = jax.export.export(jax.jit(f), disabled_checks=checks)(rows, packed, norm)
    x = normal((5, 3, k), 1)
    np.testing.assert_allclose(exported.call(x, packed, norm), f(x, packed, norm), atol=1e-6)


def test_strict_promotion():
    """Under the strictest settings of jax.numpy."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        x = normal((2, 3, 64))
        for format in FORMATS:
            packed = pack(normal((64, 16), 1), format)
            for order in (3, "exact"):
                quake_jax.dense(
                    x,
                    packed,
                    jnp.ones(16),
                    activation="silu",
                    gate=packed,
                    gate_bias=jnp.ones(16),
                    residual=jnp.ones((2, 3, 16)),
                    norm=quake_jax.LayerNorm(jnp.ones(64), jnp.ones(64)),
                    order=order,
                )
                jax.grad(lambda x, p=packed, o=order: quake_jax.dense(x, p, order=o).sum())(x)
        quake_jax.dense(
            x, normal((64, 16)), jnp.ones(16), norm=quake_jax.LayerNorm(jnp.ones(64), jnp.ones(64))
        )
