"""Pictures of a result of `ops`: bars against the peers, and error against time.

One panel per function, each with a scale of its own: it is about who is faster at that function.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

from benchmarks import figures  # noqa: E402
from benchmarks.errors import BenchmarkError  # noqa: E402

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
DOTS_PER_INCH = 80
COLUMNS = 6
# A bar this many times as long as the shortest other one would hide the rest: it is cut, and
# says its length.
LONGEST = 12


def draw(result: dict, folder: Path) -> list[Path]:
    """Draw a result.

    Args:
        result: The result of a run.
        folder: Where the files go; made if it does not exist.

    Returns:
        The files written, for each dtype `ops_time_DTYPE_ISA_tN.png` and
        `ops_error_DTYPE_ISA_tN.png` with each function at its first shape, and
        `ops_large_DTYPE_ISA_tN.png` with the times at the others, if there are any.

    Raises:
        BenchmarkError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {error.strerror}") from error
    environment = result["environment"]
    threads, isa = environment["threads"], environment["isa"]
    written = []
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
            if not shown:
                continue
            figure = _grid(shown, panel)
            figure.suptitle(
                f"{what}, {dtype}, {threads} thread{'s' * (threads > 1)}, {isa}, "
                f"{environment['cpu']}",
                fontsize=10,
            )
            path = folder / f"ops_{kind}_{dtype}_{isa}_t{threads}.png"
            figure.savefig(path, dpi=DOTS_PER_INCH)
            plt.close(figure)
            written.append(path)
    return written


def _grid(cases: list[dict], panel: Callable[[plt.Axes, dict], None]) -> plt.Figure:
    """One panel per case, with one legend for all."""
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    size = (max(6.0, 2.5 * columns), 1.8 * rows + 1.0)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        panel(axis, case)
        copy = case["traffic"] * case["contestants"][case["copy"]]["ns_per_element"]
        axis.axvline(copy, color="black", linestyle="dotted", label="copy of as many bytes")
        axis.set_title(f"{case['function']} {'×'.join(map(str, case['shape']))}", fontsize=8)
        axis.tick_params(labelsize=7)
    unique = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    order = {name: place for place, name in enumerate(COLOURS)}
    labels = sorted(unique, key=lambda label: order.get(label, len(order)))
    figure.legend(
        [unique[label] for label in labels],
        labels,
        fontsize=8,
        ncols=len(labels) if columns > 3 else 4,
        loc="outside lower center",
    )
    return figure


def _bars(axis: plt.Axes, case: dict) -> None:
    """ns per element of every contestant."""
    names = figures.systems(case)
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
    for name in figures.systems(case):
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
