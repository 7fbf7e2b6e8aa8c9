"""How much memory a call takes at most: what the process grows by while it runs (Linux only)."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROCESS = Path("/proc/self")
_FORGET_PEAK = "5"  # clear_refs: the peak becomes the present size (proc(5))


def growth(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """Call something: its result, and the largest growth of the process's resident memory in bytes,
    exact to some pages for each thread; None where the kernel does not tell.

    Freed memory is returned to the kernel first, so that whatever the call allocates and touches
    counts, whoever allocates it.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text(_FORGET_PEAK)
    except (AttributeError, OSError):
        return call(), None
    before = _kilobytes("VmRSS")
    result = call()
    peak = _kilobytes("VmHWM")
    return result, None if before is None or peak is None else 1024 * max(0, peak - before)


def _kilobytes(field: str) -> int | None:
    found = re.search(rf"^{field}:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    return int(found[1]) if found else None
