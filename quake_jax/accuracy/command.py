"""The command line: measures, prints, writes the page, and fails if a bound is exceeded."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shlex
import sys
import time
from typing import NoReturn

import _quake_jax_cpu as _cpu
import jax

import quake_jax
from quake_jax._core.config import ORDERS
from quake_jax._core.constants import MAX_REL_ERROR
from quake_jax._core.progress import progress
from quake_jax.accuracy import attention
from quake_jax.accuracy.elementwise import (
    DTYPES,
    FUNCTIONS,
    SAMPLE_STRIDE,
    Accuracy,
    Program,
    measure,
    parts_of_inputs,
)
from quake_jax.accuracy.report import markdown, program_section, replace_section, summary


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
        default=SAMPLE_STRIDE,
        help=f"all 2^32 float32 inputs instead of one in {SAMPLE_STRIDE} (16-bit types: always "
        "all)",
    )
    inputs.add_argument(
        "--stride",
        type=_positive,
        default=SAMPLE_STRIDE,
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
    total = len(functions) * sum(len(parts_of_inputs(dtype, args.stride)) for dtype in dtypes)
    dtypes_of_attention = attention.dtypes(dtypes) if args.attention else ()
    total += len(attention.CASES) * len(dtypes_of_attention)
    try:
        with progress("accuracy", total) as advance:
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
                        print(summary([r for r in measured if r.order == order]), flush=True)
                    results += measured
            for dtype in dtypes_of_attention:
                measured_cases = []
                for case in attention.CASES:
                    measured_cases += attention.measure(case, dtype, orders=orders)
                    advance()
                for order in orders:
                    those = [r for r in measured_cases if r.order == order]
                    print(attention.summary(those), flush=True)
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
            replace_section(args.markdown, *program_section(results, environment))
        else:
            args.markdown.write_text(markdown(results, of_attention, environment))
    for failure in failures:
        print(f"FAILED: {failure}")
    count = len(results) + len({(r.dtype, r.order) for r in of_attention})
    kernels = f"{count} kernels in {environment['seconds']:.0f} s"
    print(f"accuracy: {f'{len(failures)} failures' if failures else 'ok'}, {kernels}")
    return 1 if failures else 0
