"""The tables of a result of `dense`."""

import math
from statistics import median

from benchmarks.dense import goals
from benchmarks.dense.cases import FORMATS, GPT2, MOST_COPIES, PEERS, XLA
from benchmarks.harness import bars, pages
from benchmarks.harness.pages import NONE, Rows, Table, number

HEADING = "Dense layers"
# What packing in each call is compared with: large layers of many rows.
XLA_FLOAT32 = "XLA float32"
COMPARED = {goals.Case(shape, "bias") for shape in goals.LARGE_MANY}
CASE = "M, K→N and form"


def tables(result: dict) -> list[Table]:
    """Make the tables."""
    cases = result["cases"]
    made = [
        *(_speeds(cases, dtype) for dtype in dict.fromkeys(map(_dtype, FORMATS))),
        ("Ours: share of the peak of the instruction", _ours(cases, goals.share("peak"), 0, " %")),
        ("Our speed over that of the fastest peer", _ours(cases, goals.fastest_peer)),
        ("Our speed over that of XLA's fastest form", _ours(cases, goals.XLA_ANY.figure)),
        ("Our speed over our float32", _ours(cases, goals.FLOAT32.figure)),
        ("Ours: time added by what is fused", _ours(cases, goals.COST.figure, 0, " %")),
        ("Ours, weights from memory: GB/s (median)", _ours(cases, _bandwidth, 1)),
        ("Ours: share of the fastest read loop", _ours(cases, goals.share("read"), 0, " %")),
        ("Peaks: GFLOP/s, and GB/s of the fastest read loop", _peaks(cases)),
        ("Largest error of all cases, relative to the largest element of a result", _errors(cases)),
    ]
    made = pages.filled(made) + pages.two_threads(CASE, _stated, result["scaling"])
    if result["norms"]:
        title = "Norms as operators of their own: XLA's time over ours, median (quartiles)"
        speed = ("XLA over ours", lambda entry: pages.spread(entry["speed"]))
        made.append((title, pages.rows_of(result["norms"], ("norm", _stated), speed)))
    if result["packing"]:
        seconds = ("seconds", lambda entry: pages.spread(entry["seconds"]))
        rows = pages.rows_of(result["packing"], ("model", _stated), seconds)
        made.append(("Packing: median (quartiles)", rows))
        rows = [["format", "rows (from the least to the most of the shapes)"], *_paying(result)]
        made.append(("Rows from which packing in each call pays against XLA: median", rows))
    return made + bars.tables(result)


def _stated(entry: dict) -> str:
    return f"{goals.case_of(entry)}, {entry['subject']}"


def _paying(result: dict) -> Rows:
    """For each format from how many rows on a product saves the time of packing its weight."""
    weights = sum(k * n * count for (k, n), count in GPT2.items())
    rows = []
    for entry in result["packing"]:
        packing = pages.median(entry["seconds"]) / weights
        found = []
        for case in result["cases"]:
            xla, ours = (
                case["contestants"].get(name)
                for name in (XLA_FLOAT32, goals.name_of(entry["subject"]))
            )
            if xla and ours and goals.case_of(case) in COMPARED:
                saved = (pages.median(xla["ms"]) - pages.median(ours["ms"])) / 1e3
                products = case["m"] * case["k"] * case["n"]
                found.append(packing * products / saved if saved > 0 else math.inf)
        if found:
            middle, least, most = (
                number(x, 0) if x < math.inf else "never"
                for x in (median(found), min(found), max(found))
            )
            rows.append([entry["subject"], f"{middle} ({least}–{most})"])
    return rows


def _label(entry: dict) -> str:
    return str(goals.case_of(entry))


def _dtype(format_: str) -> str:
    return FORMATS[format_]["dtype"]


def _speeds(cases: list[dict], dtype: str) -> Table:
    """A row for each case, with the speed of each contestant whose weights have that dtype."""
    formats = {goals.name_of(format_): format_ for format_ in FORMATS} | XLA | PEERS
    names = [name for name in pages.contestants(cases) if _dtype(formats[name]) == dtype]
    speeds = pages.of_contestants(names, lambda e: f"{e['gflops']:.3g}{pages.doubt(e)}")
    return f"Speed, {dtype}: GFLOP/s (median)", pages.rows_of(cases, (CASE, _label), *speeds)


def _bandwidth(case: dict, format_: str) -> float | None:
    entry = case["contestants"].get(goals.name_of(format_))
    return entry["weight_gbps"] if case["read"] and entry else None


def _errors(cases: list[dict]) -> Rows:
    def largest(name: str) -> str:
        entries = (case["contestants"].get(name) for case in cases)
        return f"{max(entry['error'] for entry in entries if entry):.0e}"

    return pages.rows_of(pages.contestants(cases), ("contestant", str), ("error", largest))


def _ours(cases: list[dict], figure: goals.Figure, digits: int = 2, unit: str = "") -> Rows:
    """A row for each case that has one, with a figure of each of our formats."""

    def found(case: dict) -> dict[str, str]:
        return {name: number(figure(case, name), digits, unit) for name in FORMATS}

    stated = [case for case in cases if set(found(case).values()) != {NONE}]
    return pages.rows_of(stated, (CASE, _label), *pages.named_columns(FORMATS, str, found))


def _peaks(cases: list[dict]) -> Rows:
    def peaks(case: dict) -> dict[str, float]:
        return case["peaks_gflops"]

    names = pages.names_in(map(peaks, cases))
    return pages.rows_of(
        [case for case in cases if case["form"] == cases[0]["form"]],  # the others share them
        (CASE, _label),
        *pages.named_columns(names, lambda gflops: number(gflops, 0), peaks),
        ("read", lambda case: number(case["read"] and case["read"]["gbps"], 1)),
        ("fastest way to read", lambda case: case["read"]["way"] if case["read"] else NONE),
    )


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    parts = (f"{count} of {what}" for what, count in result["bars_not_measured"].items())
    lines = pages.prose(
        "dense/remarks.txt",
        result,
        rounds=pages.rounds_of(result, "for the largest"),
        walked_megabytes=result["settings"]["walked_bytes"] / 1e6,
        most_copies=MOST_COPIES,
        not_measured="; ".join(parts) or "none",
    )
    return lines + pages.run_remarks(result)
