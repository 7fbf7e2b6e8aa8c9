"""The tables of a result of `ops`."""

from benchmarks.harness import bars, pages
from benchmarks.harness.pages import NONE, Rows, Table, median, number, spread
from benchmarks.ops import goals
from benchmarks.ops.cases import SUBJECT_ORDER
from benchmarks.ops.operators import CELU_ALPHA

HEADING = "Operators"


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    made = []
    for dtype, cases in pages.by_dtype(result["cases"]).items():
        subject = goals.subject(cases[0])
        made += [
            (f"Time, {dtype}: ns per element (median)", _times(cases)),
            # Several threads have no cycles, another CPU has no bound.
            (f"Speed of {subject}, {dtype}: their time over ours (median)", _speeds(cases)),
        ]
    made = pages.filled(made)
    made += pages.two_threads("operator", _scaled, result["scaling"])
    if result["call_overhead"]:
        made.append(_overheads(result["call_overhead"]))
    made += bars.tables(result)
    if decided := result["default_orders"]:
        times = pages.named_columns(decided[0]["times"], spread, lambda entry: entry["times"])
        default = ("default", lambda entry: str(entry["default"]))
        rows = pages.rows_of(decided, ("operator", lambda one: one["function"]), *times, default)
        made.append((f"Default order: time relative to order {SUBJECT_ORDER}, float32 in L2", rows))
    return made


def _times(cases: list[dict]) -> Rows:
    names = [
        name
        for name in pages.names_in(map(goals.systems, cases))
        # Order 4 is measured only to decide the default order, which has a table of its own.
        if name != "order 4" or all(name in case["contestants"] for case in cases)
    ]
    copy = ("copy", lambda case: _nanoseconds(case["contestants"][case["copy"]]))
    columns = pages.of_contestants(names, _nanoseconds)
    return pages.rows_of(cases, ("operator", _label), *columns, copy)


def _nanoseconds(entry: dict) -> str:
    return f"{entry['ns']['median']:.3f}{pages.doubt(entry)}"


def _speeds(cases: list[dict]) -> Rows:
    def ratios(case: dict) -> dict:
        return case["ratios"][goals.subject(case)]

    def ours(case: dict) -> dict:
        return case["contestants"][goals.subject(case)]

    def fastest(case: dict) -> str:
        found = goals.fastest(ratios(case))
        return spread(found[1]) if found else NONE

    others = pages.names_in(ratios for case in cases for ratios in case["ratios"].values())
    return pages.rows_of(
        cases,
        ("operator", _label),
        *pages.named_columns(others, lambda ratio: number(ratio["median"]), ratios),
        ("fastest (quartiles)", fastest),
        ("share of copy", lambda c: f"{100 * goals.share_of_copy(c, goals.subject(c)):.0f} %"),
        ("cycles/16", lambda case: number(ours(case).get("cycles_per_16"))),
        ("bound", lambda case: number(ours(case).get("bound_cycles_per_16"))),
        ("largest error", lambda case: f"{ours(case)['relative_error']:.1e}"),
    )


def _overheads(measured: dict[str, dict]) -> Table:
    """The call of the smallest size, and jax.nn's time over ours at each."""
    sizes = list(next(iter(measured.values())))
    rows = [["operator", "quake_jax, µs", "jax.nn, µs", *(f"{size} elements" for size in sizes)]]
    for name, by_size in measured.items():
        least = by_size[sizes[0]]
        times = [f"{median(least[system]):.2f}" for system in ("quake_jax", "jax.nn")]
        rows.append([name, *times, *(number(median(by_size[n]["speed"])) for n in sizes)])
    return f"Small arrays: time of a call at {sizes[0]} elements, and jax.nn's over ours", rows


def _label(case: dict) -> str:
    level = f" ({case['level']})" if case.get("level") else ""
    return f"{case['function']} {'×'.join(map(str, case['shape']))}{level}"


def _scaled(entry: dict) -> str:
    return f"{_label(entry)} {entry['dtype']}, order {entry['order']}"


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    clocks = [case["gigahertz"] for case in result["cases"] if case["gigahertz"]]
    lines = pages.prose(
        "ops/remarks.txt",
        result,
        rounds=pages.rounds_of(result, "for arrays in DRAM"),
        celu_alpha=CELU_ALPHA,
        clocks=clocks,
        least_clock=min(clocks, default=0),
        most_clock=max(clocks, default=0),
    )
    return lines + pages.run_remarks(result)
