"""pack: which products it finds, in which programs, and what it makes of the parameters."""

import dataclasses
import functools
import io
import itertools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P
from rich.console import Console
from support import weights_like as normal

import quake_jax
from quake_jax._core import progress
from quake_jax._pack import plan

K, N, ROWS = 64, 96, 32


X = normal(ROWS, K, seed=1)


def replacements(fast) -> list[str]:
    """What took the place of parts of the programs, without "quake_jax."."""
    return sorted(
        r.replacement.removeprefix("quake_jax.")
        for report in fast.report.programs
        for r in report.replaced
        for _ in range(r.count)
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to write a dense layer: (function, parameters, other arguments).

    `packed` are the paths and shapes of what is packed, `calls` the calls of dense.
    """

    fun: object
    params: object
    args: tuple
    packed: dict
    calls: tuple = ("dense(float32)",)
    kept: tuple = ()


def _scan(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w["w"] + w["b"]), None), x, p)[0]


def _tanh(p, x):
    return jnp.tanh(x @ p)


def _many(w, x):
    return functools.reduce(lambda h, _: jnp.sin(h @ w), range(70), x)


def _called_twice(p, x):
    layer = jax.jit(_many)
    return layer(p["b"], layer(p["a"], x))


def _heads(p, x):
    """Attention without a fusion: the query is used before the key is made."""
    q = (x @ p["q"] + p["b"]).reshape(-1, 4, 16) / 4
    k = (x @ p["k"]).reshape(-1, 4, 16)
    v = jnp.einsum("bd,dhk->bhk", x, p["v"].reshape(K, 4, 16)) + p["b"].reshape(4, 16)
    scores = jnp.einsum("qhk,shk->hqs", q, k)
    return jnp.einsum("hqs,shk->qhk", jnp.sin(scores), v).reshape(x.shape)


def _decoder(p, memory):
    x = memory
    for k, v in (("a", "b"), ("c", "d")):
        x = x + jnp.sin(x @ (memory @ p[k]).T) @ (memory @ p[v])
    return x


def _weight_made_late(p, x):
    first = jnp.sin(x @ p["a"])
    # As a call of its own, half of which depends on the first product.
    late, other = jax.jit(lambda w, y: (jnp.roll(w, 1, 0) * 2, jnp.cos(y)))(p["b"], first)
    return jnp.sin(x @ late + p["b"][0]) * other


def _windows(x, w, strides, kernel="HWIO", result="NHWC", **keywords):
    dims = ("NHWC", kernel, result)
    return lax.conv_general_dilated(
        x, w, strides, "VALID", dimension_numbers=dims, **{"precision": "highest"} | keywords
    )


def _summed(*results):
    return sum(map(jnp.sin, results))


SQUARE, STACK, EXPERTS = normal(K, K), normal(3, K, K), normal(4, K, N)
PAIR = {"a": normal(K, K, seed=2), "b": normal(K, K, seed=3)}
LAYERS = {"w": normal(3, K, K, seed=4), "b": normal(3, K, seed=5)}
FOUR = {name: normal(K, K, seed=i) for i, name in enumerate("abcd")}
HEADS = {name: normal(K, K, seed=i) for i, name in enumerate("qkv")} | {"b": normal(K)}
OF_HEADS = {name: (K, K) for name in "qkv"}
TANH = ("dense(float32, tanh)",)
TWO = ("dense(float32, 2 weights)",)
THREE = ("dense(float32, 3 weights, bias)",)
IMAGES, WINDOWS = normal(2, 8, 12, 5, seed=6), normal(4, 3, 5, N, seed=7)
CASES = {
    "patches": Case(
        lambda p, x: jax.nn.tanh(_windows(x, p["w"], (4, 3)) + p["b"]),
        {"w": WINDOWS, "b": normal(N)},
        (IMAGES,),
        {"w": (60, N)},
        ("dense(float32, tanh, bias)",),
        ("b",),
    ),
    "patches of a weight the other way round": Case(
        lambda p, x: _windows(x, p, (4, 3), kernel="OIHW"),
        WINDOWS.transpose(3, 2, 0, 1),
        (IMAGES,),
        {"": (60, N)},
    ),
    "pixels": Case(
        lambda p, x: _windows(x, p, (1, 1)), normal(1, 1, 5, N), (IMAGES,), {"": (5, N)}
    ),
    # Other convolutions stay.
    **{
        f"convolution, {name}": Case(fun, WINDOWS, (IMAGES,), {}, (), ("",))
        for name, fun in {
            "overlapping": lambda p, x: _windows(x, p, (2, 3)),
            "with a rest": lambda p, x: _windows(x[:, :7], p, (4, 3)),
            "channels first": lambda p, x: _windows(x, p, (4, 3), result="NCHW"),
            "padded": lambda p, x: lax.conv_general_dilated(
                x, p, (4, 3), ((0, 0), (3, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            "dilated": lambda p, x: _windows(x, p, (4, 3), rhs_dilation=(1, 2)),
            "in groups": lambda p, x: _windows(jnp.tile(x, 2), p, (4, 3), feature_group_count=2),
        }.items()
    },
    "plain": Case(lambda p, x: x @ p, SQUARE, (X,), {"": (K, K)}),
    "several axes": Case(
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["k"]) + p["b"],
        {"k": normal(K, 4, 24), "b": normal(4, 24)},
        (X,),
        {"k": (K, N)},
        ("dense(float32, bias)",),
        ("b",),
    ),
    "several axes summed": Case(
        lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(ROWS, 4, 16), p),
        normal(4, 16, N),
        (X,),
        {"": (K, N)},
    ),
    "weight first": Case(lambda p, x: p @ x.T, normal(N, K), (X,), {"": (K, N)}),
    "weight transposed": Case(
        lambda p, x: jnp.einsum("fd,bd->bf", p, x), normal(N, K), (X,), {"": (K, N)}
    ),
    "axes of both": Case(
        lambda p, x: jnp.einsum("ebd,edf->ebf", x.reshape(4, 8, K), p),
        EXPERTS,
        (X,),
        {"": (4, K, N)},
    ),
    "axes of both, weight first": Case(
        lambda p, x: jnp.einsum("edf,ebd->efb", p, x.reshape(4, 8, K)),
        EXPERTS,
        (X,),
        {"": (4, K, N)},
    ),
    "vmap": Case(
        lambda p, x: jax.vmap(lambda w, x: x @ w)(p, x.reshape(4, 8, K)),
        EXPERTS,
        (X,),
        {"": (4, K, N)},
    ),
    "scan over layers": Case(
        _scan, LAYERS, (X,), {"w": (3, K, K)}, ("dense(float32, tanh, bias)",), ("b",)
    ),
    "remat in scan": Case(
        lambda p, x: lax.scan(jax.checkpoint(lambda h, w: (_tanh(w, h), None)), x, p)[0],
        STACK,
        (X,),
        {"": (3, K, K)},
        TANH,
    ),
    "scan with a weight of its own": Case(
        lambda p, x: lax.scan(lambda h, _: (_tanh(p, h), None), x, length=3)[0],
        SQUARE,
        (X,),
        {"": (K, K)},
        TANH,
    ),
    "scan in scan": Case(
        lambda p, x: lax.scan(
            lambda h, w: (lax.scan(lambda h, v: (_tanh(v, h), None), h, w)[0], None), x, p
        )[0],
        normal(2, 3, K, K),
        (X,),
        {"": (2, 3, K, K)},
        TANH,
    ),
    "scan over weights and with one of its own": Case(
        lambda p, x: lax.scan(
            lambda h, w: (_tanh(p["a"], _tanh(w["w"], h)) + x + w["b"], h.sum()), 2 * x, p["l"]
        )[0],
        {"a": SQUARE, "l": LAYERS},
        (X,),
        {"a": (K, K), "l/w": (3, K, K)},
        (*TANH, "dense(float32, tanh, residual)"),
        ("l/b",),
    ),
    "derivative of scan": Case(
        lambda p, x: jax.jvp(lambda x: _scan(p, x), (x,), (x,))[1],
        LAYERS,
        (X,),
        {"w": (3, K, K)},
        ("dense(float32)", "dense(float32, tanh, bias)"),
        ("b",),
    ),
    "while": Case(
        lambda p, x: lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, _tanh(p, s[1])), (0, x)
        )[1],
        SQUARE,
        (X,),
        {"": (K, K)},
        TANH,
    ),
    "cond": Case(
        lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: x @ p["b"] + 1, x),
        PAIR,
        (X,),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32)", "dense(float32)"),
    ),
    "a call made twice": Case(
        _called_twice, PAIR, (X,), {"a": (K, K), "b": (K, K)}, ("dense(float32)",) * 140
    ),
    "a weight that is split": Case(
        lambda p, x: sum(x @ w for w in jnp.split(p, 3, 1)),
        normal(K, 3 * K),
        (X,),
        {"": (K, K)},
        # The sum is the residual of the next one.
        ("dense(float32)", "dense(float32, residual)", "dense(float32, residual)"),
    ),
    "a weight of several": Case(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1), PAIR, (X,), {"a + b": (K, 2 * K)}
    ),
    "a weight that is scaled": Case(
        lambda p, x: x @ (p["w"] * p["scale"]),
        {"w": SQUARE, "scale": normal(K)},
        (X,),
        {"scale + w": (K, K)},
    ),
    "tied embedding": Case(
        lambda p, i: p[i] @ p.T,
        normal(200, K),
        (np.arange(7),),
        {"": (K, 200)},
        ("dense(float32)", "rows of the packed embedding (float32)"),
    ),
    "bias, activation and residual": Case(
        lambda p, x: x + (jax.nn.gelu(x @ p["a"] + p["c"]) @ p["b"] + p["d"]),
        PAIR | {"c": normal(K), "d": normal(K)},
        (X,),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32, bias, residual)", "dense(float32, gelu_tanh, bias)"),
        ("c", "d"),
    ),
    "activations of one row": Case(
        lambda p, x: jnp.tanh(jax.nn.gelu(x @ p["a"] + p["c"]) @ p["b"]) * jax.nn.silu(x),
        PAIR | {"c": normal(K)},
        (X[:1],),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32, gelu_tanh, bias)", "dense(float32, tanh)"),
        ("c",),
    ),
    "gate": Case(
        lambda p, x: jax.nn.silu(x @ p["a"]) * (x @ p["b"]),
        PAIR,
        (X,),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32, silu, gate)",),
    ),
    "gate with biases, behind": Case(
        lambda p, x: (x @ p["a"] + p["c"]) * jax.nn.gelu(x @ p["b"] + p["d"]),
        PAIR | {"c": normal(K), "d": normal(K)},
        (X,),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32, gelu_tanh, bias, gate, gate_bias)",),
        ("c", "d"),
    ),
    "a result that is needed twice": Case(
        lambda p, x: (lambda y: jnp.tanh(y) + y)(x @ p),
        SQUARE,
        (X,),
        {"": (K, K)},
        ("dense(float32)", "tanh"),
    ),
    "a product with itself": Case(
        lambda p, x: (lambda y: y * jax.nn.silu(y))(x @ p),
        SQUARE,
        (X,),
        {"": (K, K)},
        ("dense(float32)", "swiglu"),
    ),
    "query, key and value": Case(_heads, HEADS, (X,), OF_HEADS, THREE, ("b",)),
    "query, key and value in scan": Case(
        lambda p, x: lax.scan(lambda h, w: (_heads(w, h), None), x, p)[0],
        jax.tree.map(lambda w: np.stack([w, w[::-1]]), HEADS),
        (X,),
        {name: (2, K, K) for name in "qkv"},
        THREE,
        ("b",),
    ),
    "query, key and value in remat": Case(
        jax.checkpoint(_heads), HEADS, (X,), OF_HEADS, THREE, ("b",)
    ),
    "query, key and value in a call made twice": Case(
        lambda p, x: (lambda layer: layer(p["b"], layer(p["a"], x)))(jax.jit(_heads)),
        {"a": HEADS, "b": HEADS},
        (X,),
        {f"{layer}/{name}": (K, K) for layer in "ab" for name in "qkv"},
        THREE * 2,
        ("a/b", "b/b"),
    ),
    "query, key and value, vmap": Case(
        lambda p, x: jax.vmap(lambda x: _heads(p, x))(x.reshape(2, -1, K)),
        HEADS,
        (X,),
        OF_HEADS,
        THREE,
        ("b",),
    ),
    "keys and values of a memory": Case(_decoder, FOUR, (X,), dict.fromkeys(FOUR, (K, K)), TWO * 2),
    "several of experts": Case(
        lambda p, x: jax.vmap(lambda p, x: _summed(x @ p["a"], x @ p["b"]))(p, x.reshape(4, 8, K)),
        {"a": EXPERTS, "b": EXPERTS[::-1]},
        (X,),
        {"a": (4, K, N), "b": (4, K, N)},
        TWO,
    ),
    "several, weights first": Case(
        lambda p, x: (
            lambda y: _summed(p["a"] @ y, jnp.einsum("kb,kn->nb", y, p["b"]), p["c"] @ y)
        )(x.T),
        {name: FOUR[name] for name in "abc"},
        (X,),
        {name: (K, K) for name in "abc"},
        ("dense(float32, 3 weights)",),
    ),
    "several, each with rows of its own": Case(
        lambda p, x: _summed(*(x.reshape(2, -1, K) @ w for w in (p["a"], p["b"]))),
        PAIR,
        (X,),
        {"a": (K, K), "b": (K, K)},
        TWO,
    ),
    "several, a weight is made behind the first": Case(
        _weight_made_late,
        PAIR,
        (X,),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32, 2 weights, bias)",),
        ("b",),
    ),
    "several, a bias is made of the first": Case(
        lambda p, x: (lambda y: y * jnp.sin(x @ p["b"] + y[0]))(x @ p["a"]),
        PAIR,
        (X,),
        {"a": (K, K), "b": (K, K)},
        ("dense(float32)", "dense(float32, bias)"),
    ),
    "several, with different activations": Case(
        lambda p, x: _summed(
            jnp.tanh(x @ p["a"]), x @ p["b"], jnp.tanh(x @ p["c"]), x @ p["d"] + x
        ),
        FOUR,
        (X,),
        dict.fromkeys(FOUR, (K, K)),
        ("dense(float32)", "dense(float32, 2 weights, tanh)", "dense(float32, residual)"),
    ),
    "keyword order and None leaves": Case(
        lambda p, x: x @ p["a"] if p["n"] is None else x,
        {"a": SQUARE, "n": None},
        (X,),
        {"a": (K, K)},
    ),
}


def _norm_without_offset(x, p):
    mean = jnp.mean(x, -1, keepdims=True)
    return (x - mean) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * p["scale"]


def _layer_norm(x, p):
    return _norm_without_offset(x, p) + p["offset"]


def _fast_layer_norm(x, p):
    mean, squares = x.mean(-1), jnp.square(x).mean(-1)
    variance = jnp.maximum(0.0, squares - mean * mean)
    factor = lax.rsqrt(variance[:, None] + 1e-5) * p["scale"]
    return p["offset"] + factor * (x - mean[:, None])


def _rms_norm(x, p):
    return p["scale"] * (x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5))


def _almost_layer_norm(x, p):
    mean = jnp.mean(x[::-1], -1, keepdims=True)  # of other rows, if there are several
    return (x - mean) / jnp.sqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * p["scale"] + p["offset"]


def _other_axis(x, p):
    return (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * p["scale"] + p["offset"]


NORMED = {
    "layer norm": (_layer_norm, "layer_norm"),
    "fast layer norm": (_fast_layer_norm, "layer_norm"),
    "RMS norm": (_rms_norm, "rms_norm"),
    "almost a norm": (_almost_layer_norm, None),
    "another axis": (_other_axis, None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("rows", [K, 1])
def test_finds_norms(name, rows, products, dtype):
    norm, called = NORMED[name]
    params = {"scale": 1 + normal(K), "offset": normal(K, seed=6), "weights": [SQUARE] * products}

    def fun(p, x):
        y = norm(x.astype(jnp.float32), p).astype(dtype)
        return [y @ w.astype(dtype) for w in p["weights"]]

    # As many rows as columns: axes that are mistaken for each other are not seen in shapes. A row
    # alone has the shape of scale and offset.
    x = (3 * normal(rows, K, seed=7) + 1).astype(dtype)
    fast, packed = quake_jax.pack(fun, params, x, weights="float32", order=5)
    parts = ["float32", "2 weights" if products > 1 else None, called]
    assert replacements(fast) == [f"dense({', '.join(filter(None, parts))})"]
    # In bfloat16 the original rounds before and after the product, and sums in float32.
    tolerance = 1e-4 if dtype == "float32" else 3 * 2.0**-8
    for got, wanted in zip(jax.jit(fast)(packed, x), jax.jit(fun)(params, x), strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
        np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(
    "results, calls",
    [
        (lambda y, a, b, gate: (y @ a, y @ b, y), ["dense({}, 2 weights)", "layer_norm"]),
        (
            lambda y, a, b, gate: (
                jax.nn.silu(y.astype("bfloat16") @ gate.astype("bfloat16"))
                * (y.astype("bfloat16") @ b.astype("bfloat16"))
            )[None],
            ["dense({}, layer_norm, silu, gate)"],
        ),
        (
            lambda y, a, b, gate: (y @ a, jax.nn.silu(y @ gate) * (y @ b)),
            ["dense({})", "dense({}, silu, gate)", "layer_norm"],
        ),
        # Flax's layers cast each for themselves.
        (
            lambda y, a, b, gate: [y.astype("bfloat16") @ w.astype("bfloat16") for w in (a, b)],
            ["dense({}, 2 weights, layer_norm)"],
        ),
    ],
    ids=["it is a result", "casts before a gate", "something else reads it", "casts"],
)
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_norm_is_computed_once(results, calls, weights):
    params = {"scale": 1 + normal(K), "offset": normal(K, seed=6), "w": [*FOUR.values()][:3]}

    def fun(p, x):
        return results(_layer_norm(x, p), *p["w"])

    fast, packed = quake_jax.pack(fun, params, X, weights=weights, order=5)
    assert replacements(fast) == [call.format(weights) for call in calls]
    for got, wanted in zip(jax.jit(fast)(packed, X), jax.jit(fun)(params, X), strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
        np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "fun",
    [
        lambda h, x, a, b: h + jax.nn.gelu(h @ a) @ b,
        lambda h, x, a, b: (h @ a) + h,
        lambda h, x, a, b: (h * (h @ a)) @ b,
        lambda h, x, a, b: x @ a + h,
    ],
    ids=["block", "residual", "product", "another product"],
)
def test_what_a_single_norm_is_added_to_is_no_offset(fun):
    params = {"scale": 1 + normal(K), "weights": [SQUARE, normal(K, K, seed=2)]}

    def whole(p, x):
        return fun(_norm_without_offset(x, p), x, *p["weights"])

    found = []
    for rows in (1, 2):
        x = normal(rows, K, seed=7)
        fast, packed = quake_jax.pack(whole, params, x, weights="float32", order=5)
        assert_close(fast(packed, x), whole(params, x))
        found.append([call for call in replacements(fast) if "norm" in call])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", CASES)
def test_finds(name):
    case = CASES[name]
    fast, packed = quake_jax.pack(case.fun, case.params, *case.args, weights="float32", order=5)
    layers = {" + ".join(x.paths): x.shape for x in fast.report.layers}
    assert layers == case.packed
    assert tuple(x.path for x in fast.report.kept) == case.kept
    assert replacements(fast) == sorted(case.calls)
    got = jax.jit(fast)(packed, *case.args)
    wanted = jax.jit(case.fun)(case.params, *case.args)
    assert got.dtype == wanted.dtype
    # Sums in another order, and activations of order 5; a chain of 140 sines loses a little more.
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    # What was packed is no longer there as it was.
    arrays = jax.tree.leaves(packed)
    bytes_of = sum(x.size * x.dtype.itemsize for x in arrays)
    assert bytes_of == fast.report.bytes_after


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("activations", ["auto", None])
def test_is_dense_of_packed_weights(weights, activations):
    if activations is None and weights in ("float32", "bfloat16"):
        activations = "auto"
    params = {"w": SQUARE, "b": normal(K)}
    fast, packed = quake_jax.pack(
        lambda p, x: x @ p["w"] + p["b"], params, X, weights=weights, activations=activations
    )
    weight = quake_jax.pack_weight(SQUARE, weights, activations=activations)
    assert jax.tree.structure(packed["w"]) == jax.tree.structure(weight)
    jax.tree.map(np.testing.assert_array_equal, packed["w"], weight)
    wanted = quake_jax.dense(X, weight, params["b"])
    np.testing.assert_allclose(fast(packed, X), wanted, rtol=1e-6, atol=1e-6)
    layer = fast.report.layers[0]
    error = np.linalg.norm(np.asarray(weight.unpack()) - SQUARE) / np.linalg.norm(SQUARE)
    assert layer.error == pytest.approx(error, rel=1e-3, abs=1e-7)
    assert layer.format in str(fast.report)


# Only weights are rounded: what is packed computes as the original does with what they stand for.
WEIGHTS_ONLY = {"weights": "int8", "activations": None, "order": 5}


def unpacked(packed):
    is_weight = {"is_leaf": lambda x: isinstance(x, quake_jax.PackedWeight)}
    return jax.tree.map(lambda x: getattr(x, "unpack", lambda: x)(), packed, **is_weight)


def assert_close(got, wanted):
    """As close as sums in another order and activations of order 5 are."""
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_other_shapes_share_the_parameters():
    fast, packed = quake_jax.pack(_scan, LAYERS, X, **WEIGHTS_ONLY)
    for rows in (1, 5, 70):
        x = normal(rows, K)
        assert_close(jax.jit(fast)(packed, x), _scan(unpacked(packed), x))
    by_row = jax.vmap(fast, (None, 0))(packed, X[:, None])[:, 0]
    np.testing.assert_allclose(by_row, fast(packed, X), rtol=1e-5, atol=1e-5)


def test_functions_share_the_parameters():
    def prefill(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def step(p, x, *, scale):
        return (x @ p["a"])[0] * scale

    pairs = ((prefill, (X,)), (functools.partial(step, scale=2.0), (X[:1],)))
    (first, second), packed = quake_jax.pack(pairs, PAIR, **WEIGHTS_ONLY)
    assert len(first.report.layers) == 2 and first.report is second.report
    assert_close(first(packed, X), prefill(unpacked(packed), X))
    assert_close(second(packed, X[:1]), step(unpacked(packed), X[:1], scale=2.0))


def _tied(p, i, take=lambda p, i: jnp.take(p, i, axis=0), dtype="float32"):
    return take(p.astype(dtype), i), take(p.astype(dtype), i) @ p.astype(dtype).T


@pytest.mark.parametrize(
    "weights, rules, keywords, is_kept",
    [
        ("float32", None, {}, False),
        ("float32", None, {"dtype": "bfloat16"}, False),
        ("bfloat16", None, {}, True),
        ("bfloat16", None, {"dtype": "bfloat16"}, False),
        ("int8", [("", "bfloat16")], {}, False),
        ("int8", None, {}, True),
        ("int8", [("", "int8")], {}, True),
        ("int4", None, {}, True),
        ("float32", None, {"take": lambda p, i: p.at[i].get(mode="clip")}, False),
        ("float32", None, {"take": lambda p, i: p[i[0, 0]]}, False),
        ("float32", None, {"take": lambda p, i: p[i[0, 0], None]}, False),
        ("float32", None, {"take": lambda p, i: jax.vmap(lambda i: p[i])(i)}, False),
        # No rows of the table, or other numbers.
        ("float32", None, {"take": lambda p, i: p[:, :K][i]}, False),
        ("float32", None, {"take": lambda p, i: p[i, :8].repeat(8, -1)}, True),
        ("float32", None, {"take": lambda p, i: p[:K].T[i % K]}, True),
        ("float32", None, {"take": lambda p, i: jnp.take(p, i, 0, fill_value=3.0)}, True),
    ],
)
def test_rows_of_a_tied_embedding(weights, rules, keywords, is_kept):
    fun = functools.partial(_tied, **keywords)
    table = jnp.asarray(normal(200, K))
    # Negative ones count from the end; those outside are NaN, or the nearest.
    indices = jnp.array([[199, 0, 17], [-1, 200, -201]])
    if "take" in keywords:
        indices = jnp.abs(indices) % 200
    fast, packed = quake_jax.pack(
        fun, table, indices, weights=weights, rules=rules, order=5, activations="auto"
    )
    report = fast.report
    assert [x.path for x in report.kept] == [""] * is_kept
    assert len(report.layers) == 1 and report.layers[0].is_kept is is_kept
    assert any(r.startswith("rows of the packed") for r in replacements(fast)) is not is_kept
    if is_kept and "take" not in keywords:
        (left,) = (x for x in report.programs[0].left if x.name == "dense")
        assert "are read as they were" in left.reason and left.count == 2
    rows, wanted = fast(packed, indices)[0], fun(table, indices)[0]
    if rules and not is_kept:
        wanted = wanted.astype(jnp.bfloat16).astype(jnp.float32)
    assert rows.dtype == wanted.dtype
    np.testing.assert_array_equal(*(x.astype(jnp.float32) for x in (rows, wanted)))


def test_rows_for_a_function_without_the_product():
    def embed(p, i):
        return p[i]

    pairs = ((_tied, (np.arange(3),)), (embed, (np.arange(3),)))
    (first, second), packed = quake_jax.pack(pairs, normal(200, K), weights="float32")
    assert packed.array is not None and first.report.layers[0].is_kept
    np.testing.assert_array_equal(second(packed, np.arange(3)), first(packed, np.arange(3))[0])


def test_rules():
    params = {"a": {"w": SQUARE}, "b": {"w": SQUARE}, "c": {"w": SQUARE}}

    def fun(p, x):
        return jnp.sin(jnp.sin(x @ p["a"]["w"]) @ p["b"]["w"]) @ p["c"]["w"]

    rules = [("a/.*", None), ("b/w", "bfloat16"), (".*", "int4")]
    fast, packed = quake_jax.pack(fun, params, X, weights="int8", rules=rules)
    assert {x.paths[0]: x.dtype for x in fast.report.layers} == {"b/w": "bfloat16", "c/w": "int4"}
    assert packed["a"]["w"] is SQUARE
    assert any(x.reason == "a rule leaves it alone" for x in fast.report.programs[0].left)


@pytest.mark.parametrize(
    ("shape", "rule", "dtype"),
    [
        ((64, 32), None, "int8"),  # few outputs
        ((64, 512), None, "int8"),  # a vocabulary
        ((80, 96), None, "int8"),  # no groups
        ((64, 511), None, "int4"),
        ((64, 32), "int4", "int4"),
        ((64, 512), "int4", "int4"),
    ],
)
def test_int4_spares_some_weights(shape, rule, dtype):
    rules = None if rule is None else [(".*", rule)]
    fast, packed = quake_jax.pack(
        lambda p, x: x @ p, normal(*shape), normal(3, shape[0]), weights="int4", rules=rules
    )
    assert packed.dtype == dtype


def test_repack():
    traced = []

    def fun(p, x):
        traced.append(x.shape)
        return _scan(p, x)

    fast, packed = quake_jax.pack(fun, LAYERS, X, weights="int8")
    other = jax.tree.map(lambda x: 2 * x, LAYERS)
    traced.clear()
    again = fast.repack(other)
    assert not traced
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    np.testing.assert_array_equal(again["w"].codes, packed["w"].codes)
    np.testing.assert_allclose(again["w"].scales, 2 * packed["w"].scales, rtol=1e-6)
    with pytest.raises(ValueError, match=r"params w must be of shape \(3, 64, 64\)"):
        fast.repack(other | {"w": other["w"][:, :1]})
    with pytest.raises(ValueError, match="params must be of the structure"):
        fast.repack({"w": other["w"]})


def test_abstract_parameters():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), LAYERS)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    fast, packed = quake_jax.pack(_scan, shapes, x, **WEIGHTS_ONLY)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(packed))
    real = fast.repack(LAYERS)
    assert jax.tree.structure(real) == jax.tree.structure(packed)
    assert jax.eval_shape(fast, packed, x).shape == X.shape
    assert_close(fast(real, X), _scan(unpacked(real), X))


@pytest.mark.parametrize("weights, share", [("bfloat16", 0.5), ("int8", 0.27), ("int4", 0.16)])
def test_bytes_of_a_block(weights, share):
    """What packed layers of a usual size take, of what they take in float32."""
    shapes = {"up": (768, 3072), "down": (3072, 768), "qkv": (768, 3, 768)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def block(p, x):
        q, k, v = (x @ p["qkv"][:, i] for i in range(3))
        return jnp.tanh((q + k + v) @ p["up"]) @ p["down"]

    x = jax.ShapeDtypeStruct((4, 768), jnp.float32)
    fast, _ = quake_jax.pack(block, params, x, weights=weights)
    assert fast.report.kept == []
    assert fast.report.bytes_after <= share * fast.report.bytes_before


def test_approximations_of_small_arrays():
    def fun(p, x):
        return jax.nn.softmax(x @ p)

    both = {"weights": "float32", "softmax": "e2softmax"}
    (a, b) = quake_jax.explain(quake_jax.accelerate(fun, **both), SQUARE, X[:2]).replaced
    assert {a.name, b.name} == {"dense", "softmax"}


@pytest.mark.parametrize(
    "fun, params, together, text",
    [
        (_heads, HEADS, [("q", "k", "v")], "one call: {q, k, v}"),
        (
            lambda p, x: lax.scan(lambda h, p: (_heads(p["heads"], h), None), x, p)[0],
            {"heads": jax.tree.map(lambda w: np.stack([w, w]), HEADS)},
            [("heads/q", "heads/k", "heads/v")],
            "one call: heads/{q, k, v}",
        ),
        (
            lambda p, x: jax.nn.silu(x @ p["gate"]["w"]) * (x @ p["up"].T),
            {"gate": {"w": SQUARE}, "up": SQUARE + 1},
            [("up", "gate/w")],
            "one call: up, gate/w",
        ),
        (lambda p, x: x @ p["a"] @ p["b"], PAIR, [], None),
        (_decoder, FOUR, [("a", "b"), ("c", "d")], "one call: {a, b}\none call: {c, d}"),
    ],
    ids=["query, key and value", "in scan", "gate", "none", "two calls"],
)
def test_report_names_what_one_call_reads(fun, params, together, text):
    report = quake_jax.pack(fun, params, X, weights="int8")[0].report
    assert report.together == together
    assert text in str(report) if text else "one call" not in str(report)


def test_rich_draws_the_report():
    params = {"w[0]": SQUARE, "v": SQUARE}  # no markup
    fast, _ = quake_jax.pack(lambda p, x: x @ p["w[0]"], params, X, weights="int8")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(fast.report)
    drawn = console.export_text()
    for text in ("w[0]", "total", "dropped: v", "quake_jax.dense(int8)", "test_pack.py"):
        assert text in drawn and text in str(fast.report)


def test_progress_on_a_terminal(capsys, monkeypatch):
    def drawn(step: float) -> str:
        clock = types.SimpleNamespace(monotonic=itertools.count(0.0, step).__next__)
        monkeypatch.setattr(progress, "time", clock)
        fast, _ = quake_jax.pack(lambda p, x: x @ p["a"] @ p["b"], PAIR, X, weights="int8")
        fast.repack(PAIR)
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err

    assert not drawn(2.0)  # stderr is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not drawn(0.01)
    assert "packing" in drawn(2.0) and "1/2" in drawn(0.9)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_errors_of_stacks_are_measured_layer_by_layer(weights):
    shape = jax.ShapeDtypeStruct((16, 256, 512), jnp.float32)
    packed = jax.eval_shape(lambda w: quake_jax.pack_weight(w, weights), shape)
    index = (jax.ShapeDtypeStruct((), jnp.int32),)
    compiled = plan._squares.lower(shape, packed, index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * 256 * 512 * 4
    stack = normal(3, K, K)
    packed = quake_jax.pack_weight(stack, weights)
    wanted = np.linalg.norm(packed.unpack() - stack) / np.linalg.norm(stack)
    assert plan.relative_error(stack, packed) == pytest.approx(wanted, rel=1e-3, abs=1e-7)
    assert plan.relative_error(0 * stack, packed) == 0


def test_what_attention_multiplies():
    def block(p, x):
        q, k, v = (x.reshape(1, ROWS, 4, K // 4) @ p[name] for name in "qkv")
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) / 4
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)

    params = {name: normal(K // 4, K // 4, seed=i) for i, name in enumerate("qkv")}
    for attention, number in ((None, 0), ("float32", 0), ("bfloat16", 1), ("int8", 2)):
        fast, packed = quake_jax.pack(block, params, X, weights="float32", attention=attention)
        assert f"format={number}" in str(jax.make_jaxpr(fast)(packed, X))
        fast = quake_jax.accelerate(block, attention=attention)
        assert f"format={number}" in str(jax.make_jaxpr(fast)(params, X))
        np.testing.assert_allclose(fast(params, X), block(params, X), atol=0.02)


def test_explain():
    fast, packed = quake_jax.pack(_scan, LAYERS, X, weights="int8")
    (program,) = fast.report.programs
    assert quake_jax.explain(fast, packed, X).replaced == program.replaced
    one = quake_jax.explain(fast, packed, jax.ShapeDtypeStruct((1, K), jnp.float32))
    assert [r.name for r in one.replaced] == ["dense"]
    with pytest.raises(ValueError, match="packed must be the tree that quake_jax.pack returned"):
        quake_jax.explain(fast, [], X)


@jax.custom_vjp
def _with_rule(w, x):
    return jnp.tanh(x @ w)


_with_rule.defvjp(lambda w, x: (_with_rule(w, x), x), lambda x, g: (x.T @ g, g))


@pytest.mark.parametrize(
    "fun, inside",
    [
        (_with_rule, "a function with a rule of its own"),
        (
            jax.shard_map(jnp.matmul, mesh=jax.make_mesh((1,), "x"), in_specs=P(), out_specs=P()),
            "a shard_map",
        ),
    ],
    ids=["rule", "mesh"],
)
def test_says_where_nothing_is_packed(fun, inside):
    w = normal(K, K)
    fast, packed = quake_jax.pack(fun, w, w, weights="int8")
    assert packed is w
    (left,) = (r for r in fast.report.programs[0].left if r.name == "dense")
    assert left.reason == f"no weight is packed in {inside}" and left.count == 1


def test_traces_once_for_each_shape():
    traced = []

    def fun(p, x):
        traced.append(x.shape)
        return x @ p

    fast, packed = quake_jax.pack(fun, SQUARE, X, weights="int8")
    traced.clear()
    for _ in range(3):
        fast(packed, X)
    assert len(traced) == 1
    step = jax.jit(fast)
    for _ in range(3):
        step(packed, X)
    assert len(traced) <= 2
    fast(packed, X[:1])
    assert traced[-1] == (1, K)


@pytest.mark.parametrize("name", [name for name in CASES if "several" in name or "query" in name])
def test_derivatives_of_several(name):
    case = CASES[name]
    fast, packed = quake_jax.pack(case.fun, case.params, *case.args, weights="float32", order=5)
    direction = normal(*X.shape, seed=8)

    def along(fun):
        return jax.jit(jax.grad(lambda x: jnp.vdot(fun(x), jnp.resize(direction, fun(x).shape))))

    got = along(functools.partial(fast, packed))(*case.args)
    wanted = along(functools.partial(case.fun, case.params))(*case.args)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_derivatives():
    params = {"w": SQUARE, "b": normal(K)}

    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]))

    fast, packed = quake_jax.pack(fun, params, X, weights="float32", order=5)
    got, wanted = jax.grad(fast, 1)(packed, X), jax.grad(fun, 1)(params, X)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    of_bias = jax.grad(lambda b: fast(packed | {"b": b}, X))(params["b"])
    np.testing.assert_allclose(of_bias, jax.grad(fun)(params, X)["b"], rtol=1e-4, atol=1e-4)
    fast, packed = quake_jax.pack(fun, params, X, weights="float32", rules=[("b", None)])
    with pytest.raises(TypeError, match="a packed weight is a constant"):
        jax.grad(lambda w: fast({"w": w, "b": packed["b"]}, X))(packed["w"])


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"weights": "int3"}, ValueError, "weights must be one of 'float32', 'bfloat16', 'int8'"),
        ({"weights": "int8", "activations": "int4"}, ValueError, 'activations must be "auto"'),
        ({"weights": "int8", "group_size": 33}, ValueError, "group_size must be None or a posit"),
        ({"weights": "bfloat16", "group_size": 32}, ValueError, "group_size must be left out"),
        ({"weights": "bfloat16", "activations": "int8"}, ValueError, "activations must be left"),
        ({"weights": "int8", "scale_method": "min"}, ValueError, 'scale_method must be "max"'),
        ({"weights": "int8", "rules": "w"}, TypeError, "rules must be None or pairs"),
        ({"weights": "int8", "rules": ["w"]}, TypeError, r"rules\[0\] must be a pair"),
        ({"weights": "int8", "rules": [("(", None)]}, ValueError, r"rules\[0\]\[0\] must be a reg"),
        ({"weights": "int8", "rules": [("w", "x")]}, ValueError, r"rules\[0\]\[1\] must be one of"),
        ({"weights": "int8", "attention": "int4"}, ValueError, "attention must be None or one of"),
        ({"weights": "int8", "order": 7}, ValueError, "order"),
    ],
)
def test_bad_arguments(keywords, error, message):
    with pytest.raises(error, match=message):
        quake_jax.pack(lambda p, x: x @ p, SQUARE, X, **keywords)


def test_bad_functions():
    for fun in (3, "f", [], [jnp.sin], [(jnp.sin, X)]):
        with pytest.raises(TypeError, match="fun must be a function, or pairs"):
            quake_jax.pack(fun, SQUARE, weights="int8")
    with pytest.raises(TypeError, match="args must be left out where fun is pairs"):
        quake_jax.pack([(_tanh, (X,))], SQUARE, X, weights="int8")


def test_bad_values_and_trees():
    bad = SQUARE.copy()
    bad[3, 5] = np.nan
    with pytest.raises(ValueError, match=r"params layer/w: .*finite.*row 3, column 5"):
        quake_jax.pack(lambda p, x: x @ p["layer"]["w"], {"layer": {"w": bad}}, X, weights="int8")
    fast, packed = quake_jax.pack(lambda p, x: x @ p["w"], {"w": SQUARE}, X, weights="int8")
    with pytest.raises(ValueError, match="packed must be the tree that quake_jax.pack returned"):
        fast([packed["w"]], X)
    with pytest.raises(ValueError, match="packed w must be PackedWeight"):
        fast({"w": SQUARE}, X)
    with pytest.raises(ValueError, match="packed w must be PackedWeight"):
        fast({"w": quake_jax.pack_weight(SQUARE, "int4")}, X)


def test_what_was_dropped_is_named():
    def fun(p, x, *, both=False):
        return x @ p["w"] + p["more"] if both else x @ p["w"]

    params = {"w": SQUARE, "more": normal(K)}
    fast, packed = quake_jax.pack(fun, params, X, weights="int8")
    assert packed["more"] is None and fast.report.dropped == ["more"]
    with pytest.raises(ValueError, match="this call needs the parameter more as it was"):
        fast(packed, X, both=True)

    def other(p, x, *, turned=False):
        return x @ (p["w"].T if turned else p["w"])

    fast, packed = quake_jax.pack(other, params, X, weights="int8")
    with pytest.raises(ValueError, match="this call packs w as no function"):
        fast(packed, X, turned=True)


# accelerate(weights=): the same within each call.


def _packings(jaxpr, inside: bool = False):
    """For each packing in a program, whether it is inside a loop or a branch."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "quake_pack":
            yield inside
        loops = inside or equation.primitive.name in ("scan", "while", "cond")
        for inner in jaxprs_in_params(equation.params):
            yield from _packings(inner, loops)


@pytest.mark.parametrize("name", CASES)
def test_accelerate_packs_in_the_call(name):
    case = CASES[name]
    fast = quake_jax.accelerate(case.fun, weights="float32", order=5)
    inside = list(_packings(jax.make_jaxpr(fast)(case.params, *case.args).jaxpr))
    assert len(inside) >= len(case.packed) and not any(inside)
    found = quake_jax.explain(fast, case.params, *case.args).replaced
    in_call = sum(r.count for r in found if "packed in each call" in r.replacement)
    assert in_call == sum("dense" in x for x in case.calls)
    got, wanted = fast(case.params, *case.args), jax.jit(case.fun)(case.params, *case.args)
    assert got.dtype == wanted.dtype
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_accelerate_computes_as_pack(weights):
    packed, leaves = quake_jax.pack(_scan, LAYERS, X, weights=weights)
    fast = quake_jax.accelerate(_scan, weights=weights)
    np.testing.assert_allclose(fast(LAYERS, X), packed(leaves, X), rtol=1e-6, atol=1e-6)


def test_accelerate_of_other_arguments():
    def fun(x, n, first, *, second):
        return n * (x @ first) @ second

    last = normal(K, K, seed=3)
    exact = fun(X, 2, SQUARE, second=last)
    for argnums in (2, (2,), -1, (1, 2)):
        fast = quake_jax.accelerate(fun, weights="float32", params_argnums=argnums)
        (found,) = quake_jax.explain(fast, X, 2, SQUARE, second=last).replaced
        assert f"float32 packed in each call for {X.shape[0]} rows" in found.replacement
        np.testing.assert_allclose(fast(X, 2, SQUARE, second=last), exact, rtol=1e-4, atol=1e-4)
    both = quake_jax.accelerate(lambda p, q, x: (x @ p) @ q, weights="int8", params_argnums=(0, 1))
    assert sum(r.count for r in quake_jax.explain(both, SQUARE, last, X).replaced) == 2
    with pytest.raises(ValueError, match="positional arguments, of which the call has 2"):
        quake_jax.accelerate(jnp.add, weights="int8", params_argnums=2)(X, X)


def test_accelerate_of_a_jitted_function_keeps_what_it_gives_away():
    fun = jax.jit(lambda p, x: x @ p, donate_argnums=1)
    x = jnp.array(X)
    y = quake_jax.accelerate(fun, weights="float32")(SQUARE, x)
    assert not x.is_deleted()
    np.testing.assert_allclose(y, X @ SQUARE, rtol=1e-5, atol=1e-4)


def test_accelerate_derivatives():
    fast = quake_jax.accelerate(lambda p, x: jnp.sum(jnp.sin(x @ p)), weights="float32", order=5)
    wanted = np.cos(X @ SQUARE) @ SQUARE.T
    np.testing.assert_allclose(jax.grad(fast, 1)(SQUARE, X), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="a packed weight is a constant"):
        jax.grad(fast)(SQUARE, X)
