"""`attention_fn`, which Flax Linen's attention modules take by that name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._core.config import EXACT, Order, resolved_order
from quake_jax._core.drop_in import KERNEL_DTYPES, as_array, optional_array, static_bool
from quake_jax._flax.attention import attention, check_others, products_are_changed
from quake_jax._flax.substitutes import require_flax


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
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
    *,
    is_causal: bool = False,
    order: Order | None = None,
) -> jax.Array:
    """Attention for Linen: `flax.linen.dot_product_attention` with QuAKE (arXiv 2412.00408).

    It calls `quake_jax.dot_product_attention`, which never holds all the weights. Where they are
    needed (dropout, `module`, an einsum or dot_general of one's own, a bias or mask that gives the
    result more axes), or another library has changed JAX's products (qwix, in a model that it has
    quantised), it computes as Flax does, with `quake_jax.softmax`.

    Args:
      query: array of shape [batch..., queries, heads, depth], with any number of batch axes.
      key: array of shape [batch..., keys, heads, depth].
      value: array of shape [batch..., keys, heads, value depth].
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
      module: a `flax.linen.Module`, which sows the weights as "attention_weights" into the
        collection "intermediates", or None.
      force_fp32_for_softmax: whether the softmax, and so the result, is float32.
      einsum_dot_general: the dot_general of the products, or None.
      qk_attn_weights_einsum, attn_weights_value_einsum: the einsums that take the place of the two
        products, or None for both.
      is_causal: whether query i attends to the keys up to i only. Flax's function has no such
        argument; a causal mask costs more.
      order: accuracy. 1 to 5 is the degree of the polynomial in the exponential (see `exp`);
        "exact" is Flax's function. None is the default in force (see `default_order`), in all cases
        that of `dot_product_attention`.

    Returns:
      An array of shape [batch..., queries, heads, value depth].

    Raises:
      ImportError: if Flax is not installed.
      TypeError, ValueError: if order is not allowed.
      ValueError: if shapes do not fit; if one einsum is given without the other, or with precision
        or einsum_dot_general; if dropout lacks its key.

    Example:
      >>> import flax.linen as nn, functools, jax, jax.numpy as jnp
      >>> from quake_jax.linen import attention_fn
      >>> fast = functools.partial(attention_fn, order=3)
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=fast)
      >>> x = jnp.ones((1, 8, 16))
      >>> y = layer.apply(layer.init(jax.random.key(0), x), x)
    """
    require_flax("quake_jax.linen")
    import flax.linen
    from flax.linen.dtypes import promote_dtype

    order = resolved_order(order, "dot_product_attention")
    arrays = {"query": query, "key": key, "value": value}
    query, key, value = (as_array(x, "linen.attention_fn", name) for name, x in arrays.items())
    bias = optional_array(bias, "linen.attention_fn", "bias")
    mask = optional_array(mask, "linen.attention_fn", "mask")
    is_causal = static_bool(is_causal, "linen.attention_fn", "is_causal")
    check_others("linen.attention_fn", dtype, dropout_rng, dropout_rate, module)
    for name, function in (
        ("einsum_dot_general", einsum_dot_general),
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if function is not None and not callable(function):
            raise TypeError(
                f"quake_jax.linen.attention_fn: {name} must be None or a function; got {function!r}"
            )
    promoted = promote_dtype(query, key, value, dtype=dtype)
    if order == EXACT or promoted[0].dtype not in KERNEL_DTYPES:
        if is_causal:
            causal = jnp.tril(jnp.ones((promoted[0].shape[-3], promoted[1].shape[-3]), bool))
            mask = causal if mask is None else jnp.logical_and(mask, causal)
        return flax.linen.dot_product_attention(
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
            force_fp32_for_softmax=force_fp32_for_softmax,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
    einsums = (qk_attn_weights_einsum, attn_weights_value_einsum)
    given = [einsum for einsum in einsums if einsum is not None]
    if len(given) == 1:
        raise ValueError(
            "quake_jax.linen.attention_fn: qk_attn_weights_einsum and attn_weights_value_einsum "
            "must be given together, or neither"
        )
    if given and (precision is not None or einsum_dot_general is not None):
        raise ValueError(
            "quake_jax.linen.attention_fn: qk_attn_weights_einsum and attn_weights_value_einsum "
            "must be None where precision or einsum_dot_general is given"
        )
    sow = None
    if module is not None:
        sow = functools.partial(module.sow, "intermediates", "attention_weights")
    return attention(
        *promoted,
        bias,
        mask,
        function="linen.attention_fn",
        order=order,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        sow=sow,
        precision=precision,
        is_causal=is_causal,
        force_float32=force_fp32_for_softmax,
        dot_general=einsum_dot_general,
        einsums=einsums if given else None,
    )


@functools.wraps(attention_fn)
def attention_in_program(*args, order: Order | None = None, **kwargs) -> jax.Array:
    """`attention_fn`, or Flax's own function if its products may be another library's.

    The rewriter finds attention in the program then if the products are JAX's after all.
    """
    import flax.linen

    if products_are_changed():
        return flax.linen.dot_product_attention(*args, **kwargs)
    return attention_fn(*args, order=order, **kwargs)


@functools.wraps(attention_fn)
def causal_attention_fn(query, key, *args, **kwargs) -> jax.Array:
    """`attention_fn` of a decoder, whose cache may be Flax's."""
    # With a filled cache there is one query, later than all the keys that Flax's mask leaves it.
    return attention_fn(query, key, *args, is_causal=query.shape[-3] == key.shape[-3], **kwargs)
