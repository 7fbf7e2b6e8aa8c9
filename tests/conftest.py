"""Eight CPU devices for the sharding tests, and fixtures that several folders use."""

import os

# XLA reads this when its backend starts, so it comes before anything that imports jax.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# NumPy's float64 products are small; with threads of their own they would wait for cores that the
# other process of pytest-xdist, and XLA, have.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import subprocess
import sys
from collections.abc import Callable

import pytest
from support import ROOT

# benchmarks is not installed; at the end of the path, the folder hides nothing that is.
sys.path.append(str(ROOT))


@pytest.fixture
def run_benchmarks() -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs `python -m benchmarks ARGUMENTS`."""

    def run(subcommand: str, *arguments: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "XLA_FLAGS": ""}
        if subcommand in ("quality", "approximations"):
            # The models that they try compile for longer than they run.
            environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", subcommand, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,  # against hangs only
        )

    return run
