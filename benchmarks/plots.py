"""Pictures of a result of `ops`: bars against the peers, and error against time.

One file of each kind per dtype, small enough for a repository.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

from benchmarks.errors import BenchmarkError  # noqa: E402

COLOURS = {
    "order 1": "#08519c",
    "order 2": "#2171b5",
    "order 3": "#4292c6",
    "order 4": "#6baed6",
    "order 5": "#9ecae1",
    "jax.nn": "#d95f0e",
    "jax.nn again": "#fe9929",
    "torch": "#a63603",
    "onnxruntime": "#636363",
}
DOTS_PER_INCH = 80


def draw(result: dict, folder: Path) -> list[Path]:
    """Draw a result.

    Args:
        result: The result of a run.
        folder: Where the files go; made if it does not exist.

    Returns:
        The files written: `ops_time_DTYPE_tN.png` and `ops_error_DTYPE_tN.png`.

    Raises:
        BenchmarkError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {error.strerror}") from error
    threads = result["environment"]["threads"]
    written = []
    for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["dtype"] == dtype]
        for kind, figure in (("time", _bars(cases)), ("error", _scatter(cases))):
            path = folder / f"ops_{kind}_{dtype}_t{threads}.png"
            figure.suptitle(
                f"{dtype}, {threads} thread{'s' * (threads > 1)}, {result['environment']['cpu']}",
                fontsize=10,
            )
            figure.savefig(path, dpi=DOTS_PER_INCH)
            plt.close(figure)
            written.append(path)
    return written


def _bars(cases: list[dict]) -> plt.Figure:
    """ns per element of every contestant, one column per shape, the copy as a line."""
    shapes = list(dict.fromkeys(tuple(case["shape"]) for case in cases))
    functions = list(dict.fromkeys(case["function"] for case in cases))
    names = list(dict.fromkeys(name for case in cases for name in _systems(case)))
    size = (3.4 * len(shapes) + 1, 1.2 + 0.16 * (len(names) + 1) * len(functions))
    figure, axes = plt.subplots(
        1, len(shapes), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        for case in (case for case in cases if tuple(case["shape"]) == shape):
            top = functions.index(case["function"]) * (len(names) + 1)
            for name in _systems(case):
                axis.barh(
                    top + names.index(name),
                    case["contestants"][name]["ns_per_element"],
                    color=COLOURS[name],
                    label=name,
                )
            copy = case["contestants"][case["copy"]]["ns_per_element"]
            axis.vlines(
                copy, top - 0.5, top + len(names) - 0.5, "black", linestyles="dotted", label="copy"
            )
        axis.set_title("×".join(map(str, shape)), fontsize=9)
        axis.set_xlabel("ns per element")
    middles = [i * (len(names) + 1) + (len(names) - 1) / 2 for i in range(len(functions))]
    axes[0, 0].set_yticks(middles, functions)
    axes[0, 0].invert_yaxis()
    _legend(figure)
    return figure


def _scatter(cases: list[dict]) -> plt.Figure:
    """Error against time, one panel per function at its first shape, one point per contestant."""
    first = {}
    for case in cases:
        first.setdefault(case["function"], case)
    columns = min(4, len(first))
    rows = -(-len(first) // columns)
    size = (max(4.5, 2.6 * columns), 2.5 * rows + 0.8)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(first) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, first.values(), strict=False):
        for name in _systems(case):
            entry = case["contestants"][name]
            axis.semilogy(
                entry["ns_per_element"],
                max(entry["relative_error"], 1e-9),
                "o" if name.startswith("order") else "s",
                linestyle="none",
                color=COLOURS[name],
                label=name,
            )
        axis.axvline(
            case["contestants"][case["copy"]]["ns_per_element"],
            color="black",
            linestyle="dotted",
            label="copy",
        )
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.set_title(f"{case['function']} {'×'.join(map(str, case['shape']))}", fontsize=9)
        axis.set_xlabel("ns per element", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("largest relative error", fontsize=8)
    _legend(figure)
    return figure


def _systems(case: dict) -> list[str]:
    return [name for name in case["contestants"] if not name.startswith("copy")]


def _legend(figure: plt.Figure) -> None:
    unique = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    figure.legend(unique.values(), unique.keys(), fontsize=8, ncols=5, loc="outside lower center")
