"""The default order and the switch that turns every kernel off."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import FUNCTIONS, inputs, orders_in, parametrize_functions, run_python

import quake_jax
from quake_jax._core import switches


@pytest.fixture(autouse=True)
def _default_restored():
    yield
    quake_jax.set_default_order(None)


def orders_used(f, *arguments) -> set[int]:
    """The orders bound in the program of f."""
    return set(orders_in(jax.make_jaxpr(f)(*arguments)))


X = np.linspace(-2, 2, 5, dtype=np.float32)


@parametrize_functions()
def test_the_default_is_the_functions_own(function):
    assert orders_used(function.quake, *function.inputs((3,))) == {function.default_order}
    assert function.default_order >= 3


@parametrize_functions()
def test_context_and_global_default(function):
    x, own = function.inputs((3,)), function.default_order
    with quake_jax.default_order(1):
        assert orders_used(function.quake, *x) == {1}
        with quake_jax.default_order(5):
            assert orders_used(function.quake, *x) == {5}
            with quake_jax.default_order(None):
                assert orders_used(function.quake, *x) == {own}
        assert orders_used(function.quake, *x) == {1}
        assert orders_used(lambda *a: function.quake(*a, order=2), *x) == {2}
        with quake_jax.default_order("exact"):
            assert orders_used(function.quake, *x) == set()
    quake_jax.set_default_order(4)
    assert orders_used(function.quake, *x) == {4}
    with quake_jax.default_order(2):
        assert orders_used(function.quake, *x) == {2}
    quake_jax.set_default_order("exact")
    assert orders_used(function.quake, *x) == set()
    quake_jax.set_default_order(None)
    assert orders_used(function.quake, *x) == {own}


def test_the_default_of_attention():
    x = jnp.ones((4, 1, 8))
    for f in (
        lambda order=None: quake_jax.dot_product_attention(x, x, x, order=order),
        lambda order=None: quake_jax.packed_dot_product_attention(
            jnp.stack([x] * 3, 1), order=order
        ),
    ):
        assert orders_used(f) == {5}
        assert orders_used(lambda f=f: f(order=2)) == {2}
        with quake_jax.default_order(1):
            assert orders_used(f) == {1}
        with quake_jax.default_order("exact"):
            assert orders_used(f) == set()


def test_the_default_takes_part_in_the_jit_cache():
    traces = []

    @jax.jit
    def f(x):
        traces.append(None)
        return quake_jax.exp(x)

    x = inputs((16,))
    by_order = {n: np.asarray(quake_jax.exp(x, order=n)) for n in (1, 3, 5)}
    np.testing.assert_array_equal(f(x), by_order[3])
    with quake_jax.default_order(1):
        np.testing.assert_array_equal(f(x), by_order[1])
        np.testing.assert_array_equal(f(x), by_order[1])
    np.testing.assert_array_equal(f(x), by_order[3])
    quake_jax.set_default_order(5)
    np.testing.assert_array_equal(f(x), by_order[5])
    quake_jax.set_default_order(None)
    np.testing.assert_array_equal(f(x), by_order[3])
    assert len(traces) == 3  # once for each default, however often they alternate


def test_a_default_set_inside_a_compiled_function():
    @jax.jit
    def f(x):
        with quake_jax.default_order(1):
            y = quake_jax.exp(x)
        return y, quake_jax.exp(x)

    y1, y3 = f(X)
    np.testing.assert_array_equal(y1, quake_jax.exp(X, order=1))
    np.testing.assert_array_equal(y3, quake_jax.exp(X, order=3))


def test_the_context_is_of_one_thread_and_the_setting_of_all():
    seen = []

    def look():
        seen.append(orders_used(quake_jax.exp, X))

    def in_thread():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return seen[-1]

    with quake_jax.default_order(1):
        assert in_thread() == {3}
    quake_jax.set_default_order(2)
    assert in_thread() == {2}


def test_the_context_ends_with_an_exception_and_serves_as_a_decorator():
    with pytest.raises(KeyError), quake_jax.default_order(1):
        raise KeyError
    assert orders_used(quake_jax.exp, X) == {3}

    decorated = quake_jax.default_order(5)(quake_jax.exp)
    assert orders_used(decorated, X) == {5}
    assert orders_used(decorated, X) == {5}
    assert orders_used(quake_jax.exp, X) == {3}


@pytest.mark.parametrize("order", [np.int32(3), np.uint8(3), np.array(3), jnp.int32(3)])
def test_any_integer_type_is_an_order(order):
    assert orders_used(lambda x: quake_jax.exp(x, order=order), X) == {3}


@pytest.mark.parametrize(
    ("value", "on"), [("1", True), ("true", True), ("True", True), ("", False), ("0", False)]
)
def test_disable_variable_values(monkeypatch, value, on):
    monkeypatch.setenv("QUAKE_JAX_DISABLE", value)
    assert switches.environment_switch("QUAKE_JAX_DISABLE") is on


def test_disable_variable_refuses_other_values(monkeypatch):
    monkeypatch.setenv("QUAKE_JAX_DISABLE", "yes please")
    with pytest.raises(ValueError, match="QUAKE_JAX_DISABLE must be 1 or true .* 'yes please'"):
        switches.environment_switch("QUAKE_JAX_DISABLE")


def test_disabled_by_environment(tmp_path):
    code = """
import jax, jax.numpy as jnp, quake_jax
def show(name, f):
    text = jax.jit(f).lower(jnp.ones((2, 4))).compile().as_text()
    print(name, 'custom_call_target="quake_jax' in text)
for name in dir(quake_jax):
    f = getattr(quake_jax, name)
    if "attention" in name or "default" in name or name in ("accelerate", "dense", "pack"):
        continue
    if "order" in getattr(f, "__annotations__", ()):
        try:
            show(name, f)
        except TypeError:  # a second operand is missing
            show(name, lambda x: f(x, x[0]))
show("attention", lambda x: quake_jax.dot_product_attention(x[None], x[None], x[None]))
show("packed", lambda x: quake_jax.packed_dot_product_attention(jnp.stack([x[None]] * 3, 1)))
packed = quake_jax.pack_weight(jnp.ones((4, 3)), "int8")
show("dense", lambda x: quake_jax.dense(x, packed))
product, w, x = (lambda w, x: x @ w), jnp.ones((4, 3)), jnp.ones((2, 4))
fast, weights = quake_jax.pack(product, w, x, weights="int8")
show("pack", lambda x: fast(weights, x))
show("layer_norm", quake_jax.layer_norm)
show("rms_norm", quake_jax.rms_norm)
show("accelerate", lambda x: quake_jax.accelerate(jax.nn.softmax)(jnp.tile(x, (32, 16))))
show("gelu erf", lambda x: quake_jax.gelu(x, False))
with quake_jax.default_order(1):
    show("context", quake_jax.exp)
show("argument", lambda x: quake_jax.exp(x, order=2))
try:
    quake_jax.exp(1.0, order=6)
except ValueError:
    print("a wrong order is still an error")
"""
    on = run_python(code, tmp_path, QUAKE_JAX_DISABLE="1").stdout
    off = run_python(code, tmp_path, QUAKE_JAX_DISABLE="0").stdout
    shown = {line.split()[0] for line in on.splitlines() if line.endswith(" False")}
    others = {"attention", "packed", "dense", "pack", "layer_norm", "rms_norm", "accelerate"}
    assert shown >= {f.public or f.name for f in FUNCTIONS} | others
    assert "True" not in on
    assert off == on.replace("False", "True")
    assert on.endswith("a wrong order is still an error\n")
