"""Tables for the terminal: as text, and drawn by rich where that is installed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells below a header; `numbers` are the columns that are aligned to the right.

    `print` gives text, `rich.print` a table with the columns folded to the terminal's width. The
    last row is the sum of the others if `has_total`.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()
    has_total: bool = False
    title: str | None = None

    def __str__(self) -> str:
        cells = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                x.rjust(w) if i in self.numbers else x.ljust(w)
                for i, (x, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        rule = "-" * max(map(len, lines))
        lines.insert(1, rule)
        if self.has_total:
            lines.insert(-1, rule)
        return "\n".join([*([self.title] if self.title else []), *lines])

    def __rich__(self):
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.header):
            justify = "right" if i in self.numbers else "left"
            table.add_column(name, justify=justify, overflow="fold")
        for i, row in enumerate(self.rows, 1):
            # As Text: brackets in a cell are no markup.
            cells = map(Text, row)
            table.add_row(*cells, end_section=self.has_total and i == len(self.rows) - 1)
        return table


def rich_group(parts: Sequence[object]):
    """What rich draws of tables, texts and others, with a line between any two."""
    from rich.console import Group
    from rich.text import Text

    drawn = (Text(part) if isinstance(part, str) else part for part in parts)
    return Group(*(x for part in drawn for x in (part, "")))
