"""What is rounded to bfloat16 wherever it is read is given in bfloat16."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import weights_like as normal

import quake_jax
from quake_jax._rewrite import engine, narrow

K, HEADS, SIZE = 64, 4, 16
X = normal(2, 48, K, seed=1)
PARAMS = {name: normal(K, K, seed=i) / 8 for i, name in enumerate("qkvoab")}


def _attention(p, x, scale=SIZE**-0.5):
    q, k, v = ((x @ p[name]).reshape(*x.shape[:2], HEADS, SIZE) for name in "qkv")
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)
    return y.reshape(x.shape) @ p["o"]


def _mlp(p, x):
    return jax.nn.gelu(x @ p["a"]) @ p["b"]


def _norm(x):
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def _pack(fun, monkeypatch=None, **keywords):
    # Programs that have been rewritten are known by what they were.
    engine._rewritten.clear()
    if monkeypatch is not None:
        monkeypatch.setattr(narrow, "narrowed", lambda *_: {})
    fast, packed = quake_jax.pack(fun, PARAMS, X, **({"weights": "bfloat16"} | keywords))
    y = jax.jit(fast)(packed, X)
    engine._rewritten.clear()
    return fast, packed, y


def _narrowed(fast) -> int:
    replaced = itertools.chain(*(report.replaced for report in fast.report.programs))
    return sum(r.count for r in replaced if r.replacement.endswith("→ bfloat16"))


@pytest.mark.parametrize(
    "fun, keywords, count",
    [
        pytest.param(_mlp, {}, 1, id="mlp"),
        pytest.param(lambda p, x: _mlp(p, _norm(x)).T, {}, 1, id="behind a norm"),
        pytest.param(
            lambda p, x: (x @ p["a"]).reshape(-1, 2, K // 2).reshape(-1, K) @ p["b"],
            {},
            1,
            id="moved",
        ),
        pytest.param(lambda p, x: _mlp(p, x) @ p["o"], {}, 2, id="three layers"),
        pytest.param(_attention, {"attention": "bfloat16"}, 2, id="attention"),
        # What keeps its float32:
        pytest.param(_attention, {}, 0, id="attention in float32"),
        pytest.param(
            lambda p, x: _attention(p, x, 0.3 + x[0, 0, 0] / 64),
            {"attention": "bfloat16"},
            0,
            id="attention with a traced scale",
        ),
        pytest.param(_mlp, {"weights": "float32"}, 0, id="float32"),
        pytest.param(_mlp, {"weights": "int8"}, 0, id="rows quantised by their own range"),
        pytest.param(lambda p, x: _norm(x @ p["a"]) @ p["b"], {}, 0, id="before a norm"),
        pytest.param(lambda p, x: (h := x @ p["a"], h @ p["b"]), {}, 0, id="a result too"),
        pytest.param(lambda p, x: (h := x @ p["a"]) @ p["b"] + h, {}, 0, id="a residual too"),
        pytest.param(
            lambda p, x: (x @ p["a"] + x) @ p["b"], {}, 0, id="of a layer with a residual"
        ),
        pytest.param(lambda p, x: jnp.sin(x @ p["a"]) @ p["b"], {}, 0, id="something between"),
    ],
)
def test_gives_the_same_numbers(fun, keywords, count, monkeypatch):
    fast, _, y = _pack(fun, **keywords)
    assert _narrowed(fast) == count
    *_, wide = _pack(fun, monkeypatch, **keywords)
    for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(wide), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        # Where the CPU has no attention in bfloat16, its operands were not rounded before.
        tolerance = 2**-7 * np.abs(b).max() if "attention" in keywords else 0
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_inside_a_call_and_a_loop():
    def layers(p, x):
        return jax.lax.scan(lambda h, _: (jax.jit(_mlp)(p, h), None), x, None, length=3)[0]

    fast, _, y = _pack(layers)
    assert _narrowed(fast) == 1
    one, packed, expected = _pack(_mlp)
    for _ in range(2):
        expected = one(packed, expected)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("moved", [False, True])
def test_what_a_call_takes_and_does_not_use_stays(moved):
    call = jax.jit(lambda x, _: jnp.sin(x) + jnp.cos(x))

    def layers(p, x):
        a = x @ p["a"]
        a = a.reshape(-1, K) if moved else a
        return (a @ p["b"]).reshape(x.shape) + call(x, a)

    def loop(p, x):
        # JAX takes such operands out of other programs.
        body = lambda c: (c[0] + 1, layers(p, c[1]))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] < 2, body, (0, x))[1]

    fast, _, y = _pack(loop)
    assert _narrowed(fast) == 0
    expected = layers(PARAMS, layers(PARAMS, X))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2**-6 * np.abs(expected).max())


def test_derivatives_are_those_of_rounded_activations():
    fast, packed, _ = _pack(_mlp)
    given = jax.grad(lambda x: fast(packed, x).sum())(X)
    exact = jax.grad(lambda x: _mlp(PARAMS, x).sum())(X)
    np.testing.assert_allclose(given, exact, rtol=0, atol=2**-5 * np.abs(exact).max())
