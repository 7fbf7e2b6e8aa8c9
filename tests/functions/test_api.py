"""The public functions against those they replace: signatures, dtypes, shapes, axes, masks."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import (
    BIASED,
    DTYPES,
    ELEMENTWISE,
    FUNCTIONS,
    GLU,
    LOG_SOFTMAX,
    LOGADDEXP,
    LOGSUMEXP,
    ORDERS,
    PAIRS,
    POINTWISE,
    ROWS,
    SOFTMAX,
    SPLITS,
    SWIGLU,
    SWIGLU_SPLIT,
    assert_within,
    in_float64,
    inputs,
    orders_in,
    parametrize_functions,
)

import quake_jax
from quake_jax._elementwise import table


def public(function):
    """The public function of a row, with all of its arguments."""
    return getattr(quake_jax, function.name)


REPLACED = {row.public: row.replaces for row in table.FUNCTIONS.values() if row.replaces}
REPLACED |= {f: getattr(jax.nn, f.__name__) for f in (quake_jax.glu, *map(public, ROWS))}

OF_ALPHA = [f for f in REPLACED if "alpha" in inspect.signature(f).parameters]


@pytest.mark.parametrize(("quake", "exact"), REPLACED.items(), ids=lambda f: f.__name__)
def test_signature_is_that_of_the_replaced_function_plus_order(quake, exact):
    *ours, order = inspect.signature(quake).parameters.values()
    theirs = inspect.signature(exact).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert (order.name, order.kind, order.default) == ("order", order.KEYWORD_ONLY, None)


@parametrize_functions()
def test_order_is_the_last_and_given_by_its_name(function):
    *_, order = inspect.signature(function.quake).parameters.values()
    assert (order.name, order.kind, order.default) == ("order", order.KEYWORD_ONLY, None)


@pytest.mark.parametrize("dtype", DTYPES)
@parametrize_functions()
def test_values_are_within_the_bound_of_the_order(function, dtype):
    operands = function.inputs((7, 33), dtype)
    expected = function.expected(*operands)
    for order in ORDERS:
        y = function.quake(*operands, order=order)
        assert y.dtype == dtype and y.shape == function.result_shape((7, 33))
        function.assert_within(y, expected, order, dtype)


@parametrize_functions()
def test_orders_differ_and_the_exact_one_is_the_replaced_function(function):
    operands = function.inputs((4, 50))
    expected = function.expected(*operands)
    errors = []
    for order in ORDERS:
        y = np.asarray(function.quake(*operands, order=order))
        errors.append(np.abs(y - expected).max())
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_equal(
        jax.jit(lambda *x: function.quake(*x, order="exact"))(*operands),
        jax.jit(function.exact)(*operands),
    )


class _Variable:
    """Stands for an array, as keras.Variable does: no pytree, and its dtype is a string."""

    def __init__(self, value):
        self._value = value
        self.shape, self.dtype = value.shape, str(value.dtype)

    def __jax_array__(self):
        return self._value


def _attention(q, bias, mask, lengths, ids, scale):
    return quake_jax.dot_product_attention(
        q, q, q, bias, mask, key_value_seq_lengths=lengths, query_segment_ids=ids, scale=scale
    )


# Functions with everything in them that may be an array; the first operand has a gradient.
WITH_ARRAYS = {
    **{f.name: (f.quake, f.inputs((3, 8))) for f in FUNCTIONS},
    **{f.__name__: (f, (inputs((2, 3)), jnp.float32(2))) for f in OF_ALPHA},
    "softmax_where": (
        lambda x, where: quake_jax.softmax(x, where=where),
        (inputs((3, 8)), jnp.arange(8) % 3 > 0),
    ),
    "logsumexp_where": (
        lambda a, b, where: quake_jax.logsumexp(a, b=b, where=where),
        (inputs((3, 8)), inputs((3, 8)) + 9, jnp.arange(8) % 3 > 0),
    ),
    "dot_product_attention": (
        _attention,
        (
            inputs((1, 4, 2, 8)) / 8,
            inputs((1, 2, 4, 4)),
            jnp.ones((1, 1, 1, 4), bool),
            jnp.ones(1, jnp.int32),
            jnp.zeros((1, 4), jnp.int32),
            jnp.float32(0.5),
        ),
    ),
    "packed_dot_product_attention": (
        quake_jax.packed_dot_product_attention,
        (inputs((1, 4, 3, 2, 8)) / 8,),
    ),
}


@pytest.mark.parametrize("name", WITH_ARRAYS)
def test_what_stands_for_an_array_is_one(name):
    quake, x = WITH_ARRAYS[name]
    expected = quake(*x)
    for wrap in (nnx.Param, _Variable):
        np.testing.assert_array_equal(quake(*map(wrap, x)), expected)
    parameters = [nnx.Param(v) for v in x]
    np.testing.assert_allclose(nnx.jit(quake)(*parameters), expected, rtol=1e-6)

    def total(first, *rest):
        return quake(first, *rest).sum()

    gradient = jax.grad(total)(*x)
    np.testing.assert_array_equal(jax.grad(total)(*parameters)[...], gradient)
    np.testing.assert_array_equal(nnx.grad(total)(*parameters)[...], gradient)


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


def _assert_same_type(quake, exact, *x):
    try:
        expected = jax.eval_shape(exact, *x)
    except (TypeError, ValueError) as error:
        with pytest.raises(type(error)):
            quake(*x)
    else:
        actual = jax.eval_shape(quake, *x)
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), x
        assert actual.weak_type == expected.weak_type, x


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # jax.nn.softmax of int
@parametrize_functions((*ELEMENTWISE, *ROWS))
def test_promotion_and_weak_types_are_those_of_the_replaced_function(function):
    for x in SCALARS + ARRAYS:
        _assert_same_type(function.quake, function.exact, x)


@pytest.mark.parametrize(
    ("quake", "exact"),
    [*((f.quake, f.exact) for f in PAIRS), *((f, REPLACED[f]) for f in OF_ALPHA)],
    ids=[f.name for f in PAIRS] + [f.__name__ for f in OF_ALPHA],
)
def test_promotion_of_two_operands_is_that_of_the_replaced_function(quake, exact):
    others = [2, 1.5, np.int8(2), jnp.ones(3, jnp.float16), np.ones((2, 1), np.float64)]
    for x in SCALARS + ARRAYS:
        for other in others:
            _assert_same_type(quake, exact, x, other)
            _assert_same_type(quake, exact, other, x)


def test_promotion_of_bias_and_of_halves():
    for function in BIASED:
        for dtype in ("float32", "bfloat16", "int32"):
            x = jnp.ones((2, 3), dtype)
            for bias in (np.ones(3, np.int8), jnp.ones(3, jnp.float16), np.ones(3)):
                _assert_same_type(function.quake, function.exact, x, bias)
    for function in SPLITS:
        for dtype in ("float16", "int32", "bool", "float8_e4m3fn"):
            _assert_same_type(function.quake, function.exact, jnp.ones((2, 4), dtype))


@parametrize_functions()
def test_python_numbers_and_numpy_arrays_are_computed(function):
    x = [np.asarray(a, np.float64) for a in function.inputs((2, 3, 4))]
    function.assert_within(function.quake(*x, order=3), function.expected(*x), 3)
    if function in POINTWISE:
        numbers = [0.5, 0.25][: len(x)]
        y = function.quake(*numbers, order=3)
        function.assert_within(y, function.expected(*numbers), 3)


@parametrize_functions()
def test_float64_and_float8_get_the_exact_function(function):
    shapes = function.operands((2, 6))
    with jax.enable_x64(True):
        x = [jnp.linspace(-3, 3, np.prod(shape)).reshape(shape) for shape in shapes]
        assert x[0].dtype == jnp.float64
        np.testing.assert_array_equal(
            jax.jit(lambda *a: function.quake(*a, order=1))(*x), jax.jit(function.exact)(*x)
        )
    jaxpr = jax.make_jaxpr(lambda *a: function.quake(*a, order=1))(
        *(jnp.ones(shape, jnp.float8_e5m2) for shape in shapes)
    )
    assert not orders_in(jaxpr)


@parametrize_functions(
    (*ELEMENTWISE[:2], ELEMENTWISE[-1], LOGADDEXP, SWIGLU, SWIGLU_SPLIT, GLU, BIASED[0], *ROWS)
)
def test_shapes(function):
    for shape in [(), (1,), (5,), (3, 1), (2, 3, 4), (0,), (0, 3), (3, 0), (2, 0, 3)]:
        if shape == () and function not in POINTWISE:
            continue
        x = function.inputs(shape)
        for call in (function.quake, jax.jit(function.quake)):
            y = call(*x)
            assert (y.shape, y.dtype) == (function.result_shape(shape), x[0].dtype)
            function.assert_within(y, function.expected(*x), 3)


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
@pytest.mark.parametrize("function", ROWS, ids=lambda f: f.name)
def test_axes(function, dtype):
    quake = public(function)
    exact = REPLACED[quake]
    for shape, axis in SHAPES_AND_AXES:
        x = inputs(shape, dtype)
        expected = in_float64(exact, x, axis=tuple(axis) if isinstance(axis, list) else axis)
        for call in (quake, jax.jit(quake, static_argnums=1)):
            if isinstance(axis, list) and call is not quake:
                continue  # jax.jit does not take an unhashable static argument
            y = call(x, axis)
            assert (y.shape, y.dtype) == (expected.shape, x.dtype)
            function.assert_within(y, expected, 3, dtype)


def test_one_axis_is_reduced_where_it_is():
    for function in ROWS:
        quake = public(function)
        for axis in (0, 1, 2):
            jaxpr = str(jax.make_jaxpr(lambda a, f=quake, n=axis: f(a, n))(inputs((2, 3, 4))))
            assert f"axis={axis}" in jaxpr and "transpose" not in jaxpr


def test_integers_keep_the_chosen_order():
    for f in (quake_jax.softmax, quake_jax.logsumexp, quake_jax.exp, quake_jax.softplus):
        assert orders_in(jax.make_jaxpr(lambda a, f=f: f(a, order=2))(jnp.arange(3))) == [2]


# Shapes of x and where, and an axis. jax.nn lets where broadcast x up; the axis then
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
    ((2, 3, 4), (1, 3, 4), -1),
    ((2, 3, 4), (2, 1, 4), -1),
    ((2, 3, 4), (2, 3, 1), -1),
    ((3, 4), (3, 4), ()),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("function", ROWS, ids=lambda f: f.name)
def test_where(function, dtype):
    quake = public(function)
    exact = REPLACED[quake]
    for shape, where_shape, axis in WHERE_SHAPES:
        x = inputs(shape, dtype)
        where = jnp.asarray(np.random.default_rng(1).random(where_shape) < 0.6)
        wide = np.broadcast_to(np.asarray(x, np.float64), np.broadcast_shapes(shape, where_shape))
        expected = in_float64(lambda a, e=exact, n=axis, w=where: e(a, axis=n, where=w), wide)
        y = quake(x, axis=axis, where=where, order=3)
        assert (y.shape, y.dtype) == (expected.shape, x.dtype)
        # In jax.nn too, a row without any value is 0, or -inf.
        function.assert_within(y, expected, 3, dtype)


def test_a_mask_of_the_last_axis_goes_into_the_kernel_as_it_is():
    x, mask = inputs((2, 3, 4, 4)), jnp.tril(jnp.ones((4, 4), bool))
    for f in (quake_jax.softmax, quake_jax.log_softmax):
        jaxpr = str(jax.make_jaxpr(lambda a, m, f=f: f(a, where=m))(x, mask))
        assert f"quake_{f.__name__}_where" in jaxpr
        assert "select" not in jaxpr and "bool[2" not in jaxpr


def test_whatever_is_masked_is_ignored():
    x = inputs((4, 6))
    where = jnp.arange(6) < 4
    for function in ROWS:
        f = public(function)
        masked = {"softmax": 0, "log_softmax": -jnp.inf}
        for axis in (-1, 0):
            mask = where if axis == -1 else where[:, None]
            rows = x if axis == -1 else x.T
            plain = f(rows[:, :4] if axis == -1 else rows[:4], axis=axis)
            for garbage in (jnp.nan, jnp.inf, -jnp.inf, 3e38):
                y = f(jnp.where(mask, rows, garbage), axis=axis, where=mask)
                if function is LOGSUMEXP:
                    kept = y
                else:
                    kept, rest = jnp.split(y, [4], axis)
                    np.testing.assert_array_equal(rest, masked[function.name])
                np.testing.assert_allclose(kept, plain, rtol=2.0**-18)


def test_where_python_bool():
    x = inputs((2, 3))
    for f, masked in ((quake_jax.softmax, 0), (quake_jax.log_softmax, -jnp.inf)):
        np.testing.assert_allclose(f(x, where=True), f(x), rtol=2.0**-20)
        np.testing.assert_array_equal(f(x, where=False), masked)
    np.testing.assert_array_equal(quake_jax.logsumexp(x, where=True), quake_jax.logsumexp(x))
    assert quake_jax.logsumexp(x, where=False) == -jnp.inf


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_logsumexp_with_weights_signs_and_kept_axes(dtype):
    a = inputs((3, 4, 5), dtype).at[1, 2].set(-jnp.inf)
    b = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (4, 5)), dtype).at[0, 0].set(0)
    where = np.random.default_rng(4).random((3, 1, 5)) < 0.7
    a = a.at[:, 0, 0].set(jnp.nan)  # has weight 0, or is masked
    where[:, :, 0] = False
    step = float(jnp.finfo(dtype).eps)
    for axis in (None, 1, (0, 2), ()):
        for weights in (None, b, jnp.abs(b)):
            for keywords in ({}, {"keepdims": True}, {"return_sign": True}):
                keywords = {**keywords, "axis": axis, "where": where}
                if weights is not None and axis != ():
                    keywords = {**keywords, "b": weights}
                with jax.enable_x64(True):
                    wide = {
                        k: np.asarray(v, np.float64) if k == "b" else v for k, v in keywords.items()
                    }
                    expected = jax.nn.logsumexp(np.asarray(a, np.float64), **wide)
                actual = quake_jax.logsumexp(a, **keywords, order=5)
                assert isinstance(actual, tuple) == isinstance(expected, tuple)
                for y, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                    assert (y.shape, y.dtype) == (e.shape, a.dtype)
                    # The logarithm of a sum with cancellation: its terms err by a rounding each.
                    np.testing.assert_allclose(
                        np.asarray(y, np.float64), e, rtol=step, atol=8 * step + 2e-5
                    )


def test_logsumexp_of_rows_with_infinities():
    inf, nan = np.inf, np.nan
    rows = jnp.array([[-inf] * 3, [inf, 1, 2], [inf, -inf, 0], [nan, 1, inf], [-inf, -inf, 2]])
    for order in ORDERS:
        y, sign = quake_jax.logsumexp(rows, -1, return_sign=True, order=order)
        np.testing.assert_allclose(y, [-inf, inf, inf, nan, 2], atol=LOGSUMEXP.bound(order))
        np.testing.assert_array_equal(sign, [0, 1, 1, nan, 1])
        y = quake_jax.logsumexp(rows[4], b=jnp.array([0.0, 1, 1]), order=order)
        np.testing.assert_allclose(y, 2, atol=LOGSUMEXP.bound(order))
    for shape, axis in (((3, 0), 1), ((0,), None), ((0, 2), 0)):
        y = quake_jax.logsumexp(jnp.zeros(shape), axis)
        np.testing.assert_array_equal(y, jax.nn.logsumexp(jnp.zeros(shape), axis))


@pytest.mark.parametrize("dtype", DTYPES)
@parametrize_functions(ROWS)
def test_special_rows(function, dtype):
    inf, nan = np.inf, np.nan
    rows = [[0, nan, 1], [0, inf, 1], [-inf] * 3, [-inf, 1, -inf], [6e4, -6e4, -6e4]]
    x = jnp.asarray(rows, dtype)
    for order in ORDERS:
        for axis in (-1, 0):
            y = public(function)(x if axis else x.T, axis, order=order)
            y = np.asarray(y if axis or function is LOGSUMEXP else y.T, np.float64)
            large = float(x[4, 0])
            expected = {
                "softmax": [[nan] * 3, [nan] * 3, [nan] * 3, [0, 1, 0], [1, 0, 0]],
                "log_softmax": [
                    *([[nan] * 3] * 3),
                    [-inf, 0, -inf],
                    [0, *([-inf if dtype == "float16" else -2 * large] * 2)],
                ],
                "logsumexp": [nan, inf, -inf, 1, large],
            }[function.name]
            np.testing.assert_allclose(
                y, expected, rtol=function.bound(order, dtype), atol=function.bound(order, dtype)
            )


@pytest.mark.parametrize("dtype", DTYPES)
@parametrize_functions(ELEMENTWISE)
def test_special_values(function, dtype):
    special = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1e4, -1e4], dtype)
    at_zero, right, left = function.limits
    large, low = function.expected(special[5:])
    for order in ORDERS:
        y = np.asarray(function.quake(special, order=order), np.float64)
        bound = function.bound(order, dtype)
        np.testing.assert_allclose(y[:2], at_zero, rtol=bound)
        np.testing.assert_array_equal(y[2:3], right)
        np.testing.assert_allclose(y[3:], [left, np.nan, large, low], rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_of_logaddexp(dtype):
    inf, nan = np.inf, np.nan
    x1 = jnp.array([inf, -inf, inf, inf, -inf, nan, 1, 6e4, 0, 1e4], dtype)
    x2 = jnp.array([inf, -inf, -inf, 0, 0, 1, nan, 6e4, 0, -1e4], dtype)
    expected = in_float64(jnp.logaddexp, x1, x2)
    for order in ORDERS:
        for pair in ((x1, x2), (x2, x1)):
            y = quake_jax.logaddexp(*pair, order=order)
            LOGADDEXP.assert_within(y, expected, order, dtype)


@parametrize_functions((*PAIRS[1:], *BIASED))
def test_special_values_beside_an_activation(function):
    # Those of the activation of the sum, or times the value: nothing is invented.
    special = [0.0, np.inf, -np.inf, np.nan, 1e4, -1e4]
    activation = next(f for f in ELEMENTWISE if f.name == function.bound_of)
    for order in ORDERS:
        for other in (2.0, -0.5):
            x = jnp.array(special)
            y = function.quake(x, jnp.full(6, other), order=order)
            if function in BIASED:
                expected = activation.quake(x + other, order=order)
            else:
                expected = activation.quake(x, order=order) * other
            np.testing.assert_allclose(y, expected, rtol=2.0**-20)


def test_the_sum_with_a_bias_and_the_product_with_a_gate_are_rounded_once():
    x, bias = inputs((64, 48), "bfloat16"), inputs((48,), "bfloat16", seed=1)
    value = inputs((64, 48), "bfloat16", seed=2)
    for function in (*BIASED, *PAIRS[1:]):
        second = bias if function in BIASED else value
        wide = function.quake(x.astype(jnp.float32), second.astype(jnp.float32))
        np.testing.assert_array_equal(function.quake(x, second), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_glu_over_any_axis(axis):
    x = inputs((4, 6, 2))
    y = quake_jax.glu(x, axis)
    GLU.assert_within(y, in_float64(jax.nn.glu, x, axis=axis), 3)
    assert quake_jax.glu(jnp.zeros((4, 0, 3)), 0).shape == (2, 0, 3)


def test_which_half_is_the_gate():
    gate, value = inputs((3, 4)), inputs((3, 4), seed=1)
    for f in (
        quake_jax.swiglu,
        quake_jax.geglu,
        lambda *x, **k: quake_jax.geglu(*x, approximate=False, **k),
    ):
        pair = f(gate, value)
        np.testing.assert_array_equal(f(jnp.concatenate([gate, value], -1)), pair)
        last = jnp.concatenate([value, gate], -1)
        np.testing.assert_array_equal(f(last, gate_first=False), pair)
    # glu is the odd one: jax.nn has its gate last.
    np.testing.assert_allclose(quake_jax.glu(last), quake_jax.sigmoid(gate) * value, rtol=2.0**-20)


def test_broadcasting_of_two_operands():
    for function in PAIRS:
        for shapes in (((3, 4), (4,)), ((4,), (3, 4)), ((2, 1, 4), (3, 1)), ((), (3,))):
            x, y = inputs(shapes[0]), inputs(shapes[1], seed=1)
            function.assert_within(function.quake(x, y), function.expected(x, y), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elu_and_celu_of_any_alpha(dtype):
    x = inputs((3, 8), dtype).at[0, :3].set(jnp.array([-jnp.inf, jnp.inf, 0], dtype))
    alphas = [2, 0.5, 1, np.float32(1), jnp.array([[0.25], [1], [3]], dtype), -1.5, True]
    for quake in OF_ALPHA:
        exact = REPLACED[quake]
        function = next(f for f in ELEMENTWISE if f.name == "expm1")
        for alpha in alphas:
            wide = float(alpha) if jnp.ndim(alpha) == 0 else np.asarray(alpha, np.float64)
            y = quake(x, alpha, order=3)
            assert y.dtype == jax.eval_shape(exact, x, alpha).dtype
            expected = in_float64(lambda a, e=exact, w=wide: e(a, w), x)
            # x/alpha in celu is rounded, which the exponential magnifies by its argument.
            bound = function.bound(3, y.dtype) + 32 * 2.0**-24
            assert_within(y, expected, bound)
    assert quake_jax.celu(0.0) == 0 and orders_in(jax.make_jaxpr(quake_jax.celu)(x)) == [3]


def test_large_logits_have_no_nan():
    for scale in (1e10, 3e38):
        x = scale * jnp.array([[1.0, -1.0, 0.5], [-1.0, -1.0, -1.0]])
        for order in ORDERS:
            y = jax.jit(lambda a, n=order: quake_jax.softmax(a * 1.0, order=n))(x)
            expected = [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]
            np.testing.assert_allclose(y, expected, rtol=SOFTMAX.bound(order))
            y = jax.jit(lambda a, n=order: quake_jax.log_softmax(a * 1.0, order=n))(x)
            assert not np.isnan(y).any()
            np.testing.assert_allclose(y[1], -np.log(3), atol=LOG_SOFTMAX.bound(order))
            y = jax.jit(lambda a, n=order: quake_jax.logsumexp(a * 1.0, 1, order=n))(x)
            np.testing.assert_array_equal(y, jnp.array([scale, -scale]))


@pytest.mark.parametrize("function", [SOFTMAX, LOG_SOFTMAX, LOGSUMEXP], ids=lambda f: f.name)
def test_the_bound_holds_for_rows_of_millions(function):
    # Ascending: the maximum rises again and again. Near each other: roundings add up.
    x = np.linspace(0, 1e-3, 10_000_000, dtype=np.float32)
    y = function.quake(jnp.asarray(x), order=5)
    # In NumPy: XLA's own float64 functions take seconds for so many.
    e = np.exp(x.astype(np.float64))
    if function is SOFTMAX:
        np.testing.assert_allclose(y, e / e.sum(), rtol=SOFTMAX.bound(5))
    elif function is LOG_SOFTMAX:
        np.testing.assert_allclose(y, x - np.log(e.sum()), atol=LOG_SOFTMAX.bound(5))
    else:
        rounding = 2**-22 * np.log(e.sum())
        np.testing.assert_allclose(y, np.log(e.sum()), atol=LOGSUMEXP.bound(5) + rounding)


def test_swish_is_silu():
    assert quake_jax.swish is quake_jax.silu


@parametrize_functions()
def test_a_call_is_one_kernel_in_the_program(function):
    jaxpr = jax.make_jaxpr(lambda *a: function.quake(*a, order=4))(*function.inputs((2, 8)))
    assert f"{function.primitive}[" in str(jaxpr)
    assert orders_in(jaxpr) == [4]


def test_reference_refuses_other_dtypes_and_orders():
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16; got int32"):
        quake_jax.reference.exp(jnp.arange(3), order=3)
    with pytest.raises(ValueError, match="order must be an integer from 1 to 5; got 6"):
        quake_jax.reference.tanh(jnp.ones(3), order=6)
