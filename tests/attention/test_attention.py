"""Fused attention: values against double precision, derivatives, transformations and errors."""

import concurrent.futures
import functools
import inspect
import itertools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import in_double
from support import DTYPES, ORDERS, on_device, orders_in, run_python

import quake_jax
from quake_jax import reference
from quake_jax._attention import derivative
from quake_jax._core.constants import MAX_REL_ERROR

quake = quake_jax.dot_product_attention
packed = quake_jax.packed_dot_product_attention


def exact(q, k, v, bias=None, mask=None, query_segment_ids=None, key_value_segment_ids=None, **x):
    """Of jax.nn, which has no segments but for a mask."""
    if query_segment_ids is not None:
        ids = query_segment_ids if key_value_segment_ids is None else key_value_segment_ids
        kept = query_segment_ids[:, None, :, None] == ids[:, None, None]
        mask = kept if mask is None else mask & kept
    return jax.nn.dot_product_attention(q, k, v, bias, mask, **x)


def normal(*shape, seed=0, dtype="float32", scale=1.0):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return on_device(values.astype(np.float32), dtype)


def operands(b=2, t=7, s=9, n=4, k=2, h=16, v=None, dtype="float32", seed=0):
    """Query, key and value."""
    return (
        normal(b, t, n, h, seed=seed, dtype=dtype),
        normal(b, s, k, h, seed=seed + 1, dtype=dtype),
        normal(b, s, k, h if v is None else v, seed=seed + 2, dtype=dtype),
    )


def keep(*shape, seed=0):
    return on_device(np.random.default_rng(seed).random(shape) > 0.4)


def lengths(*values):
    return jnp.asarray(values, jnp.int32)


SEGMENTS = {
    "query_segment_ids": lengths([-1, -1, 2, 2, 2, 5, 5], [3, 1, 1, 3, 0, 3, 1]),
    "key_value_segment_ids": lengths([-1, -1, -1, 2, 2, 2, 2, 7, 7], [1, 3, 3, 1, 9, 3, 1, 9, 9]),
}


def half_unit(dtype):
    return 2.0**-24 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps) / 2


def assert_close(out, expected, value, order=5):
    """The error of the weights on both sides of a division, and the rounding of sums and store."""
    largest = float(np.abs(np.asarray(value, np.float64)).max())
    rounding = 2.0**-19 * largest
    bound = 2 * MAX_REL_ERROR["softmax"][order] * largest + rounding
    if out.dtype == jnp.bfloat16:
        # Weights are rounded too where products of bfloat16 are instructions; the values deviate
        # from their weighted mean by at most the largest on average.
        unit = half_unit(out.dtype)
        bound += unit / (1 - unit) * largest
    np.testing.assert_allclose(
        np.asarray(out, np.float64), expected, atol=bound, rtol=half_unit(out.dtype)
    )


CASES = {
    "plain": {},
    "scale": {"scale": 0.7},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (2, 1)},
    "symmetric window": {"local_window_size": 3},
    "causal window": {"is_causal": True, "local_window_size": (2, 0)},
    "wide window": {"local_window_size": (10**12, 0)},
    "lengths": {"query_seq_lengths": lengths(7, 3), "key_value_seq_lengths": lengths(0, 5)},
    "key lengths": {"key_value_seq_lengths": lengths(9, 1), "is_causal": True},
    "segments": SEGMENTS,
    "causal segments": {**SEGMENTS, "is_causal": True},
    "bias": {"bias": normal(2, 4, 7, 9, seed=5)},
    "broadcast bias": {"bias": normal(1, 4, 1, 9, seed=5)},
    "bias of queries": {"bias": normal(2, 1, 7, 1, seed=5)},
    "bias of fewer axes": {"bias": normal(7, 9, seed=5)},
    "16-bit bias": {"bias": normal(1, 4, 7, 9, seed=5, dtype="bfloat16")},
    "integer bias": {"bias": jnp.arange(9)[None, None, None]},
    "mask": {"mask": keep(2, 4, 7, 9)},
    "mask of keys": {"mask": keep(2, 1, 1, 9)},
    "mask of fewer axes": {"mask": keep(4, 7, 9)},
    "nothing kept": {"mask": jnp.zeros((1, 1, 1, 1), bool)},
    "soft cap": {"logits_soft_cap": 1.5},
    "everything": {
        "bias": normal(1, 1, 7, 9, seed=5),
        "mask": keep(1, 4, 7, 9),
        "is_causal": True,
        "local_window_size": (4, 4),
        "query_seq_lengths": lengths(7, 4),
        "key_value_seq_lengths": lengths(6, 9),
        **SEGMENTS,
        "logits_soft_cap": 2.0,
        "scale": -0.4,
    },
}
parametrize_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# What jax.nn can do too.
JAX_CASES = {name: case for name, case in CASES.items() if "logits_soft_cap" not in case}
del JAX_CASES["wide window"]  # whose sum with a position overflows there


# Values.


@parametrize_cases
def test_values(case):
    x = operands()
    case = dict(case)
    out, lse = quake(*x, **case, return_residual=True)
    for name in ("bias", "mask"):
        if name in case and case[name].ndim < 4:
            case[name] = case[name].reshape((1,) * (4 - case[name].ndim) + case[name].shape)
    expected, expected_lse = in_double(*x, **case)
    assert_close(out, expected, x[2])
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "causal segments", "nothing kept", "everything"])
def test_products_of_bfloat16(case, dtype):
    q, k, v = x = operands(dtype=dtype)
    f = functools.partial(quake, **CASES[case], compute_dtype="bfloat16")
    assert "format=1" in str(jax.make_jaxpr(f)(*x))
    out = jax.jit(f)(*x)
    assert out.dtype == dtype
    # Query and key are rounded or not, by the CPU. A logit moves by 2 u of its products and a
    # weight by twice that, values and weights are rounded themselves, and so is what is stored.
    u = half_unit(jnp.bfloat16)
    q, k, v = (np.abs(np.asarray(a, np.float64)) for a in x)
    products = np.einsum("btnh,bsnh->btns", q, np.repeat(k, q.shape[2] // k.shape[2], 2))
    scale = abs(CASES[case].get("scale", q.shape[3] ** -0.5))
    moved = (2 * u + u * u) * scale * products.max(-1, keepdims=True)
    largest = v.max()
    exact_out, _ = in_double(*x, **CASES[case])
    bound = (np.expm1(2 * moved) + 3 * u + half_unit(dtype)) * largest
    assert (np.abs(np.asarray(out, np.float64) - exact_out) <= bound).all()


def moved_by_codes(x, case):
    """By how much int8 moves a logit at most: codes err by half of 1/127 of the largest element."""
    q, k, _ = (np.abs(np.asarray(a, np.float64)) for a in x)
    k = np.repeat(k, q.shape[2] // k.shape[2], 2)
    k = k + k.max(1, keepdims=True)  # less a mean of keys
    of_query, of_key = (a.max(-1)[..., None] / 254 for a in (q, k))
    both = q.shape[3] * of_query.max() * of_key.max()
    scale = abs(case.get("scale", q.shape[3] ** -0.5))
    sums = (a.sum(-1, keepdims=True) for a in (q, k))
    return (
        1.001 * scale * (of_key.max() * next(sums).max() + of_query.max() * next(sums).max() + both)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", ["plain", "causal segments", "soft cap", "nothing kept", "everything"]
)
def test_products_of_int8(case, dtype):
    x, case = operands(dtype=dtype), CASES[case]
    f = functools.partial(quake, **case, compute_dtype="int8", return_residual=True)
    traced = str(jax.make_jaxpr(f)(*x))
    assert "format=2" in traced and "order=2" in traced
    out, lse = jax.jit(f)(*x)
    assert out.dtype == dtype
    expected, expected_lse = in_double(*x, **case)
    moved = moved_by_codes(x, case)
    # Weights err by that and by 1/255 of the largest, and values by half of 1/127 of theirs.
    largest = float(np.abs(np.asarray(x[2], np.float64)).max())
    of_weights = np.expm1(moved) + x[1].shape[1] / 255 + 2 * MAX_REL_ERROR["softmax"][2]
    bound = (min(2 * of_weights / (1 - of_weights), 2) + 1 / 254 + half_unit(dtype)) * largest
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=bound)
    has_keys = expected_lse > -1e4
    lse, expected_lse = np.asarray(lse, np.float64)[has_keys], expected_lse[has_keys]
    np.testing.assert_allclose(lse, expected_lse, rtol=half_unit(dtype), atol=moved + 4e-3)


def test_errors_of_int8_average_out():
    x = operands(t=300, s=400, h=64)
    plain = np.asarray(quake(*x), np.float64)
    for other, case in ((0.0, {}), (100.0, {}), (0.0, {"is_causal": True})):
        # What all keys have in common costs nothing.
        key = x[1] + other * normal(64, seed=8)
        expected, _ = in_double(x[0], key, x[2], **case)
        error = (
            np.asarray(quake(x[0], key, x[2], **case, compute_dtype="int8"), np.float64) - expected
        )
        assert np.sqrt((error**2).mean() / (expected**2).mean()) < 0.03
    has_bytes = quake_jax.isa() in ("avx512vnni", "avx512bf16", "avx512bf16amx")
    assert np.array_equal(quake(*x, compute_dtype="int8", order=5), plain) != has_bytes


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e31])
@pytest.mark.parametrize("which", range(3))
def test_what_int8_has_no_codes_for_is_done_in_float32(which, bad):
    x = [np.array(a) for a in operands(t=40, s=70)]
    x[which][1, 3, 0, 5] = bad
    out, expected = (quake(*x, compute_dtype=name, order=5) for name in ("int8", "float32"))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [1e6, 1e8, 1e12, 1e16])
def test_int8_of_large_logits(factor):
    query, key, value = operands(t=40, s=70)
    out = quake(query, factor * key, value, compute_dtype="int8")
    # Of each query the codes of one key have nearly all of the weight: a row of the values.
    assert np.isfinite(out).all()
    assert np.abs(out).max() <= 1.01 * np.abs(value).max()
    out = quake(query, key + np.float32(factor), value, compute_dtype="int8")
    assert np.isfinite(out).all()


def test_what_is_multiplied_by_default():
    for dtype in DTYPES:
        x = operands(dtype=dtype)
        wanted = "format=1" if x[0].dtype == jnp.bfloat16 else "format=0"
        assert wanted in str(jax.make_jaxpr(quake)(*x))
        for name in ("float32", jnp.float32, np.dtype("float32")):
            f = functools.partial(quake, compute_dtype=name)
            assert "format=0" in str(jax.make_jaxpr(f)(*x))
    # bfloat16 multiplied in float32: weights are not rounded.
    x = operands(t=40, dtype="bfloat16")
    out = quake(*x, compute_dtype="float32", return_residual=False)
    expected, _ = in_double(*x)
    largest = float(np.abs(np.asarray(x[2], np.float64)).max())
    bound = (2 * MAX_REL_ERROR["softmax"][5] + 2.0**-19) * largest
    rtol = half_unit(jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=bound, rtol=rtol)


def test_a_traced_scale_does_not_round():
    x = operands(t=40, s=60, dtype="bfloat16", h=64)
    for given, number in ((None, 0), ("bfloat16", 1)):

        def scaled(q, k, v, scale, given=given):
            return quake(q, k, v, scale=scale, compute_dtype=given)

        assert f"format={number}" in str(jax.make_jaxpr(scaled)(*x, 0.3))


@pytest.mark.parametrize("size", [1e-30, 1e20, 1e30])
def test_sizes_beyond_those_of_parts(size):
    # Queries and keys of opposite sizes, one logit of -inf or nearly, and values of that size.
    random = np.random.default_rng(0)
    q = (random.uniform(1, 2, (1, 16, 1, 32)) * size).astype(np.float32)
    k = (random.standard_normal((1, 40, 1, 32)) * 1e-2 / size).astype(np.float32)
    k[0, 3] = -1e3 * np.abs(k[0, 3])
    v = (random.standard_normal((1, 40, 1, 32)) * min(size, 1e30)).astype(np.float32)
    out = np.asarray(quake(q, k, v, scale=1.0), np.float64)
    expected, _ = in_double(q, k, v, scale=1.0)
    np.testing.assert_allclose(out, expected, atol=3e-6 * np.abs(v).max())
    if size == 1e20:
        k[0, 3] = -size * random.uniform(1, 2, 32)  # overflows
        out = quake(q, k, v, scale=1.0)
        assert np.isfinite(out).all()


def test_derivatives_do_not_depend_on_what_is_multiplied():
    x = operands()

    def loss(f, *x):
        return jnp.vdot(f(*x), normal(2, 7, 4, 16, seed=9))

    of_int8 = functools.partial(quake, compute_dtype="int8", order=5)
    f = functools.partial(quake, compute_dtype="bfloat16")
    slopes = [jax.grad(functools.partial(loss, g), (0, 1, 2))(*x) for g in (f, of_int8, exact)]
    for slope in slopes[:2]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3), slope, slopes[2]
        )
    stacked = [jnp.stack([a, a[::-1]]) for a in x]
    mapped = jax.jit(jax.vmap(f))(*stacked)
    for y, *one in zip(mapped, *stacked, strict=True):
        np.testing.assert_allclose(y, f(*one), atol=1e-6)


@pytest.mark.parametrize("name", JAX_CASES)
def test_shapes_dtypes_and_values_are_those_of_jax(name):
    for x in (operands(), [y[1] for y in operands(b=2)], operands(dtype="bfloat16")):
        case = dict(JAX_CASES[name])
        if x[0].ndim == 3:  # the first of the batch
            for key in case:
                if key.endswith(("lengths", "ids")):
                    case[key] = case[key][1:]
                elif key in ("bias", "mask") and case[key].ndim == 4:
                    case[key] = case[key][-1:]
        results = quake(*x, **case, return_residual=True)
        # bfloat16 is summed in other orders in jax.nn; the residual as well.
        tolerance = 3e-6 if x[0].dtype == jnp.float32 else 3e-2
        for y, z in zip(results, exact(*x, **case, return_residual=True), strict=True):
            assert (y.shape, y.dtype, y.weak_type) == (z.shape, z.dtype, z.weak_type)
            y, z = (np.asarray(a, np.float32) for a in (y, z))
            np.testing.assert_allclose(y, z, rtol=tolerance, atol=tolerance)
        np.testing.assert_array_equal(quake(*x, **case), results[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"t": 1, "s": 1},
        {"t": 1, "s": 300},
        {"t": 300, "s": 1},
        {"t": 65, "s": 290, "n": 6, "k": 3, "h": 40},
        {"n": 5, "k": 1, "h": 1},
        {"n": 3, "k": 3, "h": 24, "v": 7},
        {"h": 8, "v": 100, "t": 20},
        {"b": 1, "n": 2, "h": 512, "v": 512},
        {"b": 1, "n": 2, "h": 513, "v": 513},
        {"b": 1, "n": 2, "h": 600, "v": 8},
    ],
    ids=str,
)
def test_shapes(shape, dtype):
    x = operands(**shape, dtype=dtype)
    for case in ({}, {"is_causal": True}):
        expected, _ = in_double(*x, **case)
        out = quake(*x, **case)
        assert out.dtype == dtype
        if max(x[0].shape[-1], x[2].shape[-1]) <= 512:
            assert_close(out, expected, x[2])
        else:  # jax.nn, which rounds 16-bit weights
            np.testing.assert_allclose(
                np.asarray(out, np.float64), expected, atol=64 * half_unit(out.dtype)
            )


def test_orders_differ_and_the_exact_one_is_jax():
    x = operands(t=40, s=50)
    expected, _ = in_double(*x)
    errors = []
    for order in ORDERS:
        out = quake(*x, order=order)
        assert_close(out, expected, x[2], order)
        errors.append(np.abs(out - expected).max())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    for keywords in ({"order": "exact"}, {"implementation": "xla"}):
        np.testing.assert_array_equal(quake(*x, **keywords), jax.jit(exact)(*x))
    np.testing.assert_array_equal(quake(*x, implementation="quake"), quake(*x))


def test_a_soft_cap_without_the_kernel():
    x = operands()
    expected, _ = in_double(*x, logits_soft_cap=1.5, is_causal=True)
    for keywords in ({"order": "exact"}, {"implementation": "xla"}):
        out = quake(*x, logits_soft_cap=1.5, is_causal=True, **keywords)
        np.testing.assert_allclose(out, expected, atol=3e-6)


def test_a_negative_window_is_that_of_jax():
    x = operands()
    for window in ((-1, 3), (2, -1)):
        out = quake(*x, local_window_size=window)
        np.testing.assert_allclose(out, exact(*x, local_window_size=window), atol=1e-6)
        capped = quake(*x, local_window_size=window, logits_soft_cap=1e4)
        np.testing.assert_allclose(capped, out, atol=1e-5)


def test_other_dtypes_go_to_jax():
    with jax.enable_x64(True):
        x = [np.asarray(a, np.float64) for a in operands()]
        assert orders_in(jax.make_jaxpr(quake)(*x)) == []
        out = quake(*x)
        assert out.dtype == jnp.float64
        np.testing.assert_array_equal(out, jax.jit(exact)(*x))
        # A bias of another dtype does not change where the rest goes.
        x = operands()
        out = quake(*x, np.ones((1, 1, 1, 9), np.float64))
        assert out.dtype == jnp.float32


def test_special_rows():
    q, k, v = operands(b=1)
    everything = np.asarray(jnp.mean(v, 1, keepdims=True))
    for case in ({"mask": jnp.zeros((1, 1, 7, 9), bool)}, {"key_value_seq_lengths": lengths(0)}):
        out = quake(q, k, v, **case)
        np.testing.assert_allclose(out, np.repeat(everything, 2, 2).repeat(7, 1), atol=1e-6)
    out = quake(q, k, v, query_seq_lengths=lengths(3))
    assert not out[:, 3:].any() and out[:, :3].all()
    bias = jnp.zeros((1, 1, 7, 9)).at[:, :, 2].set(-jnp.inf)
    out = quake(q, k, v, bias)
    assert jnp.isnan(out[:, 2]).all() and jnp.isfinite(out[:, 3:]).all()
    large = quake(1e4 * q, k, v)
    np.testing.assert_allclose(large, in_double(1e4 * q, k, v)[0], atol=1e-3)


def test_empty_arrays():
    for shape in ({"b": 0}, {"t": 0}, {"s": 0}, {"n": 0, "k": 1}, {"v": 0}):
        x = operands(**shape)
        out = quake(*x)
        assert out.shape == (*x[0].shape[:3], x[2].shape[3]) and not out.any()


# Segments.

IDS = {
    "texts": lambda n, _: np.arange(n) // 40 - 2,
    "padded texts": lambda n, _: np.where(np.arange(n) < 0.8 * n, 1 + np.arange(n) // 70, 0),
    "long texts": lambda n, _: np.arange(n) // 128,
    "in no order": lambda n, rng: rng.integers(-1, 2, n) * (2**31 - 1),
    "one": lambda n, _: np.zeros(n),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize(
    "shape",
    [
        {"t": 300, "s": 300},
        {"t": 70, "s": 290, "n": 6, "k": 3, "h": 40},
        {"t": 65, "s": 600, "n": 3, "k": 1},  # keys are split
        {"t": 1, "s": 300, "k": 4},  # few rows
        {"t": 3, "s": 1025},
    ],
    ids=str,
)
def test_segments(shape, ids):
    rng = np.random.default_rng(3)
    for dtype in DTYPES[:2]:
        x = operands(**shape, dtype=dtype)
        ids_of_queries, ids_of_keys = (
            jnp.asarray(np.stack([ids(a.shape[1], rng), ids(a.shape[1], rng)[::-1]]), jnp.int32)
            for a in x[:2]
        )
        for is_causal in (False, True):
            case = {
                "query_segment_ids": ids_of_queries,
                "key_value_segment_ids": ids_of_keys,
                "is_causal": is_causal,
            }
            out, lse = quake(*x, **case, return_residual=True)
            expected, expected_lse = in_double(*x, **case)
            assert_close(out, expected, x[2])
            np.testing.assert_allclose(
                np.asarray(lse, np.float64), expected_lse, rtol=half_unit(dtype) + 1e-6, atol=8e-6
            )
            if dtype == "float32":
                np.testing.assert_allclose(out, exact(*x, **case), atol=3e-6)


def test_texts_packed_into_one_sequence_are_as_apart():
    x, sizes = operands(b=1, t=640, s=640, k=4), (300, 31, 309)
    ids = lengths(np.repeat([7, -7, 0], sizes))
    ends = np.cumsum(sizes)
    for case in ({}, {"is_causal": True}, {"local_window_size": (9, 3)}):
        whole = quake(*x, query_segment_ids=ids, **case)
        for begin, end in zip(ends - sizes, ends, strict=True):
            alone = quake(*(a[:, begin:end] for a in x), **case)
            np.testing.assert_allclose(whole[:, begin:end], alone, atol=2e-6)
    # Whole tiles of other texts are not touched.
    spoiled = [a.at[:, 331:].set(jnp.nan) for a in x]
    out = quake(*spoiled, query_segment_ids=ids)
    np.testing.assert_allclose(out[:, :256], quake(*x, query_segment_ids=ids)[:, :256], atol=1e-6)


# Packed operands.


@parametrize_cases
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_packed(case, dtype):
    q, k, v = operands(t=9, s=9, n=4, k=4, dtype=dtype)
    case = {
        name: x
        for name, x in case.items()
        if name not in ("bias", "mask") or (x.ndim == 4 and x.shape[2] == 1)
    }
    if "query_segment_ids" in case:
        case["query_segment_ids"] = case.pop("key_value_segment_ids")
    expected = quake(q, k, v, **case, return_residual=True)
    for axis in (-3, -2, 2, 3):
        qkv = jnp.stack([q, k, v], axis if axis > 0 else axis + 5)
        results = packed(qkv, qkv_axis=axis, return_residual=True, **case)
        for y, z in zip(results, expected, strict=True):
            np.testing.assert_array_equal(y, z)
    if not any(isinstance(x, jax.Array) for x in case.values()):
        np.testing.assert_array_equal(packed(jnp.stack([q, k, v], 2)[1], **case), expected[0][1])


def test_packed_operands_are_not_copied():
    qkv = normal(2, 9, 3, 4, 16)
    text = jax.jit(packed).lower(qkv).compile().as_text()
    (call,) = re.findall(r"custom-call\(([^)]*)\)", text)
    assert call.count("f32") == 1 or call.count("%") == 1
    assert "slice" not in text and "copy" not in text


def test_float16_without_the_kernel():
    # jax.nn has no float16 within jit on CPUs.
    x = operands(dtype="float16")
    out = quake(*x, order="exact", is_causal=True)
    np.testing.assert_allclose(out, in_double(*x, is_causal=True)[0], atol=1e-3)


def test_packed_and_exact():
    qkv = normal(2, 9, 3, 4, 16)
    parts = [qkv[:, :, i] for i in range(3)]
    np.testing.assert_allclose(packed(qkv, order="exact"), exact(*parts), atol=1e-6)
    np.testing.assert_allclose(packed(qkv, implementation="xla"), exact(*parts), atol=1e-6)


# Derivatives.


@pytest.fixture(params=["one tile", "tiles"])
def _tiles(request, monkeypatch):
    """Derivatives in one tile, and in tiles of 3 of 7 queries."""
    jax.clear_caches()
    if request.param == "tiles":
        monkeypatch.setattr(derivative, "_TILE_QUERIES", 3)
        monkeypatch.setattr(derivative, "_TILE_WEIGHTS", 1)
    yield
    jax.clear_caches()


def _derivatives(f, x, tangents):
    """Both modes, compiled: operation by operation takes longer."""

    @jax.jit
    def both(x, tangents):
        y, pull = jax.vjp(f, *x)
        return pull(normal(*y.shape, seed=9)), jax.jvp(f, x, tangents)

    return both(x, tangents)


def _assert_trees_close(a, b, tolerance=2e-5):
    for y, z in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (y.shape, y.dtype) == (z.shape, z.dtype)
        scale = max(1.0, float(np.abs(z).max()))
        np.testing.assert_allclose(y, z, atol=tolerance * scale, rtol=0)


DIFFERENTIATED = (
    "plain",
    "broadcast bias",
    "bias of queries",
    "mask of keys",
    "segments",
    "nothing kept",
    "everything",
)


@pytest.mark.usefixtures("_tiles")
def test_derivatives():
    for name in DIFFERENTIATED:
        case = dict(CASES[name])
        bias = case.pop("bias", None)
        x = operands()
        x = x if bias is None else (*x, bias)
        t = tuple(normal(*a.shape, seed=20 + i) for i, a in enumerate(x))
        ours, theirs = (
            _derivatives(functools.partial(quake, **case, implementation=which), x, t)
            for which in (None, "xla")
        )
        _assert_trees_close(ours, theirs)


@pytest.mark.usefixtures("_tiles")
def test_second_derivatives():
    case = CASES["everything"]
    x, t = operands(), operands(seed=30)

    def hessian_product(implementation):
        def loss(*x):
            return jnp.sum(jnp.sin(quake(*x, **case, implementation=implementation)))

        gradient = jax.grad(loss, (0, 1, 2))

        def along(*x):
            return sum(jnp.vdot(a, b) for a, b in zip(gradient(*x), t, strict=True))

        @jax.jit
        def both(x, t):
            return jax.jvp(gradient, x, t)[1], jax.grad(along, (0, 1, 2))(*x)

        return both(x, t)

    _assert_trees_close(hessian_product(None), hessian_product("xla"), 1e-4)


@pytest.mark.usefixtures("_tiles")
def test_derivatives_of_some_operands():
    x, bias = operands(), normal(1, 4, 7, 9, seed=5)
    for wanted in range(4):
        ours, theirs = (
            jax.jit(jax.grad(lambda *x, f=f: jnp.sum(f(*x) ** 2), wanted))(*x, bias)
            for f in (quake, exact)
        )
        _assert_trees_close(ours, theirs)
    # The residual is a constant.
    g = jax.grad(lambda q: jnp.sum(quake(q, *x[1:], return_residual=True)[1]))(x[0])
    assert not g.any()


def test_linearize_and_derivatives_of_derivatives_by_vmap():
    x, t = operands(b=1, t=3, s=4), operands(b=1, t=3, s=4, seed=30)
    case = {"is_causal": True, "logits_soft_cap": 2.0, "bias": normal(1, 4, 3, 4, seed=5)}

    def all_of(implementation):
        f = functools.partial(quake, **case, implementation=implementation)

        def loss(*x):
            return jnp.sum(jnp.sin(f(*x)))

        @jax.jit
        def derivatives(x, t):
            y, linear = jax.linearize(f, *x)
            back = jax.linear_transpose(linear, *x)(y)
            hessian = jax.hessian(loss)(*x)
            forward = jax.jacfwd(f, 1)(*x)
            third = jax.jvp(lambda *x: jax.jvp(jax.grad(loss), x, t)[1], x, t)[1]
            return y, linear(*t), back, hessian, forward, third

        return derivatives(x, t)

    _assert_trees_close(all_of(None), all_of("xla"), 1e-4)


def test_derivatives_of_packed_operands_and_of_16_bits():
    qkv = normal(2, 9, 3, 4, 16)

    def loss(qkv):
        return jnp.sum(packed(qkv, is_causal=True).astype(jnp.float32) ** 2)

    def plain(qkv):
        y = exact(*(qkv[:, :, i] for i in range(3)), is_causal=True)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    expected = jax.jit(jax.grad(plain))(qkv)
    _assert_trees_close(jax.jit(jax.grad(loss))(qkv), expected)
    for dtype in ("bfloat16", "float16"):
        g = jax.jit(jax.grad(loss))(qkv.astype(dtype))
        assert g.dtype == dtype
        np.testing.assert_allclose(np.asarray(g, np.float32), expected, atol=0.2)


def temporary_memory(f, length, heads=4, size=32):
    x = jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)
    return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_the_derivative_grows_with_the_length():
    def temporary(f, length):
        return temporary_memory(jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2)), length)

    sizes = [temporary(quake, length) for length in (2048, 4096, 8192)]
    first, second = np.diff(sizes)
    assert 0 < first < second < 2.5 * first and sizes[2] < 1.5 * sizes[1]
    assert temporary(exact, 8192) > 3.5 * temporary(exact, 4096)


def test_memory_of_the_program_is_less_than_that_of_its_operands():
    assert temporary_memory(quake, 16384, heads=1, size=64) < 1 << 20
    assert temporary_memory(exact, 16384, heads=1, size=64) > 1 << 30


LONG = """
import pathlib, re, resource
import jax, jax.numpy as jnp
import quake_jax

def peak():  # in MiB
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # there the other one is that of the parent process, if it was larger
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1]) / (1 << 10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)

f = jax.jit(quake_jax.dot_product_attention)
f(*[jnp.ones((1, 64, 1, 64))] * 3).block_until_ready()
before = peak()
x = [jax.random.normal(jax.random.key(i), (1, 16384, 1, 64)) for i in range(3)]
f(*x).block_until_ready()
print(peak() - before)
"""


def test_peak_memory_of_a_long_sequence(tmp_path):
    # Operands, result and all that is compiled included: 16 MiB are theirs.
    growth = float(run_python(LONG, tmp_path).stdout)
    assert 10 < growth < 256


def test_a_traced_scale():
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 2e-2)):
        x = operands(dtype=dtype)
        value, slope = (
            jax.jit(jax.value_and_grad(lambda s, f=f, x=x: jnp.mean(f(*x, scale=s) ** 2)))(0.3)
            for f in (quake, exact)
        )
        np.testing.assert_allclose(value, slope, rtol=tolerance, atol=tolerance)


# Transformations.


def test_vmap():
    q, k, v = operands()
    bias, mask = normal(2, 4, 7, 9, seed=5), keep(3, 1, 1, 7, 9)
    queries, values = normal(3, *q.shape, seed=6), normal(*v.shape, 3, seed=7)
    case = {"query_seq_lengths": lengths(7, 4), "key_value_seq_lengths": lengths(6, 9)}
    for f, axes, x in (
        (quake, (0, None, None), (queries, k, v)),
        (quake, (None, None, -1), (q, k, values)),
        (quake, (0, None, None, None), (queries, k, v, bias)),
        (quake, (0, None, None, None), (queries, k, v, bias[:1])),
        (quake, (None, None, None, None, 0), (q, k, v, bias, mask)),
        (quake, (0, None, -1, None, 0), (queries, k, values, bias, mask)),
    ):
        for keywords in ({}, case, SEGMENTS):
            ours, theirs = (
                jax.vmap(functools.partial(g, **keywords), axes)(*x) for g in (f, exact)
            )
            np.testing.assert_allclose(ours, theirs, atol=3e-6)
    per_row = jax.vmap(lambda n: quake(q, k, v, key_value_seq_lengths=n))
    np.testing.assert_allclose(
        per_row(jnp.stack([lengths(3, 4), lengths(9, 1)]))[1],
        quake(q, k, v, key_value_seq_lengths=lengths(9, 1)),
        atol=1e-6,
    )
    ids = jnp.stack([lengths([0, 0, 1, 1, 1, 2, 2]), lengths([4, 4, 4, 3, 3, 3, 3])])
    same = operands(b=1, s=7)
    np.testing.assert_allclose(
        jax.vmap(lambda n: quake(*same, query_segment_ids=n))(ids)[1],
        exact(*same, query_segment_ids=ids[1]),
        atol=1e-6,
    )
    qkv = normal(5, 2, 9, 3, 4, 16)
    np.testing.assert_allclose(jax.vmap(packed)(qkv)[3], packed(qkv[3]), atol=1e-6)
    twice = jax.vmap(jax.vmap(quake, (0, None, None)), (0, None, None))
    x = normal(2, *queries.shape, seed=8)
    np.testing.assert_allclose(twice(x, k, v)[1, 2], quake(x[1, 2], k, v), atol=1e-6)


SHARED = {
    "more queries": ({}, "f32[2,21,4,16]"),
    "more queries with masks": ({"mask": keep(2, 4, 1, 9)}, "f32[2,21,4,16]"),
    "more heads": ({"is_causal": True}, "f32[2,7,12,16]"),
    "more heads with a bias": ({"bias": normal(1, 1, 7, 9)}, "f32[2,7,12,16]"),
    "more heads with lengths": ({"query_seq_lengths": lengths(7, 3)}, "f32[2,7,12,16]"),
    "more heads with segments": (SEGMENTS, "f32[2,7,12,16]"),
}


@pytest.mark.parametrize(("case", "query"), SHARED.values(), ids=SHARED)
def test_vmap_over_queries_does_not_copy_keys(case, query):
    q, k, v = operands()
    queries = normal(3, *q.shape, seed=6)

    def f(q, k, v):
        return quake(q, k, v, **case)

    mapped = jax.jit(jax.vmap(f, (0, None, None)))
    text = mapped.lower(queries, k, v).compile().as_text()
    (call,) = [line for line in text.splitlines() if "custom_call_target=" in line]
    assert query in call.split("custom-call(")[0]
    for expected in (k, v):  # as they came, and nothing larger
        assert f"f32[{','.join(map(str, expected.shape))}]" in text
    assert "f32[6,9,2,16]" not in text and "f32[3,2,9,2,16]" not in text
    each = jnp.stack([f(a, k, v) for a in queries])
    np.testing.assert_allclose(mapped(queries, k, v), each, atol=1e-6)
    # What depends on both, and what maps the rest later.
    twice = jax.vmap(jax.vmap(f, (0, None, None)), (None, 0, 0))
    both = twice(queries, jnp.stack([k, -k]), jnp.stack([v, 2 * v]))
    np.testing.assert_allclose(both[0], each, atol=1e-6)
    np.testing.assert_allclose(both[1, 2], f(queries[2], -k, 2 * v), atol=2e-6)
    twice = jax.vmap(jax.vmap(f, (None, 0, 0)), (0, None, None))
    both = twice(queries, jnp.stack([k, -k]), jnp.stack([v, 2 * v]))
    np.testing.assert_allclose(both[2, 1], f(queries[2], -k, 2 * v), atol=2e-6)


def test_vmap_over_queries_with_a_bias_of_heads_and_queries():
    # Neither more queries nor more heads could have it: they become part of the batch.
    q, k, v = operands()
    queries, bias = normal(3, *q.shape, seed=6), normal(2, 4, 7, 9, seed=5)
    y = jax.vmap(lambda a: quake(a, k, v, bias))(queries)
    np.testing.assert_allclose(y[2], quake(queries[2], k, v, bias), atol=1e-6)


def test_vmap_of_derivatives_and_derivatives_of_vmap():
    q, k, v = operands()
    queries = normal(3, *q.shape, seed=6)

    def of_vmap(f):
        return jax.grad(lambda k: jnp.sum(jax.vmap(lambda q: f(q, k, v))(queries) ** 2))(k)

    def per_row(f):
        return jax.vmap(jax.grad(lambda q: jnp.sum(f(q, k, v) ** 2)))(queries)

    _assert_trees_close(of_vmap(quake), of_vmap(exact))
    _assert_trees_close(per_row(quake), per_row(exact))


def test_jit_scan_and_remat():
    q, k, v = operands(k=4)

    def layers(f, q):
        step = jax.checkpoint(lambda x, _: (f(x, k, v, is_causal=True), None))
        return jnp.sum(jax.lax.scan(step, q, None, 3)[0] ** 2)

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(layers, f)))(q) for f in (quake, exact)
    )
    _assert_trees_close(ours, theirs)


def test_results_do_not_depend_on_jit():
    x = operands(t=70, s=300)
    np.testing.assert_array_equal(jax.jit(quake)(*x), quake(*x))


def test_concurrent_calls_and_calls_side_by_side_in_one_program():
    shapes = ({"t": 130, "s": 260}, {"t": 1, "s": 3000, "h": 64}, {"b": 3, "t": 64, "s": 64})
    x = [operands(**shape) for shape in shapes]

    @jax.jit
    def together(x):
        return [quake(*a, is_causal=True) for a in x]

    expected = [quake(*a, is_causal=True) for a in x]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(lambda: jax.device_get(together(x))) for _ in range(64)]
        for run in runs:
            for y, z in zip(run.result(timeout=60), expected, strict=True):
                np.testing.assert_array_equal(y, z)


def test_the_fallback_of_other_platforms():
    x = operands()
    bias, mask = normal(1, 4, 7, 9, seed=5), keep(2, 1, 1, 9)
    text = jax.jit(quake).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
    assert "quake_jax" not in text
    common = {"order": 3, "format": 1, "scale": 0.25}
    common |= {"is_causal": 1, "window_left": -1, "window_right": 2}
    for cap, packed_axis in itertools.product((0.0, 2.0), (0, 2)):
        arrays = [jnp.stack(operands(t=9, n=4, k=4), 2)] if packed_axis else x
        b = bias[:, :, :1] if packed_axis else bias
        ids = (SEGMENTS["key_value_segment_ids"],) * 2 if packed_axis else SEGMENTS.values()
        out, lse = reference.dot_product_attention(
            *arrays, b, mask, *ids, packed_axis=packed_axis, present=51, soft_cap=cap, **common
        )
        q, k, v = [arrays[0][:, :, i] for i in range(3)] if packed_axis else arrays
        expected = in_double(
            q,
            k,
            v,
            b,
            mask,
            scale=0.25,
            is_causal=True,
            local_window_size=(99, 2),
            logits_soft_cap=cap or None,
            **dict(zip(SEGMENTS, ids, strict=True)),
        )
        np.testing.assert_allclose(out, expected[0], atol=3e-6)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=3e-6)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_batch_axis_stays_split(kind):
    x = operands(b=8, k=4)
    bias, mask = normal(1, 4, 7, 9, seed=5), keep(8, 1, 1, 9)

    def loss(f, *x):
        return jnp.sum(f(*x) ** 2)

    expected, slopes = exact(*x, bias, mask), jax.grad(loss, (1, 2, 3, 4))(exact, *x, bias, mask)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P("a"))) for a in (*x, mask)]
        whole = jax.device_put(bias, NamedSharding(mesh, P()))
        arguments = (*placed[:3], whole, placed[3])
        text = jax.jit(quake).lower(*arguments).compile().as_text()
        assert not re.search("all-gather|all-to-all|all-reduce|collective-permute", text)
        assert re.search(r"\(f32\[2,7,4,16\]\S* f32\[2,7,4\]\S* custom-call", text)
        for f in (quake, jax.jit(quake)):
            y = f(*arguments)
            np.testing.assert_allclose(y, expected, atol=3e-6)
            assert y.sharding.is_equivalent_to(placed[0].sharding, 4)
        grad = jax.jit(functools.partial(jax.grad(loss, (1, 2, 3, 4)), quake))
        _assert_trees_close(jax.device_get(grad(*arguments)), jax.device_get(slopes))
        # Other axes are gathered.
        placed = [jax.device_put(a, NamedSharding(mesh, P("a", None, "b"))) for a in x]
        _assert_trees_close(jax.device_get(grad(*placed, *arguments[3:])), jax.device_get(slopes))
        mapped = jax.shard_map(
            quake, in_specs=(*[P("a")] * 3, P(), P("a")), out_specs=P("a"), mesh=mesh
        )
        grad = jax.jit(functools.partial(jax.grad(loss, (1, 2, 3, 4)), mapped))
        _assert_trees_close(jax.device_get(grad(*arguments)), jax.device_get(slopes))


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_segments_are_split_with_the_batch(kind):
    x, ids = operands(b=8, s=7, k=4), jnp.arange(56, dtype=jnp.int32).reshape(8, 7) // 5

    def of(f):
        return lambda q, k, v, ids: f(q, k, v, query_segment_ids=ids)

    def slopes_of(f):
        return jax.jit(jax.grad(lambda *x: jnp.sum(f(*x) ** 2), (0, 1, 2)))

    expected, slopes = exact(*x, query_segment_ids=ids), slopes_of(of(exact))(*x, ids)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, NamedSharding(mesh, P("a"))) for a in (*x, ids)]
        text = jax.jit(of(quake)).lower(*split).compile().as_text()
        assert not re.search("all-gather|all-to-all|all-reduce|collective-permute", text)
        mapped = jax.shard_map(of(quake), in_specs=(P("a"),) * 4, out_specs=P("a"), mesh=mesh)
        for f in (of(quake), mapped):
            np.testing.assert_allclose(jax.jit(f)(*split), expected, atol=3e-6)
            _assert_trees_close(jax.device_get(slopes_of(f)(*split)), jax.device_get(slopes))


def test_export_with_symbolic_lengths():
    b, t = jax.export.symbolic_shape("b, t")
    shapes = (b, t, 4, 16), (b, t, 2, 16), (b, t, 2, 16), (1, 1, 1, t)
    types = [jax.ShapeDtypeStruct(s, jnp.bool_ if s[0] == 1 else jnp.float32) for s in shapes]
    types.append(jax.ShapeDtypeStruct((b, t), jnp.int32))
    checks = quake_jax.disabled_export_checks()
    x = [*operands(t=9, s=9), keep(1, 1, 1, 9), SEGMENTS["key_value_segment_ids"]]

    def f(q, k, v, mask, ids):
        return quake(q, k, v, mask=mask, query_segment_ids=ids)

    for g, mapped in (
        (f, False),
        (jax.grad(lambda *x: jnp.sum(f(*x)), (0, 1, 2)), False),
        (jax.vmap(f, (0, None, None, None, None)), True),
    ):
        query = jax.ShapeDtypeStruct((3, *types[0].shape), jnp.float32) if mapped else types[0]
        exported = jax.export.export(jax.jit(g), disabled_checks=checks)(query, *types[1:])
        y = [normal(3, *x[0].shape), *x[1:]] if mapped else x
        _assert_trees_close(exported.call(*y), g(*y))


# Parts of the keys.


def combined(outputs, residuals):
    """Attention over all keys, of that over parts of them and the residuals."""
    weights = jax.nn.softmax(jnp.stack(residuals), axis=0)[..., None]
    return jnp.sum(weights * jnp.stack(outputs), axis=0)


@pytest.mark.parametrize("name", ["plain", "mask", "bias", "soft cap"])
def test_halves_of_the_keys_combine_by_their_residuals(name):
    x = q, k, v = operands(s=8)
    case = {n: a[..., :8] if n in ("mask", "bias") else a for n, a in CASES[name].items()}

    def half(part):
        masks = {n: a[..., part] if n in ("mask", "bias") else a for n, a in case.items()}
        return quake(q, k[:, part], v[:, part], **masks, return_residual=True)

    outputs, residuals = zip(half(slice(5)), half(slice(5, 8)), strict=True)
    expected, expected_lse = in_double(*x, **case)
    assert_close(combined(outputs, residuals), expected, v)
    np.testing.assert_allclose(jnp.logaddexp(*residuals), expected_lse, rtol=1e-6, atol=4e-6)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
def test_a_ring_of_devices():
    """Each device has a part of queries and keys, and hands the keys on till all have seen them."""
    devices, length = 8, 5
    x = operands(t=devices * length, s=devices * length)
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def on_each(q, k, v):
        first = jax.lax.axis_index("d")
        positions = jnp.arange(length)

        def step(carry, i):
            k, v = carry
            source = (first - i) % devices
            mask = (source * length + positions) <= (first * length + positions)[:, None]
            part = quake(q, k, v, mask=mask[None, None], return_residual=True)
            return jax.lax.ppermute((k, v), "d", ring), part

        _, (outputs, residuals) = jax.lax.scan(step, (k, v), jnp.arange(devices))
        return combined(outputs, residuals)

    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=P(None, "d"), out_specs=P(None, "d"))
    expected, _ = in_double(*x, is_causal=True)
    assert_close(jax.jit(mapped)(*x), expected, x[2])


# Arguments.


def test_signature():
    ours = {p.name: p for p in inspect.signature(quake).parameters.values()}
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
    added = {"query_segment_ids", "key_value_segment_ids", "logits_soft_cap"}
    added |= {"compute_dtype", "order"}
    assert [name for name in ours if name not in added] == [p.name for p in theirs]
    assert added <= {*ours}
    for p in theirs:
        assert (ours[p.name].kind, ours[p.name].default) == (p.kind, p.default)
    shared = [name for name in ours if name not in ("query", "key", "value")]
    assert [n for n in inspect.signature(packed).parameters if n[:3] != "qkv"] == shared


Q, K, V = (np.ones(s, np.float32) for s in ((2, 7, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16)))
BAD = [
    ((Q[:, :, :3], K, V), {}, ValueError, "query"),
    ((Q[:1], K, V), {}, ValueError, "query"),
    ((Q[..., :5], K, V), {}, ValueError, "query"),
    ((Q.astype(np.float16), K, V), {}, ValueError, "query"),
    ((Q[None], K, V), {}, ValueError, "query"),
    ((Q, K[None], V), {}, ValueError, "key"),
    ((Q, K, V[:, :5]), {}, ValueError, "value"),
    ((Q, K, V[:, :, :1]), {}, ValueError, "value"),
    ((Q, K, V.astype(np.float16)), {}, ValueError, "value"),
    ((Q, K, V.astype(np.complex64)), {}, TypeError, "value"),
    ((None, K, V), {}, TypeError, "query"),
    ((Q, K, "v"), {}, TypeError, "value"),
    ((Q, K, V, np.ones((2, 3, 7, 9), np.float32)), {}, ValueError, "bias"),
    ((Q, K, V, np.ones((3, 1, 1, 9), np.float32)), {}, ValueError, "bias"),
    ((Q, K, V, np.ones((1, 2, 1, 7, 9), np.float32)), {}, ValueError, "bias"),
    ((Q, K, V, np.ones((1, 1, 1, 9), np.complex64)), {}, TypeError, "bias"),
    ((Q, K, V, None, np.ones((1, 1, 7, 9), np.float32)), {}, ValueError, "mask"),
    ((Q, K, V, None, np.ones((1, 1, 9, 7), bool)), {}, ValueError, "mask"),
    ((Q, K, V), {"query_seq_lengths": np.ones(3, np.int32)}, ValueError, "query_seq_lengths"),
    ((Q, K, V), {"query_seq_lengths": np.ones(2, np.float32)}, ValueError, "query_seq_lengths"),
    ((Q, K, V), {"key_value_seq_lengths": np.int32(2)}, ValueError, "key_value_seq_lengths"),
    ((Q, K, V), {"query_segment_ids": np.ones((2, 7), np.int32)}, ValueError, "query_segment_ids"),
    ((Q, K, V), {"key_value_segment_ids": np.ones((2, 9), np.int32)}, ValueError, "segment_ids"),
    ((Q, K, V), {"local_window_size": (1, 2, 3)}, TypeError, "local_window_size"),
    ((Q, K, V), {"local_window_size": 1.5}, TypeError, "local_window_size"),
    ((Q, K, V), {"implementation": "cuda"}, ValueError, "implementation"),
    ((Q, K, V), {"implementation": "cudnn", "logits_soft_cap": 1.0}, ValueError, "logits_soft_cap"),
    ((Q, K, V), {"logits_soft_cap": 0.0}, ValueError, "logits_soft_cap"),
    ((Q, K, V), {"logits_soft_cap": float("nan")}, ValueError, "logits_soft_cap"),
    ((Q, K, V), {"scale": np.ones(3)}, ValueError, "scale"),
    ((Q, K, V), {"order": 6}, ValueError, "order"),
]


@pytest.mark.parametrize(("arguments", "keywords", "error", "name"), BAD)
def test_errors_name_the_argument(arguments, keywords, error, name):
    with pytest.raises(error, match=name):
        quake(*arguments, **keywords)
    if arguments[0] is not None and arguments[2] is not None and not isinstance(arguments[2], str):
        with pytest.raises(error, match=name):
            jax.eval_shape(lambda *x: quake(*x, **keywords), *arguments)


def test_errors_of_packed_operands():
    for shape, keywords in (
        ((2, 9, 4, 16), {}),
        ((2, 9, 4, 3, 16), {}),
        ((2, 9, 3, 4, 16), {"qkv_axis": -2}),
        ((3, 9, 3, 4, 16), {"qkv_axis": 0}),
        ((3, 16), {}),
    ):
        with pytest.raises(ValueError, match="qkv"):
            packed(jnp.ones(shape), **keywords)
    with pytest.raises(TypeError, match="qkv_axis"):
        packed(jnp.ones((2, 9, 3, 4, 16)), qkv_axis=1.5)
    with pytest.raises(TypeError, match="qkv"):
        packed(None)


def test_static_arguments_are_not_traced():
    for name in ("is_causal", "logits_soft_cap", "local_window_size", "order"):
        with pytest.raises(TypeError, match=name):
            jax.jit(lambda x, name=name: quake(Q, K, V, **{name: x}))(1)
