"""Fused attention for Flax Linen's attention modules: `attention_fn`, which they take by that name.

The part up to `attention_fn` knows nothing of Linen; quake_jax.nnx uses it too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._config import EXACT, Order, resolved_order
from quake_jax._drop_in import KERNEL_DTYPES, as_array, optional_array, static_bool
from quake_jax.attention import dot_product_attention
from quake_jax.linen._substitutes import require_flax
from quake_jax.softmax import softmax


def _checked_shape(query, key, value, bias, mask, *, function: str, grouped: bool) -> tuple:
    """Return the shape of the attention weights, before bias and mask; raise if it has none."""

    def refuse(array, rule, *others):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in (array, *others))
        raise ValueError(f"quake_jax.{function}: {array[0]} must {rule}; got shapes {shapes}")

    q, k, v = ("query", query), ("key", key), ("value", value)
    if query.ndim < 3:
        refuse(q, "have the axes [batch..., length, heads, depth]")
    for other in (k, v):
        if other[1].ndim != query.ndim or other[1].shape[:-3] != query.shape[:-3]:
            refuse(other, "have the batch axes of query", q)
    if value.shape[-3:-1] != key.shape[-3:-1]:
        refuse(v, "have the length and heads of key", k)
    if key.shape[-1] != query.shape[-1]:
        refuse(k, "have the depth of query", q)
    heads, key_heads = query.shape[-2], key.shape[-2]
    if grouped and (key_heads == 0 or heads % key_heads):
        refuse(q, "have a multiple of the heads of key", k)
    if not grouped and heads != key_heads:
        refuse(k, "have the heads of query", q)
    shape = (*query.shape[:-3], heads, query.shape[-3], key.shape[-3])
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None:
            try:
                jnp.broadcast_shapes(shape, x.shape)
            except ValueError:
                refuse((name, x), f"broadcast to [batch..., heads, queries, keys] = {shape}")
    return shape


def _check_others(function: str, dtype, dropout_rng, dropout_rate, module) -> None:
    """Raise TypeError or ValueError for what is not an array."""

    def refuse(error, name, expected, value):
        raise error(f"quake_jax.{function}: {name} must be {expected}; got {value!r}")

    try:
        jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        refuse(TypeError, "dtype", "None or a dtype", dtype)
    if dropout_rng is not None and not hasattr(dropout_rng, "dtype"):
        refuse(TypeError, "dropout_rng", "None or a key", dropout_rng)
    try:
        is_probability = 0 <= float(dropout_rate) <= 1
    except (TypeError, ValueError):
        is_probability = False
    if not is_probability:
        refuse(ValueError, "dropout_rate", "a number from 0 to 1", dropout_rate)
    if module is not None and not hasattr(module, "sow"):
        refuse(TypeError, "module", "None or a module of Flax, which sows the weights", module)


def _one_batch_axis(x, batch: tuple[int, ...]):
    """Give a bias or a mask four axes, of which the first is 1 or all of `batch` in one."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if math.prod(x.shape[:-3]) != 1:
        x = jnp.broadcast_to(x, batch + x.shape[-3:])
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _fused(query, key, value, bias, mask, *, is_causal: bool, order: Order) -> jax.Array:
    batch = query.shape[:-3]
    if len(batch) != 1:
        query, key, value = (
            x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
        )
    bias, mask = (None if x is None else _one_batch_axis(x, batch) for x in (bias, mask))
    y = dot_product_attention(query, key, value, bias, mask, is_causal=is_causal, order=order)
    return y if len(batch) == 1 else y.reshape(batch + y.shape[-3:])


def _unfused(
    query,
    key,
    value,
    bias,
    mask,
    *,
    is_causal: bool,
    order: Order,
    force_float32: bool,
    use_weights: list[Callable],
    qk_einsum: Callable,
    value_einsum: Callable,
) -> jax.Array:
    """Attention with Flax's arithmetic, each step in Flax's dtype, and the softmax kernel."""
    dtype = query.dtype
    groups = query.shape[-2] // key.shape[-2]
    if groups > 1:
        key, value = (jnp.repeat(x, groups, axis=-2) for x in (key, value))
    query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
    logits = qk_einsum("...qhd,...khd->...hqk", query, key)
    if bias is not None:
        logits = logits + bias
    if is_causal:
        causal = jnp.tril(jnp.ones((1,) * (logits.ndim - 2) + logits.shape[-2:], bool))
        mask = causal if mask is None else jnp.logical_and(mask, causal)
    if mask is not None:
        # Not -inf: a row that is masked as a whole has uniform weights, in the kernel as well.
        logits = jnp.where(mask, logits, jnp.finfo(dtype).min)
    if force_float32:
        weights = softmax(logits.astype(jnp.float32), order=order)
    else:
        weights = softmax(logits, order=order).astype(dtype)
    for use in use_weights:
        weights = use(weights)
    return value_einsum("...hqk,...khd->...qhd", weights, value)


def _dropout(weights, *, rng, rate: float, broadcast: bool, dtype) -> jax.Array:
    """Flax's dropout of attention weights: the same rng drops the same ones."""
    batch = (1,) * (weights.ndim - 2) if broadcast else weights.shape[:-2]
    keep = jax.random.bernoulli(rng, 1.0 - rate, batch + weights.shape[-2:])
    return weights * (keep.astype(dtype) / jnp.asarray(1.0 - rate, dtype))


def _attention(
    query,
    key,
    value,
    bias,
    mask,
    *,
    function: str,
    order: Order,
    broadcast_dropout: bool,
    dropout_rng,
    dropout_rate: float,
    deterministic: bool,
    sow: Callable | None,
    precision=None,
    grouped: bool = False,
    is_causal: bool = False,
    force_float32: bool = False,
    dot_general: Callable | None = None,
    einsums: tuple[Callable, Callable] | None = None,
) -> jax.Array:
    """Attention of arrays of one of KERNEL_DTYPES, fused unless something else needs the weights.

    `sow(weights)` stores the weights before dropout.
    """
    bias = None if bias is None else jnp.asarray(bias)
    mask = None if mask is None else jnp.asarray(mask).astype(bool)
    shape = _checked_shape(query, key, value, bias, mask, function=function, grouped=grouped)
    use_weights = []
    if sow is not None:

        def sown(weights):
            sow(weights)
            return weights

        use_weights.append(sown)
    if not deterministic and dropout_rate > 0.0:
        if dropout_rng is None:
            raise ValueError(
                f"quake_jax.{function}: dropout_rng must be a key where dropout_rate is positive "
                "and deterministic False; got None"
            )
        use_weights.append(
            functools.partial(
                _dropout,
                rng=dropout_rng,
                rate=dropout_rate,
                broadcast=broadcast_dropout,
                dtype=query.dtype,
            )
        )
    # A bias or a mask with more axes, or larger ones, than the weights gives the result its own.
    extends = any(
        jnp.broadcast_shapes(shape, x.shape) != shape for x in (bias, mask) if x is not None
    )
    if use_weights or extends or dot_general is not None or einsums is not None:
        if einsums is None:
            einsum = functools.partial(
                jnp.einsum, precision=precision, _dot_general=dot_general or jax.lax.dot_general
            )
            einsums = einsum, einsum
        return _unfused(
            query,
            key,
            value,
            bias,
            mask,
            is_causal=is_causal,
            order=order,
            force_float32=force_float32,
            use_weights=use_weights,
            qk_einsum=einsums[0],
            value_einsum=einsums[1],
        )
    if force_float32:
        # The kernel's softmax is float32 anyway; but Flax returns float32 then.
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    return _fused(query, key, value, bias, mask, is_causal=is_causal, order=order)


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
    result more axes), it computes as Flax does, with `quake_jax.softmax`.

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
    _check_others("linen.attention_fn", dtype, dropout_rng, dropout_rate, module)
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
    return _attention(
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
