"""What the hardware does, timed as contestants in the same rounds as the operators: the core's
clock, and at most fused multiply-adds between registers, and reading an array.

The loops, `loops.cc`, are compiled at run time; without a compiler, or off x86-64, there are none.
"""

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

LOOPS = Path(__file__).with_name("loops.cc")
CLOCK, FMA, READ = "clock", "fma peak", "read"
BFLOAT16, INT8 = "vdpbf16ps peak", "vpdpbusd peak"
MATRIX_BFLOAT16, MATRIX_INT8 = "tdpbf16ps peak", "tdpbssd peak"

# Cycles of a 64-bit imul: 3 on Intel since Nehalem and on AMD since Zen (uops.info).
CYCLES_PER_CALL = 3 * 10_000

# By instruction set: the bytes of a vector, and the compiler's flags.
_WIDTHS = {"avx512": (64, ["-mavx512f"]), "avx2": (32, ["-mavx2", "-mfma"])}
# The instructions that multiply and add: their loop, how many operations each is for 4 bytes of a
# vector, and the flag of Linux that tells that a CPU has it at the width of AVX-512.
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
# How often a call of a loop has its instruction.
_VECTOR_REPEATS, _MATRIX_REPEATS = 12 * 1000, 4 * 1000
# How a read loop goes: in how many streams, and how many bytes ahead it prefetches.
_READS = [(streams, ahead) for streams in (1, 2, 4, 8) for ahead in (0, 1024, 4096)]


def clock() -> Contestant | None:
    """Make the contestant, one call of which takes `CYCLES_PER_CALL`; None without a compiler."""
    library = compiled(LOOPS)
    return library and Contestant(CLOCK, _typed(library.clock_chain, ctypes.c_long))


class Ceilings:
    """The compiled loops for one instruction set.

    Attributes:
        left_out: Why there are none, or None.
        peaks: Additions and multiplications of one call of every instruction that there is, all
            threads together, by the name of its contestant.
        flops_per_call: Those of `fma`; None without.
    """

    def __init__(self, isa: str | None, threads: int):
        self.left_out: str | None = None
        self.peaks: dict[str, float] = {}
        self._threads = threads
        self._pool = concurrent.futures.ThreadPoolExecutor(threads) if threads > 1 else None
        self._loops = {}  # by the name of the contestant
        self._library = None
        known = (width for name, width in _WIDTHS.items() if (isa or "").startswith(name))
        if width := next(known, None):
            size, flags = width
            for name, (loop, operations, flag) in _INSTRUCTIONS.items():
                if flag is None or (size == 64 and flag in environment.cpu_flags()):
                    self._loops[name] = loop
                    self.peaks[name] = operations * size / 4.0 * _VECTOR_REPEATS * threads
            for name, (loop, operations) in _MATRIX_INSTRUCTIONS.items():
                if isa.endswith("amx"):
                    self._loops[name] = loop
                    self.peaks[name] = 1.0 * operations * _MATRIX_REPEATS * threads
            has = [f"-D{loop.upper()}" for loop in self._loops.values()]
            self._library = compiled(LOOPS, f"-DVECTOR={size}", *has, *flags)
        if self._library is None:
            self.left_out, self.peaks = "needs a C++ compiler, and AVX2 or AVX-512", {}
        self.flops_per_call = self.peaks.get(FMA)

    def fma(self) -> Contestant:
        """Fused multiply-adds of float32 on as many threads as the operators may use."""
        return self.peak(FMA)

    def peak(self, name: str) -> Contestant:
        """One of `peaks`, on as many threads as the operators may use."""
        loop = _typed(self._library[self._loops[name]], ctypes.c_long)
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
        shares = [(x.ctypes.data, x.nbytes // self._threads // 512 * 512) for x in arrays]
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


def _typed(function: Any, *arguments: type) -> Any:
    function.argtypes, function.restype = list(arguments), None
    return function


def compiled(source: Path, *flags: str) -> ctypes.CDLL | None:
    """Compile and load a file of C++ for x86-64; None where that is not possible."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None or platform.machine() != "x86_64":
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        command = [compiler, "-O2", *flags, "-shared", "-fPIC", str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True).returncode:
            return None
        return ctypes.CDLL(str(library))  # stays mapped when the file is gone
