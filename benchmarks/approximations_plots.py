"""Pictures of a result of `approximations`: error against quality, and times."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend comes first)
from PIL import Image  # noqa: E402  (matplotlib needs it too)

from benchmarks.approximations_report import ERRORS, name  # noqa: E402
from benchmarks.errors import BenchmarkError  # noqa: E402

COLOURS = {"kernel": "#08519c", "XLA": "#d95f0e", "emulation": "#969696"}
MEANING = {
    "kernel": "QuAKE's kernels",
    "XLA": "jax.numpy",
    "emulation": "jax.numpy, emulating integers or tables",
}
DOTS_PER_INCH = 80
PALETTE = 64
# Of each kind that models are given: the error to draw the quality against.
DRAWN_ERROR = {"softmax": "tv_128", "gelu": "max_abs", "layernorm": "rms_even"}
KIND_TITLES = {
    "softmax": "softmax",
    "gelu": "GELU",
    "layernorm": "layer normalisation",
    "exp": "exp",
    "sigmoid": "logistic",
}
# Shares of changed tokens below this one, in percent, are drawn there.
LEAST_SHARE = 0.01


def draw(result: dict, folder: Path) -> list[Path]:
    """Draw a result.

    Args:
        result: The result of a run.
        folder: Where the files go; made if it does not exist.

    Returns:
        The files written: `approximations_quality_ISA_tN.png`, where models were run, and
        `approximations_time_ISA_tN.png`.

    Raises:
        BenchmarkError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{folder}: {error.strerror}") from error
    kinds = result["kinds"]
    judged = [kind for kind in DRAWN_ERROR if kind in kinds]
    figures = {"time": _times(kinds)}
    if judged:
        figures["quality"] = _quality({kind: kinds[kind] for kind in judged})
    environment, written = result["environment"], []
    for what, figure in sorted(figures.items()):
        ending = f"{environment['isa']}_t{environment['threads']}.png"
        path = folder / f"approximations_{what}_{ending}"
        _save(figure, path)
        plt.close(figure)
        written.append(path)
    return written


def _save(figure: plt.Figure, path: Path) -> None:
    """Write a figure with a palette, a third of the size that it has with all colours."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DOTS_PER_INCH)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(PALETTE).save(path, optimize=True)


def _quality(kinds: dict[str, list[dict]]) -> plt.Figure:
    """The operator's error, and beside it the GPT's likeliest tokens that change, row by row."""
    shown = {
        kind: sorted(
            (row for row in rows if "same_greedy" in row["tasks"]["text"]),
            key=lambda row, kind=kind: row["errors"][DRAWN_ERROR[kind]],
        )
        for kind, rows in kinds.items()
    }
    heights = [1 + len(rows) for rows in shown.values()]
    figure, axes = plt.subplots(
        len(kinds),
        2,
        figsize=(9, 1.2 + 0.19 * sum(heights)),
        squeeze=False,
        sharey="row",
        layout="constrained",
        height_ratios=heights,
    )
    for (left, right), (kind, rows) in zip(axes, shown.items(), strict=True):
        key = DRAWN_ERROR[kind]
        _dots(left, rows, [row["errors"][key] for row in rows])
        changed = [100 - row["tasks"]["text"]["same_greedy"]["value"] for row in rows]
        _dots(right, rows, [max(share, LEAST_SHARE) for share in changed])
        left.set_title(f"{KIND_TITLES[kind]}: {ERRORS[key]}", fontsize=9)
        right.set_title(
            f"GPT: another likeliest token, % (at least {LEAST_SHARE:g} is drawn)", fontsize=9
        )
    _legend(figure)
    return figure


def _times(kinds: dict[str, list[dict]]) -> plt.Figure:
    """ns per element of every row, a panel for each kind."""
    most = max(map(len, kinds.values()))
    figure, axes = plt.subplots(
        1,
        len(kinds),
        figsize=(2.5 * len(kinds) + 1, 1.2 + 0.17 * most),
        squeeze=False,
        layout="constrained",
    )
    for axis, (kind, rows) in zip(axes.flat, kinds.items(), strict=True):
        _dots(axis, rows, [row["time"]["ns_per_element"]["median"] for row in rows])
        axis.set_ylim(most - 0.5, -0.5)
        axis.set_title(f"{KIND_TITLES[kind]}: ns per element", fontsize=9)
    _legend(figure)
    return figure


def _dots(axis: plt.Axes, rows: list[dict], values: list[float]) -> None:
    """One dot for each row, on a logarithmic axis, with the rows' names beside them."""
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        colour = COLOURS[row["description"]["runs_as"]]
        axis.plot(value, i, "o", color=colour, markersize=5)
    axis.set_yticks(range(len(rows)), [name(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


def _legend(figure: plt.Figure) -> None:
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c) for c in COLOURS.values()]
    labels = [MEANING[runs_as] for runs_as in COLOURS]
    figure.legend(handles, labels, fontsize=8, ncols=3, loc="outside lower center")
