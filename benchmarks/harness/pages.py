"""How a result is shown: tables on the terminal, JSON, and a section of a Markdown file.

The terminal and the Markdown file show the same rows; the subjects' modules `report` make them.
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

Rows = list[list[str]]
Table = tuple[str, Rows]  # a title, and rows with the heading first
Column = tuple[str, Callable[[Any], str]]  # a heading, and what an entry has below it
NONE = "–"
TEXTS = Path(__file__).parents[1]  # where the subjects have what their pages say


class Page(NamedTuple):
    """What a result amounts to."""

    heading: str
    tables: list[Table]
    remarks: list[str]


def to_json(result: dict, path: Path) -> None:
    """Write the whole result, medians and quartiles included."""
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def to_terminal(result: dict, page: Page) -> None:
    """Print the page of a result."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # Not a terminal (a log, a pipe): wide enough for whole rows.
    if not console.is_terminal:
        console = Console(width=160)
    console.print(headline(result), style="bold", highlight=False)
    for title, rows in page.tables:
        table = Table(title=title, title_justify="left")
        for i, head in enumerate(rows[0]):
            table.add_column(head, justify="left" if i == 0 else "right")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in page.remarks:
        console.print(line, highlight=False, markup=False)


def to_markdown(result: dict, page: Page, path: Path) -> None:
    """Write the page of a result into a Markdown file, which is made if it does not exist.

    The section of an earlier run with as many threads and the same instruction set is replaced;
    everything else in the file stays, and without such a section the new one is appended.
    """
    threads, isa = result["environment"]["threads"], result["environment"]["isa"]
    begin, end = (
        f"<!-- benchmarks {result['benchmark']}, threads {threads}, isa {isa}: {word} -->"
        for word in ("begin, generated", "end")
    )
    # Runs of other kinds (a dtype, an allocator) have sections of their own.
    _, *kinds = result["benchmark"].split(", ")
    heading = ", ".join([f"### {page.heading}", *kinds, _threads(threads), isa])
    parts = [begin, "", heading, "", _wrapped(headline(result)), ""]
    for title, rows in page.tables:
        lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
        lines.insert(1, "---" + " | ---:" * (len(rows[0]) - 1))
        parts += [f"**{title}**", "", *(f"| {line} |" for line in lines), ""]
    parts += [_wrapped(f"- {line}", "  ") for line in page.remarks] + ["", end]
    section = "\n".join(parts)
    text = path.read_text() if path.exists() else ""
    old = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if old.search(text):
        text = old.sub(lambda _: section, text)
    else:
        text = f"{text.rstrip()}\n\n{section}\n".lstrip()
    path.write_text(text)


def _wrapped(line: str, indent: str = "") -> str:
    """Prose in lines of at most 100 characters."""
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line, 100, subsequent_indent=indent, **options)


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


def _threads(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


# --- What several reports write alike


def spread(quartiles: dict) -> str:
    """The median, and the quartiles in brackets."""
    return f"{quartiles['median']:.2f} ({quartiles['low']:.2f}–{quartiles['high']:.2f})"


def median(quartiles: dict | None) -> float | None:
    """The median of what was measured, or None."""
    return quartiles["median"] if quartiles else None


def number(value: float | None, digits: int = 2, unit: str = "", sign: str = "") -> str:
    """A number with so many digits after the point; what rounds to zero has no minus."""
    return NONE if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}{unit}"


def doubt(entry: dict) -> str:
    """The mark of a figure that rests on disturbed readings."""
    return "†" if entry["doubtful"] else ""


def names_in(lists: Iterable[Iterable[str]]) -> list[str]:
    """The names in any of the lists, in the order in which they first come."""
    return list(dict.fromkeys(name for one in lists for name in one))


def filled(tables: Iterable[Table]) -> list[Table]:
    """The tables without the columns that a run has nothing for, and those of which something is
    left.
    """
    made = []
    for title, (heading, *rows) in tables:
        kept = [i for i in range(len(heading)) if any(row[i] != NONE for row in rows)]
        if len(kept) > 1:
            made.append((title, [[row[i] for i in kept] for row in (heading, *rows)]))
    return made


def rows_of(entries: Iterable[Any], *columns: Column) -> Rows:
    """A row for each entry."""
    entries = [[cell(entry) for _, cell in columns] for entry in entries]
    return [[heading for heading, _ in columns], *entries]


def named_columns(
    names: Iterable[str],
    cell: Callable[[Any], str],
    of: Callable[[dict], dict],
    heading: Callable[[str], str] = str,
) -> list[Column]:
    """A column for each name with what an entry has of it: in `contestants`, its ratios, …"""

    def column(name: str) -> Column:
        return heading(name), lambda entry: cell(of(entry)[name]) if name in of(entry) else NONE

    return [column(name) for name in names]


def of_contestants(
    names: Iterable[str], cell: Callable[[dict], str], heading: Callable[[str], str] = str
) -> list[Column]:
    """Those of contestants."""
    return named_columns(names, cell, lambda case: case["contestants"], heading)


def contestants(cases: list[dict]) -> list[str]:
    """The names of all contestants of the cases."""
    return names_in(case["contestants"] for case in cases)


def by_dtype(cases: list[dict]) -> dict[str, list[dict]]:
    """The cases of each dtype."""
    dtypes = dict.fromkeys(case["dtype"] for case in cases)
    return {dtype: [case for case in cases if case["dtype"] == dtype] for dtype in dtypes}


def two_threads(heading: str, label: Callable[[dict], str], entries: list[dict]) -> list[Table]:
    """The table of the speed of two threads over one, if any."""
    columns = (heading, label), ("two threads over one", lambda entry: spread(entry["speedup"]))
    title = "Speed of two threads over one, median (quartiles) of the rounds"
    return [(title, rows_of(entries, *columns))] if entries else []


def rounds_of(result: dict, where_few: str) -> str:
    """Say how many rounds there were, and how many in the cases that had fewer."""
    counts = sorted({case["rounds"] for case in result["cases"]}, reverse=True)
    few = f" ({counts[-1]} {where_few})" if len(counts) > 1 else ""
    return f"{counts[0]} interleaved rounds{few}"


def prose(path: str, result: dict, **values: Any) -> list[str]:
    """The paragraphs of a text in this package, with the values, and what the result has, put in. A
    paragraph that begins with [NAME] is left out where that value is false.
    """
    values = {
        "milliseconds": 1e3 * result["settings"].get("reading_seconds", 0),
        **result,
        **values,
    }
    lines = []
    for paragraph in (TEXTS / path).read_text().split("\n\n"):
        condition, text = re.fullmatch(r"(?:\[(\w+)\] )?(.*)", " ".join(paragraph.split())).groups()
        if condition is None or values[condition]:
            lines.append(text.format(**values))
    return lines


def isa_remarks(result: dict) -> list[str]:
    """Say that the other libraries use what the processor has."""
    if not (result["environment"]["isa"] == "avx2" and result["environment"]["isa_forced"]):
        return []
    return ["AVX2 is forced on quake_jax alone: the other libraries use AVX-512 too."]


def run_remarks(result: dict) -> list[str]:
    """What every run says: the bars that were not judged, the allocator, which readings were
    rejected or are doubtful, and what was left out.
    """
    entries = [entry for case in result["cases"] for entry in case["contestants"].values()]
    system = result["settings"]["allocator"] == "system"
    by_reason: dict[str, list[str]] = {}
    for name, why in result["left_out"].items():
        by_reason.setdefault(why, []).append(name)
    said = prose(
        "harness/remarks.txt",
        result,
        not_judged=", ".join(f"{n} for {isa}" for isa, n in result["bars_not_judged"].items()),
        system=system,
        kept=not system,
        faults=max(entry["faults_per_call"] for entry in entries) if system else 0,
        rejected=sum((Counter(entry["rejected"]) for entry in entries), Counter()),
        doubtful=sum(entry["doubtful"] for entry in entries),
        left_out="; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items()),
    )
    return isa_remarks(result) + said
