"""What the hardware does, timed as contestants in the same rounds as the operators: the core's
clock, and at most fused multiply-adds between registers, and reading an array.

All are C that is compiled at run time; without a compiler, or off x86-64, there are none.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.timing import Contestant

CLOCK, FMA, READ = "clock", "fma peak", "read"

# --- The clock: a chain of dependent multiplications takes a known number of cycles, whatever else
# the core does.

_LINKS = 10_000
# Cycles of a 64-bit imul: 3 on Intel since Nehalem and on AMD since Zen (uops.info).
CYCLES_PER_CALL = 3 * _LINKS

_CLOCK_SOURCE = f"""
void chain(long calls) {{
  unsigned long x = 3;
  for (long i = 0; i < calls * {_LINKS // 20}; ++i) {{
    {"".join('__asm__ volatile("imul %0, %0" : "+r"(x));' for _ in range(20))}
  }}
}}
"""


def clock() -> Contestant | None:
    """Make the contestant, one call of which takes `CYCLES_PER_CALL`; None without a compiler."""
    library = _compile(_CLOCK_SOURCE)
    if library is None:
        return None
    library.chain.argtypes, library.chain.restype = [ctypes.c_long], None
    return Contestant(CLOCK, library.chain)


# --- The limits

# Enough to hide a latency of 4 cycles in 2 pipes, few enough for the 16 registers of AVX2.
_CHAINS = 12
_REPEATS = 1000
_WIDTHS = {"avx512": (64, "-mavx512f"), "avx2": (32, "-mavx2 -mfma")}

_SOURCE = """
typedef float vector __attribute__((vector_size({bytes})));
typedef long long words __attribute__((vector_size({bytes})));

void fma_chains(long calls) {{
  {declare}
  vector x;
  for (int j = 0; j < {bytes} / 4; ++j) x[j] = 1e-6f * (j + 1);
  for (long i = 0; i < calls * {repeats}; ++i) {{
    {step}
  }}
}}

/* Eight loads are under way at a time; the result is stored so that nothing is left out. */
void read_all(const char* from, long bytes, long calls) {{
  static volatile long long sink;
  for (long call = 0; call < calls; ++call) {{
    words a[8] = {{{{0}}}};
    const words* p = (const words*)from;
    for (long n = bytes / (8 * sizeof(words)); n > 0; --n, p += 8) {{
      __asm__ volatile("" : : : "memory");
      a[0] ^= p[0]; a[1] ^= p[1]; a[2] ^= p[2]; a[3] ^= p[3];
      a[4] ^= p[4]; a[5] ^= p[5]; a[6] ^= p[6]; a[7] ^= p[7];
    }}
    a[0] ^= a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];
    sink = a[0][0] ^ a[0][1];
  }}
}}
"""


class Ceilings:
    """The compiled loops for one instruction set.

    Attributes:
        left_out: Why there are none, or None.
        flops_per_call: Additions and multiplications of one call of `fma`, all threads together.
    """

    def __init__(self, isa: str | None, threads: int):
        self.left_out: str | None = None
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None
        width = next((w for name, w in _WIDTHS.items() if (isa or "").startswith(name)), None)
        self._library = _compile_loops(*width) if width else None
        if self._library is None:
            self.left_out = "needs a C++ compiler, and AVX2 or AVX-512"
            return
        self.flops_per_call = 2.0 * width[0] / 4 * _CHAINS * _REPEATS * threads

    def fma(self) -> Contestant:
        """Fused multiply-adds of float32 on as many threads as the operators may use."""
        loop = self._library.fma_chains
        return Contestant(FMA, lambda calls: self._on_all([(loop, calls)] * self._threads))

    def read(self, name: str, arrays: Sequence) -> Contestant:
        """Reading NumPy arrays once per call, each divided among the threads."""
        loop, parts = self._library.read_all, []
        for array in arrays:
            share = array.nbytes // self._threads // 512 * 512
            parts.append([(array.ctypes.data + share * i, share) for i in range(self._threads)])
        by_thread = list(zip(*parts, strict=True))

        def read_parts(own, calls: int) -> None:
            for _ in range(calls):
                for address, size in own:
                    loop(address, size, 1)

        def run(calls: int) -> None:
            self._on_all([(read_parts, own, calls) for own in by_thread])

        run.arrays = arrays  # the loop knows only addresses: this keeps the memory alive
        return Contestant(name, run)

    def _on_all(self, tasks: list[tuple]) -> None:
        if self._pool is None:
            for function, *arguments in tasks:
                function(*arguments)
            return
        started = [self._pool.submit(*task) for task in tasks]
        for future in started:
            future.result()


def _compile_loops(size: int, flags: str) -> ctypes.CDLL | None:
    declare = " ".join(f"vector a{i} = {{{i + 1}}};" for i in range(_CHAINS))
    step = " ".join(
        f'__asm__ volatile("vfmadd231ps %1, %1, %0" : "+v"(a{i}) : "v"(x));' for i in range(_CHAINS)
    )
    text = _SOURCE.format(bytes=size, declare=declare, repeats=_REPEATS, step=step)
    library = _compile(text, *flags.split())
    if library is not None:
        library.fma_chains.argtypes, library.fma_chains.restype = [ctypes.c_long], None
        library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
        library.read_all.restype = None
    return library


def _compile(text: str, *flags: str) -> ctypes.CDLL | None:
    """Compile and load C++ with C's names; None where that is not possible."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None or platform.machine() != "x86_64":
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "loops.cc", Path(folder) / "loops.so"
        source.write_text(f'extern "C" {{\n{text}\n}}\n')
        command = [compiler, "-O2", *flags, "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        return ctypes.CDLL(str(library))  # stays mapped when the file is gone
