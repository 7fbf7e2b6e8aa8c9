"""The modules of `quake_jax.linen` against the same layers written in Flax: their parameters and
caches are each other's, and so are their results.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import (
    assert_close,
    assert_identical,
    exponentials,
    key,
    primitives,
    variables_of,
)
from support import on_device

import quake_jax
import quake_jax.linen
from quake_jax._core import switches

nn = pytest.importorskip("flax.linen")

TOLERANCE = 2e-5  # order 5, two layers
BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 2, 6, 16, 2, 32
RATE = 0.3


def inputs(*shape: int) -> jax.Array:
    shape = shape or (BATCH, LENGTH, WIDTH)
    return on_device(np.random.default_rng(0).normal(size=shape), "float32")


# The blocks in Flax: quake_jax's docstrings promise the names that these get.


class MlpBlock(nn.Module):
    activation: object = nn.gelu
    rate: float = 0.0
    dense: dict = dataclasses.field(default_factory=dict)

    @nn.compact
    def __call__(self, x, deterministic=True):
        y = self.activation(nn.Dense(HIDDEN, **self.dense)(x))
        y = nn.Dropout(self.rate)(y, deterministic=deterministic)
        y = nn.Dense(x.shape[-1], **self.dense)(y)
        return nn.Dropout(self.rate)(y, deterministic=deterministic)


class Block(nn.Module):
    rate: float = 0.0
    attention_rate: float = 0.0
    dense: dict = dataclasses.field(default_factory=dict)
    decode: bool = False

    @nn.compact
    def __call__(self, x, mask=None, deterministic=True):
        y = nn.LayerNorm(dtype=self.dense.get("dtype"))(x)
        y = nn.MultiHeadDotProductAttention(
            HEADS, dropout_rate=self.attention_rate, decode=self.decode, **self.dense
        )(y, mask=mask, deterministic=deterministic)
        x = x + nn.Dropout(self.rate)(y, deterministic=deterministic)
        y = nn.LayerNorm(dtype=self.dense.get("dtype"))(x)
        return x + MlpBlock(rate=self.rate, dense=self.dense)(y, deterministic)


def mlp(**keywords):
    return quake_jax.linen.MlpBlock(HIDDEN, order=5, **keywords)


def encoder(**keywords):
    return quake_jax.linen.TransformerEncoderBlock(HEADS, HIDDEN, order=5, **keywords)


def decoder(**keywords):
    return quake_jax.linen.TransformerDecoderBlock(HEADS, HIDDEN, order=5, **keywords)


def exchange(quake, flax, *args, tolerance=TOLERANCE, rngs=None, **keywords):
    """Check that variables have the same names, shapes and dtypes, and then give the same result.

    Variables with one tree are each other's; their initial values have a test of their own.
    """
    rngs_of_init = {"params": key(0), **(rngs or {})}
    shapes, flax_shapes = (
        jax.eval_shape(functools.partial(m.init, **keywords), rngs_of_init, *args)
        for m in (quake, flax)
    )
    assert shapes == flax_shapes
    variables = variables_of(functools.partial(flax.init, **keywords), rngs_of_init, *args)
    results = [
        jax.jit(functools.partial(m.apply, **keywords))(variables, *args, rngs=rngs)
        for m in (quake, flax)
    ]
    assert_close(*results, tolerance)
    return variables


OPTIONS = {
    "plain": {},
    "no bias": {"use_bias": False},
    "bfloat16": {"dtype": jnp.bfloat16},
    "float16 parameters": {"param_dtype": jnp.float16},
}


@pytest.mark.parametrize("options", ("no bias", "bfloat16", "float16 parameters"))
def test_mlp(options):
    options = OPTIONS[options]
    # Flax rounds the sum and the activation to bfloat16, the kernel rounds once.
    tolerance = 4e-2 if "dtype" in options else TOLERANCE
    exchange(mlp(**options), MlpBlock(dense=options), inputs(), tolerance=tolerance)


def test_initial_parameters_are_the_same():
    options = {
        "kernel_init": nn.initializers.xavier_uniform(),
        "bias_init": nn.initializers.normal(1e-2),
    }
    block, flax = encoder(**options), Block(dense=options)
    assert_identical(*(jax.jit(m.init)(key(0), inputs()) for m in (block, flax)))


@pytest.mark.parametrize(
    "activation, kernel",
    (
        (nn.gelu, "bias_gelu_tanh"),
        (functools.partial(nn.gelu, approximate=False), "bias_gelu_erf"),
        (nn.silu, "bias_silu"),
        (nn.sigmoid, "sigmoid"),
        (nn.relu, None),
    ),
)
def test_activations_of_mlp(activation, kernel):
    layer = mlp(activation=activation)
    variables = exchange(layer, MlpBlock(activation), inputs())
    counts = primitives(layer.apply, variables, inputs())
    kernels = [name for name in counts if name.startswith("quake_")]
    assert kernels == ([f"quake_{kernel}"] if kernel else []) and not exponentials(counts)


def test_dropout_drops_the_same():
    x, rngs = inputs(), {"dropout": key(1)}
    drop = {"deterministic": False, "rngs": rngs}
    exchange(mlp(dropout_rate=RATE), MlpBlock(rate=RATE), x, **drop)
    rates = {"dropout_rate": RATE, "attention_dropout_rate": 0.5}
    exchange(encoder(**rates), Block(RATE, 0.5), x, **drop)
    # As a field, and off.
    exchange(mlp(dropout_rate=RATE, deterministic=True), MlpBlock(rate=RATE), x)
    with pytest.raises(ValueError, match="deterministic"):
        encoder(attention_dropout_rate=RATE).init(key(0), x)


@pytest.mark.parametrize("options", ("plain", "no bias", "bfloat16"))
def test_encoder_block(options):
    options = OPTIONS[options]
    tolerance = 4e-2 if "dtype" in options else TOLERANCE
    exchange(encoder(**options), Block(dense=options), inputs(), tolerance=tolerance)


def test_encoder_block_runs_on_the_kernels():
    x = inputs()
    padding = nn.make_attention_mask(jnp.ones((BATCH, LENGTH)), jnp.arange(LENGTH)[None] < 4)
    variables = exchange(encoder(), Block(), x, mask=padding)
    counts = primitives(encoder().apply, variables, x)
    assert counts["quake_dot_product_attention"] == counts["quake_bias_gelu_tanh"] == 1
    assert not exponentials(counts)


@pytest.mark.parametrize("mask", (None, "padding"))
def test_decoder_block_is_causal(mask):
    x = inputs()
    causal = nn.make_causal_mask(x[..., 0])
    if mask is not None:
        mask = nn.make_attention_mask(jnp.ones((BATCH, LENGTH)), jnp.arange(LENGTH)[None] < 4)
    variables = variables_of(decoder().init, key(0), x)
    expected = jax.jit(Block().apply)(variables, x, nn.combine_masks(mask, causal))
    assert_close(jax.jit(decoder().apply)(variables, x, mask), expected, TOLERANCE)
    exact = quake_jax.linen.TransformerDecoderBlock(HEADS, HIDDEN, order="exact")
    assert_close(jax.jit(exact.apply)(variables, x, mask), expected, 1e-6)


def test_decoder_block_decodes():
    x = inputs()
    quake, flax = decoder(decode=True), Block(decode=True)
    variables = variables_of(quake.init, key(0), x)
    assert jax.eval_shape(quake.init, key(0), x) == jax.eval_shape(flax.init, key(0), x)
    parameters, caches = {"params": variables["params"]}, [variables["cache"]] * 2
    steps = [jax.jit(functools.partial(m.apply, mutable=["cache"])) for m in (quake, flax)]
    outputs = []
    for t in range(LENGTH):
        results = [
            step(parameters | {"cache": cache}, x[:, t : t + 1])
            for step, cache in zip(steps, caches, strict=True)
        ]
        assert_close(*results, TOLERANCE)
        outputs.append(results[0][0])
        caches = [changed["cache"] for _, changed in results]
    whole = jax.jit(decoder().apply)(parameters, x)
    assert_close(jnp.concatenate(outputs, 1), whole, TOLERANCE)
    # The call that makes the cache is causal too.
    assert_close(steps[0](parameters, x)[0], whole, TOLERANCE)


@pytest.mark.parametrize(
    "name", ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention")
)
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
def test_attention_modules(name):
    quake, flax = getattr(quake_jax.linen, name), getattr(nn, name)
    assert issubclass(quake, flax) and quake.__name__ == name
    assert [f.name for f in dataclasses.fields(quake)] == [f.name for f in dataclasses.fields(flax)]
    x = inputs()
    variables = exchange(quake(HEADS), flax(HEADS), x, tolerance=1e-4)
    assert primitives(quake(HEADS).apply, variables, x)["quake_dot_product_attention"] == 1

    class Parent(nn.Module):
        layer: type

        @nn.compact
        def __call__(self, x):
            return self.layer(HEADS)(x)  # named by its class

    exchange(Parent(quake), Parent(flax), x, tolerance=1e-4)


def test_blocks_under_scan_and_remat():
    class Body(nn.Module):
        make: object

        @nn.compact
        def __call__(self, x):
            return nn.remat(self.make)(name="block")(x), None

    def stack(make):
        scan = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(make)

    class Encoder(quake_jax.linen.TransformerEncoderBlock):
        num_heads: int = HEADS
        mlp_dim: int = HIDDEN
        order: int = 5

    exchange(stack(Encoder), stack(Block), inputs(), tolerance=1e-4)


def test_gradients():
    x = inputs()
    variables = variables_of(encoder().init, key(0), x)
    gradients = [
        jax.jit(jax.grad(lambda v, m=m: jnp.mean(m.apply(v, x) ** 2)))(variables)
        for m in (encoder(), Block())
    ]
    assert_close(*gradients, 1e-4)


def test_order(monkeypatch):
    x = inputs()
    variables = variables_of(mlp().init, key(0), x)

    def apply(order):
        return quake_jax.linen.MlpBlock(HIDDEN, order=order).apply(variables, x)

    exact = MlpBlock().apply(variables, x)
    errors = [float(jnp.abs(apply(order) - exact).max()) for order in (1, 3, 5)]
    assert errors[0] > 10 * errors[1] > 0 and errors[2] < TOLERANCE
    with quake_jax.default_order(1):
        assert_identical(apply(None), apply(1))
    assert_close(apply("exact"), exact, 1e-6)
    monkeypatch.setattr(switches, "DISABLED", True)
    assert_identical(apply(1), apply("exact"))


def test_the_interceptor_leaves_them_alone():
    block, x = encoder(), inputs(1, 64, WIDTH)  # large enough for activations to be replaced
    variables = block.init(key(0), x)
    expected = jax.jit(block.apply)(variables, x)
    with quake_jax.linen.substitute(1):
        assert_identical(jax.jit(block.apply)(variables, x), expected)


def test_unknown_names():
    with pytest.raises(AttributeError, match="has no attribute 'MlpBlok'"):
        quake_jax.linen.MlpBlok  # noqa: B018
    assert set(quake_jax.linen.__all__) <= set(dir(quake_jax.linen))
