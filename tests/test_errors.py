"""Bad arguments: the type of the error and what its text names, at trace time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import parametrize_functions

import quake_jax

ALLOWED_ORDERS = 'order must be None, an integer from 1 to 5, or "exact"'


@pytest.mark.parametrize(
    ("order", "error"),
    [
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
    ],
    ids=repr,
)
@parametrize_functions()
def test_order(function, order, error):
    text = re.escape(f"{ALLOWED_ORDERS}; got {order!r}")
    with pytest.raises(error, match=text):
        function.quake(jnp.ones((2, 3)), order=order)
    if function.name == "exp":  # the other two ways to choose one
        with pytest.raises(error, match=text):
            quake_jax.default_order(order)
        with pytest.raises(error, match=text):
            quake_jax.set_default_order(order)
        with pytest.raises(error, match=text):
            jax.eval_shape(lambda x: quake_jax.exp(x, order=order), jnp.ones(3))


def test_a_traced_order_is_refused():
    with pytest.raises(TypeError, match="order must be None"):
        jax.jit(lambda x, n: quake_jax.exp(x, order=n))(1.0, 3)


def test_order_is_keyword_only():
    for f in (quake_jax.exp, quake_jax.sigmoid, quake_jax.silu, quake_jax.tanh):
        with pytest.raises(TypeError, match="positional argument"):
            f(1.0, 3)


@pytest.mark.parametrize("order", [None, 3, "exact"])
@pytest.mark.parametrize("x", [1j, np.ones(3, np.complex64), jnp.ones((2, 2), jnp.complex64)])
@parametrize_functions()
def test_complex(function, x, order):
    x = np.atleast_1d(x) if function.name == "softmax" else x
    name = function.name.split("_")[0]
    text = rf"quake_jax.{name}: x must be real; got an array of dtype complex64"
    with pytest.raises(TypeError, match=text):
        function.quake(x, order=order)
    with pytest.raises(TypeError, match=text):
        jax.eval_shape(lambda a: function.quake(a, order=order), x)


@pytest.mark.parametrize("x", [[1.0, 2.0], None, "text", {"a": 1.0}, object()], ids=repr)
@parametrize_functions()
def test_no_array(function, x):
    with pytest.raises(TypeError):
        function.exact(x)
    with pytest.raises(TypeError):
        function.quake(x)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_integers_where_the_replaced_function_refuses_them(dtype):
    for f in (quake_jax.sigmoid, quake_jax.silu):
        with pytest.raises(TypeError, match=f"does not accept dtype {dtype}"):
            f(jnp.ones(3, dtype))


ROWS = np.zeros((3, 4), np.float32)
SOFTMAX_ERRORS = [
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


@pytest.mark.parametrize(("arguments", "error", "text"), SOFTMAX_ERRORS, ids=lambda a: str(a)[:40])
@pytest.mark.parametrize("order", [None, "exact"])
def test_softmax_arguments(arguments, error, text, order):
    with pytest.raises(error, match=re.escape(f"quake_jax.softmax: {text}")):
        quake_jax.softmax(ROWS, **arguments, order=order)
    with pytest.raises(error, match=re.escape(f"quake_jax.softmax: {text}")):
        jax.eval_shape(lambda x: quake_jax.softmax(x, **arguments, order=order), ROWS)


def test_softmax_of_a_scalar_and_of_bool():
    with pytest.raises(ValueError, match="axis -1 is out of bounds for x of 0 dimensions; allowed"):
        quake_jax.softmax(1.0)
    with pytest.raises(TypeError, match="quake_jax.softmax: x must be real; .* dtype bool"):
        quake_jax.softmax(np.ones(3, bool))


def test_a_traced_axis_is_refused():
    with pytest.raises(TypeError, match="axis must be an integer"):
        jax.jit(quake_jax.softmax)(ROWS, 1)
