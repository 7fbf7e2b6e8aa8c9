"""Eight devices: batch axes stay where they are, only what a kernel reduces is gathered."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    BIASED,
    ELEMENTWISE,
    FAMILIES,
    LOG_SOFTMAX,
    LOGADDEXP,
    LOGSUMEXP,
    PAIRS,
    ROWS,
    SOFTMAX,
    SPLITS,
    inputs,
    parametrize_functions,
)
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


def place_all(function, mesh, spec):
    """Operands of SHAPE, those of another rank replicated."""
    x = function.inputs(SHAPE)
    return x, [place(a, mesh, spec if a.ndim == len(SHAPE) else P()) for a in x]


def check_values(f, x, split, exactly=True):
    """Results on the mesh, compiled and not, are those of one device, and keep the sharding."""
    expected = np.asarray(jax.jit(f)(*map(jax.device_get, x)))
    spec = split[0].sharding.spec[: expected.ndim]
    sharding = NamedSharding(split[0].sharding.mesh, P(*spec))
    for y in (jax.jit(f)(*split), f(*split)):
        if exactly:
            np.testing.assert_array_equal(y, expected)
        else:
            np.testing.assert_allclose(y, expected, rtol=2.0**-20, atol=2.0**-20)
        if y.shape == x[0].shape:
            assert y.sharding.is_equivalent_to(sharding, y.ndim)


BATCH_SPECS = [P("a"), P(("a", "b")), P("a", "b"), P(None, ("b", "a"))]
SOME = (*ELEMENTWISE[:2], ELEMENTWISE[-1], LOGADDEXP, *PAIRS[1:2], *SPLITS[:2], *BIASED[:2], *ROWS)


@parametrize_functions(SOME)
def test_batch_axes_stay_split(function, mesh):
    for spec in BATCH_SPECS:
        x, split = place_all(function, mesh, spec)
        text = compiled(function.quake, *split)
        assert not collectives(text)
        (shape,) = kernel_shapes(text)
        assert np.prod(shape) == np.prod(function.result_shape(SHAPE)) // parts(spec)
        if spec == P("a", "b"):
            check_values(function.quake, x, split)


@parametrize_functions((*ELEMENTWISE[:2], *PAIRS[:2], *BIASED))
def test_elementwise_functions_keep_the_last_axis_split_too(function, mesh):
    for spec in [P(None, None, "a"), P("a", None, "b")]:
        x, split = place_all(function, mesh, spec)
        if function in BIASED:
            split[1] = place(x[1], mesh, P(spec[2]))
        text = compiled(function.quake, *split)
        assert not collectives(text)
        (shape,) = kernel_shapes(text)
        assert np.prod(shape) == x[0].size // parts(spec)
        if spec == P("a", None, "b"):
            check_values(function.quake, x, split)


@parametrize_functions((*SPLITS[:2], *ROWS))
def test_a_split_reduced_axis_is_gathered_and_nothing_else(function, mesh):
    x, split = place_all(function, mesh, P("a", None, "b"))
    text = compiled(function.quake, *split)
    assert collectives(text) == {"all-gather"}
    (shape,) = kernel_shapes(text)
    assert np.prod(shape) == np.prod(function.result_shape(SHAPE)) // 4
    check_values(function.quake, x, split)


def test_operands_that_are_split_differently(mesh):
    x, y = inputs(SHAPE), inputs(SHAPE, seed=1)
    for first, second in ((P("a"), P(None, "b")), (P(), P("a", "b"))):
        split = [place(x, mesh, first), place(y, mesh, second)]
        for function in PAIRS[:2]:
            expected = jax.jit(function.quake)(x, y)
            np.testing.assert_array_equal(jax.jit(function.quake)(*split), expected)


@pytest.mark.parametrize("axis", [0, 1, (0, 1), (1, 2), (0, 2), None], ids=str)
@parametrize_functions(ROWS)
def test_reductions_over_other_axes(function, axis, mesh):
    x = inputs(SHAPE)
    for spec in (P("a", "b"), P("a", None, "b"), P(None, "a", None)):
        split = place(x, mesh, spec)
        f = jax.jit(lambda a: getattr(quake_jax, function.name)(a, axis))
        tolerance = {"rtol": 2.0**-18, "atol": 2.0**-20}
        np.testing.assert_allclose(f(split), f(jax.device_get(x)), **tolerance)
        reduced = range(3) if axis is None else np.atleast_1d(axis)
        if not any(spec[d] for d in reduced if d < len(spec)):
            assert not collectives(compiled(f, split))


MASKS = [((16, 8, 24), P("a", "b")), ((8, 24), P("b")), ((1, 8, 24), P()), ((24,), P())]


@pytest.mark.parametrize(("mask_shape", "mask_spec"), MASKS, ids=str)
@parametrize_functions((SOFTMAX, LOG_SOFTMAX))
def test_masks(function, mask_shape, mask_spec, mesh):
    x, mask = inputs(SHAPE), np.random.default_rng(1).random(mask_shape) < 0.7
    split, split_mask = place(x, mesh, P("a", "b")), place(mask, mesh, mask_spec)

    def f(x, mask):
        return getattr(quake_jax, function.name)(x, where=mask)

    text = compiled(f, split, split_mask)
    assert not collectives(text)
    assert np.prod(kernel_shapes(text)[0]) == x.size // 8
    check_values(f, (x, mask), (split, split_mask), exactly=False)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_glu_over_any_axis(axis, mesh):
    x = inputs((16, 8, 6))  # half of the last axis cannot be split over two devices
    for spec in (P("a", "b"), P("a", None, "b"), P(None, "a", None)):
        split = place(x, mesh, spec)
        f = jax.jit(lambda a: quake_jax.glu(a, axis))
        np.testing.assert_array_equal(f(split), f(x))


@parametrize_functions(FAMILIES)
def test_uneven_and_empty_splits(function):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    for shape in ((3, 5), (9, 5), (0, 5), (8, 0)):
        x = function.inputs(shape)

        def constrained(a, *rest):
            a = jax.lax.with_sharding_constraint(a, NamedSharding(mesh, P("a")))
            return function.quake(a, *rest)

        np.testing.assert_array_equal(jax.jit(constrained)(*x), function.quake(*x))


def test_a_matrix_and_a_row_of_one_length():
    # An axis of the bias, and one of the batch, that XLA could take for each other.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    for function in BIASED:
        x = function.inputs((16, 16))
        split = [place(x[0], mesh, P("a")), place(x[1], mesh, P())]
        f = jax.jit(function.quake)
        np.testing.assert_array_equal(f(*split), f(*x))
        assert not collectives(compiled(function.quake, *split))


@parametrize_functions((ELEMENTWISE[-1], *PAIRS[:2], BIASED[0], *ROWS))
def test_gradients_of_split_batches_need_no_collective(function, mesh):
    _, split = place_all(function, mesh, P("a", "b"))

    def pull_back(x, *rest):
        y, back = jax.vjp(lambda a: function.quake(a, *rest), x)
        return back(y)[0]

    assert not collectives(compiled(pull_back, *split))


@parametrize_functions(FAMILIES)
def test_vmap_of_a_split_array(function, mesh):
    _, split = place_all(function, mesh, P("a", "b"))
    axes = tuple(0 if a.ndim == len(SHAPE) else None for a in split)
    assert not collectives(compiled(jax.vmap(function.quake, axes), *split))


def test_more_axes_than_single_letters_in_a_sharding_rule():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = inputs((8,) + (1,) * 20 + (3,))
    split = place(x, mesh, P("a"))
    for function in (ELEMENTWISE[0], SOFTMAX, LOGSUMEXP):
        text = compiled(function.quake, split)
        assert not collectives(text)
        assert np.prod(kernel_shapes(text)[0]) in (1, 3)


@pytest.mark.parametrize("check_vma", [True, False])
@parametrize_functions(FAMILIES)
def test_shard_map_and_its_gradients(function, check_vma):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x, *rest = function.inputs((16, 6), scale=0.25)
    row = function.inputs((16, 6), seed=1, scale=0.25)[0][0]
    if rest and rest[0].ndim == 2:
        rest = [rest[0][:2]]  # as many rows as one device has

    # What is replicated has a gradient that is a sum over the devices.
    def loss(x, row, *rest):
        x = x + quake_jax.exp(row)
        if rest and rest[0].ndim == 2:
            rest = [jnp.tile(rest[0], (x.shape[0] // 2, 1))]
        return jnp.sum(jnp.sin(function.quake(x, *rest)))

    def on_each(*operands):
        return jax.lax.psum(loss(*operands), "a")

    specs = (P("a"), *(P() for _ in (row, *rest)))
    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    every = tuple(range(2 + len(rest)))
    tolerance = {"rtol": 2.0**-16, "atol": 2.0**-16}
    actual, actual_gradients = jax.jit(jax.value_and_grad(mapped, every))(x, row, *rest)
    expected, expected_gradients = jax.jit(jax.value_and_grad(loss, every))(x, row, *rest)
    np.testing.assert_allclose(actual, expected, **tolerance)
    for a, e in zip(actual_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, e, **tolerance)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "f",
    [
        quake_jax.logaddexp,
        quake_jax.swiglu,
        lambda x, y: quake_jax.softmax(x, where=y > 0),
        lambda x, y: jnp.exp(quake_jax.log_softmax(x, where=y > 0)),
    ],
    ids=["logaddexp", "swiglu", "softmax", "log_softmax"],
)
def test_shard_map_with_a_replicated_first_operand(f, check_vma):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    shared, x = inputs((2, 6)) / 4, inputs((16, 6), seed=1) / 4

    def total(shared, x):
        shared = jnp.concatenate([shared] * (len(x) // 2))
        return jnp.sum(jnp.sin(f(shared, x) * jnp.cos(x)))

    mapped = jax.shard_map(
        lambda *operands: jax.lax.psum(total(*operands), "a"),
        mesh=mesh,
        in_specs=(P(), P("a")),
        out_specs=P(),
        check_vma=check_vma,
    )
    actual = jax.jit(jax.value_and_grad(mapped, (0, 1)))(shared, x)
    expected = jax.jit(jax.value_and_grad(total, (0, 1)))(shared, x)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=2.0**-16, atol=2.0**-16)


def test_shard_map_over_some_axes_of_a_mesh():
    # The others are still XLA's to split.
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x, bias = BIASED[0].inputs((16, 16))
    mask = jnp.arange(16) % 3 > 0

    def f(x, bias, mask):
        y = quake_jax.log_softmax(quake_jax.bias_silu(x, bias), 0)
        return y + quake_jax.softmax(y.T, where=mask).T

    specs = (P(None, "a"), P("a"), P())
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P(None, "a"), axis_names={"a"})
    split = place(x, mesh, P("b", "a"))
    actual = jax.jit(mapped)(split, bias, mask)
    np.testing.assert_allclose(actual, f(x, bias, mask), rtol=2.0**-18, atol=2.0**-20)


def test_a_program_exported_for_one_device_runs_on_many():
    # It holds the kernels' forms for whole arrays, which XLA must not split.
    def f(x, bias, mask):
        y = quake_jax.bias_gelu(x, bias)
        return quake_jax.softmax(y, where=mask) + quake_jax.softmax(y, 0) + quake_jax.silu(x)

    x, bias, mask = inputs((16, 16)), inputs((16,), seed=1), np.arange(16)[None] % 3 > 0
    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(jax.jit(f), disabled_checks=checks)(x, bias, mask)
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    split = [place(a, mesh, spec) for a, spec in ((x, P("a")), (bias, P()), (mask, P()))]
    y = jax.jit(exported.call)(*split)
    np.testing.assert_allclose(y, f(x, bias, mask), rtol=2.0**-18, atol=2.0**-20)


def test_unreduced_values_are_refused():
    mesh = jax.make_mesh((8,), ("a",))
    with jax.set_mesh(mesh):
        x = place(inputs((8, 8)), mesh, P(None, "a"))

        def partial_sums(a):
            y = jnp.einsum("ij,jk->ik", a, a.T, out_sharding=P(None, None, unreduced={"a"}))
            return quake_jax.exp(y)

        with pytest.raises(TypeError, match="quake_jax.exp: x is a partial sum"):
            jax.eval_shape(partial_sums, x)
