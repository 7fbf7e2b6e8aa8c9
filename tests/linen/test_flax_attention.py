"""`quake_jax.linen.attention_fn` and `quake_jax.nnx.attention_fn` against Flax's own attention."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import changed_einsum, primitives, rounding
from support import on_device, run_python

import quake_jax
import quake_jax.linen
import quake_jax.nnx
from quake_jax._core import config, switches
from quake_jax._flax import attention as _attention_fn

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

# Of results of size one; order 5 is within a few roundings of the exact exponential.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}
BATCHES = ((), (2,), (2, 3), (1, 2, 1, 2))
HEADS, QUERIES, KEYS, DEPTH = 4, 5, 7, 8


@dataclasses.dataclass(frozen=True)
class Library:
    """One of Flax's two libraries: our function, and the one that it replaces."""

    name: str
    quake: Callable
    flax: Callable

    @property
    def accurate(self) -> Callable:
        return functools.partial(self.quake, order=5)


LINEN = Library("linen", quake_jax.linen.attention_fn, nn.dot_product_attention)
NNX = Library("nnx", quake_jax.nnx.attention_fn, nnx.dot_product_attention)
both = pytest.mark.parametrize("library", (LINEN, NNX), ids=lambda library: library.name)


def normal(seed: int, *shape: int, dtype="float32") -> jax.Array:
    return on_device(np.random.default_rng(seed).normal(size=shape), dtype)


def arrays(batch=(2,), dtype="float32", queries=QUERIES, keys=KEYS, key_heads=HEADS):
    return (
        normal(0, *batch, queries, HEADS, DEPTH, dtype=dtype),
        normal(1, *batch, keys, key_heads, DEPTH, dtype=dtype),
        normal(2, *batch, keys, key_heads, DEPTH, dtype=dtype),
    )


def random_mask(*shape: int) -> jax.Array:
    """A mask without rows that are masked as a whole, if the last axis has all keys."""
    mask = np.random.default_rng(3).uniform(size=shape) < 0.6
    mask[..., 0] = True
    return jnp.asarray(mask)


def assert_close(actual, expected, tolerance: float = TOLERANCE["float32"]) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float64),
        np.asarray(expected, np.float64),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.fixture
def fused_calls(monkeypatch) -> list:
    """One entry for each call of the fused attention."""
    calls = []

    def recorded(*args, **keywords):
        calls.append(keywords)
        return fused(*args, **keywords)

    fused = _attention_fn.dot_product_attention
    monkeypatch.setattr(_attention_fn, "dot_product_attention", recorded)
    return calls


@both
def test_signature_is_flax_s_and_order(library):
    ours = inspect.signature(library.quake).parameters
    assert ours["order"].kind is inspect.Parameter.KEYWORD_ONLY
    flax = inspect.signature(library.flax).parameters
    # Positional arguments, too, mean the same; Flax may get more, at the end.
    assert list(flax)[: len(ours) - 1] == [name for name in ours if name != "order"][: len(flax)]
    for name in set(flax) & set(ours) - {"promote_dtype"}:
        assert ours[name].default == flax[name].default, name


def test_importing_the_modules_loads_no_flax(tmp_path):
    code = """
import sys
import quake_jax.linen, quake_jax.nnx
print("flax" in sys.modules)
"""
    assert run_python(code, tmp_path).stdout == "False\n"


@both
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_any_number_of_batch_axes(library, batch, fused_calls):
    operands = arrays(batch)
    assert_close(library.accurate(*operands), library.flax(*operands))
    assert len(fused_calls) == 1


@both
@pytest.mark.parametrize("batch", BATCHES[:3], ids=str)
@pytest.mark.parametrize("shared", ("nothing", "batch", "heads", "queries", "all"))
def test_bias_and_mask_broadcast(library, batch, shared, fused_calls):
    shape = {
        "nothing": (*batch, HEADS, QUERIES, KEYS),
        "batch": (*(1 for _ in batch), HEADS, QUERIES, KEYS),
        "heads": (*batch, 1, QUERIES, KEYS),
        "queries": (*batch, 1, 1, KEYS),
        "all": (KEYS,),
    }[shared]
    operands, bias, mask = arrays(batch), normal(4, *shape), random_mask(*shape)
    weights_shape = (*batch, HEADS, QUERIES, KEYS)
    # Flax's own masks are float32 by default.
    for b, m in ((bias, mask), (None, mask.astype(jnp.float32))):
        # Linen broadcasts both in all cases, NNX only some: so NNX too is compared with Linen.
        expected = nn.dot_product_attention(*operands, b, m)
        assert_close(library.accurate(*operands, b, m), expected)
    assert len(fused_calls) == 2
    assert jnp.broadcast_shapes(shape, weights_shape) == weights_shape


@both
def test_leading_axes_that_only_some_of_the_mask_has(library):
    operands, mask = arrays((2, 3)), random_mask(2, 1, 1, QUERIES, KEYS)
    assert_close(library.accurate(*operands, mask=mask), LINEN.flax(*operands, mask=mask))


@both
def test_a_mask_may_add_axes_to_the_result(library, fused_calls):
    operands, mask = arrays((1,)), random_mask(3, 1, QUERIES, KEYS)
    y = library.accurate(*operands, mask=mask)
    assert y.shape == (3, QUERIES, HEADS, DEPTH) and not fused_calls
    assert_close(y, nn.dot_product_attention(*operands, mask=mask))


def test_a_batch_axis_of_one_beside_unbatched_arrays():
    operands, mask = arrays(()), random_mask(1, 1, QUERIES, KEYS)
    for library in (LINEN, NNX):
        expected = library.flax(*operands, mask=mask)
        assert_close(library.accurate(*operands, mask=mask), expected)


@both
def test_rows_masked_as_a_whole_give_the_mean_of_the_values(library):
    operands = arrays()
    mask = random_mask(2, HEADS, QUERIES, KEYS).at[0, :, 1].set(False)
    for extra in ({}, {"dropout_rate": 1e-9, "dropout_rng": jax.random.key(0)}):
        y = library.accurate(*operands, mask=mask, **extra)
        assert_close(y, library.flax(*operands, mask=mask, **extra))
        assert_close(y[0, 1], operands[2][0].mean(0))


@both
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_half_precision(library, dtype):
    operands, mask = arrays(dtype=dtype), random_mask(2, 1, QUERIES, KEYS)
    expected = library.flax(*operands, mask=mask)
    assert_close(library.accurate(*operands, mask=mask), expected, TOLERANCE[dtype])


@both
def test_dtypes_are_promoted_as_in_flax(library):
    q, k, v = arrays()
    mixed = q.astype(jnp.bfloat16), k, v.astype(jnp.float16)
    assert_close(library.accurate(*mixed), library.flax(*mixed))
    for dtype in ("bfloat16", "float16"):
        expected = library.flax(q, k, v, dtype=dtype)
        assert expected.dtype == dtype
        assert_close(library.accurate(q, k, v, dtype=dtype), expected, TOLERANCE[dtype])
    with pytest.raises(ValueError, match="inexact"):
        library.quake(q, k, v, dtype=jnp.int32)


@both
def test_other_dtypes_get_flax_s_function(library, fused_calls):
    with jax.enable_x64(True):
        operands = arrays(dtype="float64")
        y = library.quake(*operands, order=1)
        np.testing.assert_array_equal(y, library.flax(*operands))
        assert y.dtype == jnp.float64 and not fused_calls


def test_linen_softmax_in_float32():
    operands, mask = arrays(dtype="bfloat16"), random_mask(2, 1, QUERIES, KEYS)
    keywords = {"mask": mask, "force_fp32_for_softmax": True}
    dropout = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    for extra in ({}, dropout):
        expected = LINEN.flax(*operands, **keywords, **extra)
        assert expected.dtype == jnp.float32
        y = LINEN.accurate(*operands, **keywords, **extra)
        assert_close(y, expected, TOLERANCE["bfloat16"])


@both
@pytest.mark.parametrize("broadcast", (True, False))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_dropout_drops_the_same_weights(library, broadcast, dtype, fused_calls):
    operands, mask = arrays((2, 3), dtype=dtype), random_mask(2, 3, 1, QUERIES, KEYS)
    keywords = {
        "mask": mask,
        "dropout_rng": jax.random.key(7),
        "dropout_rate": 0.4,
        "broadcast_dropout": broadcast,
    }
    expected = library.flax(*operands, **keywords)
    assert_close(library.accurate(*operands, **keywords), expected, 2 * TOLERANCE[dtype])
    assert not fused_calls
    # Deterministic calls need no key and no weights.
    keywords |= {"deterministic": True, "dropout_rng": None}
    expected = library.flax(*operands, **keywords)
    assert_close(library.accurate(*operands, **keywords), expected, TOLERANCE[dtype])
    assert len(fused_calls) == 1


def test_nnx_grouped_heads_and_causal_mask(fused_calls):
    operands = arrays(key_heads=2)
    mask = random_mask(2, HEADS, QUERIES, KEYS)
    dropout = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(1)}
    for mask_ in (None, mask):
        for extra in ({}, dropout):
            keywords = {"mask": mask_, "is_causal": True, **extra}
            assert_close(NNX.accurate(*operands, **keywords), NNX.flax(*operands, **keywords))
    assert [call["is_causal"] for call in fused_calls] == [True, True]


def test_linen_values_of_another_depth():
    q, k, _ = arrays()
    v = normal(2, 2, KEYS, HEADS, 2 * DEPTH)
    assert_close(LINEN.accurate(q, k, v), LINEN.flax(q, k, v))


def test_linen_custom_einsums_and_dot_general(fused_calls):
    operands, used = arrays(), []

    def einsum(*args, **keywords):
        used.append(args[0])
        return jnp.einsum(*args, **keywords)

    def dot_general(*args, **keywords):
        used.append("dot_general")
        return jax.lax.dot_general(*args, **keywords)

    expected = LINEN.flax(*operands)
    both_einsums = {"qk_attn_weights_einsum": einsum, "attn_weights_value_einsum": einsum}
    assert_close(LINEN.accurate(*operands, **both_einsums), expected)
    assert used == ["...qhd,...khd->...hqk", "...hqk,...khd->...qhd"]
    assert_close(LINEN.accurate(*operands, einsum_dot_general=dot_general), expected)
    assert used[2:] == ["dot_general"] * 2 and not fused_calls

    with pytest.raises(ValueError, match="attn_weights_value_einsum must be given together"):
        LINEN.quake(*operands, qk_attn_weights_einsum=einsum)
    with pytest.raises(ValueError, match="precision or einsum_dot_general"):
        LINEN.quake(*operands, **both_einsums, precision="highest")


@both
@pytest.mark.parametrize("how", ("attribute", "code"))
def test_products_that_another_library_has_changed_stay_so(library, how, fused_calls):
    with changed_einsum(rounding, how):
        expected = library.flax(*arrays(), deterministic=True)
        # NNX rounds the query before it is scaled.
        assert_close(library.accurate(*arrays()), expected, 0.02)
        assert primitives(library.accurate, *arrays())["round"] == 4
    assert not fused_calls
    assert "round" not in primitives(library.accurate, *arrays()) and fused_calls


def test_nnx_promotes_with_the_given_function():
    def to_float16(arrays, *, dtype):
        return tuple(x.astype(jnp.float16) for x in arrays)

    y = NNX.accurate(*arrays(), promote_dtype=to_float16)
    assert y.dtype == jnp.float16


@both
def test_order(library, monkeypatch, fused_calls):
    operands, rng = arrays(), jax.random.key(0)
    dropout = {"dropout_rate": 0.5, "dropout_rng": rng}
    exact = library.flax(*operands), library.flax(*operands, **dropout)

    def results(**order):
        return library.quake(*operands, **order), library.quake(*operands, **dropout, **order)

    coarse, fine = results(order=1), results(order=5)
    for c, f, e in zip(coarse, fine, exact, strict=True):
        assert 1e-3 < float(jnp.abs(c - e).max()) < 0.3
        assert_close(f, e, 2 * TOLERANCE["float32"])
    with quake_jax.default_order(1):
        for actual, expected in zip(results(), coarse, strict=True):
            np.testing.assert_array_equal(actual, expected)
    # "exact" and the switch are Flax's function itself.
    fused_calls.clear()
    for actual, expected in zip(results(order="exact"), exact, strict=True):
        np.testing.assert_array_equal(actual, expected)
    monkeypatch.setattr(switches, "DISABLED", True)
    for actual, expected in zip(results(order=1), exact, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert not fused_calls


@both
def test_weights_have_the_default_order_of_the_fused_attention(library, monkeypatch):
    monkeypatch.setitem(config.DEFAULT_ORDERS, "dot_product_attention", 2)
    monkeypatch.setitem(config.DEFAULT_ORDERS, "softmax", 4)
    dropout = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    for extra in ({}, dropout):
        y = library.quake(*arrays(), **extra)
        np.testing.assert_array_equal(y, library.quake(*arrays(), order=2, **extra))


@both
@pytest.mark.parametrize("extra", ({}, {"dropout_rate": 0.3}), ids=("fused", "unfused"))
def test_derivatives(library, extra):
    if extra:
        extra = {**extra, "dropout_rng": jax.random.key(0)}
    bias, mask = normal(4, 2, HEADS, QUERIES, KEYS), random_mask(2, 1, QUERIES, KEYS)
    weights = normal(5, 2, QUERIES, HEADS, DEPTH)

    def gradients(function):
        def total(q, k, v, bias):
            return jnp.sum(weights * function(q, k, v, bias, mask, **extra))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays(), bias)

    for actual, expected in zip(gradients(library.accurate), gradients(library.flax), strict=True):
        assert_close(actual, expected, 3 * TOLERANCE["float32"])


@both
def test_jit_and_vmap(library):
    operands, mask = arrays((3, 2)), random_mask(3, 2, 1, QUERIES, KEYS)
    expected = library.flax(*operands, mask=mask)
    mapped = jax.vmap(lambda q, k, v, m: library.accurate(q, k, v, mask=m))
    assert_close(jax.jit(mapped)(*operands, mask), expected)


@both
def test_errors_name_the_function_and_the_argument(library):
    q, k, v = arrays()
    name = f"quake_jax.{library.name}.attention_fn: "
    cases = (
        ((q[0, 0], k, v), {}, "query must have the axes"),
        ((q, k[0], v), {}, "key must have the batch axes of query"),
        ((q, k, v[:1]), {}, "value must have the batch axes of query"),
        ((q, k, v[:, 1:]), {}, "value must have the length and heads of key"),
        ((q, k[..., 1:], v), {}, "key must have the depth of query"),
        ((q, k, v), {"bias": jnp.zeros((3, KEYS))}, "bias must broadcast to"),
        ((q, k, v), {"mask": jnp.ones((HEADS, QUERIES, 3))}, "mask must broadcast to"),
        ((q, k, v), {"dropout_rate": 0.5}, "dropout_rng must be a key"),
    )
    for operands, keywords, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            library.quake(*operands, **keywords)
        assert str(error.value).startswith(name)
    heads = jnp.concatenate([q, q[..., :1, :]], -2)
    with pytest.raises(ValueError, match="must have the heads of|must have a multiple of"):
        library.quake(heads, k, v)
    with pytest.raises(ValueError, match="order must be"):
        library.quake(q, k, v, order=9)


# Linen's module.

FEATURES = 16


def linen_layers(**keywords):
    """The module with our function, and with Flax's."""
    layer = functools.partial(nn.MultiHeadDotProductAttention, num_heads=HEADS, **keywords)
    return layer(attention_fn=LINEN.accurate), layer()


MASKS = {
    "none": lambda x: None,
    "causal": lambda x: nn.make_causal_mask(x[..., 0]),
    "padding": lambda x: nn.make_attention_mask(
        jnp.ones(x.shape[:-1]), jnp.broadcast_to(jnp.arange(x.shape[-2]) < 4, x.shape[:-1])
    ),
}


@pytest.mark.parametrize("batch", BATCHES[:3], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_linen_module(batch, mask, fused_calls):
    quake, flax = linen_layers()
    x = normal(0, *batch, QUERIES, FEATURES)
    mask = MASKS[mask](x)
    parameters = flax.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, quake.init(jax.random.key(0), x), parameters)
    fused_calls.clear()
    actual = jax.jit(quake.apply)(parameters, x, mask=mask)
    assert_close(actual, flax.apply(parameters, x, mask=mask))
    assert len(fused_calls) == 1


def test_linen_module_with_the_function_itself():
    # Without functools.partial, at the default order.
    layer = nn.MultiHeadDotProductAttention(HEADS, attention_fn=quake_jax.linen.attention_fn)
    x = normal(0, 2, QUERIES, FEATURES)
    parameters = layer.init(jax.random.key(0), x)
    expected = linen_layers()[1].apply(parameters, x)
    assert_close(layer.apply(parameters, x), expected, 1e-3)


def test_linen_module_in_bfloat16():
    quake, flax = linen_layers(dtype=jnp.bfloat16)
    x = normal(0, 2, QUERIES, FEATURES)
    parameters = flax.init(jax.random.key(0), x)
    y = quake.apply(parameters, x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, flax.apply(parameters, x), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("broadcast", (True, False))
def test_linen_module_with_dropout(broadcast):
    quake, flax = linen_layers(dropout_rate=0.3, broadcast_dropout=broadcast)
    x = normal(0, 2, QUERIES, FEATURES)
    parameters = flax.init(jax.random.key(0), x, deterministic=True)
    for keywords in (
        {"deterministic": True},
        {"deterministic": False, "rngs": {"dropout": jax.random.key(1)}},
    ):
        actual, expected = (m.apply(parameters, x, **keywords) for m in (quake, flax))
        assert_close(actual, expected)


@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_linen_module_sows_weights(rate, fused_calls):
    quake, flax = linen_layers(dropout_rate=rate, deterministic=False)
    x = normal(0, 2, QUERIES, FEATURES)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    parameters = {"params": flax.init(rngs, x)["params"]}
    fused_calls.clear()
    results = [
        m.apply(
            parameters,
            x,
            mask=nn.make_causal_mask(x[..., 0]),
            sow_weights=True,
            mutable=["intermediates"],
            rngs={"dropout": jax.random.key(2)},
        )
        for m in (quake, flax)
    ]
    assert results[0][1]["intermediates"]["attention_weights"][0].shape == (2, HEADS, 5, 5)
    jax.tree.map(assert_close, *results)
    assert not fused_calls


@pytest.mark.parametrize("batch", ((), (2,), (2, 3)), ids=str)
def test_linen_module_decodes(batch):
    quake, flax = linen_layers(decode=True)
    x = normal(0, *batch, QUERIES, FEATURES)
    variables = flax.init(jax.random.key(0), x)
    parameters, caches = {"params": variables["params"]}, [variables["cache"]] * 2
    step = jax.jit(quake.apply, static_argnames="mutable")
    outputs = []
    for t in range(QUERIES):
        token = x[..., t : t + 1, :]
        actual, changed = step(parameters | {"cache": caches[0]}, token, mutable=("cache",))
        expected, other = flax.apply(parameters | {"cache": caches[1]}, token, mutable=["cache"])
        caches = [changed["cache"], other["cache"]]
        assert_close(actual, expected)
        outputs.append(actual)
    jax.tree.map(assert_close, *caches)
    # Token by token is the same as all at once.
    whole = linen_layers()[0].apply(parameters, x, mask=MASKS["causal"](x))
    assert_close(jnp.concatenate(outputs, -2), whole)


def test_linen_module_gradients():
    quake, flax = linen_layers()
    x = normal(0, 2, QUERIES, FEATURES)
    parameters = flax.init(jax.random.key(0), x)
    gradients = [
        jax.jit(jax.grad(lambda p, m=m: jnp.mean(m.apply(p, x, mask=MASKS["causal"](x)) ** 2)))(
            parameters
        )
        for m in (quake, flax)
    ]
    jax.tree.map(assert_close, *gradients)


# NNX's module.


def nnx_layers(**keywords):
    """The module with our function, and with Flax's, with the same parameters."""

    def layer(**more):
        keyword_only = {"decode": False, **keywords, **more}
        return nnx.MultiHeadAttention(HEADS, FEATURES, **keyword_only, rngs=nnx.Rngs(0))

    return layer(attention_fn=NNX.accurate), layer()


@pytest.mark.parametrize("batch", BATCHES[:3], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_nnx_module(batch, mask, fused_calls):
    quake, flax = nnx_layers()
    x = normal(0, *batch, QUERIES, FEATURES)
    mask = MASKS[mask](x)
    actual = nnx.jit(lambda m, x: m(x, mask=mask))(quake, x)
    assert_close(actual, flax(x, mask=mask))
    assert len(fused_calls) == 1


def test_nnx_module_with_the_function_itself():
    layer, flax = nnx_layers()
    layer.set_attributes(attention_fn=quake_jax.nnx.attention_fn)
    x = normal(0, 2, QUERIES, FEATURES)
    assert_close(layer(x), flax(x), 1e-3)


def test_nnx_module_grouped_heads_and_causal(fused_calls):
    quake, flax = nnx_layers(num_kv_heads=2)
    x = normal(0, 2, QUERIES, FEATURES)
    assert_close(quake(x, is_causal=True), flax(x, is_causal=True))
    assert len(fused_calls) == 1


def test_nnx_module_in_bfloat16():
    quake, flax = nnx_layers(dtype=jnp.bfloat16)
    x = normal(0, 2, QUERIES, FEATURES)
    y = quake(x)
    assert y.dtype == jnp.bfloat16
    assert_close(y, flax(x), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("broadcast", (True, False))
@pytest.mark.parametrize("key_heads", (HEADS, 2))
def test_nnx_module_with_dropout(broadcast, key_heads):
    quake, flax = nnx_layers(dropout_rate=0.3, broadcast_dropout=broadcast, num_kv_heads=key_heads)
    x = normal(0, 2, QUERIES, FEATURES)
    for deterministic in (True, False, False):
        keywords = {"deterministic": deterministic, "mask": MASKS["causal"](x)}
        assert_close(quake(x, **keywords), flax(x, **keywords))


# Newer Flax wants nnx.capture around it.
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("rate", (0.0, 0.3))
def test_nnx_module_sows_weights(rate, fused_calls):
    layers = nnx_layers(dropout_rate=rate, deterministic=False)
    x = normal(0, 2, QUERIES, FEATURES)
    results = [m(x, sow_weights=True, mask=MASKS["causal"](x)) for m in layers]
    assert_close(*results)
    actual, expected = (jax.tree.leaves(nnx.pop(m, nnx.Intermediate)) for m in layers)
    assert len(actual) == 1 and actual[0].shape == (2, HEADS, QUERIES, QUERIES)
    jax.tree.map(assert_close, actual, expected)
    assert not fused_calls


@pytest.mark.parametrize("batch", ((2,), (2, 3)), ids=str)
def test_nnx_module_decodes(batch):
    layers = nnx_layers(decode=True)
    x = normal(0, *batch, QUERIES, FEATURES)
    for layer in layers:
        layer.init_cache(x.shape)
    outputs = []
    for t in range(QUERIES):
        actual, expected = (layer(x[..., t : t + 1, :]) for layer in layers)
        assert_close(actual, expected)
        outputs.append(actual)
    whole = layers[0](x, decode=False, is_causal=True)
    assert_close(jnp.concatenate(outputs, -2), whole)


def test_nnx_module_gradients():
    x = normal(0, 2, QUERIES, FEATURES)

    def loss(layer):
        return jnp.mean(layer(x, mask=MASKS["causal"](x)) ** 2)

    actual, expected = (nnx.jit(nnx.grad(loss))(layer) for layer in nnx_layers())
    jax.tree.map(assert_close, nnx.to_pure_dict(actual), nnx.to_pure_dict(expected))
