"""What was measured, as text and as the page docs/results/accuracy.md."""

from __future__ import annotations

import math
import pathlib
import textwrap

from quake_jax.accuracy import attention
from quake_jax.accuracy.elementwise import (
    DTYPES,
    Accuracy,
)


def _worst_of(results: list[Accuracy], name: str = "relative") -> Accuracy:
    """The kernel with the largest error, in units of its bound if that is the relative error."""
    return max(
        results, key=lambda r: r.worst[name]["value"] / (r.bound if name == "relative" else 1)
    )


def summary(results: list[Accuracy]) -> str:
    """One line for the kernels of one function, dtype and order: the worst instruction set."""
    worst = _worst_of(results)
    error = worst.worst["relative"]
    return (
        f"{worst.function:<11} {worst.dtype:<8} order {worst.order}: relative error "
        f"{error['value']:.3e}, bound {worst.bound:.3e}: f({error['x']:.9g}) = {error['got']:.9g}, "
        f"wanted {error['wanted']:.9g} ({worst.isa})"
    )


# ---- docs/results/accuracy.md ------------------------------------------------------------------


def _wrapped(lines: list[str]) -> str:
    """A page with its prose in lines of at most 100 characters."""
    made = []
    for line in lines:
        item = line.startswith("- ")
        prose = len(line) > 100 and not line.startswith(("|", "#"))
        indent = "  " if item else ""
        options = {"break_long_words": False, "break_on_hyphens": False}
        wrapped = textwrap.wrap(line, 100, subsequent_indent=indent, **options)
        made += wrapped if prose else [line]
    return "\n".join(made)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _grouped(results: list[Accuracy]) -> dict[tuple[str, int], dict[str, Accuracy]]:
    """Kernels by (function, order) and instruction set."""
    groups: dict[tuple[str, int], dict[str, Accuracy]] = {}
    for result in results:
        groups.setdefault((result.function, result.order), {})[result.isa] = result
    return groups


def _error_table(results: list[Accuracy]) -> list[str]:
    groups = _grouped(results)
    isas = list(dict.fromkeys(result.isa for result in results))
    rows = []
    for (function, order), group in groups.items():
        row = [function, str(order), _number(next(iter(group.values())).bound)]
        for isa in isas:
            error, ulp = group[isa].worst["relative"]["value"], group[isa].worst["ulp"]["value"]
            mark = " **fails**" if group[isa].failures else ""
            row.append(f"{_number(error)} ({_number(ulp)}){mark}")
        rows.append(row)
    return _table(["function", "order", "bound", *isas], rows)


def _worst_table(results: list[Accuracy]) -> list[str]:
    rows = []
    for (function, order), group in _grouped(results).items():
        kernels = list(group.values())
        worst = _worst_of(kernels)
        error = worst.worst["relative"]
        absolute = _worst_of(kernels, "absolute").worst["absolute"]
        rows.append(
            [function, str(order), worst.isa, f"{error['x']:.9g}", f"{error['got']:.9g}"]
            + [f"{error['wanted']:.9g}", _number(absolute["value"]), f"{absolute['x']:.9g}"]
        )
    header = ["function", "order", "instruction set", "x", "got", "wanted"]
    return _table([*header, "largest absolute error", "at x"], rows)


def _monotonicity_table(results: list[Accuracy]) -> list[str]:
    isas = list(dict.fromkeys(result.isa for result in results))
    rows = []
    for (function, order), group in _grouped(results).items():
        row = [function, str(order)]
        for isa in isas:
            falls, largest = group[isa].counts["falls"], group[isa].worst["fall"]
            row.append(f"{falls:,} ({_number(largest['value'])})" if falls else "0")
        rows.append(row)
    return _table(["function", "order", *isas], rows)


def _special_table(results: list[Accuracy]) -> list[str]:
    shown = (math.nan, -math.inf, -0.0, 0.0, math.inf)
    rows = []
    for function in dict.fromkeys(result.function for result in results):
        row = [function]
        for x in shown:
            values: dict[str, list[int]] = {}
            for result in results:
                if result.function == function:
                    got = next(s.got for s in result.special if repr(s.x) == repr(x))
                    orders = values.setdefault(f"{got:.6g}", [])
                    if result.order not in orders:
                        orders.append(result.order)
            cell = [
                text if len(values) == 1 else f"{text} (order {', '.join(map(str, orders))})"
                for text, orders in values.items()
            ]
            row.append("; ".join(cell))
        rows.append(row)
    return _table(["function", "f(NaN)", "f(-inf)", "f(-0)", "f(0)", "f(inf)"], rows)


def markdown(
    results: list[Accuracy],
    of_attention: list[attention.AttentionAccuracy],
    environment: dict,
) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    lines = [
        "# Accuracy",
        "",
        f"Written by `{environment['command']}` on {environment['date']}: {versions}, "
        f"{environment['cpu']}, {environment['system']}; {environment['seconds']:.0f} s with "
        f"{environment['threads']} threads.",
        "",
    ]
    if results:
        lines += _elementwise_markdown(results, environment["float32_stride"])
    if of_attention:
        lines += attention.markdown(of_attention)
    return _wrapped(lines)


def program_section(results: list[Accuracy], environment: dict) -> tuple[str, list[str]]:
    """The heading and the lines of what a program's kernels were measured at."""
    isas = ", ".join(dict.fromkeys(result.isa for result in results))
    failures = [result for result in results if result.failures]
    verdict = (
        f"{len(failures)} of {len(results)} kernels fail"
        if failures
        else (f"All {len(results)} kernels keep their bounds, and give NaN for NaN alone")
    )
    stride = environment["float32_stride"]
    lines = [
        f"`{environment['command']}` on {environment['date']}, {environment['seconds']:.0f} s; "
        f"float32: {'all' if stride == 1 else f'one in {stride}'} of the 2^32 inputs, other "
        f"dtypes: all 65,536. {verdict}. Largest relative error (ulp).",
        "",
    ]
    for dtype in dict.fromkeys(result.dtype for result in results):
        lines += [f"### {dtype}, {isas}", ""]
        lines += _error_table([result for result in results if result.dtype == dtype])
    return f"## Another processor: {isas}", lines


def replace_section(path: pathlib.Path, heading: str, lines: list[str]) -> None:
    """Write a section into a page in place of the one of that heading, or at its end."""
    old = path.read_text().splitlines() if path.exists() else []
    start = old.index(heading) if heading in old else len(old)
    after = (k for k in range(start + 1, len(old)) if old[k].startswith("## "))
    end = next(after, len(old))
    before = [*old[:start], ""] if old[:start] and old[start - 1] else old[:start]
    path.write_text(_wrapped([*before, heading, "", *lines, *old[end:]]).rstrip("\n") + "\n")


def _elementwise_markdown(results: list[Accuracy], stride: int) -> list[str]:
    by_dtype = {d: [r for r in results if r.dtype == d] for d in DTYPES}
    inputs = "all 2^32 inputs" if stride == 1 else f"one in {stride} of the 2^32 inputs"
    failures = [r for r in results if r.failures]
    lines = [
        f"float32: {inputs}; bfloat16 and float16: all 65,536. Every result is compared with the "
        "exact function in double precision, whose own relative error is below 1e-12. The "
        "arithmetic is float32 for all dtypes; results are rounded once.",
        "",
        "- **Relative error**: |got − wanted|/|wanted|, where wanted is normal and finite. The "
        "same number covers underflow and overflow: where got or wanted is below 2^-125 only what "
        "exceeds 2^-126 counts, because denormals are flushed (selu: 2^-125, it scales what was "
        "flushed; float16: below 2^-14, 2^-25, half a step of its subnormals); inf is right where "
        "wanted is beyond the largest finite number, and counts as that number where it is not. "
        "Denormal float32 inputs are taken as 0.",
        "- **ulp**, in parentheses: the same error in units of the last place of the dtype at "
        "wanted.",
        "- **Bound**: `MAX_REL_ERROR` in quake_jax/_core/constants.py, for 16-bit types with the "
        "rounding of the result added.",
        "",
    ]
    if failures:
        lines += [f"**{len(failures)} kernels fail:**", ""]
        lines += [
            f"- {r.function} {r.dtype} order {r.order} {r.isa}: {'; '.join(r.failures)}"
            for r in failures
        ]
    else:
        lines.append(
            f"All {len(results)} kernels keep their bounds. No input but NaN gives NaN, every NaN "
            "gives NaN, no result leaves the function's range (|tanh| ≤ 1, 0 ≤ sigmoid ≤ 1, "
            "exp ≥ 0, expm1 ≥ -1 and the like), none is a denormal float32."
        )
    lines.append("")
    if by_dtype["float32"]:
        lines += ["## float32", "", "Largest relative error (ulp).", ""]
        lines += _error_table(by_dtype["float32"])
        lines += [
            "## Worst inputs, float32",
            "",
            "The input with the largest relative error, of the instruction set where it is "
            "largest; the largest absolute error of all instruction sets.",
            "",
        ]
        lines += _worst_table(by_dtype["float32"])
        increasing = [r for r in by_dtype["float32"] if r.increasing]
        if increasing:
            neighbours = "successive float32 values" if stride == 1 else "successive inputs"
            lines += [
                "## Monotonicity, float32",
                "",
                "For functions that are increasing: the number of pairs x < x' of "
                f"{neighbours} of the same sign with f(x') < f(x), and in parentheses the largest "
                "fall f(x) − f(x') relative to the exact f(x'), or to 2^-126 where that is "
                "smaller. Rounding to float32 is 6e-8 (half an ulp).",
                "",
            ]
            lines += _monotonicity_table(increasing)
    for dtype in DTYPES[1:]:
        if by_dtype[dtype]:
            lines += [f"## {dtype}", "", "Largest relative error (ulp).", ""]
            lines += _error_table(by_dtype[dtype])
    dtype = results[0].dtype
    lines += [f"## Special values, {dtype}", ""]
    lines += ["Of all instruction sets; where orders differ, each value with its orders.", ""]
    lines += _special_table([r for r in results if r.dtype == dtype])
    return lines
