"""The tables of a result of `attention`."""

import math

from benchmarks.attention.cases import SUBJECT_ORDER
from benchmarks.harness import bars, pages
from benchmarks.harness.pages import Rows, Table, number

HEADING = "Attention"
RELATIVE = {"none": "unmasked", "causal": "is_causal", "float32": "float32"}


def subject(case: dict) -> str:
    """Whose speed is stated: the default order, or the last of ours in a run without it."""
    name = f"order {SUBJECT_ORDER}"
    return name if name in case["ratios"] else list(case["ratios"])[-1]


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    made = []
    for dtype, cases in pages.by_dtype(result["cases"]).items():
        times = pages.of_contestants(pages.contestants(cases), _milliseconds)
        made += [
            (f"Time, {dtype}: ms per call (median)", pages.rows_of(cases, _CASE, *times)),
            # Without a compiler there is no peak, without decoding no reading.
            (f"Speed of {subject(cases[0])}, {dtype}: their time over ours", _speeds(cases)),
        ]
    made = pages.filled(made)
    if cases := [case for case in result["cases"] if any(_relative(case).values())]:
        label = ("B,T,N,H, dtype and mask", lambda c: f"{c['shape']} {c['dtype']} {c['mask']}")
        columns = pages.named_columns(RELATIVE.values(), pages.spread, _relative)
        title = "Our time over our time of another case, median (quartiles)"
        made.append((title, pages.rows_of(cases, label, *columns)))
    return made + pages.two_threads("B,T,N,H", _label, result["scaling"]) + bars.tables(result)


def _label(case: dict) -> str:
    return f"{case['shape']} {case['mask']}"


_CASE = ("B,T,N,H and mask", _label)


def _milliseconds(entry: dict) -> str:
    time = entry["ms"]["median"]
    digits = max(0, 2 - math.floor(math.log10(time))) if time > 0 else 3
    return f"{time:.{digits}f}" + pages.doubt(entry)


def _speeds(cases: list[dict]) -> Rows:
    def ours(case: dict) -> dict:
        return case["contestants"][subject(case)]

    def share(of: str) -> pages.Column:
        figure = bars.percent_of(of)
        return f"share of {of}", lambda case: number(figure(case, subject(case)), 0, " %")

    others = pages.names_in(ratios for case in cases for ratios in case["ratios"].values())
    return pages.rows_of(
        cases,
        _CASE,
        *pages.named_columns(others, pages.spread, lambda case: case["ratios"][subject(case)]),
        ("GFLOP/s", lambda case: f"{ours(case)['gflops']:.0f}"),
        ("FMA peak", lambda case: number(case["peak_gflops"], 0)),
        share("peak"),
        share("read"),
        ("largest error", lambda case: f"{ours(case)['error']:.1e}"),
    )


def _relative(case: dict) -> dict[str, dict]:
    """The time relative to that of other cases, by heading."""
    found = {heading: case["relative"].get(to, {}) for to, heading in RELATIVE.items()}
    return {heading: of[subject(case)] for heading, of in found.items() if subject(case) in of}


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    rounds = pages.rounds_of(result, "for the largest")
    return pages.prose("attention/remarks.txt", result, rounds=rounds) + pages.run_remarks(result)
