"""Pictures of a result of `ops`: the time of every contestant, one panel for each function."""

from collections.abc import Iterator

from matplotlib import pyplot as plt

from benchmarks.harness import pages, plots
from benchmarks.ops import goals

_OURS = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#9ecae1")
COLOURS = {f"order {order}": colour for order, colour in enumerate(_OURS, 1)}
COLOURS |= {"jax.nn": "#d95f0e", "torch": "#a63603", "onnxruntime": "#636363"}
COLUMNS = 6
LONGEST = 12  # times the shortest


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """For each dtype `ops_time_DTYPE` with each function at its first shape."""
    for dtype, cases in pages.by_dtype(result["cases"]).items():
        panels = {}
        for case in cases:
            panels.setdefault(case["function"], case)
        panels = {f"{f} {'×'.join(map(str, c['shape']))}": c for f, c in panels.items()}
        figure = plots.grid(panels, _bars, COLUMNS, (2.5, 1.6))
        yield (
            f"ops_time_{dtype}",
            plots.titled(figure, f"ns per element, {dtype}", result["environment"]),
        )


def _bars(axis: plt.Axes, case: dict) -> None:
    """ns per element, and a line at the time of the fastest copy of as many bytes."""
    entries = case["contestants"]
    plots.bars(axis, {n: entries[n]["ns"] for n in goals.systems(case)}, COLOURS, LONGEST)
    copy = case["traffic"] * entries[case["copy"]]["ns"]["median"]
    axis.axvline(copy, color="black", linestyle="dotted", label="copy of as many bytes")
