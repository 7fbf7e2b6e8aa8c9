"""Dense layers whose rows are quantised in a range that the weight brings along."""

import dataclasses
import functools

import dense_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import SHAPES, normal

import quake_jax
from quake_jax._dense.call import chained

K, N = 64, 40


def weight(k=K, n=N, limits=(-2.0, 3.0), seed=1) -> quake_jax.PackedWeight:
    packed = quake_jax.pack_weight(normal((k, n), seed), "int8")
    return dataclasses.replace(packed, activation_range=jnp.array(limits, jnp.float32))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "limits", [(-2, 3), (-0.17, 5), (-1, 0), (1, 2), (0, 0), (2, -2), (-3e38, 3e38)], ids=str
)
def test_integer_sums_are_exact(shape, limits):
    m, n, k = shape
    x, packed = np.array(normal((m, k), 3)), weight(k, n, limits)
    exactly = dataclasses.replace(packed, scales=jnp.ones_like(packed.scales))
    codes = np.rint(float64_of(packed) / columns(packed.scales, n)).astype(np.int64)
    q, s, z = oracle.in_range(x, packed.activation_range)
    sums = (q - z) @ codes
    assert np.abs(sums).max(initial=0) < 2**22
    y = np.asarray(quake_jax.dense(x, exactly), np.float64)
    np.testing.assert_array_equal(np.rint(y / s), sums)


def columns(x, n):
    return np.asarray(x, np.float64).reshape(-1)[:n]


def float64_of(packed):
    return np.asarray(packed.unpack(), np.float64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
def test_everything_beside_the_product(dtype, gated):
    m, k, n = 37, 96, 33
    x, packed = normal((m, k), 2, dtype), weight(k, n)
    given = {"bias": normal(n, 4), "residual": normal((m, n), 5, dtype), "activation": "gelu"}
    if gated:
        given |= {"gate": weight(k, n, seed=6), "gate_bias": normal(n, 7)}
    given["norm"] = quake_jax.LayerNorm(1 + normal(k, 8) / 4, normal(k, 9), 1e-3)
    y = quake_jax.dense(x, packed, order=5, **given)
    given["activation"] = "gelu_tanh"
    oracle.assert_close(y, oracle.dense(x, packed, order=5, **given))


def test_each_weight_has_room_for_its_range():
    """Weights that read the same rows may have others: the rows have one that has room for all."""
    x, wide = normal((5, K)), weight(limits=(-4, 5))
    both = [weight(limits=(-4, 1)), weight(limits=(-1, 5), seed=2)]
    ranged = [dataclasses.replace(w, activation_range=wide.activation_range) for w in both]
    expected = [quake_jax.dense(x, w) for w in ranged]
    for y, e in zip(quake_jax.dense(x, both), expected, strict=True):
        np.testing.assert_array_equal(y, e)


def test_a_range_is_not_shared_with_a_weight_without():
    x, packed = normal((5, K)), weight()
    without = dataclasses.replace(weight(seed=2), activation_range=None)
    for y, w in zip(quake_jax.dense(x, [packed, without]), (packed, without), strict=True):
        np.testing.assert_array_equal(y, quake_jax.dense(x, w))
    y = quake_jax.dense(x, packed, gate=without, activation="silu", order=5)
    gate = oracle.dense(x, without).through("silu", 5)
    oracle.assert_close(y, gate.times(oracle.dense(x, packed)).plus(0.0))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("order", [None, "exact"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_row_that_is_not_finite(value, order):
    x, packed = np.array(normal((7, 128))), weight(128)
    expected = np.array(quake_jax.dense(x, packed, order=order))
    for row, column in ((1, 0), (2, 5), (4, 127)):
        x[row, column], expected[row] = value, np.nan
    np.testing.assert_array_equal(quake_jax.dense(x, packed, order=order), expected)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("order", [None, "exact"])
@pytest.mark.parametrize(
    "limits", [(np.nan, 1), (-1, np.nan), (-np.inf, 1), (-1, np.inf), (np.inf, 1), (-1, -np.inf)]
)
def test_range_that_is_not_finite(limits, order):
    assert np.isnan(quake_jax.dense(normal((3, K)), weight(limits=limits), order=order)).all()


def test_transformations():
    """scan over layers and vmap over experts, whose ranges are their own; jit, grad, export."""
    x = normal((6, K))
    layers = [weight(n=K, limits=(-i, 2 * i), seed=i) for i in (1, 2, 3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stack.activation_range.shape == (3, 2)
    each = jnp.stack([quake_jax.dense(x, w) for w in layers])
    of_experts = functools.partial(jax.vmap(quake_jax.dense, (None, 0)), x)
    np.testing.assert_array_equal(jax.jit(of_experts)(stack), each)
    rows = jnp.stack([x, 2 * x])
    np.testing.assert_array_equal(
        jax.vmap(lambda x: quake_jax.dense(x, layers[0]))(rows), quake_jax.dense(rows, layers[0])
    )

    def step(x, w):
        return jnp.tanh(quake_jax.dense(x, w)), None

    expected = x
    for w in layers:
        expected, _ = step(expected, w)
    np.testing.assert_allclose(jax.lax.scan(step, x, stack)[0], expected, rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(quake_jax.dense(x, layers[0])))(x)
    straight = jnp.broadcast_to(layers[0].unpack().sum(-1), x.shape)
    np.testing.assert_allclose(gradient, straight, rtol=1e-5, atol=1e-5)
    exported = jax.export.export(jax.jit(quake_jax.dense), disabled_checks=ALLOWED)
    program = jax.export.deserialize(exported(x, layers[0]).serialize())
    np.testing.assert_array_equal(program.call(x, layers[0]), each[0])


ALLOWED = [jax.export.DisabledSafetyCheck.custom_call("quake_jax_dense")]


@pytest.mark.parametrize("leaf", [jnp.zeros(3), jnp.zeros(2, jnp.bfloat16), jnp.zeros((1, 2))])
def test_leaves_that_do_not_fit(leaf):
    packed = dataclasses.replace(weight(), activation_range=leaf)
    message = r"weight\.activation_range must be of shape \(2,\) and dtype float32; got shape"
    with pytest.raises(ValueError, match=message):
        quake_jax.dense(normal((3, K)), packed)


@pytest.mark.parametrize("dtype, keywords", [("bfloat16", {}), ("int8", {"group_size": 32})])
def test_formats_without_ranges(dtype, keywords):
    packed = quake_jax.pack_weight(normal((K, N)), dtype, **keywords)
    packed = dataclasses.replace(packed, activation_range=jnp.zeros(2))
    with pytest.raises(TypeError, match=r"weight\.activation_range must be None; got shape \(2,\)"):
        quake_jax.dense(normal((3, K)), packed)


# Layers one after the other, between which there are codes.


def layers(m: int, dtype="float32", gated=False):
    """x, and what the layers take beside it."""
    norm = quake_jax.RMSNorm(1 + normal(K, 8) / 4)
    first = {"weight": weight(K, 80, (-3, 3)), "bias": normal(80, 2), "norm": norm}
    if gated:
        first |= {"gate": weight(K, 80, (-3, 3), seed=3), "gate_bias": normal(80, 4)}
    first |= {"activation": "gelu_tanh", "order": 5, "preferred_element_type": "float32"}
    second = {"weight": weight(80, N, (-0.17, 9), seed=5), "bias": normal(N, 6)}
    second |= {"residual": normal((m, N), 7, dtype), "activation": None, "order": 5}
    return normal((m, K), 1, dtype), first, second | {"preferred_element_type": dtype}


def one_by_one(x, first, second):
    return quake_jax.dense(quake_jax.dense(x, **first), **second)


@pytest.mark.parametrize("m", [1, 5, 37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
def test_chained_layers_are_these_layers(m, dtype, gated):
    """Bit for bit: the second one would make the same codes of what the first one gives."""
    x, first, second = layers(m, dtype, gated)
    expected = one_by_one(x, first, second)
    np.testing.assert_array_equal(chained(x, first, second), expected)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("order", [5, "exact"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_keep_what_is_not_finite(value, order):
    x, first, second = layers(7)
    first["norm"], first["order"], second["order"] = None, order, order
    x = np.array(x)
    expected = np.array(chained(x, first, second))
    assert np.isfinite(expected).all()
    x[2, 5], expected[2] = value, np.nan
    np.testing.assert_array_equal(chained(x, first, second), expected)
    bias = np.zeros(80, np.float32)
    bias[3] = value  # in all rows, after the first product
    assert np.isnan(chained(np.zeros_like(x), first | {"bias": bias}, second)).all()


def test_derivatives_of_chained_layers():
    x, first, second = layers(5)
    biases = first.pop("bias"), second.pop("bias")

    def loss(f, x, biases):
        y = f(x, first | {"bias": biases[0]}, second | {"bias": biases[1]})
        return jnp.sum(jnp.sin(jnp.arange(N)) * y)

    both = (chained, one_by_one)
    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(x, biases) for f in both
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # What one_by_one's gradient goes through is quantised, here it is not.
        np.testing.assert_allclose(a, e, atol=0.02 * float(jnp.abs(e).max()))
        assert np.abs(a).max() > 0.1
    stacked = jax.vmap(lambda x: chained(x, first, second))(jnp.stack([x, x]))
    np.testing.assert_array_equal(stacked[1], chained(x, first, second))
