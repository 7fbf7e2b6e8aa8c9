"""The memory that the contestants of one attention share, and the contestants themselves.

Importing this module imports JAX: `environment.prepare` comes first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention.cases import PRODUCTS, Case
from benchmarks.harness import buffers
from benchmarks.harness.errors import quake_jax
from benchmarks.harness.timing import Contestant

XLA = "XLA"
# Results are checked on so many queries, spread over the first row of the batch.
CHECKED_QUERIES = 9


class Buffers(buffers.Buffers):
    """Query, key, value, what the mask needs, and the output of one case."""

    def __init__(self, case: Case, shared: dict[str, tuple[jax.Array, ...]] | None = None):
        self.case = case
        shared = {} if shared is None else shared
        if case.dtype not in shared:  # the masks of a dtype have the same query, key and value
            random, of = np.random.default_rng(0), case.shape
            # Independent N(0, 1), so that the logits are N(0, 1) too.
            shared[case.dtype] = tuple(
                jnp.array(random.standard_normal(s, dtype=np.float32), case.dtype)
                for s in (of.query_shape, of.key_shape, of.key_shape)
            )
        operands = (*shared[case.dtype], *map(jnp.array, _mask_operand(case)))
        super().__init__(operands, case.shape.query_shape, case.dtype)
        self.read = self.sources[1:3]  # what decoding reads

    def error_of(self, contestant: Contestant) -> float:
        """Run a contestant once: the largest error of some rows of its result, relative to their
        largest element.
        """
        contestant.run(1)
        # The result of torch and OpenVINO is an array of their own.
        result = getattr(contestant.run, "result", lambda: self.target)()
        queries, wanted = self._exact
        written = result[0, queries].astype(np.float64)
        return float(np.max(np.abs(written - wanted)) / np.max(np.abs(wanted)))

    @functools.cached_property
    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of queries, and their results in float64: (queries, heads, head size)."""
        case, shape = self.case, self.case.shape
        queries = np.unique(np.linspace(0, shape.queries - 1, CHECKED_QUERIES).astype(int))
        query, key, value = (x[0].astype(np.float64) for x in self.sources[:3])
        # The query heads of a group read the same key/value head.
        key, value = (np.repeat(x, shape.heads // shape.kv_heads, axis=1) for x in (key, value))
        logits = np.einsum("tnh,snh->tns", query[queries], key) / np.sqrt(shape.head_size)
        keys = np.arange(shape.keys)
        if case.mask == "bias":
            logits += self.sources[3][0, 0, queries].astype(np.float64)[:, None]
        elif case.mask == "padding":
            logits = np.where(keys < case.key_lengths[0], logits, -np.inf)
        elif case.mask.startswith("causal"):
            logits = np.where(keys <= queries[:, None, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return queries, np.einsum("tns,snh->tnh", weights, value)


def _mask_operand(case: Case) -> list[np.ndarray]:
    """The array that the case's mask is given by, if any; bias and mask are shared by all heads."""
    shape = case.shape
    if case.mask == "bias":
        of = (1, 1, shape.queries, shape.keys)
        drawn = np.random.default_rng(1).standard_normal(of, dtype=np.float32)
        return [drawn.astype(jnp.dtype(case.dtype))]
    if case.mask == "padding":
        return [np.array(case.key_lengths, np.int32)]
    if case.mask == "causal array":
        return [np.tri(shape.queries, shape.keys, dtype=bool)[None, None]]
    return []


def _in_jax(function: Callable[..., jax.Array], mask: str) -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention` or a drop-in of it, as a function of the case's operands."""
    return {
        "none": function,
        "causal": partial(function, is_causal=True),
        "padding": lambda q, k, v, lengths: function(q, k, v, key_value_seq_lengths=lengths),
        "bias": lambda q, k, v, bias: function(q, k, v, bias=bias),
        "causal array": lambda q, k, v, kept: function(q, k, v, mask=kept),
    }[mask]


def quake(buffers: Buffers, order: int | None, products: str | None = None) -> Contestant:
    """quake_jax at one order, or with products of another dtype than the operands'."""
    name, compute_dtype = products or f"order {order}", products and PRODUCTS[products]
    function = quake_jax("dot_product_attention").dot_product_attention
    function = partial(function, order=order, compute_dtype=compute_dtype)
    return Contestant(name, buffers.runner(_in_jax(function, buffers.case.mask)))


def cached(buffers: Buffers, order: int) -> Contestant:
    """quake_jax at one order, of a full cache."""
    kv_cache, shape = quake_jax("kv_cache").kv_cache, buffers.case.shape
    sizes = shape.batch, shape.keys, shape.kv_heads, shape.head_size
    cache = kv_cache.init(*sizes, dtype=buffers.case.stored)
    cache = kv_cache.append(cache, *buffers.sources[1:3])
    buffers.read = [np.asarray(x) for x in jax.tree.leaves(cache) if x.ndim]

    def step(i, operands, cache):
        return kv_cache.attend(operands[0], cache, order=order)

    return Contestant(f"order {order}", buffers.looped(step, cache))


def xla(buffers: Buffers) -> Contestant:
    """XLA's attention: two products and a softmax."""
    function = partial(jax.nn.dot_product_attention, implementation="xla")
    return Contestant(XLA, buffers.runner(_in_jax(function, buffers.case.mask)))
