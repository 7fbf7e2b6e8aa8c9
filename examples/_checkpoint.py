"""Checkpoints in Hugging Face's layout: a folder with config.json and model.safetensors.
Every error names the file and, where there is one, the tensor or the setting.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from _command import UserError
from flax import linen as nn
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

Params = dict[str, Any]
ModelConfig = TypeVar("ModelConfig")

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
INDEX = f"{WEIGHTS}.index.json"  # of a checkpoint that is cut into several files
STORED_DTYPES = ("float32", "float16", "bfloat16", "float64")


class CheckpointError(UserError, ValueError):
    """A checkpoint that is not there, is damaged, or is another model's."""


def find(checkpoint: str | Path, files: Sequence[str] = ()) -> Path:
    """Returns the folder of a checkpoint, downloaded through huggingface_hub if it is an id there.

    Args:
        checkpoint: a folder, or an id such as "openai-community/gpt2".
        files: what to download beside config and weights, as patterns.

    Raises:
        CheckpointError: there is no such folder and the download fails.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder}: is a file; expected a folder with {CONFIG}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(checkpoint)):
        raise CheckpointError(f"{folder}: no such folder")
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, "model*.safetensors", INDEX, *files]
    try:
        return Path(snapshot_download(str(checkpoint), allow_patterns=patterns))
    except Exception as error:  # of many classes: of the hub, of HTTP, of the file system
        raise CheckpointError(
            f"{checkpoint}: no such folder, and as an id of the Hugging Face hub it cannot be "
            f"downloaded: {_first_line(error)}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds no JSON object")
    return content


def read_config(
    folder: Path,
    model_type: str,
    config_class: type[ModelConfig],
    supported: Mapping[str, Sequence[Any]],
) -> ModelConfig:
    """Reads the settings of a model.

    Args:
        folder: of the checkpoint.
        model_type: the architecture that config.json must name.
        config_class: a dataclass; its fields of the types in `_CHECKS` are read by name, others
            must have a default.
        supported: settings that the model has no field for, with the values at which it is right;
            the first of them holds where config.json is silent.

    Raises:
        CheckpointError: another architecture; a setting is missing, of another type, or not
            supported.
    """
    file = folder / CONFIG
    settings = read_json(file)
    if settings.get("model_type") != model_type:
        found = settings.get("model_type")
        raise CheckpointError(f"{file}: model_type is {found!r}; expected {model_type!r}")
    for name, values in supported.items():
        if settings.get(name, values[0]) not in values:
            allowed = ", ".join(map(repr, values))
            raise CheckpointError(f"{file}: {name} is {settings[name]!r}; expected {allowed}")
    found = {}
    for field in dataclasses.fields(config_class):
        if field.name in settings and field.type in _CHECKS:
            found[field.name] = _checked(file, field.name, settings[field.name], field.type)
        elif field.default is dataclasses.MISSING:
            raise CheckpointError(f"{file}: has no setting {field.name}")
    return config_class(**found)


_CHECKS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number from 1 up", lambda x: type(x) is int and x > 0),
    float: ("a positive number", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    int | None: ("a whole number from 1 up", lambda x: x is None or (type(x) is int and x > 0)),
    str: ("text", lambda x: isinstance(x, str)),
}


def _checked(file: Path, name: str, value: Any, kind: type) -> Any:
    expected, is_right = _CHECKS[kind]
    if not is_right(value):
        raise CheckpointError(f"{file}: {name} is {value!r}; expected {expected}")
    return value


def require_multiple(folder: Path, config: Any, of: str, divisor: str) -> None:
    """Raises CheckpointError unless one setting is a multiple of another."""
    whole, part = getattr(config, of), getattr(config, divisor)
    if whole % part:
        raise CheckpointError(
            f"{folder / CONFIG}: {of} is {whole}; expected a multiple of {divisor}, {part}"
        )


# Names in config.json of what stands between the layers of an MLP.
ACTIVATIONS: dict[str, Callable] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
}


@dataclass(frozen=True)
class Stored:
    """How a parameter stands in a file: its name, and its axes, some of them joined and in another
    order than in Flax.

    Attributes:
        name: of the tensor.
        joined: the parameter's shape in Flax's order of axes, as the file's model divides it.
        axes: which of `joined` each axis of the tensor is.
    """

    name: str
    joined: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        return tuple(self.joined[axis] for axis in self.axes)

    def from_file(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the parameter, of `shape`, that the file's tensor holds."""
        return tensor.transpose(np.argsort(self.axes)).reshape(shape)

    def to_file(self, parameter: np.ndarray) -> np.ndarray:
        """Returns the tensor for a parameter."""
        return np.ascontiguousarray(parameter.reshape(self.joined).transpose(self.axes))


def as_it_is(name: str, shape: tuple[int, ...]) -> Stored:
    """A tensor with Flax's shape and order of axes."""
    return Stored(name, shape, tuple(range(len(shape))))


# Flax names a module's arrays by what they do, Hugging Face calls nearly all of them "weight".
ARRAY_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def stored_as_in_torch(module: str, path: tuple[str, ...], shape: tuple[int, ...]) -> Stored:
    """Returns how torch stores the parameter at `path` of `shape`, in its `module`.

    A torch Linear is (outputs, inputs), a convolution (outputs, inputs, height, width). The heads
    and their size, which are two axes in Flax's attention, are one in torch.
    """
    name = f"{module}.{ARRAY_NAMES[path[-1]]}"
    if path[-1] == "bias":
        return as_it_is(name, (math.prod(shape),))
    if path[-1] != "kernel":
        return as_it_is(name, shape)
    if len(shape) == 4:
        return Stored(name, shape, (3, 2, 0, 1))
    inputs = 2 if path[-2] == "out" else 1
    return Stored(name, (math.prod(shape[:inputs]), math.prod(shape[inputs:])), (1, 0))


def parameter_shapes(model: nn.Module, *inputs) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of every parameter of a model, by path, without making any."""
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return {
        path: array.shape for path, array in traverse_util.flatten_dict(variables["params"]).items()
    }


def load_parameters(
    folder: Path,
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    stored: Callable[[tuple[str, ...], tuple[int, ...]], Stored],
    *,
    prefix: str = "",
    unused: str = "",
    dtype: str = "float32",
) -> tuple[Params, dict[str, str]]:
    """Reads all parameters of a model.

    Args:
        folder: of the checkpoint.
        shapes: of the parameters, as from `parameter_shapes`.
        stored: called as stored(path, shape); says how a parameter stands in the file.
        prefix: what tensor names in the file may begin with, as they do if the model was saved
            with a head.
        unused: regular expression for the tensors, prefix removed, that the model does not need.
        dtype: of the result.

    Returns:
        The parameters and the metadata of the (first) file.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, has another shape, no
            floating-point dtype, or none of the model's parameters is it.
    """
    tensors, metadata = _open(folder, prefix)
    params = {}
    for path, shape in shapes.items():
        expected = stored(path, shape)
        if expected.name not in tensors:
            raise CheckpointError(f"{folder / WEIGHTS}: no tensor {expected.name}")
        tensor = _read(*tensors.pop(expected.name), expected.shape)
        params[path] = jnp.asarray(expected.from_file(tensor, shape), dtype=dtype)
    for file, _, name in tensors.values():
        if not re.fullmatch(unused, name.removeprefix(prefix)):
            raise CheckpointError(
                f"{file}: holds the tensor {name}, which the model of {CONFIG} has no place for"
            )
    return traverse_util.unflatten_dict(params), metadata


def _open(folder: Path, prefix: str) -> tuple[dict[str, tuple[Path, Any, str]], dict[str, str]]:
    """Returns (file, open file, name) of each tensor, by its name without prefix, and metadata."""
    names = [WEIGHTS]
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map")
        names = sorted(set(index.values()))
    tensors: dict = {}
    metadata: dict = {}
    for file in (folder / name for name in names):
        if not file.exists():
            others = [f.name for f in folder.glob("*.bin")]
            hint = f" (only {others[0]}: save it as safetensors)" if others else ""
            raise CheckpointError(f"{file}: no such file{hint}")
        try:
            opened = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: cannot be read: {_first_line(error)}") from error
        metadata = metadata or opened.metadata() or {}
        for name in opened.keys():
            # Checkpoints from TensorFlow's days name a LayerNorm's arrays so.
            key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix(prefix))
            key = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key)
            if key in tensors:
                raise CheckpointError(f"{file}: {name} and {tensors[key][2]} are the same tensor")
            tensors[key] = (file, opened, name)
    return tensors, metadata


def _read(file: Path, opened: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    found = tuple(opened.get_slice(name).get_shape())
    if found != shape:
        raise CheckpointError(f"{file}: {name} has shape {found}; expected {shape}")
    try:
        tensor = opened.get_tensor(name)
    except (SafetensorError, TypeError, AttributeError) as error:  # a dtype unknown to NumPy
        raise CheckpointError(f"{file}: {name} cannot be read: {_first_line(error)}") from error
    if str(tensor.dtype) not in STORED_DTYPES:
        expected = ", ".join(STORED_DTYPES)
        raise CheckpointError(f"{file}: {name} has dtype {tensor.dtype}; expected {expected}")
    return tensor


def save(
    folder: Path,
    settings: Mapping[str, Any],
    params: Params,
    stored: Callable[[tuple[str, ...], tuple[int, ...]], Stored],
    metadata: dict[str, str],
) -> None:
    """Writes config.json and model.safetensors, the parameters as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {}
    for path, array in traverse_util.flatten_dict(params).items():
        entry = stored(path, array.shape)
        tensors[entry.name] = entry.to_file(np.asarray(array, dtype=np.float16))
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def load_tokenizer(folder: Path, vocab_size: int):
    """Reads tokenizer.json, which must know no more tokens than the model.

    Returns:
        A tokenizers.Tokenizer.
    """
    from tokenizers import Tokenizer

    file = folder / TOKENIZER
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{file}: cannot be read: {_first_line(error)}") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"{file}: has the token {largest}; expected numbers below vocab_size, {vocab_size}, of "
            f"{CONFIG}"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
