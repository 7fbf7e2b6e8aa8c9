"""The speeds of attention that the project set itself as a goal."""

from benchmarks.attention import cases
from benchmarks.attention.cases import (
    BERT,
    DECODE,
    GPT,
    GROUPED,
    LONG,
    SMALL,
    VIT,
    VIT_BATCH,
    Case,
    Shape,
)
from benchmarks.harness import bars
from benchmarks.harness.bars import Bar, Figure, Kind
from benchmarks.harness.pages import median

# Against torch, over all shapes and masks in float32.
GEOMETRIC_MEAN = 1.25
GEOMETRIC_MEAN_NAME = "geometric mean of all float32, against torch"


def _relative(to: str) -> Figure:
    return lambda case, name: median(case["relative"].get(to, {}).get(name))


XLA = Kind("against XLA", "×", bars.against("XLA"))
TORCH = Kind("against torch", "×", bars.against("torch"))
PEAK = Kind("of the peak of fused multiply-adds", "%", bars.percent_of("peak"))
READ = Kind("of the bandwidth of reading", "%", bars.percent_of("read"))
UNMASKED = Kind("time over unmasked", "×", _relative("none"), at_least=False)
ARRAY = Kind("time over is_causal", "×", _relative("causal"), at_least=False)
FLOAT32 = Kind("against our float32", "×", bars.inverse(_relative("float32")))
PRODUCTS, BYTES = (
    Kind(f"with products of {dtype}", "×", bars.inverse(bars.against(name)))
    for name, dtype in cases.PRODUCTS.items()
)


def _bar(
    kind: Kind, shape: Shape, threshold: float, mask="none", dtype="float32", isa="avx512"
) -> Bar:
    return Bar(kind, Case(shape, mask, dtype), threshold, f"order {cases.SUBJECT_ORDER}", isa)


BARS = (
    *(_bar(XLA, shape, 3.0) for shape in (VIT_BATCH, BERT, GPT)),
    _bar(XLA, GROUPED, 2.5),
    _bar(XLA, VIT, 1.4),
    _bar(XLA, GPT, 5.0, mask="causal"),
    _bar(XLA, LONG, 8.0, mask="causal"),
    *(
        _bar(TORCH, shape, 1.0, mask=mask)
        for shape in cases.SHAPES
        for mask in cases.masks(shape)
        if mask not in ("causal array", *cases.CACHES)  # the same as causal, to torch
    ),
    *(_bar(PEAK, shape, 86) for shape in (GPT, LONG)),
    _bar(PEAK, GROUPED, 82),
    _bar(PEAK, VIT, 68),
    _bar(PEAK, VIT_BATCH, 75),
    _bar(UNMASKED, LONG, 0.56, mask="causal"),
    *(_bar(ARRAY, shape, 1.15, mask="causal array") for shape in (GPT, LONG)),
    *(_bar(FLOAT32, s, 1.8, dtype="bfloat16", isa="avx512bf16") for s in (GPT, LONG, GROUPED)),
    *(_bar(FLOAT32, s, 1.5, dtype="bfloat16", isa="avx512bf16") for s in (VIT_BATCH, SMALL)),
    *(_bar(PRODUCTS, s, 1.8, isa="avx512bf16") for s in (GPT, LONG, GROUPED)),
    *(_bar(PRODUCTS, s, 1.5, isa="avx512bf16") for s in (VIT_BATCH, SMALL)),
    *(_bar(BYTES, s, 2.6, isa="avx512bf16") for s in (GPT, LONG, GROUPED)),
    *(_bar(BYTES, s, 2.1, isa="avx512bf16") for s in (VIT_BATCH, SMALL)),
    *(_bar(READ, DECODE, 80, mask=mask) for mask in ("none", *cases.CACHES)),
    *(_bar(XLA, shape, 2.0, isa="avx2") for shape in (BERT, GPT, LONG, GROUPED)),
)


def case_of(entry: dict) -> Case:
    """The case of an entry of a result."""
    return Case(Shape.parse(entry["shape"]), entry["mask"], entry["dtype"])


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars: verdicts on those that it measured."""
    against_torch = [bar for bar in BARS if bar.kind == TORCH]
    mean = GEOMETRIC_MEAN_NAME, against_torch, GEOMETRIC_MEAN
    return bars.judge(result, case_of, BARS, [mean])
