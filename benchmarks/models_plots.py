"""Pictures of a result of `models`: the time of every system, one panel for each model."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)

from benchmarks.errors import BenchmarkError  # noqa: E402
from benchmarks.models_cases import (  # noqa: E402
    ACCELERATE,
    CEILING,
    FLAX,
    INTERCEPTOR,
    MEANING,
    PARTS,
    TORCH,
    label,
)

COLOURS = {
    FLAX: "#d95f0e",
    PARTS: "#6baed6",
    ACCELERATE: "#08519c",
    INTERCEPTOR: "#2171b5",
    CEILING: "#bdbdbd",
    TORCH: "#a63603",
}
DOTS_PER_INCH = 80
COLUMNS = 4


def draw(result: dict, folder: Path) -> Path:
    """Draw a result.

    Args:
        result: The result of a run.
        folder: Where the files go; made if it does not exist.

    Returns:
        The file written, `models_DTYPE_ISA_tN.png`.

    Raises:
        BenchmarkError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {error.strerror}") from error
    environment, dtype = result["environment"], result["settings"]["dtype"]
    threads, isa = environment["threads"], environment["isa"]
    figure = _panels(result["cases"])
    figure.suptitle(
        f"ms per call, {dtype}, random weights, {threads} thread{'s' * (threads > 1)}, {isa}, "
        f"{environment['cpu']}",
        fontsize=10,
    )
    path = folder / f"models_{dtype}_{isa}_t{threads}.png"
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)
    return path


def _panels(cases: list[dict]) -> plt.Figure:
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    size = (max(6.0, 3.2 * columns), 1.9 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, cases, strict=False):
        names = [name for name in MEANING if name in case["contestants"]]
        quartiles = [case["contestants"][name]["ms"] for name in names]
        medians = [q["median"] for q in quartiles]
        spread = [
            [q["median"] - q["low"] for q in quartiles],
            [q["high"] - q["median"] for q in quartiles],
        ]
        colours = [COLOURS[name] for name in names]
        labels = [label(name) for name in names]
        axis.barh(labels, medians, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        axis.invert_yaxis()
        axis.set_title(case["title"], fontsize=8)
        axis.tick_params(labelsize=7)
    return figure
