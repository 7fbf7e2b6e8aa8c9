"""The switches in the environment, read once, so that one process never mixes two settings."""

from __future__ import annotations

import os


def environment_switch(name: str) -> bool:
    """Return whether the environment variable `name` is on; raise ValueError if it says neither."""
    value = os.environ.get(name, "")
    if value.lower() in ("1", "true"):
        return True
    if value.lower() in ("", "0", "false"):
        return False
    raise ValueError(f"{name} must be 1 or true (on), 0, false or empty (off); got {value!r}")


DISABLED = environment_switch("QUAKE_JAX_DISABLE")
VERSION_WARNING_SILENCED = environment_switch("QUAKE_JAX_SILENCE_VERSION_WARNING")
