"""`python -m benchmarks devices`: two cores as threads, as devices of one process, as processes."""

import argparse

from benchmarks.harness import environment, frame
from benchmarks.harness.errors import BenchmarkError, require

HELP = "two cores as threads, as devices of one process, and as processes of jax.distributed"
ROUNDS = 9
PINNED = False  # its processes pin themselves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    frame.add_rounds(parser, ROUNDS, "2 with --quick")
    frame.add_options(parser, "quick", "json", "markdown")


def check(args: argparse.Namespace) -> None:
    """Raise BenchmarkError if a package or a core is missing."""
    require("flax", extras="bench,flax")
    cores = environment.allowed_cores()
    if not cores:
        raise BenchmarkError("processes cannot be tied to cores on this system: it takes Linux")
    if len(cores) < 2:
        raise BenchmarkError(f"two cores are needed; this process may use {len(cores)}")
