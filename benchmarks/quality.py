"""`python -m benchmarks quality`: what trained models lose on real data, at every order and dtype.

The models are the examples', with the kernels put in by the one line that the examples show.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

from benchmarks import environment
from benchmarks.errors import BenchmarkError, check_files
from benchmarks.ops import positive

HELP = "quality on trained models: digits, held-out text, search by meaning"
DTYPES = ("float32", "bfloat16")
ORDERS = (1, 2, 3, 4, 5)
TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--threads", type=int, choices=(1, 2), default=1, help="cores and threads")
    add("--dtype", action="append", choices=DTYPES, help=f"repeatable; {' and '.join(DTYPES)}")
    add("--order", action="append", type=int, choices=ORDERS, help="repeatable; all by default")
    add(
        "--embedding-checkpoint",
        metavar="DIR",
        help="folder, or id on the Hugging Face hub, of a BERT that embeds sentences, such as "
        "all-MiniLM-L6-v2; without it there is no search",
    )
    add("--tokens", type=positive, default=TOKENS, help=f"of each generation ({TOKENS})")
    add("--quick", action="store_true", help="a few digits, windows and tokens: a try, no result")
    add("--json", type=Path, metavar="PATH", help="write the result as JSON")
    add("--markdown", type=Path, metavar="PATH", help="write or replace the section of this run")
    add("--plot", type=Path, metavar="DIR", help="write plots as PNG files")


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    check_files(args.json, args.markdown)
    environment.prepare(args.threads)

    from benchmarks import quality_report, report

    result = measure(args)
    tables, remarks = quality_report.tables(result), quality_report.remarks(result)
    report.print_page(report.headline(result), tables, remarks)
    if args.json:
        report.to_json(result, args.json)
    if args.markdown:
        report.write_section(result, args.markdown, quality_report.HEADING, tables, remarks)
    if args.plot:
        from benchmarks import quality_plots

        quality_plots.draw(result, args.plot)


def measure(args: argparse.Namespace) -> dict:
    """Run all tasks.

    Args:
        args: The options, as `add_arguments` declares them.

    Returns:
        The result, a dictionary that json can write. `tasks` has for each task the sizes of its
        sets and a list of rows; a row has dtype, order, the name of its reference or None, and
        the task's figures.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import quality_report

    dtypes = [dtype for dtype in DTYPES if dtype in (args.dtype or DTYPES)]
    orders = ["exact", *sorted(set(args.order or ORDERS))]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=None)
        tasks = make_tasks(args)
        progress.update(bar, total=len(tasks) * len(dtypes) * len(orders))
        measured = {}
        for task in tasks:
            rows, exact = [], {}
            for dtype in dtypes:
                for order in orders:
                    progress.update(bar, description=f"{task.name}, {dtype}, {order}")
                    outputs = task.outputs(dtype, order, exact.get(dtype))
                    # The exact model in bfloat16 shows what the dtype alone does.
                    reference = dtype if dtype in exact else next(iter(exact), None)
                    figures = task.figures(outputs, exact.get(reference))
                    rows.append({"dtype": dtype, "order": order, "reference": reference, **figures})
                    exact.setdefault(dtype, outputs)
                    progress.advance(bar)
            measured[task.name] = {"sets": task.sets, "rows": rows}
    result = {
        "benchmark": "quality",
        "environment": describe(args.threads),
        "settings": {"quick": args.quick},
        "tasks": measured,
    }
    result["bars"] = [] if args.quick else quality_report.judge(result)
    return result


def sizes_of(args: argparse.Namespace) -> dict[str, int | None]:
    """The sizes of the sets, as `make_tasks` takes them."""
    if args.quick:
        return {"copies": 1, "windows": 2, "generations": 1, "tokens": 32, "sections": 12}
    return {
        "copies": 20,
        "windows": None,
        "generations": 16,
        "tokens": args.tokens,
        "sections": None,
    }


def make_tasks(args: argparse.Namespace, sizes: dict[str, int | None] | None = None) -> list:
    """Load data and checkpoints of the tasks that the options ask for.

    Args:
        args: The options; `embedding_checkpoint` counts.
        sizes: copies of `Digits`, windows, generations and tokens of `Text`, sections of `Search`;
            by default those of the options.

    Returns:
        The tasks. There is a search only with an embedding checkpoint.

    Raises:
        BenchmarkError: A package or the checkpoint is missing.
    """
    try:
        from benchmarks.quality_tasks import Digits, Search, Text

        sizes, search = sizes or sizes_of(args), []
        if args.embedding_checkpoint is not None:
            search = [Search(args.embedding_checkpoint, sizes["sections"])]
        return [
            Digits(sizes["copies"]),
            Text(sizes["windows"], sizes["generations"], sizes["tokens"]),
            *search,
        ]
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"{error.name} is not installed: pip install '.[examples,bench]'"
        ) from error
    except Exception as error:
        from _command import UserError  # what the examples raise for what the user can put right

        if isinstance(error, UserError):
            raise BenchmarkError(f"argument --embedding-checkpoint: {error}") from error
        raise


def describe(threads: int) -> dict:
    """Describe this machine and the software on it, as far as this benchmark uses it."""
    described = environment.describe(threads)
    versions = described["versions"]
    described["versions"] = {
        "python": described["python"],
        "flax": importlib.metadata.version("flax"),
        **{name: versions[name] for name in ("jax", "jaxlib", "numpy", "quake_jax")},
    }
    return described
