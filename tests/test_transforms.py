"""JAX's transformations of every function: derivatives, batching, control flow, export."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    DTYPES,
    ELEMENTWISE,
    FUNCTIONS,
    SOFTMAX,
    in_float64,
    inputs,
    parametrize_functions,
)

import quake_jax

# Derivatives are sums of at most four products of approximate outputs and factors of size one, so
# their absolute error is at most this many times the function's relative bound.
TERMS = 8


def assert_derivative(actual, expected, function, order, dtype="float32"):
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        expected,
        rtol=TERMS * function.bound(order, dtype),
        atol=TERMS * function.bound(order, dtype),
    )


def exactly(f, *arguments):
    """A compiled call in double precision."""
    return in_float64(jax.jit(f), *arguments)


def weighted(f):
    """A scalar function of x whose gradient has no two equal entries."""
    return lambda x: jnp.sum(f(x) * jnp.linspace(0.5, 1, x.size, dtype=x.dtype).reshape(x.shape))


def small_inputs(shape, dtype="float32"):
    return (inputs(shape) / 4).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 3, 5])
@parametrize_functions()
def test_jvp_and_grad(function, order, dtype):
    x, t = small_inputs((3, 8), dtype), inputs((3, 8), dtype, seed=1) / 8
    f = jax.jit(lambda x, t: jax.jvp(lambda a: function.quake(a, order=order), (x,), (t,)))
    y, dy = f(x, t)
    assert dy.dtype == x.dtype
    np.testing.assert_array_equal(y, function.quake(x, order=order))
    expected = exactly(lambda x, t: jax.jvp(function.exact, (x,), (t,))[1], x, t)
    assert_derivative(dy, expected, function, order, dtype)

    gradient = jax.jit(jax.grad(weighted(lambda a: function.quake(a, order=order))))(x)
    assert gradient.dtype == x.dtype
    assert_derivative(
        gradient, exactly(jax.grad(weighted(function.exact)), x), function, order, dtype
    )


@parametrize_functions()
def test_second_and_third_derivatives(function):
    x = small_inputs((6,))
    hessian = jax.jit(jax.hessian(weighted(lambda a: function.quake(a, order=4))))
    expected = exactly(jax.hessian(weighted(function.exact)), x)
    assert_derivative(hessian(x), expected, function, 4)
    if function is not SOFTMAX:
        third = jax.jit(
            jax.vmap(jax.grad(jax.grad(jax.grad(lambda a: function.quake(a, order=4)))))
        )
        expected = exactly(jax.vmap(jax.grad(jax.grad(jax.grad(function.exact)))), x)
        np.testing.assert_allclose(third(x), expected, atol=4 * TERMS * function.bound(4))


@parametrize_functions(ELEMENTWISE)
def test_derivatives_at_special_points(function):
    # Far out the exact derivative is 0 or 1 (exp: e^x); at 0 nothing is divided by 0.
    x = jnp.array([0.0, -30.0, -1e4, -1e30, -jnp.inf])
    far = [] if function.name == "exp" else [30.0, 1e4, 1e30, jnp.inf]
    slope = 0.0 if function.name in ("tanh", "sigmoid") else 1.0
    slopes = jax.jit(jax.vmap(jax.grad(lambda a: function.quake(a, order=5))))
    gradient = slopes(jnp.append(x, jnp.array(far)))
    at_zero = {"exp": 1, "sigmoid": 0.25, "tanh": 1}.get(function.name, 0.5)
    expected = [at_zero, 0, 0, 0, 0] + [slope] * len(far)
    np.testing.assert_allclose(gradient, expected, atol=4 * function.bound(5))
    second = jax.jit(jax.vmap(jax.grad(jax.grad(lambda a: function.quake(a, order=5)))))(x)
    assert np.isfinite(second).all()


@parametrize_functions()
def test_derivatives_keep_the_order_of_their_primal(function):
    # The rule is traced outside the context in which the primal's order was resolved.
    x = small_inputs((5,))
    with quake_jax.default_order(1):
        _, pull_back = jax.vjp(function.quake, x)
        closed = jax.make_jaxpr(function.quake)(x)
    with quake_jax.default_order(5):
        (gradient,) = pull_back(jnp.ones_like(x))
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda a: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, a)[0].sum())
        )(x)
    _, pull_back = jax.vjp(lambda a: function.quake(a, order=1), x)
    np.testing.assert_array_equal(gradient, pull_back(jnp.ones_like(x))[0])
    assert "[order=1]" in str(jaxpr) and "[order=5]" not in str(jaxpr)


def test_softmax_gradient_over_other_axes():
    x = small_inputs((2, 3, 4))
    for axis in (0, (0, 2), None, ()):
        f = weighted(lambda a, n=axis: quake_jax.softmax(a, n, order=5))
        actual = jax.jit(jax.grad(f))(x)
        expected = exactly(jax.grad(weighted(lambda a, n=axis: jax.nn.softmax(a, n))), x)
        assert_derivative(actual, expected, SOFTMAX, 5)


def test_masked_softmax_has_finite_derivatives():
    where = jnp.array([[True, True, False, True], [False] * 4, [True, False, False, False]])
    x = small_inputs((3, 4)).at[0, 2].set(jnp.nan).at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf)
    clean = jnp.where(where, x, 0.0)

    def quake(a):
        return quake_jax.softmax(a, where=where, order=5)

    def exact(a):  # finite everywhere, also where a row has no value
        e = jnp.where(where, jnp.exp(a), 0)
        return e / jnp.maximum(e.sum(-1, keepdims=True), 1e-30)

    gradient = jax.jit(jax.grad(weighted(quake)))(x)
    assert_derivative(gradient, exactly(jax.grad(weighted(exact)), clean), SOFTMAX, 5)
    np.testing.assert_array_equal(jnp.where(where, 0.0, gradient), 0)

    hessian = jax.jit(jax.hessian(weighted(quake)))(x)
    assert_derivative(hessian, exactly(jax.hessian(weighted(exact)), clean), SOFTMAX, 5)

    # Garbage in masked tangents and cotangents does no harm either.
    garbage = jnp.where(where, 1.0, jnp.nan)
    _, tangent = jax.jvp(quake, (x,), (garbage,))
    assert np.isfinite(tangent).all()
    (cotangent,) = jax.vjp(quake, x)[1](garbage)
    assert np.isfinite(cotangent).all()


@parametrize_functions()
@pytest.mark.parametrize(("in_axis", "out_axis"), [(0, 0), (1, 2), (2, 1), (-1, 0)])
def test_vmap(function, in_axis, out_axis):
    x = inputs((3, 4, 5))
    actual = jax.vmap(function.quake, in_axis, out_axis)(x)
    expected = jax.vmap(function.exact, in_axis, out_axis)
    np.testing.assert_allclose(actual, exactly(expected, x), rtol=function.bound(3), atol=1e-6)


def test_vmap_of_softmax_over_each_axis_and_where():
    x, where = inputs((3, 4, 5)), np.random.default_rng(2).random((4, 5)) < 0.5
    for axis in (0, 1, (0, 1), None):
        actual = jax.vmap(lambda a, n=axis: quake_jax.softmax(a, n, where=where), 2, 2)(
            jnp.moveaxis(x, 0, 2)
        )
        each = [quake_jax.softmax(row, axis, where=where) for row in x]
        np.testing.assert_allclose(actual, jnp.stack(each, 2), rtol=2.0**-20)
    masks = jnp.stack([where, ~where, where])
    actual = jax.vmap(lambda a, m: quake_jax.softmax(a, where=m))(x, masks)
    np.testing.assert_allclose(actual, quake_jax.softmax(x, where=masks), rtol=2.0**-20)


@parametrize_functions()
def test_vmap_is_one_kernel_call(function):
    jaxpr = str(jax.make_jaxpr(jax.vmap(jax.vmap(function.quake)))(inputs((2, 3, 4))))
    assert jaxpr.count("[order=") == 1


@parametrize_functions()
def test_vmap_of_grad(function):
    x = small_inputs((4, 6))
    actual = jax.jit(jax.vmap(jax.grad(weighted(function.quake))))(x)
    expected = exactly(jax.vmap(jax.grad(weighted(function.exact))), x)
    assert_derivative(actual, expected, function, 3)


@parametrize_functions()
def test_scan_remat_and_linearize(function):
    x = small_inputs((5, 6))
    rows = jax.jit(lambda a: jax.lax.scan(lambda c, row: (c, function.quake(row)), 0, a)[1])(x)
    np.testing.assert_array_equal(rows, function.quake(x))

    def scanned(a):
        return jnp.sum(jax.lax.scan(lambda c, row: (c, weighted(function.quake)(row)), 0, a)[1])

    tolerance = {"rtol": 2.0**-18, "atol": 2.0**-20}
    plain = jax.jit(jax.vmap(jax.grad(weighted(function.quake))))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), plain, **tolerance)
    remat = jax.jit(jax.vmap(jax.grad(jax.checkpoint(weighted(function.quake)))))
    np.testing.assert_allclose(remat(x), plain, **tolerance)
    y, f_jvp = jax.linearize(jax.jit(function.quake), x)
    np.testing.assert_array_equal(y, function.quake(x))
    tangent = jax.jit(lambda a: jax.jvp(function.quake, (a,), (a,))[1])(x)
    np.testing.assert_allclose(f_jvp(x), tangent, **tolerance)


@parametrize_functions()
def test_eval_shape_takes_shapes_of_any_size(function):
    huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16)
    result = jax.eval_shape(function.quake, huge)
    assert (result.shape, result.dtype) == (huge.shape, huge.dtype)


def test_disable_jit():
    with jax.disable_jit():
        for function in FUNCTIONS:
            x = inputs((2, 3))
            np.testing.assert_allclose(
                function.quake(x), function.expected(x), rtol=function.bound(3), atol=1e-30
            )


def everything(x):
    y = quake_jax.softmax(quake_jax.exp(x), where=x > 0) + quake_jax.softmax(x, 0)
    return y + quake_jax.gelu(x, approximate=False) + quake_jax.silu(quake_jax.tanh(x))


def test_export_round_trip_with_a_symbolic_batch():
    batch = jax.export.symbolic_shape("b, 4")
    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(jax.jit(everything), disabled_checks=checks)(
        jax.ShapeDtypeStruct(batch, jnp.float32)
    )
    assert exported.mlir_module().count("custom_call @quake_jax_") == 6
    loaded = jax.export.deserialize(bytearray(exported.serialize()))
    for size in (1, 7):
        x = inputs((size, 4))
        np.testing.assert_allclose(loaded.call(x), jax.jit(everything)(x), rtol=2.0**-20)


def test_export_without_disabled_checks_is_refused():
    with pytest.raises(ValueError, match="quake_jax_exp"):
        jax.export.export(jax.jit(quake_jax.exp))(jnp.ones(3)).serialize()


def test_export_names_every_custom_call():
    names = {check.is_custom_call() for check in quake_jax.disabled_export_checks()}
    assert names == {f"quake_jax_{function.name}" for function in FUNCTIONS}


def test_other_platforms_get_the_reference():
    shape = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    exported = jax.export.export(jax.jit(everything), platforms=["cuda", "tpu"])(shape)
    assert "custom_call @quake_jax" not in exported.mlir_module()
    both = jax.export.export(
        jax.jit(everything),
        platforms=["cpu", "cuda"],
        disabled_checks=quake_jax.disabled_export_checks(),
    )(shape)
    assert "custom_call @quake_jax_exp" in both.mlir_module()
    x = inputs((3, 4), "bfloat16")
    np.testing.assert_array_equal(both.call(x), jax.jit(everything)(x))
