"""The command line, `python -m benchmarks SUBCOMMAND`; each subcommand is a folder of this package.

To add one, add a folder, whose modules `harness.frame.run` describes, and name it in `SUBCOMMANDS`.
Its `command` does not import JAX: the process is pinned before that starts.
"""

import argparse
import importlib
import sys
from functools import partial
from typing import NoReturn

from benchmarks.harness import frame
from benchmarks.harness.errors import BenchmarkError, require

SUBCOMMANDS = (
    "ops",
    "attention",
    "dense",
    "models",
    "quality",
    "approximations",
    "devices",
)


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` of the options takes them and runs the chosen subcommand."""
    parser = _OneLineParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        command = importlib.import_module(f"benchmarks.{name}.command")
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=partial(frame.run, package=f"benchmarks.{name}"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit status is 2 for an error, and never depends on the figures."""
    args = parse(argv)
    try:
        require("rich")
        args.run(args)
    except BenchmarkError as error:
        print(f"python -m benchmarks {args.subcommand}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
