"""Linen modules on quake_jax's kernels, with the fields and parameter trees of Flax's.

The blocks are those of Flax's examples (pre-norm), so that their parameters can be exchanged with
a model that is written in Flax with the same names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from quake_jax._core.config import Order
from quake_jax._elementwise import gated
from quake_jax._flax import substitutes
from quake_jax.linen._attention_fn import attention_fn, causal_attention_fn


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` with `quake_jax.linen.attention_fn`.

    Fields, arguments, parameters ("query", "key", "value", "out" and, with normalize_qk,
    "query_ln", "key_ln") and cache are Flax's. For an order of one's own, give
    `attention_fn=functools.partial(quake_jax.linen.attention_fn, order=3)`.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax.linen
      >>> layer = quake_jax.linen.MultiHeadDotProductAttention(num_heads=2)
      >>> x = jnp.ones((1, 8, 16))
      >>> y = layer.apply(layer.init(jax.random.key(0), x), x)
    """

    attention_fn: Callable[..., jax.Array] = attention_fn


class MultiHeadAttention(nn.MultiHeadAttention):
    """`flax.linen.MultiHeadAttention` with `quake_jax.linen.attention_fn`; only its automatic name
    distinguishes it from `MultiHeadDotProductAttention`.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax.linen
      >>> layer = quake_jax.linen.MultiHeadAttention(num_heads=2)
      >>> x = jnp.ones((1, 8, 16))
      >>> y = layer.apply(layer.init(jax.random.key(0), x), x)
    """

    attention_fn: Callable[..., jax.Array] = attention_fn


class SelfAttention(nn.SelfAttention):
    """`flax.linen.SelfAttention`, which Flax deprecates, with `quake_jax.linen.attention_fn`.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax.linen, warnings
      >>> layer = quake_jax.linen.SelfAttention(num_heads=2)
      >>> x = jnp.ones((1, 8, 16))
      >>> with warnings.catch_warnings():
      ...     warnings.simplefilter("ignore", DeprecationWarning)
      ...     y = layer.apply(layer.init(jax.random.key(0), x), x)
    """

    attention_fn: Callable[..., jax.Array] = attention_fn


def _activated(
    x: jax.Array, bias: jax.Array | None, activation: Callable, order: Order | None
) -> jax.Array:
    """activation(x + bias), as one kernel where there is one."""
    is_partial = isinstance(activation, functools.partial)
    function = activation.func if is_partial else activation
    arguments, keywords = (activation.args, activation.keywords) if is_partial else ((), {})
    if bias is not None and not arguments:
        if function is jax.nn.gelu and not keywords.keys() - {"approximate"}:
            return gated.bias_gelu(x, bias, **keywords, order=order)
        if function is jax.nn.silu and not keywords:
            return gated.bias_silu(x, bias, order=order)
    substitute = substitutes.substitute_of(activation, substitutes.table({}, None), order)
    return substitute(x if bias is None else x + bias)


class _ActivatedDense(nn.Dense):
    """`nn.Dense` followed by an activation, which takes the bias along where it can."""

    activation: Callable = nn.gelu
    order: Order | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        y = jax.lax.dot_general(x, kernel, contract, precision=self.precision)
        return _activated(y, bias, self.activation, self.order)


class MlpBlock(nn.Module):
    """The feed-forward layer of a Transformer: Dense, activation, Dropout, Dense, Dropout.

    The first layer's bias and the activation are one kernel if the activation is GELU or SiLU.
    Parameters are those of the same layers in a compact Flax module: "Dense_0" and "Dense_1", each
    with "kernel" and, if use_bias, "bias". The dropouts are "Dropout_0" and "Dropout_1", and drop
    what Flax's would.

    Attributes:
      mlp_dim: width of the hidden layer.
      out_dim: width of the result; None is that of x.
      activation: `flax.linen.gelu`, `silu` or any function of an array. Those that quake_jax has
        run on its kernels, also in a functools.partial.
      dropout_rate: probability that an activation is dropped.
      deterministic: True turns dropout off; given here or in the call.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: as in `flax.linen.Dense`.
      order: accuracy of the activation, as in `quake_jax.gelu`.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax.linen
      >>> layer = quake_jax.linen.MlpBlock(mlp_dim=64)
      >>> x = jnp.ones((1, 8, 16))
      >>> y = layer.apply(layer.init(jax.random.key(0), x), x)
    """

    mlp_dim: int
    out_dim: int | None = None
    activation: Callable[..., jax.Array] = nn.gelu
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = nn.linear.default_kernel_init
    bias_init: Callable = nn.initializers.zeros_init()
    order: Order | None = None

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Map x of shape [..., features] to [..., out_dim].

        `deterministic` must be given, here or as a field, if dropout_rate is positive.
        """
        dense = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
        }
        drop = _dropout(self, self.dropout_rate, deterministic)
        hidden = _ActivatedDense(
            self.mlp_dim, activation=self.activation, order=self.order, name="Dense_0", **dense
        )(x)
        out_dim = x.shape[-1] if self.out_dim is None else self.out_dim
        return drop(nn.Dense(out_dim, name="Dense_1", **dense)(drop(hidden)))


def _dropout(module, rate: float, deterministic: bool | None) -> Callable:
    """Return what applies a new Dropout of `module`; `deterministic` is needed if it drops."""
    if rate > 0:
        deterministic = nn.merge_param("deterministic", module.deterministic, deterministic)
    else:
        deterministic = True
    return lambda x: nn.Dropout(rate)(x, deterministic=deterministic)


class _TransformerBlock(nn.Module):
    """A pre-norm Transformer block without cross-attention."""

    num_heads: int
    mlp_dim: int
    qkv_features: int | None = None
    activation: Callable[..., jax.Array] = nn.gelu
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    deterministic: bool | None = None
    epsilon: float = 1e-6
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = nn.linear.default_kernel_init
    bias_init: Callable = nn.initializers.zeros_init()
    order: Order | None = None

    def _block(self, x, mask, deterministic, attention_fn: Callable, decode: bool) -> jax.Array:
        common = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "kernel_init": self.kernel_init,
            "bias_init": self.bias_init,
            "precision": self.precision,
        }
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype
        )
        if max(self.dropout_rate, self.attention_dropout_rate) > 0:
            deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        else:
            deterministic = True

        y = MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            qkv_features=self.qkv_features,
            dropout_rate=self.attention_dropout_rate,
            attention_fn=functools.partial(attention_fn, order=self.order),
            decode=decode,
            **common,
        )(norm()(x), mask=mask, deterministic=deterministic)
        x = x + nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        y = MlpBlock(
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            dropout_rate=self.dropout_rate,
            order=self.order,
            **common,
        )(norm()(x), deterministic=deterministic)
        return x + y


class TransformerEncoderBlock(_TransformerBlock):
    """A pre-norm Transformer block: x + attention(norm(x)), then x + MLP(norm(x)).

    Parameters are those of these layers in a compact Flax module: "LayerNorm_0",
    "MultiHeadDotProductAttention_0" (with "query", "key", "value", "out"), "LayerNorm_1" and
    "MlpBlock_0" (with "Dense_0", "Dense_1"). That is Encoder1DBlock of Flax's wmt example, and the
    encoder block of its ViTs, whose checkpoints may number the layers otherwise. Dropout follows
    attention ("Dropout_0") and each layer of the MLP, and drops what Flax's would.

    Attributes:
      num_heads: number of attention heads.
      mlp_dim: width of the hidden layer of the MLP.
      qkv_features: width of query, key and value, all heads together; None is that of x.
      activation: as in `MlpBlock`.
      dropout_rate: probability that an activation is dropped.
      attention_dropout_rate: probability that an attention weight is dropped.
      deterministic: True turns dropout off; given here or in the call.
      epsilon: of the LayerNorms.
      use_bias, dtype, param_dtype, precision, kernel_init, bias_init: of the dense layers, as in
        `flax.linen.Dense`. LayerNorms have biases and the same dtypes.
      order: accuracy of attention and activation; None is the default of each.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax.linen
      >>> block = quake_jax.linen.TransformerEncoderBlock(num_heads=2, mlp_dim=64)
      >>> x = jnp.ones((1, 8, 16))
      >>> y = block.apply(block.init(jax.random.key(0), x), x)
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool | None = None
    ) -> jax.Array:
        """Map x of shape [batch..., length, features] to the same shape.

        `mask` broadcasts with [batch..., heads, length, length]; None lets all attend to all.
        `deterministic` must be given, here or as a field, if a dropout rate is positive.
        """
        return self._block(x, mask, deterministic, attention_fn, decode=False)


class TransformerDecoderBlock(_TransformerBlock):
    """`TransformerEncoderBlock` with causal attention and, with `decode`, Flax's key/value cache.

    It is a block of a decoder-only model: it has no cross-attention. Parameters are those of
    `TransformerEncoderBlock`, which are those of the same layers in a compact Flax module (the
    block of Flax's lm1b example). The cache is that of `flax.linen.MultiHeadDotProductAttention`
    ("cached_key", "cached_value", "cache_index"): `init` with x of the full length makes it; then
    each call takes one position and writes to the collection "cache", which must be mutable.

    Attributes:
      decode: whether to use the cache.
      others: as in `TransformerEncoderBlock`.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax.linen
      >>> block = quake_jax.linen.TransformerDecoderBlock(num_heads=2, mlp_dim=64, decode=True)
      >>> variables = block.init(jax.random.key(0), jnp.ones((1, 8, 16)))
      >>> y, changed = block.apply(variables, jnp.ones((1, 1, 16)), mutable=["cache"])
    """

    decode: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, deterministic: bool | None = None
    ) -> jax.Array:
        """Map x of shape [batch..., length, features] to the same shape.

        Position i attends to the positions up to i where `mask` allows it, which broadcasts with
        [batch..., heads, length, keys]. `deterministic` must be given, here or as a field, if a
        dropout rate is positive.
        """
        return self._block(x, mask, deterministic, causal_attention_fn, self.decode)
