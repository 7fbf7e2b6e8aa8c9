"""The goals for the speed of whole models, and the tables of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import report
from benchmarks.bars import verdict
from benchmarks.models_cases import (
    CASES,
    FLAX,
    INTERCEPTOR,
    MEANING,
    SUBJECT,
    TORCH,
    label,
)


@dataclass(frozen=True)
class Bar:
    """A limit for one figure of one model.

    Attributes:
        kind: A key of `KINDS`.
        model: The case, a key of `models_cases.CASES`.
        threshold: The least figure, or the largest where the kind says so.
        isa: The instruction set for which it holds, and for the extensions of it.
    """

    kind: str
    model: str
    threshold: float
    isa: str = "avx512"

    @property
    def name(self) -> str:
        return f"{CASES[self.model].title}, {KINDS[self.kind].what}"

    def holds(self, result: dict) -> bool:
        """Whether a run is judged by it: one thread, float32."""
        environment = result["environment"]
        is_float32 = result["settings"]["dtype"] == "float32"
        isa = environment["isa"] or ""
        return is_float32 and environment["threads"] == 1 and isa.startswith(self.isa)


@dataclass(frozen=True)
class Kind:
    """What the figure of a bar is.

    Attributes:
        what: The words for it.
        unit: Its unit.
        figure: Takes it from a case of the result; None if it was not measured.
        at_least: Whether the threshold is the least or the largest.
    """

    what: str
    unit: str
    figure: Callable[[dict], float | None]
    at_least: bool = True


def _median(entry: dict | None) -> float | None:
    return entry["median"] if entry else None


def _percent(entry: dict | None) -> float | None:
    return 100 * entry["median"] if entry else None


def _added(*steps: str) -> Callable[[dict], float | None]:
    """How much longer the named steps of building take than those of the model as it is."""

    def seconds(case: dict) -> float | None:
        ours, flax = (case["contestants"].get(name) for name in (SUBJECT, FLAX))
        if not ours or not flax:
            return None
        return sum(ours[f"{step}_seconds"] - flax[f"{step}_seconds"] for step in steps)

    return seconds


KINDS = {
    "flax": Kind("against jitted Flax", "×", lambda case: _median(case["over_ours"].get(FLAX))),
    "torch": Kind("against torch", "×", lambda case: _median(case["over_ours"].get(TORCH))),
    "interceptor": Kind(
        "time of the interceptor over accelerate",
        "×",
        lambda case: _median(case["over_ours"].get(INTERCEPTOR)),
        at_least=False,
    ),
    "share": Kind("of the way to the ceiling", "%", lambda case: _percent(case["share"])),
    "trace": Kind("added to tracing", "s", _added("trace"), at_least=False),
    "build": Kind(
        "added to tracing and compiling", "s", _added("trace", "compile"), at_least=False
    ),
}

_GPT, _BERT, _VIT, _VIT_TINY = "gpt2-prefill-1024", "bert-8x384", "vit-b16-8", "vit-ti16-8"
# The goals of the first form of this benchmark, and those of the full one.
_SPEEDS = {_GPT: (1.35, 1.38), _BERT: (1.25, 1.26), _VIT: (1.05, 1.06), _VIT_TINY: (1.2, 1.25)}
BARS = (
    *(Bar("flax", model, speed) for model, speeds in _SPEEDS.items() for speed in speeds),
    *(Bar("interceptor", model, 1.05) for model in _SPEEDS),
    Bar("trace", _GPT, 2.0),
    Bar("build", _GPT, 2.0),
    Bar("share", _GPT, 75),
    Bar("share", _BERT, 75),
    *(Bar("torch", model, 1.0) for model in CASES),
)


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars.

    Args:
        result: The run's result as `benchmarks.models` makes it.

    Returns:
        One dictionary per bar that the run measured, as `bars.verdict` makes it.
    """
    cases = {case["model"]: case for case in result["cases"]}
    verdicts = []
    for bar in BARS:
        case = cases.get(bar.model)
        if case is None or not bar.holds(result):
            continue
        kind = KINDS[bar.kind]
        figure = kind.figure(case)
        if figure is not None:
            verdicts.append(verdict(bar.name, figure, bar.threshold, kind.unit, kind.at_least))
    return verdicts


def tables(result: dict) -> list[tuple[str, report.Rows]]:
    """Make the tables: titles, and rows with the heading first."""
    cases, dtype = result["cases"], result["settings"]["dtype"]
    made = [
        (f"Time, {dtype}: ms per call (median)", _times(cases)),
        (f"Speed, {dtype}: flax's time over theirs (median)", _speeds(cases)),
        (f"Peak memory, {dtype}: MB of a call on top of weights and inputs", _memory(cases)),
        (f"What accelerate does, {dtype}", _programs(cases)),
        (f"Difference from flax's result, {dtype}", _differences(cases)),
    ]
    made = [(title, _with_something(rows)) for title, rows in made]
    return [(title, rows) for title, rows in made if len(rows[0]) > 1] + report.bars_table(result)


def _names(cases: list[dict]) -> list[str]:
    """The systems of all cases, in the order in which tables show them."""
    found = {name for case in cases for name in case["contestants"]}
    return [name for name in MEANING if name in found]


def _of_systems(cases: list[dict], shown: Callable[[dict], str]) -> report.Rows:
    """A row for each model, with what is shown of each system."""
    names = _names(cases)
    rows = [["model", *map(label, names)]]
    for case in cases:
        entries = [case["contestants"].get(name) for name in names]
        rows.append([case["title"], *("–" if e is None else shown(e) for e in entries)])
    return rows


def _times(cases: list[dict]) -> report.Rows:
    return _of_systems(cases, _milliseconds)


def _memory(cases: list[dict]) -> report.Rows:
    return _of_systems(cases, lambda entry: _megabytes(entry["memory_bytes"]))


def _differences(cases: list[dict]) -> report.Rows:
    return _of_systems(
        cases, lambda entry: f"{entry['difference']:.1e}" if "difference" in entry else "–"
    )


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{1e-6 * size:.0f}"


def _milliseconds(entry: dict) -> str:
    time = entry["ms"]["median"]
    return f"{time:.{2 if time < 100 else 0}f}" + ("†" if entry["doubtful"] else "")


def _speeds(cases: list[dict]) -> report.Rows:
    others = [name for name in _names(cases) if name not in (FLAX, SUBJECT, TORCH)]
    ours = f"{SUBJECT} (quartiles)"
    rows = [["model", ours, *map(label, others), f"{TORCH} / {SUBJECT}", "share of the ceiling"]]
    for case in cases:
        against_torch, share = _median(case["over_ours"].get(TORCH)), _percent(case["share"])
        rows.append(
            [
                case["title"],
                report.spread(case["speed"][SUBJECT]) if SUBJECT in case["speed"] else "–",
                *(_ratio(_median(case["speed"].get(name))) for name in others),
                _ratio(against_torch),
                "–" if share is None else f"{share:.0f} %",
            ]
        )
    return rows


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _programs(cases: list[dict]) -> report.Rows:
    """What is replaced and what is left, and the time of tracing and compiling."""
    rows = [["model", "calls put in", "left", "traced, s", "compiled, s"]]
    for case in cases:
        ours, flax = (case["contestants"].get(name) for name in (SUBJECT, FLAX))
        times = (
            f"{flax[step]:.2f} → {ours[step]:.2f}" if ours and flax else "–"
            for step in ("trace_seconds", "compile_seconds")
        )
        rows.append([case["title"], _counts(case["replaced"]), _counts(case["left"]), *times])
    return rows


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items()) or "–"


def _with_something(rows: report.Rows) -> report.Rows:
    """The rows without the columns that a run has nothing for."""
    kept = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def heading(result: dict) -> str:
    """What was measured, for the heading of a section."""
    return "M" + result["benchmark"][1:]


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    names = _names(result["cases"])
    meanings = "; ".join(f"{name}: {MEANING[name]}" for name in names)
    long_enough = f"{1e3 * settings['reading_seconds']:g} ms"
    lines = [
        "Weights are random, of the published sizes: speed does not depend on them, "
        "quality is not what is measured here.",
        f"{settings['rounds']} interleaved rounds with all systems of a model in the same ones, in "
        f"a random order each; readings of one call, or of as many as make {long_enough}.",
        f"{meanings[0].upper()}{meanings[1:]}.",
        "GPT-2 gives the logits of the last position, as generation needs; the token after 1023 "
        "reads a full cache (Flax's decode=True), which is donated. BERT has padding: texts from "
        "half to all of the length, and fused attention skips keys that are padding. GELU has the "
        "tanh form in GPT-2 and ViT (Flax's default; Hugging Face's ViT has erf), the erf form in "
        "BERT.",
    ]
    if any(SUBJECT in case["contestants"] for case in result["cases"]):
        lines.append(
            "Calls put in, and left: what quake_jax.explain says. Traced, compiled: CPU time with "
            "empty caches, flax → accelerate."
        )
    lines.append(
        "Peak memory: the growth of the process during the first call. Difference: length of the "
        "difference from flax's result relative to that result's length; a run with more than the "
        "bounds of the orders allow stops."
    )
    if any(case["share"] for case in result["cases"]):
        lines.append(
            "Share of the ceiling: the part of the time between flax and ceiling that accelerate "
            "saves. The ceiling does none of attention's own products, so 100 % cannot be reached."
        )
    if settings["dtype"] == "bfloat16":
        lines.append(
            "XLA for CPUs multiplies matrices in float32: every system but torch converts its "
            "weights in each call, and when it decodes the whole cache as well."
        )
    if result["environment"]["isa"] == "avx2":
        lines.append("AVX2 is forced on quake_jax alone: the other libraries use AVX-512 too.")
    if settings["allocator"] == "system":
        lines.append("The system's allocator was left as it is: page faults are part of the times.")
    else:
        lines.append(
            "Freed pages stay mapped: nobody pays for fresh ones at each call, as XLA's large "
            "temporaries do under the system's allocator (--allocator system)."
        )
    return lines + report.quality_remarks(result)
