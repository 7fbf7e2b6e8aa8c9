"""What importing quake_jax does and does not do, and how it fails."""

import json
import pathlib
import shutil

from support import run_python

import quake_jax
from quake_jax._core import extension
from quake_jax._elementwise import table

PUBLIC = {
    *(row.public.__name__ for row in (*table.FUNCTIONS.values(), *table.FUSED.values())),
    "swish",
    "logaddexp",
    "softmax",
    "log_softmax",
    "logsumexp",
    "layer_norm",
    "rms_norm",
    "dot_product_attention",
    "packed_dot_product_attention",
    "dense",
    "pack",
    "pack_weight",
    "save_packed",
    "load_packed",
    "packed_shardings",
    "PackedFunction",
    "PackedLeaf",
    "PackReport",
    "PackedWeight",
    "LayerNorm",
    "RMSNorm",
    "accelerate",
    "explain",
    "approximations",
    "kv_cache",
    "linen",
    "nnx",
    "reference",
    "default_order",
    "set_default_order",
    "isa",
    "supported_isas",
    "disabled_export_checks",
    "__version__",
}


def test_public_names_have_documentation():
    for name in PUBLIC:
        assert hasattr(quake_jax, name), name
        if name != "__version__":
            assert getattr(quake_jax, name).__doc__.strip(), name


def test_import_starts_no_backend_and_loads_no_flax(tmp_path):
    code = """
import json, sys
import jax
import quake_jax
quake_jax.isa(), quake_jax.supported_isas(), quake_jax.set_default_order(None)
# jax refuses this once a backend runs.
jax.config.update("jax_num_cpu_devices", 3)
modules = [m for m in ("flax", "rich", "scipy", "torch", "jax.export") if m in sys.modules]
print(json.dumps([modules, sorted(n for n in dir(quake_jax) if n[0] != "_"), len(jax.devices())]))
"""
    modules, names, devices = json.loads(run_python(code, tmp_path).stdout)
    assert modules == [name for name in modules if name in ("scipy", "jax.export")]
    assert devices == 3
    assert {*names, "__version__"} == PUBLIC


def test_isa_is_one_of_the_supported():
    assert quake_jax.isa() in quake_jax.supported_isas()
    assert "baseline" in quake_jax.supported_isas() or "neon" in quake_jax.supported_isas()


def test_an_instruction_set_can_be_forced_and_a_wrong_one_is_an_error(tmp_path):
    code = """
import jax.numpy as jnp, quake_jax
print(quake_jax.isa(), float(quake_jax.exp(jnp.float32(0.0))))
"""
    worst = quake_jax.supported_isas()[0]
    assert run_python(code, tmp_path, QUAKE_JAX_ISA=worst).stdout == f"{worst} 1.0\n"

    failed = run_python(code, tmp_path, check=False, QUAKE_JAX_ISA="avx1024")
    message = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 1 and message.startswith("ImportError")
    assert "QUAKE_JAX_ISA" in message and "avx1024" in message
    assert all(isa in message for isa in quake_jax.supported_isas())


def _checkout(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the package beside kernel sources that it was not built from."""
    package = pathlib.Path(quake_jax.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "quake_jax", ignore=ignore)
    (folder / "cpu_kernels" / "tests").mkdir(parents=True)
    (folder / "cpu_kernels" / "a.h").write_text("int a;\n")
    (folder / "CMakeLists.txt").write_text("project(x)\n")
    return folder


def test_missing_and_stale_extensions(tmp_path):
    code = """
import sys
sys.modules["_quake_jax_cpu"] = None  # as if it were not installed
try:
    import quake_jax
except ImportError as error:
    print(error)
del sys.modules["_quake_jax_cpu"]
try:
    import quake_jax
except ImportError as error:
    print(error)
"""
    root = _checkout(tmp_path)
    missing, stale = run_python(code, root, PYTHONPATH=str(root)).stdout.splitlines()
    assert "_quake_jax_cpu is not installed: run `pip install .`" in missing
    assert "stale" in stale and "run `pip install .`" in stale


def test_the_digest_covers_kernel_sources_and_not_their_tests(tmp_path):
    root = _checkout(tmp_path)
    digest = extension.source_digest(root)
    assert len(digest) == 64

    (root / "cpu_kernels" / "tests" / "test.cc").write_text("int main() {}\n")
    (root / "cpu_kernels" / "notes.md").write_text("notes\n")
    assert extension.source_digest(root) == digest

    seen = {digest}
    (root / "cpu_kernels" / "a.h").write_text("int b;\n")
    seen.add(extension.source_digest(root))
    (root / "cpu_kernels" / "b.cc").write_text("")
    seen.add(extension.source_digest(root))
    (root / "CMakeLists.txt").write_text("project(y)\n")
    seen.add(extension.source_digest(root))
    assert len(seen) == 4
