"""The tables of a result of `attention`."""

from __future__ import annotations

import math

from benchmarks.attention.cases import SUBJECT_ORDER
from benchmarks.harness import bars, pages
from benchmarks.harness.pages import NONE, Rows, Table

HEADING = "Attention"


def subject(case: dict) -> str:
    """Whose speed is stated: the default order, or the last of ours in a run without it."""
    name = f"order {SUBJECT_ORDER}"
    return name if name in case["ratios"] else list(case["ratios"])[-1]


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    made = []
    for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["dtype"] == dtype]
        made += [
            (f"Time, {dtype}: ms per call (median)", _times(cases)),
            (f"Speed of {subject(cases[0])}, {dtype}: their time over ours", _speeds(cases)),
        ]
    rows = _relative_times(result["cases"])
    if len(rows) > 1:
        made.append(("Our time over our time of another case, median (quartiles)", rows))
    scaling = [[_label(entry), pages.spread(entry["speedup"])] for entry in result["scaling"]]
    return made + pages.two_threads("B,T,N,H", scaling) + bars.tables(result)


def _label(case: dict) -> str:
    return f"{case['shape']} {case['mask']}"


def _times(cases: list[dict]) -> Rows:
    names = pages.names(case["contestants"] for case in cases)
    rows = [["B,T,N,H and mask", *names]]
    for case in cases:
        entries = [case["contestants"].get(name) for name in names]
        rows.append([_label(case), *(_milliseconds(entry) for entry in entries)])
    return rows


def _milliseconds(entry: dict | None) -> str:
    if entry is None:
        return NONE
    time = entry["ms"]["median"]
    digits = max(0, 2 - math.floor(math.log10(time))) if time > 0 else 3
    return f"{time:.{digits}f}" + pages.doubt(entry)


def _speeds(cases: list[dict]) -> Rows:
    others = pages.names(ratios for case in cases for ratios in case["ratios"].values())
    head = ["B,T,N,H and mask", *others, "GFLOP/s", "FMA peak"]
    rows = [[*head, "share of peak", "share of read", "largest error"]]
    for case in cases:
        name = subject(case)
        ratios, entry = case["ratios"][name], case["contestants"][name]
        rows.append(
            [
                _label(case),
                *(pages.spread(ratios[other]) if other in ratios else NONE for other in others),
                f"{entry['gflops']:.0f}",
                f"{case['peak_gflops']:.0f}" if case["peak_gflops"] else NONE,
                _percent(entry.get("share_of_peak")),
                _percent(entry.get("share_of_read")),
                f"{entry['error']:.1e}",
            ]
        )
    # Without a compiler there is no peak, without decoding no reading.
    return pages.without_empty_columns(rows)


def _percent(share: dict | None) -> str:
    return NONE if share is None else f"{100 * share['median']:.0f} %"


def _relative_times(cases: list[dict]) -> Rows:
    rows = [["B,T,N,H, dtype and mask", "unmasked", "is_causal", "float32"]]
    for case in cases:
        found = [case["relative"].get(to, {}) for to in ("none", "causal", "float32")]
        entries = [entry.get(subject(case)) for entry in found]
        if any(entries):
            spreads = (pages.spread(entry) if entry else NONE for entry in entries)
            rows.append([f"{case['shape']} {case['dtype']} {case['mask']}", *spreads])
    return rows


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    lines = [
        f"{pages.rounds_of(result, 'for the largest')} with all dtypes and masks of a shape in the "
        f"same ones, readings of one call or at least {1e3 * settings['reading_seconds']:g} ms. "
        "quake_jax and XLA run in a loop inside one program; from torch the time of a call with "
        "one query and one key is subtracted. torch has the layout BNTH, and an output of its own.",
        "T-S: T queries and S keys. N/K: N query heads share K key/value heads. Causal: "
        "is_causal; causal array: the same as an array of booleans. Padding: "
        "key_value_seq_lengths, from half to all of the keys over the batch (three quarters of "
        "them for one row). Bias: one (T, S) array for all rows and heads.",
        "GFLOP/s counts the products of queries with the keys that the mask leaves. FMA peak: "
        "fused multiply-adds of float32 between registers at the width of our kernels, timed in "
        "the same rounds; bfloat16 instructions do two at a time. Share of read: bytes of keys "
        "and values per second, relative to a loop that only reads the same arrays. Largest "
        "error: relative to the largest element of the exact result.",
    ]
    lines += pages.isa_remarks(result)
    if settings["allocator"] == "system":
        entries = [e for case in result["cases"] for e in case["contestants"].values()]
        most = max(entry["faults_per_call"] for entry in entries)
        lines.append(
            "The system's allocator was left as it is: page faults are part of the times, up to "
            f"{most:,.0f} of them in a call."
        )
    else:
        lines.append(
            "Freed pages stay mapped: XLA does not pay for fresh ones at each call, as it does "
            "under the system's allocator (--allocator system)."
        )
    return lines + pages.reading_remarks(result)
