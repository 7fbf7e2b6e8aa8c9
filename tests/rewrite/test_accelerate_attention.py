"""accelerate finds attention: layouts, masks, scales, packed projections, models; and what only
looks like attention stays.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from support import on_device
from test_accelerate import primitives, reasons, replacements

import quake_jax
from quake_jax._rewrite import engine

linen = pytest.importorskip("flax.linen")

B, T, N, H = 2, 16, 4, 8
LOWEST = float(jnp.finfo(jnp.float32).min)
ROOT = 1 / math.sqrt(H)
ATTENTION = ["dot_product_attention"]
PACKED = ["packed_dot_product_attention"]


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    monkeypatch.setattr(engine, "RAISE_FAILURES", True)


def normal(*shape, seed=0):
    return on_device(np.random.default_rng(seed).normal(size=shape), "float32")


def qkv(*shape):
    return tuple(normal(*shape, seed=i) for i in range(3))


BTNH = qkv(B, T, N, H)
BNTH = qkv(B, N, T, H)
GROUPED = (BTNH[0], BTNH[1][:, :, :2], BTNH[2][:, :, :2])
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
# Masks that are arguments; the first query of the first has no key, no query of the second.
MASK = (normal(B, 1, T, T, seed=5) > -0.5).at[0, 0, 0].set(False)
PADDING = (jnp.arange(T) >= jnp.array([[0], [5]]))[:, None, None, :]
COUNTS = PADDING[:, 0, 0].astype(jnp.int32)
BIAS = normal(1, N, T, T, seed=7)
# Two images of three windows; the first query of the first window has no key.
WINDOWS = (*qkv(6, T, N, H), (normal(3, T, T, seed=6) > -0.5).at[0, 0].set(False), BIAS)


def attend(q, k, v, change=lambda s: s, scale=ROOT):
    """Attention in the layout of Flax."""
    s = change(jnp.einsum("bthd,bshd->bhts", q, k) * scale)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)


def changed(change):
    """Attention whose scores are changed by a function of them and of a further argument."""
    return lambda q, k, v, *x: attend(q, k, v, lambda s: change(s, *x))


def added(mask, number=LOWEST):
    return jnp.where(mask, 0.0, number)


def weighted(weigh):
    """Attention whose weights are a function of the scores and of a further argument."""

    def fun(q, k, v, *x):
        weights = weigh(jnp.einsum("bthd,bshd->bhts", q, k) * ROOT, *x)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    return fun


def divided(divide, change=lambda s: s, values="bhts,bshd->bthd"):
    """Attention that a function of exponentials and their product with the values divides."""

    def fun(q, k, v, *x):
        s = change(jnp.einsum("bthd,bshd->bhts", q, k) * ROOT, *x)
        e = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
        return divide(e, jnp.einsum(values, e, v))

    return fun


def divided_at_last(e, y):
    return y / e.sum(-1).swapaxes(1, 2)[..., None]


def divided_and_masked_again(q, k, v, mask):
    s = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q, k) * ROOT, -jnp.inf)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return divided_at_last(e, jnp.einsum("bhts,bshd->bthd", jnp.where(mask, e, 0), v))


def divided_groups(q, k, v, mask):
    s = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, 2, 2, H), k) + added(mask)
    e = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
    y = jnp.einsum("bkgts,bskd->btkgd", e, v)
    return (y * (1 / e.sum(-1)).transpose(0, 3, 1, 2)[..., None]).reshape(B, T, N, H)


def named(q, k, v):
    """With names for remat's policies: those of operands and result stay."""
    s = checkpoint_name(jnp.einsum("bthd,bshd->bhts", checkpoint_name(q, "query"), k), "scores")
    s = checkpoint_name(jnp.where(CAUSAL, s, LOWEST) * ROOT, "logits")
    weights = checkpoint_name(jax.nn.softmax(s), "weights")
    return checkpoint_name(jnp.einsum("bhts,bshd->bthd", weights, v), "out")


def attend_heads_first(q, k, v, mask=None):
    s = q @ k.swapaxes(-1, -2) / math.sqrt(H)
    s = s if mask is None else jnp.where(mask, s, -1e30)
    return jax.nn.softmax(s, axis=-1) @ v


def nanogpt(x, w):
    q, k, v = (y.reshape(B, T, N, H).transpose(0, 2, 1, 3) for y in jnp.split(x @ w, 3, -1))
    s = (q @ k.swapaxes(-1, -2)) * (1 / math.sqrt(H))
    s = jnp.where(jnp.tril(jnp.ones((T, T))) == 0, float("-inf"), s)
    return (jax.nn.softmax(s, -1) @ v).transpose(0, 2, 1, 3).reshape(B, T, N * H)


def equinox(q, k, v):
    """As equinox.nn.MultiheadAttention: one head of one sequence, mapped over the heads."""

    def one_head(q, k, v):
        s = jnp.einsum("sd,Sd->sS", q / jnp.sqrt(q.shape[-1]), k)
        s = jnp.where(CAUSAL, s, jnp.finfo(s.dtype).min)
        weights = jax.nn.softmax(s.astype(jnp.float32), axis=-1).astype(s.dtype)
        return jnp.einsum("sS,Sd->sd", weights, v)

    return jax.vmap(one_head, in_axes=1, out_axes=1)(q, k, v)


def haiku(q, k, v, mask):
    """As haiku.MultiHeadAttention."""
    s = jnp.einsum("...thd,...Thd->...htT", q, k) / np.sqrt(H).astype(k.dtype)
    s = jnp.where(mask, s, -1e30)
    y = jnp.einsum("...htT,...Thd->...thd", jax.nn.softmax(s), v)
    return jnp.reshape(y, (*y.shape[:-2], -1))


def huggingface(q, k, v, mask):
    """As the Flax models of transformers: a mask that is made a bias."""
    bias = jax.lax.select(
        mask > 0, jnp.zeros(mask.shape, q.dtype), jnp.full(mask.shape, jnp.finfo(q.dtype).min)
    )
    weights = linen.dot_product_attention_weights(q, k, bias=bias)
    return jnp.einsum("...hqk,...khd->...qhd", weights, v)


def multi_query(q, k, v):
    s = jnp.einsum("bthd,bsd->bhts", q, k) * 0.3
    return jnp.einsum("bhts,bsd->bthd", jax.nn.softmax(s), v)


def grouped(q, k, v):
    s = jnp.einsum("btkgd,bskd->bkgts", q.reshape(B, T, 2, 2, H), k)
    return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(s), v).reshape(B, T, N, H)


def gemma(q, k, v, mask):
    """As gemma: heads in one axis around mask and softmax, in groups in both products."""
    s = jnp.einsum("btkgh,bskh->btkgs", q.reshape(B, T, 2, 2, H), k).reshape(B, T, N, -1)
    s = jnp.where(mask[:, :, None], jnp.tanh(s / 5) * 5, -2.3819763e38)
    weights = jax.nn.softmax(s).reshape(B, T, 2, 2, -1)
    return jnp.einsum("btkgs,bskh->btkgh", weights, v).reshape(B, T, N, H)


def gemma_masked_again(q, k, v, mask):
    s = jnp.einsum("btkgh,bskh->btkgs", q.reshape(B, T, 2, 2, H), k).reshape(B, T, N, -1)
    weights = jax.nn.softmax(s, where=mask[:, :, None]).reshape(B, T, 2, 2, -1)
    weights = jnp.where(mask[:, :, None, None], weights, 0)
    return jnp.einsum("btkgs,bskh->btkgh", weights, v).reshape(B, T, N, H)


def groups_among_queries(q, k, v, bias):
    """The queries of a group one after another, in the order of the products alone."""
    q = q.transpose(0, 2, 1, 3).reshape(B, 2, 2 * T, H)
    s = jnp.einsum("bkxh,bskh->bkxs", q, k).reshape(B, N, T, -1)
    weights = jax.nn.softmax(jnp.where(CAUSAL, s + bias, LOWEST)) * jnp.arange(N)[:, None, None]
    out = jnp.einsum("bkxs,bskh->bkxh", weights.reshape(B, 2, 2 * T, -1), v)
    return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def groups_around_softmax_alone(q, k, v, mask):
    s = jnp.einsum("bkgth,bskh->bkgts", q.transpose(0, 2, 1, 3).reshape(B, 2, 2, T, H), k)
    s = jnp.where(mask, s.reshape(B, N, T, -1), LOWEST).reshape(B, 2, 2, T, -1)
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(s), v).reshape(B, T, N, H)


def windows(q, k, v, mask, bias):
    """As Swin: images and windows in one axis, but for the mask of windows."""
    s = jnp.einsum("bthd,bshd->bhts", q * ROOT, k) + bias
    s = jnp.where(mask[:, None], s.reshape(2, 3, N, T, T), -1e9).reshape(-1, N, T, T)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)


def windows_and_heads_in_batch(q, k, v, mask, bias):
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(-1, T, H) for x in (q, k, v))
    s = (q @ k.swapaxes(1, 2)).reshape(2, 3, N, T, T) + bias + added(mask[:, None], -100.0)
    return (jax.nn.softmax(s.reshape(-1, T, T)) @ v).reshape(6, N, T, H)


def windows_masked_again(q, k, v, mask):
    s = jnp.einsum("bthd,bshd->bhts", q * ROOT, k).reshape(2, 3, N, T, T)
    weights = jax.nn.softmax(jnp.where(mask[:, None], s, -1e9).reshape(-1, T))
    weights = jnp.where(mask[:, None], weights.reshape(2, 3, N, T, T), 0)
    return jnp.einsum("bhts,bshd->bthd", weights.reshape(-1, N, T, T), v)


def heads_in_batch(q, k, v, mask):
    """As bmm code: batch and heads in one axis in both products."""
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(B * N, T, H) for x in (q, k, v))
    s = (q @ k.swapaxes(1, 2)).reshape(B, N, T, T) + jnp.where(mask, 0.0, LOWEST)
    out = jax.nn.softmax(s).reshape(B * N, T, T) @ v
    return out.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def heads_in_batch_everywhere(q, k, v, mask):
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(B * N, T, H) for x in (q, k, v))
    mask = jnp.broadcast_to(mask, (B, N, T, T)).reshape(B * N, T, T)
    s = jnp.where(mask & CAUSAL, q @ k.swapaxes(1, 2), LOWEST)
    return (jax.nn.softmax(s) @ v).reshape(B, N, T, H).transpose(0, 2, 1, 3)


def repeated(repeat):
    return lambda q, k, v: attend(q, *(repeat(x, N // x.shape[2]) for x in (k, v)))


def broadcast_heads(x, n):
    wide = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], n, x.shape[3]))
    return wide.reshape(*x.shape[:2], -1, x.shape[3])


def head_mask(q, k, v, factor):
    """As BERT in transformers."""
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    weights = jnp.einsum("...hqk,h->...hqk", weights, factor)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def head_mask_by_product(q, k, v, factor):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)) * factor
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def key_factor(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)) * jnp.arange(T)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def unpack_einops(x):
    q, k, v = x.reshape(B, T, 3, N, H).transpose(2, 0, 3, 1, 4)
    return attend_heads_first(q, k, v)


def transposed_reshape(x):
    return jax.lax.reshape(x, (B, T, 3, N, H), dimensions=(1, 0, 2))


def tiled(x, n):
    return jnp.tile(x, (1, 1, n, 1))


def softmax_of_base_2(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k) * 0.3 + BIAS
    e = jnp.exp2(s - s.max(-1, keepdims=True))
    return jnp.einsum("bhts,bshd->bthd", e / e.sum(-1, keepdims=True), v)


@jax.jit
def jitted_heads_first(x):
    return x.reshape(B, T, N, H).transpose(0, 2, 1, 3)


@jax.jit
def jitted_padding(counts):
    return (counts > 0)[:, None, None, :]


def jax_attention(*operands, **keywords):
    return (functools.partial(jax.nn.dot_product_attention, **keywords), operands)


# name: (function, arguments, what replaces it, parameters of the kernel that tell masks)
CASES = {
    "jax.nn": (*jax_attention(*BTNH), ATTENTION, {"present=0", "is_causal=0"}),
    "jax.nn causal": (
        *jax_attention(*BTNH, is_causal=True),
        ATTENTION,
        {"present=0", "is_causal=1"},
    ),
    "jax.nn bias, mask, causal, groups": (
        *jax_attention(*GROUPED, BIAS, MASK, is_causal=True),
        ATTENTION,
        {"present=3", "is_causal=1"},
    ),
    "jax.nn lengths": (
        *jax_attention(*BTNH, key_value_seq_lengths=jnp.array([3, 9])),
        ATTENTION,
        {"present=2"},
    ),
    "jax.nn window": (
        *jax_attention(*BTNH, local_window_size=(3, 2)),
        ATTENTION,
        {"window_left=3", "window_right=2"},
    ),
    "jax.nn without batch": (*jax_attention(*(x[0] for x in BTNH)), ATTENTION, set()),
    "flax": (linen.dot_product_attention, (*BTNH, BIAS, MASK), ATTENTION, {"present=3"}),
    "einsum": (attend, BTNH, ATTENTION, {"present=0"}),
    "heads first": (attend_heads_first, BNTH, ATTENTION, {"present=0"}),
    "heads first, mask": (
        attend_heads_first,
        (*BNTH, MASK),
        ATTENTION,
        {"present=2", "bool[2,1,16,16]"},
    ),
    "no batch, no heads": (attend_heads_first, qkv(64, H), ATTENTION, set()),
    "nanogpt": (
        nanogpt,
        (normal(B, T, 32) / 4, normal(32, 96)),
        PACKED,
        {"is_causal=1", "present=0"},
    ),
    "equinox": (equinox, tuple(x[0] for x in BTNH), ATTENTION, {"is_causal=1", "f32[1,16,4,8]"}),
    "equinox batch": (jax.vmap(equinox), BTNH, ATTENTION, {"is_causal=1", "f32[2,16,4,8]"}),
    "haiku": (haiku, (*BTNH, MASK), ATTENTION, {"present=2"}),
    "huggingface": (huggingface, (*BTNH, PADDING.astype(jnp.int32)), ATTENTION, {"present=2"}),
    "multi-query": (
        multi_query,
        (BTNH[0], *(x[:, :, 0] for x in BTNH[1:])),
        ATTENTION,
        {"f32[2,16,1,8]"},
    ),
    "groups by reshape": (grouped, GROUPED, ATTENTION, {"f32[2,16,2,8]"}),
    "gemma": (gemma, (*GROUPED, MASK[:, 0]), ATTENTION, {"f32[2,16,2,8]", "bool[2,1,16,16]"}),
    "groups among queries": (
        groups_among_queries,
        (*GROUPED, BIAS),
        ATTENTION,
        {"f32[2,16,2,8]", "is_causal=1", "present=1"},
    ),
    "groups around softmax alone": (
        groups_around_softmax_alone,
        (*GROUPED, MASK),
        ATTENTION,
        {"f32[2,16,2,8]", "present=2"},
    ),
    "windows": (windows, WINDOWS, ATTENTION, {"f32[6,16,4,8]", "present=3"}),
    "windows and heads in batch": (windows_and_heads_in_batch, WINDOWS, ATTENTION, {"present=1"}),
    "windows masked again": (windows_masked_again, WINDOWS[:-1], ATTENTION, {"present=2"}),
    "heads in batch": (heads_in_batch, (*BTNH, MASK), ATTENTION, {"f32[2,16,4,8]", "present=2"}),
    "heads in batch everywhere": (
        heads_in_batch_everywhere,
        (*BTNH, PADDING),
        ATTENTION,
        {"is_causal=1", "present=2"},
    ),
    "groups by repeat": (
        repeated(lambda x, n: jnp.repeat(x, n, axis=2)),
        GROUPED,
        ATTENTION,
        {"f32[2,16,2,8]"},
    ),
    "groups by broadcast": (repeated(broadcast_heads), GROUPED, ATTENTION, {"f32[2,16,2,8]"}),
    # In its order of heads, which no parameter of the kernel has, the heads are copied.
    "groups by tile": (repeated(tiled), GROUPED, ATTENTION, {"f32[2,16,4,8]"}),
    "one key and value for all sizes": (
        lambda q, k, v: attend(q, *(jnp.broadcast_to(x, q.shape) for x in (k, v))),
        (BTNH[0], *(x[..., :1] for x in BTNH[1:])),
        ATTENTION,
        set(),
    ),
    "exp2 softmax": (softmax_of_base_2, BTNH, ATTENTION, {"present=1"}),
    "one key head by repeat": (
        repeated(lambda x, n: jnp.repeat(x, n, axis=2)),
        (BTNH[0], *(x[:, :, :1] for x in BTNH[1:])),
        ATTENTION,
        {"f32[2,16,1,8]"},
    ),
    "vmap": (jax.vmap(attend), tuple(jnp.stack([x, -x]) for x in BTNH), ATTENTION, set()),
    "vmap over queries": (
        jax.vmap(attend, in_axes=(0, None, None)),
        (jnp.stack([BTNH[0]] * 3), *BTNH[1:]),
        ATTENTION,
        {"f32[2,16,12,8]", "f32[2,16,4,8]"},
    ),
    "vmap over keys": (
        jax.vmap(attend, in_axes=(None, 0, 0)),
        (BTNH[0], *(jnp.stack([x, -x]) for x in BTNH[1:])),
        ATTENTION,
        set(),
    ),
    "one query": (attend, (normal(B, 1, N, H), *qkv(B, 64, N, H)[1:]), ATTENTION, set()),
    "values of another size": (attend, (*BTNH[:2], normal(B, T, N, 5)), ATTENTION, set()),
    # Scales.
    "scaled query": (
        lambda q, k, v: attend(q * 0.3, k, v, scale=1.0),
        BTNH,
        ATTENTION,
        {"scale=0.30"},
    ),
    "scaled key": (lambda q, k, v: attend(q, k / 4, v, scale=2.0), BTNH, ATTENTION, {"scale=0.5"}),
    "computed scale": (
        lambda q, k, v: attend(q, k, v, lambda s: s / jnp.sqrt(jnp.float32(H)), 1.0),
        BTNH,
        ATTENTION,
        {"scale=0.35355"},
    ),
    "learned temperature": (
        changed(lambda s, t: s * t),
        (*BTNH, jnp.float32(0.3)),
        ATTENTION,
        set(),
    ),
    "soft cap": (changed(lambda s: 5 * jnp.tanh(s / 5)), BTNH, ATTENTION, {"soft_cap=5.0"}),
    "soft cap, bias and mask": (
        changed(lambda s, b, m: jnp.where(m, jnp.tanh(s / 5) * 5 + b, -1e30)),
        (*BTNH, BIAS, MASK),
        ATTENTION,
        {"soft_cap=5.0", "present=3"},
    ),
    # Masks and biases.
    "two biases": (
        changed(lambda s, b: s + b - 2 * b[:, :1]),
        (*BTNH, BIAS),
        ATTENTION,
        {"present=1"},
    ),
    "bias before scale": (
        changed(lambda s, b: (s + b) * 0.5),
        (*BTNH, BIAS),
        ATTENTION,
        {"present=1"},
    ),
    "relative positions": (
        lambda q, k, v, r: attend(q, k, v, lambda s: s + jnp.einsum("bthd,tsd->bhts", q, r)),
        (*BTNH, normal(T, T, H, seed=9)),
        ATTENTION,
        {"present=1"},
    ),
    "mask of -1e9": (
        changed(lambda s, m: jnp.where(m, s, -1e9)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "mask of -inf": (
        changed(lambda s, m: jnp.where(m, s, -jnp.inf)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "negated mask": (
        changed(lambda s, m: jnp.where(~m, LOWEST, s)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "causal constant of -inf": (
        changed(lambda s: jnp.where(CAUSAL, s, -jnp.inf)),
        BTNH,
        ATTENTION,
        {"is_causal=1", "present=0"},
    ),
    "causal by iota": (
        changed(lambda s: jnp.where(jnp.arange(T)[:, None] >= jnp.arange(T)[None, :], s, LOWEST)),
        BTNH,
        ATTENTION,
        {"is_causal=1", "present=0"},
    ),
    "causal and padding": (
        changed(lambda s, m: jnp.where(CAUSAL & m, s, LOWEST)),
        (*BTNH, PADDING),
        ATTENTION,
        {"is_causal=1", "present=2", "bool[2,1,1,16]"},
    ),
    "causal and padding of -inf": (
        changed(lambda s, m: jnp.where(CAUSAL, jnp.where(m, s, -jnp.inf), -jnp.inf)),
        (*BTNH, PADDING),
        ATTENTION,
        {"is_causal=1", "present=2"},
    ),
    "window by comparison": (
        changed(
            lambda s: jnp.where(abs(jnp.arange(T)[:, None] - jnp.arange(T)[None, :]) < 4, s, LOWEST)
        ),
        BTNH,
        ATTENTION,
        {"window_left=3", "window_right=3", "present=0"},
    ),
    "causal with a past": (
        changed(lambda s: jnp.where(jnp.tril(jnp.ones((T, 2 * T), bool), k=T), s, LOWEST)),
        (BTNH[0], *qkv(B, 2 * T, N, H)[1:]),
        ATTENTION,
        {"window_right=16", "present=0"},
    ),
    "a constant mask without keys for one query": (
        changed(lambda s: jnp.where(CAUSAL & (jnp.arange(T) > 0), s, -jnp.inf)),
        BTNH,
        ATTENTION,
        {"present=2"},
    ),
    "anti-causal": (
        changed(lambda s: jnp.where(CAUSAL.T & ~jnp.eye(T, dtype=bool), s, LOWEST)),
        BTNH,
        ATTENTION,
        {"is_causal=0", "present=2"},
    ),
    "mask of a cache": (
        lambda q, k, v, m, i: attend(
            q, k, v, lambda s: jnp.where(jax.lax.dynamic_slice(m, (i, 0), (T, T)), s, LOWEST)
        ),
        (*BTNH, jnp.tril(jnp.ones((64, T), bool)), 3),
        ATTENTION,
        {"present=2"},
    ),
    "added mask": (
        changed(lambda s, m: s + jnp.where(m, 0.0, LOWEST)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "added mask by product": (
        changed(lambda s, m: s + (1 - m.astype(s.dtype)) * -1e9),
        (*BTNH, MASK),
        ATTENTION,
        {"present=1", "f32[2,1,16,16]"},
    ),
    "mask by product": (
        changed(lambda s, m: s * m.astype(s.dtype) - 1e10 * (1 - m.astype(s.dtype))),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "negated mask by product": (
        changed(lambda s, m: -1e10 * jnp.where(m, 0.0, 1.0) + (1 - jnp.where(m, 0, 1)) * s),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "constant mask by product": (
        changed(lambda s: s * CAUSAL.astype(s.dtype) + -1e9 * (1 - CAUSAL.astype(s.dtype))),
        BTNH,
        ATTENTION,
        {"is_causal=1", "present=0"},
    ),
    # Queries without any key tell the order in which masks are applied.
    "selection, then sum": (
        changed(lambda s, m: jnp.where(CAUSAL, s, LOWEST) + jnp.where(m, 0.0, LOWEST)),
        (*BTNH, PADDING),
        ATTENTION,
        {"present=1", "is_causal=0"},
    ),
    "sum, then selection": (
        changed(lambda s, m: jnp.where(CAUSAL, s + jnp.where(m, 0.0, LOWEST), LOWEST)),
        (*BTNH, PADDING),
        ATTENTION,
        {"present=1"},
    ),
    "selections of two numbers": (
        changed(lambda s, m: jnp.where(CAUSAL, jnp.where(m, s, -1e30), LOWEST)),
        (*BTNH, PADDING),
        ATTENTION,
        {"present=1"},
    ),
    # Weights that are masked once more: those of queries without any key are 0.
    "where": (
        weighted(lambda s, m: jax.nn.softmax(s, where=m)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2", "bool[2,1,16,16]"},
    ),
    "where, bias and causal": (
        weighted(lambda s, m: jax.nn.softmax(s + BIAS, where=CAUSAL & m)),
        (*BTNH, PADDING),
        ATTENTION,
        {"present=3", "is_causal=1", "bool[2,1,1,16]"},
    ),
    "where causal": (
        weighted(lambda s: jax.nn.softmax(s, where=CAUSAL)),
        BTNH,
        ATTENTION,
        {"present=0", "is_causal=1"},
    ),
    "where lengths": (
        weighted(lambda s, n: jax.nn.softmax(s, where=jnp.arange(T) < n[:, None, None, None])),
        (*BTNH, jnp.array([0, 5])),
        ATTENTION,
        {"present=8"},
    ),
    "where and groups": (
        gemma_masked_again,
        (*GROUPED, MASK[:, 0]),
        ATTENTION,
        {"f32[2,16,2,8]", "bool[2,1,16,16]"},
    ),
    "masked again": (
        weighted(lambda s, m: jnp.where(m, jax.nn.softmax(jnp.where(~m, LOWEST, s)), 0)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "masked again, of -inf": (
        weighted(lambda s, m: jnp.where(m, jax.nn.softmax(jnp.where(m, s, -jnp.inf)), 0)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "masked again by product": (  # as Keras
        weighted(lambda s, m: jax.nn.softmax(jnp.where(m, s, -1e9)) * m.astype(s.dtype)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "masked again by product, of -inf": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(m, s, -jnp.inf)) * m),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "masked by two numbers, again in parts": (
        weighted(
            lambda s, m: (
                jnp.where(CAUSAL, jax.nn.softmax(jnp.where(CAUSAL, s + added(m), -1e30)), 0) * m
            )
        ),
        (*BTNH, PADDING),
        ATTENTION,
        {"present=2", "is_causal=1"},
    ),
    "masked again in part where each query has keys": (
        weighted(
            lambda s: CAUSAL * jax.nn.softmax(jnp.where(CAUSAL & jnp.triu(CAUSAL, -3), s, LOWEST))
        ),
        BTNH,
        ATTENTION,
        {"window_left=3", "window_right=0", "present=0"},
    ),
    # Divided by the sums after the product with the values.
    "divided at last": (divided(divided_at_last), BTNH, ATTENTION, {"present=0"}),
    "divided at last, heads first": (
        divided(
            lambda e, y: y / e.sum(-1, keepdims=True),
            lambda s, b, m: jnp.where(m, s + b, LOWEST),
            "bhts,bshd->bhtd",
        ),
        (*BTNH, BIAS, MASK),
        ATTENTION,
        {"present=3"},
    ),
    "divided at last, masked by -inf": (
        divided(divided_at_last, lambda s, m: jnp.where(m, s, -jnp.inf)),
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "divided at last, masked again": (
        divided_and_masked_again,
        (*BTNH, MASK),
        ATTENTION,
        {"present=2"},
    ),
    "divided groups": (divided_groups, (*GROUPED, MASK[:, :, None]), ATTENTION, {"f32[2,16,2,8]"}),
    "named": (named, BTNH, ATTENTION, {"is_causal=1", "name=query", "name=out"}),
    # Factors of the weights that do not depend on the key.
    "head mask": (head_mask, (*BTNH, jnp.array([1, 0, 1, 2])), ATTENTION, {"present=0"}),
    "head mask by product": (
        head_mask_by_product,
        (*BTNH, normal(B, N, 1, 1, seed=3)),
        ATTENTION,
        {"present=0"},
    ),
    # Packed query, key and value.
    "packed": (
        lambda x: attend(x[:, :, 0], x[:, :, 1], x[:, :, 2]),
        (normal(B, T, 3, N, H),),
        PACKED,
        {"f32[2,16,3,4,8]"},
    ),
    "packed heads first": (unpack_einops, (normal(B, T, 3 * N * H),), PACKED, {"f32[2,16,3,4,8]"}),
    "packed by head": (
        lambda x: attend(*jnp.split(x.reshape(B, T, N, 3 * H), 3, axis=3)),
        (normal(B, T, 3 * N * H),),
        PACKED,
        {"f32[2,16,4,3,8]"},
    ),
    "packed, transposed by reshape": (
        lambda x: attend(*(lambda y: (y[:, :, 0], y[:, :, 1], y[:, :, 2]))(transposed_reshape(x))),
        (normal(T, B, 3 * N * H),),
        ATTENTION,
        set(),
    ),
    # Jitted helpers that make its inputs.
    "jitted split of heads": (
        lambda q, k, v: attend_heads_first(*map(jitted_heads_first, (q, k, v))),
        tuple(x.reshape(B, T, N * H) for x in BTNH),
        ATTENTION,
        {"f32[2,16,4,8]"},
    ),
    "jitted padding": (
        changed(lambda s, m: jnp.where(jitted_padding(m), s, LOWEST)),
        (*BTNH, COUNTS),
        ATTENTION,
        {"present=2", "bool[2,1,1,16]"},
    ),
    "jitted padding and causal": (
        changed(
            lambda s, m: jnp.where(
                jax.jit(lambda m: jitted_padding(m) & jnp.tril(jnp.ones((T, T), bool)))(m),
                s,
                LOWEST,
            )
        ),
        (*BTNH, COUNTS),
        ATTENTION,
        {"is_causal=1", "bool[2,1,1,16]"},
    ),
    "jitted negation": (
        changed(lambda s, m: jnp.where(jax.jit(lambda m: ~jitted_padding(m))(m), LOWEST, s)),
        (*BTNH, COUNTS),
        ATTENTION,
        {"present=2"},
    ),
    "jitted bias": (
        changed(lambda s, b: s + jax.jit(lambda b: jnp.broadcast_to(2 * b, s.shape))(b)),
        (*BTNH, BIAS[:1, :1]),
        ATTENTION,
        {"present=1"},
    ),
    "jitted repeat": (
        repeated(lambda x, n: jax.jit(lambda x: jnp.repeat(2 * x, n, axis=2))(x)),
        GROUPED,
        ATTENTION,
        {"f32[2,16,2,8]"},
    ),
    "jitted head mask": (
        lambda q, k, v, f: head_mask(q, k, v, jax.jit(lambda f: (f * f).reshape(N))(f)),
        (*BTNH, jnp.array([[1.0, 0.0], [1.0, 2.0]])),
        ATTENTION,
        {"present=0"},
    ),
    "packed with another order": (
        lambda x: attend(x[:, :, 1], x[:, :, 0], x[:, :, 2]),
        (normal(B, T, 3, N, H),),
        ATTENTION,
        set(),
    ),
}
# jax.nn masks these rows of -inf only with numbers that are finite.
NAN = {
    "divided at last, masked by -inf",
    "divided at last, masked again",
    "masked again by product, of -inf",
    "mask of -inf",
    "causal and padding of -inf",
    "a constant mask without keys for one query",
}


def program(fun, *args) -> str:
    return str(jax.make_jaxpr(quake_jax.accelerate(fun))(*args))


@pytest.mark.parametrize("name", CASES)
def test_attention_is_replaced(name):
    fun, args, replaced, parameters = CASES[name]
    assert replacements(fun, *args) == replaced
    fast = quake_jax.accelerate(fun)
    closed = jax.make_jaxpr(fast)(*args)
    assert not {p for p in parameters if p not in str(closed)}
    left = primitives(closed)
    assert left.count("quake_dot_product_attention") == 1
    assert "exp" not in left and "reduce_max" not in left
    actual, expected = fast(*args), jax.jit(fun)(*args)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert bool(jnp.isnan(expected).any()) == (name in NAN)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def in_16_bits(x, dtype):
    return x.astype(dtype) if getattr(x, "dtype", None) == jnp.float32 else x


# In float16 the others do not run, mask by what is -inf there, or stay (ROUNDING).
IN_FLOAT16 = ["flax", "equinox", "packed", "groups by repeat", "where", "divided at last"]
IN_BFLOAT16 = [
    *IN_FLOAT16,
    "huggingface",
    "jax.nn causal",
    "haiku",
    "heads first, mask",
    "masked again by product",
]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, "bfloat16") for n in IN_BFLOAT16] + [(n, "float16") for n in IN_FLOAT16],
)
def test_dtypes(name, dtype):
    fun, args, replaced, _ = CASES[name]
    short = [in_16_bits(x, dtype) for x in args]
    assert replacements(fun, *short) == replaced
    actual = quake_jax.accelerate(fun)(*short)
    assert actual.dtype == dtype
    expected = jax.jit(fun)(
        *(
            jnp.asarray(x, jnp.float32) if in_16_bits(y, dtype) is not y else y
            for x, y in zip(short, args, strict=True)
        )
    )
    np.testing.assert_allclose(
        np.asarray(actual, np.float32),
        expected,
        rtol=8 * jnp.finfo(dtype).eps,
        atol=4 * float(jnp.finfo(dtype).eps),
    )


def test_float32_softmax_of_16_bit_operands():
    q, k, v = (x.astype(jnp.bfloat16) for x in BTNH)

    def fun(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(s * 0.3)
        return jnp.einsum("bhts,bshd->bthd", weights, v)  # float32

    assert replacements(fun, q, k, v) == ATTENTION
    actual, expected = quake_jax.accelerate(fun)(q, k, v), fun(q, k, v)
    assert actual.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "jax.nn bias, mask, causal, groups",
        "nanogpt",
        "equinox",
        "gemma",
        "groups among queries",
        "soft cap, bias and mask",
        "mask by product",
        "vmap over queries",
        "added mask by product",
        "learned temperature",
        "where",
        "where and groups",
        "masked again by product",
        "named",
        "divided at last, heads first",
        "divided groups",
    ],
)
def test_derivatives(name):
    fun, args, _, _ = CASES[name]
    args = [x for x in args]
    moving = [i for i, x in enumerate(args) if x.dtype == jnp.float32]
    fast = quake_jax.accelerate(fun)

    def loss(f):
        return lambda *x: jnp.sum(jnp.sin(f(*x)))

    grads = [jax.jit(jax.grad(loss(f), moving))(*args) for f in (fast, fun)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", ["small", "large", "padding on the left"])
def test_a_bias_after_the_mask(bias):
    """It may show in the mask's numbers: of queries without any key, or where it is as large."""
    padding = jnp.where(jnp.arange(T) < 5, -1e9, 0.0)[None, None, None]
    bias = {"small": BIAS, "large": 1e4 * BIAS, "padding on the left": padding}[bias]
    fun = changed(lambda s, m, b: jnp.where(CAUSAL & m, s, -1e9) + b)
    fast = quake_jax.accelerate(fun)
    for mask in (MASK, jnp.array(True), CAUSAL.T):
        args = (*BTNH, mask, bias)
        assert replacements(fun, *args) == ATTENTION
        np.testing.assert_allclose(fast(*args), fun(*args), rtol=1e-5, atol=1e-5)
        grads = [
            jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), (0, 1, 2, 4)))(*args)
            for f in (fast, fun)
        ]
        for a, b in zip(*grads, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# Whether the logits of a query without any key have derivatives depends on how it is masked: those
# that a mask is added to do, those that it replaces do not, nor a bias in them.
KEYLESS = {
    "sum": lambda s, m, b: s + b + added(m),
    "sum of -1e30, scaled": lambda s, m, b: (s + added(m, -1e30) + b) * 0.5,
    "sum of a conjunction": lambda s, m, b: s + added(m & CAUSAL) + b,
    "selection": lambda s, m, b: jnp.where(m, s + b, LOWEST),
    "selection, then a bias": lambda s, m, b: jnp.where(m, s, LOWEST) + b,
    "two sums": lambda s, m, b: s + added(CAUSAL, -1e30) + added(m, -1e35) + b,
    "selection, then sum": lambda s, m, b: jnp.where(CAUSAL, s + b, LOWEST) + added(m, -1e37),
    "sum, then selection": lambda s, m, b: jnp.where(CAUSAL, s + added(m, -1e37), LOWEST) + b,
    "selections of two numbers": lambda s, m, b: jnp.where(
        CAUSAL, jnp.where(m, s + b, -1e30), LOWEST
    ),
    "soft cap": lambda s, m, b: 5 * jnp.tanh(s / 5) + b + added(m),
    "selection by product": lambda s, m, b: (s + b) * m - 1e10 * (1 - m.astype(s.dtype)),
    "selection of -1e9, then a bias": lambda s, m, b: jnp.where(m, s, -1e9) + b,
    "sum, scaled, then a bias": lambda s, m, b: (s + added(m, -1e30)) * 0.5 + b,
    "selection, a bias, scaled, a bias": lambda s, m, b: (
        (jnp.where(m, s, -1e30) + b) * 0.5 + b[..., :1]
    ),
}


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        *((name, "array") for name in KEYLESS),
        ("sum", "lengths"),
        ("selection, then a bias", "lengths"),
        ("selection of -1e9, then a bias", "lengths"),
        ("sum", "constant"),
    ],
)
def test_derivatives_of_queries_without_keys(name, mask):
    # No query of the second batch has a key, whatever else masks.
    masks = {"array": MASK.at[1].set(False), "lengths": jnp.array([9, 0])}
    args = (*BTNH, BIAS, *((masks[mask],) if mask in masks else ()))

    def fun(q, k, v, b, m=masks["array"]):
        m = jnp.arange(T) < m[:, None, None, None] if mask == "lengths" else m
        return attend(q, k, v, lambda s: KEYLESS[name](s, m, b))

    assert replacements(fun, *args) == ATTENTION

    def derivatives(f):
        """The derivatives and, of some, their own in one direction."""
        slopes = jax.grad(lambda *x: jnp.sum(jnp.sin(f(*x))), range(4))
        if name not in ("sum", "selection, then a bias"):
            return jax.jit(slopes)(*args)
        directions = jax.tree.map(jnp.cos, args[:4])
        return jax.jit(lambda *x: jax.jvp(lambda *y: slopes(*y, *x[4:]), x[:4], directions))(*args)

    results = (jax.tree.leaves(derivatives(f)) for f in (quake_jax.accelerate(fun), fun))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


# What must not become attention; the softmax in it may still be replaced.


def scores_too(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v), s


def weights_too(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", weights, v), weights


def over_queries(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, axis=-2), v)


def over_heads(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, axis=1), v)


def over_both(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, axis=(-2, -1)), v)


def rounded(x):
    return jnp.round(x * 16).astype(jnp.int8)


def in_8_bits(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", rounded(q), rounded(k), preferred_element_type=jnp.int32)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s.astype(jnp.float32) / 256), v)


def values_in_8_bits(q, k, v):
    weights = rounded(jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)))
    return jnp.einsum("bhts,bshd->bthd", weights, rounded(v), preferred_element_type=jnp.int32)


def other_product(q, k, v):
    """Scores of 16 x 16 numbers that take no part in the last product's sum."""
    weights = jnp.sin(jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k)))
    return jnp.einsum("bhts,hd->bdts", weights, v[0, 0])


def transposed_weights(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bthd->bshd", jax.nn.softmax(s), v)


def top_k(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    least = jax.lax.top_k(s, 4)[0][..., -1:]
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(s >= least, s, -jnp.inf)), v)


def dropout(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    keep = jnp.arange(weights.size).reshape(weights.shape) % 7 > 0
    return jnp.einsum("bhts,bshd->bthd", jnp.where(keep, weights / 0.9, 0), v)


def linear(q, k, v):
    return jnp.einsum("bthd,bhde->bthe", jax.nn.softmax(q), jnp.einsum("bshd,bshe->bhde", k, v))


def sharpened(q, k, v):
    return attend(q, k, v, lambda s: s * jnp.abs(s))


def clipped(q, k, v):
    return attend(q, k, v, lambda s: jnp.clip(s, -2, 2))


def talking_heads(q, k, v):
    s = jnp.einsum("bthd,bshd->bhts", q, k)
    s = jnp.einsum("bhts,hg->bgts", s, jnp.eye(N) + 0.1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)


STAYING = {
    "weights masked alone": (
        weighted(lambda s, m: jax.nn.softmax(s) * m),
        (*BTNH, MASK),
        "masked by others than its logits",
    ),
    "weights masked by more": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(m, s, -1e9)) * (CAUSAL & m)),
        (*BTNH, MASK),
        "masked by others than its logits",
    ),
    "weights masked by less": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(CAUSAL & m, s, -1e9)) * m),
        (*BTNH, MASK),
        "masked by others than its logits",
    ),
    "logits masked before where": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(CAUSAL, s, -1e9), where=m)),
        (*BTNH, MASK),
        "masked by others than its logits",
    ),
    "weights masked by the opposite": (
        weighted(lambda s, m: jnp.where(m, 0, jax.nn.softmax(jnp.where(m, s, -1e9)))),
        (*BTNH, MASK),
        "masked by others than its logits",
    ),
    "weights masked along queries": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(m, s, -1e9)) * m.swapaxes(-1, -2)),
        (*BTNH, MASK),
        "masked by others than its logits",
    ),
    "weights masked, but not by 0": (
        weighted(lambda s, m: jnp.where(m, jax.nn.softmax(jnp.where(m, s, -1e9)), 1e-9)),
        (*BTNH, MASK),
        "softmax and its values is select_n",
    ),
    "weights masked by other numbers than 0 and 1": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(m, s, -1e9)) * jnp.where(m, 1.0, 2.0)),
        (*BTNH, MASK),
        "depends on the key",
    ),
    "masked by -inf and another number, again by product": (
        weighted(
            lambda s, m: (
                jax.nn.softmax(jnp.where(CAUSAL, jnp.where(m, s, -1e30), -jnp.inf)) * (CAUSAL & m)
            )
        ),
        (*BTNH, PADDING),
        "may get NaN, or 0",
    ),
    "a bias after the mask, masked again": (
        weighted(lambda s, m: jax.nn.softmax(jnp.where(m, s, -1e9) + BIAS) * m),
        (*BTNH, MASK),
        "a bias is added after its mask",
    ),
    "scores returned": (scores_too, BTNH, "its dot_general is a result"),
    "weights returned": (weights_too, BTNH, "its div is a result"),
    "softmax over parts of the keys": (
        weighted(lambda s: jax.nn.softmax(s.reshape(B, N, T, 2, -1)).reshape(s.shape)),
        BTNH,
        "another axis",
    ),
    "softmax over queries": (over_queries, BTNH, None),
    "softmax over heads": (over_heads, BTNH, "query and key share"),
    "weights transposed": (transposed_weights, BTNH, "another axis"),
    "top k": (top_k, BTNH, "used elsewhere"),
    "softmax over queries and keys": (over_both, BTNH, "more than one axis"),
    "a factor of the keys": (key_factor, BTNH, "depends on the key"),
    "dropout": (dropout, BTNH, "softmax and its values is div"),
    "another scale per head and key": (
        changed(lambda s, m: s * m - 1e10 * (1 - m)),
        (*BTNH, 0.5 + 0.5 * MASK),
        "product and its softmax is mul",
    ),
    "numbers that are a mask only if they are 0 and 1": (
        changed(lambda s, m: s * m.astype(s.dtype) - 1e10 * (1 - m.astype(s.dtype))),
        (*BTNH, MASK.astype(jnp.int32)),
        "product and its softmax is mul",
    ),
    "-inf times a mask": (
        changed(
            lambda s, m: (
                jnp.where(CAUSAL, s, -jnp.inf) * m.astype(s.dtype) - 1e10 * (1 - m.astype(s.dtype))
            )
        ),
        (*BTNH, MASK),
        "product and its softmax is mul",
    ),
    "a maximum": (
        changed(lambda s: jnp.maximum(s, -1.0)),
        BTNH,
        "product and its softmax is max",
    ),
    "8-bit product": (in_8_bits, BTNH, "of int8"),
    "8-bit values": (values_in_8_bits, BTNH, "softmax and its values is round"),
    "another product of the weights": (other_product, BTNH, None),
    "linear attention": (linear, qkv(B, 64, N, H), None),
    "a product of scores": (sharpened, BTNH, "product and its softmax is mul"),
    "clipped scores": (clipped, BTNH, "product and its softmax is max"),
    "talking heads": (talking_heads, BTNH, None),
    "masked by -1e4": (changed(lambda s, m: jnp.where(m, s, -1e4)), (*BTNH, MASK), "-10000"),
    "masked by NaN": (changed(lambda s, m: jnp.where(m, s, jnp.nan)), (*BTNH, MASK), "nan"),
    "doubled scores": (changed(lambda s: s + s), BTNH, "used twice"),
    "scores in 8 bits": (
        changed(lambda s: s.astype(jnp.float8_e4m3fn).astype(jnp.float32)),
        BTNH,
        "a conversion from float32 to float8_e4m3fn",
    ),
    "masked by 0": (changed(lambda s, m: jnp.where(m, s, 0.0)), (*BTNH, MASK), "masked by 0"),
    "two masks, not huge": (
        changed(lambda s, m: jnp.where(CAUSAL, jnp.where(m, s, -2e9), -1e9)),
        (*BTNH, MASK),
        "different numbers",
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_only_looks_like_attention(name):
    fun, args, reason = STAYING[name]
    assert replacements(fun, *args) == ["softmax"]
    if reason is not None:
        assert reason in reasons(fun, *args)["attention"]
    actual, expected = quake_jax.accelerate(fun)(*args), jax.jit(fun)(*args)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


# name: (what divides the product, why it stays if that is said)
DIVIDED_OTHERWISE = {
    "by more": (lambda e, y: y / (e.sum(-1).swapaxes(1, 2)[..., None] + 1e-3), None),
    "by a maximum": (lambda e, y: y / e.max(-1).swapaxes(1, 2)[..., None], None),
    "by sums of other rows": (lambda e, y: y / e.sum(-1)[..., None], "of other rows"),
    "by sums of all rows": (lambda e, y: y / e.sum((2, 3))[:, None, :, None], "more than one axis"),
    "by sums over queries": (lambda e, y: y / e.sum(2).swapaxes(1, 2)[..., None], "another axis"),
    "twice": (lambda e, y: divided_at_last(e, y) / e.sum(-1)[..., None], "is used elsewhere"),
    "with the sums returned": (
        lambda e, y: (divided_at_last(e, y), e.sum(-1)),
        "is used elsewhere",
    ),
    "with the product returned": (lambda e, y: (divided_at_last(e, y), y), "is a result"),
    "by sums in the values' place": (lambda e, y: e.sum(-1).swapaxes(1, 2)[..., None] / y, None),
}


@pytest.mark.parametrize("name", DIVIDED_OTHERWISE)
def test_what_is_divided_otherwise_stays(name):
    divide, reason = DIVIDED_OTHERWISE[name]
    args = qkv(B, T, T, H)  # as many heads as queries, whose axes then look alike
    fun = divided(divide)
    assert replacements(fun, *args) == []
    if reason is not None:
        assert reason in reasons(fun, *args)["attention"]


def test_a_bias_after_a_mask_that_is_rounded_stays():
    fun = changed(lambda s, m: (jnp.where(m, s, -1e9) + BIAS).astype(jnp.bfloat16))
    assert replacements(fun, *BTNH, MASK) == ["softmax"]
    assert "a conversion from float32 to bfloat16" in reasons(fun, *BTNH, MASK)["attention"]


def test_weights_in_8_bits_stay():
    def fun(q, k, v):
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        return jnp.einsum("bhts,bshd->bthd", weights.astype(jnp.float8_e4m3fn).astype(q.dtype), v)

    assert replacements(fun, *BTNH) == ["softmax"]


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        # Numbers that are -inf in 16 bits: queries without any key get NaN.
        ("float16", lambda s, m: jnp.where(m, s, -jnp.inf)),
        ("bfloat16", lambda s, m: s + jnp.where(m, 0, LOWEST).astype(s.dtype)),
        ("bfloat16", lambda s, m: jnp.where(m, s.astype(jnp.float32), LOWEST).astype(s.dtype)),
        # Those that are not.
        ("float16", lambda s, m: jnp.where(m, s, jnp.finfo(s.dtype).min)),
        ("bfloat16", lambda s, m: jnp.where(m, s, jnp.finfo(s.dtype).min)),
    ],
)
def test_masks_in_16_bits(dtype, change):
    short = [x.astype(dtype) for x in BTNH]
    fun = changed(change)
    assert replacements(fun, *short, MASK) == ATTENTION
    check_16_bits(fun, *short, MASK)


def check_16_bits(fun, *args):
    actual, expected = (
        np.asarray(f(*args), np.float32) for f in (quake_jax.accelerate(fun), jax.jit(fun))
    )
    eps = float(jnp.finfo(args[0].dtype).eps)
    np.testing.assert_allclose(actual, expected, rtol=8 * eps, atol=8 * eps)


# What a mask adds rounds logits in 16 bits, which shows where a query sees no key.
ROUNDING = {
    "lowest": ("float16", lambda s, m: s + added(m, -65504.0).astype(s.dtype)),
    "two of the lowest": (
        "float16",
        lambda s, m: (
            s + added(m, -65504.0).astype(s.dtype) + added(CAUSAL, -65504.0).astype(s.dtype)
        ),
    ),
    "by product": ("float16", lambda s, m: s - (1 - m.astype(s.dtype)) * 65504),
    "-1e4": ("bfloat16", lambda s, m: s + added(m, -1e4).astype(s.dtype)),
    "clamped": (
        "float16",
        lambda s, m: s + jnp.maximum(added(m, -65504.0) + added(CAUSAL, -65504.0), -65504.0),
    ),
    "stopped, in parts": (
        "float16",
        lambda s, m: (
            s
            + jax.lax.stop_gradient(
                jnp.concatenate([added(x, -65504.0) for x in (m[..., :5, :], m[..., 5:, :])], -2)
            )
        ),
    ),
    "constant": (
        "float16",
        lambda s, m: s + np.where(np.arange(T)[:, None] < 5, -65504, 0).astype(s.dtype) + 0 * m,
    ),
}
# Of these it is not seen that each query of a causal mask sees a key.
NOT_TAKEN_APART = {"by product", "clamped", "stopped, in parts", "constant"}


@pytest.mark.parametrize("name", ROUNDING)
def test_sums_that_round_logits_stay_where_a_query_may_see_no_key(name):
    dtype, change = ROUNDING[name]
    short = [x.astype(dtype) for x in BTNH]
    fun = changed(change)
    report = quake_jax.explain(fun, *short, MASK)
    assert [r.replacement for r in report.replaced] == ["quake_jax.softmax"]
    assert any("may see no key" in r.reason for r in report.left)
    check_16_bits(fun, *short, MASK)
    # Not so where each sees some.
    seen = lambda q, k, v: fun(q, k, v, CAUSAL)  # noqa: E731
    is_known = name not in NOT_TAKEN_APART
    assert replacements(seen, *short) == (ATTENTION if is_known else ["softmax"])
    check_16_bits(seen, *short)


def test_a_sum_that_rounds_between_groups_of_heads():
    """Its mask is known, by labels that cutting heads into groups changes."""

    def fun(q, k, v):
        s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(B, T, 2, 2, H), k).reshape(B, N, T, -1)
        weights = jax.nn.softmax(s + added(CAUSAL, -1e4).astype(s.dtype)).reshape(B, 2, 2, T, -1)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)

    short = [x.astype("bfloat16") for x in GROUPED]
    assert replacements(fun, *short) == ATTENTION
    check_16_bits(fun, *short)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(check_vma):
    """Heads apart, and what all devices share beside them: its gradient is summed up."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, shared = jax.P(None, None, "x"), jax.P()
    fun = jax.shard_map(
        changed(lambda s, bias: s + bias),
        mesh=mesh,
        in_specs=(heads, shared, shared, shared),
        out_specs=heads,
        check_vma=check_vma,
    )
    args = (BTNH[0], *(x[:, :, :1] for x in BTNH[1:]), BIAS[0, 0])
    fast = quake_jax.accelerate(fun)
    assert replacements(fun, *args) == ATTENTION
    for transform in (lambda f: f, lambda f: jax.grad(lambda *x: jnp.sum(f(*x) ** 2), range(4))):
        actual, expected = (jax.jit(transform(f))(*args) for f in (fast, fun))
        for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def iotas(queries, keys):
    return (jax.lax.broadcasted_iota(jnp.int32, (1, 1, queries, keys), d) for d in (2, 3))


def compared(compare):
    """A mask of the positions of queries and keys, and of arguments."""
    return lambda t, s, *x: compare(*iotas(t, s), *x)


# name: (mask of T, S and lengths, parameters of the kernel)
POSITIONS = {
    "causal": (compared(lambda i, j: i >= j), {"is_causal=1", "present=0"}),
    "of a float": (
        lambda t, s: jnp.tril(jnp.ones((t, s))) != 0,
        {"is_causal=1", "present=0"},
    ),
    "selected": (
        compared(lambda i, j: jnp.where(i >= j, 0.0, -1e9) > -1),
        {"is_causal=1", "present=0"},
    ),
    "flax": (
        lambda t, s, n: linen.combine_masks(
            linen.make_causal_mask(jnp.ones((1, t))), (jnp.arange(s) < n[:, None])[:, None, None]
        ),
        {"is_causal=1", "present=8"},
    ),
    "distance": (
        compared(lambda i, j: abs(i - j) <= 7),
        {"window_left=7", "window_right=7", "present=0"},
    ),
    "none of two": (
        compared(lambda i, j: ~((i < j) | (j <= i - 9))),
        {"window_left=8", "window_right=0", "present=0"},
    ),
    "two triangles": (
        lambda t, s: jnp.triu(jnp.tril(jnp.ones((t, s)), 3), -5).astype(bool),
        {"window_left=5", "window_right=3", "present=0"},
    ),
    "between": (
        compared(lambda i, j: (j > i - 4) & (j < jnp.minimum(i + 3, 2 * i + 99))),
        {"present=2"},
    ),
    "floats": (
        compared(lambda i, j: i.astype(jnp.float32) + 0.5 >= j.astype(jnp.float32)),
        {"present=2"},
    ),
    "later": (compared(lambda i, j: i <= j), {"window_left=0", "window_right=16384", "present=0"}),
    # Some queries keep no key, which a window has no word for.
    "strictly earlier": (compared(lambda i, j: i > j), {"present=2", "window_left=-1"}),
    "blocks": (compared(lambda i, j: i // 4 >= j // 4), {"present=2", "window_left=-1"}),
    "key lengths": (compared(lambda i, j, n: j < n[:, None, None, None]), {"present=8"}),
    "key lengths, not strict": (
        compared(lambda i, j, n: (j + 1 <= n[:, None, None, None]) & (9 > j) & (i >= j)),
        {"present=8", "is_causal=1"},
    ),
    "lengths of both": (
        compared(lambda i, j, n: (i < n[:, None, None, None]) & (n[:, None, None, None] > j)),
        {"present=10"},
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_masks_by_position(name):
    """Of more elements than are evaluated, from their equations; and the same in small."""
    mask, parameters = POSITIONS[name]
    has_lengths = bool({"present=8", "present=10"} & parameters)

    def fun(number):
        return lambda q, k, v, *n: attend(
            q, k, v, lambda s: jnp.where(mask(q.shape[1], k.shape[1], *n), s, number)
        )

    large = jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)
    n = jax.ShapeDtypeStruct((1,), jnp.int32)
    text = program(fun(LOWEST), *3 * (large,), *has_lengths * (n,))
    assert not {p for p in parameters if p not in text}
    lengths = has_lengths * (jnp.array([0, 5], jnp.int32),)
    for number in (LOWEST, -jnp.inf):
        assert replacements(fun(number), *BTNH, *lengths) == ATTENTION
        actual = quake_jax.accelerate(fun(number))(*BTNH, *lengths)
        np.testing.assert_allclose(actual, fun(number)(*BTNH, *lengths), rtol=1e-5, atol=1e-5)


def test_only_and_order():
    def names(**options):
        return replacements(quake_jax.accelerate(attend, **options), *BTNH)

    assert names(only={"softmax"}) == ["softmax"]
    assert names(only={"attention"}) == ATTENTION
    assert names(only={"gelu"}) == []
    text = program(attend, *BTNH)
    assert "order=5" in text and "order=3" not in text
    assert reasons(attend, *(x[:1, :2, :2] for x in BTNH))["attention"] == "too small (8 weights)"
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in BTNH]
        assert replacements(attend, *wide) == []
        assert reasons(attend, *wide)["attention"] == "dtype float64"


# Models.


class Gpt(linen.Module):
    """A pre-norm Transformer with everything written out, its layers under nn.scan."""

    layers: int = 3

    @linen.compact
    def __call__(self, x):
        def layer(module, x, _):
            y = linen.LayerNorm(parent=module, name="a")(x)
            w = [
                module.param(name, linen.initializers.lecun_normal(), (32, n))
                for name, n in (("qkv", 96), ("out", 32), ("up", 128))
            ]
            x = x + nanogpt(y, w[0]) @ w[1]
            y = linen.LayerNorm(parent=module, name="b")(x)
            bias = module.param("bias", linen.initializers.normal(), (128,))
            return x + jax.nn.gelu(y @ w[2] + bias) @ w[2].T, None

        class Layer(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                return layer(self, x, _)

        scan = linen.scan(
            linen.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return scan()(x, None)[0]


def test_a_model_with_scanned_layers():
    model, x = Gpt(), normal(B, T, 32)
    parameters = model.init(jax.random.key(0), x)
    assert replacements(model.apply, parameters, x) == ["bias_gelu", *PACKED]
    fast = quake_jax.accelerate(model.apply)
    np.testing.assert_allclose(
        jax.jit(fast)(parameters, x), jax.jit(model.apply)(parameters, x), rtol=1e-3, atol=1e-3
    )
    left = primitives(jax.make_jaxpr(fast)(parameters, x))
    assert not set(left) & {"exp", "tanh"}

    def loss(f):
        return lambda p: jnp.mean(f(p, x) ** 2)

    grads = [jax.jit(jax.grad(loss(f)))(parameters) for f in (fast, model.apply)]
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_flax_attention_with_a_cache():
    class Decoder(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.MultiHeadDotProductAttention(N, decode=True)(x)

    model, x = Decoder(), normal(B, 64, 32)
    variables = model.init(jax.random.key(0), x)

    def step(variables, x):
        return model.apply(variables, x, mutable="cache")

    fast = quake_jax.accelerate(step)
    token = x[:, :1]
    assert replacements(step, variables, token) == ATTENTION
    for _ in range(3):
        (a, state), (b, _) = fast(variables, token), step(variables, token)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        variables, token = {**variables, **state}, a


def test_flax_modules():
    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, x, mask):
            for _ in range(2):
                y = linen.LayerNorm()(x)
                x = x + linen.MultiHeadAttention(N)(y, mask=mask)
                y = linen.gelu(linen.Dense(128)(linen.LayerNorm()(x)), approximate=False)
                x = x + linen.Dense(32)(y)
            return x

    model, x = Encoder(), normal(B, T, 32)
    mask = jnp.broadcast_to(PADDING, (B, 1, T, T))
    parameters = model.init(jax.random.key(0), x, mask)
    names = replacements(model.apply, parameters, x, mask)
    assert names == 2 * ["bias_gelu(approximate=False)"] + 2 * ATTENTION
    np.testing.assert_allclose(
        quake_jax.accelerate(model.apply)(parameters, x, mask),
        model.apply(parameters, x, mask),
        rtol=1e-3,
        atol=1e-3,
    )
