"""Pictures of a result of `quality`: each figure against the order, with its interval."""

from collections.abc import Iterator
from functools import partial

from matplotlib import pyplot as plt

from benchmarks.harness import plots
from benchmarks.quality.report import LIMITS, are_weights

COLOURS = {"float32": "#08519c", "bfloat16": "#d95f0e"}
# Of each task its panels: the figure's key and the title.
PANELS = {
    "digits": [
        ("accuracy", "accuracy, %"),
        ("distorted_accuracy", "accuracy on distorted digits, %"),
        ("distorted_accuracy_change", "change on distorted digits, points"),
    ],
    "text": [
        ("perplexity_change", "change of the perplexity, %"),
        ("same_greedy", "same likeliest token, %"),
        ("tokens_alike", "tokens before the first difference"),
    ],
    "search": [
        ("same_nearest", "same nearest section, %"),
        ("common_nearest", "of the nearest 10 sections, %"),
        ("rank_correlation", "rank correlation"),
    ],
}


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """Draw a result: for each task `quality_TASK`."""
    weights = are_weights(result)
    for name, task in result["tasks"].items():
        panels = {title: key for key, title in PANELS[name]}
        limits = {} if weights else LIMITS.get(name, {})
        fill = partial(_panel, task["rows"], limits, "weights" if weights else "order")
        figure = plots.grid(panels, fill, len(panels), (3.7, 3.1), margin=0.0)
        yield f"quality_{name}{'_weights' * weights}", figure


def _panel(rows: list[dict], limits: dict, label: str, axis: plt.Axes, key: str) -> None:
    """One figure of all orders, dtypes side by side, and its limit, if it has one."""
    places = {order: i for i, order in enumerate(dict.fromkeys(row["order"] for row in rows))}
    style = {"fmt": "o", "markersize": 4, "capsize": 2}
    for shift, (dtype, colour) in zip((-0.1, 0.1), COLOURS.items(), strict=True):
        shown = [row for row in rows if row["dtype"] == dtype and key in row]
        at = [places[row["order"]] + shift for row in shown]
        values = [row[key]["value"] for row in shown]
        # A bootstrap's interval need not hold its figure; a bar cannot be negative.
        below = [max(0.0, row[key]["value"] - row[key]["low"]) for row in shown]
        above = [max(0.0, row[key]["high"] - row[key]["value"]) for row in shown]
        axis.errorbar(at, values, [below, above], color=colour, label=dtype, **style)
    axis.set_xticks(list(places.values()), list(map(str, places)))
    if key in limits:
        limit, _ = limits[key]
        axis.axhspan(-limit, limit, color="black", alpha=0.08, label="limit from order 2")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.grid(alpha=0.3)
    axis.set_xlabel(label)
