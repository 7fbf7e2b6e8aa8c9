"""Packed parameters on a mesh of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import quake_jax
from quake_jax._core.jax_names import GSPMDSharding

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)


def abstract(*shape, dtype="int8", **keywords):
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda w: quake_jax.pack_weight(w, dtype, **keywords), weight)


# The shape of a weight, how its parameter is split, and its codes.
SPECS = {
    "columns": ((64, 128), P(None, "a"), P("a")),
    "rows": ((64, 128), P("a"), P("a")),
    "both": ((64, 128), P("a", "b"), P(("b", "a"))),
    "two axes": ((64, 128), P(None, ("a", "b")), P(("a", "b"))),
    "whole": ((64, 128), P(), P(None)),
    "layers": ((4, 64, 128), P("a", None, "b"), P("a", "b")),
    "layers that are whole": ((3, 64, 128), P(None, "b"), P(None, "b")),
    "a parameter of more axes": ((64, 128), P(None, "a", "b"), P(("b", "a"))),
    "too few panels": ((64, 32), P("a", "b"), P("b")),
    "a panel that is not full": ((64, 120), P(None, "a"), P(None)),
}


@pytest.mark.parametrize(("shape", "spec", "codes"), SPECS.values(), ids=SPECS)
def test_how_a_weight_is_split(shape, spec, codes):
    packed, mesh = abstract(*shape, dtype="int4"), make_mesh()
    found = quake_jax.packed_shardings(packed, NamedSharding(mesh, spec))
    assert jax.tree.structure(found) == jax.tree.structure(packed)
    assert found.codes == found.scales == NamedSharding(mesh, codes)
    for leaf, sharding in zip(jax.tree.leaves(packed), jax.tree.leaves(found), strict=True):
        sharding.shard_shape(leaf.shape)  # raises where it does not come out even
    with jax.set_mesh(mesh):
        assert quake_jax.packed_shardings(packed, spec).codes == codes


def test_what_has_no_columns():
    codes = jnp.zeros((4, 64, 64), jnp.uint8)
    packed = quake_jax.PackedWeight.from_codes(
        codes,
        jnp.ones((4, 2, 64)),
        "int4",
        offsets=jnp.ones((4, 2, 64)),
        permutation=jnp.tile(jnp.arange(64), (4, 1)),
        table=jnp.arange(16.0),
    )
    with jax.set_mesh(make_mesh()):
        found = quake_jax.packed_shardings(packed, P("a", None, "b"))
    assert found.codes == found.scales == found.offsets == P("a", "b")
    assert found.permutation == found.table == P("a")


def test_trees():
    weight, array = abstract(64, 128), jax.ShapeDtypeStruct((128,), jnp.float32)
    both = quake_jax.PackedLeaf(array, (weight,))
    packed = {"a": weight, "b": {"c": array, "d": None, "e": both}}
    one = SingleDeviceSharding(jax.devices()[0])
    found = quake_jax.packed_shardings(packed, one)
    assert jax.tree.structure(found) == jax.tree.structure(packed)
    assert set(jax.tree.leaves(found)) == {one}
    mesh = make_mesh()
    columns, whole = NamedSharding(mesh, P(None, "a")), NamedSharding(mesh, P())
    shardings = {"a": columns, "b": {"c": whole, "d": columns, "e": columns}}
    found = quake_jax.packed_shardings(packed, shardings)
    assert found["a"].codes.spec == found["b"]["e"].weights[0].codes.spec == P("a")
    assert found["b"]["c"] == whole and found["b"]["d"] is None
    assert found["b"]["e"].array == columns


def test_mistakes():
    packed, mesh = {"w": abstract(64, 128)}, make_mesh()
    halves = NamedSharding(mesh, P("b"))._to_xla_hlo_sharding(2)
    for shardings, error, message in (
        ({"w": "a"}, TypeError, "shardings must be a tree of Sharding or PartitionSpec; got 'a'"),
        ({"v": P()}, ValueError, "shardings must be of the structure of packed; got another: "),
        (P("a"), ValueError, r"shardings must be of axes of the mesh, \(\) \(see jax.set_mesh\)"),
        (
            GSPMDSharding(mesh._internal_device_list, halves),
            ValueError,
            "shardings must be a NamedSharding, a PartitionSpec or one that splits nothing; got",
        ),
    ):
        with pytest.raises(error, match=message):
            quake_jax.packed_shardings(packed, shardings)


# A column-parallel layer and a row-parallel one.
SHARDINGS = {"up": P(None, "a"), "bias": P("a"), "down": P("a"), "out": P()}


def mlp(params, x):
    return jax.nn.gelu(x @ params["up"] + params["bias"]) @ params["down"] + params["out"] + x


def parameters():
    shapes = {"up": (64, 256), "bias": (256,), "down": (256, 64), "out": (64,)}
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) / 8, jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("weights", ["float32", "int8", "int4"])
def test_a_model_on_a_mesh(weights, kind):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 64)), jnp.float32)
    fast, packed = quake_jax.pack(mlp, parameters(), x, weights=weights)
    expected = jax.jit(fast)(packed, x)
    mesh = make_mesh(kind)
    shardings = {k: NamedSharding(mesh, spec) for k, spec in SHARDINGS.items()}
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, P("b")))
        moved = jax.device_put(packed, quake_jax.packed_shardings(packed, shardings))
        # Of parameters on a mesh packed ones are there already.
        on_mesh, made = quake_jax.pack(
            mlp, jax.device_put(parameters(), shardings), rows, weights=weights
        )
        for a, b, c in zip(*map(jax.tree.leaves, (packed, moved, made)), strict=True):
            assert b.sharding.is_equivalent_to(c.sharding, b.ndim)
            np.testing.assert_array_equal(a, c)
        text = jax.jit(fast).lower(moved, rows).compile().as_text()
        gathers = [line for line in text.splitlines() if " all-" in line or " collective-" in line]
        # What the row-parallel layer reads.
        assert len(gathers) == 1 and "= f32[" in gathers[0] and "all-gather" in gathers[0], gathers
        for f in (fast, on_mesh):
            y = jax.jit(f)(moved, rows)
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P(), P("a")], ids=["whole", "split"])
def test_a_tied_embedding_on_a_mesh(spec, kind):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(128, 64)), jnp.float32)
    tokens = jnp.asarray([[3, 127, 64], [0, 1, 2]])

    def tied(p, i):
        out = jax.typeof(p).sharding if any(jax.typeof(p).sharding.spec) else None
        rows = p.at[i].get(out_sharding=None if out is None else P())
        return rows, rows @ p.T

    expected = tied(table, tokens)
    with jax.set_mesh(make_mesh(kind)):
        table = jax.device_put(table, spec)
        fast, packed = quake_jax.pack(tied, table, tokens, weights="float32")
        assert isinstance(packed, quake_jax.PackedWeight)
        rows, product = jax.jit(fast)(packed, tokens)
        np.testing.assert_array_equal(rows, expected[0])
        np.testing.assert_allclose(product, expected[1], rtol=1e-4, atol=1e-4)


def scanned(w, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0]


def computed(w, x):
    return x @ jax.jit(lambda w: 2 * w + 1)(w)


IN_SHARD_MAP = {
    "model": (mlp, parameters(), "int8"),
    "scan": (scanned, jnp.stack([parameters()["up"][:, :64]] * 3), "int8"),
    "computed weight": (computed, parameters()["up"], "float32"),
    "tied embedding": (lambda p, i: p[i] @ p.T, parameters()["down"], "float32"),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("case", IN_SHARD_MAP)
def test_packed_functions_in_shard_map(case, check_vma):
    fun, params, weights = IN_SHARD_MAP[case]
    rng = np.random.default_rng(2)
    takes_rows = case == "tied embedding"
    x = rng.integers(0, 256, 8) if takes_rows else rng.normal(size=(8, 64)).astype(np.float32)
    fast, packed = quake_jax.pack(fun, params, x, weights=weights)
    expected = jax.jit(fast)(packed, x)
    with jax.set_mesh(make_mesh()):
        np.testing.assert_array_equal(jax.jit(fast)(packed, x), expected)
        f = jax.shard_map(fast, in_specs=(P(), P("b")), out_specs=P("b"), check_vma=check_vma)
        np.testing.assert_array_equal(f(packed, x), expected)
        if not takes_rows:
            of_parts = jax.grad(lambda x: jnp.sum(f(packed, x) ** 2))(x)
            whole = jax.grad(lambda x: jnp.sum(fast(packed, x) ** 2))(x)
            np.testing.assert_allclose(of_parts, whole, rtol=1e-4, atol=1e-4)


def test_packed_functions_refuse_parts_in_shard_map():
    mesh, x = make_mesh(), jnp.ones((8, 64))
    fast, packed = quake_jax.pack(mlp, parameters(), x, weights="int8")
    with jax.set_mesh(mesh):
        specs = quake_jax.packed_shardings(packed, SHARDINGS)
        for check_vma in (True, False):
            f = jax.shard_map(fast, in_specs=(specs, P("b")), out_specs=P("b"), check_vma=check_vma)
            with pytest.raises(
                ValueError, match="must be an array of shape .*in the body of jax.shard_map"
            ):
                jax.eval_shape(f, packed, x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_codes_between_layers_on_a_mesh(kind):
    """Rows and columns of both layers are divided: what devices then exchange are codes."""
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(size=shape).astype(np.float32) / 8
        for name, shape in (("up", (64, 128)), ("down", (128, 64)))
    }
    x = rng.normal(size=(16, 64)).astype(np.float32)

    def block(p, x):
        return jax.nn.gelu(x @ p["up"]) @ p["down"]

    fast, packed = quake_jax.pack(block, params, x, weights="int8", calibrate=x)
    expected = jax.jit(fast)(packed, x)
    mesh = make_mesh(kind)
    shardings = {"up": NamedSharding(mesh, P(None, "b")), "down": NamedSharding(mesh, P("b"))}
    packed = jax.device_put(packed, quake_jax.packed_shardings(packed, shardings))
    x = jax.device_put(x, NamedSharding(mesh, P("a")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(fast).lower(packed, x).compile()
    y = compiled(packed, x)
    np.testing.assert_array_equal(y, expected)
    assert y.sharding.spec == P("a", "b")
    gathered = [line for line in compiled.as_text().splitlines() if "all-gather(" in line]
    if kind == AxisType.Auto:  # else types say how what the first layer gives is split: floats
        assert len(gathered) == 1 and "s8[1,4,128]" in gathered[0]
