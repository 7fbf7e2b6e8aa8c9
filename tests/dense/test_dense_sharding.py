"""Dense layers on eight devices: rows, columns and stacks of weights stay where they are."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import FORMATS, normal, pack
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quake_jax

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")

K, N = 64, 24


@functools.cache
def weight(format: str, seed: int = 1):
    return pack(normal((K, N), seed) / 8, format)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(request.param,) * 2)
    weight.cache_clear()  # arrays belong to the mesh that they were made in
    with jax.set_mesh(mesh):
        yield mesh
    weight.cache_clear()


def place(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("spec", [P("a"), P(("a", "b")), P("a", "b"), P(None, ("a", "b"))], ids=str)
@pytest.mark.parametrize("format", ["float32", "int8"])
def test_rows_stay_split(spec, format, mesh):
    w, gate = weight(format), weight(format, 7)
    x, residual = normal((8, 8, K)), normal((8, 8, N), 1)
    norm = quake_jax.RMSNorm(jnp.ones(K), 1e-5)

    def f(x, residual):
        return quake_jax.dense(
            x, w, jnp.ones(N), gate=gate, activation="silu", residual=residual, norm=norm
        )

    split = place(x, mesh, spec), place(residual, mesh, spec)
    text = jax.jit(f).lower(*split).compile().as_text()
    assert not any(f" {name}" in text for name in COLLECTIVES)
    y, expected = jax.jit(f)(*split), jax.jit(f)(x, residual)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 2)))(*z) for z in (split, (x, residual))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-3)


def test_operands_that_are_split_differently(mesh):
    w = weight("int8")
    x, residual = normal((8, 8, K)), normal((8, 8, N), 1)
    expected = quake_jax.dense(x, w, residual=residual)
    for specs in ((P("a"), P("b")), (P(None, None, "a"), P("a", None, "b")), (P(), P("a"))):
        operands = [place(z, mesh, spec) for z, spec in zip((x, residual), specs, strict=True)]
        y = jax.jit(lambda x, r: quake_jax.dense(x, w, residual=r))(*operands)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    packed = jax.tree.map(
        lambda leaf: place(leaf, mesh, P(None, "a")), pack(normal((K, 32)), "int8")
    )
    y = jax.jit(quake_jax.dense)(place(x, mesh, P("a")), packed)
    expected = quake_jax.dense(x, pack(normal((K, 32)), "int8"))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def moved(text: str) -> set[str]:
    """The dtypes of the arrays that collectives of a compiled program move."""
    lines = [line for line in text.splitlines() if any(f" {c}" in line for c in COLLECTIVES)]
    return {kind for line in lines for kind in re.findall(r"= \(?(\w+)\[", line)}


def place_packed(packed, mesh, spec):
    return jax.device_put(packed, quake_jax.packed_shardings(packed, NamedSharding(mesh, spec)))


# What x is split along, and the weights; and the dtypes of what moves.
COLUMNS = {
    "columns": (P(), P(None, "a"), set()),
    "rows of the weight": (P(), P("a"), set()),
    "both": (P(), P("b", "a"), set()),
    "rows and columns": (P("b"), P(None, "a"), set()),
    "few columns": (P("a"), P(None, "b"), set()),
    "the last axis of x": (P(None, None, "a"), P("a"), {"f32"}),
    "the same devices": (P("a"), P(None, "a"), {"f32"}),
    "some of the same devices": (P(("a", "b")), P(None, "b"), {"f32"}),
}


@pytest.mark.parametrize(("rows", "spec", "moves"), COLUMNS.values(), ids=COLUMNS)
def test_columns_stay_split(rows, spec, moves, mesh):
    w, gate = (pack(normal((K, 128), seed), "int8") for seed in (1, 2))
    x, residual, bias = normal((8, 8, K)), normal((8, 8, 128), 3), normal(128, 4)
    norm = quake_jax.RMSNorm(jnp.ones(K), 1e-5)

    def f(x, residual, bias, w, gate):
        fused = {"gate": gate, "gate_bias": bias, "residual": residual, "norm": norm}
        return quake_jax.dense(x, w, bias, activation="silu", **fused)

    expected = jax.jit(f)(x, residual, bias, w, gate)
    packed = [place_packed(z, mesh, spec) for z in (w, gate)]
    columns = packed[0].codes.sharding.spec[0]
    split = place(x, mesh, rows), place(residual, mesh, P()), place(bias, mesh, P(columns)), *packed
    text = jax.jit(f).lower(*split).compile().as_text()
    assert moved(text) == moves
    parts = 8 if isinstance(columns, tuple) else mesh.shape[columns]
    ((*_, local),) = re.findall(r"= f32\[([\d,]*),(\d*)\]\S* custom-call\(.*quake_jax_dense", text)
    assert int(local) == 128 // parts
    y = jax.jit(f)(*split)
    # Sums of a column are the same wherever it is.
    np.testing.assert_array_equal(y, expected)
    assert y.sharding.spec[-1] == columns
    np.testing.assert_array_equal(f(*split), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_columns_of_all_formats_and_their_derivatives(format, mesh):
    w = pack(normal((K, 64)), format)
    x, split = normal((8, K), 1), place(normal((8, K), 1), mesh, P("b"))
    packed = place_packed(w, mesh, P(None, "a"))
    if format.startswith("int4"):
        codes = jnp.zeros((K, 64), jnp.uint8)
        table = quake_jax.PackedWeight.from_codes(
            codes, jnp.ones((2, 64)), "int4", table=jnp.arange(16.0) - 8
        ).table
        packed = packed.__class__(**(vars(packed) | {"table": place(table, mesh, P())}))

    def f(x, w, order=None):
        return quake_jax.dense(x, w, activation="gelu", order=order)

    assert not moved(jax.jit(f).lower(split, packed).compile().as_text())
    np.testing.assert_array_equal(jax.jit(f)(split, packed), jax.jit(f)(x, w))
    for g in (
        lambda x, w: f(x, w, "exact"),
        jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2)),
        lambda x, w: w.unpack(),
    ):
        expected = jax.jit(g)(x, w)
        error = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(jax.jit(g)(split, packed), expected, rtol=1e-5, atol=error)


def test_columns_of_several_weights(mesh):
    sizes = (128, 64, 32)
    weights = [pack(normal((K, n), n), "int8") for n in sizes]
    biases = [normal(n, n) for n in sizes]
    x = normal((8, K))
    f = jax.jit(lambda x, weights, biases: quake_jax.dense(x, weights, biases))
    split = [place_packed(w, mesh, P(None, "b")) for w in weights]
    on_mesh = place(x, mesh, P("a")), split, [place(b, mesh, P("b")) for b in biases]
    assert not moved(f.lower(*on_mesh).compile().as_text())
    for y, expected in zip(f(*on_mesh), f(x, weights, biases), strict=True):
        np.testing.assert_array_equal(y, expected)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("a", "b")), 2)
    # Two panels of the last one for four devices.
    split = [place_packed(w, mesh, P(None, "a")) for w in weights]
    on_mesh = place(x, mesh, P()), split, [place(b, mesh, P()) for b in biases]
    assert "s8" not in moved(f.lower(*on_mesh).compile().as_text())
    for y, expected in zip(f(*on_mesh), f(x, weights, biases), strict=True):
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_weights_on_a_mesh_that_other_operands_are_not_of(kind):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
    w, x, residual = pack(normal((K, 128)), "int8"), normal((8, K), 1), normal((8, 128), 2)
    packed = place_packed(w, mesh, P(None, "a"))

    def f(x, residual, w):
        return quake_jax.dense(x, w, jnp.ones(128), residual=residual)

    expected = jax.jit(f)(x, residual, w)
    for g in (f, jax.jit(f)):
        np.testing.assert_array_equal(g(x, residual, packed), expected)


@pytest.mark.parametrize("n", [24, 16, 48])
def test_columns_that_do_not_come_out_even(n, mesh):
    w, x = pack(normal((K, n)), "int8"), normal((8, K), 1)
    expected = quake_jax.dense(x, w)
    if n == 24:  # its last panel is not full
        packed = jax.tree.map(lambda leaf: place(leaf, mesh, P("b")), w)
        np.testing.assert_array_equal(jax.jit(quake_jax.dense)(x, packed), expected)
    f = jax.jit(quake_jax.dense, out_shardings=NamedSharding(mesh, P(None, ("a", "b"))))
    np.testing.assert_array_equal(f(x, w), expected)
    f = jax.jit(quake_jax.dense, out_shardings=NamedSharding(mesh, P(None, "b")))
    np.testing.assert_array_equal(f(x, w), expected)


def test_experts_stay_split(mesh):
    experts, x = pack(normal((4, K, N)) / 8, "int8"), normal((4, 6, K), 1)
    split = jax.tree.map(lambda leaf: place(leaf, mesh, P("a")), (x, experts))
    f = jax.jit(jax.vmap(quake_jax.dense))
    text = f.lower(*split).compile().as_text()
    assert not any(f" {name}" in text for name in COLLECTIVES)
    np.testing.assert_allclose(f(*split), f(x, experts), rtol=1e-5, atol=1e-5)


def test_columns_of_experts_stay_split(mesh):
    experts, x = pack(normal((4, K, 32)) / 8, "int8"), normal((4, 6, K), 1)
    split = place(x, mesh, P("a")), place_packed(experts, mesh, P("a", None, "b"))
    assert split[1].codes.sharding.spec[:2] == ("a", "b")
    f = jax.jit(jax.vmap(quake_jax.dense))
    assert not moved(f.lower(*split).compile().as_text())
    np.testing.assert_array_equal(f(*split), f(x, experts))


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_shard_map_of_columns(format, mesh):
    w, x, bias = pack(normal((K, 128)), format), normal((8, K)), normal(128, 1)

    def body(x, bias, w):
        assert w.shape == w.unpack().shape == (K, 32) and "shape=(64, 32)" in repr(w)
        return quake_jax.dense(x, w, bias, activation="gelu")

    specs = P("b"), P("a"), quake_jax.packed_shardings(w, P(None, "a"))
    f = jax.jit(jax.shard_map(body, in_specs=specs, out_specs=P("b", "a")))
    split = place(x, mesh, P("b")), place(bias, mesh, P("a")), place_packed(w, mesh, P(None, "a"))
    assert not moved(f.lower(*split).compile().as_text())
    np.testing.assert_array_equal(f(*split), quake_jax.dense(x, w, bias, activation="gelu"))


def test_shard_map_refuses_parts_of_rows_and_of_panels():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    for n, spec in ((128, P(None, "a")), (120, P("a"))):
        w = pack(normal((K, n)), "int8")
        specs = jax.tree.map(lambda leaf, spec=spec: spec if leaf.ndim > 2 else P(), w)
        f = jax.shard_map(quake_jax.dense, mesh=mesh, in_specs=(P(), specs), out_specs=P("a"))
        with pytest.raises(ValueError, match=r"weight.codes must be of shape \(8, 16, 16, 4\)"):
            jax.eval_shape(f, normal((8, K)), w)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("names", [("a", "b"), ("a",)], ids=["whole", "some axes"])
def test_shard_map_and_its_gradients(check_vma, names):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    w, x, bias = weight("int8"), normal((8, K)), normal(N, 1)

    def loss(x, bias, w):
        return jnp.sum(jnp.sin(quake_jax.dense(x, w, bias, activation="silu")))

    def summed(*x):
        return jax.lax.psum(loss(*x), "a")

    mapped = jax.shard_map(
        summed,
        mesh=mesh,
        in_specs=(P("a"), P(), P()),
        out_specs=P(),
        axis_names=set(names),
        check_vma=check_vma,
    )
    actual, expected = (jax.jit(jax.grad(f, (0, 1)))(x, bias, w) for f in (mapped, loss))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * float(jnp.abs(e).max()))


def test_exported_for_several_devices(mesh):
    w, x = weight("int8"), normal((8, K))
    split = place(x, mesh, P("a"))

    def f(x):
        return quake_jax.dense(x, w, activation="silu")

    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(jax.jit(f), disabled_checks=checks)(split)
    loaded = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(jax.jit(loaded.call)(split), f(x), rtol=1e-5, atol=1e-5)
