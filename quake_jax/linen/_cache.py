"""Flax's decoding with a `KVCache`: what the interceptor puts into an attention module for it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from quake_jax import kv_cache
from quake_jax._attention.operands import decoded
from quake_jax._core.drop_in import optional_array, refusal
from quake_jax._flax.attention import (
    checked_shape,
    extends,
    one_batch_axis,
    products_are_changed,
)
from quake_jax.linen import _lift
from quake_jax.linen._attention_fn import attention_fn, attention_in_program, causal_attention_fn

_FUNCTION = "linen.interceptor"
_COLLECTION, _NAME = "cache", "kv_cache"
# Of cached queries, which are the last positions, these are one function.
_FUSED = (attention_fn, attention_in_program, causal_attention_fn)


def check_dtype(dtype, function: str) -> None:
    """Raise ValueError if `dtype` is none that a cache is stored in, or None."""
    if dtype is not None and not (isinstance(dtype, str) and dtype in kv_cache.DTYPES):
        expected = "None or one of " + ", ".join(map(repr, kv_cache.DTYPES))
        raise refusal(function, "kv_cache", expected, repr(dtype))


def fields_for_cache(module, method: Callable, new: dict[str, Any], dtype: str | None) -> dict:
    """What to put into fields of a module for a call of `method`, as its class defines it.

    Nothing unless the method is Flax's own attention, and decodes.

    Args:
      module: a Linen module.
      method: the function of the class.
      new: what its fields get besides.
      dtype: of the cache, or None to leave Flax's.

    Raises:
      ValueError: if Flax's cache would pass by a `KVCache` that the module has.
    """
    import flax.linen

    if method is not inspect.unwrap(flax.linen.MultiHeadDotProductAttention.__call__):
        return {}
    if not module.decode:
        return {}
    if dtype is not None:
        attention = new.get("attention_fn", module.attention_fn)
        return {"decode": False, "attention_fn": CachedAttention(attention, dtype)}
    if module.scope is not None and module.has_variable(_COLLECTION, _NAME):
        raise refusal(
            _FUNCTION,
            "kv_cache",
            "the dtype of the cache that the module has, which was made with kv_cache=…",
            "None",
        )
    return {}


@dataclasses.dataclass(frozen=True)
class CachedAttention:
    """The `attention_fn` of a module that keeps keys and values in a variable, a `KVCache`.

    It finds the module at each call, and compares by its fields: transformations of Flax copy
    modules, and compare what they hold.

    Attributes:
      attention: what computes the attention; the cache's part is fused where this is a function of
        quake_jax and nothing else needs the weights.
      dtype: of the cache.
    """

    attention: Callable
    dtype: str

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.attention)  # Flax gives a function what its signature names

    def __call__(self, query, key, value, **keywords) -> jax.Array:
        """Append key and value to the cache, and attend to it; but make it if there is none."""
        from flax.linen.dtypes import promote_dtype

        module = _lift.current_module()
        if module.has_variable(_COLLECTION, "cached_key"):
            made = f"{self.dtype!r}, where Flax's own cache has been made: make it anew by `init`"
            raise refusal(_FUNCTION, "kv_cache", "None", made + " inside the interceptor")
        arrays = promote_dtype(query, key, value, dtype=keywords.get("dtype"))
        is_made = module.has_variable(_COLLECTION, _NAME)
        variable = module.variable(_COLLECTION, _NAME, _empty, *arrays[1:], self.dtype)
        if not is_made:
            return self.attention(query, key, value, **keywords)
        cache = variable.value
        if isinstance(cache, kv_cache.KVCache) and cache.dtype != self.dtype:
            expected = f"{cache.dtype.name!r}, the dtype of the cache that has been made"
            raise refusal(_FUNCTION, "kv_cache", expected, repr(self.dtype))
        query, key, value = arrays
        if key.shape[-3] != query.shape[-3]:
            raise ValueError(
                "quake_jax.linen.interceptor: inputs_k must have the length of inputs_q, "
                f"{query.shape[-3]}, where a module decodes; got {key.shape[-3]}"
            )
        variable.value = cache = kv_cache.append(cache, _one_batch(key), _one_batch(value))
        return self._attend(query, cache, **keywords)

    def _attend(self, query, cache: kv_cache.KVCache, **keywords) -> jax.Array:
        if "mask" not in keywords:
            expected = "a function with an argument mask where a module decodes"
            raise refusal(_FUNCTION, "attention_fn", expected, repr(self.attention))
        batch, mask = query.shape[:-3], optional_array(keywords["mask"], _FUNCTION, "mask")
        keys, values = (x.reshape(*batch, *x.shape[1:]) for x in (cache.keys, cache.values))
        shape = checked_shape(query, keys, values, None, mask, function=_FUNCTION, grouped=False)
        if self._is_fused(**keywords) and not extends(shape, mask):
            # The kernel's softmax is float32 anyway; but Flax returns float32 then.
            wide = jnp.float32 if keywords.get("force_fp32_for_softmax") else query.dtype
            mask = None if mask is None else one_batch_axis(mask.astype(bool), batch)
            y = kv_cache.attend(
                _one_batch(query.astype(wide)), cache, mask=mask, order=self._keywords.get("order")
            )
            return y.reshape(*batch, *y.shape[1:])
        return self._unfused(query, cache, **keywords)

    def _unfused(self, query, cache, *, mask, **keywords) -> jax.Array:
        """What Flax's module computes from its own cache, with more than one query."""
        import flax.linen

        batch, count = query.shape[:-3], query.shape[-3]
        rows = (cache.keys, cache.key_scales), (cache.values, cache.value_scales)
        key, value = (
            (codes if scales is None else decoded(codes, scales))
            .astype(query.dtype)
            .reshape(*batch, *codes.shape[1:])
            for codes, scales in rows
        )
        positions = cache.length - count + jnp.arange(count)
        kept = jnp.arange(cache.max_length) <= positions[:, None]
        kept = jnp.broadcast_to(kept, (*batch, 1, *kept.shape))
        mask = flax.linen.combine_masks(mask, kept)
        y = self.attention(query, key, value, mask=mask, **keywords)
        return jnp.where(cache.length <= cache.max_length, y, jnp.asarray(jnp.nan, y.dtype))

    @property
    def _keywords(self) -> dict[str, Any]:
        return self.attention.keywords if isinstance(self.attention, functools.partial) else {}

    def _is_fused(
        self,
        *,
        deterministic: bool = False,
        dropout_rate: float = 0.0,
        module=None,
        qk_attn_weights_einsum=None,
        attn_weights_value_einsum=None,
        **_,
    ) -> bool:
        is_partial = isinstance(self.attention, functools.partial)
        function = self.attention.func if is_partial else self.attention
        if function not in _FUSED or (is_partial and self.attention.args):
            return False
        if self._keywords.keys() - {"order"}:
            return False
        drops = not deterministic and dropout_rate > 0
        einsums = qk_attn_weights_einsum, attn_weights_value_einsum
        return not (drops or module is not None or any(einsums) or products_are_changed())


def _empty(key: jax.Array, value: jax.Array, dtype: str) -> kv_cache.KVCache:
    """A cache with room for the positions of these keys."""
    *batch, length, heads, size = key.shape
    return kv_cache.init(
        math.prod(batch), length, heads, size, value_size=value.shape[-1], dtype=dtype
    )


def _one_batch(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
