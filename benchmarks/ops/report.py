"""The tables of a result of `ops`."""

from __future__ import annotations

from benchmarks.harness import bars, pages
from benchmarks.harness.pages import NONE, Rows, Table
from benchmarks.ops import goals
from benchmarks.ops.cases import SUBJECT_ORDER
from benchmarks.ops.operators import CELU_ALPHA

HEADING = "Operators"


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    made = []
    for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["dtype"] == dtype]
        subject = goals.subject(cases[0])
        made += [
            (f"Time, {dtype}: ns per element (median)", _times(cases)),
            (f"Speed of {subject}, {dtype}: their time over ours (median)", _speeds(cases)),
        ]
    scaling = [
        [f"{_label(e)} {e['dtype']}, order {e['order']}", pages.spread(e["speedup"])]
        for e in result["scaling"]
    ]
    made += pages.two_threads("operator", scaling)
    if result["call_overhead"]:
        made.append(_overheads(result["call_overhead"]))
    made += bars.tables(result)
    if result["default_orders"]:
        made.append(_defaults(result["default_orders"]))
    return made


def _times(cases: list[dict]) -> Rows:
    names = [
        name
        for name in pages.names(map(goals.systems, cases))
        # Order 4 is measured only to decide the default order, which has a table of its own.
        if name != "order 4" or all(name in case["contestants"] for case in cases)
    ]
    rows = [["operator", *names, "copy"]]
    for case in cases:
        entries = [case["contestants"].get(name) for name in (*names, case["copy"])]
        rows.append([_label(case), *map(_nanoseconds, entries)])
    return rows


def _nanoseconds(entry: dict | None) -> str:
    return NONE if entry is None else f"{entry['ns_per_element']:.3f}{pages.doubt(entry)}"


def _speeds(cases: list[dict]) -> Rows:
    others = pages.names(ratios for case in cases for ratios in case["ratios"].values())
    head = ["operator", *others, "fastest (quartiles)", "share of copy"]
    rows = [[*head, "cycles/16", "bound", "largest error"]]
    for case in cases:
        subject = goals.subject(case)
        ratios, entry = case["ratios"][subject], case["contestants"][subject]
        fastest = goals.fastest(ratios)
        rows.append(
            [
                _label(case),
                *(pages.number(pages.median(ratios.get(name))) for name in others),
                pages.spread(fastest[1]) if fastest else NONE,
                f"{100 * goals.share_of_copy(case, subject):.0f} %",
                pages.number(entry.get("cycles_per_16")),
                pages.number(entry.get("bound_cycles_per_16")),
                f"{entry['relative_error']:.1e}",
            ]
        )
    # Several threads have no cycles, another CPU has no bound.
    return pages.without_empty_columns(rows)


def _overheads(measured: dict[str, dict]) -> Table:
    rows = [["operator", "quake_jax", "jax.nn", "difference"]]
    for name, o in measured.items():
        quartiles = f"({o['difference_low_us']:.3f}–{o['difference_high_us']:.3f})"
        difference = f"{o['difference_us']:+.3f} {quartiles}"
        rows.append([name, f"{o['quake_jax_us']:.3f}", f"{o['jax_nn_us']:.3f}", difference])
    return "One call of 16 elements inside a jitted program, µs", rows


def _defaults(all_decided: list[dict]) -> Table:
    orders = list(all_decided[0]["times"])
    rows = [["operator", *orders, "default"]]
    for decided in all_decided:
        times = [pages.spread(decided["times"][order]) for order in orders]
        rows.append([decided["function"], *times, str(decided["default"])])
    return f"Default order: time relative to order {SUBJECT_ORDER}, float32 in L2", rows


def _label(case: dict) -> str:
    level = f" ({case['level']})" if case.get("level") else ""
    return f"{case['function']} {'×'.join(map(str, case['shape']))}{level}"


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    lines = [
        f"{pages.rounds_of(result, 'for arrays in DRAM')}, readings of at least "
        f"{1e3 * settings['reading_seconds']:g} ms, the same input and output buffers for all. "
        "JAX operators are timed in a loop inside one program; from torch and onnxruntime the "
        "time of a call at 16 elements is subtracted.",
        "Share of copy: bytes read and written per second, relative to the fastest copy. L2, L3, "
        "DRAM: where the arrays of float32 sit. Largest error: relative to the exact result.",
        f"celu has alpha {CELU_ALPHA}. glu takes both halves from one array, swiglu and geglu take "
        "two arrays; torch runs one kernel per step where it has none for the whole.",
    ]
    if any(case["gigahertz"] for case in result["cases"]):
        clocks = [case["gigahertz"] for case in result["cases"]]
        lines.append(
            "Cycles/16: cycles per 16 elements, by a chain of multiplications timed in the same "
            f"rounds ({min(clocks):.2f} to {max(clocks):.2f} GHz). Bound: the fewest that the "
            "instructions of the inner loop can take on Zen 5, which starts in a cycle "
            "2 multiplications, 2 additions, 4 vector operations, 2 loads and 1 store of 512 bits, "
            "8 instructions (`benchmarks/ops/instructions.py`); none for operators of several "
            "loops."
        )
    lines += pages.isa_remarks(result)
    if settings["allocator"] == "system":
        lines.append("The system's allocator was left as it is: page faults are part of the times.")
    lines += pages.reading_remarks(result)
    for name, labels in result["lacking"].items():
        lines.append(f"Not implemented in {name}: {', '.join(_grouped(labels))}.")
    return lines


def _grouped(labels: list[str]) -> list[str]:
    """Functions by dtype, from labels `function dtype`."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        function, dtype = label.split()
        groups.setdefault(dtype, []).append(function)
    return [f"{' '.join(functions)} in {dtype}" for dtype, functions in groups.items()]
