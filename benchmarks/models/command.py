"""`python -m benchmarks models`: whole models in Flax against the same ones on the kernels."""

from __future__ import annotations

import argparse

from benchmarks.harness import frame
from benchmarks.harness.errors import require
from benchmarks.models.cases import CASES, DTYPES, FLAX, ROUNDS, SYSTEMS

HELP = "whole Flax models against the same models on the kernels, and against torch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    frame.add_threads(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"{DTYPES[0]} by default"
    )
    frame.add_repeatable(parser, "--model", CASES)
    installed = f"all that are installed (and {FLAX} always)"
    frame.add_repeatable(parser, "--system", SYSTEMS, installed)
    frame.add_timing(
        parser,
        ROUNDS,
        "2 with --quick",
        "where XLA's large temporaries are fresh pages at each call",
    )
    frame.add_files(parser, quick="shrunk models, short readings")


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    require("flax", *["matplotlib"] * (args.plot is not None), extras="bench,flax")
    frame.run(args, "benchmarks.models")
