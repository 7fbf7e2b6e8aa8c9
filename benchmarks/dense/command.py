"""`python -m benchmarks dense`: dense layers in 32, 16, 8 and 4 bits against other libraries."""

import argparse

from benchmarks.dense import cases
from benchmarks.harness import frame

HELP = "dense layers in every format against XLA, torch, onnxruntime and OpenVINO"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    rows = ", ".join(map(str, cases.ROWS))
    parser.add_argument(
        "--rows", action="append", type=frame.positive, metavar="M", help=f"repeatable; {rows}"
    )
    layer, help_ = frame.read_by(_layer, "layer such as 768,3072"), "repeatable; those of models"
    parser.add_argument("--layer", action="append", type=layer, metavar="K,N", help=help_)
    frame.add_repeatable(parser, "--form", cases.FORMS, "all that make sense")
    few = f"down to {cases.FEWEST_ROUNDS} for the largest, 3 with --quick"
    frame.add_rounds(parser, cases.ROUNDS, few)
    frame.add_options(parser, *frame.TIMED, "plot")


def _layer(text: str) -> tuple[int, int]:
    k, n = map(frame.positive, text.split(","))
    return k, n
