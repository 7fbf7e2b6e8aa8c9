"""Pictures of a result of `dense`: speed against what is computed with each byte of weights."""

from collections.abc import Iterator
from functools import partial

from matplotlib import pyplot as plt

from benchmarks.dense.cases import FORMATS, PEERS, XLA, precision
from benchmarks.dense.measure import peak_of
from benchmarks.harness import plots

COLUMNS = 4
MARKS = {"quake": ("o", "#08519c"), "XLA": ("x", "#d95f0e"), "torch": ("+", "#a63603")}
MARKS |= {"onnxruntime": ("1", "#636363"), "OpenVINO": ("2", "#31a354")}


def figures(result: dict) -> Iterator[tuple[str, plt.Figure]]:
    """One figure, `dense_roofline`, with a panel for each format: ours and others of its
    precision, below the peak of the instruction and what reading the weights allows.
    """
    cases = [case for case in result["cases"] if case["form"] == "bias"] or result["cases"]
    panels = {format_: format_ for format_ in FORMATS}
    figure = plots.grid(panels, partial(_panel, cases), COLUMNS, (3.2, 2.6))
    what = "GFLOP/s against FLOP for each byte of weights"
    yield "dense_roofline", plots.titled(figure, what, result["environment"])


def _panel(cases: list[dict], axis: plt.Axes, format_: str) -> None:
    others = (n for n, of in (XLA | PEERS).items() if of == precision(format_))
    same = [f"quake {format_}", *others]
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for name in same:
            if entry := case["contestants"].get(name):
                # FLOP/s over bytes/s.
                intensity = entry["gflops"] / entry["weight_gbps"]
                points.setdefault(name.split()[0], []).append((intensity, entry["gflops"]))
    for system, found in points.items():
        marker, colour = MARKS[system]
        axis.scatter(*zip(*found, strict=True), 18, colour, marker, label=system, linewidths=0.8)
    found = (case["peaks_gflops"] for case in cases)
    peaks = [of[peak] for of in found if (peak := peak_of(format_, of))]
    reads = [case["read"]["gbps"] for case in cases if case["read"]]
    if peaks:
        axis.axhline(max(peaks), color="black", linestyle="dotted", label="peak")
    if reads and points:
        ends = [min(x for found in points.values() for x, _ in found)]
        ends.append(max(peaks) / max(reads) if peaks else 10 * ends[0])
        axis.plot(ends, [max(reads) * x for x in ends], "k--", linewidth=0.8, label="reading")
    axis.set(xscale="log", yscale="log")
