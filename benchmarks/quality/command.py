"""`python -m benchmarks quality`: what trained models lose on real data."""

from __future__ import annotations

import argparse

from benchmarks.harness import frame

HELP = "quality on trained models: digits, held-out text, search by meaning"
DTYPES = ("float32", "bfloat16")
ORDERS = (1, 2, 3, 4, 5)
TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    frame.add_threads(parser)
    frame.add_repeatable(parser, "--dtype", DTYPES)
    frame.add_repeatable(parser, "--order", ORDERS)
    frame.add_checkpoint(parser)
    parser.add_argument(
        "--tokens", type=frame.positive, default=TOKENS, help=f"of each generation ({TOKENS})"
    )
    frame.add_files(parser, quick="a few digits, windows and tokens")


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    frame.run(args, "benchmarks.quality")
