"""The run of `python -m benchmarks quality`.

The models are the examples', with the kernels put in by the one line that the examples show.
"""

import argparse
import itertools

from benchmarks.harness import environment
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import progress
from benchmarks.quality import report
from benchmarks.quality.command import DTYPES, LEAVE, ORDERS, WEIGHTS


def measure(args: argparse.Namespace) -> dict:
    """Run all tasks.

    `tasks` of the result has for each task the sizes of its sets and a list of rows; a row has
    dtype, order (or the format of its packed weights), the name of its reference or None, and the
    task's figures.
    """
    dtypes = [dtype for dtype in DTYPES if dtype in (args.dtype or DTYPES)]
    orders = ["exact", *sorted(set(args.order or ORDERS))]
    if args.weights:
        formats = [name for name in WEIGHTS if name in args.weights]
        left = [f"{name}{LEAVE}{pattern}" for name in formats for pattern in args.leave]
        orders = ["exact", *formats, *left]
    with progress() as bar:
        tasks = make_tasks(args.embedding_checkpoint, sizes_of(args))
        bar.expect(len(tasks) * len(dtypes) * len(orders))
        measured = {}
        for task in tasks:
            rows, exact = [], {}
            for dtype, order in itertools.product(dtypes, orders):
                bar.show(f"{task.name}, {dtype}, {order}")
                outputs = task.outputs(dtype, order, exact.get(dtype))
                # The exact model in bfloat16 shows what the dtype alone does.
                reference = dtype if dtype in exact else next(iter(exact), None)
                figures = task.figures(outputs, exact.get(reference))
                rows.append({"dtype": dtype, "order": order, "reference": reference, **figures})
                exact.setdefault(dtype, outputs)
                bar.advance()
            measured[task.name] = {"sets": task.sets, "rows": rows}
    result = {
        "benchmark": "quality, packed weights" if args.weights else "quality",
        "environment": describe(args.threads),
        "settings": {"quick": args.quick},
        "tasks": measured,
    }
    result["bars"] = [] if args.quick else report.judge(result)
    return result


def sizes_of(args: argparse.Namespace) -> dict[str, int | None]:
    """The sizes of the sets, as `make_tasks` takes them."""
    if args.quick:
        return dict(copies=1, windows=2, generations=1, tokens=32, sections=12)
    return dict(copies=20, windows=None, generations=16, tokens=args.tokens, sections=None)


def make_tasks(checkpoint: str | None, sizes: dict[str, int | None]) -> list:
    """Load data and checkpoints of the tasks; without a checkpoint there is no search.

    `sizes` has copies of `Digits`, windows, generations and tokens of `Text`, sections of `Search`.
    BenchmarkError if a package or the checkpoint is missing.
    """
    try:
        from benchmarks.quality.tasks import Digits, Search, Text

        search = [] if checkpoint is None else [Search(checkpoint, sizes["sections"])]
        text = Text(sizes["windows"], sizes["generations"], sizes["tokens"])
        return [Digits(sizes["copies"]), text, *search]
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed: pip install '.[examples,bench]'"
        raise BenchmarkError(text) from error
    except Exception as error:
        from _command import UserError  # what the examples raise for what the user can put right

        if isinstance(error, UserError):
            raise BenchmarkError(f"argument --embedding-checkpoint: {error}") from error
        raise


def describe(threads: int) -> dict:
    """Describe this machine and the software on it, as far as this benchmark uses it."""
    described = environment.describe(threads)
    used = ("flax", "jax", "jaxlib", "numpy", "quake_jax")
    versions = {name: described["versions"][name] for name in used}
    return described | {"versions": {"python": described["python"], **versions}}
