"""`python -m benchmarks attention`: fused attention against XLA's and other libraries'."""

import argparse

from benchmarks.attention import cases
from benchmarks.attention.cases import Shape
from benchmarks.harness import frame

HELP = "fused attention against XLA and other libraries, and against the peak of the machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    dtypes = f"{' and '.join(cases.DTYPES)}, or float32 with --quick,"
    frame.add_repeatable(parser, "--dtype", cases.DTYPES, dtypes)
    parser.add_argument(
        "--shape",
        action="append",
        type=frame.read_by(Shape.parse, "shape such as 1,197,12,64 or 1,1-4096,32/8,64"),
        metavar="B,T,N,H",
        help="repeatable; T-S for T queries and S keys, N/K for K key/value heads",
    )
    masks = (*cases.MASKS, *cases.CACHES)
    frame.add_repeatable(parser, "--mask", masks, "all that make sense")
    orders = " and ".join(map(str, cases.DEFAULT_ORDERS))
    frame.add_repeatable(parser, "--order", cases.ORDERS, orders)
    frame.add_rounds(parser, cases.ROUNDS, f"{cases.HUGE_ROUNDS} for the largest, 3 with --quick")
    frame.add_options(parser, *frame.TIMED)
