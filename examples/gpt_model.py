"""GPT-2 in Flax Linen, with a key/value cache, and its checkpoints in Hugging Face's layout.
The two exponential non-linearities are arguments: the exact and the QuAKE model are one module.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct, traverse_util
from safetensors import safe_open
from safetensors.numpy import save_file

Params = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Sizes of a GPT-2, named as in its config.json."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float = 1e-5


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far: one array (batch, n_positions, head, head size)
    per layer, of which the first `length` positions count."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int = 1) -> "Cache":
        shape = (batch, config.n_positions, config.n_head, config.n_embd // config.n_head)

        def zeros():
            return tuple(jnp.zeros(shape) for _ in range(config.n_layer))

        return cls(keys=zeros(), values=zeros(), length=jnp.int32(0))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: Config
    softmax: Callable

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

        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(heads[-1])
        visible = jnp.arange(key.shape[1]) <= positions[:, None]
        scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
        weights = self.softmax(scores, axis=-1)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return nn.Dense(width, name="c_proj")(out), key, value


class MLP(nn.Module):
    """Two dense layers with a GELU between them."""

    config: Config
    gelu: Callable

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = self.gelu(nn.Dense(4 * width, name="c_fc")(x))
        return nn.Dense(width, name="c_proj")(x)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised input and added to the stream."""

    config: Config
    softmax: Callable
    gelu: Callable
    dropout: float

    @nn.compact
    def __call__(self, x, positions, keys, values):
        norm = partial(nn.LayerNorm, epsilon=self.config.layer_norm_epsilon)
        drop = partial(nn.Dropout, self.dropout, deterministic=self.dropout == 0)
        attention = Attention(self.config, self.softmax, name="attn")
        out, keys, values = attention(norm(name="ln_1")(x), positions, keys, values)
        x = x + drop()(out)
        x = x + drop()(MLP(self.config, self.gelu, name="mlp")(norm(name="ln_2")(x)))
        return x, keys, values


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, tied embedding.

    Args:
        config: the sizes.
        softmax: called as softmax(scores, axis=-1) on (batch, head, query, key).
        gelu: called as gelu(x); GPT-2's is the tanh form.
        dropout: rate on the embedding and the residual branches; needs an rng "dropout" if not 0.

    Example:
        >>> config = Config(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
        >>> model = GPT(config, softmax=quake_jax.softmax, gelu=quake_jax.gelu)
        >>> logits, _ = model.apply({"params": params}, tokens)
    """

    config: Config
    softmax: Callable = jax.nn.softmax
    gelu: Callable = jax.nn.gelu
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens, cache: Cache | None = None):
        """Returns the logits for each next token, and the cache with these tokens added.

        Args:
            tokens: int32 (batch, T).
            cache: what came before; the tokens take the T positions from cache.length, which
                must exist. Without it they take positions 0 to T - 1.

        Returns:
            Logits, float32 (batch, T, vocab_size), and a Cache, or None if none was given.
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
            block = Block(config, self.softmax, self.gelu, self.dropout, name=f"h_{i}")
            x, keys, values = block(x, positions, layer_keys[i], layer_values[i])
            all_keys.append(keys)
            all_values.append(values)

        x = nn.LayerNorm(epsilon=config.layer_norm_epsilon, name="ln_f")(x)
        if cache is not None:
            length = cache.length + tokens.shape[1]
            cache = Cache(keys=tuple(all_keys), values=tuple(all_values), length=length)
        return embedding.attend(x), cache


class Generator:
    """A model with its parameters, compiled to continue one text.

    The prompt goes through the model in one pass (prefill), which fills the cache; every further
    token is one pass over that token alone (decode). Each is compiled once, for one shape.

    Args:
        config: the sizes.
        params: the parameters, as from `load`.
        softmax, gelu: as in `GPT`.

    Example:
        >>> generator = Generator(config, params, quake_jax.softmax, quake_jax.gelu)
        >>> list(itertools.islice(generator.stream(prompt, temperature=0.7, seed=0), 100))
    """

    def __init__(self, config: Config, params: Params, softmax: Callable, gelu: Callable):
        self.config = config
        model = GPT(config, softmax, gelu)

        @jax.jit
        def prefill(params, tokens, length):
            logits, cache = model.apply({"params": params}, tokens, Cache.empty(config))
            return logits[0], cache.replace(length=length)

        # The cache is donated: each step writes one position of it in place.
        @partial(jax.jit, donate_argnums=1)
        def decode(params, cache, token):
            logits, cache = model.apply({"params": params}, token.reshape(1, 1), cache)
            return logits[0, 0], cache

        self._prefill = partial(prefill, params)
        self._decode = partial(decode, params)

    def prefill(self, tokens: Sequence[int]) -> tuple[jax.Array, Cache]:
        """Runs 1 to n_positions tokens; returns logits (n_positions, vocab_size) and a cache.

        The tokens are padded at the end, to be one shape for all lengths. What the padding leaves
        in the cache lies after its length, where decoding overwrites it before it can be seen.
        The logits after the last token are meaningless too.
        """
        padded = np.zeros((1, self.config.n_positions), np.int32)
        padded[0, : len(tokens)] = tokens
        return self._prefill(padded, np.int32(len(tokens)))

    def decode(self, cache: Cache, token: int) -> tuple[jax.Array, Cache]:
        """Runs one token; returns its logits (vocab_size,) and the new cache. Uses up `cache`."""
        return self._decode(cache, np.int32(token))

    def stream(self, prompt: Sequence[int], temperature: float, seed: int) -> Iterator[int]:
        """Yields token after token without end, the likeliest each time if `temperature` is 0.

        When the context is full, the last half of it is read again as if it were a prompt.
        """
        context = self.config.n_positions
        tokens = list(prompt)
        key = jax.random.key(seed)
        logits, cache = self.prefill(tokens)
        logits, used = logits[len(tokens) - 1], len(tokens)
        while True:
            token = int(sample(logits, np.float32(temperature), key, np.int32(len(tokens))))
            yield token
            tokens.append(token)
            if used < context:
                logits, cache = self.decode(cache, token)
                used += 1
            else:
                used = max(context // 2, 1)
                logits, cache = self.prefill(tokens[-used:])
                logits = logits[used - 1]


@jax.jit
def sample(logits, temperature, key, position):
    """Draws a token from softmax(logits / temperature); the likeliest if the temperature is 0."""
    greedy = jnp.argmax(logits)
    # The maximum is subtracted first, so that no temperature makes the quotient overflow to inf.
    scaled = (logits - logits.max()) / temperature
    drawn = jax.random.categorical(jax.random.fold_in(key, position), scaled)
    return jnp.where(temperature > 0, drawn, greedy)


# Flax names a module's arrays by what they do, Hugging Face calls nearly all of them "weight".
_ARRAY_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def hugging_face_name(path: tuple[str, ...]) -> str:
    """Returns the name in a GPT-2 checkpoint of the parameter at `path`.

    Example:
        >>> hugging_face_name(("h_0", "attn", "c_attn", "kernel"))
        'h.0.attn.c_attn.weight'
    """
    return ".".join((*path[:-1], _ARRAY_NAMES[path[-1]])).replace("h_", "h.")


def parameter_shapes(config: Config) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Returns the shape of every parameter, by path, without making any."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)
    return traverse_util.flatten_dict(shapes["params"])


def initial_parameters(config: Config, key: jax.Array) -> Params:
    """Returns GPT-2's initialisation: normal(0, 0.02), less where a residual branch ends."""
    params = {}
    for i, (path, shape) in enumerate(parameter_shapes(config).items()):
        deviation = 0.02 / np.sqrt(2 * config.n_layer) if "c_proj" in path else 0.02
        if path[-1] == "scale":
            params[path] = jnp.ones(shape.shape)
        elif path[-1] == "bias":
            params[path] = jnp.zeros(shape.shape)
        else:
            params[path] = deviation * jax.random.normal(jax.random.fold_in(key, i), shape.shape)
    return traverse_util.unflatten_dict(params)


def save(folder: Path, config: Config, params: Params, metadata: dict[str, str]) -> None:
    """Writes config.json and model.safetensors, the parameters as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"model_type": "gpt2", "activation_function": "gelu_new"} | asdict(config), indent=2
    )
    (folder / "config.json").write_text(text + "\n")
    tensors = {
        hugging_face_name(path): np.asarray(array, dtype=np.float16)
        for path, array in traverse_util.flatten_dict(params).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata=metadata)


def load(folder: Path) -> tuple[Config, Params, dict[str, str]]:
    """Reads what `save` wrote.

    Returns:
        The sizes, the parameters as float32, and the metadata of model.safetensors.

    Raises:
        ValueError: a tensor is missing or has another shape than config.json says.
    """
    settings = json.loads((folder / "config.json").read_text())
    config = Config(**{f.name: settings[f.name] for f in fields(Config) if f.name in settings})
    file = folder / "model.safetensors"
    params = {}
    with safe_open(file, framework="numpy") as tensors:
        names = set(tensors.keys())
        for path, expected in parameter_shapes(config).items():
            name = hugging_face_name(path)
            if name not in names:
                raise ValueError(f"{file}: no tensor {name}")
            array = tensors.get_tensor(name)
            if array.shape != expected.shape:
                raise ValueError(f"{file}: {name} has shape {array.shape}, not {expected.shape}")
            params[path] = jnp.asarray(array, dtype=jnp.float32)
        metadata = tensors.metadata() or {}
    return config, traverse_util.unflatten_dict(params), metadata
