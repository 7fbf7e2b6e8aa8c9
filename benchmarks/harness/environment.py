"""What has to be settled before JAX starts (cores, threads, memory), and what a result must say
about the machine that it came from.

`prepare` must run before anything initialises a JAX backend: XLA sizes its thread pool once.
"""

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.harness.errors import BenchmarkError

ROOT = Path(__file__).resolve().parents[2]

# mallopt's parameters (malloc.h of glibc).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def prepare(threads: int, keep_pages: bool = True) -> None:
    """Pin the process to as many cores as it may use threads, and keep freed memory mapped.

    Threads inherit the pinning, so every pool that starts later shares those cores; XLA takes the
    size of its pool from PJRT_NPROC or NPROC, and without them from the pinning. Raise
    BenchmarkError if the process may not use that many cores.

    Kept pages stop glibc from returning freed memory to the kernel. XLA's softmax allocates a
    temporary of the size of its input at each call; by default glibc maps it afresh each time once
    it is large, and then page faults are most of what one measures.
    """
    allowed = allowed_cores()
    if allowed and threads > len(allowed):
        raise BenchmarkError(f"--threads {threads}: this process may use {len(allowed)} cores")
    # The last ones: interrupts and other processes prefer the first.
    pin(allowed[-threads:])
    os.environ["PJRT_NPROC"] = os.environ["NPROC"] = str(threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if keep_pages:
        _keep_freed_memory()

    import jax

    # A program runs on the thread that calls it, without a hop to another one on the same core.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def allowed_cores() -> list[int]:
    """The cores that this process may use; empty off Linux, where nobody tells."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(cores: list[int]) -> None:
    """Tie this process, and the threads that it starts from now on, to some cores (Linux)."""
    if cores:
        os.sched_setaffinity(0, cores)


def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # else not glibc; readings with page faults are still rejected
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)


def describe(threads: int) -> dict:
    """Describe this machine and the software on it, as json can write it; what cannot be found out
    is None. `threads` is the number that was given to `prepare`.
    """
    versions = {}
    for name in ("jax", "jaxlib", "numpy", "flax", "torch", "onnxruntime", "openvino", "nncf"):
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    # From the module: in a checkout it need not be installed.
    quake_jax = sys.modules.get("quake_jax")
    versions["quake_jax"] = quake_jax.__version__ if quake_jax else None
    changes = _git("status", "--porcelain")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpuinfo("model name") or platform.processor() or None,
        "isa": quake_jax.isa() if quake_jax else None,
        "isa_forced": "QUAKE_JAX_ISA" in os.environ,
        "threads": threads,
        "cores": allowed_cores() or None,
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else changes != "",
    }


def cpu_family() -> int | None:
    """The family that the CPU reports of itself (x86 on Linux only)."""
    family = _cpuinfo("cpu family")
    return int(family) if family else None


def cpu_flags() -> list[str]:
    """The extensions that the CPU reports of itself (x86 on Linux only)."""
    return (_cpuinfo("flags") or "").split()


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{field}\s*:(.*)$", path.read_text(), re.M) if path.exists() else None
    return found[1].strip() if found else None


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
