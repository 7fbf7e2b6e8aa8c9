"""NN-LUT (Yu et al., DAC 2022, arXiv 2112.02191) as AVX-512 kernels, against orders of QuAKE.

    python -m benchmarks.approximations.nn_lut

NN-LUT places its breakpoints freely, and finding the segment of an input then takes a search;
`quake_jax.approximations.nn_lut_table` fits such tables. Others here have breakpoints where the
segment is read off the bits of one float: equally wide segments for GELU, segments whose width
doubles with every power of two for exp. `nn_lut.cc` has the kernels.
"""

import ctypes
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import environment, hardware, pages
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Settings
from benchmarks.harness.hardware import CLOCK, CYCLES_PER_CALL
from benchmarks.harness.rounds import Rounds
from benchmarks.harness.timing import Contestant
from benchmarks.ops.operators import OPERATORS
from quake_jax.approximations import nn_lut_table

ORDERS = (1, 2, 3)
OWN, BITS = "own breakpoints", "read off bits"
EXACT = {"exp": OPERATORS["exp"].exact, "gelu": OPERATORS["gelu_erf"].exact}
SIZES = {"L1": 4096, "L2": 65536}  # elements of input and output, which is 32 and 512 KiB
ROUNDS, SECONDS = 101, 2e-4
ROWS = (400, 128)  # of N(0, 2²), of which softmax's mean total variation is taken
FLAGS = ("-std=c++20", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c")
FLAGS += ("-mbmi2", "-O3", "-ffp-contract=off", "-fno-math-errno", "-falign-functions=64")
FLAGS += ("-fschedule-insns", "-fsched-pressure")  # all as CMakeLists.txt has them


@dataclass(frozen=True)
class Table:
    """A piecewise linear function: all of exp or gelu with its own breakpoints; else exp(x) for x
    from `end` to 0, or gelu(-x) for x from 0 to `end`, and 0 beyond, whose segment is (the bits of
    scale x + offset) >> shift, less that of offset itself, modulo the number of entries.
    """

    breakpoints: np.ndarray  # by the segment's number
    slopes: np.ndarray
    intercepts: np.ndarray
    end: float = 0.0
    scale: float = 0.0
    offset: float = 0.0
    shift: int = 0

    def source(self, code: int) -> str:
        """What `nn_lut.cc` needs of it, in the order in which the kernels index it."""
        entries = len(self.slopes)
        k = np.arange(entries)
        if self.scale:
            row = ((np.float32(self.offset).view(np.int32) >> self.shift) + k) % entries
            scalars = {"end": self.end, "scale": self.scale, "offset": self.offset}
            parts = [f"static constexpr float {n} = {_hex(x)};" for n, x in scalars.items()]
            parts.append(f"static constexpr int shift = {self.shift};")
        else:  # the first comparison decides the lowest bit
            levels = entries.bit_length() - 1
            row = sum((k >> level & 1) << (levels - 1 - level) for level in range(levels))
            lists = []
            for level in range(levels):
                values = np.zeros(entries // 2)
                for path in range(1 << level):  # outcome i is its bit i
                    right = k[row % (2 << level) == path + (1 << level)]
                    values[path] = self.breakpoints[right[0] - 1]
                lists.append(_list(np.resize(values, 16)))
            parts = [f"static constexpr float thresholds[{levels}][16] = {{{', '.join(lists)}}};"]
        for name, values in (("slopes", self.slopes), ("intercepts", self.intercepts)):
            ordered = np.empty(entries)
            ordered[row] = values
            parts.append(f"static constexpr float {name}[{entries}] = {_list(ordered)};")
        return f"template <> struct Table<{code}> {{ {' '.join(parts)} }};"


def _hex(value: float) -> str:
    return f"{float(np.float32(value)).hex()}f"


def _list(values: np.ndarray) -> str:
    return f"{{{', '.join(map(_hex, values))}}}"


# --- The tables


def own(function: str, entries: int) -> Table:
    """NN-LUT's own table."""
    table = nn_lut_table(function, entries)
    return Table(table.breakpoints, table.slopes, table.intercepts)


def fit(function: Callable, edges: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The largest error, slopes and intercepts of a fit between edges, the last segment of which
    is 0. A chord of width h is off by up to h² f'' / 8, and by half of that if its ends are moved
    by as much.
    """
    step = 1e-3
    curvature = (function(edges + step) - 2 * function(edges) + function(edges - step)) / step**2
    square = np.square(np.diff(edges))
    square = np.concatenate([square[:1], (square[1:] + square[:-1]) / 2, square[-1:]])
    values = function(edges) - square * curvature / 16
    values[-2:] = 0
    slopes = np.diff(values) / np.diff(edges)
    x = np.linspace(0, edges[-1], 6000)
    error = np.max(np.abs(np.interp(x, edges, values) - function(x)))
    return error, slopes, values[:-1] - slopes * edges[:-1]


def by_bits(function: str, entries: int) -> Table:
    """The table of the least error whose segments are read off the bits of a float."""
    tried = []
    if function == "gelu":  # segments of one width, the first of half of it: 2^23 leaves integers
        edges = np.concatenate([[0.0], np.arange(entries) + 0.5])
        for scale in np.arange(np.ceil(64 * entries / 5), 2.5 * 64 * entries / 5) / 64:
            tried.append((scale, 2.0**23, 0, edges / scale))
    else:  # of scale z + 1/2, 2^(23 - shift) in every power of two
        for shift in (19, 20, 21, 22):
            each = 2 ** (23 - shift)
            k = np.arange(entries + 1)
            edges = 0.5 * 2.0 ** (k // each) * (1 + k % each / each) - 0.5
            for upper in np.linspace(4.0, 12.0, 161):
                scale = np.ceil(edges[-2] / upper * 256) / 256
                tried.append((scale, 0.5, shift, edges / scale))
    of = {"exp": lambda z: np.exp(-z), "gelu": lambda z: EXACT["gelu"](-z)}[function]
    fits = [fit(of, edges) for *_, edges in tried]
    best = min(range(len(tried)), key=lambda i: fits[i][0])
    (scale, offset, shift, edges), (_, slopes, intercepts) = tried[best], fits[best]
    sign = -1.0 if function == "exp" else 1.0
    middle = (edges[-2] + edges[-1]) / 2
    return Table(edges[1:-1], sign * slopes, intercepts, sign * middle, sign * scale, offset, shift)


# --- The kernels


@dataclass(frozen=True)
class Kernel:
    """A kernel of a function, for a table or at an order."""

    name: str
    function: str  # "exp", "softmax" or "gelu"
    table: Table | None
    run: Callable[[np.ndarray, np.ndarray, int], None]  # of input, output, and how often

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty_like(x)
        self.run(x, y, 1)
        return y


def points(function: str) -> np.ndarray:
    """Inputs of both tails and all segments."""
    x = np.linspace(-30, 0 if function == "exp" else 12, 240_001, dtype=np.float32)
    return np.concatenate([x, np.float32([-87, -1e4, -1e30])])


def kernels() -> list[Kernel]:
    """All kernels; BenchmarkError where they cannot be compiled, or the CPU cannot run them."""
    if "avx512bw" not in environment.cpu_flags():
        raise BenchmarkError("the CPU has no AVX-512")
    tables = {
        (function, f"NN-LUT {entries}, {name}"): make(function, entries)
        for function in EXACT
        for entries in (16, 32)
        for name, make in ((OWN, own), (BITS, by_bits))
    }
    declared, wanted = [], []
    for function, loop, functors in (
        ("exp", "mapped", ("Exp, ", "LutExp, ")),
        ("softmax", "softmaxed", ("", "")),
        ("gelu", "mapped", ("GeluErf, ", "LutGelu, ")),
    ):
        of = "exp" if function == "softmax" else function
        codes = {f"order {order}": order for order in ORDERS}
        codes |= {name: 100 + i for i, (that, name) in enumerate(tables) if that == of}
        for name, code in codes.items():
            symbol = f"{function}_{code}"
            declared.append(f"KERNEL({symbol}, {loop}<{functors[code >= 100]}{code}>)")
            wanted.append((name, function, tables.get((of, name)), symbol))
    lines = [table.source(100 + i) for i, table in enumerate(tables.values())]
    with tempfile.TemporaryDirectory() as folder:
        header = "\n".join([*lines, f"#define KERNELS {' '.join(declared)}", ""])
        (Path(folder) / "nn_lut_tables.h").write_text(header)
        include = (f"-I{environment.ROOT / 'cpu_kernels'}", f"-I{folder}")
        source = Path(__file__).with_suffix(".cc")
        library = hardware.compiled(source, *FLAGS, *include)
    if library is None:
        raise BenchmarkError("needs GCC for x86-64")
    return [Kernel(*rest, _call(library[symbol])) for *rest, symbol in wanted]


def _call(function: Any) -> Callable[[np.ndarray, np.ndarray, int], None]:
    function.argtypes, function.restype = [*[ctypes.c_void_p] * 2, *[ctypes.c_long] * 2], None
    return lambda x, y, calls: function(x.ctypes.data, y.ctypes.data, x.size, calls)


# --- The run


def measure(settings: Settings) -> list[pages.Table]:
    """The tables of time and error; cycles are per 16 elements."""
    made, of_all = [], kernels()
    for function in dict.fromkeys(kernel.function for kernel in of_all):
        rounds = Rounds(settings, contestants=[hardware.clock()])
        own = [kernel for kernel in of_all if kernel.function == function]
        for level, count in SIZES.items():
            x = np.random.default_rng(1).normal(0, 2, count).astype(np.float32)
            x = -np.abs(x) if function == "exp" else x
            y = np.empty_like(x)
            for kernel in own:
                run = kernel.run
                rounds.add(level, Contestant(kernel.name, lambda n, f=run, x=x, y=y: f(x, y, n)))
        rounds.series = settings.read(rounds.contestants, ROUNDS)
        columns = [f"{what}, {level}" for level in SIZES for what in ("ns/element", "cycles")]
        rows = [["", *columns, "total variation" if function == "softmax" else "largest error"]]
        for kernel in own:
            cells = []
            for level, count in SIZES.items():
                key = level, kernel.name
                cells.append(f"{1e9 * rounds.series[key].median / count:.4f}")
                cycles = rounds.ratio(key, CLOCK, CYCLES_PER_CALL * 16 / count)
                cells.append(pages.spread(cycles))
            rows.append([kernel.name, *cells, f"{error(kernel):.1e}"])
        made.append((function, rows))
    return made


def error(kernel: Kernel) -> float:
    """The largest error, or of softmax the mean total variation of rows."""
    if kernel.function != "softmax":
        x = points(kernel.function)
        return float(np.max(np.abs(kernel(x) - EXACT[kernel.function](x.astype(np.float64)))))
    x = np.random.default_rng(0).normal(0, 2, ROWS).astype(np.float32)
    rows = np.stack([kernel(row) for row in x]).astype(np.float64)
    return float(np.abs(rows - OPERATORS["softmax"].exact(x.astype(np.float64))).sum(-1).mean() / 2)


def main() -> None:
    """Measure on one core, and print the tables."""
    environment.prepare(1)
    settings = Settings(None, SECONDS)
    page = pages.Page("NN-LUT as a CPU kernel", measure(settings), [])
    import quake_jax  # noqa: F401  the headline names its instruction set

    pages.to_terminal({"environment": environment.describe(1)}, page)


if __name__ == "__main__":
    main()
