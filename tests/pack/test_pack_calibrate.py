"""pack with calibrate: the ranges of activations, and layers that give codes to the next one."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from support import weights_like as normal

import quake_jax

K, HIDDEN, ROWS = 64, 128, 24


def block(p, x):
    """A feed-forward block."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    h = (x - mean) * lax.rsqrt(var + 1e-5) * p["scale"]
    h = jax.nn.gelu(h @ p["up"] + p["bias"])
    return x + h @ p["down"]


def params(seed=0):
    up, down = normal(K, HIDDEN, seed=seed), normal(HIDDEN, K, seed=seed + 1)
    return {
        "up": up,
        "down": down,
        "bias": normal(HIDDEN, seed=seed + 2),
        "scale": 1 + 0 * up[:, 0],
    }


P = params()
X = np.stack([normal(ROWS, K, seed=i) * (1 + i) for i in range(4)])


def hidden(p, x):
    """What its two weights multiply."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    h = (x - mean) * lax.rsqrt(var + 1e-5) * p["scale"]
    return h, jax.nn.gelu(h @ p["up"] + p["bias"])


def limits(*arrays):
    return [min(0, *(float(x.min()) for x in arrays)), max(0, *(float(x.max()) for x in arrays))]


def pack(fun=block, p=P, x=X[0], **keywords):
    return quake_jax.pack(fun, p, x, **({"weights": "int8"} | keywords))


def replacements(fast) -> list[str]:
    return [r.replacement for report in fast.report.programs for r in report.replaced]


@pytest.mark.parametrize(
    "calibrate",
    [(X[0],), X[0], [X[0]], [(X[0],)], iter([X[0]])],
    ids=["batch", "argument", "arguments", "batches", "iterator"],
)
def test_ranges_are_those_of_the_rows(calibrate):
    fast, packed = pack(calibrate=calibrate)
    rows, inner = hidden(P, X[0])
    np.testing.assert_allclose(packed["up"].activation_range, limits(rows), rtol=1e-5)
    # The first weight is rounded, and GELU too.
    np.testing.assert_allclose(packed["down"].activation_range, limits(inner), rtol=0.02, atol=5e-3)
    assert [x.is_calibrated for x in fast.report.layers] == [True, True]
    assert fast.report.layers[0].format == "int8, int8 rows, calibrated"


def test_the_range_of_all_batches():
    _, packed = pack(lambda p, x: x @ p["up"], calibrate=(X[i] for i in (2, 1)), x=X[0])
    expected = limits(X[1], X[2])
    np.testing.assert_allclose(packed["up"].activation_range, expected, rtol=1e-6)


def test_a_block_is_two_calls_with_codes_between():
    fast, packed = pack(calibrate=X)
    first = "quake_jax.dense(int8, layer_norm, gelu_tanh, bias)"
    assert replacements(fast) == [f"{first} → int8 → quake_jax.dense(int8, residual)"]
    assert "i8[1,24,128] = quake_dense" in str(jax.make_jaxpr(fast)(packed, X[0]))
    norm = quake_jax.LayerNorm(P["scale"], None, 1e-5)
    h = quake_jax.dense(X[0], packed["up"], P["bias"], activation="gelu", norm=norm)
    y = quake_jax.dense(h, packed["down"], residual=X[0])
    np.testing.assert_array_equal(jax.jit(fast)(packed, X[0]), y)
    exact = np.asarray(block(P, X[0]))
    # Half a step of 254 in both products' rows, and of 127 in the weights.
    assert np.linalg.norm(y - exact) < 0.02 * np.linalg.norm(exact)


def test_other_rows_and_gradients():
    """Outside the range rows are clipped; gradients are those of the unpacked weights."""
    fast, packed = pack(lambda p, x: x @ p["up"], calibrate=X[0] / 2)
    low, high = packed["up"].activation_range
    expected = np.clip(X[0], low, high) @ P["up"]
    np.testing.assert_allclose(fast(packed, X[0]), expected, atol=0.1)
    fast, packed = pack(calibrate=X)
    losses = [
        lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))) for f, p in ((fast, packed), (block, P))
    ]
    np.testing.assert_allclose(*(jax.grad(loss)(X[0]) for loss in losses), atol=0.15)


CHAINS = {
    "used twice": (lambda p, x: (h := jnp.tanh(x @ p["up"]), h @ p["down"]), False),
    "swiglu": (lambda p, x: (jax.nn.silu(x @ p["up"]) * (x @ p["gate"])) @ p["down"], True),
    "several results": (
        lambda p, x: (h := x @ p["up"], h @ p["down"], h @ p["down2"])[1:],
        False,
    ),
    "gate": (lambda p, x: jax.nn.silu((h := x @ p["up"]) @ p["down"]) * (h @ p["down2"]), True),
    "residual": (lambda p, x: (x @ p["down"].T + p["gate"][:24]) @ p["down"], False),
    "one head": (
        lambda p, x: (
            jnp.einsum(
                "rhd,dk->rhk", jnp.einsum("rk,khd->rhd", x, p["up"].reshape(K, 1, -1)), p["down"]
            )
            + x[:, None]
        ),
        False,
    ),
    "three": (lambda p, x: ((x @ p["up"]) @ p["down"]) @ p["gate"], True),
    "four": (lambda p, x: (((x @ p["up"]) @ p["down"]) @ p["gate"]) @ p["down2"], True),
    "reshaped": (lambda p, x: (x @ p["up"]).reshape(2, 12, HIDDEN) @ p["down"], False),
    "left alone": (lambda p, x: jnp.tanh(x @ p["alone"]) @ p["down"], False),
    "heads": (
        lambda p, x: jnp.einsum(
            "rhd,hdk->rk",
            jnp.einsum("rk,khd->rhd", x, p["up"].reshape(K, 4, -1)),
            p["down"].reshape(4, -1, K),
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_chained(name):
    fun, is_chained = CHAINS[name]
    p = P | {"gate": normal(K, HIDDEN, seed=5), "down2": normal(HIDDEN, K, seed=6)}
    p["alone"] = normal(K, HIDDEN, seed=7)
    fast, packed = pack(fun, p, calibrate=list(X), rules=[("alone", None)])
    assert any("→ int8 →" in text for text in replacements(fast)) == is_chained
    expected, actual = fun(p, X[3]), jax.jit(fast)(packed, X[3])
    for e, a in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert np.linalg.norm(a - e) < 0.03 * np.linalg.norm(e)


def test_layers_in_a_loop_have_ranges_of_their_own():
    stack = jax.tree.map(lambda *x: np.stack(x), *(params(seed) for seed in (0, 10, 20)))

    def model(p, x):
        return lax.scan(lambda x, p: (jnp.tanh(block(p, x)), None), x, p)[0]

    fast, packed = pack(model, stack, calibrate=X[0])
    x, expected = X[0], []
    for i in range(3):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        expected.append(limits(hidden(p, x)[0]))
        x = jnp.tanh(block(p, x))
    assert packed["up"].activation_range.shape == (3, 2)
    np.testing.assert_allclose(packed["up"].activation_range, expected, rtol=0.05)
    assert np.linalg.norm(fast(packed, X[0]) - x) < 0.03 * np.linalg.norm(x)


def test_experts_and_weights_used_twice():
    def model(p, x):
        return jax.vmap(jnp.matmul)(x, p["experts"]).sum() + x[0] @ p["w"] + (2 * x[1]) @ p["w"]

    p = {"experts": np.stack([P["up"], P["up"]]), "w": P["up"]}
    x = X[:2]
    _, packed = pack(model, p, x, calibrate=(x,))
    expected = [limits(x[0]), limits(x[1])]
    np.testing.assert_allclose(packed["experts"].activation_range, expected, rtol=1e-6)
    expected = limits(x[0], 2 * x[1])
    np.testing.assert_allclose(packed["w"].activation_range, expected, rtol=1e-6)


def test_functions_that_share_the_parameters():
    def other(p, x, scale):
        return (x * scale) @ p["up"]

    pairs = [(block, (X[0],)), (other, (X[0], 2.0))]
    (first, _), packed = quake_jax.pack(pairs, P, weights="int8", calibrate=[X, (X[0], 30.0)])
    rows, _ = hidden(P, X)
    expected = limits(rows, 30 * X[0])
    np.testing.assert_allclose(packed["up"].activation_range, expected, rtol=1e-5)
    assert "→ int8 →" in replacements(first)[0]


def test_repack_and_files_keep_the_ranges(tmp_path):
    fast, packed = pack(calibrate=X)
    again = fast.repack(jax.tree.map(lambda x: 2 * x, P))
    for name in ("up", "down"):
        known = packed[name].activation_range
        np.testing.assert_array_equal(again[name].activation_range, known)
    quake_jax.save_packed(tmp_path / "packed", packed)
    loaded = quake_jax.load_packed(tmp_path / "packed")
    np.testing.assert_array_equal(fast(loaded, X[0]), fast(packed, X[0]))
    traced = jax.eval_shape(fast.repack, P)["up"]
    assert traced.activation_range.shape == (2,)


def test_other_formats_have_no_range():
    """int4 has groups; what a rule packs in 16 bits has float rows."""
    p = P | {"other": normal(K, HIDDEN, seed=5)}
    rules = [("up", "int8"), ("other", "bfloat16")]

    def fun(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"], x @ p["other"]

    fast, packed = pack(fun, p, calibrate=X, weights="int4", rules=rules)
    ranges = {name: packed[name].activation_range is not None for name in ("up", "down", "other")}
    assert ranges == {"up": True, "down": False, "other": False}
    assert {x.paths[0]: x.is_calibrated for x in fast.report.layers} == ranges


def nothing(p, x):
    return lax.cond(x[0, 0] > 1e9, lambda: x @ p["up"], lambda: x @ p["down"].T)


def not_needed(p, x):
    return lax.scan(lambda x, p: (jnp.tanh(x @ p["c"]), x @ p["w"]), x, p)[0]


BAD = {
    "no batches": (TypeError, "calibrate must be a batch", {"calibrate": 3}),
    "abstract batch": (
        TypeError,
        "calibrate must be of arrays with values",
        {"calibrate": jax.ShapeDtypeStruct((3, K), "float32")},
    ),
    "no int8": (
        ValueError,
        "calibrate must be left out where no weight is int8",
        {"calibrate": X, "weights": "bfloat16"},
    ),
    "groups": (
        ValueError,
        "calibrate must be left out where no weight is int8 without groups",
        {"calibrate": X, "group_size": 32},
    ),
    "float rows": (
        ValueError,
        "calibrate must be left out where no weight is int8",
        {"calibrate": X, "activations": None},
    ),
    "abstract parameters": (
        ValueError,
        "params must be arrays with values where there is calibrate",
        {"calibrate": X, "p": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), P)},
    ),
    "NaN": (
        ValueError,
        "calibrate has NaN or infinities in the rows of the weight up",
        {"calibrate": [X[0], X[0] * np.nan]},
    ),
    "infinity": (
        ValueError,
        "calibrate has NaN or infinities in the rows of the weight up",
        {"calibrate": X[0] * np.inf},
    ),
    "not reached": (
        ValueError,
        "no batch of calibrate reaches the weight up, or nothing needs what it gives: give batches",
        {"calibrate": X[0], "fun": nothing},
    ),
    "not needed": (
        ValueError,
        "no batch of calibrate reaches the weight w, or nothing needs what it gives: give batches",
        {"calibrate": X[0], "fun": not_needed, "p": {"c": normal(3, K, K), "w": normal(3, K, K)}},
    ),
    "no batch": (ValueError, "no batch of calibrate reaches the weight up", {"calibrate": []}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    error, message, keywords = BAD[case]
    with pytest.raises(error, match=re.escape(f"quake_jax.pack: {message}")):
        pack(**keywords)


def test_bad_batches_of_several_functions():
    pairs = [(block, (X[0],)), (block, (X[1],))]
    message = "calibrate must be a sequence of 2, the batches of each function"
    with pytest.raises(TypeError, match=message):
        quake_jax.pack(pairs, P, weights="int8", calibrate=[X])


class Config:
    """An argument by whose identity programs cannot be told apart: calls are not compiled."""


@pytest.mark.parametrize("is_compiled", [True, False])
def test_calibration_leaves_no_trace(is_compiled):
    """Programs that were made for calibration are not used again, compiled or not."""

    def fun(p, x, config):
        return jnp.tanh(x @ p["up"])

    config = 1 if is_compiled else Config()
    for scale in (1, 2):
        batch = (scale * X[0], config)
        fast, packed = quake_jax.pack(fun, P, *batch, weights="int8", calibrate=batch)
        np.testing.assert_allclose(packed["up"].activation_range, limits(scale * X[0]), rtol=1e-6)
        expected = quake_jax.dense(5 * X[0], packed["up"], activation="tanh")
        np.testing.assert_array_equal(fast(packed, 5 * X[0], config), expected)


def test_other_functions_are_not_measured():
    """Neither those that make the batches nor those inside, which have ranges already."""
    first, of_first = pack(lambda p, x: jnp.tanh(x @ p["up"]), calibrate=X[0])
    encode = jax.jit(first)  # not compiled before it makes the batches
    batches = (encode(of_first, scale * X[0]) for scale in (1, 3))
    _, packed = pack(lambda p, h: h @ p["down"], x=X[0] @ P["up"], calibrate=batches)
    made = [quake_jax.dense(s * X[0], of_first["up"], activation="tanh") for s in (1, 3)]
    np.testing.assert_allclose(packed["down"].activation_range, limits(*made), rtol=1e-6)
    np.testing.assert_array_equal(encode(of_first, 3 * X[0]), made[1])
    _, both = pack(lambda p, x: first(of_first, x) @ p["down"], calibrate=X[0])
    np.testing.assert_allclose(both["down"].activation_range, limits(made[0]), rtol=1e-6)


def test_calibrates_what_is_exact():
    _, packed = pack(lambda p, x: jnp.tanh(x @ p["up"]), calibrate=X[0], order="exact")
    np.testing.assert_allclose(packed["up"].activation_range, limits(X[0]), rtol=1e-6)


def test_calibrates_while_nan_is_looked_for():
    with jax.debug_nans(True):
        _, packed = pack(calibrate=X[0])
    assert np.isfinite(packed["up"].activation_range).all()


def test_weights_of_one_call_in_loops_of_their_own():
    """Each has the range of the rows, though they are stacked differently."""
    p = {"q": normal(2, K, K), "k": normal(K, K, seed=1), "v": normal(2, 3, K, K, seed=2)}

    def model(p, x):
        def inner(x, v, q):
            return jnp.sin(x @ q) + jnp.cos(x @ p["k"]) + jnp.sin(x @ v), None

        def outer(x, weights):
            q, v = weights
            return lax.scan(lambda x, v: inner(x, v, q), x, v)[0], None

        return lax.scan(outer, x, (p["q"], p["v"]))[0]

    _, packed = pack(model, p, calibrate=X[0])
    v = np.asarray(packed["v"].activation_range)
    assert v.shape == (2, 3, 2) and packed["q"].activation_range.shape == (2, 2)
    np.testing.assert_allclose(v[0, 0], limits(X[0]), rtol=1e-6)
    for q, of_v in zip(packed["q"].activation_range, v, strict=True):
        np.testing.assert_array_equal(q, [of_v[:, 0].min(), of_v[:, 1].max()])
    whole = [v[..., 0].min(), v[..., 1].max()]
    np.testing.assert_array_equal(packed["k"].activation_range, whole)


class Batch(NamedTuple):
    x: jax.Array
    scale: jax.Array


def test_a_named_tuple_is_one_argument():
    batch = Batch(X[0], np.float32(2))
    _, packed = pack(lambda p, b: (b.x * b.scale) @ p["up"], x=batch, calibrate=[batch])
    np.testing.assert_allclose(packed["up"].activation_range, limits(2 * X[0]), rtol=1e-6)


def test_parameters_with_and_without_ranges_are_told_apart():
    (fast, packed), (other, ranged) = pack(), pack(calibrate=X[0])
    one, another = (
        f"PackedWeight(shape=(64, 128), dtype='int8', group_size=None, activations='int8'{rest})"
        for rest in ("", ", activation_range=…")
    )
    for function, wrong, texts in ((fast, ranged, (one, another)), (other, packed, (another, one))):
        message = "packed up must be {}; got {}".format(*texts)
        with pytest.raises(ValueError, match=re.escape(message)):
            function(wrong, X[0])
