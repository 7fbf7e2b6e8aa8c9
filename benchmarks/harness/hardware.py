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
from typing import Any

from benchmarks.harness import environment
from benchmarks.harness.timing import Contestant

CLOCK, FMA, READ = "clock", "fma peak", "read"
BFLOAT16, INT8 = "vdpbf16ps peak", "vpdpbusd peak"
MATRIX_BFLOAT16, MATRIX_INT8 = "tdpbf16ps peak", "tdpbssd peak"

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
    return library and Contestant(CLOCK, _typed(library.chain, ctypes.c_long))


def _typed(function: Any, *arguments: type) -> Any:
    function.argtypes, function.restype = list(arguments), None
    return function


# --- The limits

# Enough to hide a latency of 4 cycles in 2 pipes, few enough for the 16 registers of AVX2.
_CHAINS = 12
_REPEATS = 1000
_WIDTHS = {"avx512": (64, "-mavx512f"), "avx2": (32, "-mavx2 -mfma")}
# The instructions that multiply and add: how many operations for each 4 bytes of a vector, and the
# flag of Linux that tells that a CPU has it at the width of AVX-512.
_INSTRUCTIONS = {
    FMA: ("vfmadd231ps", 2, None),
    BFLOAT16: ("vdpbf16ps", 4, "avx512_bf16"),
    INT8: ("vpdpbusd", 8, "avx512_vnni"),
}
# Those of AMX, between registers of 16 lines of 64 bytes: how many operations. The set with them
# has asked Linux for the registers.
_MATRIX_INSTRUCTIONS = {
    MATRIX_BFLOAT16: ("tdpbf16ps", 2 * 16 * 16 * 32),
    MATRIX_INT8: ("tdpbssd", 2 * 16 * 16 * 64),
}
_MATRICES = 4  # that are added to in turn
# How a read loop goes: in how many streams, and how many bytes ahead it prefetches.
_READS = [(streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 1024, 4096)]

_SOURCE = """
typedef float vector __attribute__((vector_size({bytes})));
typedef long long words __attribute__((vector_size({bytes})));

{chains}

{streams}
"""

_CHAINS_SOURCE = """
void {instruction}_chains(long calls) {{
  {declare}
  vector x;
  for (int j = 0; j < {bytes} / 4; ++j) x[j] = 1e-6f * (j + 1);
  for (long i = 0; i < calls * {repeats}; ++i) {{
    {step}
  }}
}}
"""

_MATRICES_SOURCE = """
void {instruction}_chains(long calls) {{
  struct {{
    unsigned char palette, start_row, reserved[14];
    unsigned short bytes_of_row[16];
    unsigned char rows[16];
  }} configuration = {{1}};
  for (int i = 0; i < 8; ++i) configuration.bytes_of_row[i] = 64, configuration.rows[i] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  {clear}
  for (long i = 0; i < calls * {repeats}; ++i) {{
    {step}
  }}
  __asm__ volatile("tilerelease");
}}
"""

# Each stream reads a part of the array. Eight loads are under way at a time; the result is stored
# so that nothing is left out.
_STREAMS_SOURCE = """
void read_{streams}_{ahead}(const char* from, long bytes, long calls) {{
  static volatile long long sink;
  for (long call = 0; call < calls; ++call) {{
    words a[8] = {{{{0}}}};
    const long part = bytes / {streams} / 512 * 512;
    for (long at = 0; at < part; at += 8 / {streams} * sizeof(words)) {{
      __asm__ volatile("" : : : "memory");
      {loads}
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
        peaks: Additions and multiplications of one call of every instruction that there is, all
            threads together, by the name of its contestant.
        flops_per_call: Those of `fma`.
    """

    def __init__(self, isa: str | None, threads: int):
        self.left_out: str | None = None
        self.peaks: dict[str, float] = {}
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None
        width = next((w for name, w in _WIDTHS.items() if (isa or "").startswith(name)), None)
        self._library = _compile_loops(*width, isa.endswith("amx")) if width else None
        if self._library is None:
            self.left_out = "needs a C++ compiler, and AVX2 or AVX-512"
            return
        for name, (_, operations, flag) in _INSTRUCTIONS.items():
            if flag is None or (width[0] == 64 and flag in environment.cpu_flags()):
                self.peaks[name] = operations * width[0] / 4.0 * _CHAINS * _REPEATS * threads
        if isa.endswith("amx"):
            for name, (_, operations) in _MATRIX_INSTRUCTIONS.items():
                self.peaks[name] = 1.0 * operations * _MATRICES * _REPEATS * threads
        self.flops_per_call = self.peaks[FMA]

    def fma(self) -> Contestant:
        """Fused multiply-adds of float32 on as many threads as the operators may use."""
        return self.peak(FMA)

    def peak(self, name: str) -> Contestant:
        """One of `peaks`, on as many threads as the operators may use."""
        instruction = (_INSTRUCTIONS | _MATRIX_INSTRUCTIONS)[name][0]
        loop = _typed(self._library[f"{instruction}_chains"], ctypes.c_long)
        return Contestant(name, lambda calls: self._on_all([(loop, calls)] * self._threads))

    def read(self, name: str, arrays: Sequence) -> Contestant:
        """Reading NumPy arrays once per call, each divided among the threads."""
        return self._reading(name, (1, 0), arrays)

    def reads(self, arrays: Sequence) -> list[Contestant]:
        """Reading them in one to eight streams, with and without prefetching."""
        name = f"{READ}, streams {{}}, ahead {{}}"
        return [self._reading(name.format(*way), way, arrays) for way in _READS]

    def _reading(self, name: str, way: tuple[int, int], arrays: Sequence) -> Contestant:
        types = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long)
        loop = _typed(self._library["read_{}_{}".format(*way)], *types)
        shares = [
            (array.ctypes.data, array.nbytes // self._threads // 512 * 512) for array in arrays
        ]
        by_thread = [[(at + i * size, size) for at, size in shares] for i in range(self._threads)]

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


def _compile_loops(size: int, flags: str, amx: bool) -> ctypes.CDLL | None:
    def chains(instruction: str) -> str:
        step = f'__asm__ volatile("{instruction} %1, %1, %0" : "+v"(a{{}}) : "v"(x));'
        return _CHAINS_SOURCE.format(
            instruction=instruction,
            bytes=size,
            repeats=_REPEATS,
            declare=" ".join(f"vector a{i} = {{{i + 1}}};" for i in range(_CHAINS)),
            step=" ".join(step.format(i) for i in range(_CHAINS)),
        )

    def matrices(instruction: str) -> str:
        clear = '__asm__ volatile("tilezero %%tmm{}" : :);'
        step = f'__asm__ volatile("{instruction} %%tmm7, %%tmm6, %%tmm{{}}" : :);'
        return _MATRICES_SOURCE.format(
            instruction=instruction,
            repeats=_REPEATS,
            clear=" ".join(clear.format(i) for i in range(8)),
            step=" ".join(step.format(i) for i in range(_MATRICES)),
        )

    def streams(count: int, ahead: int) -> str:
        loads, lines = [], 8 // count
        for stream in range(count):
            loads.append(f"const char* p{stream} = from + {stream} * part + at;")
            for i in range(lines):
                if ahead:
                    loads.append(f"__builtin_prefetch(p{stream} + {ahead + i * size});")
                loads.append(f"a[{stream * lines + i}] ^= ((const words*)p{stream})[{i}];")
        return _STREAMS_SOURCE.format(streams=count, ahead=ahead, loads=" ".join(loads))

    known = [name for name, *_, flag in _INSTRUCTIONS.values() if flag is None or size == 64]
    text = _SOURCE.format(
        bytes=size,
        chains="".join(map(chains, known))
        + "".join(matrices(name) for name, _ in _MATRIX_INSTRUCTIONS.values() if amx),
        streams="".join(streams(*way) for way in _READS),
    )
    return _compile(text, *flags.split())


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
