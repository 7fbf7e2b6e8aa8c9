"""Layer norm and RMS norm: accuracy against float64, transformations, devices. (Their errors are in
test_bad_input.py.)
"""

import functools
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import DTYPES, inputs, run_python

import quake_jax

EPSILON = 1e-5
NORMS = ("layer_norm", "rms_norm")
# With and without a residual.
FORMS = [
    pytest.param(name, residual, id=f"{name}-residual" if residual else name)
    for name, residual in itertools.product(NORMS, (False, True))
]


def operands(name, residual, shape, dtype="float32", parameters="float32"):
    """x, a residual or None, a scale, and for layer norm an offset."""
    x = inputs(shape, dtype), inputs(shape, dtype, 1) if residual else None
    return *x, *(inputs(shape[-1:], parameters, 2 + k) for k in range(2 - NORMS.index(name)))


def norm(name, x, residual, *parameters, epsilon=EPSILON):
    return getattr(quake_jax, name)(x, *parameters, residual=residual, epsilon=epsilon)


def formula(name, x, residual, scale, offset=0.0, epsilon=EPSILON):
    """As a user would write it in jax.numpy, in the dtype of the arguments; and what is normed."""
    v = x if residual is None else x + residual
    d = v - jnp.mean(v, -1, keepdims=True) if name == "layer_norm" else v
    return d / jnp.sqrt(jnp.mean(d * d, -1, keepdims=True) + epsilon) * scale + offset, v


def assert_accurate(actual, name, x, residual, scale, offset=None, epsilon=EPSILON):
    """Assert the errors of float32 sums: cpu_kernels/tests/rows/exact_norm.h derives the bound."""
    u, dtype = 2.0**-24, jnp.dtype(x.dtype)
    x, scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    offset = 0.0 if offset is None else np.asarray(offset, np.float64)
    y = actual
    if residual is not None:
        y, total = actual
        x = (x + np.asarray(residual, np.float64)).astype(np.float32).astype(np.float64)
        assert total.dtype == dtype and total.shape == x.shape
        np.testing.assert_array_equal(total, jnp.asarray(x, jnp.float32).astype(dtype))
    assert y.dtype == dtype and y.shape == x.shape
    n = x.shape[-1]
    c = min(n, 4096) / 32 + 12
    mean = of_mean = 0.0
    if name == "layer_norm":
        mean = x.mean(-1, keepdims=True)
        of_mean = u * (c * np.abs(x).mean(-1, keepdims=True) + np.abs(mean))
    d = x - mean
    factor = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + epsilon)
    of_factor = (c + 3) * u / 2 + (of_mean * factor) ** 2 / 2 + 3 * u
    product = d * factor * scale
    expected = product + offset
    error = (of_mean + u * np.abs(d)) * factor * np.abs(scale)
    error += (of_factor + 3 * u) * np.abs(product) + u * np.abs(expected)
    if dtype != jnp.float32:
        error += float(jnp.finfo(dtype).eps) / 2 * (np.abs(expected) + error)
        error += float(jnp.finfo(dtype).smallest_subnormal)
    wrong = np.abs(np.asarray(y, np.float64) - expected) > error + 2.0**-120
    assert not wrong.any(), np.argwhere(wrong)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_accuracy(name, residual, dtype):
    sizes = (*range(1, 71), 197, 768, 4097, 100_000)
    calls = [operands(name, residual, (3, n), dtype) for n in sizes]
    results = jax.jit(lambda calls: [norm(name, *x) for x in calls])(calls)
    for y, x in zip(results, calls, strict=True):
        assert_accurate(y, name, *x)


@pytest.mark.parametrize("name", NORMS)
def test_rows_far_from_0_and_rows_of_millions(name):
    for n in (768, 3_000_000):
        x = 1000 + np.random.default_rng(0).uniform(0, 1, (1, n)).astype(np.float32)
        x = jnp.asarray(x), None, *operands(name, False, (1, n))[2:]
        assert_accurate(norm(name, *x), name, *x)


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_shapes_and_what_may_be_left_out(name, residual):
    for shape in [(5,), (1,), (2, 3, 4), (0, 3), (3, 0), (2, 0, 3)]:
        x, r, scale, *offset = operands(name, residual, shape, "bfloat16", "float16")
        for parameters in itertools.product((scale, None), *((o, None) for o in offset)):
            for call in (norm, jax.jit(norm, static_argnums=0)):
                y = call(name, x, r, *parameters)
                one = jnp.ones(shape[-1:]) if parameters[0] is None else parameters[0]
                if 0 in shape:
                    assert jax.tree.leaves(y)[0].shape == shape
                else:
                    assert_accurate(y, name, x, r, one, *parameters[1:])


def test_epsilon():
    x = inputs((2, 30)) * 1e-3
    for name, epsilon in itertools.product(NORMS, (0, 1e-6, np.float32(0.5), 3)):
        y = getattr(quake_jax, name)(x, epsilon=epsilon)
        assert_accurate(y, name, x, None, jnp.ones(30), epsilon=float(epsilon))
        assert (getattr(quake_jax, name)(x) == y).all() == (epsilon == 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NORMS)
def test_special_values_are_those_of_the_formula(name, dtype):
    nan, inf = jnp.nan, jnp.inf
    rows = [[1, nan, 2], [1, inf, 2], [-inf, 0, inf], [3, 3, 3], [0, 0, 0], [-0.0, 0, 1]]
    x = jnp.asarray(rows, dtype)
    for scale in ([1, 2, 3], [1, inf, nan]):
        scale = jnp.asarray(scale, jnp.float32)
        offset = [jnp.asarray([0, 1, -inf], jnp.float32)] if name == "layer_norm" else []
        for epsilon in (0, 1e-3):
            y = norm(name, x, None, scale, *offset, epsilon=epsilon)
            wide = x.astype(jnp.float32)
            expected, _ = formula(name, wide, None, scale, *offset, epsilon=epsilon)
            np.testing.assert_allclose(
                np.asarray(y, np.float32), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-7
            )


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_the_reference_is_the_same_algorithm(name, residual):
    function = getattr(quake_jax.reference, f"{name}_residual" if residual else name)
    for dtype in DTYPES:
        x = operands(name, residual, (4, 33), dtype)
        y = function(*(a for a in x if a is not None), epsilon=EPSILON)
        assert_accurate(y, name, *x)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16; got int32"):
        function(*(jnp.arange(3) for a in x if a is not None), epsilon=EPSILON)


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_other_dtypes_get_the_formula(name, residual):
    with jax.enable_x64(True):
        x = [None if a is None else a.astype(float) for a in operands(name, residual, (3, 20))]
        y, total = formula(name, *x)
        actual = norm(name, *x)
        np.testing.assert_allclose(actual[0] if residual else actual, y, rtol=1e-13)
        if residual:
            np.testing.assert_array_equal(actual[1], total)
    x = operands(name, residual, (3, 20), jnp.float8_e5m2, jnp.float8_e5m2)
    assert all(y.dtype == jnp.float8_e5m2 for y in jax.tree.leaves(norm(name, *x)))
    assert "quake_" not in str(jax.make_jaxpr(functools.partial(norm, name))(*x))


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_a_call_is_one_kernel_in_the_program(name, residual):
    x = operands(name, residual, (3, 20))
    jaxpr = str(jax.make_jaxpr(functools.partial(norm, name))(*x))
    assert jaxpr.count("quake_") == 1 and f"quake_{name}" in jaxpr


def test_disabled(tmp_path):
    code = """
import jax, jax.numpy as jnp, quake_jax
x = jnp.arange(6.0).reshape(2, 3)
for f in (quake_jax.layer_norm, quake_jax.rms_norm):
    assert "quake_" not in str(jax.make_jaxpr(f)(x))
    y, total = f(x, residual=x)
    assert (total == 2 * x).all()
"""
    run_python(code, tmp_path, QUAKE_JAX_DISABLE="1")


# Transformations.


def arrays_of(x):
    return [k for k, a in enumerate(x) if a is not None]


def total(f, name, x):
    """A scalar function of the arrays that are given, which weights all results differently."""
    present = arrays_of(x)

    def of_arrays(*arrays):
        full = list(x)
        for k, a in zip(present, arrays, strict=True):
            full[k] = a
        leaves = jax.tree.leaves(f(name, *full))
        weights = [jnp.cos(jnp.arange(y.size) + k).reshape(y.shape) for k, y in enumerate(leaves)]
        return sum(jnp.sum(w * y.astype(w.dtype)) for w, y in zip(weights, leaves, strict=True))

    return of_arrays, [x[k] for k in present]


def formula_results(name, *x):
    y, v = formula(name, *x)
    return y if x[1] is None else (y, v)


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_derivatives(name, residual):
    x = operands(name, residual, (3, 7))
    ours, arrays = total(norm, name, x)
    theirs, _ = total(formula_results, name, x)
    every = tuple(range(len(arrays)))
    tangents = [inputs(a.shape, seed=9 + k) for k, a in enumerate(arrays)]

    def derivatives(f):
        return lambda x, t: (
            jax.grad(f, every)(*x),
            jax.jvp(f, x, t),
            jax.hessian(f, (0, len(x) - 1))(*x),
        )

    with jax.enable_x64(True):
        wide, wide_tangents = ([a.astype(float) for a in group] for group in (arrays, tangents))
        expected = jax.tree.map(np.asarray, jax.jit(derivatives(theirs))(wide, wide_tangents))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, jax.jit(derivatives(ours))(arrays, tangents), expected)
    gradients = expected[0]
    jax.tree.map(close, jax.jit(jax.jacfwd(ours, every))(*arrays), gradients)
    # One at a time: the others have no tangent.
    jax.tree.map(
        close, jax.jit(lambda *x: [jax.grad(ours, k)(*x) for k in every])(*arrays), [*gradients]
    )


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_derivatives_of_16_bits_are_computed_in_float32(name, residual):
    x = operands(name, residual, (3, 64), "bfloat16")
    ours, arrays = total(norm, name, x)
    theirs, _ = total(formula_results, name, x)
    every = tuple(range(len(arrays)))
    actual = jax.grad(ours, every)(*arrays)
    expected = jax.grad(theirs, every)(*(a.astype(jnp.float32) for a in arrays))
    for a, y, e in zip(arrays, actual, expected, strict=True):
        assert y.dtype == a.dtype
        np.testing.assert_allclose(np.asarray(y, np.float32), e, rtol=2.0**-7, atol=2.0**-7)


def looped(f, axes, arguments):
    """What jax.vmap(f, axes) gives, one call at a time."""
    size = next(a.shape[k] for a, k in zip(arguments, axes, strict=True) if k is not None)
    results = [
        f(*(a if k is None else jnp.take(a, i, k) for a, k in zip(arguments, axes, strict=True)))
        for i in range(size)
    ]
    return jax.tree.map(lambda *y: jnp.stack(y), *results)


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_vmap(name, residual):
    x = operands(name, residual, (4, 3, 5))
    # A scale and an offset of each row.
    own = [*x[:2], *(inputs((4, 5), seed=7 + k) for k in range(len(x) - 2))]
    r = 0 if residual else None
    parameters = len(x) - 2
    cases = [
        (x, (0, r, *(None,) * parameters)),
        (x, (1, 1 if residual else None, *(None,) * parameters)),
        (own, (0, r, *(0,) * parameters)),
        (own, (None, None, *(0,) * parameters)),
        ([*own[:-1], x[-1]], (0, r, *(0,) * (parameters - 1), None)),
    ]
    if residual:
        cases.append(([x[0][0], *x[1:]], (None, 0, *(None,) * parameters)))
    for arguments, axes in cases:
        f = functools.partial(norm, name)
        expected = looped(f, axes, arguments)
        jax.tree.map(np.testing.assert_array_equal, jax.vmap(f, axes)(*arguments), expected)
    # Of the scale within, of the rows around it.
    x = inputs((2, 4, 3, 5)), inputs((2, 4, 3, 5), seed=1) if residual else None, *own[2:]
    f = jax.vmap(functools.partial(norm, name), (0, r, *(0,) * parameters))
    axes = (0, r, *(None,) * parameters)
    expected = looped(f, axes, x)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.vmap(f, axes))(*x), expected)
    assert str(jax.make_jaxpr(jax.vmap(f, axes))(*x)).count("quake_") == 1


@pytest.mark.parametrize("name", NORMS)
def test_scan_over_stacked_layers(name):
    x, _, *parameters = operands(name, False, (3, 8))
    stacked = [inputs((4, 8), seed=k) for k in range(len(parameters))]

    def layer(x, parameters):
        y, total = norm(name, x, x / 2, *parameters)
        return total, y

    def f(x, stacked):
        return jax.lax.scan(layer, x, stacked)

    last, y = jax.jit(f)(x, stacked)
    for k in range(4):
        x, expected = layer(x, [p[k] for p in stacked])
        np.testing.assert_array_equal(y[k], expected)
    np.testing.assert_array_equal(last, x)
    gradient = jax.grad(lambda x, stacked: f(x, stacked)[1].sum(), (0, 1))(last, stacked)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_export(name, residual):
    (batch,) = jax.export.symbolic_shape("batch")
    checks = quake_jax.disabled_export_checks()
    for size in (4, batch):
        x = operands(name, residual, (4, 6))
        types = [
            None if a is None else jax.ShapeDtypeStruct((size, 6) if a.ndim == 2 else (6,), a.dtype)
            for a in x
        ]
        f = jax.jit(functools.partial(norm, name))
        exported = jax.export.export(f, platforms=("cpu", "tpu"), disabled_checks=checks)(*types)
        exported = jax.export.deserialize(exported.serialize())
        jax.tree.map(np.testing.assert_array_equal, exported.call(*x), norm(name, *x))


# Devices.

needs_devices = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
SPECS = [P("a", "b"), P(("a", "b")), P(None, "a"), P("a", None, "b")]


@needs_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_batch_axes_stay_split(name, residual, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    x = operands(name, residual, (16, 8, 24))
    expected = norm(name, *x)
    f = jax.jit(functools.partial(norm, name))
    with jax.set_mesh(mesh):
        for spec in SPECS:
            split = [
                a
                if a is None
                else jax.device_put(a, NamedSharding(mesh, spec if a.ndim == 3 else P()))
                for a in x
            ]
            jax.tree.map(np.testing.assert_array_equal, f(*split), expected)
            text = f.lower(*split).compile().as_text()
            assert ("all-gather" in text) == (len(spec) == 3)
            # One call, of what one device has.
            calls = re.findall(r"\[([\d,]+)\]\S* custom-call\([^\n]*quake_jax_", text)
            assert [np.prod([*map(int, c.split(","))]) for c in calls] in ([384], [768])
            (y, *_) = jax.tree.leaves(f(*split))
            if len(spec) < 3:
                assert y.sharding.is_equivalent_to(split[0].sharding, 3)


@needs_devices
@pytest.mark.parametrize(("name", "residual"), FORMS)
def test_shard_map(name, residual):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = operands(name, residual, (8, 6, 10))
    specs = tuple(P("a", "b") if a is not None and a.ndim == 3 else P() for a in x)
    f = functools.partial(norm, name)
    out = (P("a", "b"),) * 2 if residual else P("a", "b")
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped)(*x), f(*x))
    # The gradient of a scale adds up over the devices.
    last = len(x) - 1

    def gradient(f):
        return jax.grad(lambda p: jax.tree.leaves(f(*x[:last], p))[0].sum())(x[last])

    np.testing.assert_allclose(gradient(mapped), gradient(f), rtol=1e-5, atol=1e-4)
    # Over some axes of a mesh the others are the compiler's.
    some = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=tuple(P("a") if s else s for s in specs),
        out_specs=jax.tree.map(lambda s: P("a"), out),
        axis_names={"a"},
    )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(some)(*x), f(*x))
