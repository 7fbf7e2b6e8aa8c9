"""`python -m benchmarks ops`: single operators against jax.nn, torch and onnxruntime."""

import argparse

from benchmarks.harness import frame
from benchmarks.ops import cases
from benchmarks.ops.operators import FUNCTIONS

HELP = "single operators against jax.nn, torch, onnxruntime and a copy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    frame.add_repeatable(parser, "--function", FUNCTIONS)
    frame.add_repeatable(parser, "--dtype", cases.DTYPES, "all, or float32 with --quick,")
    shape = frame.read_by(_shape, "shape such as 128,1024")
    parser.add_argument("--shape", action="append", type=shape, metavar="N,M,…", help="repeatable")
    few = ", ".join(map(str, cases.DEFAULT_ORDERS))
    frame.add_repeatable(parser, "--order", cases.ORDERS, f"{few}, and 4 on float32 in L2,")
    frame.add_rounds(parser, cases.ROUNDS, f"{cases.DRAM_ROUNDS} in DRAM, 3 with --quick")
    frame.add_options(parser, *frame.TIMED, "plot")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(frame.positive, text.replace("x", ",").split(",")))
