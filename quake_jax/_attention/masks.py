"""Which keys a query sees, and what a logit of another is: the one place that says it."""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What jax.nn puts in the place of a masked float32 logit.
MASKED_LOGIT = float(np.float32(-0.7 * float(np.finfo(np.float32).max)))


class Constant(enum.Enum):
    """What is constant where a key is masked.

    That shows in derivatives where a query sees no key: elsewhere a masked logit's weight is 0.
    """

    WHOLE = enum.auto()  # all of the logit, as in jax.nn
    PRODUCT = enum.auto()  # what query and key make of it; the bias is added afterwards
    NOTHING = enum.auto()  # the mask is itself added


class Masking(NamedTuple):
    """How logits are masked.

    Attributes:
      constant: what of a masked logit is constant.
      is_by_bias: whether the bias holds what masks put into logits or add to them; the mask, if
        there is one, then only says which logits are constant.
    """

    constant: Constant = Constant.WHOLE
    is_by_bias: bool = False


def in_window(t, s, left: int | None, right: int | None):
    """Whether a query at position t sees a key at s, from t - left to t + right; None: no limit.

    Of arrays of JAX or NumPy that broadcast; None if there is no limit at all.
    """
    kept = [] if left is None else [t <= s + left]
    if right is not None:
        kept.append(t >= s - right)
    return functools.reduce(lambda a, b: a & b, kept) if kept else None


def with_segments(
    mask: jax.Array | None, query_segments: jax.Array | None, key_segments: jax.Array | None
) -> jax.Array | None:
    """A mask that keeps, of what `mask` does, the keys of the query's own segment.

    The segments have shapes (B, T) and (B, S), or both are None.
    """
    if query_segments is None or key_segments is None:
        return mask
    kept = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    return kept if mask is None else mask & kept


def kept_keys(
    queries: jax.Array,
    keys: int,
    mask: jax.Array | None,
    query_lengths: jax.Array | None,
    key_lengths: jax.Array | None,
    *,
    is_causal: bool,
    window_left: int,
    window_right: int,
) -> jax.Array | None:
    """Which of the `keys` keys each of `queries` (T positions) sees, or None if it is all.

    mask broadcasts to (B, N, T, S) and so does the result; lengths have shape (B,), and a window
    of -1 has no limit.
    """
    # All of four axes, as jax_numpy_rank_promotion="raise" demands.
    t, s = queries[None, None, :, None], jnp.arange(keys)[None, None, None, :]
    left, right = (None if limit < 0 else limit for limit in (window_left, window_right))
    kept = [mask, s <= t if is_causal else None, in_window(t, s, left, right)]
    if query_lengths is not None:
        kept.append(t < query_lengths[:, None, None, None])
    if key_lengths is not None:
        kept.append(s < key_lengths[:, None, None, None])
    kept = [k for k in kept if k is not None]
    return functools.reduce(jnp.logical_and, kept) if kept else None
