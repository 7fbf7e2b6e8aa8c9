"""A cache of keys and values for decoding, stored as float32, bfloat16, float16 or int8.

Decoding is bounded by reading the cache: bfloat16 has half of the bytes of float32, int8 a quarter.
The kernel reads keys and values where they lie. A `KVCache` is a pytree: it goes through jax.jit
(donated, so that it is updated in place), is what jax.lax.scan carries, what a variable of Flax
holds, and jax.vmap of these functions gives each sequence a length of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from quake_jax._attention import call, masks
from quake_jax._attention.arguments import STATIC, check_arrays, four_axes, static_arguments
from quake_jax._attention.operands import NO_LIMIT, Operands
from quake_jax._core import jax_names, pages
from quake_jax._core.config import Order
from quake_jax._core.drop_in import as_array, kind_of, optional_array, refusal
from quake_jax._core.exports import defined_in

DTYPES = ("float32", "bfloat16", "float16", "int8")
# Of int8, but for -128: codes are symmetric.
_LARGEST_CODE = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KVCache:
    """Keys and values of the positions 0 to `length` - 1, with room for `max_length`.

    Attributes:
      keys: array of shape (B, max_length, K, H).
      values: array of shape (B, max_length, K, V) and the dtype of keys.
      key_scales: float32 array of shape (B, K, max_length) if keys are int8, which it multiplies;
        else None.
      value_scales: the same of the values.
      length: int32 scalar, how many positions have been appended. More than `max_length` if, inside
        jax.jit, too many were: every result is then NaN.

    Example:
      >>> import quake_jax
      >>> cache = quake_jax.kv_cache.init(2, 64, kv_heads=4, head_size=32, dtype="bfloat16")
      >>> cache.max_length, cache.dtype.name, int(cache.length)
      (64, 'bfloat16', 0)
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None
    value_scales: jax.Array | None
    length: jax.Array

    @property
    def max_length(self) -> int:
        return self.keys.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.keys.dtype


def init(
    batch: int,
    max_length: int,
    kv_heads: int,
    head_size: int,
    *,
    value_size: int | None = None,
    dtype: DTypeLike = "float32",
) -> KVCache:
    """Make an empty cache, in huge pages as those of `pack_weight`.

    Args:
      batch: how many sequences, B. All have the same length: see `jax.vmap` for others.
      max_length: the most positions.
      kv_heads: heads of keys and values, K.
      head_size: of keys, H.
      value_size: of values, V; None is H.
      dtype: "float32", "bfloat16", "float16" or "int8", in which each key and value of a head has
        a scale, its largest magnitude / 127: an element is rounded by at most half of that.

    Raises:
      TypeError: if a size is no integer.
      ValueError: if a size is not positive, or the dtype is another one.

    Example:
      >>> import quake_jax
      >>> cache = quake_jax.kv_cache.init(2, 64, kv_heads=4, head_size=32, dtype="int8")
      >>> cache.keys.shape, cache.key_scales.shape
      ((2, 64, 4, 32), (2, 4, 64))
    """
    function = "kv_cache.init"
    sizes = {
        "batch": batch,
        "max_length": max_length,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "value_size": head_size if value_size is None else value_size,
    }
    for name, size in sizes.items():
        try:
            sizes[name] = operator.index(size)
        except TypeError:
            raise refusal(function, name, "an integer", repr(size), TypeError) from None
        if sizes[name] < 1:
            raise refusal(function, name, "positive", repr(size))
    batch, max_length, kv_heads, *row_sizes = sizes.values()
    try:
        stored = jnp.dtype(dtype)
    except TypeError:
        stored = None
    if stored is None or stored.name not in DTYPES:
        expected = "one of " + ", ".join(map(repr, DTYPES))
        raise refusal(function, "dtype", expected, repr(dtype))
    # Arrays of their own: a donated buffer may stand in one place only.
    rows = (jnp.zeros((batch, max_length, kv_heads, n), stored) for n in row_sizes)
    scales = (
        jnp.zeros((batch, kv_heads, max_length), jnp.float32) if stored == jnp.int8 else None
        for _ in row_sizes
    )
    cache = KVCache(*rows, *scales, jnp.zeros((), jnp.int32))
    pages.gather(cache)
    return cache


def append(cache: KVCache, key: ArrayLike, value: ArrayLike) -> KVCache:
    """Return the cache with T more positions.

    Inside a jax.jit whose `donate_argnums` names the cache this writes the new positions alone;
    elsewhere the whole cache is copied.

    Args:
      cache: of `init`.
      key: real array of shape (B, T, K, H), converted to the cache's dtype.
      value: real array of shape (B, T, K, V), the same. What int8 stands for is a constant in
        derivatives.

    Raises:
      TypeError: if `cache` is none, or an array does not hold real numbers.
      ValueError: if shapes do not belong together, or there is no room for T positions. Inside
        jax.jit, where the length is not known, `attend` gives NaN from then on instead.

    Example:
      >>> import jax, quake_jax
      >>> cache = quake_jax.kv_cache.init(2, 64, kv_heads=4, head_size=32)
      >>> key = jax.random.normal(jax.random.key(0), (2, 10, 4, 32))
      >>> append = jax.jit(quake_jax.kv_cache.append, donate_argnums=0)
      >>> cache = append(cache, key, key)
      >>> int(cache.length)
      10
    """
    function = "kv_cache.append"
    _check_cache(cache, function)
    arrays = {"key": (key, cache.keys), "value": (value, cache.values)}
    given = []
    for name, (x, stored) in arrays.items():
        x = _real_array(x, function, name)
        batch, _, heads, size = stored.shape
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, size):
            raise refusal(function, name, f"of shape ({batch}, T, {heads}, {size})", f"{x.shape}")
        given.append(x)
    key, value = given
    count = key.shape[1]
    if value.shape[1] != count:
        raise refusal(function, "value", f"of key's length {count}", f"shape {value.shape}")
    used = _known_length(cache)
    if count + used > cache.max_length:
        room = f"of at most {cache.max_length - used} positions, the room of a cache of length "
        raise refusal(function, "key", f"{room}{used} of {cache.max_length}", f"{count}")
    return _append(cache, key, value)


@functools.partial(jax.jit, inline=jax_names.INLINE)
def _append(cache, key, value):
    def write(into, x, axis):
        sharding = jax.typeof(into).sharding
        if jax.typeof(x).sharding != sharding and sharding.mesh.explicit_axes:
            x = jax.sharding.reshard(x, sharding)  # the cache decides
        is_bfloat16 = into.dtype == jnp.bfloat16
        update = _update_bfloat16 if is_bfloat16 else lax.dynamic_update_slice_in_dim
        return update(into, x, cache.length, axis)

    key_scales, value_scales = cache.key_scales, cache.value_scales
    if cache.dtype == jnp.int8:
        (key, of_key), (value, of_value) = _encoded(key), _encoded(value)
        key_scales, value_scales = write(key_scales, of_key, 2), write(value_scales, of_value, 2)
    return KVCache(
        write(cache.keys, key.astype(cache.dtype), 1),
        write(cache.values, value.astype(cache.dtype), 1),
        key_scales,
        value_scales,
        cache.length + key.shape[1],
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _update_bfloat16(into: jax.Array, x: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """As `lax.dynamic_update_slice_in_dim`, but of words: XLA on CPUs would convert the whole array
    to float32 and back."""
    words = (lax.bitcast_convert_type(array, jnp.uint16) for array in (into, x))
    updated = lax.dynamic_update_slice_in_dim(*words, start, axis)
    return lax.bitcast_convert_type(updated, jnp.bfloat16)


@_update_bfloat16.defjvp
def _update_bfloat16_jvp(axis, primals, tangents):
    *tangents, _ = tangents
    tangent = lax.dynamic_update_slice_in_dim(*tangents, primals[-1], axis)
    return _update_bfloat16(*primals, axis), tangent


def _encoded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes of x (B, T, K, H), which are whole numbers, and scales (B, K, T).

    A NaN or an infinity makes the scale so, and what is computed by it NaN.
    """
    x = lax.stop_gradient(x).astype(jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=-1) / _LARGEST_CODE
    codes = jnp.round(x / jnp.where(scales > 0, scales, 1)[..., None])
    return codes, jnp.swapaxes(scales, 1, 2)


def attend(
    query: ArrayLike,
    cache: KVCache,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    order: Order | None = None,
) -> jax.Array:
    """`dot_product_attention` of the last T positions, which see what was before them.

    The T queries belong to the positions `cache.length` - T to `cache.length` - 1: append first,
    then attend. Up to 8 queries that share keys (T · N / K) read the cache as it lies; for more,
    tiles of it are converted.

    Args:
      query: real array of shape (B, T, N, H), N a multiple of K, of any dtype of real numbers:
        float32, bfloat16 and float16 use the kernel on CPUs.
      cache: of `append`.
      bias: array that broadcasts to (B, N, T, max_length), added to the logits; or None.
      mask: boolean array that broadcasts to (B, N, T, max_length): True where a key takes part,
        if it is not behind the query; or None.
      scale, logits_soft_cap, order: as in `dot_product_attention`.
      local_window_size: left or (left, right): a query at position p sees the keys from p - left
        on, and p itself.

    Returns:
      An array of shape (B, T, N, V) and query's dtype. It is NaN where the cache has more than
      max_length positions or fewer than T, and that is found out inside jax.jit.

    Raises:
      TypeError: if `cache` is none, an array does not hold real numbers, or an argument that must
        be static is not.
      ValueError: if shapes or dtypes do not belong together, or another argument is not allowed; if
        the cache has more than max_length positions or fewer than T.

    Example:
      >>> import functools, jax, quake_jax
      >>> cache = quake_jax.kv_cache.init(2, 64, kv_heads=4, head_size=32, dtype="int8")
      >>> @functools.partial(jax.jit, donate_argnums=0)
      ... def step(cache, query, key, value):
      ...     cache = quake_jax.kv_cache.append(cache, key, value)
      ...     return cache, quake_jax.kv_cache.attend(query, cache)
      >>> prompt = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 32))
      >>> cache, y = step(cache, *prompt)
      >>> cache, y = step(cache, *prompt[:, :, -1:])  # the next token
      >>> int(cache.length), y.shape
      (11, (2, 1, 4, 32))
    """
    function = "kv_cache.attend"
    _check_cache(cache, function)
    query = _real_array(query, function, "query")
    bias = optional_array(bias, function, "bias")
    mask = optional_array(mask, function, "mask")
    static, traced_scale = static_arguments(
        function, scale, False, local_window_size, None, False, logits_soft_cap, None, order
    )
    window = static["window"]
    if window is not None and min(window) < 0:
        raise refusal(
            function, "local_window_size", "None or not negative", repr(local_window_size)
        )
    if query.ndim != 4:
        raise refusal(function, "query", "of shape (B, T, N, H)", f"shape {query.shape}")
    if not isinstance(cache.length, jax_names.Tracer):
        used = _known_length(cache)
        if not query.shape[1] <= used <= cache.max_length:
            expected = f"of at least query's length {query.shape[1]}, at most {cache.max_length}"
            raise refusal(function, "cache", expected, f"length {used}")
    return _attend(query, cache, bias, mask, traced_scale, **static)


@functools.partial(
    jax.jit,
    static_argnames=STATIC,
    inline=jax_names.INLINE,
)
def _attend(query, cache, bias, mask, traced_scale, *, window, **static):
    mask = four_axes(mask)
    # Before the mask becomes another.
    given = Operands(query, cache.keys, cache.values, four_axes(bias), mask)
    check_arrays(static["function"], given, is_cache=True)
    batch, count = query.shape[:2]
    length = cache.length
    if count > 1 or window is not None:
        positions = length - count + jnp.arange(count)
        limits = call.limits(window) | {"window_right": NO_LIMIT}
        mask = masks.kept_keys(
            positions, cache.max_length, mask, None, None, is_causal=True, **limits
        )
    y = call.attend(
        query,
        cache.keys,
        cache.values,
        bias,
        mask,
        None,
        jnp.broadcast_to(length, (batch,)),
        None,
        None,
        traced_scale,
        cache.key_scales,
        cache.value_scales,
        packed_axis=0,
        window=None,
        is_cache=True,
        **static,
    )
    # What was appended where there was no room lies in the place of something else.
    is_valid = (count <= length) & (length <= cache.max_length)
    return jnp.where(is_valid, y, jnp.asarray(jnp.nan, y.dtype))


def _check_cache(cache, function: str) -> None:
    if not isinstance(cache, KVCache):
        raise refusal(function, "cache", "a KVCache", kind_of(cache), TypeError)
    if cache.keys.ndim != 4:
        expected = "of one kind of sequences, with keys of 4 axes, inside jax.vmap or jax.lax.scan"
        raise refusal(function, "cache", expected, f"keys of shape {cache.keys.shape}")
    if jnp.ndim(cache.length) != 0:
        expected = "of one length, a scalar: jax.vmap gives each sequence its own"
        raise refusal(function, "cache", expected, f"a length of shape {jnp.shape(cache.length)}")


def _known_length(cache: KVCache) -> int:
    """The length, or 0 if it is traced."""
    return 0 if isinstance(cache.length, jax_names.Tracer) else int(cache.length)


def _real_array(x, function: str, name: str) -> jax.Array:
    x = jnp.asarray(as_array(x, function, name))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise refusal(function, name, "of real numbers", f"dtype {x.dtype}", TypeError)
    return x


__all__ = defined_in(globals())
