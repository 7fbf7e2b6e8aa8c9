"""The command line, `python -m benchmarks SUBCOMMAND`; each subcommand is a folder of this package.

To add one, write a module with `HELP`, `add_arguments(parser)` and `run(args)`, and name it in
`SUBCOMMANDS`. It does not import JAX: the process is pinned before that starts.
"""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn

from benchmarks import build
from benchmarks.approximations import command as approximations
from benchmarks.attention import command as attention
from benchmarks.devices import command as devices
from benchmarks.harness.errors import BenchmarkError, require
from benchmarks.models import command as models
from benchmarks.ops import command as ops
from benchmarks.quality import command as quality

SUBCOMMANDS = {
    "ops": ops,
    "attention": attention,
    "models": models,
    "quality": quality,
    "approximations": approximations,
    "build": build,
    "devices": devices,
}


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: The arguments without the program's name; the process's own if None.

    Returns:
        The options, with `module` set to the module of the chosen subcommand.
    """
    parser = _OneLineParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    subparsers = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, module in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(subparser)
        subparser.set_defaults(module=module)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; the exit status is 2 for an error, and never depends on the figures."""
    args = parse(argv)
    try:
        require("rich")
        args.module.run(args)
    except BenchmarkError as error:
        print(f"python -m benchmarks {args.subcommand}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
