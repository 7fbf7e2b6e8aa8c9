"""Generated operands and options of attention, and the error that its results may have."""

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from support import DTYPES, ORDERS

from quake_jax._core.constants import MAX_REL_ERROR

HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
# Compiling takes most of the time, so the shapes are few: 1, odd ones, and more than a tile.
LENGTHS = (1, 2, 7, 33, 70, 270)
SIZES = (1, 5, 16, 33, 72)


# In NumPy: operations on jax.Arrays would be compiled too.


def normal(*shape, seed=0, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return values.astype(np.float32).astype(jnp.dtype(dtype))


def lengths(*values):
    return np.array(values, np.int32)


def tolerance(x, order, dtype, soft_cap=None):
    """What `python -m quake_jax.accuracy` states, with the largest value for all others.

    Logits are sums of up to 72 products of N(0, 1) numbers, divided by the root, and a bias.
    """
    e = MAX_REL_ERROR["exp"][order]
    largest = float(np.abs(np.asarray(x[2], np.float64)).max())
    rounding = 2.0**-16
    if soft_cap is not None:
        rounding += 2 * soft_cap * MAX_REL_ERROR["tanh"][order]
    if dtype == "bfloat16":
        rounding += 2.0**-8  # weights with AVX512_BF16
    return (2 * e / (1 - e) + rounding) * largest + 2.0**-24


@st.composite
def operands(draw, packed=False):
    b, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9))
    t, h = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from(SIZES))
    if packed:
        return tuple(normal(b, t, k, h, seed=seed + i, dtype=dtype) for i in range(3))
    n, s, v = (
        k * draw(st.integers(1, 3)),
        draw(st.sampled_from(LENGTHS)),
        draw(st.sampled_from(SIZES)),
    )
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, v)
    return tuple(normal(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))


@st.composite
def options(draw, x):
    """Keyword arguments for operands, a few of them at a time."""
    b, t, n, _ = x[0].shape
    s = x[1].shape[1]
    kinds = (
        *("bias", "mask", "causal", "window", "query lengths", "key lengths", "segments"),
        *("cap", "scale"),
    )
    chosen = draw(st.sets(st.sampled_from(kinds), max_size=4))
    broadcast = st.tuples(*(st.sampled_from((1, size)) for size in (b, n, t, s)))
    case = {}
    if "bias" in chosen:
        case["bias"] = normal(*draw(broadcast), seed=11, dtype=draw(st.sampled_from(DTYPES)))
    if "mask" in chosen:
        case["mask"] = np.random.default_rng(12).random(draw(broadcast)) > 0.4
    if "causal" in chosen:
        case["is_causal"] = True
    if "window" in chosen:
        case["local_window_size"] = (draw(st.integers(0, 80)), draw(st.integers(0, 80)))
    if "query lengths" in chosen:
        case["query_seq_lengths"] = lengths(*(draw(st.integers(0, t + 3)) for _ in range(b)))
    if "key lengths" in chosen:
        case["key_value_seq_lengths"] = lengths(*(draw(st.integers(0, s + 3)) for _ in range(b)))
    if "segments" in chosen:
        # Texts of one length, one behind the other.
        text = draw(st.integers(1, 100))
        case["query_segment_ids"], case["key_value_segment_ids"] = (
            np.broadcast_to(np.arange(n, dtype=np.int32) // text, (b, n)) for n in (t, s)
        )
    if "cap" in chosen:
        case["logits_soft_cap"] = draw(st.sampled_from((0.5, 5.0)))
    if "scale" in chosen:
        case["scale"] = draw(st.sampled_from((0.0, -0.1, 0.3)))
    return case


def problems(packed=False):
    return operands(packed=packed).flatmap(
        lambda x: st.tuples(st.just(x), options(x), st.sampled_from(ORDERS))
    )


def examples(count):
    # The same ones each time; what fails is reported as it is, since shrinking compiles a lot.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
