"""Measures the errors of element-wise kernels against double precision, on a sample of the inputs
or on all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import _quake_jax_cpu as _cpu
import jax.numpy as jnp
import numpy as np

from quake_jax._core.config import ORDERS
from quake_jax._core.constants import MAX_REL_ERROR

# By name, whether the function is increasing.
FUNCTIONS: dict[str, bool] = _cpu.elementwise_functions()
DTYPES = ("float32", "bfloat16", "float16")
# Unless told, one float32 in 101: prime, so that the inputs have no common low bits.
SAMPLE_STRIDE = 101
# Inputs of one call into the kernels: a second or less, so that the progress moves.
_CHUNK = 1 << 22
_MEASURES = ("relative", "absolute", "ulp", "fall")
_COUNTS = ("falls", "nan_made", "nan_lost", "out_of_range", "denormal")
# The counts that must be 0, in words.
_WRONG = {
    "nan_made": "results are NaN though the input is not",
    "nan_lost": "results are numbers though the input is NaN",
    "out_of_range": "results are outside the range of the function",
    "denormal": "results are denormal instead of 0",
}


@dataclasses.dataclass(frozen=True)
class Special:
    """The result for one special input, and what it should be."""

    x: float
    got: float
    wanted: float
    correct: bool


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What was measured of one kernel.

    Attributes:
      function, dtype, order, isa: Which kernel.
      inputs: How many inputs were compared.
      bound: The bound of the relative error, rounding to the dtype included.
      increasing: Whether the exact function is increasing, so that falls are counted.
      worst: By measure ("relative", "absolute", "ulp", "fall") the largest "value", with the input
        "x", its "bits", what was "got" and what was "wanted".
      counts: "falls", "nan_made", "nan_lost", "out_of_range" and "denormal" results.
      special: Results for NaN, infinities, zeros and the ends of the dtype's range, both signs.
      failures: What is wrong, in words; empty if the kernel keeps its bound.
    """

    function: str
    dtype: str
    order: int
    isa: str
    inputs: int
    bound: float
    increasing: bool
    worst: dict[str, dict]
    counts: dict[str, int]
    special: list[Special]
    failures: list[str]


def bound(function: str, order: int, dtype: str = "float32") -> float:
    """Return the bound of the relative error, rounding to `dtype` included.

    Example:
      >>> from quake_jax import accuracy
      >>> accuracy.bound("exp", 3)
      0.000108
    """
    error = MAX_REL_ERROR[function][order]
    half_ulp = 0.0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
    return error + half_ulp * (1 + error)


def _decoded(bits: list[int], dtype: str) -> list[float]:
    unsigned = np.uint32 if dtype == "float32" else np.uint16
    return [float(x) for x in np.array(bits, unsigned).view(jnp.dtype(dtype))]


def _special_inputs(dtype: str) -> list[int]:
    info = jnp.finfo(dtype)
    values = [math.nan, math.inf, 0.0, float(info.max), float(info.smallest_subnormal)]
    bits = np.array(values, jnp.dtype(dtype)).view(np.uint32 if info.bits == 32 else np.uint16)
    sign = 1 << (info.bits - 1)
    return [int(b) for positive in bits for b in (positive & (sign - 1), positive | sign)]


class Program:
    """Kernels for a processor that Python does not run on, measured by a program that has them.

    It is cpu_kernels/tests/sweep.cc, here or under an emulator, and answers in place of the
    extension module.

    Args:
      command: What starts it.
    """

    def __init__(self, command: str):
        self.words = shlex.split(command)

    def _ask(self, *question) -> list:
        lists = [
            ",".join(map(str, q)) if isinstance(q, (list, tuple)) else str(q) for q in question
        ]
        done = subprocess.run([*self.words, *lists], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip() or f"exit code {done.returncode}"
            raise OSError(f"{shlex.join(self.words)} {lists[0]}: {said}")
        return json.loads(done.stdout)

    def supported_isas(self) -> list[str]:
        return self._ask("supported_isas")

    def measure_accuracy(self, *question) -> list[dict]:
        return self._ask("measure_accuracy", *question)

    def evaluate(self, function, dtype, isa, order, inputs) -> list[float]:
        return self._ask("evaluate", function, dtype, isa or "exact", order, inputs)


def _specials(function: str, dtype: str, order: int, isa: str, kernels) -> list[Special]:
    """Results for special inputs: NaN for NaN, the limit for ±inf, else within the bound."""
    inputs = _special_inputs(dtype)
    gots = kernels.evaluate(function, dtype, isa, order, inputs)
    wanteds = kernels.evaluate(function, dtype, "", order, inputs)
    info = jnp.finfo(dtype)
    slack = float(info.tiny) if dtype != "float16" else float(info.smallest_subnormal) / 2
    results = []
    for x, got, wanted in zip(_decoded(inputs, dtype), gots, wanteds, strict=True):
        with np.errstate(over="ignore"):
            limit = float(np.float64(wanted).astype(jnp.dtype(dtype)))
        if math.isnan(wanted):
            correct = math.isnan(got)
        elif math.isinf(x) or math.isinf(limit):
            correct = got == limit
        else:
            error = bound(function, order, dtype)
            correct = abs(got - wanted) <= error * abs(wanted) + slack
        results.append(Special(x, got, wanted, correct))
    return results


def _merged(parts: Iterator[list[dict]], advance: Callable[[], None]) -> list[dict]:
    """Add up the measurements of successive ranges, which list the same kernels."""
    total: list[dict] = []
    for part in parts:
        if not total:
            total = part
        else:
            for whole, piece in zip(total, part, strict=True):
                for measure in _MEASURES:
                    if piece[measure]["value"] > whole[measure]["value"]:
                        whole[measure] = piece[measure]
                for count in _COUNTS:
                    whole[count] += piece[count]
        advance()
    return total


def _judged(function: str, dtype: str, inputs: int, raw: dict, kernels) -> Accuracy:
    """Give a kernel's measurement its bound and its verdict."""
    order, isa = raw["order"], raw["isa"]
    limit = bound(function, order, dtype)
    worst = {}
    for measure in _MEASURES:
        extreme = raw[measure]
        (x,) = _decoded([extreme["input"]], dtype)
        worst[measure] = {
            "value": extreme["value"],
            "x": x,
            "bits": f"0x{extreme['input']:0{8 if dtype == 'float32' else 4}x}",
            "got": extreme["got"],
            "wanted": extreme["wanted"],
        }
    failures = []
    relative = worst["relative"]
    if not relative["value"] <= limit:
        failures.append(
            f"relative error {relative['value']:.4g} exceeds {limit:.4g}: f({relative['x']:.9g}) = "
            f"{relative['got']:.9g}, wanted {relative['wanted']:.9g}"
        )
    failures += [f"{raw[count]} {words}" for count, words in _WRONG.items() if raw[count]]
    special = _specials(function, dtype, order, isa, kernels)
    failures += [
        f"f({s.x:.9g}) = {s.got:.9g}, wanted {s.wanted:.9g}" for s in special if not s.correct
    ]
    counts = {count: raw[count] for count in _COUNTS}
    return Accuracy(
        function=function,
        dtype=dtype,
        order=order,
        isa=isa,
        inputs=inputs,
        bound=limit,
        increasing=FUNCTIONS[function],
        worst=worst,
        counts=counts,
        special=special,
        failures=failures,
    )


def parts_of_inputs(dtype: str, stride: int) -> list[tuple[int, int, int]]:
    """(first, count, stride) of the chunks that cover the inputs of a dtype."""
    if dtype != "float32":
        return [(0, 1 << 16, 1)]
    count = -(-(1 << 32) // stride)
    return [(k * stride, min(_CHUNK, count - k), stride) for k in range(0, count, _CHUNK)]


def measure(
    function: str,
    dtype: str = "float32",
    *,
    orders: tuple[int, ...] = ORDERS,
    isas: tuple[str, ...] | None = None,
    stride: int = SAMPLE_STRIDE,
    threads: int = 1,
    advance: Callable[[], None] = lambda: None,
    kernels=_cpu,
) -> list[Accuracy]:
    """Measure the error of an element-wise function.

    Args:
      function: One of FUNCTIONS.
      dtype: "float32", "bfloat16" or "float16".
      orders: The orders to measure.
      isas: The instruction sets to measure; None means all that are supported.
      stride: The distance between successive float32 inputs, as bits: 1 means all 2^32. The
        16-bit types always take all 65,536.
      threads: How many threads to use.
      advance: Called after each chunk of inputs.
      kernels: Whose: the extension module's, or those of a `Program`.

    Returns:
      One `Accuracy` for each instruction set and order.

    Example:
      >>> from quake_jax import accuracy
      >>> [exp] = accuracy.measure("exp", "bfloat16", orders=(3,), isas=("baseline",))
      >>> exp.worst["relative"]["value"] <= accuracy.bound("exp", 3, "bfloat16")
      True
    """
    isas = tuple(kernels.supported_isas()) if isas is None else isas
    ranges = parts_of_inputs(dtype, stride)
    executor = ThreadPoolExecutor(threads)
    try:
        parts = executor.map(
            lambda chunk: kernels.measure_accuracy(function, dtype, *chunk, isas, orders), ranges
        )
        total = _merged(parts, advance)
    finally:
        executor.shutdown(cancel_futures=True)
    inputs = sum(count for _, count, _ in ranges)
    return [_judged(function, dtype, inputs, raw, kernels) for raw in total]
