"""Eight devices: batch axes stay where they are, only what softmax reduces is gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ELEMENTWISE, FUNCTIONS, SOFTMAX, inputs, parametrize_functions
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import quake_jax

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")

COLLECTIVES = ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter")
SHAPE = (16, 8, 24)


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def compiled(f, *arguments) -> str:
    return jax.jit(f).lower(*arguments).compile().as_text()


def collectives(text: str) -> set[str]:
    return {name for name in COLLECTIVES if f" {name}" in text}


def kernel_shapes(text: str) -> list[tuple[int, ...]]:
    """The shapes on which one device calls kernels."""
    shapes = re.findall(r"\[([\d,]*)\]\S* custom-call\(.*quake_jax_", text)
    return [tuple(int(n) for n in shape.split(",")) for shape in shapes]


def test_the_search_for_collectives_finds_one(mesh):
    # A guard for the tests below: a reduction over a split axis must show.
    x = jax.device_put(inputs(SHAPE), NamedSharding(mesh, P("a")))
    assert collectives(compiled(lambda a: jnp.sum(a, axis=0), x))


def parts(spec: P) -> int:
    """Over how many devices a spec splits an array."""
    sizes = {"a": 4, "b": 2}
    names = [
        n for entry in spec if entry for n in (entry if isinstance(entry, tuple) else (entry,))
    ]
    return int(np.prod([sizes[name] for name in names]))


def place(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def check_values(f, x, split):
    """Results on the mesh, compiled and not, are those of one device, and keep the sharding."""
    single = jax.device_get(x)
    expected = np.asarray(jax.jit(f)(single))
    for y in (jax.jit(f)(split), f(split)):
        np.testing.assert_array_equal(y, expected)
        assert y.sharding.is_equivalent_to(split.sharding, x.ndim)


BATCH_SPECS = [P("a"), P(("a", "b")), P("a", "b"), P(None, ("b", "a"))]


@pytest.mark.parametrize("spec", BATCH_SPECS, ids=str)
@parametrize_functions()
def test_batch_axes_stay_split(function, spec, mesh):
    x = inputs(SHAPE)
    split = place(x, mesh, spec)
    text = compiled(function.quake, split)
    assert not collectives(text)
    (shape,) = kernel_shapes(text)
    assert np.prod(shape) == x.size // parts(spec)
    if spec == P("a", "b"):
        check_values(function.quake, x, split)


@pytest.mark.parametrize("spec", [P(None, None, "a"), P("a", None, "b")], ids=str)
@parametrize_functions(ELEMENTWISE)
def test_elementwise_functions_keep_the_last_axis_split_too(function, spec, mesh):
    x = inputs(SHAPE)
    split = place(x, mesh, spec)
    text = compiled(function.quake, split)
    assert not collectives(text)
    (shape,) = kernel_shapes(text)
    assert np.prod(shape) == x.size // parts(spec)
    if spec == P("a", None, "b"):
        check_values(function.quake, x, split)


def test_a_split_reduced_axis_is_gathered_and_nothing_else(mesh):
    x = inputs(SHAPE)
    split = place(x, mesh, P("a", None, "b"))
    text = compiled(quake_jax.softmax, split)
    assert collectives(text) == {"all-gather"}
    assert kernel_shapes(text) == [(4, 8, 24)]
    check_values(quake_jax.softmax, x, split)


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (1, 2), (0, 2), None], ids=str)
def test_softmax_over_other_axes(axis, mesh):
    x = inputs(SHAPE)
    for spec in (P("a", "b"), P("a", None, "b"), P(None, "a", None)):
        split = place(x, mesh, spec)
        f = jax.jit(lambda a: quake_jax.softmax(a, axis))
        np.testing.assert_allclose(f(split), f(jax.device_get(x)), rtol=2.0**-20)
        reduced = range(3) if axis is None else np.atleast_1d(axis)
        if not any(spec[d] for d in reduced if d < len(spec)):
            assert not collectives(compiled(f, split))


def test_uneven_and_empty_splits():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    for shape in ((3, 5), (9, 5), (0, 5), (8, 0)):
        x = inputs(shape)
        for function in (ELEMENTWISE[0], SOFTMAX):

            def constrained(a, f=function.quake):
                return f(jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P("a"))))

            np.testing.assert_array_equal(jax.jit(constrained)(x), function.quake(x))


def test_gradients_of_split_batches_need_no_collective(mesh):
    split = place(inputs(SHAPE), mesh, P("a", "b"))
    for function in (ELEMENTWISE[-1], SOFTMAX):
        text = compiled(lambda a, f=function.quake: jax.vjp(f, a)[1](a)[0], split)
        assert not collectives(text)


def test_vmap_of_a_split_array(mesh):
    split = place(inputs(SHAPE), mesh, P("a", "b"))
    for function in (ELEMENTWISE[0], SOFTMAX):
        assert not collectives(compiled(jax.vmap(function.quake), split))


def test_more_axes_than_single_letters_in_a_sharding_rule():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = inputs((8,) + (1,) * 20 + (3,))
    split = place(x, mesh, P("a"))
    for function in (ELEMENTWISE[0], SOFTMAX):
        text = compiled(function.quake, split)
        assert not collectives(text)
        assert np.prod(kernel_shapes(text)[0]) == 3


@pytest.mark.parametrize("check_vma", [True, False])
@parametrize_functions(FUNCTIONS)
def test_shard_map_and_its_gradients(function, check_vma):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x, bias = inputs((16, 6)) / 4, inputs((6,), seed=1) / 4

    # The bias is replicated: its gradient is a sum over the devices.
    def loss(x, bias):
        return jnp.sum(function.quake(x + function.quake(bias)) * x)

    def on_each(x, bias):
        return jax.lax.psum(loss(x, bias), "a")

    mapped = jax.shard_map(
        on_each, mesh=mesh, in_specs=(P("a"), P()), out_specs=P(), check_vma=check_vma
    )
    tolerance = {"rtol": 2.0**-17, "atol": 2.0**-17}
    actual, actual_gradients = jax.jit(jax.value_and_grad(mapped, (0, 1)))(x, bias)
    expected, expected_gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, bias)
    np.testing.assert_allclose(actual, expected, **tolerance)
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, e, **tolerance)


def test_unreduced_values_are_refused():
    mesh = jax.make_mesh((8,), ("a",))
    with jax.set_mesh(mesh):
        x = place(inputs((8, 8)), mesh, P(None, "a"))

        def partial_sums(a):
            y = jnp.einsum("ij,jk->ik", a, a.T, out_sharding=P(None, None, unreduced={"a"}))
            return quake_jax.exp(y)

        with pytest.raises(TypeError, match="quake_jax.exp: x is a partial sum"):
            jax.eval_shape(partial_sums, x)
