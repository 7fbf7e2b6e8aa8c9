"""Bad arguments: the type of the error and what its text names, at trace time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    BIASED,
    ELEMENTWISE,
    FUNCTIONS,
    LOGSUMEXP,
    PAIRS,
    ROWS,
    SPLITS,
    parametrize_functions,
    takes,
)

import quake_jax
from quake_jax._elementwise import table

ALLOWED_ORDERS = 'order must be None, an integer from 1 to 5, or "exact"'


BAD_ORDERS = [
    (0, ValueError),
    (6, ValueError),
    (-1, ValueError),
    (10**20, ValueError),
    (np.int32(7), ValueError),
    ("3", ValueError),
    ("Exact", ValueError),
    ("", ValueError),
    (True, TypeError),
    (False, TypeError),
    (np.bool_(True), TypeError),
    (3.0, TypeError),
    (float("nan"), TypeError),
    (np.float32(3), TypeError),
    ([3], TypeError),
    ({}, TypeError),
    (np.array([1, 2]), TypeError),
]


@parametrize_functions()
def test_order(function):
    x = function.inputs((2, 3))
    for order, error in BAD_ORDERS:
        with pytest.raises(error, match=re.escape(f"{ALLOWED_ORDERS}; got {order!r}")):
            function.quake(*x, order=order)


@pytest.mark.parametrize(("order", "error"), BAD_ORDERS, ids=repr)
def test_order_elsewhere(order, error):
    text = re.escape(f"{ALLOWED_ORDERS}; got {order!r}")
    with pytest.raises(error, match=text):
        quake_jax.default_order(order)
    with pytest.raises(error, match=text):
        quake_jax.set_default_order(order)
    with pytest.raises(error, match=text):
        jax.eval_shape(lambda x: quake_jax.exp(x, order=order), jnp.ones(3))


def test_a_traced_order_is_refused():
    with pytest.raises(TypeError, match="order must be None"):
        jax.jit(lambda x, n: quake_jax.exp(x, order=n))(1.0, 3)


@parametrize_functions()
def test_complex(function):
    name = function.public or function.name.removesuffix("_split")
    shapes = function.operands((2, 3))
    for order in (None, 3, "exact"):
        for bad in range(len(shapes)):
            x = [np.ones(s, np.complex64 if k == bad else np.float32) for k, s in enumerate(shapes)]
            text = rf"quake_jax.{name}: \w+ must be real; got an array of dtype complex64"
            with pytest.raises(TypeError, match=text):
                function.quake(*x, order=order)
            with pytest.raises(TypeError, match=text):
                jax.eval_shape(lambda *a, n=order: function.quake(*a, order=n), *x)
    if function in ELEMENTWISE:
        with pytest.raises(TypeError, match=rf"quake_jax.{name}: x must be real"):
            function.quake(1j)


@parametrize_functions()
def test_no_array(function):
    x = function.inputs((2, 3))
    for bad in ([1.0, 2.0], None, "text", {"a": 1.0}, object()):
        for position in range(len(x)):
            operands = [bad if k == position else a for k, a in enumerate(x)]
            if bad is None and position == 1 and function in PAIRS[1:]:
                continue  # without a value, the gate holds both
            with pytest.raises(TypeError):
                function.exact(*operands)
            with pytest.raises(TypeError):
                function.quake(*operands)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integers_where_the_replaced_function_refuses_them(dtype):
    refusing = [f for f in FUNCTIONS if not takes(f, dtype)]
    assert {"sigmoid", "silu", "glu_split", "swiglu", "swiglu_split"} <= {f.name for f in refusing}
    for function in refusing:
        x = [jnp.ones(s, dtype) for s in function.operands((4,))]
        with pytest.raises(TypeError) as exact:
            function.exact(*x)
        with pytest.raises(TypeError, match=re.escape(str(exact.value)[:25])):
            function.quake(*x)


def test_bias():
    for function in BIASED:
        name = function.public or function.name
        for shape in ((5,), (3,), (1,), (), (3, 4), (1, 4)):
            text = (
                f"quake_jax.{name}: bias must have shape (4,), for the last axis of x of shape "
                f"(3, 4); got {shape}"
            )
            for order in (3, "exact"):
                with pytest.raises(ValueError, match=re.escape(text)):
                    function.quake(np.ones((3, 4)), np.ones(shape), order=order)
        with pytest.raises(ValueError, match="x must have an axis for the bias; got a scalar"):
            function.quake(1.0, np.ones(1))


def test_gate_and_value():
    for function in PAIRS[1:]:
        name = function.public
        text = (
            f"quake_jax.{name}: gate of shape (3, 4) and value of shape (3, 5) do not broadcast; "
            "each pair of trailing dimensions must be equal or contain a 1"
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            function.quake(np.ones((3, 4)), np.ones((3, 5)))
    for function in SPLITS[1:]:
        for shape in ((), (3,), (2, 5)):
            text = (
                f"quake_jax.{function.public}: without value, gate must have a last axis of even "
                f"size, which holds both; got shape {shape}"
            )
            with pytest.raises(ValueError, match=re.escape(text)):
                function.quake(np.ones(shape))


def test_shapes_that_do_not_broadcast():
    of_alpha = {r.public for r in table.FUNCTIONS.values() if r.kernel.alpha_forms}
    for f in (quake_jax.logaddexp, *of_alpha):
        with pytest.raises((ValueError, TypeError), match="broadcast"):
            f(np.ones((3, 4)), np.ones((3, 5)))


@pytest.mark.parametrize(
    ("x", "axis", "error", "text"),
    [
        (np.ones((2, 3)), -1, ValueError, "axis -1 of x must have an even size; got shape (2, 3)"),
        (
            np.ones((2, 4)),
            2,
            ValueError,
            "axis 2 is out of bounds for x of 2 dimensions; allowed: from -2 to 1",
        ),
        (
            1.0,
            -1,
            ValueError,
            "axis -1 is out of bounds for x of 0 dimensions; allowed: none, for a scalar",
        ),
        (np.ones((2, 4)), 1.0, TypeError, "axis must be an integer; got 1.0"),
        (np.ones((2, 4)), None, TypeError, "axis must be an integer; got None"),
    ],
)
def test_glu(x, axis, error, text):
    for order in (None, "exact"):
        with pytest.raises(error, match=re.escape(f"quake_jax.glu: {text}")):
            quake_jax.glu(x, axis, order=order)


MATRIX = np.zeros((3, 4), np.float32)
ROW_ERRORS = [
    (
        dict(axis=2),
        ValueError,
        "axis 2 is out of bounds for x of 2 dimensions; allowed: from -2 to 1",
    ),
    (
        dict(axis=-3),
        ValueError,
        "axis -3 is out of bounds for x of 2 dimensions; allowed: from -2 to 1",
    ),
    (
        dict(axis=(0, 5)),
        ValueError,
        "axis (0, 5) is out of bounds for x of 2 dimensions; allowed: from -2 to 1",
    ),
    (
        dict(axis=(0, 0)),
        ValueError,
        "axis (0, 0) names the same axis of x twice; allowed: distinct axes from -2 to 1",
    ),
    (
        dict(axis=[0, -2]),
        ValueError,
        "axis (0, -2) names the same axis of x twice; allowed: distinct axes from -2 to 1",
    ),
    (
        dict(axis=1.0),
        TypeError,
        "axis must be an integer, a sequence of integers or None; got 1.0",
    ),
    (
        dict(axis="rows"),
        TypeError,
        "axis must be an integer, a sequence of integers or None; got 'rows'",
    ),
    (
        dict(axis=(0, None)),
        TypeError,
        "axis must be an integer, a sequence of integers or None; got (0, None)",
    ),
    (
        dict(where=np.ones(5, bool)),
        ValueError,
        "where of shape (5,) does not broadcast with x of shape (3, 4)",
    ),
    (
        dict(where=np.ones((2, 4), bool)),
        ValueError,
        "where of shape (2, 4) does not broadcast with x of shape (3, 4)",
    ),
    (
        dict(where=np.ones(4, np.int32)),
        ValueError,
        "where must be None or a boolean array; got an array of dtype int32",
    ),
    (
        dict(where=1.0),
        ValueError,
        "where must be None or a boolean array; got an array of dtype float32",
    ),
    (
        dict(where=[True, False, True, True]),
        TypeError,
        "where must be None or a boolean array; got list",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), ROW_ERRORS, ids=lambda a: str(a)[:40])
def test_arguments_of_reductions(arguments, error, text):
    for function in ROWS:
        f = getattr(quake_jax, function.name)
        if function is LOGSUMEXP:
            text = re.sub(r"\b(of|for|with) x\b", r"\1 a", text)
        expected = re.escape(f"quake_jax.{function.name}: {text}")
        for order in (None, "exact"):
            with pytest.raises(error, match=expected):
                f(MATRIX, **arguments, order=order)
            with pytest.raises(error, match=expected):
                jax.eval_shape(lambda x, f=f, n=order: f(x, **arguments, order=n), MATRIX)


def test_reductions_of_a_scalar_and_of_bool():
    for name in ("softmax", "log_softmax"):
        f = getattr(quake_jax, name)
        with pytest.raises(ValueError, match="axis -1 is out of bounds for x of 0 dimensions"):
            f(1.0)
        with pytest.raises(TypeError, match=f"quake_jax.{name}: x must be real; .* dtype bool"):
            f(np.ones(3, bool))


def test_weights_of_logsumexp():
    for bad, error in ((np.ones(5), ValueError), ([1.0, 2.0], TypeError), ("b", TypeError)):
        with pytest.raises(error):
            jax.nn.logsumexp(MATRIX, b=bad)
        with pytest.raises(error):
            quake_jax.logsumexp(MATRIX, b=bad)
    with pytest.raises(TypeError, match="quake_jax.logsumexp: b must be real"):
        quake_jax.logsumexp(MATRIX, b=np.ones(4, np.complex64))


def test_a_traced_axis_is_refused():
    for f in (quake_jax.softmax, quake_jax.log_softmax, quake_jax.logsumexp, quake_jax.glu):
        with pytest.raises(TypeError, match="axis must be an integer"):
            jax.jit(f)(MATRIX, 1)
