"""The command line, `python -m benchmarks SUBCOMMAND`; each subcommand is a module of this package.

To add one, write a module with `HELP`, `add_arguments(parser)` and `run(args)`, and name it in
`SUBCOMMANDS`. Its heavy imports belong inside `run`: the process is pinned before JAX starts.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import NoReturn

from benchmarks import approximations, attention, build, devices, models, ops, quality
from benchmarks.errors import BenchmarkError

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
        if importlib.util.find_spec("rich") is None:
            raise BenchmarkError("rich is not installed: pip install '.[bench]'")
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
