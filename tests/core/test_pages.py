"""Packed weights and caches lie in huge pages, where the system has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import weights_like as normal

import quake_jax
from quake_jax._core import pages

PAGE = 2 << 20


@pytest.fixture
def collapsed(monkeypatch):
    """The places that the system was asked to make huge pages of."""
    asked = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *call: asked.append(call))
    return asked


def _places(arrays):
    for x in arrays:
        start = x.addressable_data(0).unsafe_buffer_pointer()
        yield start, start + x.nbytes


def test_what_arrays_fill_is_moved(collapsed):
    arrays = [jnp.ones((1024, 1500)), jnp.ones(100), jnp.zeros((3 << 20,), jnp.int8)]
    pages.gather({"a": arrays, "b": None, "c": jax.ShapeDtypeStruct((1 << 22,), jnp.float32)})
    for start, size, advice in collapsed:
        assert (start % PAGE, size, advice) == (0, PAGE, 25)
        covered = (min(b, start + PAGE) - max(a, start) for a, b in _places(arrays))
        assert 2 * sum(x for x in covered if x > 0) >= PAGE
    assert len({start for start, *_ in collapsed}) == len(collapsed)
    # At most the ends of each of the two large ones are left out.
    assert sum(x.nbytes for x in arrays) // PAGE - 4 <= len(collapsed)


def test_of_devices(collapsed):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.P("x"))
    pages.gather(jax.device_put(jnp.ones((4096, 1024)), split))
    assert len(collapsed) >= 6


@pytest.mark.parametrize("weights", ["float32", "int4"])
def test_weights_stay_what_they_are(weights):
    w, x = normal(1024, 2048), normal(4, 1024, seed=1)
    fast, packed = quake_jax.pack(lambda p, x: x @ p, w, x, weights=weights)
    again = quake_jax.pack_weight(w, weights)
    jax.tree.map(np.testing.assert_array_equal, packed, again)
    np.testing.assert_array_equal(fast(packed, x), quake_jax.dense(x, again))


@pytest.mark.parametrize(
    "make",
    [
        lambda: quake_jax.pack_weight(jnp.ones((4096, 2048)), "float32"),
        lambda: quake_jax.PackedWeight.from_codes(
            np.zeros((4096, 4096), np.int8), np.ones(4096, np.float32), "int8"
        ),
        lambda: quake_jax.kv_cache.init(1, 4096, kv_heads=16, head_size=64),
    ],
    ids=["pack_weight", "from_codes", "kv_cache"],
)
def test_what_is_made_is_moved(make, collapsed):
    size = sum(x.nbytes for x in jax.tree.leaves(make()))
    # At most the ends of each large array are left out.
    assert 0 < size // PAGE - 4 <= len(collapsed) <= size // PAGE + 4
    collapsed.clear()
    jax.eval_shape(make)  # there is nothing to move
    assert not collapsed


def test_nothing_is_done_where_huge_pages_are_not_wanted(tmp_path, monkeypatch):
    pages._madvise.cache_clear()
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(pages, "_SETTING", setting)
    assert pages._madvise() is None
    pages._madvise.cache_clear()
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "none")
    assert pages._madvise() is None
    pages._madvise.cache_clear()


def test_inside_jit():
    w, x = normal(64, 64), normal(4, 64, seed=1)

    @jax.jit
    def whole(w, x):
        fast, packed = quake_jax.pack(lambda p, x: x @ p, w, x, weights="float32")
        return fast(packed, x)

    np.testing.assert_allclose(whole(w, x), x @ w, rtol=1e-4, atol=1e-4)
