"""accelerate on models of other libraries, where these are installed: the `compat` extra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_accelerate import replacements

import quake_jax
from quake_jax._rewrite import engine


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    monkeypatch.setattr(engine, "RAISE_FAILURES", True)


def assert_same(fun, *args):
    actual, expected = (jax.jit(f)(*args) for f in (quake_jax.accelerate(fun), fun))
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3)


def test_equinox():
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MultiheadAttention(4, 32, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 16, 32))
    causal = jnp.tril(jnp.ones((16, 16), bool))

    def fun(model, x):
        return jax.vmap(lambda y: model(y, y, y, mask=causal))(x)

    assert replacements(fun, model, x) == ["dot_product_attention"]
    np.testing.assert_allclose(quake_jax.accelerate(fun)(model, x), fun(model, x), atol=1e-5)


def test_haiku():
    haiku = pytest.importorskip("haiku")

    def layer(x):
        init = haiku.initializers.VarianceScaling(1.0)
        y = haiku.MultiHeadAttention(4, 8, w_init=init)(x, x, x, mask=jnp.tril(jnp.ones((16, 16))))
        return jax.nn.gelu(haiku.Linear(128)(y))

    model = haiku.without_apply_rng(haiku.transform(layer))
    x = jax.random.normal(jax.random.key(1), (2, 16, 32))
    parameters = model.init(jax.random.key(0), x)
    assert replacements(model.apply, parameters, x) == ["bias_gelu", "dot_product_attention"]
    assert_same(model.apply, parameters, x)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_transformers(name):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("this version of transformers has no Flax models")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    ids, mask = jnp.arange(32).reshape(2, 16), jnp.ones((2, 16), jnp.int32).at[1, 9:].set(0)
    if name == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=100)
        model, inputs = transformers.FlaxGPT2LMHeadModel(config), (ids,)
        expected = ["bias_gelu"] * 2 + ["packed_dot_product_attention"] * 2
    elif name == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=64, vocab_size=100)
        model, inputs = transformers.FlaxBertModel(config), (ids, mask)
        expected = ["bias_gelu(approximate=False)"] * 2 + ["dot_product_attention"] * 2
    else:
        config = transformers.ViTConfig(**sizes, intermediate_size=64, image_size=64)
        model = transformers.FlaxViTModel(config)
        inputs = (jax.random.normal(jax.random.key(0), (2, 3, 64, 64)),)
        expected = ["bias_gelu(approximate=False)"] * 2 + ["dot_product_attention"] * 2

    def fun(parameters, *inputs):
        return model(*inputs, params=parameters)[0]

    assert replacements(fun, model.params, *inputs) == expected
    assert_same(fun, model.params, *inputs)
