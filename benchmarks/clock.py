"""The core's clock, read as a contestant in the same rounds as the operators.

A chain of dependent multiplications takes a known number of cycles, whatever else the core does.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks.timing import Contestant

NAME = "clock"
LINKS = 10_000
# Cycles of a 64-bit imul: 3 on Intel since Nehalem and on AMD since Zen (uops.info).
CYCLES_PER_CALL = 3 * LINKS

_SOURCE = f"""
void chain(long calls) {{
  unsigned long x = 3;
  for (long i = 0; i < calls * {LINKS // 20}; ++i) {{
    {"".join('__asm__ volatile("imul %0, %0" : "+r"(x));' for _ in range(20))}
  }}
}}
"""


def contestant() -> Contestant | None:
    """Make the contestant, one call of which takes `CYCLES_PER_CALL`; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() != "x86_64":
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "clock.c", Path(folder) / "clock.so"
        source.write_text(_SOURCE)
        command = [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return None
        chain = ctypes.CDLL(str(library)).chain  # stays mapped when the file is gone
    chain.argtypes, chain.restype = [ctypes.c_long], None
    return Contestant(NAME, chain)
