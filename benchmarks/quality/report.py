"""The tables of a result of `quality`, and the limits that it is judged by."""

from collections.abc import Callable
from typing import Any

from benchmarks.harness import bars, pages
from benchmarks.harness.pages import NONE, Column, Table, number
from benchmarks.quality import statistics
from benchmarks.quality.command import ATTENTION

HEADING = "Quality"

# The lowest order that has to keep the quality, and the largest change of each figure.
LEAST_ORDER = 2
LIMITS = {
    "digits": {"accuracy_change": (0.1, "points"), "distorted_accuracy_change": (0.1, "points")},
    "text": {"perplexity_change": (0.1, "%")},
}
# Of packed weights the most that each figure may lose, by format.
_WEIGHTS = ("float32", *ATTENTION, "bfloat16", "int8")
_TENTH, _HALF = dict.fromkeys(_WEIGHTS, 0.1), dict.fromkeys(_WEIGHTS, 0.5)
LOSSES = {
    "digits": {
        "accuracy_change": (_TENTH, "points", -1),
        "distorted_accuracy_change": (_TENTH, "points", -1),
    },
    "text": {"perplexity_change": (_HALF | {"int8 attention": 0.3, "int4": 2.0}, "%", 1)},
}
SAME_NEAREST = dict.fromkeys(_WEIGHTS, 99.0)


def interval(digits: int, unit: str = "", sign: str = "") -> Callable[[dict], str]:
    """How a figure with its interval is written."""

    def text(figure: dict) -> str:
        value, low, high = (number(figure[k], digits, sign=sign) for k in ("value", "low", "high"))
        return f"{value}{unit} ({low} to {high})"

    return text


# Of each task the title and the columns: key of the figure, heading, how it is written.
TABLES: dict[str, tuple[str, list[tuple[str, str, Callable[[Any], str]]]]] = {
    "digits": (
        "ViT on handwritten digits",
        [
            ("accuracy", "accuracy", interval(2, " %")),
            ("changed", "changed", str),
            ("accuracy_change", "change, points", lambda x: number(x, 2, sign="+")),
            ("distorted_accuracy", "distorted: accuracy", interval(2, " %")),
            ("distorted_changed", "changed", str),
            ("distorted_accuracy_change", "change, points", interval(3, sign="+")),
        ],
    ),
    "text": (
        "GPT on held-out text",
        [
            ("perplexity", "perplexity", interval(3)),
            ("perplexity_change", "change, %", interval(4, sign="+")),
            ("same_greedy", "same likeliest token", interval(2, " %")),
            ("same_continuations", "same continuations", interval(0, " %")),
            ("tokens_alike", "tokens before the first difference", interval(0)),
        ],
    ),
    "search": (
        "Sentence embeddings of documentation",
        [
            ("cosine", "mean cosine", lambda x: f"{x:.7f}"),
            ("least_cosine", "least cosine", lambda x: f"{x:.7f}"),
            ("same_nearest", "same nearest", interval(1, " %")),
            ("common_nearest", "of the nearest 10", interval(1, " %")),
            ("rank_correlation", "rank correlation", interval(6)),
        ],
    ),
}


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    made = []
    first = ("weights" if are_weights(result) else "order", lambda row: str(row["order"]))
    for name, task in result["tasks"].items():
        title, figures = TABLES[name]
        columns = [figure_column(*figure) for figure in figures]
        for dtype, rows in pages.by_dtype(task["rows"]).items():
            made.append((f"{title}, {dtype}", pages.rows_of(rows, first, *columns)))
    return made + bars.tables(result)


def figure_column(
    key: str, heading: str, write: Callable[[Any], str], of: Callable[[dict], dict] = dict
) -> Column:
    """The column of a figure of a task."""
    return heading, lambda row: write(of(row)[key]) if key in of(row) else NONE


def are_weights(result: dict) -> bool:
    """Whether the rows of a result are formats of packed weights, and not orders."""
    return result["benchmark"] != "quality"


def judge(result: dict) -> list[dict]:
    """The verdicts: from `LEAST_ORDER` up, no figure may change by more than its limit; no format
    of packed weights may lose more than its own.
    """
    return _judged_weights(result) if are_weights(result) else _judged_orders(result)


def _judged_weights(result: dict) -> list[dict]:
    made = []
    for task, measured in result["tasks"].items():
        for row in measured["rows"]:
            name = f"{row['dtype']} model, weights in {row['order']}"
            for key, (limits, unit, sign) in LOSSES.get(task, {}).items():
                if key in row and row["order"] in limits:
                    loss, limit = max(0.0, sign * _value(row[key])), limits[row["order"]]
                    bar = f"{name}: loss, {key.replace('_', ' ')}"
                    made.append(bars.verdict(bar, loss, limit, unit, at_least=False))
            if "same_nearest" in row and row["order"] in SAME_NEAREST:
                wanted, found = SAME_NEAREST[row["order"]], _value(row["same_nearest"])
                made.append(bars.verdict(f"{name}: same nearest", found, wanted, "%", True))
    return made


def _judged_orders(result: dict) -> list[dict]:
    made = []
    for name, limits in LIMITS.items():
        for dtype, rows in pages.by_dtype(result["tasks"][name]["rows"]).items():
            orders = (row for row in rows if row["order"] != "exact")
            judged = [row for row in orders if row["order"] >= LEAST_ORDER]
            for key, (limit, unit) in limits.items():
                if judged:
                    largest = max(abs(_value(row[key])) for row in judged)
                    bar = f"{dtype}, orders from {LEAST_ORDER}: largest {key.replace('_', ' ')}"
                    made.append(bars.verdict(bar, largest, limit, unit, at_least=False))
    return made


def _value(figure: dict | float) -> float:
    return figure["value"] if isinstance(figure, dict) else figure


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    lines = pages.prose(
        "quality/remarks.txt",
        result,
        confidence=100 * statistics.CONFIDENCE,
        resamples=statistics.RESAMPLES,
    )
    return lines + sets_remarks(result, {name: t["sets"] for name, t in result["tasks"].items()})


def sets_remarks(result: dict, sets: dict[str, dict]) -> list[str]:
    """Say what the models were tried on, by task, and whether that was enough."""
    digits, text, search = (sets.get(name, {}) for name in ("digits", "text", "search"))
    return pages.prose(
        "quality/sets.txt",
        result,
        digits=digits,
        points=100 / digits.get("digits", 100),
        text=text,
        generations=text.get("generations"),
        other_text=text and not text["text of training"],
        search=search,
        quick=result["settings"]["quick"],
    )
