"""The speeds of whole models that the project set itself as a goal."""

from benchmarks.harness import bars, peers
from benchmarks.harness.bars import Bar, Figure, Kind
from benchmarks.harness.pages import median
from benchmarks.models import cases
from benchmarks.models.cases import CALIBRATED, CASES, FLAX, PACKED, STATIC, SUBJECT, Case

DTYPE = "float32"  # of the models that are judged
BF16 = "avx512bf16"  # such a CPU has the instructions of int8 too


def _over_ours(other: str) -> Figure:
    return lambda case, _: median(case["over_ours"].get(other))


def _added(*steps: str) -> Figure:
    """How much longer the named steps of building take than those of the model as it is."""

    def seconds(case: dict, subject: str) -> float | None:
        ours, flax = (case["contestants"].get(name) for name in (subject, FLAX))
        if not ours or not flax:
            return None
        return sum(ours[f"{step}_seconds"] - flax[f"{step}_seconds"] for step in steps)

    return seconds


def fastest(case: dict, subject: str) -> tuple[float, str] | None:
    """How many times as long as ours the fastest peer of the same precision takes, and which it is:
    of those that quantise activations in the call, or know their ranges before, as ours does.
    """
    ratios, is_static = case["ratios"].get(subject, {}), subject == CALIBRATED
    found = [(r["median"], name) for name, r in ratios.items() if (name == STATIC) == is_static]
    return min(found, default=None)


def _over_fastest(case: dict, subject: str) -> float | None:
    found = fastest(case, subject)
    return found and found[0]


JITTED = Kind("against jitted Flax", "×", _over_ours(FLAX))
TORCH = Kind("against torch", "×", _over_ours(peers.TORCH))
_WHAT = "time of the interceptor over accelerate"
INTERCEPTED = Kind(_WHAT, "×", _over_ours(cases.INTERCEPTOR), at_least=False)
PACKED_FLAX = Kind("{subject} against jitted Flax", "×", bars.listed("speed"))
PEER = Kind("{subject} against the fastest peer of the same precision", "×", _over_fastest)
_speed = bars.inverse(bars.listed("over_ours"))
PACKED_SUBJECT = Kind("{subject} against accelerate", "×", _speed)
SHARE = Kind("of the way to the ceiling", "%", lambda case, _: bars.percent(case["share"]))
TRACE = Kind("added to tracing", "s", _added("trace"), at_least=False)
BUILD = Kind("added to tracing and compiling", "s", _added("trace", "compile"), at_least=False)

_GPT, _BERT, _VIT, _VIT_TINY = "gpt2-prefill-1024", "bert-8x384", "vit-b16-8", "vit-ti16-8"
# The goals of the first form of this benchmark, and those of the full one.
_SPEEDS = {_GPT: (1.35, 1.38), _BERT: (1.25, 1.26), _VIT: (1.05, 1.06), _VIT_TINY: (1.2, 1.25)}
# Those of packed weights against jitted Flax in float32.
_DECODE = "gpt2-decode-1024"
_PACKED_SPEEDS: dict[str, dict[str, float]] = {
    _GPT: {"bfloat16": 2.4, "int8": 3.5, "int8-attention": 3.8},
    _BERT: {"bfloat16": 2.3, "int8": 3.4, "int8-attention": 3.8},
    "bert-1x128": {"bfloat16": 2.3, "int8": 4.0},
    _VIT: {"bfloat16": 2.1, "int8": 3.2, "int8-attention": 3.5},
    "minilm-32x128": {"bfloat16": 2.4, "int8": 3.2, "int8-attention": 3.6},
    _VIT_TINY: {"bfloat16": 1.9, "int8": 2.6},
    _DECODE: {"int8": 3.0, "int4": 4.0, "int8-attention": 3.5, "int4-attention": 5.0},
}
# And against the fastest peer.
_PEER_SPEEDS = {"float32": 1.0, "bfloat16": 1.0, "int8": 1.1, "int8-attention": 1.1}
_PEER_DECODES = _PEER_SPEEDS | {
    "int8": 1.3,
    "int4": 1.3,
    "int8-attention": 1.4,
    "int4-attention": 1.4,
}


def _bar(kind: Kind, model: str, threshold: float, subject: str = SUBJECT) -> Bar:
    isa = "avx512" if PACKED.get(subject, DTYPE) == DTYPE else BF16
    return Bar(kind, CASES[model], threshold, subject, isa)


def _of_packed(kind: Kind, model: str, thresholds: dict[str, float]) -> list[Bar]:
    return [_bar(kind, model, least, f"pack-{weights}") for weights, least in thresholds.items()]


BARS = (
    *(_bar(JITTED, model, speed) for model, speeds in _SPEEDS.items() for speed in speeds),
    *(_bar(INTERCEPTED, model, 1.05) for model in _SPEEDS),
    _bar(TRACE, _GPT, 2.0),
    _bar(BUILD, _GPT, 2.0),
    _bar(SHARE, _GPT, 75),
    _bar(SHARE, _BERT, 75),
    *(_bar(TORCH, model, 1.0) for model in CASES),
    *(bar for one, least in _PACKED_SPEEDS.items() for bar in _of_packed(PACKED_FLAX, one, least)),
    *(
        bar
        for model, case in CASES.items()
        for bar in _of_packed(PEER, model, _PEER_DECODES if case.decodes else _PEER_SPEEDS)
    ),
)
_AGAINST_STATIC = tuple(
    _bar(PEER, name, 1.0, CALIBRATED) for name, case in CASES.items() if not case.decodes
)
# The bars whose figures have a geometric mean of at least so much, by what that is.
MEANS = {
    "pack-float32 against accelerate": (
        tuple(_bar(PACKED_SUBJECT, model, 1.0, "pack-float32") for model in CASES),
        1.08,
    ),
    f"{CALIBRATED} against {STATIC}": (_AGAINST_STATIC, 1.0),
}


def case_of(entry: dict) -> Case:
    """The case of an entry of a result."""
    return CASES[entry["model"]]


def judge(result: dict) -> list[dict]:
    """Compare a run in float32 with the bars: verdicts on those that it measured."""
    means = [(f"{name}, geometric mean", *of) for name, of in MEANS.items()]
    return bars.judge(result, case_of, BARS, means) if result["settings"]["dtype"] == DTYPE else []
