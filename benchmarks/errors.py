"""The one exception that the benchmarks report as a single line instead of a traceback.

Everything that a user can put right (an option, a missing package) is raised as this.
"""

from pathlib import Path


class BenchmarkError(Exception):
    """A problem that the user can put right; its text is one line."""


def check_files(*paths: Path | None) -> None:
    """Raise BenchmarkError if a file cannot be written, before anything is measured."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise BenchmarkError(f"{path}: no such folder as {path.parent}")
        if path is not None and path.is_dir():
            raise BenchmarkError(f"{path}: is a folder")
