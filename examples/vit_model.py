"""ViT in Flax Linen, and its checkpoints in Hugging Face's layout (vit-base-patch16-224).
It is written without quake_jax: `Classifier` substitutes the kernels with one line.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import _checkpoint
import _command
import jax
import jax.numpy as jnp
import numpy as np
from _checkpoint import ACTIVATIONS, CheckpointError, Params
from flax import linen as nn

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Config:
    """Sizes of a ViT, named as in its config.json, and the names of its classes."""

    image_size: int
    patch_size: int
    num_channels: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12


# Settings of config.json that the model has no code for, and the values at which it needs none.
SUPPORTED = {"hidden_act": ("gelu", *ACTIVATIONS), "qkv_bias": (True,)}


class Block(nn.Module):
    """Attention, then two dense layers, each on a normalised input and added to the stream."""

    config: Config
    dropout: float

    @nn.compact
    def __call__(self, x):
        config = self.config
        norm = partial(nn.LayerNorm, epsilon=config.layer_norm_eps, use_fast_variance=False)
        drop = partial(nn.Dropout, self.dropout, deterministic=self.dropout == 0)
        attention = nn.MultiHeadDotProductAttention(config.num_attention_heads, name="attention")
        x = x + drop()(attention(norm(name="norm_before")(x)))
        hidden = nn.Dense(config.intermediate_size, name="mlp_up")(norm(name="norm_after")(x))
        hidden = ACTIVATIONS[config.hidden_act](hidden)
        return x + drop()(nn.Dense(config.hidden_size, name="mlp_down")(hidden))


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al., 2020): patches, class token, pre-norm, linear head.

    Args:
        config: the sizes.
        classes: how many.
        dropout: rate on the embedding and the residual branches; needs an rng "dropout" if not 0.

    Example:
        >>> with quake_jax.linen.substitute(order=3):
        ...     logits = ViT(config, classes=1000).apply({"params": params}, images)
    """

    config: Config
    classes: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images):
        """Returns the logits (batch, classes) for images (batch, height, width, channels)."""
        config = self.config
        patch = (config.patch_size, config.patch_size)
        x = nn.Conv(config.hidden_size, patch, strides=patch, padding="VALID", name="patches")(
            images
        )
        x = x.reshape(len(images), -1, config.hidden_size)
        normal = nn.initializers.normal(0.02)
        class_token = self.param("class_token", normal, (1, 1, config.hidden_size))
        x = jnp.concatenate([jnp.tile(class_token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", normal, (1, *x.shape[1:]))
        x = nn.Dropout(self.dropout, deterministic=self.dropout == 0)(x)
        for i in range(config.num_hidden_layers):
            x = Block(config, self.dropout, name=f"layer_{i}")(x)
        norm = nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name="norm")
        return nn.Dense(self.classes, name="classifier")(norm(x[:, 0]))


class Classifier:
    """A model with its parameters, compiled.

    Args:
        config: the sizes.
        params: the parameters, as from `load`. Their dtype is that of the arithmetic.
        order: of the kernels, "exact" for none, None for quake_jax's defaults.
        weights: what the weights of dense layers are packed in, as in `quake_jax.pack`, or None.
        calibrate: images, from which int8 weights get the ranges of what they multiply, or None.
        rules: which weights are packed otherwise, as in `quake_jax.pack`, or None.
        attention: what attention multiplies where weights are packed, as there, or None.

    Attributes:
        bytes: of the parameters.

    Example:
        >>> classify = Classifier(config, params, order=3)
        >>> probabilities = jax.nn.softmax(classify(images))
    """

    def __init__(
        self,
        config: Config,
        params: Params,
        order: int | str | None = None,
        weights: str | None = None,
        calibrate=None,
        rules: Sequence[tuple[str, str | None]] | None = None,
        attention: str | None = None,
    ):
        classes = params["classifier"]["bias"].size
        dtype = params["classifier"]["bias"].dtype
        model = ViT(config, classes)

        def apply(params, images):
            logits = model.apply({"params": params}, images.astype(dtype))
            return logits.astype(jnp.float32)

        shape = (1, config.image_size, config.image_size, config.num_channels)
        images = jax.ShapeDtypeStruct(shape, np.float32)
        (apply,), params = _command.on_kernels(
            [apply], [(images,)], params, order, weights, calibrate, rules, attention
        )
        self.bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        self._apply = partial(jax.jit(apply), params)

    def __call__(self, images) -> jax.Array:
        """Returns the logits, float32 (batch, classes), for images (batch, height, width,
        channels) that are preprocessed."""
        return self._apply(images)


# Where the modules are in a checkpoint.
_TOP = {
    "patches": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "classifier": "classifier",
}
_LAYER = {
    "norm_before": "layernorm_before",
    "norm_after": "layernorm_after",
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "mlp_up": "intermediate.dense",
    "mlp_down": "output.dense",
}


def stored(path: tuple[str, ...], shape: tuple[int, ...]) -> _checkpoint.Stored:
    """Returns how a checkpoint stores the parameter at `path`."""
    if path == ("class_token",):
        return _checkpoint.as_it_is("vit.embeddings.cls_token", shape)
    if path == ("positions",):
        return _checkpoint.as_it_is("vit.embeddings.position_embeddings", shape)
    if path[0].startswith("layer_"):
        number = path[0].removeprefix("layer_")
        module = f"vit.encoder.layer.{number}.{_LAYER['.'.join(path[1:-1])]}"
    else:
        module = _TOP[path[0]]
    return _checkpoint.stored_as_in_torch(module, path, shape)


def parameter_shapes(config: Config, classes: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of every parameter, by path, without making any."""
    image = jnp.zeros((1, config.image_size, config.image_size, config.num_channels))
    return _checkpoint.parameter_shapes(ViT(config, classes), image)


def save(folder: Path, config: Config, labels: list[str], params: Params, metadata: dict) -> None:
    """Writes config.json and model.safetensors, the parameters as float16."""
    settings = {"model_type": "vit"} | asdict(config) | {"id2label": dict(enumerate(labels))}
    _checkpoint.save(folder, settings, params, stored, metadata)


def load(folder: Path, dtype: str = "float32") -> tuple[Config, list[str], Params, dict[str, str]]:
    """Reads a ViT checkpoint with a classifier, from `save` or Hugging Face's transformers.

    Returns:
        The sizes, the classes' names, the parameters as `dtype`, the metadata of model.safetensors.

    Raises:
        _checkpoint.CheckpointError: files are missing, damaged or another model's.
    """
    config = _checkpoint.read_config(folder, "vit", Config, SUPPORTED)
    if config.num_channels not in (1, 3):
        raise CheckpointError(
            f"{folder / _checkpoint.CONFIG}: num_channels is {config.num_channels}; expected 1 or 3"
        )
    _checkpoint.require_multiple(folder, config, "image_size", "patch_size")
    _checkpoint.require_multiple(folder, config, "hidden_size", "num_attention_heads")
    labels = _read_labels(folder)
    params, metadata = _checkpoint.load_parameters(
        folder,
        parameter_shapes(config, len(labels)),
        stored,
        unused=r"vit\.pooler\..*",
        dtype=dtype,
    )
    return config, labels, params, metadata


def _read_labels(folder: Path) -> list[str]:
    file = folder / _checkpoint.CONFIG
    labels = _checkpoint.read_json(file).get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(i) for i in range(len(labels))}:
        raise CheckpointError(f"{file}: id2label is not {{'0': ..., '1': ..., ...}}")
    return [str(labels[str(i)]) for i in range(len(labels))]


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the model sees it, as in preprocessor_config.json.

    Attributes:
        size: height and width.
        resample: one of PIL.Image.Resampling.
        factor: by which the values, 0 to 255, are multiplied.
        mean, deviation: of each channel; the values less the mean are divided by the deviation.
    """

    size: tuple[int, int]
    resample: int
    factor: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, image) -> np.ndarray:
        """Returns float32 (height, width, channels) for a PIL.Image."""
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        image = image.resize(self.size[::-1], self.resample)
        return self.normalize(np.asarray(image, np.float32).reshape(*self.size, -1))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Scales values from 0 to 255, float32 (..., channels)."""
        pixels = pixels * np.float32(self.factor)
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)


def load_preprocessing(folder: Path, config: Config) -> Preprocessing:
    """Reads preprocessor_config.json.

    Raises:
        _checkpoint.CheckpointError: it is missing, or as in `preprocessing_of`.
    """
    file = folder / PREPROCESSOR
    return preprocessing_of(_checkpoint.read_json(file), config, file)


def preprocessing_of(settings: dict, config: Config, file: Path) -> Preprocessing:
    """Returns the preprocessing that the settings of `file` say.

    Raises:
        _checkpoint.CheckpointError: they ask for what is not done here, or for images that do not
            fit the model.
    """

    def refuse(name, expected):
        raise CheckpointError(f"{file}: {name} is {settings.get(name)!r}; expected {expected}")

    channels, side = config.num_channels, config.image_size
    if settings.get("do_center_crop"):
        refuse("do_center_crop", "false")
    if not settings.get("do_resize", True):
        refuse("do_resize", "true")
    resample = settings.get("resample", 2)
    if resample not in range(6):
        refuse("resample", "a number from 0 to 5, as of PIL.Image.Resampling")
    factor = settings.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float):
        refuse("rescale_factor", "a number")
    size = settings.get("size", side)
    size = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if size != (side, side):
        refuse("size", f"a height and a width of image_size, {side}")
    statistics = []
    for name, unused in (("image_mean", 0.0), ("image_std", 1.0)):
        values = settings.get(name, [0.5] * channels)
        values = values if settings.get("do_normalize", True) else [unused] * channels
        if not (isinstance(values, list) and len(values) == channels):
            refuse(name, f"{channels} numbers")
        statistics.append(tuple(values))
    return Preprocessing(
        size=size,
        resample=resample,
        factor=factor if settings.get("do_rescale", True) else 1.0,
        mean=statistics[0],
        deviation=statistics[1],
    )
