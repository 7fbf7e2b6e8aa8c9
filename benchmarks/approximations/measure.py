"""The run of `python -m benchmarks approximations`.

Each is judged as an operator (its error, its time in jax.numpy on this CPU) and, without
retraining, in the trained models of `quality`, of which nothing but that one function changes.
"""

import argparse

from benchmarks.approximations import cases, errors
from benchmarks.approximations.cases import Candidate
from benchmarks.approximations.command import KINDS
from benchmarks.harness.frame import Progress, Settings, progress
from benchmarks.harness.timing import Contestant
from benchmarks.ops import systems
from benchmarks.ops.cases import L2_SHAPE, QUICK_SHAPE, Case
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
    # float32: operand and result fill the second-level cache.
    shape = QUICK_SHAPE if args.quick else L2_SHAPE
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
            timed = _times(of_kind, shape, settings, bar)
            rows[kind] = []
            for candidate in of_kind:
                bar.show(f"{kind}, {candidate.name}, error")
                found = {"errors": errors.of(candidate), "time": timed[candidate.name]}
                rows[kind].append({"description": candidate.description(), **found, "tasks": {}})
                bar.advance()
        for task in tasks:
            _add_figures(task, in_models, candidates, rows, bar)
    return {
        "benchmark": "approximations",
        "environment": quality.describe(threads=1),
        "settings": {
            "quick": args.quick,
            "rounds": rounds,
            "shape": list(shape),
            "errors": errors.SETS,
        },
        "sets": {task.name: task.sets for task in tasks},
        "kinds": rows,
    }


def _times(
    candidates: list[Candidate], shape: tuple[int, ...], settings: Settings, bar: Progress
) -> dict[str, dict]:
    """The time of each candidate of a kind inside a jitted program, all in the same rounds: by name
    `ns_per_element` as median and quartiles, and the conditions of the readings.
    """
    # The function of a case decides only how many operands there are: one.
    case = Case("exp", shape, "float32")
    buffers = systems.Buffers(case)
    contestants = [Contestant(c.name, buffers.runner(c.function)) for c in candidates]
    series = settings.read(contestants, settings.rounds, bar.advance)
    return {
        name: {"ns_per_element": one.quartiles(1e9 / case.elements), **one.conditions()}
        for name, one in series.items()
    }


def _add_figures(task, kinds: list[str], candidates: dict, rows: dict, bar: Progress) -> None:
    """Run a task with every candidate of the kinds, and add its figures to the rows."""
    from benchmarks.approximations import models  # needs Flax

    # The exact model is the same in all kinds.
    exact = task.outputs("float32", "exact", None)
    for kind in kinds:
        for candidate, row in zip(candidates[kind], rows[kind], strict=True):
            bar.show(f"{task.name}, {kind}, {candidate.name}")
            bar.advance()
            if candidate.is_exact:
                row["tasks"][task.name] = task.figures(exact, None)
                continue
            with models.substituting(candidate):
                found = task.outputs("float32", candidate.order or "exact", exact)
            row["tasks"][task.name] = task.figures(found, exact)
