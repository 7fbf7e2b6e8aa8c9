"""The cache of keys and values: what it stores, against double precision; how it is used."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import in_double
from support import on_device

import quake_jax
from quake_jax import kv_cache
from quake_jax._attention.operands import decoded
from quake_jax._core.constants import MAX_REL_ERROR

DTYPES = ("float32", "bfloat16", "float16", "int8")
ROOM = 96


def normal(*shape, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return on_device(values.astype(np.float32), dtype)


def filled(dtype, length=70, room=ROOM, k=2, h=16, v=None, b=2):
    """A cache, and the keys and values that were appended to it."""
    key, value = normal(b, length, k, h, seed=1), normal(b, length, k, v or h, seed=2)
    cache = kv_cache.init(b, room, k, h, value_size=v, dtype=dtype)
    return kv_cache.append(cache, key, value), key, value


def stored(cache):
    """Keys and values as the cache has them, in float32."""
    n = int(cache.length)
    if cache.dtype == jnp.int8:
        key = decoded(cache.keys, cache.key_scales)
        value = decoded(cache.values, cache.value_scales)
    else:
        key, value = cache.keys.astype(jnp.float32), cache.values.astype(jnp.float32)
    return key[:, :n], value[:, :n]


def visible(queries, length, window=None):
    """Which of the positions the last queries see, and may see through a window."""
    t, s = length - queries + np.arange(queries)[:, None], np.arange(length)
    return (s <= t) & (s >= t - (length if window is None else window))


def test_windows_and_lengths_that_are_none():
    cache, *_ = filled("float32")
    query = normal(2, 1, 4, 16)
    whole = kv_cache.attend(query, cache)
    for size in (70, 2**31 - 1, 2**31, (2**40, 0)):
        np.testing.assert_array_equal(kv_cache.attend(query, cache, local_window_size=size), whole)
    for size in (-1, (5, -3)):
        with pytest.raises(ValueError, match="local_window_size must be None or not negative"):
            kv_cache.attend(query, cache, local_window_size=size)
    several = dataclasses.replace(cache, length=jnp.array([70, 5]))
    with pytest.raises(ValueError, match=r"jax.vmap gives each sequence its own; got a length of"):
        kv_cache.attend(query, several)
    assert cache == cache and cache != filled("float32")[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored(dtype):
    cache, *given = filled(dtype, v=24)
    assert (cache.max_length, cache.dtype, int(cache.length)) == (ROOM, dtype, 70)
    for x, kept in zip(given, stored(cache), strict=True):
        x, kept = np.asarray(x, np.float64), np.asarray(kept, np.float64)
        if dtype == "int8":
            # Half a step, of a scale and a quotient that are rounded themselves.
            largest = np.abs(x).max(-1, keepdims=True)
            assert (np.abs(kept - x) <= largest / 127 * (0.5 + 2.0**-15)).all()
            assert np.abs(np.asarray(cache.keys)).max() == 127
        else:
            unit = 0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
            assert (np.abs(kept - x) <= unit * np.abs(x) + 2.0**-25).all()
    assert not np.asarray(cache.keys[:, 70:]).any()


OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"local_window_size": 13},
    "soft cap": {"logits_soft_cap": 1.5},
    "bias": {"bias": normal(1, 4, 1, ROOM, seed=5)},
    "mask": {"mask": on_device(np.random.default_rng(3).random((2, 1, 1, ROOM)) > 0.4)},
    "traced scale": {"scale": jnp.float32(0.3)},
}


@pytest.mark.parametrize("queries", [1, 3, 20])  # 3 are few with a group of 2, 20 are many
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_against_double_precision(dtype, queries, option):
    cache, *_ = filled(dtype, v=24)
    keywords = dict(OPTIONS[option])
    query = normal(2, queries, 4, 16)
    f = functools.partial(kv_cache.attend, **{k: v for k, v in keywords.items() if k != "scale"})
    if option == "traced scale":
        y = jax.jit(lambda q, c, scale: f(q, c, scale=scale))(query, cache, keywords["scale"])
    else:
        y = f(query, cache, **{k: v for k, v in keywords.items() if k == "scale"})
    kept = visible(queries, 70, keywords.pop("local_window_size", None))[None, None]
    if "mask" in keywords:
        kept = kept & np.asarray(keywords["mask"])[..., :70]
        kept = np.broadcast_to(kept, (2, 1, queries, 70))
        assert kept.any(-1).all()
    if "bias" in keywords:
        keywords["bias"] = keywords["bias"][..., :70]
    key, value = stored(cache)
    expected, _ = in_double(query, key, value, **{**keywords, "mask": kept})
    largest = float(np.abs(np.asarray(value)).max())
    bound = 2 * MAX_REL_ERROR["softmax"][5] * largest + 2.0**-19 * largest
    np.testing.assert_allclose(y, expected, atol=bound)
    exact = f(query, cache, **{k: v for k, v in keywords.items() if k == "scale"}, order="exact")
    if option != "bias":
        np.testing.assert_allclose(exact, expected, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_query", ["bfloat16", "float16"])
def test_queries_of_16_bits(dtype, of_query):
    cache, *_ = filled(dtype)
    key, value = stored(cache)
    unit = float(jnp.finfo(of_query).eps) / 2
    for queries in (1, 20):
        query = normal(2, queries, 4, 16, dtype=of_query)
        y = kv_cache.attend(query, cache)
        assert y.dtype == query.dtype
        mask = visible(queries, 70)[None, None]
        expected, _ = in_double(query.astype(jnp.float32), key, value, mask=mask)
        atol = 2.0**-17
        if of_query == "bfloat16" and queries == 20:
            # Many rows are multiplied in bfloat16 where there are instructions for it. Logits move
            # by what rounding the keys moves their products, weights by as much of themselves, and
            # so does their sum; weights and values are rounded too.
            products = np.einsum(
                "btkgh,bskh->btkgs",
                *map(
                    np.abs,
                    (np.asarray(query, np.float32).reshape(2, queries, 2, 2, 16), np.asarray(key)),
                ),
            )
            moved = math.expm1(2 * unit * products.max() / 4)
            atol = (moved + 2 * unit) * np.abs(np.asarray(value)).max()
        np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=atol, rtol=unit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_what_all_at_once_is(dtype):
    cache, key, value = filled(dtype, length=9)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, query, key, value):
        cache = kv_cache.append(cache, key, value)
        return cache, kv_cache.attend(query, cache)

    by_step = kv_cache.init(2, ROOM, 2, 16, dtype=dtype)
    query = normal(2, 9, 4, 16)
    results = []
    for i in range(9):
        before = by_step.keys.unsafe_buffer_pointer()
        one = slice(i, i + 1)
        by_step, y = step(by_step, query[:, one], key[:, one], value[:, one])
        assert by_step.keys.unsafe_buffer_pointer() == before  # donated
        results.append(y)
    for a, b in zip(jax.tree.leaves(by_step), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)
    at_once = kv_cache.attend(query, cache)
    np.testing.assert_allclose(jnp.concatenate(results, 1), at_once, atol=2e-6)

    # The same as what a scan carries.
    def body(cache, x):
        cache = kv_cache.append(cache, *(a[:, None] for a in x[1:]))
        return cache, kv_cache.attend(x[0][:, None], cache)

    by_time = [jnp.moveaxis(a, 1, 0) for a in (query, key, value)]
    scanned, ys = jax.lax.scan(body, kv_cache.init(2, ROOM, 2, 16, dtype=dtype), by_time)
    assert int(scanned.length) == 9
    np.testing.assert_allclose(jnp.moveaxis(ys[:, :, 0], 0, 1), at_once, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_vmap_gives_sequences_lengths_of_their_own(dtype):
    caches = [filled(dtype, length=n, b=1)[0] for n in (5, 31, 70)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    key, value, query = (normal(3, 1, 1, 2, 16, seed=i) for i in range(3))
    query = jnp.concatenate([query, -query], 3)

    def step(cache, query, key, value):
        cache = kv_cache.append(cache, key, value)
        return kv_cache.attend(query, cache), cache

    ys, stepped = jax.jit(jax.vmap(step))(together, query, key, value)
    np.testing.assert_array_equal(stepped.length, [6, 32, 71])
    for i, cache in enumerate(caches):
        y, _ = step(cache, query[i], key[i], value[i])
        np.testing.assert_allclose(ys[i], y, atol=2e-6)
    # Queries alone, and two axes.
    attend = jax.vmap(kv_cache.attend, (0, None))
    ys = attend(query, caches[1])
    np.testing.assert_allclose(ys[2], kv_cache.attend(query[2], caches[1]), atol=2e-6)
    ys = jax.vmap(attend, (None, 0))(query, together)
    np.testing.assert_allclose(ys[2, 1], kv_cache.attend(query[1], caches[2]), atol=2e-6)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "float32"])
def test_appending_converts_no_whole_cache(dtype):
    # XLA on CPUs computes what is bfloat16 in float32.
    cache, key = kv_cache.init(2, ROOM, 2, 16, dtype=dtype), normal(2, 1, 2, 16)
    append = jax.jit(kv_cache.append, donate_argnums=0).lower(cache, key, key).compile()
    assert f"f32[2,{ROOM},2,16]" not in append.as_text()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 20])
def test_derivatives(dtype, queries):
    cache, key, value = filled(dtype)
    query = normal(2, queries, 4, 16)
    decoded_key, decoded_value = stored(cache)
    mask = jnp.asarray(visible(queries, 70)[None, None])

    def exact(query, key, value):
        return jnp.sum(jax.nn.dot_product_attention(query, key, value, mask=mask) ** 2)

    def cached(query, key, value):
        cache = kv_cache.append(kv_cache.init(2, ROOM, 2, 16, dtype=dtype), key, value)
        return jnp.sum(kv_cache.attend(query, cache) ** 2)

    slopes = jax.jit(jax.grad(cached, (0, 1, 2)))(query, key, value)
    expected = jax.grad(exact, (0, 1, 2))(query, decoded_key, decoded_value)
    np.testing.assert_allclose(slopes[0], expected[0], atol=1e-5)
    for slope, wanted in zip(slopes[1:], expected[1:], strict=True):
        if dtype == "int8":  # a constant
            assert not np.asarray(slope).any()
        else:
            # They go through arrays of the cache's dtype.
            unit = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(slope, wanted, atol=1e-5, rtol=2 * unit)


def test_no_room():
    cache, *_ = filled("int8")
    key = normal(2, ROOM - 70 + 1, 2, 16)
    with pytest.raises(ValueError, match="key must be of at most 26 positions, the room of a "):
        kv_cache.append(cache, key, key)
    query = normal(2, 1, 4, 16)
    step = jax.jit(lambda c, k: kv_cache.attend(query, kv_cache.append(c, k, k)))
    assert np.isnan(step(cache, key)).all()
    assert not np.isnan(step(cache, key[:, 1:])).any()
    over = jax.jit(kv_cache.append)(cache, key, key)
    with pytest.raises(ValueError, match="cache must be of at least query's length 1, at most 96"):
        kv_cache.attend(query, over)
    # Every further result is NaN, too.
    assert np.isnan(step(over, key[:, :1])).all()


def test_fewer_positions_than_queries():
    cache, *_ = filled("bfloat16", length=2)
    query = normal(2, 3, 4, 16)
    with pytest.raises(ValueError, match="cache must be of at least query's length 3"):
        kv_cache.attend(query, cache)
    assert np.isnan(jax.jit(kv_cache.attend)(query, cache)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(dtype, bad):
    cache, key, value = filled(dtype)
    cache = kv_cache.append(cache, key[:, :1].at[0, 0, 0, 3].set(bad), value[:, :1])
    y = np.asarray(kv_cache.attend(jnp.abs(normal(2, 1, 4, 16)), cache))
    if math.isnan(bad) or dtype == "int8":
        assert np.isnan(y[0, :, :2]).all()
    assert np.isfinite(y[0, :, 2:]).all() and np.isfinite(y[1]).all()


def test_zeros_are_stored_as_they_are():
    zeros = jnp.zeros((1, 3, 2, 16))
    cache = kv_cache.append(kv_cache.init(1, 8, 2, 16, dtype="int8"), zeros, zeros)
    assert not np.asarray(kv_cache.attend(normal(1, 1, 2, 16), cache)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_platforms_and_export(dtype):
    cache, *_ = filled(dtype)
    query = normal(2, 3, 4, 16)
    f = jax.jit(kv_cache.attend)
    assert "quake_jax" in f.trace(query, cache).lower().as_text()
    text = f.trace(query, cache).lower(lowering_platforms=("cuda",)).as_text()
    assert "quake_jax" not in text
    checks = quake_jax.disabled_export_checks()
    leaves, tree = jax.tree.flatten(cache)
    g = jax.jit(lambda q, *x: kv_cache.attend(q, jax.tree.unflatten(tree, x)))
    exported = jax.export.export(g, platforms=("cpu", "tpu"), disabled_checks=checks)
    again = jax.export.deserialize(exported(query, *leaves).serialize())
    np.testing.assert_array_equal(again.call(query, *leaves), f(query, cache))


def test_few_rows_read_the_cache_as_it_lies():
    # The program has no other array of the cache's size.
    cache, *_ = filled("int8")
    text = jax.jit(kv_cache.attend).lower(normal(2, 1, 4, 16), cache).compile().as_text()
    assert f"f32[2,{ROOM},2,16]" not in text and f"s8[2,{ROOM},2,16]" in text


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        query, key, value = (nn.DenseGeneral((2, 16))(x) for _ in range(3))
        cache = self.variable("cache", "kv", kv_cache.init, 2, ROOM, 2, 16, dtype="int8")
        if not self.is_initializing():
            cache.value = kv_cache.append(cache.value, key, value)
            return kv_cache.attend(query, cache.value)
        return query


def test_a_variable_of_linen():
    x = normal(2, 6, 32)
    model = Decoder()
    variables = model.init(jax.random.key(0), x)
    at_once, _ = model.apply(variables, x, mutable=["cache"])
    step = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    for i in range(6):
        y, changed = step(variables, x[:, i : i + 1])
        variables = {**variables, **changed}
        np.testing.assert_allclose(y[:, 0], at_once[:, i], atol=1e-5)
    assert int(variables["cache"]["kv"].length) == 6


class NnxDecoder(nnx.Module):
    def __init__(self):
        self.cache = nnx.Cache(kv_cache.init(2, ROOM, 2, 16, dtype="bfloat16"))

    def __call__(self, x):
        self.cache.set_value(kv_cache.append(self.cache.get_value(), x, x))
        return kv_cache.attend(x, self.cache.get_value())


def test_a_variable_of_nnx():
    x = normal(2, 6, 2, 16)
    at_once = NnxDecoder()(x)
    model = NnxDecoder()
    step = nnx.jit(lambda model, x: model(x))
    for i in range(6):
        np.testing.assert_allclose(step(model, x[:, i : i + 1])[:, 0], at_once[:, i], atol=1e-5)
    assert int(model.cache.get_value().length) == 6
