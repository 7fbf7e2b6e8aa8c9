"""How a result of `ops` is shown: tables on the terminal, JSON, and a section of a Markdown file.

The terminal and the Markdown file show the same rows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

Rows = list[list[str]]


def to_json(result: dict, path: Path) -> None:
    """Write the whole result, medians and quartiles included."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def to_terminal(result: dict) -> None:
    """Print the tables, the bars and the remarks."""
    console = Console()
    # Not a terminal (a log, a pipe): wide enough for whole rows.
    if not console.is_terminal:
        console = Console(width=160)
    console.print(headline(result), style="bold", highlight=False)
    for title, rows in tables(result):
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(rows[0]):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in remarks(result):
        console.print(line, highlight=False, markup=False)


def to_markdown(result: dict, path: Path) -> None:
    """Write the tables into a Markdown file.

    The section of an earlier run with as many threads is replaced; everything else in the file
    stays, and without such a section the new one is appended.

    Args:
        result: The result of a run.
        path: The file, made if it does not exist.
    """
    threads = result["environment"]["threads"]
    begin, end = (
        f"<!-- benchmarks ops, threads {threads}: {word} -->"
        for word in ("begin, generated", "end")
    )
    parts = [begin, "", f"### Operators, {_threads(threads)}", "", headline(result), ""]
    for title, rows in tables(result):
        lines = [" | ".join(row) for row in rows]
        lines.insert(1, "---" + " | ---:" * (len(rows[0]) - 1))
        parts += [f"**{title}**", "", *(f"| {line} |" for line in lines), ""]
    parts += [f"- {line}" for line in remarks(result)] + ["", end]
    section = "\n".join(parts)
    text = path.read_text() if path.exists() else ""
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    path.write_text(text)


def headline(result: dict) -> str:
    """Say where and with what the figures were measured."""
    environment = result["environment"]
    versions = [f"{name} {v}" for name, v in environment["versions"].items() if v is not None]
    parts = [
        environment["cpu"] or "unknown CPU",
        environment["isa"] or "no kernels",
        _threads(environment["threads"]),
        *versions,
        environment["date"][:10],
    ]
    if environment["commit"]:
        changed = " with changes" if environment["uncommitted_changes"] else ""
        parts.append(f"commit {environment['commit'][:10]}{changed}")
    return ", ".join(parts)


def tables(result: dict) -> list[tuple[str, Rows]]:
    """Make the tables: titles, and rows with the heading first."""
    made = [
        ("Time, ns per element (median)", _times(result)),
        ("Speed: their time over ours, median (quartiles) of the rounds", _ratios(result)),
    ]
    if result["call_overhead"]:
        rows = [["operator", "quake_jax", "jax.nn", "difference"]]
        for name, o in result["call_overhead"].items():
            spread = f"({o['difference_low_us']:.3f}–{o['difference_high_us']:.3f})"
            rows.append(
                [
                    name,
                    f"{o['quake_jax_us']:.3f}",
                    f"{o['jax_nn_us']:.3f}",
                    f"{o['difference_us']:+.3f} {spread}",
                ]
            )
        made.append(("One call of 16 elements inside a jitted program, µs", rows))
    if result["bars"]:
        rows = [["bar", "figure", "wanted", ""]]
        for bar in result["bars"]:
            sign = "≥" if bar["unit"] == "×" else "≤"
            rows.append(
                [
                    bar["name"],
                    f"{bar['figure']:.2f} {bar['unit']}",
                    f"{sign} {bar['threshold']:.2f} {bar['unit']}",
                    "met" if bar["met"] else "MISSED",
                ]
            )
        made.append(("Bars", rows))
    return made


def _times(result: dict) -> Rows:
    names = []
    for case in result["cases"]:
        for name in case["contestants"]:
            if not name.startswith("copy") and name not in names:
                names.append(name)
    rows = [["operator", *names, "copy"]]
    for case in result["cases"]:
        row = [_label(case)]
        for name in names:
            entry = case["contestants"].get(name)
            row.append(
                "–"
                if entry is None
                else f"{entry['ns_per_element']:.3f}" + ("†" if entry["doubtful"] else "")
            )
        row.append(f"{case['contestants'][case['copy']]['ns_per_element']:.3f}")
        rows.append(row)
    return rows


def _ratios(result: dict) -> Rows:
    others = []
    for case in result["cases"]:
        for ratios in case["ratios"].values():
            others += [name for name in ratios if name not in others]
    rows = [["operator", "ours", *others, "share of copy", "error"]]
    for case in result["cases"]:
        copy = case["contestants"][case["copy"]]["ns_per_element"]
        for name, ratios in case["ratios"].items():
            row = [_label(case), name]
            for other in others:
                r = ratios.get(other)
                row.append(
                    "–" if r is None else f"{r['median']:.2f} ({r['low']:.2f}–{r['high']:.2f})"
                )
            entry = case["contestants"][name]
            row.append(f"{100 * copy / entry['ns_per_element']:.0f} %")
            row.append(f"{entry['relative_error']:.1e}")
            rows.append(row)
    return rows


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    lines = [
        f"{settings['rounds']} interleaved rounds, readings of at least "
        f"{1e3 * settings['reading_seconds']:g} ms, one input and one output buffer for all. "
        "JAX operators are timed in a loop inside one program; from torch and onnxruntime the "
        "time of a call at 16 elements is subtracted."
    ]
    if settings["allocator"] == "system":
        lines.append("The system's allocator was left as it is: page faults are part of the times.")
    rejected = {"faults": 0, "preempted": 0}
    doubtful = 0
    for case in result["cases"]:
        for entry in case["contestants"].values():
            doubtful += entry["doubtful"]
            for reason, count in entry["rejected"].items():
                rejected[reason] += count
    lines.append(
        f"Readings rejected and repeated: {rejected['faults']} for page faults, "
        f"{rejected['preempted']} for a lost core."
    )
    if doubtful:
        lines.append(f"† {doubtful} disturbed readings had to be used: the machine is too busy.")
    if result["left_out"]:
        reasons = (f"{name} ({why})" for name, why in result["left_out"].items())
        lines.append(f"Left out: {'; '.join(reasons)}.")
    return lines


def _label(case: dict) -> str:
    return f"{case['function']} {'×'.join(map(str, case['shape']))} {case['dtype']}"


def _threads(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"
