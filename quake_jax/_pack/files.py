"""Packed parameters in files: safetensors, with what it does not know in the metadata.

The format is 8 bytes with the length of a JSON header, the header, and the tensors' bytes without
gaps (https://github.com/huggingface/safetensors). Here every tensor begins at a multiple of 64
bytes, so that a file mapped to memory is read by kernels where it is: the header is filled up with
spaces, and tensors of bytes that nobody reads stand between the others.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quake_jax._core import jax_names
from quake_jax._dense import packed as packed_weights
from quake_jax._dense.packed import PackedWeight
from quake_jax._pack.plan import PackedLeaf

FORMAT, VERSION = "quake_jax.packed", 1
_ALIGNMENT = 64
_PADDING = "__padding__"
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def save_packed(path: str | os.PathLike, packed: Any) -> None:
    """Write packed parameters, or any tree of arrays and packed weights, to a file.

    The file is of the format safetensors, the same for all machines. It is written beside its place
    and moved there when it is complete.

    Args:
      path: of the file.
      packed: what `pack` or `pack_weight` returned. Its containers are dicts (or other mappings,
        which are read as dicts) with text as keys, lists, tuples and None.

    Raises:
      TypeError: if there is another container, or an array of a dtype that safetensors has not.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, quake_jax
      >>> packed = {"w": quake_jax.pack_weight(jnp.ones((64, 32)), "int8")}
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> quake_jax.save_packed(path, packed)
      >>> quake_jax.load_packed(path)
      {'w': PackedWeight(shape=(64, 32), dtype='int8', group_size=None, activations='int8')}
    """
    tensors: dict[str, np.ndarray] = {}
    structure = _described(packed, "", tensors)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(VERSION),
            "structure": json.dumps(structure),
        }
    }
    position = 0
    for name, array in tensors.items():
        if padding := -position % _ALIGNMENT:
            end = position + padding
            header[f"{_PADDING}{position}"] = _entry("U8", (padding,), position, end)
            position = end
        end = position + array.nbytes
        header[name] = _entry(_NAMES[array.dtype], array.shape, position, end)
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in tensors.values():
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                file.write(array.tobytes())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _entry(dtype: str, shape, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _described(node, path: str, tensors: dict):
    """A tree as JSON, its arrays in `tensors` by the names that stand for them."""

    def inner(x, key):
        return _described(x, f"{path}/{key}" if path else str(key), tensors)

    if node is None:
        return None
    if isinstance(node, PackedWeight):
        arrays = {
            name: _added(leaf, f"{path}.{name}", tensors)
            for name in packed_weights.ARRAYS
            if (leaf := getattr(node, name)) is not None
        }
        static = {name: getattr(node, name) for name in packed_weights.STATIC}
        return {"weight": {"arrays": arrays, "static": static}}
    if isinstance(node, PackedLeaf):
        weights = [inner(w, i) for i, w in enumerate(node.weights)]
        return {"leaf": {"array": inner(node.array, "array"), "weights": weights}}
    if isinstance(node, Mapping):
        if not all(isinstance(key, str) for key in node):
            raise _refusal(path, "a mapping with text as keys", repr(list(node)))
        return {"dict": {key: inner(x, key) for key, x in node.items()}}
    if type(node) in (list, tuple):
        return {type(node).__name__: [inner(x, i) for i, x in enumerate(node)]}
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return {"array": _added(node, path, tensors)}
    expected = "made of dicts, lists, tuples, None, arrays and packed weights"
    raise _refusal(path, expected, f"a {type(node).__name__}")


def _added(leaf, name: str, tensors: dict) -> str:
    if isinstance(leaf, (jax_names.Tracer, jax.ShapeDtypeStruct)):
        raise _refusal(name, "an array with values", repr(leaf))
    array = np.asarray(leaf)
    if array.dtype not in _NAMES:
        raise _refusal(
            name, f"of one of the dtypes {', '.join(map(str, _NAMES))}", str(array.dtype)
        )
    name = name or "array"
    tensors[name] = np.ascontiguousarray(array).reshape(array.shape)
    return name


def _refusal(path: str, expected: str, given: str) -> TypeError:
    return TypeError(f"quake_jax.save_packed: packed {path} must be {expected}; got {given}")


def load_packed(path: str | os.PathLike) -> Any:
    """Read what `save_packed` wrote. The file is mapped to memory; nothing is copied on a CPU.

    Args:
      path: of the file, which must not change as long as its arrays are in use.

    Returns:
      The tree of arrays and packed weights.

    Raises:
      FileNotFoundError: if there is no file.
      ValueError: if the file is none of `save_packed`, is incomplete, or is of a newer version.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, quake_jax
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> quake_jax.save_packed(path, {"b": jnp.ones(3)})
      >>> quake_jax.load_packed(path)
      {'b': Array([1., 1., 1.], dtype=float32)}
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 0 < length <= size - 8:
            raise _unreadable(path, "is no safetensors file, or is incomplete")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
        except (ValueError, AttributeError):
            raise _unreadable(path, "is no safetensors file") from None
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise _unreadable(path, "was not written by quake_jax.save_packed")
        if metadata.get("version") != str(VERSION):
            raise _unreadable(
                path,
                f"is of version {metadata.get('version')}, and this quake_jax reads version "
                f"{VERSION}: install a newer one",
            )
        try:
            first = 8 + length
            if size < first + max((e["data_offsets"][1] for e in header.values()), default=0):
                raise _unreadable(path, "is incomplete")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return _built(json.loads(metadata["structure"]), _reader(mapped, header, first))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise _unreadable(path, f"is damaged ({type(error).__name__}: {error})") from error


def _unreadable(path: str, what: str) -> ValueError:
    return ValueError(f"quake_jax.load_packed: {path} {what}")


def _reader(mapped, header: dict, first: int) -> Callable:
    """A function from the name of a tensor to the array."""

    def array(name: str) -> jax.Array:
        entry = header[name]
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise KeyError(name)
        count = math.prod(shape)
        flat = np.frombuffer(mapped, dtype, count, first + start) if count else np.zeros(0, dtype)
        return jax.device_put(flat.reshape(shape), may_alias=True)

    return array


def _built(node, array: Callable):
    """The tree that `_described` has described."""
    if node is None:
        return None
    ((kind, content),) = node.items()
    if kind == "array":
        return array(content)
    if kind == "dict":
        return {key: _built(x, array) for key, x in content.items()}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_built(x, array) for x in content)
    if kind == "leaf":
        weights = tuple(_built(w, array) for w in content["weights"])
        return PackedLeaf(_built(content["array"], array), weights)
    arrays = {name: None for name in packed_weights.ARRAYS}
    arrays.update((name, array(x)) for name, x in content["arrays"].items())
    return PackedWeight(**arrays, **content["static"])
