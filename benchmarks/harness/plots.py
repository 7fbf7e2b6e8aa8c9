"""Pictures of results: panels with one legend, in files that say under which conditions."""

import io
from collections.abc import Callable, Iterable
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
    legend: Iterable[str] = (),
) -> plt.Figure:
    """A figure of panels by their titles, in rows, each of a size in inches and filled by a
    function of its axes and its entry; in the margin the legend, as `add_legend` makes it.
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
    add_legend(figure, legend)
    return figure


def titled(figure: plt.Figure, what: str, environment: dict) -> plt.Figure:
    """Say above the panels what they show, and under which conditions it was measured."""
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    figure.suptitle(f"{what}, {threads}, {environment['isa']}, {environment['cpu']}")
    return figure


def add_legend(figure: plt.Figure, first: Iterable[str] = ()) -> None:
    """One legend for all panels, if they have labels: those of `first` in that order, then the
    others; in lines of four under narrow figures.
    """
    unique = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    order = {name: place for place, name in enumerate(first)}
    labels = sorted(unique, key=lambda label: order.get(label, len(order)))
    if labels:
        columns = 4 if figure.get_figwidth() < 8 else len(labels)
        handles = [unique[label] for label in labels]
        figure.legend(handles, labels, ncols=columns, loc="outside lower center")
