"""The goals for the speed of attention, and the tables of a result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import report
from benchmarks.attention_cases import (
    BERT,
    DECODE,
    GPT,
    GROUPED,
    LONG,
    SHAPES,
    SUBJECT_ORDER,
    VIT,
    VIT_BATCH,
    Shape,
    masks,
)
from benchmarks.bars import verdict

# Against torch, over all shapes and masks in float32.
GEOMETRIC_MEAN = 1.25
GEOMETRIC_MEAN_NAME = "geometric mean of all float32, against torch"


@dataclass(frozen=True)
class Bar:
    """A limit for one figure of one case, at order `attention_cases.SUBJECT_ORDER`.

    Attributes:
        kind: A key of `KINDS`.
        shape: Shape of the case.
        threshold: The least figure, or the largest where the kind says so.
        mask: The case's mask.
        dtype: dtype of its arrays.
        isa: The instruction set for which it holds, and for the extensions of it.
    """

    kind: str
    shape: Shape
    threshold: float
    mask: str = "none"
    dtype: str = "float32"
    isa: str = "avx512"

    @property
    def name(self) -> str:
        return f"{self.shape.text} {self.dtype} {self.mask}, {KINDS[self.kind].what}"

    def holds(self, environment: dict) -> bool:
        """Whether a run under these conditions is judged by it."""
        return environment["threads"] == 1 and (environment["isa"] or "").startswith(self.isa)


@dataclass(frozen=True)
class Kind:
    """What the figure of a bar is.

    Attributes:
        what: The words for it.
        unit: Its unit.
        figure: Takes it from a case of the result and the name of the contestant; None if it was
            not measured.
        at_least: Whether the threshold is the least or the largest.
    """

    what: str
    unit: str
    figure: Callable[[dict, str], float | None]
    at_least: bool = True


def _median(entry: dict | None) -> float | None:
    return entry["median"] if entry else None


def _against(other: str) -> Callable[[dict, str], float | None]:
    return lambda case, name: _median(case["ratios"].get(name, {}).get(other))


def _relative(to: str) -> Callable[[dict, str], float | None]:
    return lambda case, name: _median(case["relative"].get(to, {}).get(name))


def _share(of: str) -> Callable[[dict, str], float | None]:
    def percent(case: dict, name: str) -> float | None:
        share = _median(case["contestants"].get(name, {}).get(f"share_of_{of}"))
        return None if share is None else 100 * share

    return percent


def _bfloat16(case: dict, name: str) -> float | None:
    time = _relative("float32")(case, name)
    return None if time is None else 1 / time


KINDS = {
    "XLA": Kind("against XLA", "×", _against("XLA")),
    "torch": Kind("against torch", "×", _against("torch")),
    "peak": Kind("of the peak of fused multiply-adds", "%", _share("peak")),
    "read": Kind("of the bandwidth of reading", "%", _share("read")),
    "unmasked": Kind("time over unmasked", "×", _relative("none"), at_least=False),
    "array": Kind("time over is_causal", "×", _relative("causal"), at_least=False),
    "float32": Kind("against our float32", "×", _bfloat16),
}

BARS = (
    *(Bar("XLA", shape, 3.0) for shape in (VIT_BATCH, BERT, GPT)),
    Bar("XLA", GROUPED, 2.5),
    Bar("XLA", VIT, 1.4),
    Bar("XLA", GPT, 5.0, mask="causal"),
    Bar("XLA", LONG, 8.0, mask="causal"),
    *(
        Bar("torch", shape, 1.0, mask=mask)
        for shape in SHAPES
        for mask in masks(shape)
        if mask != "causal array"  # the same as causal, to torch
    ),
    *(Bar("peak", shape, 82) for shape in (GPT, LONG, GROUPED)),
    *(Bar("peak", shape, 68) for shape in (VIT, VIT_BATCH)),
    Bar("unmasked", LONG, 0.56, mask="causal"),
    *(Bar("array", shape, 1.15, mask="causal array") for shape in (GPT, LONG)),
    *(
        Bar("float32", shape, 1.5, dtype="bfloat16", isa="avx512bf16")
        for shape in (GPT, LONG, GROUPED)
    ),
    Bar("read", DECODE, 80),
    *(Bar("XLA", shape, 2.0, isa="avx2") for shape in (BERT, GPT, LONG, GROUPED)),
)


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars.

    Args:
        result: The run's result as `benchmarks.attention` makes it.

    Returns:
        One dictionary per bar that the run measured, as of `bars.judge`.
    """
    environment, name = result["environment"], f"order {SUBJECT_ORDER}"
    cases = {(case["shape"], case["mask"], case["dtype"]): case for case in result["cases"]}
    verdicts, over_torch = [], []
    for bar in BARS:
        case = cases.get((bar.shape.text, bar.mask, bar.dtype))
        if case is None or not bar.holds(environment):
            continue
        kind = KINDS[bar.kind]
        figure = kind.figure(case, name)
        if figure is not None:
            verdicts.append(verdict(bar.name, figure, bar.threshold, kind.unit, kind.at_least))
            if bar.kind == "torch":
                over_torch.append(figure)
    # The mean of a part would be another figure.
    if len(over_torch) == sum(bar.kind == "torch" for bar in BARS):
        mean = math.exp(math.fsum(map(math.log, over_torch)) / len(over_torch))
        verdicts.append(verdict(GEOMETRIC_MEAN_NAME, mean, GEOMETRIC_MEAN, "×", True))
    return verdicts


def subject(case: dict) -> str:
    """Whose speed is stated: the default order, or the last of ours in a run without it."""
    name = f"order {SUBJECT_ORDER}"
    return name if name in case["ratios"] else list(case["ratios"])[-1]


def tables(result: dict) -> list[tuple[str, report.Rows]]:
    """Make the tables: titles, and rows with the heading first."""
    made = []
    for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["dtype"] == dtype]
        made += [
            (f"Time, {dtype}: ms per call (median)", _times(cases)),
            (f"Speed of {subject(cases[0])}, {dtype}: their time over ours", _speeds(cases)),
        ]
    rows = _relative_times(result["cases"])
    if len(rows) > 1:
        made.append(("Our time over our time of another case, median (quartiles)", rows))
    if result["scaling"]:
        rows = [["B,T,N,H", "two threads over one"]]
        rows += [[_label(entry), report.spread(entry["speedup"])] for entry in result["scaling"]]
        made.append(("Speed of two threads over one, median (quartiles) of the rounds", rows))
    return made + report.bars_table(result)


def heading(result: dict) -> str:
    """What was measured, for the heading of a section."""
    return "A" + result["benchmark"][1:]


def _most_faults(case: dict) -> float:
    return max(entry["faults_per_call"] for entry in case["contestants"].values())


def _label(case: dict) -> str:
    return f"{case['shape']} {case['mask']}"


def _times(cases: list[dict]) -> report.Rows:
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    rows = [["B,T,N,H and mask", *names]]
    for case in cases:
        entries = [case["contestants"].get(name) for name in names]
        rows.append([_label(case), *(_milliseconds(entry) for entry in entries)])
    return rows


def _milliseconds(entry: dict | None) -> str:
    if entry is None:
        return "–"
    time = entry["ms"]["median"]
    digits = max(0, 2 - math.floor(math.log10(time))) if time > 0 else 3
    return f"{time:.{digits}f}" + ("†" if entry["doubtful"] else "")


def _speeds(cases: list[dict]) -> report.Rows:
    others = list(
        dict.fromkeys(name for case in cases for r in case["ratios"].values() for name in r)
    )
    head = ["B,T,N,H and mask", *others, "GFLOP/s", "FMA peak"]
    rows = [[*head, "share of peak", "share of read", "largest error"]]
    for case in cases:
        name = subject(case)
        ratios, entry = case["ratios"][name], case["contestants"][name]
        rows.append(
            [
                _label(case),
                *(report.spread(ratios[other]) if other in ratios else "–" for other in others),
                f"{entry['gflops']:.0f}",
                f"{case['peak_gflops']:.0f}" if case["peak_gflops"] else "–",
                _percent(entry.get("share_of_peak")),
                _percent(entry.get("share_of_read")),
                f"{entry['error']:.1e}",
            ]
        )
    # Columns that a run has nothing for (no compiler, no decoding) are left out.
    kept = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _percent(share: dict | None) -> str:
    return "–" if share is None else f"{100 * share['median']:.0f} %"


def _relative_times(cases: list[dict]) -> report.Rows:
    rows = [["B,T,N,H, dtype and mask", "unmasked", "is_causal", "float32"]]
    for case in cases:
        found = [case["relative"].get(to, {}) for to in ("none", "causal", "float32")]
        entries = [entry.get(subject(case)) for entry in found]
        if any(entries):
            spreads = (report.spread(entry) if entry else "–" for entry in entries)
            rows.append([f"{case['shape']} {case['dtype']} {case['mask']}", *spreads])
    return rows


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    counts = sorted({case["rounds"] for case in result["cases"]}, reverse=True)
    few = f" ({counts[-1]} for the largest)" if len(counts) > 1 else ""
    lines = [
        f"{counts[0]} interleaved rounds{few} with all dtypes and masks of a shape in the same "
        f"ones, readings of one call or at least {1e3 * settings['reading_seconds']:g} ms. "
        "quake_jax and XLA run in a loop inside one program; from torch the time of a call with "
        "one query and one key is subtracted. torch has the layout BNTH, and an output of its own.",
        "T-S: T queries and S keys. N/K: N query heads share K key/value heads. Causal: "
        "is_causal; causal array: the same as an array of booleans. Padding: "
        "key_value_seq_lengths, from half to all of the keys over the batch (three quarters of "
        "them for one row). Bias: one (T, S) array for all rows and heads.",
        "GFLOP/s counts the products of queries with the keys that the mask leaves. FMA peak: "
        "fused multiply-adds of float32 between registers at the width of our kernels, timed in "
        "the same rounds; bfloat16 instructions do two at a time. Share of read: bytes of keys "
        "and values per second, relative to a loop that only reads the same arrays. Largest "
        "error: relative to the largest element of the exact result.",
    ]
    if result["environment"]["isa"] == "avx2":
        lines.append("AVX2 is forced on quake_jax alone: the other libraries use AVX-512 too.")
    if settings["allocator"] == "system":
        lines.append(
            "The system's allocator was left as it is: page faults are part of the times, up to "
            f"{max(map(_most_faults, result['cases'])):,.0f} of them in a call."
        )
    else:
        lines.append(
            "Freed pages stay mapped: XLA does not pay for fresh ones at each call, as it does "
            "under the system's allocator (--allocator system)."
        )
    return lines + report.quality_remarks(result)
