"""Pictures of results: panels with one legend, in files that say under which conditions."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)
from PIL import Image  # noqa: E402  (matplotlib needs it too)

from benchmarks.harness.errors import BenchmarkError  # noqa: E402

DOTS_PER_INCH = 80
# With a palette a file is a third of the size that it has with all colours.
PALETTE = 64


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


def panels(
    count: int, columns: int, width: float, height: float, margin: float
) -> tuple[plt.Figure, list[plt.Axes]]:
    """A figure of so many panels in rows, each of a size in inches, with a margin for a legend."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (max(6.0, width * columns), height * rows + margin)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def title(figure: plt.Figure, what: str, environment: dict) -> None:
    """Say above the panels what they show, and under which conditions it was measured."""
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    figure.suptitle(f"{what}, {threads}, {environment['isa']}, {environment['cpu']}", fontsize=10)


def legend(figure: plt.Figure, first: Iterable[str] = (), columns: int | None = None) -> None:
    """One legend for all panels: the labels of `first` in that order, then the others."""
    unique = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            unique.setdefault(label, handle)
    order = {name: place for place, name in enumerate(first)}
    labels = sorted(unique, key=lambda label: order.get(label, len(order)))
    figure.legend(
        [unique[label] for label in labels],
        labels,
        fontsize=8,
        ncols=columns or len(labels),
        loc="outside lower center",
    )
