"""`python -m benchmarks approximations`: the published approximations beside QuAKE.

Each is judged as an operator (its error, its time in jax.numpy on this CPU) and, without
retraining, in the trained models of `quality`, of which nothing but that one function changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks import environment, quality
from benchmarks.errors import check_files

HELP = "published approximations of softmax, GELU, LayerNorm, exp and sigmoid beside QuAKE"
KINDS = ("softmax", "gelu", "layernorm", "exp", "sigmoid")
# What the models of `quality` have; the exponentials are in them as softmax.
IN_MODELS = ("softmax", "gelu", "layernorm")
ORDERS = quality.ORDERS
# Fewer samples than `quality` takes: there are about four times as many models.
SIZES = {"copies": 4, "windows": 32, "generations": 0, "tokens": 0, "sections": 32}
QUICK_SIZES = {"copies": 1, "windows": 2, "generations": 0, "tokens": 0, "sections": 12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this subcommand."""
    add = parser.add_argument
    add("--kind", action="append", choices=KINDS, help="repeatable; all by default")
    add(
        "--name",
        action="append",
        help="of an approximation, as quake_jax.approximations lists them; repeatable; all by "
        "default",
    )
    add("--order", action="append", type=int, choices=ORDERS, help="repeatable; all by default")
    add(
        "--embedding-checkpoint",
        metavar="DIR",
        help="folder, or id on the Hugging Face hub, of a BERT that embeds sentences, such as "
        "all-MiniLM-L6-v2; without it there is no search",
    )
    add("--quick", action="store_true", help="few samples, short readings: a try, no result")
    add("--json", type=Path, metavar="PATH", help="write the result as JSON")
    add("--markdown", type=Path, metavar="PATH", help="write or replace the section of this run")
    add("--plot", type=Path, metavar="DIR", help="write plots as PNG files")


def run(args: argparse.Namespace) -> None:
    """Measure what the options ask for, print it, and write the files asked for."""
    check_files(args.json, args.markdown)
    environment.prepare(threads=1)

    from benchmarks import approximations_report, report

    result = measure(args)
    tables = approximations_report.tables(result)
    remarks = approximations_report.remarks(result)
    report.print_page(report.headline(result), tables, remarks)
    if args.json:
        report.to_json(result, args.json)
    if args.markdown:
        report.write_section(result, args.markdown, approximations_report.HEADING, tables, remarks)
    if args.plot:
        from benchmarks import approximations_plots

        approximations_plots.draw(result, args.plot)


def measure(args: argparse.Namespace) -> dict:
    """Measure all candidates.

    Args:
        args: The options, as `add_arguments` declares them.

    Returns:
        The result, a dictionary that json can write. `kinds` has for each kind a list of rows; a
        row has the candidate's `description`, the `errors` of the operator, the `time`, and
        `tasks`, the figures of `quality` by task, empty for kinds that no model is given.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    kinds = [kind for kind in KINDS if kind in (args.kind or KINDS)]
    orders = sorted(set(args.order or ORDERS))
    rounds = 3 if args.quick else 7
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("loading", total=None)

        from benchmarks import approximations_cases, approximations_errors, approximations_times

        candidates = approximations_cases.choose(kinds, orders, args.name)
        in_models = [kind for kind in kinds if kind in IN_MODELS]
        sizes = QUICK_SIZES if args.quick else SIZES
        tasks = quality.make_tasks(args, sizes) if in_models else []
        steps = sum(
            len(candidates[kind]) * (1 + rounds + len(tasks) * (kind in in_models))
            for kind in kinds
        )
        progress.update(bar, total=steps)

        def advance(description: str) -> None:
            progress.update(bar, description=description, advance=1)

        rows = {}
        for kind in kinds:
            # Both before the models, whose memory would lie between.
            timed = approximations_times.measure(
                candidates[kind], rounds, args.quick, lambda kind=kind: advance(f"{kind}, time")
            )
            rows[kind] = []
            for candidate in candidates[kind]:
                advance(f"{kind}, {candidate.name}, error")
                rows[kind].append(
                    {
                        "description": candidate.description(),
                        "errors": approximations_errors.of(candidate),
                        "time": timed[candidate.name],
                        "tasks": {},
                    }
                )
        for task in tasks:
            _add_figures(task, in_models, candidates, rows, advance)
    return {
        "benchmark": "approximations",
        "environment": quality.describe(threads=1),
        "settings": {
            "quick": args.quick,
            "rounds": rounds,
            "shape": list(approximations_times.shape(args.quick)),
            "errors": approximations_errors.SETS,
        },
        "sets": {task.name: task.sets for task in tasks},
        "kinds": rows,
    }


def _add_figures(
    task, kinds: list[str], candidates: dict, rows: dict, advance: Callable[[str], None]
) -> None:
    """Run a task with every candidate of the kinds, and add its figures to the rows."""
    from benchmarks import approximations_models

    # The exact model is the same in all kinds.
    exact = task.outputs("float32", "exact", None)
    for kind in kinds:
        for candidate, row in zip(candidates[kind], rows[kind], strict=True):
            advance(f"{task.name}, {kind}, {candidate.name}")
            if candidate.is_exact:
                row["tasks"][task.name] = task.figures(exact, None)
                continue
            with approximations_models.substituting(candidate):
                found = task.outputs("float32", candidate.order or "exact", exact)
            row["tasks"][task.name] = task.figures(found, exact)
