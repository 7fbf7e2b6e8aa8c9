"""BERT in Flax Linen as an encoder of sentences, and its checkpoints in Hugging Face's layout
(all-MiniLM-L6-v2). Written without quake_jax: `Encoder` substitutes the kernels with one line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import _checkpoint
import _command
import jax
import jax.numpy as jnp
import numpy as np
from _checkpoint import ACTIVATIONS, CheckpointError, Params
from flax import linen as nn

POOLING = Path("1_Pooling", "config.json")
SENTENCES = "sentence_bert_config.json"


@dataclass(frozen=True)
class Config:
    """Sizes of a BERT, named as in its config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12


# Settings of config.json that the model has no code for, and the values at which it needs none.
SUPPORTED = {
    "hidden_act": ("gelu", *ACTIVATIONS),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
}


class Block(nn.Module):
    """Attention, then two dense layers, each added to the stream, which is normalised after it."""

    config: Config

    @nn.compact
    def __call__(self, x, mask):
        config = self.config
        norm = partial(nn.LayerNorm, epsilon=config.layer_norm_eps, use_fast_variance=False)
        attention = nn.MultiHeadDotProductAttention(config.num_attention_heads, name="attention")
        x = norm(name="attention_norm")(x + attention(x, mask=mask))
        hidden = nn.Dense(config.intermediate_size, name="mlp_up")(x)
        hidden = ACTIVATIONS[config.hidden_act](hidden)
        return norm(name="mlp_norm")(x + nn.Dense(config.hidden_size, name="mlp_down")(hidden))


class BERT(nn.Module):
    """BERT (Devlin et al., 2018) without pooler and head: learned positions, post-norm.

    Example:
        >>> with quake_jax.linen.substitute(order=3):
        ...     hidden = BERT(config).apply({"params": params}, tokens, present)
    """

    config: Config

    @nn.compact
    def __call__(self, tokens, present):
        """Returns the last hidden states (batch, T, hidden_size).

        Args:
            tokens: int32 (batch, T), all of the first segment.
            present: bool (batch, T), False for padding, which nothing attends to.
        """
        config = self.config

        def embed(count, name):
            return nn.Embed(count, config.hidden_size, name=name)

        x = embed(config.vocab_size, "words")(tokens)
        x = x + embed(config.max_position_embeddings, "positions")(jnp.arange(tokens.shape[1]))
        x = x + embed(config.type_vocab_size, "segments")(jnp.zeros((), jnp.int32))
        x = nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name="norm")(x)
        for i in range(config.num_hidden_layers):
            x = Block(config, name=f"layer_{i}")(x, present[:, None, None, :])
        return x


class Encoder:
    """A model with its parameters and tokenizer: texts in, unit vectors out.

    A text's vector is the mean of its tokens' last hidden states, divided by its length.

    Args:
        config: the sizes.
        params: the parameters, as from `load`. Their dtype is that of the arithmetic.
        tokenizer: a tokenizers.Tokenizer.
        max_length: tokens of a text that are read; the rest is left out.
        order: of the kernels, "exact" for none, None for quake_jax's defaults.
        weights: what the weights of dense layers are packed in, as in `quake_jax.pack`, or None.
        calibrate: texts, from which int8 weights get the ranges of what they multiply, or None.
        rules: which weights are packed otherwise, as in `quake_jax.pack`, or None.
        attention: what attention multiplies where weights are packed, as there, or None.

    Attributes:
        bytes: of the parameters.

    Example:
        >>> encode = Encoder(config, params, tokenizer, max_length=256)
        >>> similarities = encode(["How do I sort?"]) @ encode(documents).T
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        tokenizer,
        max_length: int,
        order: int | str | None = None,
        weights: str | None = None,
        calibrate: Sequence[str] | None = None,
        rules: Sequence[tuple[str, str | None]] | None = None,
        attention: str | None = None,
    ):
        model = BERT(config)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)
        self._tokenizer = tokenizer
        self._max_length = max_length

        def embed(params, tokens, present):
            hidden = model.apply({"params": params}, tokens, present)
            hidden = hidden.astype(jnp.float32)
            mean = jnp.mean(hidden, axis=1, where=present[:, :, None])
            return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

        text = np.zeros((1, 1), np.int32), np.ones((1, 1), bool)
        if calibrate is not None:
            encodings = tokenizer.encode_batch(list(calibrate))
            calibrate = self._padded([encoding.ids for encoding in encodings])
        (embed,), params = _command.on_kernels(
            [embed], [text], params, order, weights, calibrate, rules, attention
        )
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        self._embed = partial(jax.jit(embed), params)

    def __call__(self, texts: Sequence[str], batch: int = 16) -> np.ndarray:
        """Returns the vectors, float32 (len(texts), hidden_size)."""
        encodings = self._tokenizer.encode_batch(list(texts))
        # Texts of similar length together: little padding, and few shapes to compile.
        order = sorted(range(len(texts)), key=lambda i: len(encodings[i].ids))
        parts = []
        for first in range(0, len(order), batch):
            ids = [encodings[i].ids for i in order[first : first + batch]]
            parts.append(self.embed_tokens(ids)[: len(ids)])
        vectors = np.concatenate(parts)
        return vectors[np.argsort(order)]

    def embed_tokens(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns the vectors of texts that are tokens, after them some of padding."""
        return np.asarray(self._embed(*self._padded(ids)))

    def _padded(self, ids: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Texts that are tokens as one array, and where in it there are some.

        Both numbers, of texts and of tokens in the longest, are padded to powers of two.
        """
        rows = 1 << (len(ids) - 1).bit_length()
        columns = min(max(16, 1 << (max(map(len, ids)) - 1).bit_length()), self._max_length)
        tokens = np.zeros((rows, columns), np.int32)
        present = np.zeros((rows, columns), bool)
        present[:, 0] = True  # No row without a token: its mean would be 0 / 0.
        for row, text in enumerate(ids):
            tokens[row, : len(text)] = text
            present[row, : len(text)] = True
        return tokens, present


# Where the modules are in a checkpoint.
_TOP = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
}
_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_up": "intermediate.dense",
    "mlp_down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def stored(path: tuple[str, ...], shape: tuple[int, ...]) -> _checkpoint.Stored:
    """Returns how a checkpoint stores the parameter at `path`."""
    if path[0].startswith("layer_"):
        number = path[0].removeprefix("layer_")
        module = f"encoder.layer.{number}.{_LAYER['.'.join(path[1:-1])]}"
    else:
        module = _TOP[path[0]]
    return _checkpoint.stored_as_in_torch(module, path, shape)


def parameter_shapes(config: Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of every parameter, by path, without making any."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return _checkpoint.parameter_shapes(BERT(config), tokens, tokens == 0)


def load(folder: Path, dtype: str = "float32") -> tuple[Config, Params]:
    """Reads a BERT checkpoint; returns the sizes, and the parameters as `dtype`.

    Raises:
        _checkpoint.CheckpointError: files are missing, damaged or another model's.
    """
    config = _checkpoint.read_config(folder, "bert", Config, SUPPORTED)
    _checkpoint.require_multiple(folder, config, "hidden_size", "num_attention_heads")
    params, _ = _checkpoint.load_parameters(
        folder,
        parameter_shapes(config),
        stored,
        prefix="bert.",
        unused=r"pooler\..*|cls\..*|embeddings\.position_ids",
        dtype=dtype,
    )
    return config, params


def max_length(folder: Path, config: Config) -> int:
    """Returns how many tokens of a text the checkpoint's authors let it read.

    Raises:
        _checkpoint.CheckpointError: the checkpoint pools in another way than by the mean.
    """
    if (folder / POOLING).exists():
        pooling = _checkpoint.read_json(folder / POOLING)
        modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on}
        if modes != {"pooling_mode_mean_tokens"}:
            raise CheckpointError(
                f"{folder / POOLING}: pools by {', '.join(sorted(modes)) or 'nothing'}; expected "
                "pooling_mode_mean_tokens"
            )
    length = config.max_position_embeddings
    if (folder / SENTENCES).exists():
        settings = _checkpoint.read_json(folder / SENTENCES)
        length = min(settings.get("max_seq_length") or length, length)
    return length
