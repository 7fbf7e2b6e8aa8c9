"""Packed weights and caches in huge pages, where Linux has them.

A product walks through all of a weight: in pages of 4 KiB the CPU has to look one up for each 64
cache lines.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections import Counter
from pathlib import Path

import jax

from quake_jax._core import jax_names

_SIZE = 2 << 20  # of a huge page
# Of <linux/mman.h>, since Linux 6.1: moves what is there into a huge page at once.
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def gather(tree) -> None:
    """Move the memory of a tree's arrays on CPUs into huge pages, where they fill most of them.

    Nothing else changes. Where the system has no such pages or does not want them ("never"), it
    does nothing.
    """
    madvise = _madvise()
    if madvise is None:
        return
    filled: Counter[int] = Counter()  # bytes of each huge page's place
    for start, end in _places(tree):
        for page in range(start // _SIZE, -(-end // _SIZE)):
            filled[page] += min(end, (page + 1) * _SIZE) - max(start, page * _SIZE)
    for page, count in filled.items():
        if 2 * count >= _SIZE:
            madvise(page * _SIZE, _SIZE, _MADV_COLLAPSE)  # an error leaves it as it is


def _places(tree):
    """Where the arrays lie, as (start, end)."""
    for array in jax.tree.leaves(tree):
        if not isinstance(array, jax.Array) or isinstance(array, jax_names.Tracer):
            continue
        for shard in array.addressable_shards:
            if shard.device.platform == "cpu":
                start = shard.data.unsafe_buffer_pointer()
                yield start, start + shard.data.nbytes


@functools.cache
def _madvise():
    """The C library's function, or None where it would do nothing."""
    try:
        if not sys.platform.startswith("linux") or "[never]" in _SETTING.read_text():
            return None
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
