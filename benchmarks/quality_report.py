"""The tables of a result of `quality`, and the limits that it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import quality_statistics as statistics
from benchmarks.bars import verdict
from benchmarks.report import Rows, bars_table

HEADING = "Quality"
# The lowest order that has to keep the quality, and the largest change of each figure.
LEAST_ORDER = 2
LIMITS = {
    "digits": {"accuracy_change": (0.1, "points"), "distorted_accuracy_change": (0.1, "points")},
    "text": {"perplexity_change": (0.1, "%")},
}


def _spread(digits: int, unit: str = "", sign: str = "") -> Callable[[dict], str]:
    def text(figure: dict) -> str:
        value, low, high = (
            f"{_unsigned_zero(figure[key], digits):{sign}.{digits}f}"
            for key in ("value", "low", "high")
        )
        return f"{value}{unit} ({low} to {high})"

    return text


def _unsigned_zero(value: float, digits: int) -> float:
    return round(value, digits) + 0.0


# Of each task the title and the columns: key of the figure, heading, how it is written.
TABLES: dict[str, tuple[str, list[tuple[str, str, Callable[[Any], str]]]]] = {
    "digits": (
        "ViT on handwritten digits",
        [
            ("accuracy", "accuracy", _spread(2, " %")),
            ("changed", "changed", str),
            ("accuracy_change", "change, points", lambda x: f"{_unsigned_zero(x, 2):+.2f}"),
            ("distorted_accuracy", "distorted: accuracy", _spread(2, " %")),
            ("distorted_changed", "changed", str),
            ("distorted_accuracy_change", "change, points", _spread(3, sign="+")),
        ],
    ),
    "text": (
        "GPT on held-out text",
        [
            ("perplexity", "perplexity", _spread(3)),
            ("perplexity_change", "change, %", _spread(4, sign="+")),
            ("same_greedy", "same likeliest token", _spread(2, " %")),
            ("same_continuations", "same continuations", _spread(0, " %")),
            ("tokens_alike", "tokens before the first difference", _spread(0)),
        ],
    ),
    "search": (
        "Sentence embeddings of documentation",
        [
            ("cosine", "mean cosine", lambda x: f"{x:.7f}"),
            ("least_cosine", "least cosine", lambda x: f"{x:.7f}"),
            ("same_nearest", "same nearest", _spread(1, " %")),
            ("common_nearest", "of the nearest 10", _spread(1, " %")),
            ("rank_correlation", "rank correlation", _spread(6)),
        ],
    ),
}


def tables(result: dict) -> list[tuple[str, Rows]]:
    """Make the tables: titles, and rows with the heading first."""
    made = []
    for name, task in result["tasks"].items():
        title, columns = TABLES[name]
        for dtype in dict.fromkeys(row["dtype"] for row in task["rows"]):
            rows = [["order", *(heading for _, heading, _ in columns)]]
            for row in task["rows"]:
                if row["dtype"] == dtype:
                    cells = [write(row[key]) if key in row else "–" for key, _, write in columns]
                    rows.append([str(row["order"]), *cells])
            made.append((f"{title}, {dtype}", rows))
    return made + bars_table(result)


def judge(result: dict) -> list[dict]:
    """Return the verdicts: from `LEAST_ORDER` up, no figure may change by more than its limit."""
    made = []
    for name, limits in LIMITS.items():
        rows = result["tasks"][name]["rows"]
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            judged = [
                row
                for row in rows
                if row["dtype"] == dtype and row["order"] != "exact" and row["order"] >= LEAST_ORDER
            ]
            for key, (limit, unit) in limits.items():
                if judged:
                    largest = max(abs(_value(row[key])) for row in judged)
                    bar = f"{dtype}, orders from {LEAST_ORDER}: largest {key.replace('_', ' ')}"
                    made.append(verdict(bar, largest, limit, unit, at_least=False))
    return made


def _value(figure: dict | float) -> float:
    return figure["value"] if isinstance(figure, dict) else figure


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    tasks = result["tasks"]
    digits, text = tasks["digits"]["sets"], tasks["text"]["sets"]
    lines = [
        "Changes and agreement are against the exact model of the same dtype; in the row of the "
        "exact model in bfloat16, against the exact model in float32: what the dtype alone does.",
        f"In brackets: {100 * statistics.CONFIDENCE:.0f} % intervals. Wilson's of accuracy, same "
        "continuations and same nearest; of the others a bootstrap "
        f"({statistics.RESAMPLES} resamples, differences in pairs) over digits, windows, "
        "continuations or sections.",
        f"Digits: {digits['digits']} that were held out; one of them is "
        f"{100 / digits['digits']:.2f} points. Distorted: {digits['distorted digits']} copies of "
        "them, shifted, turned, scaled and sheared as in training.",
        f"Text: {text['windows']} windows of {text['tokens per window']} tokens. Continuations: "
        f"{text['generations']} of {text['tokens per generation']} tokens, greedy; the prompts are "
        "first halves of windows.",
    ]
    if not text["text of training"]:
        lines.append(
            "The documentation of this Python is not the one that the GPT was trained beside: some "
            "of the held-out text may have been in its training, and perplexities are another's."
        )
    if "search" in tasks:
        search = tasks["search"]["sets"]
        lines.append(
            f"Search: {search['sections']} sections of Python's documentation, the first "
            f"{search['tokens per section']} tokens of each; each is a query for the others. Rank "
            "correlation: Spearman's, of the similarities to all others."
        )
    if result["settings"]["quick"]:
        lines.append("A quick run: too few samples for a result.")
    return lines
