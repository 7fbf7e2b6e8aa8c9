"""Exact values in NumPy's double precision, and how far from them results may be.

Of element-wise functions they are the formulas of the table; see `support.Function`.
"""

import math

import numpy as np
from support import BIASED, POINTWISE, SPLITS, halves

from quake_jax import reference
from quake_jax._core.constants import MAX_ABS_ERROR, MAX_REL_ERROR
from quake_jax._elementwise import table

SMALLEST = 2.0**-126  # what is below may be 0
FUNCTIONS = {f.name: f for f in (*POINTWISE, *SPLITS, *BIASED)}


def in_double_precision(x):
    """Operands as the kernels read them: integers become float32, and denormals 0."""
    wide = [np.asarray(a).astype(np.float32).astype(np.float64) for a in x]
    return [np.where(np.abs(a) < SMALLEST, 0.0, a) for a in wide]


def exact_pointwise(name, x, is_double=False):
    """The exact values, and the absolute slack that underflow has."""
    function = FUNCTIONS[name]
    row = table.FUSED.get(name)
    if row is None:
        return function.expected(*x), SMALLEST
    activation = FUNCTIONS[row.activation].expected
    if row.kind == "biased":
        total = x[0] + x[1]
        return activation(total if is_double else in_double_precision([total])[0]), SMALLEST
    gate, value = halves(x[0], row.gate_first) if row.kind == "split" else x
    a = activation(gate)
    # The activation alone may underflow; 0 · inf is then NaN, as in float32 by jax.nn.
    undecided = (np.abs(a) < 1.1 * SMALLEST) & (a != 0) & np.isinf(value)
    return np.where(undecided, np.nan, a * value), SMALLEST * np.fmax(1, np.abs(value))


def assert_between(actual, expected, error, what) -> None:
    """Assert that results are numbers within `error` of the exact ones, rounded to their dtype."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, what
    error = np.where(np.isnan(error), 0, error)  # of an infinite result
    low, high = (
        np.asarray(v).astype(actual.dtype).astype(np.float64)
        for v in (expected - error, expected + error)
    )
    # inf - inf: an infinite result has no error.
    low, high = (np.where(np.isinf(expected), expected, v) for v in (low, high))
    got = actual.astype(np.float64)
    wrong = np.where(np.isnan(expected), ~np.isnan(got), ~((low <= got) & (got <= high)))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} wrong; at {at} got {got[at]!r}, expected "
            f"{expected[at]!r} from {low[at]!r} to {high[at]!r}"
        )


def pointwise_error(name, expected, slack, order):
    function = FUNCTIONS[name]
    key = function.bound_of or name
    if key in MAX_ABS_ERROR:
        return MAX_ABS_ERROR[key][order] + 2.0**-22 * np.abs(expected)
    relative = MAX_REL_ERROR[key][order] + (2.0**-22 if name in table.FUSED else 0)
    return relative * np.abs(expected) + slack


# Reductions.


def exact_row(name, x, axis, where=None, b=None, keepdims=False):
    """softmax, log_softmax or logsumexp in double precision, and max - x or 0 for its error."""
    kept = np.ones(x.shape, bool) if where is None else where
    if b is not None:
        kept = kept & (b != 0)
    kept = np.broadcast_to(kept, np.broadcast_shapes(kept.shape, x.shape))
    x = np.where(kept, x, -np.inf)
    largest = x.max(axis, keepdims=True, initial=-np.inf)
    finite = np.where(np.isfinite(largest), largest, 0)
    e = np.exp(x - finite) * (1 if b is None else np.where(kept, b, 0))
    total = e.sum(axis, keepdims=True)
    if name == "logsumexp":
        y = np.log(total) + finite
        return y if keepdims else y.reshape(np.sum(y, axis).shape)
    undefined = np.isinf(largest) | np.isnan(largest)
    y = e / total if name == "softmax" else (x - finite) - np.log(total)
    y = np.where(undefined, np.nan, y)
    return np.where(kept, y, 0.0 if name == "softmax" else -np.inf)


def row_error(name, expected, x, where, b, axis, order):
    if name == "softmax":
        # At order 1 exponentials, before they are divided by their sum, are smaller by up to 2^0.3.
        return MAX_REL_ERROR[name][order] * np.abs(expected) + 2 * SMALLEST
    scale = np.abs(expected)
    if name == "log_softmax":
        kept = np.ones(x.shape, bool) if where is None else where
        largest = np.where(kept, x, -np.inf).max(axis, keepdims=True, initial=-np.inf)
        scale = np.abs(x - largest)
    return MAX_ABS_ERROR[name][order] + 2.0**-22 * np.where(np.isfinite(scale), scale, 0)


# Attention.


def in_double(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    local_window_size=None,
    logits_soft_cap=None,
):
    """Output and log-sum-exp in float64, of operands with a batch axis."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    x = np.einsum("btnh,bsnh->bnts", q, k) * (1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if logits_soft_cap is not None:
        x = logits_soft_cap * np.tanh(x / logits_soft_cap)
    if bias is not None:
        x = x + np.asarray(bias, np.float64)
    t, s = np.arange(x.shape[2])[:, None], np.arange(x.shape[3])
    kept = np.ones(x.shape, bool)
    if mask is not None:
        kept &= np.asarray(mask)
    if is_causal:
        kept &= s <= t
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        kept &= (t <= s + left) & (t >= s - right)
    if query_seq_lengths is not None:
        kept &= t < np.asarray(query_seq_lengths)[:, None, None, None]
    if key_value_seq_lengths is not None:
        kept &= s < np.asarray(key_value_seq_lengths)[:, None, None, None]
    if query_segment_ids is not None:
        ids = query_segment_ids if key_value_segment_ids is None else key_value_segment_ids
        kept &= np.asarray(query_segment_ids)[:, None, :, None] == np.asarray(ids)[:, None, None]
    x = np.where(kept, x, reference.MASKED_LOGIT)
    largest = x.max(-1, keepdims=True)
    e = np.exp(x - largest)
    out = np.einsum("bnts,bsnh->btnh", e / e.sum(-1, keepdims=True), v)
    if query_seq_lengths is not None:
        out *= (t.T < np.asarray(query_seq_lengths)[:, None])[:, :, None, None]
    return out, (largest[..., 0] + np.log(e.sum(-1))).transpose(0, 2, 1)
