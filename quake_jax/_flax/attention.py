"""Attention as Flax's modules call it, in Linen and NNX alike: fused where it can be, else as Flax
computes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quake_jax._attention.api import dot_product_attention
from quake_jax._core.config import Order
from quake_jax._core.jax_names import Primitive
from quake_jax._rows.api import softmax


def _products() -> list:
    """What computes the products of Flax's attention at present."""
    functions = (jnp.einsum, jax.lax.dot_general, Primitive.bind)
    return [getattr(function, "__code__", function) for function in functions]


_PRODUCTS_OF_JAX = _products()


def products_are_changed() -> bool:
    """Whether another library has put something in the place of JAX's products.

    qwix exchanges these functions or their code while a model runs that it has quantised. Fused
    attention would pass the products by, and undo that.
    """
    return _products() != _PRODUCTS_OF_JAX


def checked_shape(query, key, value, bias, mask, *, function: str, grouped: bool) -> tuple:
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


def extends(shape: tuple[int, ...], x) -> bool:
    """Whether a bias or a mask has more axes, or larger ones, than the weights have by themselves.

    The result has them too then.
    """
    return x is not None and jnp.broadcast_shapes(shape, x.shape) != shape


def check_others(function: str, dtype, dropout_rng, dropout_rate, module) -> None:
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


def one_batch_axis(x, batch: tuple[int, ...]):
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
    bias, mask = (None if x is None else one_batch_axis(x, batch) for x in (bias, mask))
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


def attention(
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
    shape = checked_shape(query, key, value, bias, mask, function=function, grouped=grouped)
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
    own_products = dot_general is not None or einsums is not None or products_are_changed()
    if use_weights or own_products or any(extends(shape, x) for x in (bias, mask)):
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
