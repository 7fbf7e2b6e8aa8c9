"""What a user can put right is one line instead of a traceback: an option, a missing package."""

import importlib.util
from pathlib import Path
from types import ModuleType


class BenchmarkError(Exception):
    """A problem that the user can put right; its text is one line."""


def check_files(*paths: Path | None) -> None:
    """Raise BenchmarkError if a file cannot be written, before anything is measured."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise BenchmarkError(f"{path}: no such folder as {path.parent}")
        if path is not None and path.is_dir():
            raise BenchmarkError(f"{path}: is a folder")


def missing(*packages: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require(*packages: str, extras: str = "bench") -> None:
    """Raise BenchmarkError if a package is not installed."""
    for name in missing(*packages):
        raise BenchmarkError(f"{name} is not installed: pip install '.[{extras}]'")


def quake_jax(needed: str) -> ModuleType:
    """The module quake_jax, if it has the function `needed`; BenchmarkError if it cannot be
    imported, or is an older version.
    """
    try:
        import quake_jax
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"{error.name} is not installed: pip install '.[bench]'") from error
    except ImportError as error:  # a stale build or an unknown instruction set; it says which
        raise BenchmarkError(str(error).splitlines()[0]) from error
    if not hasattr(quake_jax, needed):
        raise BenchmarkError(f"{quake_jax.__file__} has no {needed}: an older version")
    return quake_jax
