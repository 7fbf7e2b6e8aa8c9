"""Writes the tables of the NN-LUT kernels (benchmarks/studies/nn_lut), a study of their speed.

NN-LUT (Yu et al., DAC 2022, arXiv 2112.02191) places the breakpoints freely, and finding the
segment of an input then takes a search. `quake_jax.approximations.nn_lut_table` fits such tables.
The others here have breakpoints where the segment is read off the bits of one float a z + b:
equally wide segments, or segments whose width doubles with every power of two of a z + b.

    python benchmarks/studies/nn_lut/make_tables.py            # write tables.h
    python benchmarks/studies/nn_lut/make_tables.py --check    # exit status 1 if they differ

Needs quake_jax installed, or PYTHONPATH=.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from quake_jax.approximations import nn_lut_table
from quake_jax.approximations._nn_lut import _gelu

PATH = Path(__file__).with_name("tables.h")
ENTRIES = (16, 32)  # what one and two AVX-512 registers hold
SAMPLES = 6000
MAGIC = 2.0**23  # added to |v| < 2^22, it leaves the integer nearest to v in the lowest bits


@dataclasses.dataclass(frozen=True)
class Table:
    """A piecewise linear function; where upper is not 0, of z between 0 and that.

    The segment is then (bits of the float scale z + offset) >> shift, less that of offset itself,
    modulo the number of entries; else it is to be searched for.
    """

    name: str
    breakpoints: np.ndarray
    slopes: np.ndarray
    intercepts: np.ndarray
    upper: float = 0.0
    scale: float = 0.0
    offset: float = 0.0
    shift: int = 0


def searched(name: str, function: str, entries: int) -> Table:
    table = nn_lut_table(function, entries)
    return Table(name, table.breakpoints, table.slopes, table.intercepts)


def fit(function, breakpoints, upper) -> tuple[float, np.ndarray, np.ndarray]:
    """The largest error, slopes and intercepts of a fit on [0, upper], 0 in the last segment.

    A chord of width h is off by up to h^2 f'' / 8, one whose ends are moved by half of that by half
    of it.
    """
    d = np.concatenate([[0.0], breakpoints, [upper]])
    step = 1e-3
    curvature = (function(d + step) - 2 * function(d) + function(d - step)) / step**2
    square = np.square(np.diff(d))
    square = np.concatenate([square[:1], (square[1:] + square[:-1]) / 2, square[-1:]])
    values = function(d) - square * curvature / 16
    values[-2:] = 0
    slopes = np.diff(values) / np.diff(d)
    x = np.linspace(0, upper, SAMPLES)
    error = np.max(np.abs(np.interp(x, d, values) - function(x)))
    return error, slopes, values[:-1] - slopes * d[:-1]


def uniform(name: str, function: Callable, entries: int, widest: float) -> Table:
    """Segments of one width, the first of half of it; 0 from the last on."""

    def fitted(scale: float):
        breakpoints = (np.arange(entries - 1) + 0.5) / scale
        return breakpoints, fit(function, breakpoints, entries / scale)

    # Multiples of 1/64 are exact.
    scales = np.arange(np.ceil(64 / widest), 64 * 2.5 / widest) / 64
    scale = min(scales, key=lambda s: fitted(s)[1][0])
    breakpoints, (_, slopes, intercepts) = fitted(scale)
    return Table(name, breakpoints, slopes, intercepts, (entries - 1) / scale, scale, MAGIC)


def by_bits(name: str, function: Callable, entries: int, lowest: float, highest: float) -> Table:
    """Segments of the float scale z + 1/2: 2^(23 - shift) in every power of two; 0 in the last."""
    best = np.inf, None
    for shift in (19, 20, 21, 22):
        per_octave = 2 ** (23 - shift)
        k = np.arange(1, entries + 1)
        edges = 0.5 * 2.0 ** (k // per_octave) * (1 + k % per_octave / per_octave) - 0.5
        for upper in np.linspace(lowest, highest, 161):
            scale = np.ceil(edges[-2] / upper * 256) / 256
            d = edges / scale
            error, slopes, intercepts = fit(function, d[:-1], d[-1])
            if error < best[0]:
                middle = (d[-2] + d[-1]) / 2
                best = error, Table(name, d[:-1], slopes, intercepts, middle, scale, 0.5, shift)
    return best[1]


def fraction(name: str, entries: int) -> Table:
    """2^f on [0, 1] with segments of one width."""
    d = np.arange(entries + 1) / entries
    values = 2**d * (1 - np.square(np.log(2) / entries) / 16)
    slopes = np.diff(values) / np.diff(d)
    return Table(name, d[1:-1], slopes, values[:-1] - slopes * d[:-1])


def gelu_tail(z: np.ndarray) -> np.ndarray:
    """-z Q(z): GELU is max(x, 0) + gelu_tail(|x|)."""
    return _gelu(-z)


def tables() -> list[Table]:
    result = []
    for n in ENTRIES:
        result += [
            searched(f"kExp, Method::kSearch, {n}", "exp", n),
            uniform(f"kExp, Method::kUniform, {n}", lambda z: np.exp(-z), n, 8.0 / n),
            by_bits(f"kExp, Method::kBits, {n}", lambda z: np.exp(-z), n, 4.0, 12.0),
            fraction(f"kExp, Method::kFraction, {n}", n),
            searched(f"kGelu, Method::kSearch, {n}", "gelu", n),
            uniform(f"kGelu, Method::kUniform, {n}", gelu_tail, n, 5.0 / n),
        ]
    return result


def hex_float(value: float) -> str:
    """A float32 as a hexadecimal literal of C++, without trailing zeros."""
    mantissa, exponent = float(np.float32(value)).hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}f"


def render(tables: Sequence[Table]) -> str:
    """The text of tables.h."""
    lines = [
        "// Generated by `make_tables.py` beside it, which says what is in it; do not edit.",
        "#ifndef QUAKE_TESTS_NN_LUT_TABLES_H_",
        "#define QUAKE_TESTS_NN_LUT_TABLES_H_",
        "",
        '#include "nn_lut/nn_lut.h"',
        "",
        "// clang-format off",
        "namespace quake::nn_lut {",
    ]
    for t in tables:
        n = len(t.slopes)
        scalars = ", ".join(hex_float(v) for v in (t.upper, t.scale, t.offset))
        lines += ["", "template <>"]
        lines += [f"inline constexpr Table<{n}> kTable<Function::{t.name}> = {{"]
        lines += [f"    {scalars}, {t.shift},"]
        for values in (t.breakpoints, t.slopes, t.intercepts):
            words = [hex_float(v) + "," for v in values]
            rows = ["     " + " ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
            lines += ["    {", *rows, "    },"]
        lines += ["};"]
    lines += ["", "}  // namespace quake::nn_lut", "// clang-format on", ""]
    return "\n".join([*lines, "#endif  // QUAKE_TESTS_NN_LUT_TABLES_H_"]) + "\n"


_NUMBER = re.compile(r"-?0x[0-9a-f.]+p[+-]\d+(?=f)")


def largest_error(t: Table) -> float:
    """Of a searched table."""
    function, lower, upper = (_gelu, -8, 8) if "kGelu" in t.name else (np.exp, -16, 0)
    x = np.linspace(lower, upper, 4 * SAMPLES)
    k = np.searchsorted(t.breakpoints, x, side="right")
    return np.max(np.abs(t.slopes[k] * x + t.intercepts[k] - function(x)))


def alike(t: Table, fitted: Table) -> bool:
    """Whether two tables of one name and size are the same but for rounding errors.

    The fit of nn_lut_table iterates, which magnifies them: an ulp in the function's values or in
    the solution of the linear systems, as between two CPUs, moves breakpoints by 0.2 and the
    largest error by 6 % either way. Searched tables are therefore the same if their errors agree to
    20 % and their segments meet; what comes from formulas, if the numbers agree to 1e-5.
    """
    if "kSearch" in t.name:
        apart = np.diff(t.slopes) * t.breakpoints + np.diff(t.intercepts)
        ratio = largest_error(t) / largest_error(fitted)
        return bool(np.max(np.abs(apart)) < 1e-5 and 1 / 1.2 < ratio < 1.2)
    pairs = zip(dataclasses.astuple(t)[1:], dataclasses.astuple(fitted)[1:], strict=True)
    return all(np.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def same(text: str, fitted: Sequence[Table]) -> bool:
    """Whether the text is that of tables.h with tables alike."""
    if _NUMBER.sub("", text) != _NUMBER.sub("", render(fitted)):
        return False
    numbers = map(float.fromhex, _NUMBER.findall(text))

    def read(count: int) -> np.ndarray:
        return np.array(list(itertools.islice(numbers, count)))

    for t in fitted:
        (upper, scale, offset), n = read(3), len(t.slopes)
        written = Table(t.name, read(n - 1), read(n), read(n), upper, scale, offset, t.shift)
        if not alike(written, t):
            return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the tables of the NN-LUT kernels.")
    parser.add_argument(
        "--check", action="store_true", help="only compare with the file; exit 1 if it differs"
    )
    fitted = tables()
    if not parser.parse_args(argv).check:
        PATH.write_text(render(fitted), encoding="utf-8")
        return 0
    if PATH.exists() and same(PATH.read_text(encoding="utf-8"), fitted):
        return 0
    print(f"{PATH} differs from what is fitted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
