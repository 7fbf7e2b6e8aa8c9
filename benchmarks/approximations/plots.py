"""Pictures of a result of `approximations`: error against quality, and times."""

from collections.abc import Iterator

from matplotlib import pyplot as plt

from benchmarks.approximations.report import ERRORS, name
from benchmarks.harness import plots

COLOURS = {"kernel": "#08519c", "XLA": "#d95f0e", "emulation": "#969696"}
MEANING = {
    "kernel": "QuAKE's kernels",
    "XLA": "jax.numpy",
    "emulation": "jax.numpy, emulating integers or tables",
}
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


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """Draw a result: `approximations_quality`, where models were run, `approximations_time`."""
    kinds = result["kinds"]
    judged = {kind: kinds[kind] for kind in DRAWN_ERROR if kind in kinds}
    if judged:
        yield "approximations_quality", _quality(judged)
    yield "approximations_time", _times(kinds)


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
    size = (9, 1.2 + 0.19 * sum(heights))
    options = {"squeeze": False, "sharey": "row", "layout": "constrained"}
    figure, axes = plt.subplots(len(kinds), 2, figsize=size, height_ratios=heights, **options)
    for (left, right), (kind, rows) in zip(axes, shown.items(), strict=True):
        key = DRAWN_ERROR[kind]
        _dots(left, rows, [row["errors"][key] for row in rows])
        changed = [100 - row["tasks"]["text"]["same_greedy"]["value"] for row in rows]
        _dots(right, rows, [max(share, LEAST_SHARE) for share in changed])
        left.set_title(f"{KIND_TITLES[kind]}: {ERRORS[key]}")
        least = f"at least {LEAST_SHARE:g} is drawn"
        right.set_title(f"GPT: another likeliest token, % ({least})")
    plots.add_legend(figure)
    return figure


def _times(kinds: dict[str, list[dict]]) -> plt.Figure:
    """ns per element of every row, a panel for each kind."""
    most = max(map(len, kinds.values()))

    def fill(axis: plt.Axes, rows: list[dict]) -> None:
        _dots(axis, rows, [row["time"]["ns_per_element"]["median"] for row in rows])
        axis.set_ylim(most - 0.5, -0.5)

    panels = {f"{KIND_TITLES[kind]}: ns per element": rows for kind, rows in kinds.items()}
    size = 2.5 + 1 / len(panels), 0.17 * most
    return plots.grid(panels, fill, len(panels), size, margin=1.2)


def _dots(axis: plt.Axes, rows: list[dict], values: list[float]) -> None:
    """One dot for each row, on a logarithmic axis, with the rows' names beside them."""
    for i, (row, value) in enumerate(zip(rows, values, strict=True)):
        runs_as = row["description"]["runs_as"]
        style = {"color": COLOURS[runs_as], "label": MEANING[runs_as], "linestyle": ""}
        axis.plot(value, i, "o", markersize=5, **style)
    axis.set_yticks(range(len(rows)), [name(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")
    axis.grid(alpha=0.3)
