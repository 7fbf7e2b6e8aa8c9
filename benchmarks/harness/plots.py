"""Pictures of results: panels with one legend, in files that say under which conditions."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)
from PIL import Image  # noqa: E402  (matplotlib needs it too)

from benchmarks.harness.errors import BenchmarkError  # noqa: E402

DOTS_PER_INCH = 80
# With a palette a file is a third of the size that it has with all colours.
PALETTE = 64
plt.rcParams.update({"figure.titlesize": 10, "axes.titlesize": 8, "legend.fontsize": 8})
plt.rcParams.update({"axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7})


def draw(result: dict, subject: ModuleType, folder: Path) -> list[Path]:
    """Write the figures that `subject.figures(result)` yields with their names, and return the
    files: `NAME_ISA_tN.png` in the folder, which is made if it does not exist. Raise BenchmarkError
    if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {error.strerror}") from error
    environment, written = result["environment"], []
    for name, figure in subject.figures(result):
        ending = f"{environment['isa']}_t{environment['threads']}.png"
        written.append(folder / f"{name}_{ending}")
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=DOTS_PER_INCH)
        with Image.open(drawn) as image:
            image.convert("RGB").quantize(PALETTE).save(written[-1], optimize=True)
        plt.close(figure)
    return written


def grid(
    panels: dict[str, Any],
    fill: Callable[[plt.Axes, Any], None],
    columns: int,
    size: tuple[float, float],
    margin: float = 0.6,
) -> plt.Figure:
    """A figure of panels by their titles, in rows, each of a size in inches and filled by a
    function of its axes and its entry; in the margin the legend.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    inches = (max(6.0, size[0] * columns), size[1] * rows + margin)
    figure, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, entry) in zip(axes.flat, panels.items(), strict=False):
        axis.set_title(title)
        fill(axis, entry)
    add_legend(figure)
    return figure


def bars(
    axis: plt.Axes,
    times: dict[str, dict[str, float]],
    colours: dict[str, str],
    longest: float = math.inf,
) -> None:
    """A bar for each name, of the median with the quartiles. Bars of more than `longest` times the
    shortest one, which would hide the rest, are cut, and say their length.
    """
    medians = [quartiles["median"] for quartiles in times.values()]
    spread = [[abs(q[end] - q["median"]) for q in times.values()] for end in ("low", "high")]
    style = {"color": [colours[name] for name in times], "error_kw": {"linewidth": 0.8}}
    axis.barh(list(times), medians, xerr=spread, **style)
    axis.invert_yaxis()
    limit = longest * min(medians)
    if max(medians) > limit:
        axis.set_xlim(0, limit)
        style = {"color": "white", "fontsize": 7, "ha": "right", "va": "center"}
        for place, time in enumerate(medians):
            if time > limit:
                axis.text(limit, place, f"{time:.3g} ", **style)


def titled(figure: plt.Figure, what: str, environment: dict) -> plt.Figure:
    """Say above the panels what they show, and under which conditions it was measured."""
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    figure.suptitle(f"{what}, {threads}, {environment['isa']}, {environment['cpu']}")
    return figure


def add_legend(figure: plt.Figure) -> None:
    """One legend for all panels, if they have labels; in lines of four under narrow figures."""
    unique = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    if unique:
        columns = 4 if figure.get_figwidth() < 8 else len(unique)
        handles = list(unique.values())
        figure.legend(handles, list(unique), ncols=columns, loc="outside lower center")
