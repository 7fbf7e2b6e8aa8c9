"""Which versions of JAX quake_jax has been tested with: refuses older ones, warns of newer ones.

Everything else that states the range (pyproject.toml, the workflows, the documents) is compared
with the two constants here by tests/core/test_versions.py.
"""

from __future__ import annotations

import re
import warnings

import jax

from quake_jax._core import switches

# The build takes jaxlib's headers from this version: see CONTRIBUTING.md.
OLDEST = "0.10.2"
NEWEST_TESTED = "0.12.0.1"

TESTED = f"jax {OLDEST} to {NEWEST_TESTED}"


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what marks it as a development version or candidate."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in numbers[0].split(".")) if numbers else ()


def refuse_older(jaxlib_version: str) -> None:
    """Raise ImportError if jax or jaxlib is older than any that quake_jax supports."""
    for name, version in (("jax", jax.__version__), ("jaxlib", jaxlib_version)):
        if release(version) < release(OLDEST):
            raise ImportError(
                f"quake_jax needs jax and jaxlib {OLDEST} or newer (it is tested with {TESTED}); "
                f"{name} here is {version}: run `pip install 'jax>={OLDEST}' 'jaxlib>={OLDEST}'`"
            )


def lacking(error: ImportError | AttributeError) -> ImportError:
    """The error that says that this JAX lacks a name that quake_jax uses."""
    return ImportError(
        f"quake_jax does not work with jax {jax.__version__}: {error}. It is tested with {TESTED}: "
        f"run `pip install 'jax<={NEWEST_TESTED}'`, or install a newer quake_jax"
    )


def warn_of_newer() -> None:
    """Warn if JAX is newer than the newest that quake_jax has been tested with."""
    if switches.VERSION_WARNING_SILENCED or release(jax.__version__) <= release(NEWEST_TESTED):
        return
    warnings.warn(
        f"quake_jax has not been tested with jax {jax.__version__}, only with {TESTED}. It uses "
        "private names of JAX: check it with `python -m quake_jax`, look for a newer quake_jax, or "
        f"run `pip install 'jax<={NEWEST_TESTED}'`. QUAKE_JAX_SILENCE_VERSION_WARNING=1 in the "
        "environment silences this warning",
        UserWarning,
        # The line that imports quake_jax, whose __init__ imports jax_names, which calls this.
        stacklevel=4,
    )
