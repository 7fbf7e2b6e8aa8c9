"""What the examples' command lines share: options, one-line errors, interleaved timing, tables.
It imports nothing but the standard library until it is used, so that --help answers at once.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import Any

ORDERS = ("1", "2", "3", "4", "5")
DTYPES = ("float32", "bfloat16")
WEIGHTS = ("float32", "bfloat16", "int8", "int4")
# The rows of every comparison.
COMPARED_ORDERS = ("exact", 1, 2, 3, 5)
MIN_ROUNDS, MAX_ROUNDS = 3, 25


class UserError(Exception):
    """Something that the user can put right: printed in one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def parse_order(text: str) -> int | str:
    """Parses --order."""
    if text == "exact":
        return text
    if text in ORDERS:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is none of 1, 2, 3, 4, 5, exact")


def parse_whole_number(text: str) -> int:
    """Parses --tokens, --seed and the like."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 999999999")
    return int(text)


def parse_count(text: str) -> int:
    """Parses --eval-tokens and the like: a whole number of which 0 makes no sense."""
    value = parse_whole_number(text)
    if value == 0:
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return value


def add_model_options(parser: argparse.ArgumentParser, checkpoint: str, compare: str) -> None:
    """Adds --checkpoint, --order, --dtype, --weights and --compare; two with these help texts."""
    parser.add_argument("--checkpoint", metavar="DIR", help=checkpoint)
    parser.add_argument(
        "--order",
        type=parse_order,
        help="1 to 5, or exact for XLA's own functions (default: quake_jax's default orders)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of parameters and arithmetic (default: %(default)s)",
    )
    add_weights(parser)
    parser.add_argument("--compare", action=argparse.BooleanOptionalAction, help=compare)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Adds --weights."""
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="pack the weights of dense layers in this format (default: they stay as they are)",
    )


def models(make: Callable, args: argparse.Namespace) -> tuple[dict[Hashable, Any], Any]:
    """Returns the models of a comparison by the names of their rows, and the one that was asked
    for. `make(order, weights)` makes one."""
    chosen = make(args.order, args.weights)
    if not args.compare:
        return {}, chosen
    compared = {order: make(order, None) for order in COMPARED_ORDERS}
    if args.weights is not None:
        compared[args.weights] = chosen
    return compared, chosen


def on_kernels(
    functions: Sequence[Callable],
    arguments: Sequence[tuple],
    params,
    order,
    weights,
    calibrate=None,
    rules=None,
    attention=None,
):
    """Returns functions of (params, *arguments) on the kernels, and the parameters they take.

    With `weights` these are packed; of the arguments the shapes alone count then. `calibrate` are
    batches of arguments of the first function, from which rows get their ranges, or None; `rules`
    and `attention` those of `quake_jax.pack`.
    """
    import quake_jax.linen

    if weights is None:
        return [quake_jax.linen.substitute(order)(f) for f in functions], params
    pairs = list(zip(functions, arguments, strict=True))
    if calibrate is not None:
        calibrate = [calibrate, *[None] * (len(pairs) - 1)]
    options = {"weights": weights, "calibrate": calibrate, "rules": rules, "attention": attention}
    return quake_jax.pack(pairs, params, order=order, **options)


def megabytes(model: Any) -> str:
    """Returns the size of a model's parameters for a table."""
    return f"{model.bytes / 1e6:.2f}"


def start(program: str, run: Callable[[], int]) -> None:
    """Runs an example and leaves Python with its exit status; known errors take one line."""
    try:
        status = run()
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        status = _fail(program, f"the module {error.name} is missing: pip install '.[examples]'")
    except (UserError, ImportError) as error:
        status = _fail(program, str(error))
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader has left (| head). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def _fail(program: str, message: str) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def timed(function: Callable, *args) -> tuple[float, Any]:
    """Calls a function; returns the seconds until its results were computed, and the results."""
    import jax

    begin = time.perf_counter()
    results = jax.block_until_ready(function(*args))
    return time.perf_counter() - begin, results


def interleaved_medians(
    readings: dict[Hashable, Callable[[], Sequence[float]]], budget: float = 30.0
) -> tuple[dict[Hashable, list[float]], int]:
    """Takes readings in turns; returns the median of each number, and the number of rounds.

    The first round compiles and does not count. At most MAX_ROUNDS follow, fewer once `budget`
    seconds are over, but at least MIN_ROUNDS.
    """
    for reading in readings.values():
        reading()
    taken: dict = {key: [] for key in readings}
    begin = time.perf_counter()
    rounds = 0
    while rounds < MIN_ROUNDS or (
        rounds < MAX_ROUNDS and time.perf_counter() - begin < budget * (rounds + 1) / (rounds + 2)
    ):
        for key, reading in readings.items():
            taken[key].append(reading())
        rounds += 1
    medians = {
        key: [median(column) for column in zip(*rows, strict=True)] for key, rows in taken.items()
    }
    return medians, rounds


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str):
    """Prints a table, all of whose columns but the first hold figures that are already text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def kernels_note() -> str:
    """Returns the instruction set in use, or that the kernels are switched off."""
    import quake_jax
    from quake_jax._core import switches

    if switches.DISABLED:
        return "QUAKE_JAX_DISABLE is set"
    return quake_jax.isa()


def finite_number(text: str) -> float:
    """Returns the number that `text` says, NaN if it says none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
