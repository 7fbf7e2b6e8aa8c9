"""Eight devices: batch axes stay where they are, only what a kernel reduces is gathered."""

import contextlib
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import (
    BIASED,
    ELEMENTWISE,
    FAMILIES,
    FUNCTIONS,
    LOG_SOFTMAX,
    LOGADDEXP,
    LOGSUMEXP,
    PAIRS,
    POINTWISE,
    ROWS,
    SOFTMAX,
    SPLITS,
    inputs,
    on_device,
    parametrize_functions,
)

import quake_jax
from quake_jax import _rewrite, kv_cache
from quake_jax._elementwise import table

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


MESHES = {
    "one axis": ((8,), ("a",), P("a")),
    "two axes": ((4, 2), ("a", "b"), P("a", "b")),
    "two axes, the last split too": ((4, 2), ("a", "b"), P("a", None, "b")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("sizes", "names", "spec"), MESHES.values(), ids=MESHES)
def test_every_function_in_one_program(sizes, names, spec, kind):
    mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    whole = len(spec) == 3  # what reduces the last axis would gather it
    functions = (*POINTWISE, *BIASED) if whole else FUNCTIONS
    operands = [function.inputs((8, 4, 6)) for function in functions]

    def f(operands):
        return [g.quake(*x) for g, x in zip(functions, operands, strict=True)]

    with jax.set_mesh(mesh):
        # A bias is split as the last axis is.
        split = [
            [place(a, mesh, spec if a.ndim == 3 else P(*spec[2:])) for a in x] for x in operands
        ]
        text = compiled(f, split)
        actual = jax.jit(f)(split)
    assert not collectives(text)
    for function, y, e in zip(functions, actual, jax.jit(f)(operands), strict=True):
        np.testing.assert_array_equal(y, e, err_msg=function.name)
    # One call for each, of an eighth. (What takes a bias is the kernel without, behind a sum.)
    sizes = sorted(np.prod(shape) for shape in kernel_shapes(text))
    assert sizes == sorted(y.size // 8 for y in actual)


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
    f = jax.jit(lambda a: getattr(quake_jax, function.name)(a, axis))
    expected = f(jax.device_get(x))
    for spec in (P("a", "b"), P("a", None, "b"), P(None, "a", None)):
        split = place(x, mesh, spec)
        np.testing.assert_allclose(f(split), expected, rtol=2.0**-18, atol=2.0**-20)
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


def test_gradients_of_every_function_with_replicated_operands():
    # What every device has alike meets what differs, and so its gradient is a sum.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = inputs((8, 1)) / 4
    shared = [function.inputs((1, 6), scale=0.25) for function in FUNCTIONS]

    def loss(x, shared):
        y = [f.quake(x * first, *rest) for f, (first, *rest) in zip(FUNCTIONS, shared, strict=True)]
        return sum(jnp.sum(jnp.sin(a)) for a in y)

    def total(x, shared):  # one row at a time, as the devices have them
        return jnp.sum(jax.vmap(loss, (0, None))(x[:, None], shared))

    def on_each(x, shared):
        return jax.lax.psum(loss(x, shared), "a")

    def slopes(f):
        return jax.tree.leaves(jax.jit(jax.grad(f, (0, 1)))(x, shared))

    expected = slopes(total)
    for check in (True, False):
        specs = {"in_specs": (P("a"), P()), "out_specs": P(), "check_vma": check}
        on_mesh = jax.shard_map(on_each, mesh=mesh, **specs)
        for a, e in zip(slopes(on_mesh), expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=2.0**-14, atol=2.0**-14)


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


@parametrize_functions(FAMILIES)
def test_what_carries_a_sharding_rule(function):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def operands(*dimensions):
        shapes = function.operands(dimensions)
        whole = NamedSharding(mesh, P())
        return [jax.ShapeDtypeStruct(s, jnp.float32, sharding=whole) for s in shapes]

    f = jax.jit(function.quake)
    for dimensions, has_one in (((2**31 - 2, 2), True), ((2**31, 2), False)):
        text = f.lower(*operands(*dimensions)).as_text()
        assert ("sdy.sharding_rule" in text) is has_one, dimensions
    # Programs that are exported with symbolic dimensions gather split inputs.
    export = jax.export.export(f, disabled_checks=quake_jax.disabled_export_checks())
    for dimensions, has_one in (((4, 6), True), (jax.export.symbolic_shape("b, 6"), False)):
        text = export(*operands(*dimensions)).mlir_module()
        assert ("sdy.sharding_rule" in text) is has_one, dimensions


def test_unreduced_values_are_refused():
    mesh = jax.make_mesh((8,), ("a",))
    with jax.set_mesh(mesh):
        x = place(inputs((8, 8)), mesh, P(None, "a"))

        def partial_sums(a):
            y = jnp.einsum("ij,jk->ik", a, a.T, out_sharding=P(None, None, unreduced={"a"}))
            return quake_jax.exp(y)

        with pytest.raises(TypeError, match="quake_jax.exp: x is a partial sum"):
            jax.eval_shape(partial_sums, x)


# Attention: batch and heads stay split, lengths and head sizes are gathered.


def attention_operands(batch=4, heads=8, kv_heads=8, queries=6, keys=10, size=8):
    shapes = [(batch, queries, heads, size), *[(batch, keys, kv_heads, size)] * 2]
    rng = np.random.default_rng(0)
    return [on_device(rng.standard_normal(shape), "float32") for shape in shapes]


def attend(*x, **keywords):
    return quake_jax.dot_product_attention(*x, **keywords)


def attention_loss(*x):
    return jnp.sum(attend(*x, is_causal=True) ** 2)


def check_attention(f, x, specs, mesh, *, gathers=(), local=None):
    """Values, the collectives and the shape of one device's call, of a function of split arrays.

    `local` is a shape, or several if XLA may choose.
    """
    split = [place(a, mesh, spec) for a, spec in zip(x, specs, strict=True)]
    text = compiled(f, *split)
    assert collectives(text) <= set(gathers), collectives(text)
    if local is not None:
        # The first of the two results.
        found = set(re.findall(r"\(\w+\[([\d,]*)\]\S* \S* custom-call\(", text))
        assert found and found <= ({local} if isinstance(local, str) else local), found
    actual, expected = jax.jit(f)(*split), jax.jit(f)(*x)
    for y, z in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(y, z, rtol=2.0**-16, atol=2.0**-16)
    return actual


Q = KV = P("a", None, "b")
ANY = COLLECTIVES


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_attention_keeps_batch_and_heads_split(kv_heads, mesh):
    x = attention_operands(kv_heads=kv_heads)
    specs = [Q, *[P("a", None, "b" if kv_heads > 1 else None)] * 2]
    y = check_attention(attend, x, specs, mesh, local="1,6,4,8")
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, Q), 4)
    # The gradient of a head that several devices read is a sum.
    sums = ("all-reduce",) if kv_heads == 1 else ()
    gradients = jax.grad(attention_loss, (0, 1, 2))
    slopes = check_attention(gradients, x, specs, mesh, gathers=sums, local="1,6,4,8")
    for slope, spec in zip(slopes, specs, strict=True):
        assert slope.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    # Operation by operation, too.
    y = attend(*(place(a, mesh, spec) for a, spec in zip(x, specs, strict=True)))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, Q), 4)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_cache_keeps_batch_and_heads_split(dtype, queries, mesh):
    query, key, value = attention_operands(queries=queries)

    def step(query, key, value, *cache):
        cache = kv_cache.append(jax.tree.unflatten(tree, cache), key, value)
        return kv_cache.attend(query, cache), *jax.tree.leaves(cache)

    cache, tree = jax.tree.flatten(kv_cache.init(4, 16, 8, 8, dtype=dtype))
    of_scales = P("a", "b", None)
    specs = [Q if x.ndim == 4 else of_scales if x.ndim == 3 else P() for x in cache]
    x = [query, key, value, *cache]
    results = check_attention(step, x, [Q] * 3 + specs, mesh, local=f"1,{queries},4,8")
    for y, spec in zip(results, [Q, *specs], strict=True):
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), y.ndim)


@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
def test_attention_over_a_mesh_of_one_axis(axis):
    x = attention_operands(batch=8)
    spec = P(*[None] * axis, "a")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("a",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            local = "1,6,8,8" if axis == 0 else "8,6,1,8"
            check_attention(attend, x, [spec] * 3, mesh, local=local)
            check_attention(jax.grad(attention_loss, (0, 1, 2)), x, [spec] * 3, mesh, local=local)


def test_fewer_key_heads_than_parts():
    # Devices share key heads: each takes the one that its query heads read.
    x = attention_operands(kv_heads=2)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    check_attention(attend, x, [Q, P("a"), P("a")], mesh, local="2,6,2,8")
    x = attention_operands(heads=12, kv_heads=6)  # which come out even by halves
    check_attention(attend, x, [Q, P("a"), P("a")], mesh, gathers=ANY, local="2,6,6,8")


OPTIONAL = {
    "bias of heads": ({"bias": (1, 8, 6, 10)}, P(None, "b")),
    "bias of the batch": ({"bias": (4, 1, 6, 10)}, P("a")),
    "bias for all": ({"bias": (1, 1, 6, 10)}, P()),
    "whole bias": ({"bias": (4, 8, 6, 10)}, P("a", "b")),
    "mask for all": ({"mask": (1, 1, 6, 10)}, P()),
    "mask of keys": ({"mask": (4, 1, 1, 10)}, P("a")),
    "lengths": ({"key_value_seq_lengths": (4,)}, P("a")),
}


@pytest.mark.parametrize(("shapes", "spec"), OPTIONAL.values(), ids=OPTIONAL)
def test_attention_with_masks_needs_no_collective(shapes, spec, mesh):
    ((name, shape),) = shapes.items()
    values = np.random.default_rng(1).standard_normal(shape)
    optional = {
        "bias": jnp.asarray(values, jnp.float32),
        "mask": jnp.asarray(values > -0.5),
        "key_value_seq_lengths": jnp.arange(4, dtype=jnp.int32) + 5,
    }[name]
    x = [*attention_operands(), optional]

    def f(query, key, value, optional):
        return attend(query, key, value, **{name: optional})

    check_attention(f, x, [Q, KV, KV, spec], mesh, local="1,6,4,8")
    # What broadcasts is not made larger for the call.
    split = [place(a, mesh, s) for a, s in zip(x, [Q, KV, KV, spec], strict=True)]
    assert " broadcast(" not in compiled(f, *split)


def test_attention_with_segments_gathers_these_alone(mesh):
    ids = jnp.arange(40, dtype=jnp.int32).reshape(4, 10) // 3
    x = [*attention_operands(queries=10), ids]

    def f(query, key, value, ids):
        return attend(query, key, value, query_segment_ids=ids)

    for g in (f, jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2))):
        check_attention(g, x, [Q, KV, KV, P("a")], mesh, local="1,10,4,8")
    check_attention(f, x, [Q, KV, KV, P("a", "b")], mesh, gathers=ANY, local="1,10,4,8")


@pytest.mark.parametrize("axis", [-3, -2])
def test_packed_attention_keeps_batch_and_heads_split(axis, mesh):
    q, k, v = attention_operands(queries=10)
    qkv = jnp.stack([q, k, v], axis + 5)
    spec = P("a", None, None, "b") if axis == -3 else P("a", None, "b")

    def f(qkv):
        return quake_jax.packed_dot_product_attention(qkv, qkv_axis=axis)

    check_attention(f, [qkv], [spec], mesh, local="1,10,4,8")
    check_attention(jax.grad(lambda x: jnp.sum(f(x) ** 2)), [qkv], [spec], mesh, local="1,10,4,8")


WHOLE_AXES = {
    "sequence": [P("b", "a")] * 3,
    "keys": [P("b"), P("b", "a"), P("b", "a")],
    "size": [P("b", None, None, "a")] * 3,
}


@pytest.mark.parametrize("specs", WHOLE_AXES.values(), ids=WHOLE_AXES)
def test_attention_gathers_lengths_and_sizes_alone(specs, mesh):
    # The batch stays split over b: a call has two of its four.
    x = attention_operands(queries=8, keys=8)
    check_attention(attend, x, specs, mesh, gathers=("all-gather",), local="2,8,8,8")
    # Beside the kernels the gradient may sum over an axis while that is still split.
    sums = ("all-gather", "all-reduce")
    gradients = jax.grad(attention_loss, (0, 1, 2))
    check_attention(gradients, x, specs, mesh, gathers=sums, local="2,8,8,8")


CONFLICTS = {
    "all different": [P("a"), P(None, None, "b"), P("b")],
    "batch and heads over one axis": [P("a"), P(None, None, "a"), P()],
}


@pytest.mark.parametrize("specs", CONFLICTS.values(), ids=CONFLICTS)
def test_attention_of_operands_that_are_split_differently(specs, mesh):
    # XLA decides whose split the call gets, and moves the others.
    x = attention_operands(queries=8, keys=8)
    local = {"1,8,8,8", "1,8,4,8"}
    check_attention(attend, x, specs, mesh, gathers=ANY, local=local)
    gradients = jax.grad(attention_loss, (0, 1, 2))
    check_attention(gradients, x, specs, mesh, gathers=ANY, local=local)


def test_vmap_of_split_attention(mesh):
    q, k, v = attention_operands()
    queries = jnp.stack([q, 2 * q, -q, q + 1])

    # The axis of vmap is split, or those of the attention are.
    over_queries = jax.vmap(attend, (0, None, None))
    for specs, local in (
        ([P("b", "a"), P("a"), P("a")], "1,12,8,8"),
        ([P(None, *Q), KV, KV], "1,24,4,8"),
    ):
        check_attention(over_queries, [queries, k, v], specs, mesh, local=local)
    causal = jax.vmap(lambda *x: attend(*x, is_causal=True), (0, None, None))
    check_attention(causal, [queries, k, v], [P(None, *Q), KV, KV], mesh, local="1,6,16,8")
    everything = [queries, *(jnp.stack([a] * 4) for a in (k, v))]
    for spec in (P("b", "a"), P("a", None, None, "b")):
        check_attention(jax.vmap(attend), everything, [spec] * 3, mesh)
    slopes = jax.vmap(jax.grad(attention_loss, (0, 1, 2)))
    check_attention(slopes, everything, [P("a", None, None, "b")] * 3, mesh)


def test_heads_that_a_mesh_axis_splits_only_in_part():
    # Two heads of a projection that is split over four devices: their sizes are split as well.
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, 6, 16), (16, 32)))

    def f(x, w):
        h = (x @ w).reshape(4, 6, 2, 16)
        return attend(h, h, h)

    check_attention(f, [x, w], [P("a"), P(None, "b")], mesh, gathers=ANY)


def test_uneven_splits_of_attention():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    for batch, heads in ((3, 2), (9, 2), (2, 3), (2, 10)):
        x = attention_operands(batch=batch, heads=heads, kv_heads=heads)
        lengths = jnp.arange(batch, dtype=jnp.int32) + 2
        for spec in (P("a"), P(None, None, "a")):

            def f(*x, spec=spec, lengths=lengths):
                x = [jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec)) for a in x]
                return attend(*x, key_value_seq_lengths=lengths)

            np.testing.assert_allclose(
                jax.jit(f)(*x), attend(*x, key_value_seq_lengths=lengths), atol=2.0**-20
            )


def test_attention_in_a_shard_map_over_some_axes(mesh):
    x = attention_operands(batch=8)
    mapped = jax.shard_map(attend, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    expected = attend(*x)
    y = jax.jit(mapped)(*(place(a, mesh, P("a", None, "b")) for a in x))
    np.testing.assert_allclose(y, expected, atol=2.0**-20)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_gradients_of_attention_with_replicated_operands(packed, check_vma):
    # Queries differ between the devices; keys, values and the bias are everywhere the same.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    query, key, value = attention_operands(batch=8, heads=2, kv_heads=2, queries=6, keys=6)
    shared = (key[:1], value[:1], jnp.asarray(inputs((1, 2, 6, 6))) / 8)

    def loss(query, key, value, bias):
        if packed:
            qkv = jnp.stack([query, *jnp.broadcast_arrays(query, key, value)[1:]], 2)
            y = quake_jax.packed_dot_product_attention(qkv, bias=bias, qkv_axis=-3)
        else:
            key, value = (jnp.broadcast_to(a, query.shape) for a in (key, value))
            y = attend(query, key, value, bias)
        return jnp.sum(jnp.sin(y))

    mapped = jax.shard_map(
        lambda *x: jax.lax.psum(loss(*x), "a"),
        mesh=mesh,
        in_specs=(P("a"), P(), P(), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    actual, expected = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(query, *shared) for f in (mapped, loss))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2.0**-16, atol=2.0**-16)


def test_exported_attention_keeps_the_batch_split(mesh):
    # An exported program holds nothing of this process: XLA's own rule splits the batch alone.
    x = attention_operands()
    mask = jnp.arange(10)[None, None, None] % 3 > 0
    split = [*(place(a, mesh, P("a")) for a in x), place(mask, mesh, P())]

    def f(*x):
        return attend(*x[:3], mask=x[3])

    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(jax.jit(f), disabled_checks=checks)(*split)
    loaded = jax.export.deserialize(exported.serialize())
    text = compiled(loaded.call, *split)
    assert not collectives(text) and "f32[1,6,8,8]" in text
    np.testing.assert_allclose(jax.jit(loaded.call)(*split), f(*x, mask), atol=2.0**-20)


def test_attention_with_the_older_partitioner():
    # Without Shardy, too, XLA's own rule splits the batch alone.
    x = attention_operands()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        check_attention(attend, x, [P("a")] * 3, mesh, local="1,6,8,8")
        check_attention(attend, x, [Q] * 3, mesh, gathers=ANY)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def test_attention_on_devices_in_another_order():
    x = attention_operands(kv_heads=4)
    for order in ([7, 2, 5, 0, 3, 6, 1, 4], [*range(8)]):
        devices = np.array(jax.devices())[order].reshape(2, 4)
        mesh = jax.sharding.Mesh(devices, ("b", "a"), axis_types=(AxisType.Auto,) * 2)
        check_attention(attend, x, [P("b", None, "a")] * 3, mesh, local="2,6,2,8")
        check_attention(attend, x, [P("a", None, "b")] * 3, mesh, local="1,6,4,8")


def test_compiled_attention_can_be_serialized():
    x = attention_operands()
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    split = [place(a, mesh, Q) for a in x]
    saved = serialize_executable.serialize(jax.jit(attend).lower(*split).compile())
    loaded = serialize_executable.deserialize_and_load(*saved)
    np.testing.assert_array_equal(loaded(*split), attend(*x))


def test_programs_of_different_attention_differ_in_text():
    # JAX's cache of compiled programs knows them by it.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = [place(a, mesh, P()) for a in attention_operands()]
    texts = [
        jax.jit(lambda *x, c=causal: attend(*x, is_causal=c)).lower(*x).as_text()
        for causal in (False, True)
    ]
    without_numbers = [re.sub(r'backend_config = "\d+"', "", text) for text in texts]
    assert without_numbers[0] != without_numbers[1]
    assert "'is_causal', 1" in texts[1] and "CustomSPMDPartitioning" in texts[1]


def test_attention_of_one_device_is_called_as_it_is():
    text = jax.jit(attend).lower(*attention_operands()).as_text()
    assert "CustomSPMDPartitioning" not in text and "quake_jax_dot_product_attention" in text


# Programs rewritten by accelerate and by the Flax interceptor.


def block(x, w, bias):
    """Attention over the halves of a projection, and an activation with its bias."""
    h = (x @ w).reshape(*x.shape[:-1], 8, 16)
    h = jax.nn.dot_product_attention(h, h, h).reshape(x.shape)
    return jax.nn.softmax(jax.nn.gelu(h + bias) + jax.nn.silu(x))


ACTIVATIONS = {
    row.public.__name__: row.replaces
    for row in table.FUNCTIONS.values()
    if row.replaces and not row.on_request
} | {name: getattr(jax.nn, name) for name in ("glu", "softmax", "log_softmax")}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [P("a"), None], ids=["on the mesh", "made outside"])
def test_accelerate_replaces_the_same_under_a_mesh(spec, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    x = inputs((64, 32))
    operand = x if spec is None else place(x, mesh, spec)
    known = _rewrite.activations._known
    # What JAX and the rewriter have seen outside the mesh must not be what helps.
    jax.clear_caches()
    known.cache_clear()
    with jax.set_mesh(mesh):
        for name, f in ACTIVATIONS.items():
            report = quake_jax.explain(lambda a, f=f: f(a), operand)
            assert [r.name for r in report.replaced] == [name], (name, report)
            fast = jax.eval_shape(quake_jax.accelerate(f), operand)
            assert fast == jax.eval_shape(f, operand), name
        y = jax.jit(lambda a: [quake_jax.accelerate(f)(a) for f in ACTIVATIONS.values()])(operand)
    expected = jax.jit(lambda a: [getattr(quake_jax, name)(a) for name in ACTIVATIONS])(x)
    for name, a, e in zip(ACTIVATIONS, y, expected, strict=True):
        np.testing.assert_array_equal(a, e, err_msg=name)
    known.cache_clear()


REWRITTEN_SPECS = {
    "batch": (P("a"), P(), P()),
    "batch and heads": (P("a"), P(None, "b"), P()),
}


@pytest.mark.parametrize("specs", REWRITTEN_SPECS.values(), ids=REWRITTEN_SPECS)
def test_accelerated_programs_on_a_mesh(specs):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    shapes = (8, 6, 128), (128, 128), (128,)
    x = [jnp.asarray(rng.standard_normal(s) / 8, jnp.float32) for s in shapes]
    split = [place(a, mesh, spec) for a, spec in zip(x, specs, strict=True)]
    fast = quake_jax.accelerate(block)
    expected = jax.jit(fast)(*x)
    slopes = jax.grad(lambda *x: jnp.sum(fast(*x) ** 2), (0, 1, 2))
    expected_slopes = jax.jit(slopes)(*x)
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            f = jax.jit(lambda *x: fast(*x))
            text = f.lower(*split).compile().as_text()
            kernels = set(re.findall(r'"quake_jax_(\w+)"', text))
            assert kernels == {"dot_product_attention", "gelu_tanh", "silu", "softmax"}
            # Heads come together for what follows the attention, and for nothing before it.
            assert collectives(text) <= ({"all-gather"} if specs[1] else set())
            local = "2,6,4,16" if specs[1] else "2,6,8,16"
            assert set(re.findall(r"\(\w+\[([\d,]*)\]\S* \S* custom-call\(", text)) == {local}
            np.testing.assert_allclose(f(*split), expected, rtol=2.0**-16, atol=2.0**-16)
            for a, e in zip(jax.jit(slopes)(*split), expected_slopes, strict=True):
                np.testing.assert_allclose(a, e, rtol=2.0**-14, atol=2.0**-14)


@pytest.mark.parametrize("how", ["substitute", "interceptor"])
def test_substituted_flax_models_on_a_mesh(how):
    nn = pytest.importorskip("flax.linen")
    from flax_models import key, variables_of

    import quake_jax.linen

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(num_heads=4)(x)
            return nn.Dense(16)(nn.gelu(nn.Dense(64)(x)))

    def context():
        if how == "substitute":
            return quake_jax.linen.substitute()
        return nn.intercept_methods(quake_jax.linen.interceptor())

    model, x = Model(), inputs((8, 8, 16)) / 8
    variables = variables_of(model.init, key(0), x)

    def apply(variables, x):
        with context():
            return model.apply(variables, x)

    def specs_of(path, a):
        """Heads and hidden units over b: as outputs of what makes them, inputs of what reads."""
        module, leaf = path[-2].key, path[-1].key
        if module in ("query", "key", "value"):
            return P(None, "b") if leaf == "kernel" else P("b")
        if module == "Dense_0":
            return P(None, "b") if leaf == "kernel" else P("b")
        return P("b") if module in ("out", "Dense_1") and leaf == "kernel" else P()

    expected = jax.jit(apply)(variables, x)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    split = jax.tree_util.tree_map_with_path(
        lambda path, a: place(a, mesh, specs_of(path, a)), variables
    )
    for enter in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with enter:
            text = compiled(lambda *x: apply(*x), split, place(x, mesh, P("a")))
            # Two sums, behind the attention and behind the hidden units: as without the kernels.
            assert collectives(text) == {"all-reduce"}
            kernels = set(re.findall(r'"quake_jax_(\w+)"', text))
            assert kernels == {"dot_product_attention", "gelu_tanh"}
            actual = jax.jit(lambda *x: apply(*x))(split, place(x, mesh, P("a")))
            np.testing.assert_allclose(actual, expected, rtol=2.0**-16, atol=2.0**-16)
