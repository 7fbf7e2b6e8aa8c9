"""`python -m benchmarks quality`: what trained models lose on real data."""

import argparse

from benchmarks.harness import frame

HELP = "quality on trained models: digits, held-out text, search by meaning"
DTYPES = ("float32", "bfloat16")
ORDERS = (1, 2, 3, 4, 5)
CALIBRATED = "int8-calibrated"
# What attention multiplies, with weights in float32.
ATTENTION = {f"{dtype} attention": dtype for dtype in ("bfloat16", "int8")}
WEIGHTS = ("float32", *ATTENTION, "bfloat16", "int8", CALIBRATED, "int4")
LEAVE = " but "  # between a format and the pattern of the weights that are left
TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    frame.add_repeatable(parser, "--dtype", DTYPES)
    frame.add_repeatable(parser, "--order", ORDERS)
    frame.add_repeatable(parser, "--weights", WEIGHTS, "none, but orders,")
    text = "also with the weights in float32 whose paths match, to see what they lose; repeatable"
    parser.add_argument("--leave", action="append", default=[], metavar="PATTERN", help=text)
    parser.add_argument(
        "--tokens", type=frame.positive, default=TOKENS, help=f"of each generation ({TOKENS})"
    )
    files = ("json", "markdown", "plot")
    frame.add_options(parser, "threads", "embedding-checkpoint", "quick", *files)
