"""What a module defines, for its `__all__`: no list of names is kept by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def defined_in(module: Mapping[str, Any]) -> list[str]:
    """The public names of the functions and classes that a module, given its globals(), defines."""
    return [
        name
        for name, value in module.items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module["__name__"]
    ]
