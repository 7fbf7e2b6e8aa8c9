"""Models of other libraries on the kernels: Equinox, Haiku, the Flax models of transformers, and
one that qwix has quantised.

These libraries, but for qwix, come with the `compat` extra; a test whose library is missing is
skipped.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import exponentials, primitives

import quake_jax
import quake_jax.linen
from quake_jax._rewrite import engine

# Order 5 is within a few roundings of the exact functions, which two layers add up.
TOLERANCE = 3e-5
LENGTH, WIDTH, HEADS = 16, 32, 4
CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    """A pattern that fails on a program is an error here; users get the original program."""
    monkeypatch.setattr(engine, "RAISE_FAILURES", True)


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def check(counts: dict[str, int], expected: dict[str, int]) -> None:
    """Assert which kernels a program has, and that it computes no exponential beside them."""
    kernels = {name: n for name, n in counts.items() if name.startswith("quake_")}
    assert kernels == {f"quake_{name}": n for name, n in expected.items()}
    assert not exponentials(counts)


def check_accelerated(fun, kernels: dict[str, int], *args) -> jax.Array:
    """Assert the kernels and the results of accelerate(fun); return those of fun."""
    fast = quake_jax.accelerate(fun, order=5)
    check(primitives(fast, *args), kernels)
    expected = jax.jit(fun)(*args)
    np.testing.assert_allclose(jax.jit(fast)(*args), expected, TOLERANCE, TOLERANCE)
    return expected


@pytest.mark.parametrize("path, kernel", ((".*", "softmax"), ("mlp", "dot_product_attention")))
def test_qwix(path, kernel):
    """What qwix has quantised stays so; attention that it has not is fused."""
    qwix, nn = pytest.importorskip("qwix"), pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(HEADS)(x)
            return nn.gelu(nn.Dense(WIDTH, name="mlp")(x))

    rule = qwix.QuantizationRule(module_path=path, weight_qtype="int8", act_qtype="int8")
    model = qwix.quantize_model(Block(), qwix.PtqProvider([rule]))
    x = inputs(2, LENGTH, WIDTH)
    variables = model.init(jax.random.key(0), x)
    expected = str(jax.make_jaxpr(model.apply)(variables, x)).count(":i32")
    with quake_jax.linen.substitute(5):
        check(primitives(model.apply, variables, x), {kernel: 1, "bias_gelu_tanh": 1})
        assert str(jax.make_jaxpr(model.apply)(variables, x)).count(":i32") == expected


def test_equinox():
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0))
    parameters, rest = equinox.partition(model, equinox.is_array)
    x = inputs(2, LENGTH, WIDTH)

    def fun(parameters, x):
        model = equinox.combine(parameters, rest)
        return jax.vmap(lambda y: model(y, y, y, mask=CAUSAL))(x)

    check_accelerated(fun, {"dot_product_attention": 1}, parameters, x)

    def gradient(f):
        return jax.jit(jax.grad(lambda parameters: jnp.mean(f(parameters, x) ** 2)))(parameters)

    pairs = zip(
        *(jax.tree.leaves(gradient(f)) for f in (quake_jax.accelerate(fun), fun)), strict=True
    )
    for actual, expected in pairs:
        np.testing.assert_allclose(actual, expected, 1e-4, 1e-6)


def test_haiku():
    haiku = pytest.importorskip("haiku")

    def norm(x):
        return haiku.LayerNorm(-1, create_scale=True, create_offset=True)(x)

    def transformer(x):
        init = haiku.initializers.VarianceScaling(0.5)
        for _ in range(2):
            y = norm(x)
            attention = haiku.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)
            x = x + attention(y, y, y, mask=CAUSAL[None, None])
            x = x + haiku.Linear(WIDTH)(jax.nn.gelu(haiku.Linear(4 * WIDTH)(norm(x))))
        return norm(x)

    model = haiku.without_apply_rng(haiku.transform(transformer))
    x = inputs(2, LENGTH, WIDTH)
    parameters = model.init(jax.random.key(0), x)
    kernels = {"dot_product_attention": 2, "bias_gelu_tanh": 2}
    check_accelerated(model.apply, kernels, parameters, x)


def gpt2(transformers):
    config = transformers.GPT2Config(n_layer=2, n_embd=WIDTH, n_head=HEADS, vocab_size=100)
    ids = jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    kernels = {"dot_product_attention": 2, "bias_gelu_tanh": 2}
    return transformers.FlaxGPT2LMHeadModel(config), (ids,), kernels


SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
}


def bert(transformers):
    config = transformers.BertConfig(**SIZES, vocab_size=100)
    ids = jnp.arange(2 * LENGTH).reshape(2, LENGTH)
    padding = jnp.ones((2, LENGTH), jnp.int32).at[1, 9:].set(0)
    kernels = {"dot_product_attention": 2, "bias_gelu_erf": 2}
    model = transformers.FlaxBertModel(config, add_pooling_layer=False)
    return model, (ids, padding), kernels


def vit(transformers):
    config = transformers.ViTConfig(**SIZES, image_size=64)
    kernels = {"dot_product_attention": 2, "bias_gelu_erf": 2}
    model = transformers.FlaxViTModel(config, add_pooling_layer=False)
    return model, (inputs(2, 3, 64, 64),), kernels


@pytest.mark.parametrize("make", (gpt2, bert, vit))
def test_transformers(make):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "FlaxGPT2LMHeadModel"):
        pytest.skip("this version of transformers has no Flax models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, arguments, kernels = make(transformers)

    def fun(parameters, *arguments):
        return model(*arguments, params=parameters)[0]

    expected = check_accelerated(fun, kernels, model.params, *arguments)
    # Functions of their own, so that no cache of jit is asked about what it does not know.
    with quake_jax.linen.substitute(5):
        check(primitives(lambda *args: fun(*args), model.params, *arguments), kernels)
        actual = jax.jit(lambda *args: fun(*args))(model.params, *arguments)
    np.testing.assert_allclose(actual, expected, TOLERANCE, TOLERANCE)
