"""Pictures of a result of `models`: the time of every system, one panel for each model."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib import pyplot as plt

from benchmarks.harness import plots
from benchmarks.harness.peers import ONNXRUNTIME, OPENVINO, TORCH
from benchmarks.models import cases as systems
from benchmarks.models.cases import MEANING, label

_LIBRARIES = {systems.FLAX: "#fdae6b", TORCH: "#a63603", "zentorch": "#7f2704"}
_LIBRARIES |= {ONNXRUNTIME: "#636363", OPENVINO: "#9e9ac8"}
COLOURS = {
    systems.FLAX: "#d95f0e",
    systems.PARTS: "#6baed6",
    systems.ACCELERATE: "#08519c",
    systems.INTERCEPTOR: "#2171b5",
    **dict(
        zip(systems.PACKED, ("#006d2c", "#31a354", "#74c476", "#a1d99b", "#c7e9c0"), strict=True)
    ),
    systems.CEILING: "#bdbdbd",
    **{name: _LIBRARIES[name.split("-")[0]] for name in systems.PEERS},
}
COLUMNS = 4


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """Draw a result: one figure, `models_DTYPE`."""
    cases, dtype = result["cases"], result["settings"]["dtype"]
    height = max(1.9, 0.17 * max(len(case["contestants"]) for case in cases))
    figure, axes = plots.panels(len(cases), COLUMNS, width=3.2, height=height, margin=0.6)
    for axis, case in zip(axes, cases, strict=True):
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
    plots.title(figure, f"ms per call, {dtype}, random weights", result["environment"])
    yield f"models_{dtype}", figure
