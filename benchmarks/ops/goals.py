"""The speeds of operators that the project set itself as a goal."""

from collections.abc import Sequence

from benchmarks.harness import bars
from benchmarks.harness.bars import Bar, Figure, Kind
from benchmarks.harness.pages import median
from benchmarks.ops import cases as all_cases
from benchmarks.ops.cases import GPT_SHAPE, SUBJECT_ORDER, VIT_SHAPE, Case, l2_shape
from benchmarks.ops.operators import FUNCTIONS, OPERATORS

CALL_OVERHEAD_US = 1.0  # of one operator of 16 elements inside a jitted program, over XLA's own
JUDGED_CALLS = ("tanh", "softmax")
# One thread is compared with two on these, at VIT_SHAPE.
SCALED = ("softmax", "log_softmax", "gelu_tanh", "exp")


# --- Figures that reports, bars and plots take from one case of a result


def systems(case: dict) -> list[str]:
    """The contestants that compute the function: not the copies, not the clock."""
    return [name for name, entry in case["contestants"].items() if "relative_error" in entry]


def subject(case: dict) -> str:
    """Whose speed is stated: order 3, or the first of ours in a run without it."""
    name = f"order {SUBJECT_ORDER}"
    return name if name in case["ratios"] else next(iter(case["ratios"]))


def fastest(ratios: dict[str, dict]) -> tuple[str, dict] | None:
    """The other contestant with the least time over ours, and that ratio."""
    return min(ratios.items(), key=lambda item: item[1]["median"], default=None)


def share_of_copy(case: dict, name: str) -> float:
    """Bytes moved per second, relative to the fastest copy."""
    entries = case["contestants"]
    copied, ours = (entries[of]["ns"]["median"] for of in (case["copy"], name))
    return case["traffic"] * copied / ours


def _over_bound(case: dict, name: str) -> float | None:
    """Measured cycles over the counted bound; None where either is missing."""
    entry = case["contestants"][name]
    cycles, bound = entry.get("cycles_per_16"), entry.get("bound_cycles_per_16")
    return cycles / bound if cycles and bound else None


# --- Bars


def _over_fastest(case: dict, name: str) -> float | None:
    found = fastest(case["ratios"].get(name, {}))
    return found[1]["median"] if found else None


def _if_measured(figure: Figure) -> Figure:
    return lambda case, name: figure(case, name) if name in case["contestants"] else None


JAX = Kind("{subject}, against jax.nn", "×", bars.against("jax.nn"))
FASTEST = Kind("{subject}, against fastest", "×", _over_fastest)
_copied = _if_measured(lambda case, name: 100 * share_of_copy(case, name))
COPY = Kind("{subject}, bandwidth of a copy", "%", _copied)
BOUND = Kind("{subject}, over the counted bound", "×", _if_measured(_over_bound), at_least=False)
SCALING = Kind("{subject}, two threads", "×", lambda e, _: median(e["speedup"]), entries="scaling")

_CACHED = (all_cases.L2_SHAPE, VIT_SHAPE)


def _bars(
    kind: Kind,
    threshold: float,
    functions: Sequence[str],
    *shapes: tuple[int, ...],
    dtypes: Sequence[str] = ("float32",),
    order: int = SUBJECT_ORDER,
    **conditions,
) -> list[Bar]:
    """A bar for each function, dtype and shape; without shapes, where the arrays fill L2."""
    return [
        Bar(kind, Case(function, shape, dtype), threshold, f"order {order}", **conditions)
        for dtype in dtypes
        for function in functions
        for shape in shapes or [l2_shape(function)]
    ]


# The first targets, of the softmax and activation kernels.
_FIRST = (
    *_bars(JAX, 3.2, ("softmax",), VIT_SHAPE),
    *_bars(JAX, 2.8, ("softmax",)),
    *_bars(JAX, 3.5, ("softmax",), GPT_SHAPE),
    *_bars(JAX, 3.5, ("softmax",), order=1),
    *_bars(JAX, 3.0, ("exp", "gelu_tanh"), VIT_SHAPE),
    *_bars(JAX, 4.0, ("gelu_erf",), VIT_SHAPE),
    *_bars(JAX, 2.0, ("sigmoid",), VIT_SHAPE),
)
_AGAINST_FASTEST = (
    *_bars(FASTEST, 1.6, ("softmax", "log_softmax"), *_CACHED, all_cases.VOCABULARY_SHAPE),
    *_bars(FASTEST, 2.5, ("gelu_tanh",), *_CACHED),
    *_bars(FASTEST, 2.0, ("gelu_erf",), *_CACHED),
    *_bars(FASTEST, 1.5, ("sigmoid", "silu", "tanh", "exp")),
    *_bars(FASTEST, 1.8, FUNCTIONS, dtypes=("bfloat16", "float16")),
)
_AGAINST_JAX = (
    *_bars(JAX, 3.5, ("softmax",), *_CACHED),
    *_bars(JAX, 2.5, ("softmax",), *_CACHED, order=5),
    *_bars(JAX, 5.0, ("gelu_erf",), *_CACHED),
    *_bars(JAX, 3.5, ("exp",), *_CACHED),
    *_bars(JAX, 3.0, ("exp",), *_CACHED, order=5),
    *_bars(JAX, 10.0, ("gelu_tanh",), dtypes=("bfloat16",)),
    *_bars(JAX, 6.0, ("sigmoid",), dtypes=("bfloat16",)),
)
_BY_COPY = {"exp": 80, "sigmoid": 50, "tanh": 50}
_COUNTED = tuple(f for f, row in OPERATORS.items() if row.functor and f not in _BY_COPY)
_AGAINST_HARDWARE = (
    *(bar for f, share in _BY_COPY.items() for bar in _bars(COPY, share, (f,))),
    *_bars(BOUND, 1.25, _COUNTED),
    *_bars(COPY, 90, tuple(f for f, row in OPERATORS.items() if "DRAM" in row.beyond), GPT_SHAPE),
)
_AVX2 = _bars(JAX, 2.0, ("softmax", "gelu_tanh", "gelu_erf"), *_CACHED, isa="avx2")
_SCALING = _bars(SCALING, 1.7, SCALED, VIT_SHAPE, threads=2)
BARS = (*_FIRST, *_AGAINST_FASTEST, *_AGAINST_JAX, *_AGAINST_HARDWARE, *_AVX2, *_SCALING)


def case_of(entry: dict) -> Case:
    """The case of an entry of a result."""
    return Case(entry["function"], tuple(entry["shape"]), entry["dtype"])


def judge(result: dict) -> list[dict]:
    """Compare a run with the bars: verdicts on those that it measured."""
    verdicts = bars.judge(result, case_of, BARS)
    if result["call_overhead"] and BARS[0].holds(result["environment"]):
        for function in JUDGED_CALLS:
            size, least = next(iter(result["call_overhead"][function].items()))
            name, figure = f"call overhead, {function}, {size} elements", least["difference"]
            verdicts.append(bars.verdict(name, median(figure), CALL_OVERHEAD_US, "µs", False))
    return verdicts


# --- Default orders: the highest that takes at most so much longer than order 3, in float32 in L2

ALLOWED = 1.05
CANDIDATES = ("order 3", "order 4", "order 5")


def default_orders(cases: list[dict]) -> list[dict]:
    """For each function that a run measured with all candidates its name, the time of each
    candidate relative to order 3 (by order, as median and quartiles), and the `default`.
    """
    decided = []
    for case in cases:
        times = {order: case["relative_times"].get(order) for order in CANDIDATES}
        decides = all_cases.decides(case["function"], case["shape"], case["dtype"])
        if decides and None not in times.values():
            within = [int(order[-1]) for order, t in times.items() if t["median"] <= ALLOWED]
            default = max(within, default=SUBJECT_ORDER)
            decided.append({"function": case["function"], "times": times, "default": default})
    return decided
