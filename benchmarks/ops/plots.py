"""Pictures of a result of `ops`: bars against the peers, and error against time.

One panel per function, each with a scale of its own: it is about who is faster at that function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from matplotlib import pyplot as plt

from benchmarks.harness import plots
from benchmarks.ops import goals

COLOURS = {
    "order 1": "#08306b",
    "order 2": "#08519c",
    "order 3": "#2171b5",
    "order 4": "#4292c6",
    "order 5": "#9ecae1",
    "jax.nn": "#d95f0e",
    "jax.nn again": "#fe9929",
    "torch": "#a63603",
    "onnxruntime": "#636363",
}
COLUMNS = 6
# A bar this many times as long as the shortest other one would hide the rest: it is cut, and
# says its length.
LONGEST = 12


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """For each dtype `ops_time_DTYPE` and `ops_error_DTYPE` with each function at its first shape,
    and `ops_large_DTYPE` with the times at the others, if there are any.
    """
    for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["dtype"] == dtype]
        first = {}
        for case in cases:
            first.setdefault(case["function"], case)
        others = [case for case in cases if case is not first[case["function"]]]
        for kind, what, shown, panel in (
            ("time", "ns per element", list(first.values()), _bars),
            ("large", "ns per element", others, _bars),
            ("error", "largest relative error against ns per element", list(first.values()), _dots),
        ):
            if shown:
                figure = _grid(shown, panel)
                plots.title(figure, f"{what}, {dtype}", result["environment"])
                yield f"ops_{kind}_{dtype}", figure


def _grid(cases: list[dict], panel: Callable[[plt.Axes, dict], None]) -> plt.Figure:
    """One panel per case, with one legend for all."""
    figure, axes = plots.panels(len(cases), COLUMNS, width=2.5, height=1.8, margin=1.0)
    for axis, case in zip(axes, cases, strict=True):
        panel(axis, case)
        copy = case["traffic"] * case["contestants"][case["copy"]]["ns_per_element"]
        axis.axvline(copy, color="black", linestyle="dotted", label="copy of as many bytes")
        axis.set_title(f"{case['function']} {'×'.join(map(str, case['shape']))}", fontsize=8)
        axis.tick_params(labelsize=7)
    plots.legend(figure, first=COLOURS, columns=4 if len(cases) <= 3 else None)
    return figure


def _bars(axis: plt.Axes, case: dict) -> None:
    """ns per element of every contestant."""
    names = goals.systems(case)
    times = [case["contestants"][name]["ns_per_element"] for name in names]
    limit = LONGEST * min(times)
    longest = max((time for time in times if time <= limit), default=limit)
    for place, (name, time) in enumerate(zip(names, times, strict=True)):
        shown = time if time <= limit else 1.15 * longest
        cut = {"hatch": "//", "edgecolor": "white"} if time > limit else {}
        axis.barh(place, 0, color=COLOURS[name], label=name)  # for the legend, without the hatch
        axis.barh(place, shown, color=COLOURS[name], **cut)
        if time > limit:
            axis.text(
                shown,
                place,
                f"{time:.2f} ",
                color="white",
                fontsize=7,
                ha="right",
                va="center",
                bbox={"facecolor": COLOURS[name], "edgecolor": "none", "pad": 1},
            )
    axis.set_yticks([])
    axis.invert_yaxis()


def _dots(axis: plt.Axes, case: dict) -> None:
    """Error against time, one point per contestant."""
    for name in goals.systems(case):
        entry = case["contestants"][name]
        axis.loglog(
            entry["ns_per_element"],
            max(entry["relative_error"], 1e-9),
            "o" if name.startswith("order") else "s",
            markersize=5,
            linestyle="none",
            color=COLOURS[name],
            label=name,
        )
    axis.grid(alpha=0.3)
    axis.minorticks_off()
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    times = [entry["ns_per_element"] for entry in case["contestants"].values()]
    axis.set_xlim(0.8 * min(times), 1.25 * max(times))
