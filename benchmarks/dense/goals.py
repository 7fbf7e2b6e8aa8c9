"""The speeds of dense layers that the project set itself as a goal."""

from collections import Counter
from collections.abc import Iterable

from benchmarks.dense import cases
from benchmarks.dense.cases import FORMATS, FUSED, LAYERS, PEERS, ROWS, SHAPES, Case, Shape
from benchmarks.harness import bars
from benchmarks.harness.bars import Bar, Figure, Kind
from benchmarks.harness.hardware import MATRIX_INT8
from benchmarks.harness.pages import median

BF16 = "avx512bf16"  # such a CPU has the instructions of int8 too
ANY = ""  # every instruction set
MODEL = "GPT-2 small, 124 M weights"


def name_of(format_: str) -> str:
    """The name of our contestant."""
    return f"quake {format_}"


def _ratio(entry: dict, subject: str, others: Iterable[str]) -> float | None:
    """Speed of ours over that of the fastest of these others which were measured."""
    return bars.least(entry, name_of(subject), others)


def against(*others: str) -> Figure:
    return lambda entry, subject: _ratio(entry, subject, others)


def fastest_peer(entry: dict, subject: str) -> float | None:
    """Speed of ours over that of the fastest other library with the same precision."""
    precision = cases.precision(subject)
    return _ratio(entry, subject, [name for name, of in PEERS.items() if of == precision])


def fastest_xla(*endings: str) -> Figure:
    """The same of XLA's forms, or of those whose names have one of the endings."""

    def figure(entry: dict, subject: str) -> float | None:
        forms = [name for name, of in cases.XLA.items() if of == subject]
        return _ratio(entry, subject, [name for name in forms if name.endswith(endings)])

    return figure


def share(of: str) -> Figure:
    percent = bars.percent_of(of)
    return lambda entry, subject: percent(entry, name_of(subject))


def _share_of_vector_peak(entry: dict, subject: str) -> float | None:
    """Of formats that instructions for vectors multiply: the bars were set for these."""
    matrices = subject != "float32" and MATRIX_INT8 in entry.get("peaks_gflops", ())
    return None if matrices else share("peak")(entry, subject)


def _cost(entry: dict, subject: str) -> float | None:
    """By how many percent what is fused makes the product longer."""
    found = median(entry["relative"].get(name_of(subject)))
    return None if found is None else 100 * (found - 1)


def _stated(key: str) -> Figure:
    """What stands in an entry of its own for each subject."""
    return lambda entry, subject: median(entry[key]) if entry["subject"] == subject else None


PEAK = Kind("{subject}, of the peak of its instruction", "%", _share_of_vector_peak)
READ = Kind("{subject}, of the fastest read loop", "%", share("read"))
FLOAT32 = Kind("{subject} against our float32", "×", against(name_of("float32")))
_over_int8 = bars.inverse(against(name_of("int8")))
INT8 = Kind("time of {subject} over int8", "×", _over_int8, at_least=False)
PEER = Kind("{subject} against the fastest peer", "×", fastest_peer)
XLA_ANY = Kind("{subject} against XLA", "×", fastest_xla(""))
XLA_ARGUMENTS = Kind("{subject} against XLA, weights as arguments", "×", fastest_xla("16", "32"))
XLA_CONSTANTS = Kind("{subject} against XLA, weights as constants", "×", fastest_xla("constants"))
FLAX = Kind("{subject} against what Flax traces to", "×", against("XLA bfloat16"))
COST = Kind("{subject}, cost of what is fused", "%", _cost, at_least=False)
SPEEDUP = Kind("{subject}, two threads over one", "×", _stated("speedup"), entries="scaling")
NORM = Kind("{subject} against XLA", "×", _stated("speed"), entries="norms")
PACKING = Kind("packing as {subject}", "s", _stated("seconds"), at_least=False, entries="packing")


def norm_case(name: str) -> str:
    """What a norm is called."""
    return f"{name} {'×'.join(map(str, cases.NORM_SHAPE))}"


def _bars(
    kind: Kind, shapes: Iterable[Shape], threshold: float, *subjects: str, form="bias", **conditions
) -> list[Bar]:
    """A bar for each shape and subject, for CPUs with the instructions of the format."""

    def isa(subject: str) -> str:
        return "avx512" if subject == "float32" else BF16

    return [
        Bar(kind, Case(s, form), threshold, f, **{"isa": isa(f), **conditions})
        for f in subjects
        for s in shapes
        if cases.fits(f, s)
    ]


def _all(rows: Iterable[int], layers: Iterable[tuple[int, int]] = LAYERS) -> list[Shape]:
    return [s for s in SHAPES if s.m in rows and (s.k, s.n) in layers]


_FROM_8, MANY = ([m for m in ROWS if m >= least] for least in (8, 128))
LARGE_MANY = _all(MANY, [(k, n) for k, n in LAYERS if min(k, n) >= 768])
WITH_PEERS = [name for name in FORMATS if cases.precision(name) in PEERS.values()]
_SMALL_INT8 = Shape(3072, 768, 768)  # where the output takes as long as the product
_SPEED = (
    *_bars(PEAK, LARGE_MANY, 93, "float32"),
    *_bars(PEAK, _all(MANY, [(192, 768)]), 85, "float32"),
    *_bars(PEAK, LARGE_MANY, 85, "bfloat16"),
    *_bars(FLOAT32, LARGE_MANY, 1.85, "bfloat16"),
    *_bars(PEAK, LARGE_MANY, 75, "int8"),
    *_bars(FLOAT32, [s for s in LARGE_MANY if s != _SMALL_INT8], 3.3, "int8"),
    *_bars(FLOAT32, [_SMALL_INT8], 2.6, "int8"),
    *_bars(INT8, LARGE_MANY, 1.15, "int4/128"),
    *_bars(INT8, LARGE_MANY, 1.30, "int4/32"),
    *_bars(FLOAT32, _all((4, 8)), 3.0, "int8"),
)
_BARE = tuple(_bars(PEER, _all(_FROM_8), 0.97, *WITH_PEERS))
_WITH_GELU = [s for s in _all(_FROM_8) if s.flops <= cases.GELU_FLOPS]
_GELU = tuple(_bars(PEER, _WITH_GELU, 0.0, *WITH_PEERS, form="gelu"))
_MEMORY = (
    *_bars(READ, _all([1]), 90, *(f for f in FORMATS if "/32" not in f)),
    *_bars(READ, _all([1]), 87, *(f for f in FORMATS if "/32" in f)),
    *_bars(FLOAT32, _all([1]), 3.5, *(f for f in FORMATS if cases.bytes_of(f) == 1)),
    *_bars(FLOAT32, _all([1]), 6.3, *(f for f in FORMATS if cases.bytes_of(f) < 1)),
    *_bars(PEER, _all([1]), 1.0, *WITH_PEERS),
)
_XLA = (
    *_bars(XLA_ANY, _all([1024]), 1.0, "bfloat16"),
    *_bars(XLA_ANY, _all([128]), 1.15, "bfloat16"),
    *_bars(XLA_ANY, _all([8]), 2.0, "bfloat16"),
    *_bars(XLA_ARGUMENTS, _all([1]), 10.0, "bfloat16"),
    *_bars(XLA_CONSTANTS, _all([1]), 2.0, "bfloat16"),
    *_bars(FLAX, _all(MANY), 1.9, "bfloat16"),
)
_FUSED = (
    *_bars(COST, [FUSED], 6, "float32", form="all"),
    *_bars(COST, [FUSED], 18, "int8", form="all"),
)
_OTHER = (
    *_bars(PEAK, LARGE_MANY, 90, "float32", isa="avx2"),
    *_bars(FLOAT32, LARGE_MANY, 1.5, "int8", isa="avx2"),
    *_bars(SPEEDUP, cases.SCALED, 1.85, "float32", "int8", isa=ANY, threads=2),
    Bar(NORM, norm_case("layer_norm"), 2.0, "float32", ANY),
    Bar(PACKING, MODEL, 2.0, "int8", ANY),
)
BARS = (*_SPEED, *_BARE, *_MEMORY, *_XLA, *_FUSED, *_OTHER)
# Of all shapes together: the bars whose figures have this geometric mean at least.
MEANS = (
    ("geometric mean against the fastest peer", _BARE, 1.0),
    ("geometric mean with GELU against the fastest peer", _GELU, 1.1),
)


def case_of(entry: dict) -> Case | str:
    """The case of an entry of a result; what is no layer has a name."""
    return entry.get("case") or Case(Shape(entry["m"], entry["k"], entry["n"]), entry["form"])


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars: verdicts on those that it measured."""
    means = [
        (f"{subject}, {name}", [bar for bar in of if bar.subject == subject], threshold)
        for name, of, threshold in MEANS
        for subject in WITH_PEERS
    ]
    return bars.judge(result, case_of, BARS, means)


def not_measured(result: dict) -> dict[str, int]:
    """How many of the other bars of each kind the run has no figure for: another choice of shapes,
    or a library that is not installed.
    """
    held = [bar for bar in BARS if bar.holds(result["environment"])]
    found = [bar for bar, _ in bars.figures(held, result, case_of)]
    counts = Counter(bar.what for bar in held)
    counts.subtract(bar.what for bar in found)
    return {what: count for what, count in counts.items() if count}
