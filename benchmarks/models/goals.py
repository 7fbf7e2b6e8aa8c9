"""The speeds of whole models that the project set itself as a goal."""

from __future__ import annotations

from benchmarks.harness import bars
from benchmarks.harness.bars import Bar, Figure, Kind
from benchmarks.harness.pages import median
from benchmarks.harness.peers import TORCH as TORCH_SYSTEM
from benchmarks.models.cases import CASES, FLAX, INTERCEPTOR, SUBJECT, Case


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


JITTED = Kind("against jitted Flax", "×", _over_ours(FLAX))
TORCH = Kind("against torch", "×", _over_ours(TORCH_SYSTEM))
INTERCEPTED = Kind(
    "time of the interceptor over accelerate", "×", _over_ours(INTERCEPTOR), at_least=False
)
SHARE = Kind("of the way to the ceiling", "%", lambda case, _: bars.percent(case["share"]))
TRACE = Kind("added to tracing", "s", _added("trace"), at_least=False)
BUILD = Kind("added to tracing and compiling", "s", _added("trace", "compile"), at_least=False)

_GPT, _BERT, _VIT, _VIT_TINY = "gpt2-prefill-1024", "bert-8x384", "vit-b16-8", "vit-ti16-8"
# The goals of the first form of this benchmark, and those of the full one.
_SPEEDS = {_GPT: (1.35, 1.38), _BERT: (1.25, 1.26), _VIT: (1.05, 1.06), _VIT_TINY: (1.2, 1.25)}


def _bar(kind: Kind, model: str, threshold: float) -> Bar:
    return Bar(kind, CASES[model], threshold, SUBJECT)


BARS = (
    *(_bar(JITTED, model, speed) for model, speeds in _SPEEDS.items() for speed in speeds),
    *(_bar(INTERCEPTED, model, 1.05) for model in _SPEEDS),
    _bar(TRACE, _GPT, 2.0),
    _bar(BUILD, _GPT, 2.0),
    _bar(SHARE, _GPT, 75),
    _bar(SHARE, _BERT, 75),
    *(_bar(TORCH, model, 1.0) for model in CASES),
)


def case_of(entry: dict) -> Case:
    """The case of an entry of a result."""
    return CASES[entry["model"]]


def judge(result: dict) -> list[dict]:
    """Compare a run in float32 with the bars: verdicts on those that it measured."""
    if result["settings"]["dtype"] != "float32":
        return []
    return bars.verdicts(bars.figures(BARS, result, case_of))
