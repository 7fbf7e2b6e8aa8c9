"""The tables of a result of `approximations`: one for each kind, and one of the sources."""

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
    for kind, rows in result["kinds"].items():
        columns = pages.named_columns(
            rows[0]["errors"], "{:.1e}".format, lambda row: row["errors"], ERRORS.get
        )
        for task in rows[0]["tasks"]:
            figures = partial(lambda task, row: row["tasks"][task], task)
            columns += [figure_column(*column, figures) for column in TASKS[task]]
        low, high = result["settings"]["errors"]["ranges"].get(kind, (0, 0))
        of_kind = pages.rows_of(rows, ("", name), *columns, ("ns per element", _time))
        made.append((TITLES[kind].format(low=low, high=high), of_kind))
    return [*made, ("Sources", _sources(result))]


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
    rows = [row for rows in result["kinds"].values() for row in rows]
    lines = pages.prose(
        "approximations/remarks.txt",
        result,
        **result["settings"]["errors"],
        shape="×".join(map(str, result["settings"]["shape"])),
        doubtful=sum(row["time"]["doubtful"] for row in rows),
    )
    return lines + sets_remarks(result, result["sets"])
