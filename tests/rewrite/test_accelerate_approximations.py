"""Published approximations in the place of the kernels: accelerate(f, softmax=…, gelu=…)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import primitives, variables_of
from test_accelerate import replacements

import quake_jax
import quake_jax.linen
from quake_jax import approximations
from quake_jax._core import switches
from quake_jax._rewrite import engine

nn = pytest.importorskip("flax.linen")


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    monkeypatch.setattr(engine, "RAISE_FAILURES", True)


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    "kind, name",
    [(a.kind, a.name) for k in ("softmax", "gelu") for a in approximations.registry(k)],
)
def test_every_registered_one(kind, name):
    x = inputs(8, 16)
    exact = {"softmax": jax.nn.softmax, "gelu": jax.nn.gelu}[kind]

    def fun(x):
        return 2 * exact(x)

    fast = quake_jax.accelerate(fun, order="exact", **{kind: name})
    assert replacements(fast, x) == [f"approximations.{name}"]
    expected = 2 * approximations.find(kind, name).function(x)
    np.testing.assert_array_equal(fast(x), expected)
    # The derivative is that of the exact function.
    np.testing.assert_allclose(
        jax.grad(lambda x: fast(x)[0, 0])(x), jax.grad(lambda x: fun(x)[0, 0])(x), 0.5, 0.5
    )


def attention(q, k, v):
    mask = jnp.tril(jnp.ones((q.shape[-3], k.shape[-3]), bool))
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def test_softmax_of_attention():
    q, k, v = inputs(3, 2, 16, 4, 8)
    fast = quake_jax.accelerate(attention, order="exact", softmax="i_softmax")
    assert replacements(fast, q, k, v) == ["approximations.i_softmax"]
    actual, expected = fast(q, k, v), attention(q, k, v)
    # Weights that err by 0.0007 in all (docstring of i_softmax), of values of up to 4.
    np.testing.assert_allclose(actual, expected, 0, 1e-2)
    assert np.any(actual != expected)


def test_what_is_not_named_has_kernels_or_stays():
    q, k, v = inputs(3, 2, 16, 4, 8)

    def layer(q, k, v):
        return jax.nn.gelu(attention(q, k, v))

    fast = quake_jax.accelerate(layer, gelu="shiftgelu")
    assert replacements(fast, q, k, v) == ["approximations.shiftgelu", "dot_product_attention"]
    fast = quake_jax.accelerate(layer, softmax="e2softmax", only={"attention"})
    assert replacements(fast, q, k, v) == ["approximations.e2softmax"]


@pytest.mark.parametrize("jit", (jax.jit, jax.checkpoint, lambda f: f))
def test_in_a_program_inside(jit):
    """Newer JAX lowers jnp.ldexp, which shiftgelu calls, only in programs that say they have it."""
    x = inputs(16, 128)
    fast = quake_jax.accelerate(jit(jax.nn.gelu), gelu="shiftgelu")
    assert replacements(fast, x) == ["approximations.shiftgelu"]
    np.testing.assert_array_equal(jax.jit(fast)(x), jax.jit(quake_jax.approximations.shiftgelu)(x))


def test_the_switch_turns_them_off(monkeypatch):
    monkeypatch.setattr(switches, "DISABLED", True)
    x = inputs(16, 128)
    assert not replacements(quake_jax.accelerate(jax.nn.gelu, gelu="i_gelu"), x)


def test_a_linen_model():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.gelu(nn.MultiHeadDotProductAttention(2)(x))

    model, x = Layer(), inputs(2, 16, 32)
    variables = variables_of(model.init, jax.random.key(0), x)
    expected = model.apply(variables, x)
    with quake_jax.linen.substitute("exact", softmax="e2softmax", gelu="i_gelu"):
        counts = primitives(lambda *args: model.apply(*args), variables, x)
        actual = jax.jit(model.apply)(variables, x)
    assert not any(name.startswith("quake_") for name in counts)
    np.testing.assert_allclose(actual, expected, 0, 0.3)
    assert np.abs(actual - expected).max() > 1e-3


@pytest.mark.parametrize("function", (quake_jax.linen.interceptor, quake_jax.linen.substitute))
def test_errors(function):
    for keywords, error in (({"softmax": "sofmax"}, ValueError), ({"gelu": 3}, TypeError)):
        (kind,) = keywords
        with pytest.raises(error, match=f"{kind} must be None or the name of an approximation"):
            function(**keywords)
        with pytest.raises(error, match=rf"quake_jax.accelerate: {kind} must be None"):
            quake_jax.accelerate(jax.nn.softmax, **keywords)
