"""save_packed and load_packed."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quake_jax


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tree():
    rows = jnp.arange(64)[::-1]
    weight = quake_jax.pack_weight(normal(3, 65, 33), "int8")
    codes = np.random.default_rng(1).integers(0, 16, (64, 16))
    full = quake_jax.PackedWeight.from_codes(
        codes,
        normal(2, 16) ** 2,
        "int4",
        offsets=normal(2, 16),
        permutation=rows,
        table=np.arange(16.0),
        activations=None,
    )
    return {
        "a": [weight, None, ()],
        "b": {"int4": full, "bf16": quake_jax.pack_weight(normal(7, 5), "bfloat16")},
        "c": (normal(3), np.arange(5, dtype=np.int8), jnp.float32(2), np.zeros((0, 4))),
        "shared": quake_jax.PackedLeaf(
            normal(2, 3), (quake_jax.pack_weight(normal(3, 2), "int8"),)
        ),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_round_trip(path):
    saved = tree()
    quake_jax.save_packed(path, saved)
    loaded = quake_jax.load_packed(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        assert a.shape == b.shape and a.dtype == jax.dtypes.canonicalize_dtype(b.dtype)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tensors_are_aligned_and_read_by_others(path):
    safetensors = pytest.importorskip("safetensors.numpy")
    saved = tree()
    del saved["b"]["bf16"]  # numpy has no such dtype, as safetensors.numpy sees it
    quake_jax.save_packed(path, saved)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    for name, entry in header.items():
        if not name.startswith("__padding__"):
            assert entry["data_offsets"][0] % 64 == 0
    arrays = safetensors.load_file(path)
    np.testing.assert_array_equal(arrays["a/0.codes"], saved["a"][0].codes)


def test_nothing_is_copied(path):
    quake_jax.save_packed(path, {"w": normal(64, 64)})
    loaded = quake_jax.load_packed(path)["w"]
    if loaded.devices().pop().platform != "cpu":
        pytest.skip("the array is on another device")
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if path.name in line]
    pointer = loaded.unsafe_buffer_pointer()
    assert any(int(first, 16) <= pointer < int(last, 16) for first, last in spans)


def test_another_process_computes_the_same(path):
    x, w = normal(5, 64), normal(64, 32)
    fast, packed = quake_jax.pack(lambda p, x: x @ p["w"], {"w": w}, x, weights="int8")
    quake_jax.save_packed(path, packed)
    np.save(path.with_suffix(".npy"), x)
    program = (
        "import sys, jax, numpy as np, quake_jax\n"
        "path, x = sys.argv[1], np.load(sys.argv[2])\n"
        "shapes = {'w': jax.ShapeDtypeStruct((64, 32), 'float32')}\n"
        "fast, _ = quake_jax.pack(lambda p, x: x @ p['w'], shapes, x, weights='int8')\n"
        "np.save(sys.argv[2], fast(quake_jax.load_packed(path), x))\n"
    )
    # Sums of bytes are the same with every instruction set; the scales round once.
    command = [sys.executable, "-c", program, str(path), str(path.with_suffix(".npy"))]
    subprocess.run(command, check=True, env=_environment())
    np.testing.assert_allclose(np.load(path.with_suffix(".npy")), fast(packed, x), rtol=1e-6)


def _environment():
    import os

    return os.environ | {"QUAKE_JAX_ISA": "baseline"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: b"", "is no safetensors file"),
        (lambda data: data[:100], "is no safetensors file, or is incomplete"),
        (lambda data: data[:-1], "is incomplete"),
        (lambda data: data[:8] + b"x" + data[9:], "is no safetensors file"),
        (lambda data: data.replace(b"quake_jax.packed", b"quake_jax.pickle"), "was not written by"),
        (lambda data: data.replace(b'"version": "1"', b'"version": "2"'), "is of version 2, and"),
        (lambda data: data.replace(b"a/0.codes", b"a/0.cedos", 1), "is damaged"),
    ],
)
def test_bad_files(path, edit, message):
    quake_jax.save_packed(path, tree())
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(ValueError, match=f"quake_jax.load_packed: .*{message}"):
        quake_jax.load_packed(path)


def test_no_file(path):
    with pytest.raises(FileNotFoundError):
        quake_jax.load_packed(path)


def test_what_cannot_be_saved(path):
    with pytest.raises(TypeError, match="packed a must be made of dicts.*got a set"):
        quake_jax.save_packed(path, {"a": {1}})
    with pytest.raises(TypeError, match="packed a must be a mapping with text as keys"):
        quake_jax.save_packed(path, {"a": {1: normal(2)}})
    with pytest.raises(TypeError, match="packed a must be an array with values"):
        quake_jax.save_packed(path, {"a": jax.ShapeDtypeStruct((2,), "float32")})
    assert not list(path.parent.iterdir())
