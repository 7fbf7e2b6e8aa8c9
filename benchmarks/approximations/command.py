"""`python -m benchmarks approximations`: the published approximations beside QuAKE."""

import argparse

from benchmarks.harness import frame
from benchmarks.quality.command import ORDERS

HELP = "published approximations of softmax, GELU, LayerNorm, exp and sigmoid beside QuAKE"
KINDS = ("softmax", "gelu", "layernorm", "exp", "sigmoid")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    frame.add_repeatable(parser, "--kind", KINDS)
    names = (
        "of an approximation, as quake_jax.approximations lists them; repeatable; all by default"
    )
    parser.add_argument("--name", action="append", help=names)
    frame.add_repeatable(parser, "--order", ORDERS)
    frame.add_options(parser, "embedding-checkpoint", "quick", "json", "markdown", "plot")
