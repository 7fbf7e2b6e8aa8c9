"""Fused attention for Flax NNX's attention modules: `attention_fn`, which they take by that name.

Flax is imported when the function is called, so this module can be imported without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._config import EXACT, Order, resolved_order
from quake_jax._drop_in import KERNEL_DTYPES
from quake_jax.linen import _attention


def _without_batch_axis(x):
    """Drop a batch axis of one: jax.nn.dot_product_attention allows it beside unbatched arrays."""
    x = None if x is None else jnp.asarray(x)
    return x[0] if x is not None and x.ndim == 4 and x.shape[0] == 1 else x


def attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable | None = None,
    is_causal: bool = False,
    *,
    order: Order | None = None,
) -> jax.Array:
    """Attention for NNX: `flax.nnx.dot_product_attention` with QuAKE (arXiv 2412.00408).

    It calls `quake_jax.dot_product_attention`, which never holds all the weights. Where they are
    needed (dropout, `module`, a bias or mask that gives the result more axes), it computes as Flax
    does, with `quake_jax.softmax`.

    Args:
      query: array of shape [batch..., queries, heads, depth], with any number of batch axes.
      key: array of shape [batch..., keys, key heads, depth]. The number of heads is a multiple of
        the number of key heads, each of which serves as many heads in a row.
      value: array of shape [batch..., keys, key heads, value depth].
      bias: array that broadcasts with [batch..., heads, queries, keys] and is added to the logits,
        or None.
      mask: array that broadcasts with the same, or None. A query attends to the keys where it is
        true (or not 0), or to all alike if there are none.
      broadcast_dropout: whether all batch axes and heads drop the same weights.
      dropout_rng: key for dropout; the same key drops the same weights as in Flax.
      dropout_rate: probability that a weight is dropped.
      deterministic: True turns dropout off.
      dtype: dtype that query, key and value are converted to; None promotes them to a common one.
        float32, bfloat16 and float16 use kernels; others get Flax's function.
      precision: of the products outside the kernel, as in `jax.numpy.einsum`. The kernel's are
        float32.
      module: a `flax.nnx.Module`, which sows the weights as `nnx.Intermediate` into its attribute
        "attention_weights", or None.
      promote_dtype: what converts (query, key, value), given them and `dtype`; None is Flax's.
      is_causal: whether query i attends to the keys up to i only.
      order: accuracy. 1 to 5 is the degree of the polynomial in the exponential (see `exp`);
        "exact" is Flax's function. None is the default in force (see `default_order`), in all cases
        that of `dot_product_attention`.

    Returns:
      An array of shape [batch..., queries, heads, value depth].

    Raises:
      TypeError, ValueError: if order is not allowed.
      ValueError: if shapes do not fit; if dropout lacks its key.

    Example:
      >>> from flax import nnx
      >>> import functools, jax.numpy as jnp
      >>> from quake_jax.nnx import attention_fn
      >>> fast = functools.partial(attention_fn, order=3)
      >>> layer = nnx.MultiHeadAttention(
      ...     2, 16, attention_fn=fast, decode=False, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((1, 8, 16)))
    """
    from flax import nnx
    from flax.nnx.nn import dtypes

    order = resolved_order(order, "dot_product_attention")
    promote_dtype = promote_dtype or dtypes.promote_dtype
    promoted = promote_dtype((query, key, value), dtype=dtype)
    if order == EXACT or promoted[0].dtype not in KERNEL_DTYPES:
        return nnx.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=module,
            promote_dtype=promote_dtype,
            # Flax 0.12.0 has no such argument.
            **({"is_causal": True} if is_causal else {}),
        )
    if promoted[0].ndim == 3:
        bias, mask = _without_batch_axis(bias), _without_batch_axis(mask)
    sow = None
    if module is not None:
        sow = functools.partial(module.sow, nnx.Intermediate, "attention_weights")
    return _attention(
        *promoted,
        bias,
        mask,
        function="nnx.attention_fn",
        order=order,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        sow=sow,
        precision=precision,
        grouped=True,
        is_causal=is_causal,
    )
