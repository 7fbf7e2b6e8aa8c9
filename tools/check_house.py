"""Checks the arrows between the rooms of the house, in both languages.

    pip install import-linter && python tools/check_house.py

Python's are the contracts under [tool.importlinter] in pyproject.toml. C++'s are the rules below: a
file includes only files of the rooms that its own room may know. The exit code is 1 if an arrow
goes elsewhere.
"""

from __future__ import annotations

import fnmatch
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "cpu_kernels"
FAMILIES = ("elementwise", "rows", "attention", "dense")

# Rooms of cpu_kernels, the first that fits: its files, and what they may include. FAMILY stands for
# the family that a file belongs to; no family includes another.
ROOMS = (
    ("core/*", ("core/*",)),
    # A family's kernels know the vector interface of the file that includes them.
    ("FAMILY/kernels.h", ("core/*",)),
    ("FAMILY/*-inl.h", ("core/*", "FAMILY/kernels.h", "FAMILY/*-inl.h")),
    # Only these know XLA: they decode, validate and call the driver.
    ("xla/*", ("xla/*", "core/*")),
    ("FAMILY/xla.*", ("xla/*", "FAMILY/xla.h", "FAMILY/driver.h", "isa/dispatch.h", "core/*")),
    # The driver and what it is cut into.
    ("FAMILY/*", ("FAMILY/*", "core/*")),
    ("table.h", ("*/kernels.h", "core/*")),
    ("isa/*", ("isa/*", "table.h", "core/*", "*/*-inl.h")),
    ("accuracy/*", ("accuracy/*", "table.h", "isa/dispatch.h", "elementwise/kernels.h", "core/*")),
    # What becomes the Python module.
    ("targets.*", ("targets.h", "*/xla.h", "xla/*")),
    ("module.cc", ("targets.h", "accuracy/bindings.h", "isa/dispatch.h")),
)


def rule_of(name: str) -> tuple[str, ...] | None:
    """What a file of cpu_kernels may include, or None if it has no room."""
    folder = name.partition("/")[0]
    for room, known in ROOMS:
        if "FAMILY" in room and folder not in FAMILIES:
            continue
        if fnmatch.fnmatch(name, room.replace("FAMILY", folder)):
            return tuple(pattern.replace("FAMILY", folder) for pattern in known)
    return None


def wrong_includes(root: pathlib.Path = KERNELS) -> list[str]:
    """The arrows of C++ that break a rule, as lines."""
    found = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix not in (".h", ".cc") or name.startswith("tests/"):
            continue
        known = rule_of(name)
        if known is None:
            found.append(f"cpu_kernels/{name} belongs to no room of tools/check_house.py")
            continue
        for other in re.findall(r'^#include "([^"]+)"', path.read_text(), flags=re.MULTILINE):
            if not any(fnmatch.fnmatch(other, pattern) for pattern in known):
                found.append(f"cpu_kernels/{name} must not include {other}")
    return found


def main() -> int:
    """Check both languages; return the exit code."""
    wrong = wrong_includes()
    print(*wrong, sep="\n") if wrong else print("cpu_kernels: no arrow back")
    linter = pathlib.Path(sys.executable).with_name("lint-imports")
    return max(subprocess.run([linter], cwd=ROOT, check=False).returncode, bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
