"""Attention of any shapes, masks, biases and dtypes, against float64; permutations and rows."""

import hypothesis
import numpy as np
from attention_problems import HALF_ULP, examples, problems, tolerance
from hypothesis import strategies as st
from oracle import in_double

import quake_jax
from quake_jax._core.constants import MAX_REL_ERROR

quake = quake_jax.dot_product_attention
packed = quake_jax.packed_dot_product_attention


def assert_close(out, expected, x, order, soft_cap=None):
    """Both may be results: rounded to the dtype, and with an error each."""
    dtype, count = str(out.dtype), 1 + (expected.dtype == out.dtype)
    half = count * HALF_ULP[dtype]
    expected = np.asarray(expected, np.float64)
    atol = count * tolerance(x, order, dtype, soft_cap) * (1 + half)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=half, atol=atol)


@examples(150)
@hypothesis.given(problems())
def test_values_are_those_of_float64(problem):
    x, case, order = problem
    out, lse = quake(*x, **case, order=order, return_residual=True)
    expected, expected_lse = in_double(*x, **case)
    assert out.shape == expected.shape and out.dtype == x[0].dtype
    cap = case.get("logits_soft_cap")
    assert_close(out, expected, x, order, cap)
    # log(1 + e) of a sum whose terms have the relative error e, then the rounding of the logits.
    e = MAX_REL_ERROR["exp"][order] / (1 - MAX_REL_ERROR["exp"][order])
    atol = 1.02 * e + 2.0**-16 + (0 if cap is None else cap * MAX_REL_ERROR["tanh"][order])
    with np.errstate(over="ignore"):  # that of a row without keys is -inf in float16
        expected_lse = expected_lse.astype(lse.dtype).astype(np.float64)
    np.testing.assert_allclose(
        np.asarray(lse, np.float64), expected_lse, rtol=2 * HALF_ULP[str(out.dtype)], atol=atol
    )


@examples(30)
@hypothesis.given(problems(packed=True), st.sampled_from((-3, -2)))
def test_packed_operands_give_the_same(problem, axis):
    x, case, order = problem
    out = packed(np.stack(x, axis + 5), qkv_axis=axis, **case, order=order)
    np.testing.assert_array_equal(out, quake(*x, **case, order=order))


@examples(30)
@hypothesis.given(problems(), st.randoms(use_true_random=False))
def test_permuted_keys_give_the_same(problem, random):
    x, case, order = problem
    s = x[1].shape[1]
    # What depends on the position of keys becomes a mask.
    case = {name: case[name] for name in case if name in ("bias", "mask", "scale")}
    p = np.array(random.sample(range(s), s))

    def permuted(a):
        return a[..., p] if a.shape[3] == s else a

    out = quake(*x, **case, order=order)
    moved = {n: permuted(a) if n in ("bias", "mask") else a for n, a in case.items()}
    other = quake(x[0], x[1][:, p], x[2][:, p], **moved, order=order)
    assert_close(other, out, x, order)


@examples(30)
@hypothesis.given(problems())
def test_rows_of_the_batch_are_independent(problem):
    x, case, order = problem
    batch = x[0].shape[0]
    whole = quake(*x, **case, order=order)
    i = batch - 1
    row = {
        name: a[i:] if isinstance(a, np.ndarray) and a.shape[0] == batch else a
        for name, a in case.items()
    }
    alone = quake(*(a[i:] for a in x), **row, order=order)
    # Keys may be cut otherwise, by the shape.
    assert_close(alone, np.asarray(whole)[i:], x, order, case.get("logits_soft_cap"))
    # What others hold does no harm.
    if batch > 1:
        spoiled = [a.copy() for a in x]
        for a in spoiled:
            a[0] = np.nan
        np.testing.assert_array_equal(
            np.asarray(quake(*spoiled, **case, order=order))[i:], np.asarray(whole)[i:]
        )
