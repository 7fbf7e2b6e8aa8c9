"""Fused scaled-dot-product attention with the signature of jax.nn: no array holds the weights.

The kernel takes float32, bfloat16 and float16 with head sizes up to 512; what else jax.nn takes
goes to jax.nn.
"""

from __future__ import annotations

import operator

import jax
from jax.typing import ArrayLike, DTypeLike

from quake_jax._attention.arguments import STATIC, optional_arrays, static_arguments
from quake_jax._attention.call import attend
from quake_jax._core import jax_names
from quake_jax._core.config import Order
from quake_jax._core.drop_in import as_array
from quake_jax._core.exports import defined_in

_attend_call = jax.jit(
    attend,
    static_argnames=(*STATIC, "packed_axis"),
    inline=jax_names.INLINE,
)


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    compute_dtype: DTypeLike | None = None,
    order: Order | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale · query keyᵀ + bias) value: `jax.nn.dot_product_attention` with QuAKE.

    B is the batch, T and S are the lengths of queries and keys, N and K the heads of queries and
    of keys (N a multiple of K: grouped or multi-query attention), H and V the sizes of heads. The
    weights of shape (B, N, T, S) are never in memory, in derivatives neither.

    Args:
      query: real array of shape (B, T, N, H) or (T, N, H). float32, bfloat16 and float16 with H
        and V up to 512 use the kernel on CPUs; everything else is `jax.nn.dot_product_attention`.
      key: array of shape (B, S, K, H) or (S, K, H), and query's dtype.
      value: array of shape (B, S, K, V) or (S, K, V), and query's dtype; V may differ from H.
      bias: array that broadcasts to (B, N, T, S), added to the logits; or None.
      mask: boolean array that broadcasts to (B, N, T, S): True where a key takes part; or None.
      scale: factor of the logits; None is 1/√H. If it is traced, 16-bit operands are converted
        to float32.
      is_causal: whether query t sees the keys 0 to t only.
      query_seq_lengths: int32 array of shape (B,); results of queries from there on are 0.
      key_value_seq_lengths: int32 array of shape (B,); keys from there on are masked.
      query_segment_ids: int32 array of shape (B, T): a query sees the keys with its own id alone,
        such as those of its text where several are packed into one sequence.
      key_value_segment_ids: int32 array of shape (B, S); None: the same as of queries, if T is S.
      local_window_size: (left, right): query t sees the keys t - left to t + right. An integer is
        both.
      implementation: None or "quake" is this package's; "xla" and "cudnn" are those of jax.nn.
      return_residual: whether to return the log-sum-exp of the logits too.
      logits_soft_cap: replaces the scaled logits by cap · tanh(logits / cap), before the bias.
      compute_dtype: what is multiplied, "float32", "bfloat16" or "int8"; None is query's dtype, but
        float32 for float16. In bfloat16 query, key, value and weights are rounded to it, sums are
        float32, and so are the softmax and up to 8 queries that share keys (decoding), which
        reading bounds. In int8 query, key less the mean of the first keys, and value are rounded to
        127ths of the largest element of the vector (of value: of 256 keys, by column, masked ones
        among them, so that no padding should be large), weights to 255ths of the row's largest; the
        rest is as in bfloat16. A CPU that has no such products multiplies float32 all the same;
        derivatives and other platforms ignore it. In int8, a call with NaN, infinities or numbers
        beyond 2^58 (of value: 2^100) is done in float32 as well.
      order: accuracy of the exponential, as in `softmax`, 5 (in int8: 2) unless a default is set;
        "exact" is `jax.nn.dot_product_attention`.

    Returns:
      An array of shape (B, T, N, V) or (T, N, V) and query's dtype; with `return_residual` also
      the residual, of the same dtype and without the last axis, a constant in derivatives. Results
      for parts of the keys, weighted by the softmax of their residuals, add up to that for all. A
      query that no key takes part for has the mean of all values. A masked key or value that is NaN
      has no effect where its whole tile is masked.

    Raises:
      TypeError: if an array is complex, or an argument that must be static is not.
      ValueError: if shapes or dtypes do not belong together, or another argument is not allowed; if
        results depend on positions beyond 2^30.

    Example:
      >>> import jax, quake_jax
      >>> q = jax.random.normal(jax.random.key(0), (2, 16, 4, 32))
      >>> y = quake_jax.dot_product_attention(q, q, q, is_causal=True)
    """
    function = "dot_product_attention"
    static, traced_scale = static_arguments(
        function,
        scale,
        is_causal,
        local_window_size,
        implementation,
        return_residual,
        logits_soft_cap,
        compute_dtype,
        order,
    )
    arrays = {"query": query, "key": key, "value": value}
    arrays = [as_array(x, function, name) for name, x in arrays.items()]
    optional = optional_arrays(
        function,
        bias,
        mask,
        query_seq_lengths,
        key_value_seq_lengths,
        query_segment_ids,
        key_value_segment_ids,
    )
    return _attend_call(*arrays, *optional, traced_scale, packed_axis=0, **static)


def packed_dot_product_attention(
    qkv: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    qkv_axis: int = -3,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    compute_dtype: DTypeLike | None = None,
    order: Order | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`dot_product_attention` of query, key and value that lie in one array, without a copy.

    That is how one matrix product makes them. Slices of its result would be copied before a
    kernel reads them.

    Args:
      qkv: array of shape (B, T, 3, N, H) or (B, T, N, 3, H), with or without B, whose axis of size
        3 holds query, key and value; dtypes as in `dot_product_attention`.
      qkv_axis: the axis of size 3, the last but two (-3) or the last but one (-2).
      bias, mask, scale, is_causal: as in `dot_product_attention`.
      query_seq_lengths, key_value_seq_lengths, local_window_size: the same.
      query_segment_ids, key_value_segment_ids: the same; the former is enough.
      implementation, return_residual, logits_soft_cap, compute_dtype, order: the same.

    Returns:
      As `dot_product_attention`: an array of shape (B, T, N, H) or (T, N, H).

    Raises:
      TypeError, ValueError: as `dot_product_attention`, and if qkv has no such axis.

    Example:
      >>> import jax, quake_jax
      >>> qkv = jax.random.normal(jax.random.key(0), (2, 16, 3, 4, 32))
      >>> y = quake_jax.packed_dot_product_attention(qkv, is_causal=True)
    """
    function = "packed_dot_product_attention"
    static, traced_scale = static_arguments(
        function,
        scale,
        is_causal,
        local_window_size,
        implementation,
        return_residual,
        logits_soft_cap,
        compute_dtype,
        order,
    )
    qkv = as_array(qkv, function, "qkv")
    if qkv.ndim not in (4, 5):
        raise ValueError(
            f"quake_jax.{function}: qkv must have 5 axes, or 4 without a batch; got shape "
            f"{qkv.shape}"
        )
    try:
        axis = operator.index(qkv_axis)
    except TypeError:
        raise TypeError(
            f"quake_jax.{function}: qkv_axis must be an integer; got {qkv_axis!r}"
        ) from None
    axis = axis if axis < 0 else axis - qkv.ndim
    if axis not in (-3, -2) or qkv.shape[axis] != 3:
        raise ValueError(
            f"quake_jax.{function}: qkv_axis must be -3 or -2, and that axis of qkv have size 3; "
            f"got {qkv_axis} and shape {qkv.shape}"
        )
    has_batch = qkv.ndim == 5
    optional = optional_arrays(
        function,
        bias,
        mask,
        query_seq_lengths,
        key_value_seq_lengths,
        query_segment_ids,
        key_value_segment_ids,
    )
    result = _attend_call(
        qkv if has_batch else qkv[None],
        None,
        None,
        *optional,
        traced_scale,
        packed_axis=axis + 5,
        **static,
    )
    return result if has_batch else jax.tree.map(lambda x: x[0], result)


__all__ = defined_in(globals())
