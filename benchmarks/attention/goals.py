"""The speeds of attention that the project set itself as a goal."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.attention.cases import (
    BERT,
    DECODE,
    GPT,
    GROUPED,
    LONG,
    SHAPES,
    SUBJECT_ORDER,
    VIT,
    VIT_BATCH,
    Case,
    Shape,
    masks,
)
from benchmarks.harness import bars
from benchmarks.harness.bars import Bar, Kind
from benchmarks.harness.pages import median

# Against torch, over all shapes and masks in float32.
GEOMETRIC_MEAN = 1.25
GEOMETRIC_MEAN_NAME = "geometric mean of all float32, against torch"


def _against(other: str) -> Callable[[dict, str], float | None]:
    return lambda case, name: median(case["ratios"].get(name, {}).get(other))


def _relative(to: str) -> Callable[[dict, str], float | None]:
    return lambda case, name: median(case["relative"].get(to, {}).get(name))


def _share(of: str) -> Callable[[dict, str], float | None]:
    def percent(case: dict, name: str) -> float | None:
        share = median(case["contestants"].get(name, {}).get(f"share_of_{of}"))
        return None if share is None else 100 * share

    return percent


def _over_float32(case: dict, name: str) -> float | None:
    time = _relative("float32")(case, name)
    return None if time is None else 1 / time


XLA = Kind("against XLA", "×", _against("XLA"))
TORCH = Kind("against torch", "×", _against("torch"))
PEAK = Kind("of the peak of fused multiply-adds", "%", _share("peak"))
READ = Kind("of the bandwidth of reading", "%", _share("read"))
UNMASKED = Kind("time over unmasked", "×", _relative("none"), at_least=False)
ARRAY = Kind("time over is_causal", "×", _relative("causal"), at_least=False)
FLOAT32 = Kind("against our float32", "×", _over_float32)


def _bar(
    kind: Kind,
    shape: Shape,
    threshold: float,
    mask: str = "none",
    dtype: str = "float32",
    isa: str = "avx512",
) -> Bar:
    return Bar(kind, Case(shape, mask, dtype), threshold, f"order {SUBJECT_ORDER}", isa)


BARS = (
    *(_bar(XLA, shape, 3.0) for shape in (VIT_BATCH, BERT, GPT)),
    _bar(XLA, GROUPED, 2.5),
    _bar(XLA, VIT, 1.4),
    _bar(XLA, GPT, 5.0, mask="causal"),
    _bar(XLA, LONG, 8.0, mask="causal"),
    *(
        _bar(TORCH, shape, 1.0, mask=mask)
        for shape in SHAPES
        for mask in masks(shape)
        if mask != "causal array"  # the same as causal, to torch
    ),
    *(_bar(PEAK, shape, 82) for shape in (GPT, LONG, GROUPED)),
    *(_bar(PEAK, shape, 68) for shape in (VIT, VIT_BATCH)),
    _bar(UNMASKED, LONG, 0.56, mask="causal"),
    *(_bar(ARRAY, shape, 1.15, mask="causal array") for shape in (GPT, LONG)),
    *(
        _bar(FLOAT32, shape, 1.5, dtype="bfloat16", isa="avx512bf16")
        for shape in (GPT, LONG, GROUPED)
    ),
    _bar(READ, DECODE, 80),
    *(_bar(XLA, shape, 2.0, isa="avx2") for shape in (BERT, GPT, LONG, GROUPED)),
)


def case_of(entry: dict) -> Case:
    """The case of an entry of a result."""
    return Case(Shape.parse(entry["shape"]), entry["mask"], entry["dtype"])


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars: verdicts on those that it measured."""
    found = bars.figures(BARS, result, case_of)
    verdicts = bars.verdicts(found)
    over_torch = [figure for bar, figure in found if bar.kind == TORCH]
    # The mean of a part would be another figure.
    if len(over_torch) == sum(bar.kind == TORCH for bar in BARS):
        mean = math.exp(math.fsum(map(math.log, over_torch)) / len(over_torch))
        verdicts.append(bars.verdict(GEOMETRIC_MEAN_NAME, mean, GEOMETRIC_MEAN, "×", True))
    return verdicts
