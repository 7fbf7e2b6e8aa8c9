"""Pictures of a result of `models`: the time of every system, one panel for each model."""

from collections.abc import Iterator

from matplotlib import pyplot as plt

from benchmarks.harness import plots
from benchmarks.harness.peers import ONNXRUNTIME, OPENVINO, TORCH
from benchmarks.models import cases as systems
from benchmarks.models.cases import MEANING, label

_LIBRARIES = {systems.FLAX: "#fdae6b", TORCH: "#a63603", "zentorch": "#7f2704"}
_LIBRARIES |= {ONNXRUNTIME: "#636363", OPENVINO: "#9e9ac8"}
_GREENS = "#00441b", "#006d2c", "#238b45", "#41ab5d", "#74c476", "#a1d99b", "#c7e9c0"
COLOURS = {
    systems.FLAX: "#d95f0e",
    systems.PARTS: "#6baed6",
    systems.ACCELERATE: "#08519c",
    systems.INTERCEPTOR: "#2171b5",
    **dict(zip(systems.PACKED, _GREENS, strict=True)),
    systems.CEILING: "#bdbdbd",
    **{name: _LIBRARIES[name.split("-")[0]] for name in systems.PEERS},
}
COLUMNS = 4


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """Draw a result: one figure, `models_DTYPE`."""
    panels = {case["title"]: case["contestants"] for case in result["cases"]}
    height = max(1.9, 0.17 * max(map(len, panels.values())))
    figure, dtype = plots.grid(panels, _bars, COLUMNS, (3.2, height)), result["settings"]["dtype"]
    what = f"ms per call, {dtype}, random weights"
    yield f"models_{dtype}", plots.titled(figure, what, result["environment"])


def _bars(axis: plt.Axes, contestants: dict[str, dict]) -> None:
    """Milliseconds of every system."""
    shown = [name for name in MEANING if name in contestants]
    colours = {label(name): COLOURS[name] for name in shown}
    plots.bars(axis, {label(name): contestants[name]["ms"] for name in shown}, colours)
