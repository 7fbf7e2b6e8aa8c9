"""The speeds that the project set itself as a goal, and whether a run reaches them.

A bar holds for one number of threads and one instruction set; other runs are not judged by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import figures
from benchmarks.cases import (
    DRAM_FUNCTIONS,
    FUNCTIONS,
    GPT_SHAPE,
    L2_SHAPE,
    SUBJECT_ORDER,
    VIT_SHAPE,
    VOCABULARY_SHAPE,
    l2_shape,
)
from benchmarks.instructions import FUNCTORS
from benchmarks.scaling import FUNCTIONS as SCALED

CALL_OVERHEAD_US = 1.0  # of one operator of 16 elements inside a jitted program, over XLA's own


@dataclass(frozen=True)
class Bar:
    """A limit for one figure of one operator.

    Attributes:
        function: Name of the operator.
        shape: Shape of the case.
        dtype: dtype of its arrays.
        threshold: The least figure, or the largest where `kind` says so.
        kind: A key of `KINDS`.
        order: Order of the approximation.
        against: For "speed", the name of the other contestant, or "fastest" of all of them.
        isa: The instruction set for which it holds, and for the extensions of it that begin
            with its name: avx512bf16 is avx512 with other bfloat16 kernels.
        threads: The number of threads for which it holds.
    """

    function: str
    shape: tuple[int, ...]
    dtype: str
    threshold: float
    kind: str = "speed"
    order: int = SUBJECT_ORDER
    against: str = "jax.nn"
    isa: str = "avx512"
    threads: int = 1

    @property
    def name(self) -> str:
        shape = "×".join(map(str, self.shape))
        what = KINDS[self.kind].what.format(against=self.against)
        return f"{self.function} {shape} {self.dtype}, order {self.order}, {what}"

    def holds(self, environment: dict) -> bool:
        """Whether a run under these conditions is judged by it."""
        isa = environment["isa"] or ""
        return environment["threads"] == self.threads and isa.startswith(self.isa)


@dataclass(frozen=True)
class Kind:
    """What the figure of a bar is.

    Attributes:
        what: The words for it; `{against}` is the bar's.
        unit: Its unit.
        figure: Takes it from a bar and the entry of the result; None if it was not measured.
        at_least: Whether the threshold is the least or the largest.
    """

    what: str
    unit: str
    figure: Callable[[Bar, dict], float | None]
    at_least: bool = True


def _speed(bar: Bar, case: dict) -> float | None:
    ratios = case["ratios"].get(f"order {bar.order}", {})
    if bar.against == "fastest":
        found = figures.fastest(ratios)
        return found[1]["median"] if found else None
    return ratios[bar.against]["median"] if bar.against in ratios else None


def _measured(figure: Callable[[dict, str], float | None]) -> Callable[[Bar, dict], float | None]:
    """The figure of the bar's order, where that was measured."""

    def of_order(bar: Bar, case: dict) -> float | None:
        name = f"order {bar.order}"
        return figure(case, name) if name in case["contestants"] else None

    return of_order


KINDS = {
    "speed": Kind("against {against}", "×", _speed),
    "copy": Kind(
        "bandwidth of a copy", "%", _measured(lambda c, n: 100 * figures.share_of_copy(c, n))
    ),
    "bound": Kind("over the counted bound", "×", _measured(figures.over_bound), at_least=False),
    "scaling": Kind("two threads", "×", lambda bar, entry: entry["speedup"]["median"]),
}

_CACHED = (L2_SHAPE, VIT_SHAPE)
_16_BIT = ("bfloat16", "float16")
# The first targets, of the softmax and activation kernels.
_FIRST = (
    Bar("softmax", VIT_SHAPE, "float32", 3.2),
    Bar("softmax", L2_SHAPE, "float32", 2.8),
    Bar("softmax", GPT_SHAPE, "float32", 3.5),
    Bar("softmax", L2_SHAPE, "float32", 3.5, order=1),
    Bar("exp", VIT_SHAPE, "float32", 3.0),
    Bar("gelu_tanh", VIT_SHAPE, "float32", 3.0),
    Bar("gelu_erf", VIT_SHAPE, "float32", 4.0),
    Bar("sigmoid", VIT_SHAPE, "float32", 2.0),
)
_AGAINST_FASTEST = (
    *(
        Bar(function, shape, "float32", 1.6, against="fastest")
        for function in ("softmax", "log_softmax")
        for shape in (*_CACHED, VOCABULARY_SHAPE)
    ),
    *(Bar("gelu_tanh", shape, "float32", 2.5, against="fastest") for shape in _CACHED),
    *(Bar("gelu_erf", shape, "float32", 2.0, against="fastest") for shape in _CACHED),
    *(
        Bar(function, L2_SHAPE, "float32", 1.5, against="fastest")
        for function in ("sigmoid", "silu", "tanh", "exp")
    ),
    *(
        Bar(function, l2_shape(function), dtype, 1.8, against="fastest")
        for dtype in _16_BIT
        for function in FUNCTIONS
    ),
)
_AGAINST_JAX = (
    *(Bar("softmax", shape, "float32", 3.5) for shape in _CACHED),
    *(Bar("softmax", shape, "float32", 2.5, order=5) for shape in _CACHED),
    *(Bar("gelu_erf", shape, "float32", 5.0) for shape in _CACHED),
    *(Bar("exp", shape, "float32", 3.5) for shape in _CACHED),
    *(Bar("exp", shape, "float32", 3.0, order=5) for shape in _CACHED),
    Bar("gelu_tanh", L2_SHAPE, "bfloat16", 10.0),
    Bar("sigmoid", L2_SHAPE, "bfloat16", 6.0),
)
_AGAINST_HARDWARE = (
    Bar("exp", L2_SHAPE, "float32", 80, kind="copy"),
    Bar("sigmoid", L2_SHAPE, "float32", 50, kind="copy"),
    Bar("tanh", L2_SHAPE, "float32", 50, kind="copy"),
    *(
        Bar(function, l2_shape(function), "float32", 1.25, kind="bound")
        for function in FUNCTORS
        if function not in ("exp", "sigmoid", "tanh")
    ),
    *(Bar(function, GPT_SHAPE, "float32", 90, kind="copy") for function in DRAM_FUNCTIONS),
)
_AVX2 = tuple(
    Bar(function, shape, "float32", 2.0, isa="avx2")
    for function in ("softmax", "gelu_tanh", "gelu_erf")
    for shape in _CACHED
)
_SCALING = tuple(
    Bar(function, VIT_SHAPE, "float32", 1.7, kind="scaling", threads=2) for function in SCALED
)
BARS = (*_FIRST, *_AGAINST_FASTEST, *_AGAINST_JAX, *_AGAINST_HARDWARE, *_AVX2, *_SCALING)


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars.

    Args:
        result: The run's result as `benchmarks.ops` makes it.

    Returns:
        One dictionary per bar that the run measured: name, figure, threshold, unit, at_least, met.
    """
    environment = result["environment"]
    verdicts = []
    for bar in BARS:
        if not bar.holds(environment):
            continue
        kind = KINDS[bar.kind]
        for entry in result["scaling"] if bar.kind == "scaling" else result["cases"]:
            case = entry["function"], tuple(entry["shape"]), entry["dtype"]
            if case == (bar.function, bar.shape, bar.dtype):
                figure = kind.figure(bar, entry)
                if figure is not None:
                    verdicts.append(
                        verdict(bar.name, figure, bar.threshold, kind.unit, kind.at_least)
                    )
    if BARS[0].holds(environment):
        for name, overhead in (result["call_overhead"] or {}).items():
            figure = overhead["difference_us"]
            verdicts.append(
                verdict(
                    f"call overhead, {name}, 16 elements", figure, CALL_OVERHEAD_US, "µs", False
                )
            )
    return verdicts


def verdict(name: str, figure: float, threshold: float, unit: str, at_least: bool) -> dict:
    """What `report` shows of one bar."""
    return {
        "name": name,
        "figure": figure,
        "threshold": threshold,
        "unit": unit,
        "at_least": at_least,
        "met": figure >= threshold if at_least else figure <= threshold,
    }
