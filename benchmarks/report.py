"""How a result is shown: tables on the terminal, JSON, and a section of a Markdown file.

The terminal and the Markdown file show the same rows; those of `ops` are made here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import figures
from benchmarks.cases import CELU_ALPHA, SUBJECT_ORDER

Rows = list[list[str]]


def to_json(result: dict, path: Path) -> None:
    """Write the whole result, medians and quartiles included."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def to_terminal(result: dict) -> None:
    """Print the tables, the bars and the remarks."""
    print_page(headline(result), tables(result), remarks(result))


def print_page(head: str, made: list[tuple[str, Rows]], lines: list[str]) -> None:
    """Print a headline, tables as `tables` makes them, and remarks."""
    console = Console()
    # Not a terminal (a log, a pipe): wide enough for whole rows.
    if not console.is_terminal:
        console = Console(width=160)
    console.print(head, style="bold", highlight=False)
    for title, rows in made:
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(rows[0]):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in lines:
        console.print(line, highlight=False, markup=False)


def to_markdown(result: dict, path: Path) -> None:
    """Write the tables into a Markdown file, as `write_section` does.

    Args:
        result: The result of a run.
        path: The file, made if it does not exist.
    """
    write_section(result, path, "Operators", tables(result), remarks(result))


def write_section(
    result: dict, path: Path, subject: str, made: list[tuple[str, Rows]], notes: list[str]
) -> None:
    """Write a headline, tables and remarks into a Markdown file.

    The section of an earlier run with as many threads and the same instruction set is replaced;
    everything else in the file stays, and without such a section the new one is appended.

    Args:
        result: The result of a run.
        path: The file, made if it does not exist.
        subject: What was measured, for the heading.
        made: Tables as `tables` makes them.
        notes: The remarks.
    """
    threads, isa = result["environment"]["threads"], result["environment"]["isa"]
    begin, end = (
        f"<!-- benchmarks {result['benchmark']}, threads {threads}, isa {isa}: {word} -->"
        for word in ("begin, generated", "end")
    )
    parts = [begin, "", f"### {subject}, {_threads(threads)}, {isa}", "", headline(result), ""]
    for title, rows in made:
        lines = [" | ".join(row) for row in rows]
        lines.insert(1, "---" + " | ---:" * (len(rows[0]) - 1))
        parts += [f"**{title}**", "", *(f"| {line} |" for line in lines), ""]
    parts += [f"- {line}" for line in notes] + ["", end]
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
    made = []
    for dtype in dict.fromkeys(case["dtype"] for case in result["cases"]):
        cases = [case for case in result["cases"] if case["dtype"] == dtype]
        subject = figures.subject(cases[0])
        made += [
            (f"Time, {dtype}: ns per element (median)", _times(cases)),
            (f"Speed of {subject}, {dtype}: their time over ours (median)", _speeds(cases)),
        ]
    if result["scaling"]:
        rows = [["operator", "two threads over one"]]
        rows += [
            [f"{_label(entry)} {entry['dtype']}, order {entry['order']}", spread(entry["speedup"])]
            for entry in result["scaling"]
        ]
        made.append(("Speed of two threads over one, median (quartiles) of the rounds", rows))
    if result["call_overhead"]:
        rows = [["operator", "quake_jax", "jax.nn", "difference"]]
        for name, o in result["call_overhead"].items():
            quartiles = f"({o['difference_low_us']:.3f}–{o['difference_high_us']:.3f})"
            rows.append(
                [
                    name,
                    f"{o['quake_jax_us']:.3f}",
                    f"{o['jax_nn_us']:.3f}",
                    f"{o['difference_us']:+.3f} {quartiles}",
                ]
            )
        made.append(("One call of 16 elements inside a jitted program, µs", rows))
    made += bars_table(result)
    if result["default_orders"]:
        orders = list(result["default_orders"][0]["times"])
        rows = [["operator", *orders, "default"]]
        for decided in result["default_orders"]:
            times = [spread(decided["times"][order]) for order in orders]
            rows.append([decided["function"], *times, str(decided["default"])])
        made.append((f"Default order: time relative to order {SUBJECT_ORDER}, float32 in L2", rows))
    return made


def bars_table(result: dict) -> list[tuple[str, Rows]]:
    """The table of the bars, or none where a run is not judged."""
    if not result["bars"]:
        return []
    rows = [["bar", "figure", "wanted", ""]]
    for bar in sorted(result["bars"], key=lambda bar: bar["met"]):  # the missed ones first
        sign = "≥" if bar["at_least"] else "≤"
        rows.append(
            [
                bar["name"],
                f"{bar['figure']:.2f} {bar['unit']}",
                f"{sign} {bar['threshold']:.2f} {bar['unit']}",
                "met" if bar["met"] else "MISSED",
            ]
        )
    missed = sum(not bar["met"] for bar in result["bars"])
    return [(f"Bars ({missed} of {len(result['bars'])} missed)", rows)]


def _times(cases: list[dict]) -> Rows:
    names = list(
        dict.fromkeys(
            name
            for case in cases
            for name in figures.systems(case)
            # Order 4 is measured only to decide the default order, which has a table of its own.
            if name != "order 4" or all(name in case["contestants"] for case in cases)
        )
    )
    rows = [["operator", *names, "copy"]]
    for case in cases:
        entries = [case["contestants"].get(name) for name in names]
        times = ["–" if e is None else _number(e) for e in entries]
        rows.append([_label(case), *times, _number(case["contestants"][case["copy"]])])
    return rows


def _number(entry: dict) -> str:
    return f"{entry['ns_per_element']:.3f}" + ("†" if entry["doubtful"] else "")


def _speeds(cases: list[dict]) -> Rows:
    others = list(
        dict.fromkeys(name for case in cases for r in case["ratios"].values() for name in r)
    )
    head = ["operator", *others, "fastest (quartiles)", "share of copy"]
    rows = [[*head, "cycles/16", "bound", "largest error"]]
    for case in cases:
        subject = figures.subject(case)
        ratios, entry = case["ratios"][subject], case["contestants"][subject]
        fastest = figures.fastest(ratios)
        rows.append(
            [
                _label(case),
                *(f"{ratios[name]['median']:.2f}" if name in ratios else "–" for name in others),
                spread(fastest[1]) if fastest else "–",
                f"{100 * figures.share_of_copy(case, subject):.0f} %",
                _cycles(entry.get("cycles_per_16")),
                _cycles(entry.get("bound_cycles_per_16")),
                f"{entry['relative_error']:.1e}",
            ]
        )
    # Columns that a run has nothing for (several threads, another CPU) are left out.
    kept = [i for i in range(len(rows[0])) if any(row[i] != "–" for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _cycles(cycles: float | None) -> str:
    return "–" if cycles is None else f"{cycles:.2f}"


def spread(quartiles: dict) -> str:
    """The median, and the quartiles in brackets."""
    return f"{quartiles['median']:.2f} ({quartiles['low']:.2f}–{quartiles['high']:.2f})"


def remarks(result: dict) -> list[str]:
    """Say what a reader of the tables must know."""
    settings = result["settings"]
    rounds = sorted({case["rounds"] for case in result["cases"]}, reverse=True)
    few = f" ({rounds[-1]} for arrays in DRAM)" if len(rounds) > 1 else ""
    lines = [
        f"{rounds[0]} interleaved rounds{few}, readings of at least "
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
            "8 instructions (`benchmarks/instructions.py`); none for operators of several loops."
        )
    if result["environment"]["isa"] == "avx2":
        lines.append("AVX2 is forced on quake_jax alone: the other libraries use AVX-512 too.")
    if settings["allocator"] == "system":
        lines.append("The system's allocator was left as it is: page faults are part of the times.")
    lines += quality_remarks(result)
    for name, labels in result["lacking"].items():
        lines.append(f"Not implemented in {name}: {', '.join(_grouped(labels))}.")
    return lines


def quality_remarks(result: dict) -> list[str]:
    """Say what was rejected, what is doubtful, and what was left out."""
    lines = []
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


def _grouped(labels: list[str]) -> list[str]:
    """Functions by dtype, from labels `function dtype`."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        function, dtype = label.split()
        groups.setdefault(dtype, []).append(function)
    return [f"{' '.join(functions)} in {dtype}" for dtype, functions in groups.items()]


def _label(case: dict) -> str:
    level = f" ({case['level']})" if case.get("level") else ""
    return f"{case['function']} {'×'.join(map(str, case['shape']))}{level}"


def _threads(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"
