"""Dense layers of any shape and format: against double precision, and what integers do not see."""

import dense_oracle as oracle
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from attention_problems import examples
from hypothesis import strategies as st

import quake_jax

# The largest size of an axis is small, and sizes are drawn from few: each is compiled.
ROWS, COLUMNS, DEPTHS = (1, 2, 7, 19), (1, 16, 35), (1, 6, 32, 96)


@st.composite
def problems(draw, formats=tuple(oracle.FORMATS)):
    format = draw(st.sampled_from(formats))
    m, n = draw(st.sampled_from(ROWS)), draw(st.sampled_from(COLUMNS))
    k = oracle.depth(format, draw(st.sampled_from(DEPTHS)))
    seed = draw(st.integers(0, 2**31))
    # Rows with outliers, of one sign, and of numbers that are not normal.
    spread, shift = draw(st.sampled_from((0, 1, 3))), draw(st.sampled_from((0, -4, 4)))
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(m, k)) + shift) * np.exp(spread * rng.normal(size=(m, k)))
    w = rng.normal(size=(k, n)) * np.exp(rng.normal(size=(1, n)))
    return format, x.astype(np.float32), w.astype(np.float32)


@examples(60)
@hypothesis.given(problems())
def test_values_are_those_of_float64(problem):
    format, x, w = problem
    packed = oracle.pack(w, format)
    oracle.assert_close(quake_jax.dense(x, packed), oracle.dense(x, packed))


@examples(40)
@hypothesis.given(problems(("int8",)), st.randoms(use_true_random=False))
def test_permuted_depth_gives_the_same(problem, random):
    """Sums of integers do not depend on their order."""
    format, x, w = problem
    p = np.array(random.sample(range(x.shape[1]), x.shape[1]))
    y, z = (quake_jax.dense(a, oracle.pack(b, format)) for a, b in ((x, w), (x[:, p], w[p])))
    np.testing.assert_array_equal(y, z)


@examples(40)
@hypothesis.given(problems(("int8", "int8_groups", "int4")))
def test_rows_do_not_know_each_other(problem):
    """Each gives what it gives alone, however rows are cut into blocks."""
    format, x, w = problem
    packed = oracle.pack(w, format)
    y = quake_jax.dense(x, packed)
    exactly = format == "int8"
    for part in (slice(0, 1), slice(len(x) // 2, None)):
        alone = quake_jax.dense(x[part], packed)
        if exactly:
            np.testing.assert_array_equal(alone, y[part])
        else:
            # Groups are added up in float32.
            assert_near(alone, y[part], x[part], packed)


def assert_near(y, z, x, packed):
    magnitude = np.abs(x) @ np.abs(np.asarray(packed.unpack()))
    assert (np.abs(np.asarray(y) - np.asarray(z)) <= 2.0**-18 * magnitude + 1e-30).all()


@examples(40)
@hypothesis.given(problems(("int8", "int8_groups", "int4")))
def test_columns_do_not_know_each_other(problem):
    format, x, w = problem
    y = quake_jax.dense(x, oracle.pack(w, format))
    for part in (slice(0, 1), slice(w.shape[1] // 2, None)):
        packed = oracle.pack(w[:, part], format)
        alone = quake_jax.dense(x, packed)
        if format == "int8":
            np.testing.assert_array_equal(alone, y[:, part])
        else:
            assert_near(alone, y[:, part], x, packed)


@examples(20)
@hypothesis.given(problems(("int8",)), st.integers(-20, 20))
def test_powers_of_two_scale_exactly(problem, exponent):
    """A row's scale moves with it."""
    format, x, w = problem
    packed = oracle.pack(w, format)
    scaled = quake_jax.dense(x * np.float32(2.0**exponent), packed)
    expected = quake_jax.dense(x, packed) * jnp.float32(2.0**exponent)
    np.testing.assert_array_equal(scaled, expected)


@examples(20)
@hypothesis.given(problems())
def test_packing_twice_gives_the_same(problem):
    """What a packed weight stands for is packed into itself, but for the rounding of its scales."""
    format, _, w = problem
    packed = oracle.pack(w, format)
    again = oracle.pack(packed.unpack(), format)
    if "float" in format:
        jax.tree.map(np.testing.assert_array_equal, packed, again)
    np.testing.assert_allclose(again.unpack(), packed.unpack(), rtol=2e-3, atol=1e-6)
