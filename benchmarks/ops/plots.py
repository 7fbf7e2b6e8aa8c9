"""Pictures of a result of `ops`: bars against the peers, and error against time.

One panel per function, each with a scale of its own: it is about who is faster at that function.
"""

from collections.abc import Iterator

from matplotlib import pyplot as plt

from benchmarks.harness import pages, plots
from benchmarks.ops import goals

_OURS = ("#08306b", "#08519c", "#2171b5", "#4292c6", "#9ecae1")
COLOURS = {f"order {order}": colour for order, colour in enumerate(_OURS, 1)}
COLOURS |= {"jax.nn": "#d95f0e"}
COLOURS |= {"torch": "#a63603", "onnxruntime": "#636363"}
COLUMNS = 6
# A bar this many times as long as the shortest other one would hide the rest: it is cut, and
# says its length.
LONGEST = 12


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """For each dtype `ops_time_DTYPE` and `ops_error_DTYPE` with each function at its first shape,
    and `ops_large_DTYPE` with the times at the others, if there are any.
    """
    for dtype, cases in pages.by_dtype(result["cases"]).items():
        first = {}
        for case in cases:
            first.setdefault(case["function"], case)
        others = [case for case in cases if case is not first[case["function"]]]
        first, time = list(first.values()), "ns per element"
        for kind, what, shown, fill in (
            ("time", time, first, _bars),
            ("large", time, others, _bars),
            ("error", f"largest relative error against {time}", first, _dots),
        ):
            if shown:
                panels = {f"{c['function']} {'×'.join(map(str, c['shape']))}": c for c in shown}
                figure = plots.grid(panels, fill, COLUMNS, (2.5, 1.8), margin=1.0, legend=COLOURS)
                plots.titled(figure, f"{what}, {dtype}", result["environment"])
                yield f"ops_{kind}_{dtype}", figure


def _copy(axis: plt.Axes, case: dict) -> None:
    """A line at the time of the fastest copy."""
    copy = case["traffic"] * case["contestants"][case["copy"]]["ns_per_element"]
    axis.axvline(copy, color="black", linestyle="dotted", label="copy of as many bytes")


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
            box = {"facecolor": COLOURS[name], "edgecolor": "none", "pad": 1}
            style = {"color": "white", "fontsize": 7, "ha": "right", "va": "center"}
            axis.text(shown, place, f"{time:.2f} ", bbox=box, **style)
    axis.set_yticks([])
    axis.invert_yaxis()
    _copy(axis, case)


def _dots(axis: plt.Axes, case: dict) -> None:
    """Error against time, one point per contestant."""
    for name in goals.systems(case):
        entry = case["contestants"][name]
        marker = "o" if name.startswith("order") else "s"
        style = {"markersize": 5, "linestyle": "none", "color": COLOURS[name], "label": name}
        at = entry["ns_per_element"], max(entry["relative_error"], 1e-9)
        axis.loglog(*at, marker, **style)
    _copy(axis, case)
    axis.grid(alpha=0.3)
    axis.minorticks_off()
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    times = [entry["ns_per_element"] for entry in case["contestants"].values()]
    axis.set_xlim(0.8 * min(times), 1.25 * max(times))
