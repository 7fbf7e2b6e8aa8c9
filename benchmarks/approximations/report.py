"""The tables of a result of `approximations`: one for each kind, and one of the sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness import pages
from benchmarks.harness.pages import Rows, Table, number
from benchmarks.quality.report import figure_column, interval, sets_remarks

HEADING = "Approximations"

TITLES = {
    "softmax": "Softmax",
    "gelu": "GELU",
    "layernorm": "Layer normalisation",
    "exp": "exp, of numbers from {low:g} to {high:g}",
    "sigmoid": "Logistic function, from {low:g} to {high:g}",
}


def _number(digits: int) -> Callable[[Any], str]:
    def text(figure) -> str:
        return number(figure["value"] if isinstance(figure, dict) else figure, digits)

    return text


# Heading of each error of an operator.
ERRORS = {
    "tv_128": "TV, 128 wide",
    "tv_1024": "TV, 1024 wide",
    "row_sum": "row sum off by",
    "max_abs": "largest error",
    "max_rel": "largest relative",
    "rms_even": "RMS error, even",
    "rms_uneven": "RMS error, uneven",
}
# Of each task the columns: key of the figure, heading, how it is written.
TASKS: dict[str, list[tuple[str, str, Callable[[Any], str]]]] = {
    "digits": [
        ("accuracy", "digits: accuracy, %", _number(2)),
        ("changed", "changed", str),
        ("distorted_changed", "distorted: changed", str),
        ("distorted_accuracy_change", "accuracy change, points", interval(2, sign="+")),
    ],
    "text": [
        ("perplexity_change", "perplexity change, %", interval(2, sign="+")),
        ("same_greedy", "same likeliest token, %", _number(2)),
    ],
    "search": [
        ("same_nearest", "search: same nearest, %", _number(1)),
        ("common_nearest", "of the nearest 10, %", _number(1)),
        ("least_cosine", "least cosine", _number(4)),
    ],
}


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    made = []
    for kind, of_kind in result["kinds"].items():
        low, high = result["settings"]["errors"]["ranges"].get(kind, (0, 0))
        made.append((TITLES[kind].format(low=low, high=high), _table(of_kind)))
    return [*made, ("Sources", _sources(result))]


def _table(of_kind: list[dict]) -> Rows:
    columns = pages.named_columns(
        of_kind[0]["errors"], "{:.1e}".format, lambda row: row["errors"], ERRORS.get
    )
    for task in of_kind[0]["tasks"]:
        figures = partial(lambda task, row: row["tasks"][task], task)
        columns += [figure_column(*column, figures) for column in TASKS[task]]
    return pages.rows_of(of_kind, ("", name), *columns, ("ns per element", _time))


def name(row: dict) -> str:
    """The name of a row, with a mark where we put the method together."""
    return row["description"]["name"] + (" *" if row["description"]["derived"] else "")


def _time(row: dict) -> str:
    time = f"{row['time']['ns_per_element']['median']:.2f}{pages.doubt(row['time'])}"
    return f"{time} (emulated)" if row["description"]["runs_as"] == "emulation" else time


def _sources(result: dict) -> Rows:
    papers: dict[str, dict[str, None]] = {}  # and the names, each once
    for row in (row["description"] for of_kind in result["kinds"].values() for row in of_kind):
        if "paper" in row:
            papers.setdefault(row["paper"], {})[row["name"]] = None
    return [["names", "source"], *([", ".join(names), paper] for paper, names in papers.items())]


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings, sets = result["settings"], result["sets"]
    errors = settings["errors"]
    (narrow, wide), (rows, channels) = errors["logits"].values(), errors["normalised"]
    lines = [
        "Nothing is retrained, and of a model in float32 the one function changes alone: softmax "
        "in attention, GELU, or layer normalisation. Changes are against the exact model. QuAKE "
        "has no layer normalisation.",
        f"TV: mean total variation from the exact softmax, of {narrow[0]} rows of {narrow[1]} and "
        f"{wide[0]} rows of {wide[1]} logits, N(0, 2²). Row sum: the largest distance from 1. GELU "
        f"(the one with erf) from {errors['ranges']['gelu'][0]:g} to "
        f"{errors['ranges']['gelu'][1]:g}; its relative error is of results of at least "
        f"{errors['floor']:g} times the largest. Layer normalisation: {rows} rows of {channels} "
        "channels, N(0, 1) in all (even), or with a spread of 1, 2, 4 or 8 by channel (uneven).",
        "Integer methods quantise each array as they see it (dynamically), with the bits of their "
        "papers; what the papers do beside (integer matrix products, calibration, retraining) is "
        "left out.",
        "* The softmax of a published exponential, with an exact division: obvious, but not in "
        "the paper.",
        f"Time: median of {settings['rounds']} interleaved rounds, float32, "
        f"{'×'.join(map(str, settings['shape']))}, N(0, 2²), inside a jitted program. QuAKE has "
        "kernels, the others are jax.numpy. Emulated: a method for integers or tables, which float "
        "code imitates; its time says nothing about hardware that has it.",
    ]
    if sets:
        lines.append(
            "In brackets: 95 % intervals (bootstrap, in pairs). Models and data are those of "
            "`python -m benchmarks quality`, in part."
        )
    lines += sets_remarks(sets)
    times = [row["time"] for rows in result["kinds"].values() for row in rows]
    lines += pages.doubt_remarks(sum(time["doubtful"] for time in times))
    if settings["quick"]:
        lines.append("A quick run: too few samples for a result.")
    return lines
