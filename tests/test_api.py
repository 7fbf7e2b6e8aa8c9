"""The public functions against those they replace: signatures, dtypes, shapes, axes, masks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    DTYPES,
    ELEMENTWISE,
    SOFTMAX,
    assert_within,
    inputs,
    parametrize_functions,
)

import quake_jax

PAIRS = (
    (quake_jax.exp, jnp.exp),
    (quake_jax.sigmoid, jax.nn.sigmoid),
    (quake_jax.silu, jax.nn.silu),
    (quake_jax.swish, jax.nn.swish),
    (quake_jax.tanh, jnp.tanh),
    (quake_jax.gelu, jax.nn.gelu),
    (quake_jax.softmax, jax.nn.softmax),
)


@pytest.mark.parametrize(("quake", "exact"), PAIRS, ids=[exact.__name__ for _, exact in PAIRS])
def test_signature_is_that_of_the_replaced_function_plus_order(quake, exact):
    *ours, order = inspect.signature(quake).parameters.values()
    theirs = inspect.signature(exact).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert (order.name, order.kind, order.default) == ("order", order.KEYWORD_ONLY, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@parametrize_functions()
def test_values_are_within_the_bound_of_the_order(function, order, dtype):
    x = inputs((7, 33), dtype)
    y = function.quake(x, order=order)
    assert y.dtype == x.dtype and y.shape == x.shape
    assert_within(y, function.expected(x), function.bound(order, dtype))


@parametrize_functions()
def test_orders_differ_and_the_exact_one_is_the_replaced_function(function):
    x = inputs((4, 50))
    results = [np.asarray(function.quake(x, order=n)) for n in (1, 2, 3, 4, 5)]
    errors = [np.abs(y - function.expected(x)).max() for y in results]
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_equal(
        jax.jit(lambda a: function.quake(a, order="exact"))(x), jax.jit(function.exact)(x)
    )


SCALARS = [2.0, 2, True, np.float32(2), np.float64(2), np.int8(2), np.bool_(True)]
ARRAYS = [
    np.ones(3, np.float64),
    np.ones(3, np.int8),
    jnp.ones(3, jnp.int32),
    jnp.ones(3, jnp.uint8),
    jnp.ones(3, bool),
    jnp.asarray(2.0),
    jnp.asarray(2.0)[None],
    jnp.ones(3, jnp.bfloat16),
    jnp.ones((2, 3), jnp.float8_e4m3fn),
]


def _kind(x):
    return f"{type(x).__name__}-{getattr(x, 'dtype', '')}-{np.ndim(x)}"


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # jax.nn.softmax of int
@pytest.mark.parametrize("x", SCALARS + ARRAYS, ids=_kind)
@parametrize_functions()
def test_promotion_and_weak_types_are_those_of_the_replaced_function(function, x):
    try:
        expected = jax.eval_shape(function.exact, x)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            function.quake(x)
    else:
        actual = jax.eval_shape(function.quake, x)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert actual.weak_type == expected.weak_type


@parametrize_functions()
def test_python_numbers_and_numpy_arrays_are_computed(function):
    x = np.linspace(-3, 3, 24).reshape(2, 3, 4)
    bound = function.bound(3)
    assert_within(function.quake(x, order=3), function.expected(x), bound)
    if function is not SOFTMAX:
        assert_within(function.quake(0.5, order=3), function.expected(0.5), bound)


@parametrize_functions()
def test_float64_and_float8_get_the_exact_function(function):
    with jax.enable_x64(True):
        x = jnp.linspace(-3, 3, 11)
        assert x.dtype == jnp.float64
        np.testing.assert_array_equal(
            jax.jit(lambda a: function.quake(a, order=1))(x), jax.jit(function.exact)(x)
        )
    jaxpr = jax.make_jaxpr(lambda a: function.quake(a, order=1))(jnp.ones(4, jnp.float8_e5m2))
    assert "[order=" not in str(jaxpr)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (3, 1), (2, 3, 4), (0,), (0, 3), (3, 0), (2, 0, 3)]
)
@parametrize_functions(ELEMENTWISE)
def test_shapes(function, shape):
    x = inputs(shape)
    for call in (function.quake, jax.jit(function.quake)):
        y = call(x)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_within(y, function.expected(x), function.bound(3))


SHAPES_AND_AXES = [
    ((5,), -1),
    ((5,), 0),
    ((1,), -1),
    ((3, 4), 0),
    ((3, 4), -2),
    ((3, 4), (0, 1)),
    ((3, 4), (-1, 0)),
    ((3, 4), [1]),
    ((3, 4), ()),
    ((3, 4), None),
    ((3, 4), np.int64(1)),
    ((2, 3, 4), 1),
    ((2, 3, 4), (0, 2)),
    ((2, 3, 4), (2, 0)),
    ((2, 3, 4, 5), (1, 2)),
    ((), None),
    ((), ()),
    ((0, 4), 1),
    ((0, 4), 0),
    ((4, 0), -1),
    ((4, 0), None),
    ((2, 0, 3), (0, 2)),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES_AND_AXES, ids=str)
def test_softmax_axes(shape, axis, dtype):
    x = inputs(shape, dtype)
    for call in (quake_jax.softmax, jax.jit(quake_jax.softmax, static_argnums=1)):
        if isinstance(axis, list) and call is not quake_jax.softmax:
            continue  # jax.jit does not take an unhashable static argument
        y = call(x, axis)
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_within(y, SOFTMAX.expected(x, axis=axis), SOFTMAX.bound(3, dtype))


def test_integers_keep_the_chosen_order():
    assert "quake_softmax[order=2]" in str(
        jax.make_jaxpr(lambda a: quake_jax.softmax(a, order=2))(jnp.arange(3))
    )
    assert "quake_exp[order=2]" in str(
        jax.make_jaxpr(lambda a: quake_jax.exp(a, order=2))(jnp.arange(3))
    )


# Shapes of x and where, and an axis. jax.nn.softmax lets where broadcast x up; the axis then
# counts in the broadcast shape. (jax.nn.softmax 0.10 takes the maximum over another axis then, so
# the comparison is with x broadcast first.)
WHERE_SHAPES = [
    ((3, 4), (3, 4), -1),
    ((3, 4), (4,), -1),
    ((3, 4), (3, 1), 0),
    ((3, 4), (), -1),
    ((3, 4), (3, 4), (0, 1)),
    ((3, 4), (2, 3, 4), -1),
    ((3, 4), (2, 3, 4), 0),
    ((4,), (3, 4), -1),
    ((3, 1), (3, 4), -1),
    ((2, 3, 4), (2, 3, 4), 1),
    ((3, 4), (3, 4), ()),
]


@pytest.mark.parametrize(("shape", "where_shape", "axis"), WHERE_SHAPES, ids=str)
def test_softmax_where(shape, where_shape, axis):
    x = inputs(shape)
    where = jnp.asarray(np.random.default_rng(1).random(where_shape) < 0.6)
    with jax.enable_x64(True):
        wide = np.broadcast_to(np.asarray(x, np.float64), np.broadcast_shapes(shape, where_shape))
        expected = np.asarray(jax.nn.softmax(jnp.asarray(wide), axis, where))
    y = quake_jax.softmax(x, axis, where, order=3)
    assert y.shape == expected.shape
    # In jax.nn.softmax too, a row without any value is 0.
    assert_within(y, expected, SOFTMAX.bound(3))


def test_softmax_ignores_whatever_is_masked():
    x = inputs((4, 6))
    where = jnp.arange(6) < 4
    plain = quake_jax.softmax(x[:, :4])
    for garbage in (jnp.nan, jnp.inf, -jnp.inf, 3e38):
        y = quake_jax.softmax(x.at[:, 4:].set(garbage), where=where)
        assert_within(y[:, :4], np.asarray(plain, np.float64), 2 * SOFTMAX.bound(3))
        np.testing.assert_array_equal(y[:, 4:], 0)


def test_softmax_where_python_bool():
    x = inputs((2, 3))
    np.testing.assert_array_equal(quake_jax.softmax(x, where=True), quake_jax.softmax(x))
    np.testing.assert_array_equal(quake_jax.softmax(x, where=False), 0)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@parametrize_functions()
def test_special_values(function, dtype, order):
    special = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e4, -1e4], dtype)
    if function is SOFTMAX:
        rows = jnp.stack(
            [
                jnp.array([0.0, jnp.nan, 1.0], dtype),
                jnp.array([0.0, jnp.inf, 1.0], dtype),
                jnp.array([-jnp.inf, -jnp.inf, -jnp.inf], dtype),
                jnp.array([-jnp.inf, 1.0, -jnp.inf], dtype),
                jnp.array([6e4, -6e4, -6e4], dtype),
            ]
        )
        y = np.asarray(function.quake(rows, order=order), np.float64)
        assert np.isnan(y[:3]).all()
        bound = function.bound(order, dtype)
        np.testing.assert_allclose(y[3:], [[0, 1, 0], [1, 0, 0]], rtol=bound)
        return
    y = np.asarray(function.quake(special, order=order), np.float64)
    limits = {
        "exp": (1, np.inf, 0),
        "sigmoid": (0.5, 1, 0),
        "silu": (0, np.inf, 0),
        "tanh": (0, 1, -1),
        "gelu_tanh": (0, np.inf, 0),
        "gelu_erf": (0, np.inf, 0),
    }
    at_zero, right, left = limits[function.name]
    large = float(special[5]) if right == np.inf and function.name != "exp" else right
    np.testing.assert_allclose(y[:2], at_zero, rtol=function.bound(order, dtype))
    np.testing.assert_array_equal(y[2:], [right, left, np.nan, large, left])


def test_large_logits_have_no_nan():
    for scale in (1e10, 3e38):
        x = scale * jnp.array([[1.0, -1.0, 0.5], [-1.0, -1.0, -1.0]])
        for order in (1, 2, 3, 4, 5):
            y = jax.jit(lambda a, n=order: quake_jax.softmax(a * 1.0, order=n))(x)
            np.testing.assert_allclose(
                y, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=SOFTMAX.bound(order)
            )


def test_swish_is_silu():
    assert quake_jax.swish is quake_jax.silu


@parametrize_functions()
def test_a_call_is_one_kernel_in_the_program(function):
    text = str(jax.make_jaxpr(lambda a: function.quake(a, order=4))(inputs((2, 8))))
    assert f"{function.primitive}[order=4]" in text
    assert text.count("[order=") == 1


def test_reference_refuses_other_dtypes_and_orders():
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16; got int32"):
        quake_jax.reference.exp(jnp.arange(3), order=3)
    with pytest.raises(ValueError, match="order must be an integer from 1 to 5; got 6"):
        quake_jax.reference.tanh(jnp.ones(3), order=6)
