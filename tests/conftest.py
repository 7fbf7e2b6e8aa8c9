"""Eight CPU devices for the sharding tests, fixtures of several folders, and what is quick."""

import importlib.metadata
import os

# Programs of tests run once, and XLA's optimizations take longer than all the rest together. They
# move rounding, within any stated bound, and lose some NaN: `optimized` is for tests of these.
# Started processes inherit this; JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles all as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# XLA reads its flags when its backend starts, so they come before anything that imports jax. The
# emitters of loops that use MLIR take as long as all else; a jaxlib after 0.10 has no others.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    + ["--xla_cpu_parallel_codegen_split_count=1", "--xla_cpu_use_fusion_emitters=false"]
    * (os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)

# NumPy's float64 products are small; with threads of their own they would wait for cores that the
# other process of pytest-xdist, and XLA, have.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc
import subprocess
import sys
import threading
from collections.abc import Callable

import jax
import pytest
from jax._src.interpreters import mlir
from support import ONE_DEVICE, ROOT, compiled_as_users_do

# `pytest -m quick`: at least one file of every family, of those that take seconds.
QUICK = (
    "accuracy/test_exhaustive.py",
    "attention/test_attention_properties.py",
    "benchmarks/test_benchmarks_harness.py",
    "core/test_config.py",
    "core/test_import.py",
    "core/test_versions.py",
    "dense/test_dense_errors.py",
    "dense/test_dense_properties.py",
    "functions/test_errors.py",
    "functions/test_fuzz.py",
    "functions/test_promotion.py",
    "linen/test_linen_modules.py",
    "project/test_docs.py",
    "project/test_house.py",
    "project/test_packaging.py",
    "rewrite/test_accelerate_approximations.py",
)
QUICK_FILES = {ROOT / "tests" / name for name in QUICK}
LONG = {"exhaustive", "soak", "fuzz", "models"}


def pytest_ignore_collect(collection_path, config):
    # Importing the others takes a quarter of a minute.
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return collection_path not in QUICK_FILES or None
    return None


def pytest_collection_finish():
    # What JAX caches is never garbage, and is most of what a collection walks through.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path in QUICK_FILES and not LONG & {marker.name for marker in item.iter_markers()}:
            item.add_marker("quick")


def _reuse_contexts(lowerings: int = 100):
    """Lower so many programs in one MLIR context: making one takes most of a small lowering."""
    make, contexts = mlir.make_ir_context, []

    def reused():
        if threading.current_thread() is not threading.main_thread():
            return make()
        contexts.extend([] if contexts else [make()] * lowerings)
        return contexts.pop()

    mlir.make_ir_context = reused


_reuse_contexts()

# benchmarks is not installed; at the end of the path, the folder hides nothing that is.
sys.path.append(str(ROOT))


@pytest.fixture(scope="module")
def optimized():
    """Programs compiled as users have them, for tests of what `jax.numpy` computes."""
    with compiled_as_users_do():
        jax.clear_caches()  # of operations that an earlier file has compiled without
        yield


@pytest.fixture
def run_benchmarks() -> Callable[..., subprocess.CompletedProcess]:
    """A function that runs `python -m benchmarks ARGUMENTS`."""

    def run(subcommand: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", subcommand, *arguments],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ONE_DEVICE},
            capture_output=True,
            text=True,
            timeout=600,  # against hangs only
        )

    return run
