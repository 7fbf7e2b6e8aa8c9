"""`quake_jax.linen.substitute(kv_cache=…)`: Flax's attention modules decode from a `KVCache`."""

import functools
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import assert_close, key, primitives, variables_of
from support import on_device

import quake_jax
import quake_jax.linen
from quake_jax._attention.operands import decoded
from quake_jax.kv_cache import DTYPES, KVCache

nn = pytest.importorskip("flax.linen")

# Order 5 is within a few roundings of the exact functions; these models have up to three layers.
TOLERANCE = 2e-5
LENGTH, WIDTH, HEADS = 16, 32, 2
KERNEL = "quake_dot_product_attention"
Attention = functools.partial(nn.MultiHeadDotProductAttention, HEADS, decode=True)


def inputs(*batch: int) -> jax.Array:
    return on_device(np.random.default_rng(0).normal(size=(*batch, LENGTH, WIDTH)), "float32")


def steps(model, variables, x, *lengths, **keywords):
    """Outputs of calls for so many positions each, as one array, and the last cache."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, params, x):
        y, changed = model.apply(
            {"params": params, "cache": cache}, x, mutable=["cache"], **keywords
        )
        return changed["cache"], y

    outputs, begin = [], 0
    cache = jax.tree.map(jnp.copy, variables["cache"])
    for length in lengths:
        cache, y = step(cache, variables["params"], x[..., begin : begin + length, :])
        outputs.append(y)
        begin += length
    return jnp.concatenate(outputs, -2), cache


def both(model, x, *lengths, kv_cache="float32", **keywords):
    """(output, cache) of Flax, position by position, and with a cache in calls of `lengths`."""
    variables = variables_of(model.init, key(0), x)
    expected = steps(model, variables, x, *(1,) * sum(lengths), **keywords)
    with quake_jax.linen.substitute(5, kv_cache=kv_cache):
        # Outputs of the jitted function above, which is another one.
        made = jax.jit(model.init)(key(0), x)
        actual = steps(model, made | {"params": variables["params"]}, x, *lengths, **keywords)
    return actual, expected


def calls(model, x, length=1, kv_cache="float32", **options):
    """How often each primitive is in a step of the model."""
    with quake_jax.linen.substitute(5, kv_cache=kv_cache, **options):
        variables = variables_of(model.init, key(0), x)
        step = functools.partial(model.apply, mutable=["cache"])
        return primitives(step, variables, x[..., :length, :])


def stored(cache: KVCache, batch=(2,)):
    """Keys and values in float32, as the cache has them."""
    if cache.dtype == jnp.int8:
        found = decoded(cache.keys, cache.key_scales), decoded(cache.values, cache.value_scales)
    else:
        found = cache.keys.astype(jnp.float32), cache.values.astype(jnp.float32)
    return [x.reshape(*batch, *x.shape[1:]) for x in found]


# Flax gives a function the arguments that its signature names.
@functools.wraps(nn.dot_product_attention)
def twice(*args, **kwargs):
    return 2 * nn.dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("function", [nn.dot_product_attention, twice], ids=["fused", "twice"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_and_tokens(dtype, batch, function):
    model, x, lengths = Attention(attention_fn=function), inputs(*batch), (5, 1, 1, 4)
    count = sum(lengths)
    variables = variables_of(model.init, key(0), x)
    (y, caches), (flaxs, flax_cache) = both(model, x, *lengths, kv_cache=dtype)
    assert caches.keys() == {"kv_cache"}
    cache = caches["kv_cache"]
    assert (cache.max_length, cache.dtype, int(cache.length)) == (LENGTH, dtype, count)
    rows = [x[..., :count, :, :] for x in stored(cache, batch)]
    # What is stored is rounded once: tests/attention/test_kv_cache.py. Before that, it is a
    # product that may have been summed in another order.
    for row, name in zip(rows, ("cached_key", "cached_value"), strict=True):
        given = np.asarray(flax_cache[name][..., :count, :, :])
        if dtype == "int8":
            allowed = np.abs(given).max(-1, keepdims=True) / 127 * (0.5 + 2.0**-15)
        else:
            unit = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
            allowed = unit * np.abs(given) + 2.0**-25
        # A sum in another order may round to the neighbour of a tie.
        assert (np.abs(np.asarray(row) - given) <= allowed + TOLERANCE).all()

    # The output is that of Flax from what is stored.
    def of_stored(query, key, value, **_):
        return function(query, *rows, mask=causal)

    causal = jnp.tril(jnp.ones((count, count), bool))
    plain = nn.MultiHeadDotProductAttention(HEADS, attention_fn=of_stored)
    expected = plain.apply({"params": variables["params"]}, x[..., :count, :])
    assert_close(y, expected, TOLERANCE)
    if dtype == "float32":
        assert_close(y, flaxs, TOLERANCE)
    # Where `function` is twice's, the rewriter finds attention in it.
    assert calls(model, x, kv_cache=dtype)[KERNEL] == 1


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + Attention()(nn.LayerNorm()(x)), None


class Model(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "cache": 0}, "split_rngs": {"params": True}}
        if self.kind == "scan":
            return nn.scan(Layer, length=3, **axes)()(x, None)[0]
        if self.kind == "vmap":
            return nn.vmap(Layer, **axes)()(x)[0]
        return {"remat": nn.remat, "jit": nn.jit}[self.kind](Layer)()(x)[0]


class Own(nn.MultiHeadDotProductAttention):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x, x) if self.decode else x


MODELS = {
    **{kind: functools.partial(Model, kind) for kind in ("scan", "vmap", "remat", "jit")},
    "jitted attention": functools.partial(nn.jit(nn.MultiHeadAttention), HEADS, decode=True),
    "remat attention": functools.partial(nn.remat(nn.MultiHeadAttention), HEADS, decode=True),
    "own class": functools.partial(Own, HEADS, decode=True),
    "SelfAttention": functools.partial(nn.SelfAttention, HEADS, decode=True),
    "normalize_qk": functools.partial(Attention, normalize_qk=True, qkv_features=64),
    "MultiHeadAttention of quake_jax": functools.partial(
        quake_jax.linen.MultiHeadAttention, HEADS, decode=True
    ),
    "decoder of quake_jax": functools.partial(
        quake_jax.linen.TransformerDecoderBlock, HEADS, 64, decode=True
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
def test_models(name):
    model, x = MODELS[name](), inputs(2)
    (y, cache), (expected, _) = both(model, x, 5, 1, 1)
    assert_close(y, expected, TOLERANCE)
    assert calls(model, x)[KERNEL] == 1
    found = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, KVCache))
    assert [type(x) for x in found] == [KVCache]


def test_a_mask_is_combined():
    model, x = Attention(), inputs(2)
    mask = on_device(np.random.default_rng(1).random((2, 1, 1, LENGTH)) > 0.5)
    mask = mask.at[..., 0].set(True)  # so that every query sees a key
    (y, _), (expected, _) = both(model, x, 4, 1, 1, mask=mask)
    assert_close(y, expected, TOLERANCE)
    (other, _), _ = both(model, x, 4, 1, 1)
    assert float(jnp.abs(other - y).max()) > 0.01


def test_several_batch_axes_with_a_mask():
    model, x = Attention(), inputs(2, 3)
    mask = on_device(np.random.default_rng(1).random((2, 1, HEADS, 1, LENGTH)) > 0.5)
    mask = jnp.broadcast_to(mask.at[..., 0].set(True), (2, 3, HEADS, 1, LENGTH))
    (y, _), (expected, _) = both(model, x, 4, 1, 1, mask=mask)
    assert_close(y, expected, TOLERANCE)


@pytest.mark.parametrize("force", [False, True])
def test_computing_in_bfloat16(force):
    model, x = Attention(dtype=jnp.bfloat16, force_fp32_for_softmax=force), inputs(2)
    (y, cache), (expected, _) = both(model, x, 5, 1, kv_cache="bfloat16")
    assert y.dtype == expected.dtype and cache["kv_cache"].dtype == jnp.bfloat16
    # Flax rounds queries, logits (not beyond 4 here), weights and the output: a few units.
    assert_close(y.astype("float32"), expected.astype("float32"), 0.05)
    assert calls(model, x)[KERNEL] == 1


UNFUSED = {
    "keyword": {"attention_fn": functools.partial(nn.dot_product_attention, precision="highest")},
    "einsums": {
        "qk_attn_weights_einsum_cls": lambda: lambda *args: 2 * jnp.einsum(*args),
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    },
}


@pytest.mark.parametrize("name", UNFUSED)
def test_what_is_not_fused_means_the_same(name):
    model, x = Attention(**UNFUSED[name]), inputs(2)
    (y, _), (expected, _) = both(model, x, 5, 1, 1)
    assert_close(y, expected, TOLERANCE)


@pytest.mark.parametrize(
    "options", [{"only": "gelu"}, {"softmax": "i_softmax"}, {"order": "exact"}], ids=str
)
def test_attention_that_is_to_stay(options):
    model, x = Attention(), inputs(2)
    variables = variables_of(model.init, key(0), x)
    with quake_jax.linen.substitute(**options):
        expected, _ = steps(model, variables, x, 1, 1, 1)
    with quake_jax.linen.substitute(**options, kv_cache="float32"):
        made = model.init(key(0), x)
        y, cache = steps(model, made | {"params": variables["params"]}, x, 2, 1)
        step = functools.partial(model.apply, mutable=["cache"])
        counts = primitives(step, made, x[:, :1])
    assert int(cache["kv_cache"].length) == 3 and KERNEL not in counts
    assert_close(y, expected, TOLERANCE)


@pytest.mark.parametrize("broadcast", [False, True])
def test_dropout(broadcast):
    model = Attention(dropout_rate=0.3, broadcast_dropout=broadcast, deterministic=False)
    x = inputs(2)
    variables = variables_of(model.init, {"params": key(0), "dropout": key(1)}, x)
    expected, _ = steps(model, variables, x, 1, 1, 1, rngs={"dropout": key(2)})
    with quake_jax.linen.substitute(5, kv_cache="float32"):
        made = model.init({"params": key(0), "dropout": key(1)}, x)
        made |= {"params": variables["params"]}
        y, _ = steps(model, made, x, 1, 1, 1, rngs={"dropout": key(2)})
    assert_close(y, expected, TOLERANCE)


def test_sown_weights():
    model, x = Attention(), inputs(2)
    variables = variables_of(model.init, key(0), x)

    def sown(variables):
        changed = variables["cache"]
        for t in range(3):
            y, changed = model.apply(
                variables | {"cache": changed},
                x[:, t : t + 1],
                sow_weights=True,
                mutable=["cache", "intermediates"],
            )
            weights, changed = changed["intermediates"], changed["cache"]
        return y, weights

    expected = sown(variables)
    with quake_jax.linen.substitute(5, kv_cache="float32"):
        assert_close(sown(model.init(key(0), x) | {"params": variables["params"]}), expected, 2e-5)


@pytest.mark.parametrize("name", ["fused", "twice"])
def test_too_many_positions_give_nan(name):
    model = Attention() if name == "fused" else Attention(attention_fn=twice)
    x = inputs(2)
    with quake_jax.linen.substitute(5, kv_cache="bfloat16"):
        y, cache = steps(model, model.init(key(0), x[:, :4]), x, 3, 1, 1)
        with pytest.raises(ValueError, match="kv_cache.append: key must be of at most 4 positions"):
            steps(model, model.init(key(0), x[:, :4]), x, 5)
    assert np.isfinite(y[:, :4]).all() and np.isnan(y[:, 4:]).all()


def test_a_module_that_cannot_be_traced():
    class Asking(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Attention()(x) if float(x[0, 0, 0]) > -100 else x

    model, x = Asking(), inputs(2)
    variables = variables_of(Attention().init, key(0), x)
    expected, _ = steps(Attention(), variables, x, 1, 1)
    params = {"MultiHeadDotProductAttention_0": variables["params"]}
    with quake_jax.linen.substitute(5, kv_cache="float32"), pytest.warns(match="cannot be traced"):
        cache = model.init(key(0), x)["cache"]
        y, _ = model.apply({"params": params, "cache": cache}, x[:, :2], mutable=["cache"])
    assert_close(y, expected, TOLERANCE)


def test_the_inner_interceptor_and_this_thread_count():
    model, x = Attention(), inputs(2)
    found = {}

    def caches(name):
        found[name] = jax.tree.map(lambda x: x.dtype.name, jax.eval_shape(model.init, key(0), x))

    with quake_jax.linen.substitute(kv_cache="int8"):
        with quake_jax.linen.substitute(kv_cache="bfloat16"):
            caches("inner")
        with quake_jax.linen.substitute():
            caches("none")
        caches("outer")
        thread = threading.Thread(target=caches, args=("thread",))
        thread.start()
        thread.join()
    assert found["inner"]["cache"]["kv_cache"].keys == "bfloat16"
    assert found["outer"]["cache"]["kv_cache"].keys == "int8"
    for name in ("none", "thread"):
        assert found[name]["cache"].keys() == {"cached_key", "cached_value", "cache_index"}


def test_what_was_compiled_belongs_to_the_dtype():
    model, x = Attention(), inputs(2)
    init = jax.jit(model.init)
    for dtype in ("int8", "float16", None):
        with quake_jax.linen.substitute(kv_cache=dtype):
            cache = init(key(0), x)["cache"]
        assert ("kv_cache" in cache) is (dtype is not None)
        assert dtype is None or cache["kv_cache"].dtype == dtype
    one, other = (quake_jax.linen.interceptor(kv_cache=dtype) for dtype in ("int8", "float16"))
    assert one != other and pickle.loads(pickle.dumps(one)) == one


def test_caches_of_another_kind():
    model, x = Attention(), inputs(2)
    flaxs = model.init(key(0), x)

    def step(variables, kv_cache):
        with quake_jax.linen.substitute(kv_cache=kv_cache):
            model.apply(variables, x[:, :1], mutable=["cache"])

    with quake_jax.linen.substitute(kv_cache="int8"):
        made = model.init(key(0), x)
    name = r"quake_jax.linen.interceptor: kv_cache must be "
    with pytest.raises(ValueError, match=name + "None; got 'int8', where Flax's own cache"):
        step(flaxs, "int8")
    with pytest.raises(ValueError, match=name + "the dtype of the cache that the module has"):
        step(made, None)
    with pytest.raises(ValueError, match=name + "'int8', the dtype of the cache that has been"):
        step(made, "bfloat16")
    with pytest.raises(TypeError, match="kv_cache.append: cache must be a KVCache; got dict"):
        step(made | {"cache": {"kv_cache": {"keys": x}}}, "int8")


def test_what_cannot_be_cached():
    x = inputs(2)

    def step(*args, attention, **keywords):
        with quake_jax.linen.substitute(kv_cache="int8"):
            variables = attention.init(key(0), x)
            attention.apply(variables, *args, **keywords, mutable=["cache"])

    with pytest.raises(ValueError, match="inputs_k must have the length of inputs_q, 1, where"):
        step(x[:, :1], x[:, :2], attention=Attention())
    with pytest.raises(ValueError, match=r"key must be of shape \(2, T, 2, 16\); got \(1, 1"):
        step(x[:1, :1], attention=Attention())
    with pytest.raises(ValueError, match="mask must broadcast to .*; got shapes mask"):
        step(x[:, :1], attention=Attention(), mask=jnp.ones((2, 1, 1, LENGTH - 1), bool))
    maskless = Attention(attention_fn=lambda query, key, value: query)
    with pytest.raises(ValueError, match="attention_fn must be a function with an argument mask"):
        step(x[:, :1], attention=maskless)
