"""GPT-2 in Flax Linen, with a key/value cache, and its checkpoints in Hugging Face's layout.
It is written without quake_jax: `Generator` substitutes the kernels with one line.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import _checkpoint
import _command
import jax
import jax.numpy as jnp
import numpy as np
from _checkpoint import ACTIVATIONS, Params
from flax import linen as nn
from flax import struct, traverse_util

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT-2, named as in its config.json.

    `n_inner` is the width of the MLP's hidden layer, 4 * n_embd where it is None.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float = 1e-5
    activation_function: str = "gelu_new"
    n_inner: int | None = None


# Settings of config.json that the model has no code for, and the values at which it needs none.
SUPPORTED = {
    "activation_function": ("gelu_new", *ACTIVATIONS),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far: one array (batch, n_positions, head, head size)
    per layer, of which the first `length` positions count."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int = 1, dtype: str = "float32") -> "Cache":
        shape = (batch, config.n_positions, config.n_head, config.n_embd // config.n_head)

        def zeros():
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.n_layer))

        return cls(keys=zeros(), values=zeros(), length=jnp.int32(0))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: Config

    @nn.compact
    def __call__(self, x, positions, keys=None, values=None):
        """Returns the output for x (batch, T, n_embd) and the keys and values after it.

        `keys` and `values` are a layer's cache, into which those of x are written at
        `positions` (T,); without them, x attends to itself only.
        """
        config = self.config
        batch, length, width = x.shape
        heads = (batch, length, config.n_head, width // config.n_head)
        query, key, value = jnp.split(nn.Dense(3 * width, name="c_attn")(x), 3, axis=-1)
        query, key, value = query.reshape(heads), key.reshape(heads), value.reshape(heads)
        if keys is not None:
            key = jax.lax.dynamic_update_slice_in_dim(keys, key, positions[0], axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(values, value, positions[0], axis=1)
        # Nothing on one device: on many, distributed_gpt.py says what these axes are split over.
        axes = ("batch", None, "heads", None)
        query, key, value = (nn.with_logical_constraint(x, axes) for x in (query, key, value))

        visible = jnp.arange(key.shape[1]) <= positions[:, None]
        out = nn.dot_product_attention(query, key, value, mask=visible[None, None])
        return nn.Dense(width, name="c_proj")(out.reshape(x.shape)), key, value


class MLP(nn.Module):
    """Two dense layers with an activation between them."""

    width: int
    act: Callable

    @nn.compact
    def __call__(self, x):
        hidden = self.act(nn.Dense(self.width, name="c_fc")(x))
        return nn.Dense(x.shape[-1], name="c_proj")(hidden)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised input and added to the stream."""

    config: Config
    dropout: float

    @nn.compact
    def __call__(self, x, positions, keys, values):
        config = self.config
        norm = partial(nn.LayerNorm, epsilon=config.layer_norm_epsilon, use_fast_variance=False)
        drop = partial(nn.Dropout, self.dropout, deterministic=self.dropout == 0)
        attention = Attention(config, name="attn")
        mlp = MLP(
            config.n_inner or 4 * config.n_embd, ACTIVATIONS[config.activation_function], name="mlp"
        )
        out, keys, values = attention(norm(name="ln_1")(x), positions, keys, values)
        x = x + drop()(out)
        x = x + drop()(mlp(norm(name="ln_2")(x)))
        return x, keys, values


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, tied embedding.

    Args:
        config: the sizes.
        dropout: rate on the embedding and the residual branches; needs an rng "dropout" if not 0.

    Example:
        >>> config = Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
        >>> with quake_jax.linen.substitute(order=3):
        ...     logits, _ = GPT(config).apply({"params": params}, tokens)
    """

    config: Config
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens, cache: Cache | None = None, only: jax.Array | None = None):
        """Returns the logits for each next token, and the cache with these tokens added.

        Args:
            tokens: int32 (batch, T).
            cache: what came before; the tokens take the T positions from cache.length, which
                must exist. Without it they take positions 0 to T - 1.
            only: index of the one token whose logits are wanted, or None for all.

        Returns:
            Logits, float32 (batch, T or 1, vocab_size), and a Cache, or None if none was given.
        """
        config = self.config
        start = 0 if cache is None else cache.length
        positions = start + jnp.arange(tokens.shape[1])
        embedding = nn.Embed(config.vocab_size, config.n_embd, name="wte")
        x = embedding(tokens) + nn.Embed(config.n_positions, config.n_embd, name="wpe")(positions)
        x = nn.Dropout(self.dropout, deterministic=self.dropout == 0)(x)

        empty = (None,) * config.n_layer
        layer_keys, layer_values = (empty, empty) if cache is None else (cache.keys, cache.values)
        all_keys, all_values = [], []
        for i in range(config.n_layer):
            block = Block(config, self.dropout, name=f"h_{i}")
            x, keys, values = block(x, positions, layer_keys[i], layer_values[i])
            all_keys.append(keys)
            all_values.append(values)

        if only is not None:
            x = jax.lax.dynamic_slice_in_dim(x, only, 1, axis=1)
        x = nn.LayerNorm(epsilon=config.layer_norm_epsilon, use_fast_variance=False, name="ln_f")(x)
        if cache is not None:
            length = cache.length + tokens.shape[1]
            cache = Cache(keys=tuple(all_keys), values=tuple(all_values), length=length)
        # bfloat16 would keep too little of a logit of -100 to tell tokens apart.
        logits = jnp.einsum(
            "btd,vd->btv", x, embedding.embedding, preferred_element_type=jnp.float32
        )
        return logits, cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among so many of the likeliest tokens only; 0 for all.
        top_p: draw among the fewest likeliest tokens that have this probability together; 1 for
            all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Generator:
    """A model with its parameters, compiled to continue one text.

    The prompt goes through the model in one pass (prefill), which fills the cache; every further
    token is one pass over that token alone (decode).

    Args:
        config: the sizes.
        params: the parameters, as from `load`. Their dtype is that of the arithmetic.
        order: of the kernels, "exact" for none, None for quake_jax's defaults.
        weights: what the weights of dense layers are packed in, as in `quake_jax.pack`, or None.
        calibrate: texts of 1 to n_positions tokens, from which int8 weights get the ranges of what
            they multiply, or None.
        rules: which weights are packed otherwise, as in `quake_jax.pack`, or None.
        attention: what attention multiplies where weights are packed, as there, or None.

    Attributes:
        bytes: of the parameters.

    Example:
        >>> generator = Generator(config, params, order=3)
        >>> list(itertools.islice(generator.stream(prompt, Sampling(0.7), seed=0), 100))
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        order: int | str | None = None,
        weights: str | None = None,
        calibrate: Iterable[Sequence[int]] | None = None,
        rules: Sequence[tuple[str, str | None]] | None = None,
        attention: str | None = None,
    ):
        self.config = config
        dtype = jax.tree.leaves(params)[0].dtype
        model = GPT(config)

        def full(params, tokens):
            return model.apply({"params": params}, tokens)[0][0]

        def prefill(params, tokens, length):
            cache = Cache.empty(config, dtype=dtype)
            logits, cache = model.apply({"params": params}, tokens, cache, only=length - 1)
            return logits[0, 0], cache.replace(length=length)

        def decode(params, cache, token):
            logits, cache = model.apply({"params": params}, token.reshape(1, 1), cache)
            return logits[0, 0], cache

        token, cache = np.int32(0), Cache.empty(config, dtype=dtype)
        tokens = token.reshape(1, 1)
        (full, prefill, decode), params = _command.on_kernels(
            (full, prefill, decode),
            ((tokens,), (tokens, np.int32(1)), (cache, token)),
            params,
            order,
            weights,
            None if calibrate is None else [np.array([text], np.int32) for text in calibrate],
            rules,
            attention,
        )
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        self._full = partial(jax.jit(full), params)
        self._prefill = partial(jax.jit(prefill), params)
        # The cache is donated: each step writes one position of it in place.
        self._decode = partial(jax.jit(decode, donate_argnums=1), params)

    def logits(self, tokens: Sequence[int]) -> jax.Array:
        """Runs 1 to n_positions tokens; returns the logits (T, vocab_size) after each."""
        return self._full(np.array([tokens], np.int32))

    def prefill(self, tokens: Sequence[int]) -> tuple[jax.Array, Cache]:
        """Runs 1 to n_positions tokens; returns the logits (vocab_size,) after them, and a cache.

        The tokens are padded at the end to a power of two, so that few lengths are compiled. What
        the padding leaves in the cache lies after its length, where decoding overwrites it before
        it can be seen.
        """
        padded = max(16, 1 << (len(tokens) - 1).bit_length())
        padded = np.zeros((1, min(padded, self.config.n_positions)), np.int32)
        padded[0, : len(tokens)] = tokens
        return self._prefill(padded, np.int32(len(tokens)))

    def decode(self, cache: Cache, token: int) -> tuple[jax.Array, Cache]:
        """Runs one token; returns its logits (vocab_size,) and the new cache. Uses up `cache`."""
        return self._decode(cache, np.int32(token))

    def stream(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[int]:
        """Yields token after token without end.

        When the context is full, the last half of it is read again as if it were a prompt.
        """
        context = self.config.n_positions
        tokens = list(prompt)
        key = jax.random.key(seed)
        logits, cache = self.prefill(tokens)
        used = len(tokens)
        while True:
            token = int(sample(logits, key, np.int32(len(tokens)), sampling))
            yield token
            tokens.append(token)
            if used < context:
                logits, cache = self.decode(cache, token)
                used += 1
            else:
                used = max(context // 2, 1)
                logits, cache = self.prefill(tokens[-used:])


@partial(jax.jit, static_argnames="sampling")
def sample(logits, key, position, sampling: Sampling):
    """Draws a token from logits (vocab_size,): temperature first, then top-k, then top-p.

    Tokens that tie with the last one that top-k or top-p keeps are kept too.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits)
    # The maximum is subtracted first, so that no temperature makes the quotient overflow to inf.
    logits = (logits - logits.max()) / np.float32(np.clip(sampling.temperature, 1e-37, 1e37))
    if 0 < sampling.top_k < logits.size:
        least = jax.lax.top_k(logits, sampling.top_k)[0][-1]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        descending = jnp.flip(jnp.sort(logits))
        shares = jax.nn.softmax(descending)
        # The likeliest is kept at any top_p; another if those before it do not suffice.
        kept = (jnp.cumsum(shares) - shares < sampling.top_p).at[0].set(True)
        least = jnp.where(kept, descending, jnp.inf).min()
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(jax.random.fold_in(key, position), logits)


def hugging_face_name(path: tuple[str, ...]) -> str:
    """Returns the name in a GPT-2 checkpoint of the parameter at `path`.

    Example:
        >>> hugging_face_name(("h_0", "attn", "c_attn", "kernel"))
        'h.0.attn.c_attn.weight'
    """
    return ".".join((*path[:-1], _checkpoint.ARRAY_NAMES[path[-1]])).replace("h_", "h.")


def stored(path: tuple[str, ...], shape: tuple[int, ...]) -> _checkpoint.Stored:
    """Returns how a checkpoint stores a parameter: GPT-2's matrices are (inputs, outputs)."""
    return _checkpoint.as_it_is(hugging_face_name(path), shape)


def parameter_shapes(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of every parameter, by path, without making any."""
    return _checkpoint.parameter_shapes(GPT(config), jnp.zeros((1, 1), jnp.int32))


def initial_parameters(config: Config, key: jax.Array) -> Params:
    """Returns GPT-2's initialisation: normal(0, 0.02), less where a residual branch ends."""
    params = {}
    for i, (path, shape) in enumerate(parameter_shapes(config).items()):
        deviation = 0.02 / np.sqrt(2 * config.n_layer) if "c_proj" in path else 0.02
        if path[-1] == "scale":
            params[path] = jnp.ones(shape)
        elif path[-1] == "bias":
            params[path] = jnp.zeros(shape)
        else:
            params[path] = deviation * jax.random.normal(jax.random.fold_in(key, i), shape)
    return traverse_util.unflatten_dict(params)


def save(folder: Path, config: Config, params: Params, metadata: dict[str, str]) -> None:
    """Writes config.json and model.safetensors, the parameters as float16."""
    _checkpoint.save(folder, {"model_type": "gpt2"} | asdict(config), params, stored, metadata)


def load(folder: Path, dtype: str = "float32") -> tuple[Config, Params, dict[str, str]]:
    """Reads a GPT-2 checkpoint, from `save` or from Hugging Face's transformers.

    Returns:
        The sizes, the parameters as `dtype`, and the metadata of model.safetensors.

    Raises:
        _checkpoint.CheckpointError: files are missing, damaged or another model's.
    """
    config = _checkpoint.read_config(folder, "gpt2", Config, SUPPORTED)
    _checkpoint.require_multiple(folder, config, "n_embd", "n_head")
    params, metadata = _checkpoint.load_parameters(
        folder,
        parameter_shapes(config),
        stored,
        prefix="transformer.",
        # Causal masks, which old checkpoints hold, and a second copy of the embedding.
        unused=r"h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight",
        dtype=dtype,
    )
    return config, params, metadata


def end_of_text(folder: Path, tokenizer) -> int | None:
    """Returns the token that ends a text: eos_token_id of config.json, or <|endoftext|>."""
    token = _checkpoint.read_json(folder / _checkpoint.CONFIG).get("eos_token_id")
    return token if isinstance(token, int) else tokenizer.token_to_id(END_OF_TEXT)
