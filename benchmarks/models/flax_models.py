"""The models in Flax Linen, written as their users write them: attention modules of Flax,
activations called as functions, masks made by Flax. Nothing in this file knows of quake_jax.

Importing this module imports JAX: `environment.prepare` comes first.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models.cases import EPSILON, Case, Sizes


class Mlp(nn.Module):
    """Two layers and a GELU."""

    exact_gelu: bool
    dtype: Any

    @nn.compact
    def __call__(self, x):
        types = {"dtype": self.dtype, "param_dtype": self.dtype}
        hidden = nn.Dense(4 * x.shape[-1], **types)(x)
        hidden = nn.gelu(hidden, approximate=not self.exact_gelu)
        return nn.Dense(x.shape[-1], **types)(hidden)


class TransformerBlock(nn.Module):
    """A layer: norms come before its parts, and GELU is the tanh form (GPT-2 and Flax's ViTs), or
    they come last, and it is the one with erf (BERT).
    """

    heads: int
    epsilon: float
    dtype: Any
    norms_last: bool = False
    decode: bool = False

    @nn.compact
    def __call__(self, x, mask=None):
        types = {"dtype": self.dtype, "param_dtype": self.dtype}
        attention = nn.MultiHeadDotProductAttention(self.heads, decode=self.decode, **types)
        first, second = nn.LayerNorm(self.epsilon, **types), nn.LayerNorm(self.epsilon, **types)
        mlp = Mlp(self.norms_last, self.dtype)
        if self.norms_last:
            x = first(x + attention(x, mask=mask))
            return second(x + mlp(x))
        x = x + attention(first(x), mask=mask)
        return x + mlp(second(x))


class GPT2(nn.Module):
    """GPT-2: from tokens (batch, length) to the logits of the next one (batch, vocabulary)."""

    sizes: Sizes
    dtype: Any
    decode: bool = False

    @nn.compact
    def __call__(self, tokens, positions):
        sizes, types = self.sizes, {"dtype": self.dtype, "param_dtype": self.dtype}
        words = nn.Embed(sizes.vocabulary, sizes.width, name="words", **types)
        places = nn.Embed(sizes.positions, sizes.width, name="places", **types)
        x = words(tokens) + places(positions)
        mask = None if self.decode else nn.make_causal_mask(tokens)
        for _ in range(sizes.layers):
            block = TransformerBlock(sizes.heads, EPSILON["gpt2"], self.dtype, decode=self.decode)
            x = block(x, mask)
        # Generation needs the last position alone.
        return words.attend(nn.LayerNorm(EPSILON["gpt2"], **types)(x[:, -1]))


class BERT(nn.Module):
    """BERT: from tokens, and booleans that say which are no padding, both (batch, length), to
    vectors (batch, length, width); or with `pools` to their means, normalised (batch, width)."""

    sizes: Sizes
    dtype: Any
    pools: bool = False

    @nn.compact
    def __call__(self, tokens, is_token):
        sizes, types = self.sizes, {"dtype": self.dtype, "param_dtype": self.dtype}
        x = nn.Embed(sizes.vocabulary, sizes.width, name="words", **types)(tokens)
        places = jnp.arange(tokens.shape[1])[None]
        x += nn.Embed(sizes.positions, sizes.width, name="places", **types)(places)
        x += nn.Embed(2, sizes.width, name="segments", **types)(jnp.zeros_like(tokens))
        x = nn.LayerNorm(EPSILON["bert"], **types)(x)
        for _ in range(sizes.layers):
            block = TransformerBlock(sizes.heads, EPSILON["bert"], self.dtype, norms_last=True)
            x = block(x, is_token[:, None, None, :])
        if not self.pools:
            return x
        mean = x.mean(axis=1, where=is_token[..., None])
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


class ViT(nn.Module):
    """ViT: from images (batch, height, width, 3) to logits (batch, classes)."""

    sizes: Sizes
    dtype: Any

    @nn.compact
    def __call__(self, images):
        sizes, types = self.sizes, {"dtype": self.dtype, "param_dtype": self.dtype}
        patch = (sizes.patch, sizes.patch)
        x = nn.Conv(sizes.width, patch, patch, padding="VALID", name="patches", **types)(images)
        x = x.reshape(len(x), -1, sizes.width)
        first = self.param("class", nn.initializers.normal(0.02), (1, 1, sizes.width), self.dtype)
        x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
        shape = (1, sizes.tokens, sizes.width)
        x += self.param("places", nn.initializers.normal(0.02), shape, self.dtype)
        for _ in range(sizes.layers):
            x = TransformerBlock(sizes.heads, EPSILON["vit"], self.dtype)(x)
        x = nn.LayerNorm(EPSILON["vit"], **types)(x[:, 0])
        return nn.Dense(sizes.classes, name="head", **types)(x)


def module(case: Case) -> nn.Module:
    """The model of a case."""
    dtype = jnp.dtype(case.dtype)
    if case.family == "gpt2":
        return GPT2(case.sizes, dtype, case.decodes)
    if case.family == "bert":
        return BERT(case.sizes, dtype, case.pools)
    return ViT(case.sizes, dtype)


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """What the model of a case is called with, from fixed seeds."""
    key = jax.random.key(1)
    if case.family == "vit":
        shape = (case.batch, case.sizes.image, case.sizes.image, 3)
        # Drawn in float32: of another dtype they would be other numbers.
        return (jax.random.normal(key, shape).astype(case.dtype),)
    tokens = jax.random.randint(key, (case.batch, case.length), 0, case.sizes.vocabulary)
    places = jnp.arange(case.length)[None]
    if case.family == "bert":
        return tokens, places < jnp.array(case.lengths)[:, None]
    return (tokens[:, -1:], places[:, -1:]) if case.decodes else (tokens, places)


def variables(case: Case) -> tuple[dict, dict]:
    """The model's random weights and, where it decodes, its cache with all but one token.

    They are drawn by NumPy: compiling all initializers of Flax would take longer than drawing.
    Parameters are from N(0, 1/width), scales of LayerNorm around 1, keys and values from N(0, 1).
    """
    whole = inputs(case)
    if case.decodes:  # Flax takes the size of the cache from the call that makes it
        whole = tuple(jnp.broadcast_to(x, (case.batch, case.length)) for x in whole)
    shapes = jax.eval_shape(module(case).init, jax.random.key(0), *whole)
    random = np.random.default_rng(0)

    def parameter(path, shape):
        values = random.standard_normal(shape.shape, np.float32) * case.sizes.width**-0.5
        return jnp.asarray(values + (path[-1].key == "scale"), shape.dtype)

    def cached(shape):  # keys, values, or the index of the next token
        if shape.ndim:
            return jnp.asarray(random.standard_normal(shape.shape, np.float32), shape.dtype)
        return jnp.asarray(case.length - 1, shape.dtype)

    parameters = jax.tree_util.tree_map_with_path(parameter, shapes["params"])
    return parameters, jax.tree.map(cached, shapes.get("cache", {}))
