"""What a rewrite did and what it left alone: the report that `quake_jax.explain` returns."""

from __future__ import annotations

import dataclasses
import os
import site
import sys
import sysconfig
from collections import Counter

from quake_jax._core import jax_names
from quake_jax._core.tables import Table


@dataclasses.dataclass(frozen=True)
class Record:
    """A function that was found in a program.

    Attributes:
      name: what it is, one of the names that `only` takes, or a primitive of JAX.
      replacement: the public function that it was replaced by, or None if it was left.
      reason: why it was left, or "".
      where: "file:line (function)" in the user's source: what made it, or called what did.
      count: how many times it was found there.
    """

    name: str
    replacement: str | None
    reason: str
    where: str
    count: int = 1


class Report:
    """What was replaced and what was left; `print` and `rich.print` give a table.

    Attributes:
      replaced: list of `Record`, in the order of the program.
      left: list of `Record` with reasons.
    """

    def __init__(self, records: Counter | None = None):
        self._records: Counter = Counter() if records is None else records

    def add(self, name: str, replacement: str | None, reason: str, where: str) -> None:
        self._records[Record(name, replacement, reason, where)] += 1

    def update(self, other: Report, where: str = "") -> None:
        """Add another report's records; `where` is the place of those that have none."""
        for record, count in other._records.items():
            placed = record if record.where else dataclasses.replace(record, where=where)
            self._records[placed] += count

    def _listed(self, is_replaced: bool) -> list[Record]:
        return [
            dataclasses.replace(record, count=count)
            for record, count in self._records.items()
            if (record.replacement is not None) == is_replaced
        ]

    @property
    def replaced(self) -> list[Record]:
        return self._listed(True)

    @property
    def left(self) -> list[Record]:
        return self._listed(False)

    def __repr__(self) -> str:
        replaced, left = (sum(r.count for r in x) for x in (self.replaced, self.left))
        return f"<quake_jax report: {replaced} replaced, {left} left; print it for the table>"

    def _table(self) -> Table | str:
        rows = [
            ("replaced", r.name, str(r.count), r.replacement or "", r.where) for r in self.replaced
        ]
        rows += [("left", r.name, str(r.count), r.reason, r.where) for r in self.left]
        if not rows:
            return "nothing to replace was found"
        return Table(("", "found", "count", "replaced by / why left", "where"), rows)

    def __str__(self) -> str:
        return str(self._table())

    def __rich__(self):
        return self._table()


_LIBRARIES = tuple(
    os.path.join(os.path.realpath(path), "")
    for path in {
        *site.getsitepackages(),
        sysconfig.get_paths()["stdlib"],
        os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    }
)


def place(source_info) -> str:
    """ "file:line (function)" of the innermost frame that is in no installed library, or ""."""
    return _innermost(jax_names.user_frames(source_info))


def call_site() -> str:
    """The same of the frames that are running."""
    frame, frames = sys._getframe(1), []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname))
        frame = frame.f_back
    return _innermost(frames)


def _innermost(frames) -> str:
    own = (f for f in frames if not os.path.realpath(f[0]).startswith(_LIBRARIES))
    return next((f"{file}:{line} ({function})" for file, line, function in own), "")
