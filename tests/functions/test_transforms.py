"""JAX's transformations of every function: derivatives, batching, control flow, export."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.experimental import checkify
from support import (
    BIASED,
    DTYPES,
    ELEMENTWISE,
    FAMILIES,
    FUNCTIONS,
    LOG_SOFTMAX,
    LOGADDEXP,
    LOGSUMEXP,
    PAIRS,
    ROWS,
    SOFTMAX,
    SPLITS,
    in_float64,
    inputs,
    orders_in,
    parametrize_functions,
)

import quake_jax
from quake_jax._core.constants import MAX_REL_ERROR

# Derivatives are sums of at most four products of approximate outputs and factors of size one, so
# their absolute error is at most this many times the relative bound of the functions in them.
TERMS = 8


def scale_of_error(function, order, dtype="float32"):
    """The relative bound of what the derivatives of `function` are made of."""
    if function in ROWS:
        return SOFTMAX.bound(order, dtype)
    return max(function.bound(order, dtype), MAX_REL_ERROR["sigmoid"][order])


def assert_derivative(actual, expected, function, order, dtype="float32"):
    tolerance = TERMS * scale_of_error(function, order, dtype)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance
    )


def exactly(f, *arguments):
    """A compiled call in double precision."""
    return in_float64(jax.jit(f), *arguments)


def weighted(f):
    """A scalar function whose gradient has no two equal entries."""

    def total(*x):
        y = f(*x)
        return jnp.sum(y * jnp.linspace(0.5, 1, y.size, dtype=y.dtype).reshape(y.shape))

    return total


def small_inputs(shape, dtype="float32"):
    return (inputs(shape) / 4).astype(dtype)


def operands_and_tangents(function, shape, dtype="float32"):
    x = function.inputs(shape, dtype, scale=0.25)
    return x, function.inputs(shape, dtype, seed=10, scale=0.125)


@pytest.mark.parametrize("dtype", DTYPES)
@parametrize_functions()
def test_jvp_and_grad(function, dtype):
    x, t = operands_and_tangents(function, (3, 8), dtype)
    every = tuple(range(len(x)))

    def of(f):
        return lambda x, t: (*jax.jvp(f, x, t), jax.grad(weighted(f), every)(*x))

    # All orders in a program: compiling each would take longer.
    kernels = {
        order: functools.partial(function.quake, order=order)
        for order in ((1, 3, 5) if dtype == "float32" else (3,))
    }
    _, expected, expected_gradients = exactly(of(function.exact), x, t)
    found = jax.jit(lambda *a: {order: of(f)(*a) for order, f in kernels.items()})(x, t)
    values = jax.jit(lambda *x: {order: f(*x) for order, f in kernels.items()})(*x)
    for order, (y, dy, gradients) in found.items():
        assert dy.dtype == y.dtype == dtype
        np.testing.assert_array_equal(y, values[order])
        assert_derivative(dy, expected, function, order, dtype)
        for gradient, e in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == dtype
            assert_derivative(gradient, e, function, order, dtype)


@parametrize_functions()
def test_second_and_third_derivatives(function):
    x = function.inputs((6,), scale=0.25)
    every = tuple(range(len(x)))

    def quake(*x):
        return function.quake(*x, order=4)

    def second_and_third(f):
        def third(*x):
            return jax.vmap(jax.grad(jax.grad(jax.grad(f))))(*x) if function in ELEMENTWISE else ()

        return lambda *x: (jax.hessian(weighted(f), every)(*x), third(*x))

    hessian, third = jax.jit(second_and_third(quake))(*x)
    expected, expected_third = exactly(second_and_third(function.exact), *x)
    for actual, e in zip(jax.tree.leaves(hessian), jax.tree.leaves(expected), strict=True):
        assert_derivative(actual, e, function, 4)
    tolerance = 4 * TERMS * scale_of_error(function, 4)
    np.testing.assert_allclose(third, expected_third, atol=tolerance, rtol=tolerance)


def slope(function, x: float) -> float:
    """That of an element-wise function in mpmath, from the left: at 0, some have two."""
    with mpmath.workdps(50):
        return float(mpmath.diff(function.truth, mpmath.mpf(x), direction=-1))


@parametrize_functions(ELEMENTWISE)
def test_derivatives_at_special_points(function):
    # Far out the exact derivative is 0 or a constant (exp: e^x); at 0 nothing is divided by 0.
    points, expected = [0.0], [slope(function, 0)]
    for sign in (-1, 1):
        far = slope(function, 40 * sign)
        if far < 1e3:
            points += [sign * 40.0, sign * 1e4, sign * 1e30, sign * jnp.inf]
            expected += [far] * 4
    x = jnp.array(points)
    slope_of = jax.grad(lambda a: function.quake(a, order=5))
    first, second = jax.jit(jax.vmap(lambda a: (slope_of(a), jax.grad(slope_of)(a))))(x)
    np.testing.assert_allclose(first, expected, atol=4 * scale_of_error(function, 5))
    assert np.isfinite(second).all()


def test_derivatives_of_two_operands_at_special_points():
    def gradients(f, *x):
        return jax.jit(jax.vmap(jax.grad(lambda *a: f(*a, order=5), (0, 1))))(*map(jnp.array, x))

    inf = jnp.inf
    actual = gradients(
        quake_jax.logaddexp,
        [inf, -inf, inf, 0.0, -inf, 1e4, 0.0, 5.0],
        [inf, -inf, -inf, inf, 0.0, -1e4, 0.0, 5.0],
    )
    first = [0.5, 0.5, 1, 0, 0, 1, 0.5, 0.5]
    tolerance = 4 * scale_of_error(LOGADDEXP, 5)
    for weights, expected in zip(actual, (first, 1 - np.array(first)), strict=True):
        np.testing.assert_allclose(weights, expected, atol=tolerance)
    second = jax.grad(jax.grad(quake_jax.logaddexp))(2.0, 2.0)
    np.testing.assert_allclose(second, 0.25, rtol=1e-3)

    gate, value = [-inf, -1e30, 1e30, 1e4, 0.0], [1e4, -2.0, 3.0, 1e30, 1e30]
    for function in PAIRS[1:]:
        for gradient in gradients(function.quake, gate, value):
            assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["elu", "celu"])
def test_derivatives_of_elu_and_celu_of_any_alpha(name):
    quake, exact = getattr(quake_jax, name), getattr(jax.nn, name)
    x = jnp.array([-30.0, -2, -0.5, 0, 0.5, 3, 1e4])
    alpha = jnp.array([2.0, 0.5, 3, 1.5, 0.25, 1, 2])

    def of_both(f):
        return jax.grad(lambda x, alpha: jnp.sum(f(x, alpha)), (0, 1))

    gradients = jax.jit(of_both(lambda x, a: quake(x, a, order=5)))(x, alpha)
    for actual, expected in zip(gradients, exactly(of_both(exact), x, alpha), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-6)


def test_derivatives_of_logsumexp_with_infinities():
    inf = jnp.inf
    rows = jnp.array([[-inf] * 3, [inf, 1, 2], [-inf, 0, 0]])
    gradient = jax.jit(jax.vmap(jax.grad(quake_jax.logsumexp)))(rows)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [1, 0, 0], [0, 0.5, 0.5]], rtol=1e-3)
    second = jax.jit(jax.vmap(jax.hessian(quake_jax.logsumexp)))(rows)
    assert np.isfinite(second).all()
    where = jnp.array([[False] * 3, [False, True, True], [True, True, False]])

    def masked(a):
        return jnp.sum(quake_jax.logsumexp(a, -1, where=where)[1:])

    gradient = jax.jit(jax.grad(masked))(rows.at[1, 0].set(jnp.nan))
    np.testing.assert_allclose(gradient[1:], [[0, 0.268941, 0.731059], [0, 1, 0]], rtol=1e-3)
    np.testing.assert_array_equal(gradient[0], 0)


def test_derivatives_of_weighted_logsumexp():
    a, b = small_inputs((3, 4)), jnp.abs(inputs((4,), seed=1)) + 0.5

    def of_both(f):
        return jax.grad(lambda a, b: jnp.sum(f(a, axis=1, b=b)), (0, 1))

    actual = jax.jit(of_both(lambda *x, **k: quake_jax.logsumexp(*x, **k, order=5)))(a, b)
    for gradient, e in zip(actual, exactly(of_both(jax.nn.logsumexp), a, b), strict=True):
        assert_derivative(gradient, e, LOGSUMEXP, 5)


@parametrize_functions()
def test_derivatives_keep_the_order_of_their_primal(function):
    # The rule is traced outside the context in which the primal's order was resolved.
    x = function.inputs((5,), scale=0.25)
    with quake_jax.default_order(1):
        y, pull_back = jax.vjp(function.quake, *x)
        closed = jax.make_jaxpr(function.quake)(*x)
    with quake_jax.default_order(5):
        gradients = pull_back(jnp.ones_like(y))
        jaxpr = jax.make_jaxpr(
            jax.grad(lambda *a: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *a)[0].sum())
        )(*x)
    _, pull_back = jax.vjp(lambda *a: function.quake(*a, order=1), *x)
    for actual, expected in zip(gradients, pull_back(jnp.ones_like(y)), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert set(orders_in(jaxpr)) == {1}


@parametrize_functions(ROWS)
def test_gradients_over_other_axes(function):
    x = small_inputs((2, 3, 4))
    quake, exact = getattr(quake_jax, function.name), getattr(jax.nn, function.name)
    for axis in (0, 1, (0, 2), None, ()):
        f = weighted(lambda a, n=axis: quake(a, n, order=5))
        expected = exactly(jax.grad(weighted(lambda a, n=axis: exact(a, n))), x)
        assert_derivative(jax.jit(jax.grad(f))(x), expected, function, 5)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("function", [SOFTMAX, LOG_SOFTMAX], ids=lambda f: f.name)
def test_masked_derivatives_are_finite(function, axis):
    where = jnp.array([[True, True, False, True], [False] * 4, [True, False, False, False]])
    x = small_inputs((3, 4)).at[0, 2].set(jnp.nan).at[1, 0].set(jnp.nan).at[2, 1].set(jnp.inf)
    if axis == 0:
        where, x = where.T, x.T
    clean = jnp.where(where, x, 0.0)

    def quake(a):
        y = getattr(quake_jax, function.name)(a, axis, where=where, order=5)
        return jnp.where(where, y, 0)  # log_softmax is -inf elsewhere

    def exact(a):  # finite everywhere, also where a row has no value
        e = jnp.where(where, jnp.exp(a), 0)
        total = jnp.maximum(e.sum(axis, keepdims=True), 1e-30)
        if function is SOFTMAX:
            return e / total
        return jnp.where(where, a - jnp.log(total), 0)

    gradient = jax.jit(jax.grad(weighted(quake)))(x)
    assert_derivative(gradient, exactly(jax.grad(weighted(exact)), clean), function, 5)
    np.testing.assert_array_equal(jnp.where(where, 0.0, gradient), 0)

    hessian = jax.jit(jax.hessian(weighted(quake)))(x)
    assert_derivative(hessian, exactly(jax.hessian(weighted(exact)), clean), function, 5)

    # Garbage in masked tangents and cotangents does no harm either.
    def without_selection(a):
        return getattr(quake_jax, function.name)(a, axis, where=where, order=5)

    garbage = jnp.where(where, 1.0, jnp.nan)
    _, tangent = jax.jvp(without_selection, (x,), (garbage,))
    assert np.isfinite(tangent).all()
    (cotangent,) = jax.vjp(without_selection, x)[1](garbage)
    assert np.isfinite(cotangent).all()


@parametrize_functions()
def test_vmap(function):
    for in_axis, out_axis in [(0, 0), (1, 1), (-1, 0)]:
        x, axes = function.inputs((3, 4, 6)), in_axis
        if function in BIASED:
            row = np.delete(x[0].shape, in_axis)[-1:]
            x, axes = (x[0], inputs(row, seed=1)), (in_axis, None)
        actual = jax.vmap(function.quake, axes, out_axis)(*x)
        expected = exactly(jax.vmap(function.exact, axes, out_axis), *x)
        np.testing.assert_allclose(actual, expected, rtol=function.bound(3), atol=1e-4)


@parametrize_functions((*PAIRS, *BIASED))
def test_vmap_over_one_of_two_operands(function):
    x, y = function.inputs((3, 4))
    many_x, many_y = inputs((5, 3, 4), seed=2), inputs((5, *y.shape), seed=3)
    for axis in (0, 2):
        actual = jax.jit(jax.vmap(function.quake, (axis, None)))(jnp.moveaxis(many_x, 0, axis), y)
        expected = jnp.stack([function.quake(a, y) for a in many_x])
        np.testing.assert_allclose(actual, expected, rtol=2.0**-18)
    for axis in (0, 1):
        actual = jax.jit(jax.vmap(function.quake, (None, axis)))(x, jnp.moveaxis(many_y, 0, axis))
        expected = jnp.stack([function.quake(x, b) for b in many_y])
        np.testing.assert_allclose(actual, expected, rtol=2.0**-18)
    actual = jax.jit(jax.vmap(function.quake))(many_x, many_y)
    expected = jnp.stack([function.quake(a, b) for a, b in zip(many_x, many_y, strict=True)])
    np.testing.assert_allclose(actual, expected, rtol=2.0**-18)


def test_vmap_keeps_an_unbatched_bias_a_bias():
    for function in BIASED:
        x, bias = function.inputs((3, 4, 5))
        for axis in (0, 1, 2):
            bias = inputs((np.delete(x.shape, axis)[-1],))
            jaxpr = jax.make_jaxpr(jax.vmap(function.quake, (axis, None)))(x, bias)
            assert function.primitive in str(jaxpr) and len(orders_in(jaxpr)) == 1


def test_vmap_over_each_axis_and_where():
    tolerance = {"rtol": 2.0**-18, "atol": 2.0**-20}
    x, where = inputs((3, 4, 5)), np.random.default_rng(2).random((4, 5)) < 0.5
    for name in ("softmax", "log_softmax", "logsumexp"):
        quake = getattr(quake_jax, name)
        for axis in (0, 1, (0, 1), None):
            actual = jax.vmap(lambda a, f=quake, n=axis: f(a, n, where=where), 2)(
                jnp.moveaxis(x, 0, 2)
            )
            each = [quake(row, axis, where=where) for row in x]
            np.testing.assert_allclose(actual, jnp.stack(each), **tolerance)
            for batch in (0, 1, 2):
                actual = jax.vmap(lambda a, f=quake, n=axis: f(a, n), batch)(x)
                each = [quake(row, axis) for row in jnp.moveaxis(x, batch, 0)]
                np.testing.assert_allclose(actual, jnp.stack(each), **tolerance)
        masks = jnp.stack([where, ~where, where])
        actual = jax.vmap(lambda a, m, f=quake: f(a, axis=-1, where=m))(x, masks)
        expected = quake(x, axis=-1, where=masks)
        np.testing.assert_allclose(actual, expected, **tolerance)
        actual = jax.vmap(lambda m, f=quake: f(x[0], axis=-1, where=m), 1)(masks.swapaxes(0, 1))
        expected = jnp.stack([quake(x[0], axis=-1, where=m) for m in masks])
        np.testing.assert_allclose(actual, expected, **tolerance)


@parametrize_functions()
def test_vmap_is_one_kernel_call(function):
    x = function.inputs((2, 3, 4))
    axes = (0, None) if function in BIASED else 0
    jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(function.quake, axes), axes))(*x)
    assert len(orders_in(jaxpr)) == 1 and "transpose" not in str(jaxpr)


@parametrize_functions((*ELEMENTWISE[:2], *PAIRS, *SPLITS, *BIASED, *ROWS))
def test_vmap_of_grad(function):
    x = function.inputs((4, 6), scale=0.25)
    axes = (0, None) if function in BIASED else 0
    every = tuple(range(len(x)))
    actual = jax.jit(jax.vmap(jax.grad(weighted(function.quake), every), axes))(*x)
    expected = exactly(jax.vmap(jax.grad(weighted(function.exact), every), axes), *x)
    for gradient, e in zip(actual, expected, strict=True):
        assert_derivative(gradient, e, function, 3)


@parametrize_functions(FAMILIES)
def test_scan_remat_and_linearize(function):
    x = function.inputs((5, 6), scale=0.25)
    bias = x[1:] if function in BIASED else ()
    rows = x[: len(x) - len(bias)]

    def scan(f, rows, bias):
        return jax.lax.scan(lambda c, row: (c, f(*row, *bias)), 0, rows)[1]

    np.testing.assert_allclose(
        jax.jit(lambda *x: scan(function.quake, x[: len(rows)], x[len(rows) :]))(*x),
        function.quake(*x),
        rtol=2.0**-20,
    )
    axes = (*(0 for _ in rows), *(None for _ in bias))
    tolerance = {"rtol": 2.0**-18, "atol": 2.0**-20}
    total = weighted(function.quake)
    plain = jax.jit(jax.vmap(jax.grad(total), axes))(*x)
    scanned = jax.grad(lambda *x: jnp.sum(scan(total, x[: len(rows)], x[len(rows) :])))
    np.testing.assert_allclose(jax.jit(scanned)(*x), plain, **tolerance)
    remat = jax.jit(jax.vmap(jax.grad(jax.checkpoint(total)), axes))
    np.testing.assert_allclose(remat(*x), plain, **tolerance)
    y, f_jvp = jax.linearize(jax.jit(function.quake), *x)
    np.testing.assert_array_equal(y, function.quake(*x))
    tangent = jax.jit(lambda *a: jax.jvp(function.quake, a, a)[1])(*x)
    np.testing.assert_allclose(f_jvp(*x), tangent, **tolerance)


@parametrize_functions()
def test_eval_shape_takes_shapes_of_any_size(function):
    shape = (2**20, 2**20)
    huge = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in function.operands(shape)]
    result = jax.eval_shape(function.quake, *huge)
    assert (result.shape, result.dtype) == (function.result_shape(shape), jnp.bfloat16)


def test_disable_jit():
    with jax.disable_jit():
        for function in FUNCTIONS:
            x = function.inputs((2, 3))
            function.assert_within(function.quake(*x), function.expected(*x), 3)


def everything(x):
    y = quake_jax.softmax(quake_jax.exp(x), where=x > 0) + quake_jax.softmax(x, 0)
    y = y + quake_jax.gelu(x, approximate=False) + quake_jax.silu(quake_jax.tanh(x))
    y = y + quake_jax.swiglu(jnp.concatenate([x, y], -1)) + quake_jax.logaddexp(x, y)
    y = quake_jax.bias_gelu(y, jnp.arange(y.shape[-1], dtype=y.dtype))
    return y + quake_jax.logsumexp(x, -1, keepdims=True) + quake_jax.glu(x[..., None, :], -1).sum()


def test_export_round_trip_with_a_symbolic_batch():
    batch = jax.export.symbolic_shape("b, 4")
    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(jax.jit(everything), disabled_checks=checks)(
        jax.ShapeDtypeStruct(batch, jnp.float32)
    )
    assert exported.mlir_module().count("custom_call @quake_jax_") == 11
    loaded = jax.export.deserialize(bytearray(exported.serialize()))
    for size in (1, 7):
        x = inputs((size, 4))
        np.testing.assert_allclose(loaded.call(x), jax.jit(everything)(x), rtol=2.0**-18)


def test_export_without_disabled_checks_is_refused():
    with pytest.raises(ValueError, match="quake_jax_exp"):
        jax.export.export(jax.jit(quake_jax.exp))(jnp.ones(3)).serialize()


def test_export_names_every_custom_call():
    names = {check.is_custom_call() for check in quake_jax.disabled_export_checks()}
    others = {"softmax_where", "log_softmax_where", "glu", "dot_product_attention", "dense"}
    norms = {f"{norm}_norm{form}" for norm in ("layer", "rms") for form in ("", "_residual")}
    expected = {f.primitive.removeprefix("quake_") for f in FUNCTIONS} | others | norms
    assert names == {f"quake_jax_{name}" for name in expected}


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


@parametrize_functions()
def test_checkify_sees_nan(function):
    x = function.inputs((2, 8))
    bad = (x[0].at[0, 0].set(jnp.nan), *x[1:])
    checked = checkify.checkify(jax.jit(function.quake), checkify.float_checks)
    assert checked(*x)[0].get() is None
    assert f"nan generated by primitive: {function.primitive}" in checked(*bad)[0].get()


def test_checkify_sees_nan_of_infinite_logits_and_of_attention():
    def check(f, *x):
        error, _ = checkify.checkify(f, checkify.float_checks)(*x)
        return error.get()

    row = jnp.full((64, 64), -jnp.inf)
    q = jnp.ones((1, 16, 2, 8))
    attend = quake_jax.dot_product_attention
    nan = "nan generated by primitive: quake_"
    assert nan in check(quake_jax.softmax, row)
    assert nan in check(quake_jax.accelerate(jax.nn.softmax), row)
    assert check(attend, q, q, q) is None
    assert nan in check(attend, q, q, q, jnp.full((1, 1, 1, 16), -jnp.inf))
    # No NaN, unlike jax.nn's.
    assert check(quake_jax.silu, row) is None
