"""Dense layers on eight devices: rows, and stacks of weights, stay where they are."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import normal, pack
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


def test_experts_stay_split(mesh):
    experts, x = pack(normal((4, K, N)) / 8, "int8"), normal((4, 6, K), 1)
    split = jax.tree.map(lambda leaf: place(leaf, mesh, P("a")), (x, experts))
    f = jax.jit(jax.vmap(quake_jax.dense))
    text = f.lower(*split).compile().as_text()
    assert not any(f" {name}" in text for name in COLLECTIVES)
    np.testing.assert_allclose(f(*split), f(x, experts), rtol=1e-5, atol=1e-5)


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
