"""Every public function where JAX raises an error instead of promoting ranks or dtypes."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from support import BIASED, DTYPES, FUNCTIONS, LOGSUMEXP, inputs
from test_bad_input import ACTIVATIONS, VALID

import quake_jax
from quake_jax import approximations

SETTINGS = {
    "rank": functools.partial(jax.numpy_rank_promotion, "raise"),
    "dtype": functools.partial(jax.numpy_dtype_promotion, "strict"),
}
B, T, N, K, H = 2, 16, 4, 2, 8
QUERY, KEY = (B, T, N, H), (B, T, K, H)
LENGTHS = np.arange(7, 7 + B, dtype=np.int32)
IDS = np.arange(B * T, dtype=np.int32).reshape(B, T) // 5
DROPOUT = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
WHERE = np.arange(T) % 3 > 0


def floats(*shapes):
    return tuple(inputs(shape, seed=k) / 8 for k, shape in enumerate(shapes))


def keywords(quake, exact=None, operands=((8, 8, T),), **given):
    """A call of functions with keywords: one of CALLS."""
    exact = exact and functools.partial(exact, **given)
    return functools.partial(quake, **given), exact, floats(*operands)


def attention(operands=(QUERY, KEY, KEY), **given):
    return keywords(
        quake_jax.dot_product_attention, jax.nn.dot_product_attention, operands, **given
    )


def cached(key, value):
    """A full cache."""
    batch, length, heads, size = key.shape
    return quake_jax.kv_cache.append(
        quake_jax.kv_cache.init(batch, length, heads, size), key, value
    )


QKV = floats(QUERY, KEY, KEY)
# Public function and form: what is called, the function that it replaces, and the arrays of both.
CALLS = {
    **{f.name: (f.quake, None if f in BIASED else f.exact, f.inputs((8, 8, T))) for f in FUNCTIONS},
    # `accelerate` leaves short rows alone.
    "logsumexp": (LOGSUMEXP.quake, LOGSUMEXP.exact, LOGSUMEXP.inputs((32, 64))),
    "swish": keywords(quake_jax.swish, jax.nn.swish),
    "elu alpha": (quake_jax.elu, jax.nn.elu, floats((8, 8, T), (1, 8, T))),
    "celu alpha": (quake_jax.celu, jax.nn.celu, floats((8, 8, T), (1, 8, T))),
    "glu axis": keywords(quake_jax.glu, axis=0),
    "softmax axis": keywords(quake_jax.softmax, jax.nn.softmax, axis=1),
    "softmax axes": keywords(quake_jax.softmax, jax.nn.softmax, axis=(0, 2)),
    "softmax where": keywords(quake_jax.softmax, jax.nn.softmax, where=WHERE[None, None]),
    "softmax where axis": keywords(quake_jax.softmax, None, axis=0, where=WHERE[None, None]),
    "log_softmax axis": keywords(quake_jax.log_softmax, jax.nn.log_softmax, axis=None),
    "log_softmax where": keywords(quake_jax.log_softmax, None, where=WHERE[None, None]),
    "logsumexp axes": keywords(quake_jax.logsumexp, None, axis=(0, 2), keepdims=True),
    "logsumexp where": keywords(quake_jax.logsumexp, None, axis=-1, where=WHERE[None, None]),
    "logsumexp b": (
        lambda a, b: quake_jax.logsumexp(a, 1, b, return_sign=True)[0],
        None,
        floats((8, 8, T), (1, 8, T)),
    ),
    "logsumexp sign": (lambda a: quake_jax.logsumexp(a, return_sign=True)[0], None, floats((8, 8))),
    "layer_norm": keywords(quake_jax.layer_norm, None, [(8, 8, T), (T,), (T,)]),
    "layer_norm residual": (
        lambda x, residual: quake_jax.layer_norm(x, residual=residual)[0],
        None,
        floats((8, 8, T), (8, 8, T)),
    ),
    "rms_norm": keywords(quake_jax.rms_norm, None, [(8, 8, T), (T,)]),
    "dot_product_attention": attention(),
    "dot_product_attention causal": attention(is_causal=True),
    "dot_product_attention window": attention(local_window_size=(3, 2)),
    "dot_product_attention lengths": attention(
        query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS
    ),
    "dot_product_attention causal lengths": attention(
        is_causal=True, query_seq_lengths=LENGTHS, key_value_seq_lengths=LENGTHS
    ),
    "dot_product_attention bias mask": attention(
        (QUERY, KEY, KEY, (1, N, T, T)), mask=WHERE[None, None, None]
    ),
    "dot_product_attention no batch": attention([x[1:] for x in (QUERY, KEY, KEY)]),
    "dot_product_attention more": keywords(
        quake_jax.dot_product_attention,
        None,
        (QUERY, KEY, KEY),
        logits_soft_cap=3.0,
        local_window_size=(-1, 2),
        key_value_seq_lengths=LENGTHS,
        query_segment_ids=IDS,
        scale=0.5,
    ),
    "dot_product_attention segments": keywords(
        quake_jax.dot_product_attention,
        None,
        (QUERY, KEY, KEY),
        mask=WHERE[None, None, None],
        query_segment_ids=IDS,
    ),
    "dot_product_attention scale": (
        lambda q, k, v, scale: quake_jax.dot_product_attention(q, k, v, scale=scale),
        None,
        floats(QUERY, KEY, KEY, ()),
    ),
    "dot_product_attention residual": (
        lambda q, k, v: quake_jax.dot_product_attention(q, k, v, return_residual=True)[0],
        None,
        floats(QUERY, KEY, KEY),
    ),
    "packed_dot_product_attention": keywords(
        quake_jax.packed_dot_product_attention,
        None,
        [(B, T, 3, N, H)],
        is_causal=True,
        key_value_seq_lengths=LENGTHS,
    ),
    "kv_cache.attend": (lambda q, k, v: quake_jax.kv_cache.attend(q, cached(k, v)), None, QKV),
    "kv_cache.append": (lambda k, v: cached(k, v).values, None, QKV[1:]),
    **{
        f"{name}.attention_fn {form}": keywords(module.attention_fn, exact, [QUERY] * 3, **given)
        for name, module, flax_attention in (
            ("linen", quake_jax.linen, flax.linen.dot_product_attention),
            ("nnx", quake_jax.nnx, nnx.dot_product_attention),
        )
        for form, exact, given in (
            ("mask", flax_attention, {"mask": WHERE[None, None, None]}),
            ("dropout", None, {**DROPOUT, "mask": WHERE[None, None, None]}),
            ("causal", None, {**DROPOUT, "is_causal": True}),
        )
    },
    **{
        f"approximations {a.kind} {a.name}": (a.function, None, (-abs(inputs((4, T))),))
        for a in approximations.registry()
    },
}


def test_every_function_of_arrays_is_called():
    called = {name.split()[0] for name in CALLS}
    of_arrays = {name for name, x in VALID.items() if any(np.ndim(v) for v in x.values())}
    called |= {f.public for f in FUNCTIONS}  # whose forms have names of their own
    assert of_arrays <= called
    assert ACTIVATIONS


def total(f):
    return lambda *x: sum(jnp.sum(y) for y in jax.tree.leaves(f(*x)))


@pytest.fixture(params=SETTINGS)
def setting(request):
    with SETTINGS[request.param]():
        yield request.param


@pytest.mark.parametrize("name", CALLS)
def test_calls_and_derivatives(name, setting):
    quake, _, x = CALLS[name]
    every = tuple(range(len(x)))
    both = jax.value_and_grad(total(quake), every)
    traced = jax.jit(both).trace(*x)
    if "approximations" in name:  # which have no primitives
        return
    # On other platforms what is lowered is `reference`.
    for platform in ("cpu", "tpu"):
        traced.lower(lowering_platforms=(platform,))
    jax.eval_shape(jax.grad(total(lambda *x: both(*x)[1]), every), *x)
    for axes in ((0, *(None for _ in every[1:])), tuple(0 for _ in every)):
        mapped_x = (v if a is None else jnp.stack([v, v]) for v, a in zip(x, axes, strict=True))
        jax.jit(jax.vmap(quake, axes)).trace(*mapped_x).lower()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float32"])
@pytest.mark.parametrize("name", [name for name in CALLS if "approximations" not in name])
def test_16_bit_dtypes(name, dtype):
    quake, _, x = CALLS[name]
    x = [v.astype(dtype) for v in x]
    with SETTINGS["dtype"]():
        jax.eval_shape(jax.value_and_grad(total(quake), tuple(range(len(x)))), *x)


@pytest.mark.parametrize("name", [name for name, (_, exact, _) in CALLS.items() if exact])
def test_accelerated_calls_and_their_derivatives(name, setting):
    _, exact, x = CALLS[name]
    fast = quake_jax.accelerate(exact, only="all")
    kernel = "dot_product_attention" if "attention" in name else ""
    assert f"quake_{kernel}" in str(jax.make_jaxpr(fast)(*x))
    jax.jit(jax.value_and_grad(total(fast), tuple(range(len(x))))).trace(*x).lower()


def test_sharded_calls(setting):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    for name, (quake, _, x) in CALLS.items():
        if "approximations" not in name and all(v.ndim for v in x):
            split = [
                NamedSharding(mesh, PartitionSpec("x" if v.shape[0] % 2 == 0 else None)) for v in x
            ]
            jax.jit(quake, in_shardings=split).trace(*x).lower()
