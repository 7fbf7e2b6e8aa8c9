"""`python -m quake_jax.accuracy`: the errors of element-wise functions and of attention.

Compares the kernels of each order, dtype and instruction set with double precision, on a sample of
the inputs or on all, and fails if one exceeds its bound; it writes docs/results/accuracy.md.
Attention is in `_accuracy_attention`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import _quake_jax_cpu as _cpu
import jax
import jax.numpy as jnp
import numpy as np

import quake_jax
from quake_jax._core.config import ORDERS
from quake_jax._core.constants import MAX_REL_ERROR
from quake_jax.accuracy import attention

# By name, whether the function is increasing.
FUNCTIONS: dict[str, bool] = _cpu.elementwise_functions()
DTYPES = ("float32", "bfloat16", "float16")

# Unless told, one float32 in 101: prime, so that the inputs have no common low bits.
_SAMPLE_STRIDE = 101
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


def _ranges(dtype: str, stride: int) -> list[tuple[int, int, int]]:
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
    stride: int = _SAMPLE_STRIDE,
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
    ranges = _ranges(dtype, stride)
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


# ---- The command line ------------------------------------------------------------------------


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _available_threads() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _writable(text: str) -> pathlib.Path:
    path = pathlib.Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _OneLineParser(
        prog="python -m quake_jax.accuracy",
        description="Measures the errors of the element-wise functions, and of attention with the "
        "instruction set in use (QUAKE_JAX_ISA), against the exact ones.",
        epilog="Exit code 1 if a result exceeds its bound (MAX_REL_ERROR in "
        "quake_jax/_core/constants.py), is NaN for a number, leaves the function's range or is "
        "wrong for a special value.",
    )

    def choice(option: str, choices, kind=str) -> None:
        parser.add_argument(
            f"--{option}",
            action="append",
            choices=list(choices),
            type=kind,
            help=f"only this {option}; may be repeated",
        )

    choice("function", [*FUNCTIONS, attention.NAME])
    choice("order", ORDERS, int)
    parser.add_argument("--isa", action="append", help="only this instruction set; may be repeated")
    choice("dtype", DTYPES)
    parser.add_argument(
        "--program",
        type=Program,
        metavar="COMMAND",
        help="measure the kernels of this program instead (cpu_kernels/tests/sweep.cc built for "
        "another processor, with the emulator in front); --markdown then writes or replaces a "
        "section of the page",
    )
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--exhaustive",
        dest="stride",
        action="store_const",
        const=1,
        default=_SAMPLE_STRIDE,
        help=f"all 2^32 float32 inputs instead of one in {_SAMPLE_STRIDE} (16-bit types: always "
        "all)",
    )
    inputs.add_argument(
        "--stride",
        type=_positive,
        default=_SAMPLE_STRIDE,
        metavar="N",
        help="one float32 input in N",
    )
    parser.add_argument("--threads", type=_positive, help="default: as many as there are CPUs")
    parser.add_argument("--json", type=_writable, metavar="PATH", help="write the results there")
    parser.add_argument("--markdown", type=_writable, metavar="PATH", help="write tables there")
    args = parser.parse_args(argv)
    try:
        supported = (args.program or _cpu).supported_isas()
    except OSError as error:
        parser.error(f"argument --program: {error}")
    for isa in args.isa or ():
        if isa not in supported:
            parser.error(
                f"argument --isa: invalid choice: {isa!r} (choose from {', '.join(supported)})"
            )
    args.isa = args.isa or supported
    args.attention = not args.function or attention.NAME in args.function
    if args.program:
        if args.attention and args.function:
            parser.error(f"{attention.NAME} is not measured by --program")
        args.attention = False
    functions = args.function or FUNCTIONS
    args.function = [function for function in functions if function != attention.NAME]
    for function in args.function:
        if function not in MAX_REL_ERROR:
            parser.error(f"{function} has no bound in quake_jax._core.constants.MAX_REL_ERROR")
    if args.attention and quake_jax.isa() not in args.isa:
        if attention.NAME in functions:
            parser.error(
                f"{attention.NAME} is measured with the instruction set in use, {quake_jax.isa()}; "
                "QUAKE_JAX_ISA chooses another"
            )
        args.attention = False
    return args


@contextlib.contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Yield what prints a line and what advances the bar, which needs rich and a terminal."""
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        shown = False
    else:
        shown = sys.stderr.isatty()
    if not shown:
        yield lambda line: print(line, flush=True), lambda: None
        return
    from rich.console import Console

    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    # Redirected, rich would send the lines to the terminal even if the output is a file.
    console, redirect = Console(stderr=True), sys.stdout.isatty()
    with Progress(*columns, console=console, redirect_stdout=redirect) as progress:
        task = progress.add_task("accuracy", total=total)
        yield lambda line: print(line, flush=True), lambda: progress.advance(task)


def _worst_of(results: list[Accuracy], name: str = "relative") -> Accuracy:
    """The kernel with the largest error, in units of its bound if that is the relative error."""
    return max(
        results, key=lambda r: r.worst[name]["value"] / (r.bound if name == "relative" else 1)
    )


def _summary(results: list[Accuracy]) -> str:
    """One line for the kernels of one function, dtype and order: the worst instruction set."""
    worst = _worst_of(results)
    error = worst.worst["relative"]
    return (
        f"{worst.function:<11} {worst.dtype:<8} order {worst.order}: relative error "
        f"{error['value']:.3e}, bound {worst.bound:.3e}: f({error['x']:.9g}) = {error['got']:.9g}, "
        f"wanted {error['wanted']:.9g} ({worst.isa})"
    )


def _cpu_name() -> str:
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # macOS
        pass
    return platform.processor() or platform.machine()


def _environment(args: argparse.Namespace, argv: list[str], seconds: float) -> dict:
    return {
        "command": shlex.join(["python", "-m", "quake_jax.accuracy", *argv]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "quake_jax": quake_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "float32_stride": args.stride,
        "threads": args.threads or _available_threads(),
        "seconds": round(seconds, 1),
    }


# ---- docs/results/accuracy.md ------------------------------------------------------------------


def _wrapped(lines: list[str]) -> str:
    """A page with its prose in lines of at most 100 characters."""
    made = []
    for line in lines:
        item = line.startswith("- ")
        prose = len(line) > 100 and not line.startswith(("|", "#"))
        indent = "  " if item else ""
        options = {"break_long_words": False, "break_on_hyphens": False}
        wrapped = textwrap.wrap(line, 100, subsequent_indent=indent, **options)
        made += wrapped if prose else [line]
    return "\n".join(made)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _grouped(results: list[Accuracy]) -> dict[tuple[str, int], dict[str, Accuracy]]:
    """Kernels by (function, order) and instruction set."""
    groups: dict[tuple[str, int], dict[str, Accuracy]] = {}
    for result in results:
        groups.setdefault((result.function, result.order), {})[result.isa] = result
    return groups


def _error_table(results: list[Accuracy]) -> list[str]:
    groups = _grouped(results)
    isas = list(dict.fromkeys(result.isa for result in results))
    rows = []
    for (function, order), group in groups.items():
        row = [function, str(order), _number(next(iter(group.values())).bound)]
        for isa in isas:
            error, ulp = group[isa].worst["relative"]["value"], group[isa].worst["ulp"]["value"]
            mark = " **fails**" if group[isa].failures else ""
            row.append(f"{_number(error)} ({_number(ulp)}){mark}")
        rows.append(row)
    return _table(["function", "order", "bound", *isas], rows)


def _worst_table(results: list[Accuracy]) -> list[str]:
    rows = []
    for (function, order), group in _grouped(results).items():
        kernels = list(group.values())
        worst = _worst_of(kernels)
        error = worst.worst["relative"]
        absolute = _worst_of(kernels, "absolute").worst["absolute"]
        rows.append(
            [function, str(order), worst.isa, f"{error['x']:.9g}", f"{error['got']:.9g}"]
            + [f"{error['wanted']:.9g}", _number(absolute["value"]), f"{absolute['x']:.9g}"]
        )
    header = ["function", "order", "instruction set", "x", "got", "wanted"]
    return _table([*header, "largest absolute error", "at x"], rows)


def _monotonicity_table(results: list[Accuracy]) -> list[str]:
    isas = list(dict.fromkeys(result.isa for result in results))
    rows = []
    for (function, order), group in _grouped(results).items():
        row = [function, str(order)]
        for isa in isas:
            falls, largest = group[isa].counts["falls"], group[isa].worst["fall"]
            row.append(f"{falls:,} ({_number(largest['value'])})" if falls else "0")
        rows.append(row)
    return _table(["function", "order", *isas], rows)


def _special_table(results: list[Accuracy]) -> list[str]:
    shown = (math.nan, -math.inf, -0.0, 0.0, math.inf)
    rows = []
    for function in dict.fromkeys(result.function for result in results):
        row = [function]
        for x in shown:
            values: dict[str, list[int]] = {}
            for result in results:
                if result.function == function:
                    got = next(s.got for s in result.special if repr(s.x) == repr(x))
                    orders = values.setdefault(f"{got:.6g}", [])
                    if result.order not in orders:
                        orders.append(result.order)
            cell = [
                text if len(values) == 1 else f"{text} (order {', '.join(map(str, orders))})"
                for text, orders in values.items()
            ]
            row.append("; ".join(cell))
        rows.append(row)
    return _table(["function", "f(NaN)", "f(-inf)", "f(-0)", "f(0)", "f(inf)"], rows)


def _markdown(
    results: list[Accuracy],
    of_attention: list[attention.AttentionAccuracy],
    environment: dict,
) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    lines = [
        "# Accuracy",
        "",
        f"Written by `{environment['command']}` on {environment['date']}: {versions}, "
        f"{environment['cpu']}, {environment['system']}; {environment['seconds']:.0f} s with "
        f"{environment['threads']} threads.",
        "",
    ]
    if results:
        lines += _elementwise_markdown(results, environment["float32_stride"])
    if of_attention:
        lines += attention.markdown(of_attention)
    return _wrapped(lines)


def _program_section(results: list[Accuracy], environment: dict) -> tuple[str, list[str]]:
    """The heading and the lines of what a program's kernels were measured at."""
    isas = ", ".join(dict.fromkeys(result.isa for result in results))
    failures = [result for result in results if result.failures]
    verdict = (
        f"{len(failures)} of {len(results)} kernels fail"
        if failures
        else (f"All {len(results)} kernels keep their bounds, and give NaN for NaN alone")
    )
    stride = environment["float32_stride"]
    lines = [
        f"`{environment['command']}` on {environment['date']}, {environment['seconds']:.0f} s; "
        f"float32: {'all' if stride == 1 else f'one in {stride}'} of the 2^32 inputs, other "
        f"dtypes: all 65,536. {verdict}. Largest relative error (ulp).",
        "",
    ]
    for dtype in dict.fromkeys(result.dtype for result in results):
        lines += [f"### {dtype}, {isas}", ""]
        lines += _error_table([result for result in results if result.dtype == dtype])
    return f"## Another processor: {isas}", lines


def _replace_section(path: pathlib.Path, heading: str, lines: list[str]) -> None:
    """Write a section into a page in place of the one of that heading, or at its end."""
    old = path.read_text().splitlines() if path.exists() else []
    start = old.index(heading) if heading in old else len(old)
    after = (k for k in range(start + 1, len(old)) if old[k].startswith("## "))
    end = next(after, len(old))
    before = [*old[:start], ""] if old[:start] and old[start - 1] else old[:start]
    path.write_text(_wrapped([*before, heading, "", *lines, *old[end:]]).rstrip("\n") + "\n")


def _elementwise_markdown(results: list[Accuracy], stride: int) -> list[str]:
    by_dtype = {d: [r for r in results if r.dtype == d] for d in DTYPES}
    inputs = "all 2^32 inputs" if stride == 1 else f"one in {stride} of the 2^32 inputs"
    failures = [r for r in results if r.failures]
    lines = [
        f"float32: {inputs}; bfloat16 and float16: all 65,536. Every result is compared with the "
        "exact function in double precision, whose own relative error is below 1e-12. The "
        "arithmetic is float32 for all dtypes; results are rounded once.",
        "",
        "- **Relative error**: |got − wanted|/|wanted|, where wanted is normal and finite. The "
        "same number covers underflow and overflow: where got or wanted is below 2^-125 only what "
        "exceeds 2^-126 counts, because denormals are flushed (selu: 2^-125, it scales what was "
        "flushed; float16: below 2^-14, 2^-25, half a step of its subnormals); inf is right where "
        "wanted is beyond the largest finite number, and counts as that number where it is not. "
        "Denormal float32 inputs are taken as 0.",
        "- **ulp**, in parentheses: the same error in units of the last place of the dtype at "
        "wanted.",
        "- **Bound**: `MAX_REL_ERROR` in quake_jax/_core/constants.py, for 16-bit types with the "
        "rounding of the result added.",
        "",
    ]
    if failures:
        lines += [f"**{len(failures)} kernels fail:**", ""]
        lines += [
            f"- {r.function} {r.dtype} order {r.order} {r.isa}: {'; '.join(r.failures)}"
            for r in failures
        ]
    else:
        lines.append(
            f"All {len(results)} kernels keep their bounds. No input but NaN gives NaN, every NaN "
            "gives NaN, no result leaves the function's range (|tanh| ≤ 1, 0 ≤ sigmoid ≤ 1, "
            "exp ≥ 0, expm1 ≥ -1 and the like), none is a denormal float32."
        )
    lines.append("")
    if by_dtype["float32"]:
        lines += ["## float32", "", "Largest relative error (ulp).", ""]
        lines += _error_table(by_dtype["float32"])
        lines += [
            "## Worst inputs, float32",
            "",
            "The input with the largest relative error, of the instruction set where it is "
            "largest; the largest absolute error of all instruction sets.",
            "",
        ]
        lines += _worst_table(by_dtype["float32"])
        increasing = [r for r in by_dtype["float32"] if r.increasing]
        if increasing:
            neighbours = "successive float32 values" if stride == 1 else "successive inputs"
            lines += [
                "## Monotonicity, float32",
                "",
                "For functions that are increasing: the number of pairs x < x' of "
                f"{neighbours} of the same sign with f(x') < f(x), and in parentheses the largest "
                "fall f(x) − f(x') relative to the exact f(x'), or to 2^-126 where that is "
                "smaller. Rounding to float32 is 6e-8 (half an ulp).",
                "",
            ]
            lines += _monotonicity_table(increasing)
    for dtype in DTYPES[1:]:
        if by_dtype[dtype]:
            lines += [f"## {dtype}", "", "Largest relative error (ulp).", ""]
            lines += _error_table(by_dtype[dtype])
    dtype = results[0].dtype
    lines += [f"## Special values, {dtype}", ""]
    lines += ["Of all instruction sets; where orders differ, each value with its orders.", ""]
    lines += _special_table([r for r in results if r.dtype == dtype])
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write what the command line asks for.

    Args:
      argv: The arguments without the program's name; the process's own if None.

    Returns:
      The exit code: 1 if a kernel exceeds its bound or is otherwise wrong, else 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    functions = args.function
    dtypes = args.dtype or DTYPES
    orders = tuple(sorted(set(args.order or ORDERS)))
    start = time.perf_counter()
    results: list[Accuracy] = []
    of_attention: list[attention.AttentionAccuracy] = []
    total = len(functions) * sum(len(_ranges(dtype, args.stride)) for dtype in dtypes)
    total += len(attention.CASES) * len(dtypes) if args.attention else 0
    try:
        with _progress(total) as (show, advance):
            for dtype in dtypes:
                for function in functions:
                    measured = measure(
                        function,
                        dtype,
                        orders=orders,
                        isas=tuple(args.isa),
                        stride=args.stride,
                        threads=args.threads or _available_threads(),
                        advance=advance,
                        kernels=args.program or _cpu,
                    )
                    for order in sorted({r.order for r in measured}):
                        show(_summary([r for r in measured if r.order == order]))
                    results += measured
            for dtype in dtypes if args.attention else ():
                measured_cases = []
                for case in attention.CASES:
                    measured_cases += attention.measure(case, dtype, orders=orders)
                    advance()
                for order in orders:
                    show(attention.summary([r for r in measured_cases if r.order == order]))
                of_attention += measured_cases
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    environment = _environment(args, argv, time.perf_counter() - start)
    failures = [
        f"{r.function} {r.dtype} order {r.order} {r.isa}: {failure}"
        for r in results
        for failure in r.failures
    ]
    failures += [
        f"{attention.NAME} {r.dtype} order {r.order} {r.isa}, {r.case}: {failure}"
        for r in of_attention
        for failure in r.failures
    ]
    if args.json:
        content = {
            **environment,
            "results": [dataclasses.asdict(r) for r in results],
            "attention": [dataclasses.asdict(r) for r in of_attention],
        }
        args.json.write_text(json.dumps({**content, "failures": failures}, indent=1) + "\n")
    if args.markdown:
        if args.program:
            _replace_section(args.markdown, *_program_section(results, environment))
        else:
            args.markdown.write_text(_markdown(results, of_attention, environment))
    for failure in failures:
        print(f"FAILED: {failure}")
    count = len(results) + len({(r.dtype, r.order) for r in of_attention})
    kernels = f"{count} kernels in {environment['seconds']:.0f} s"
    print(f"accuracy: {f'{len(failures)} failures' if failures else 'ok'}, {kernels}")
    return 1 if failures else 0
