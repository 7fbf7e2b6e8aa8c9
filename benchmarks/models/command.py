"""`python -m benchmarks models`: whole models in Flax against the same ones on the kernels."""

import argparse

from benchmarks.harness import frame
from benchmarks.harness.errors import require
from benchmarks.models.cases import CASES, DTYPES, FLAX, ROUNDS, SYSTEMS, WEIGHTS

HELP = "whole Flax models against the same models on the kernels, and in other libraries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help=f"{DTYPES[0]} by default"
    )
    frame.add_repeatable(parser, "--model", CASES)
    weights = "systems whose weights have one of these formats; all"
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, help=f"{weights} by default")
    installed = f"all that are installed and have the --weights (and {FLAX} always)"
    frame.add_repeatable(parser, "--system", SYSTEMS, installed)
    shares = "also say where the time of packed models goes: dense layers, attention, XLA, …"
    parser.add_argument("--profile", action="store_true", help=shares)
    frame.add_rounds(parser, ROUNDS, "2 with --quick")
    frame.add_options(parser, "threads", "allocator", "quick", "json", "resume", "markdown", "plot")


def check(args: argparse.Namespace) -> None:
    """Raise BenchmarkError if a package is missing."""
    require("flax", *["matplotlib"] * (args.plot is not None), extras="bench,flax")
