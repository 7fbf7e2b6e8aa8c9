"""The run of `python -m benchmarks approximations`.

Each is judged as an operator (its error, its time in jax.numpy on this CPU) and, without
retraining, in the trained models of `quality`, of which nothing but that one function changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from benchmarks.approximations import cases, errors, times
from benchmarks.approximations.command import KINDS
from benchmarks.harness.frame import Settings, progress
from benchmarks.quality import measure as quality
from benchmarks.quality.command import ORDERS

# What the models of `quality` have; the exponentials are in them as softmax.
IN_MODELS = ("softmax", "gelu", "layernorm")
# Fewer samples than `quality` takes: there are about four times as many models.
SIZES = {"copies": 4, "windows": 32, "generations": 0, "tokens": 0, "sections": 32}
QUICK_SIZES = {"copies": 1, "windows": 2, "generations": 0, "tokens": 0, "sections": 12}


def measure(args: argparse.Namespace) -> dict:
    """Measure all candidates that the options ask for.

    `kinds` of the result has for each kind a list of rows; a row has the candidate's `description`,
    the `errors` of the operator, the `time`, and `tasks`, the figures of `quality` by task, empty
    for kinds that no model is given.
    """
    kinds = [kind for kind in KINDS if kind in (args.kind or KINDS)]
    rounds, seconds = (3, 2e-4) if args.quick else (7, 1e-3)
    settings = Settings(rounds, seconds, quick=args.quick)
    with progress() as bar:
        candidates = cases.choose(kinds, sorted(set(args.order or ORDERS)), args.name)
        in_models = [kind for kind in kinds if kind in IN_MODELS]
        sizes = QUICK_SIZES if args.quick else SIZES
        tasks = quality.make_tasks(args.embedding_checkpoint, sizes) if in_models else []
        in_tasks = sum(len(candidates[kind]) for kind in in_models)
        bar.expect(sum(1 + len(of_kind) for of_kind in candidates.values()) + len(tasks) * in_tasks)
        rows = {}
        for kind, of_kind in candidates.items():
            # Both before the models, whose memory would lie between.
            bar.show(f"{kind}, time")
            timed = times.measure(of_kind, settings, bar.advance)
            rows[kind] = []
            for candidate in of_kind:
                bar.show(f"{kind}, {candidate.name}, error")
                rows[kind].append(
                    {
                        "description": candidate.description(),
                        "errors": errors.of(candidate),
                        "time": timed[candidate.name],
                        "tasks": {},
                    }
                )
                bar.advance()

        def step(description: str) -> None:
            bar.show(description)
            bar.advance()

        for task in tasks:
            _add_figures(task, in_models, candidates, rows, step)
    return {
        "benchmark": "approximations",
        "environment": quality.describe(threads=1),
        "settings": {
            "quick": args.quick,
            "rounds": rounds,
            "shape": list(times.shape(args.quick)),
            "errors": errors.SETS,
        },
        "sets": {task.name: task.sets for task in tasks},
        "kinds": rows,
    }


def _add_figures(
    task, kinds: list[str], candidates: dict, rows: dict, step: Callable[[str], None]
) -> None:
    """Run a task with every candidate of the kinds, and add its figures to the rows."""
    from benchmarks.approximations import models  # needs Flax

    # The exact model is the same in all kinds.
    exact = task.outputs("float32", "exact", None)
    for kind in kinds:
        for candidate, row in zip(candidates[kind], rows[kind], strict=True):
            step(f"{task.name}, {kind}, {candidate.name}")
            if candidate.is_exact:
                row["tasks"][task.name] = task.figures(exact, None)
                continue
            with models.substituting(candidate):
                found = task.outputs("float32", candidate.order or "exact", exact)
            row["tasks"][task.name] = task.figures(found, exact)
