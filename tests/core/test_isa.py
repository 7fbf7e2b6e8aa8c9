"""Which instruction sets a machine is found to have."""

from __future__ import annotations

import pathlib
import platform
import re

import pytest

import quake_jax

LIST = pathlib.Path(__file__).resolve().parents[2] / "cpu_kernels" / "isa" / "list.h"
ROW = re.compile(r"^QUAKE_ISA\(x86, (\w+), (\w+), (.*)\)$", re.MULTILINE)
# What Linux calls otherwise.
FLAGS = {"avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}


def _flags() -> set[str]:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        pytest.skip("needs Linux on x86-64")
    return set(re.search(r"^flags\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)[1].split())


def test_sets_are_those_whose_features_linux_tells():
    flags, wanted = _flags(), {"none"}
    for name, extended, features in ROW.findall(LIST.read_text()):
        needed = re.findall(r"HAS\(([\w-]+)\)", features)
        named = {FLAGS.get(feature, feature.replace("-", "_")) for feature in needed}
        if extended in wanted and named <= flags:
            wanted.add(name)
    # Older compilers lack AVX-VNNI and AMX, and Linux may refuse the latter's registers.
    found = set(quake_jax.supported_isas())
    assert "baseline" in found and found <= wanted
    assert {"avx2", "avx512", "avx512vnni", "avx512bf16"} & wanted <= found
