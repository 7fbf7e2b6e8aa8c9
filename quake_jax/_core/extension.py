"""Loads the compiled module `_quake_jax_cpu` and registers its kernels with XLA.

Nothing here starts a JAX backend: registration only fills XLA's table of custom-call targets.
"""

from __future__ import annotations

import hashlib
import pathlib

import jax

_REINSTALL = "run `pip install .` in the source folder of quake_jax"

try:
    import _quake_jax_cpu as _cpu
except ModuleNotFoundError as error:
    if error.name != "_quake_jax_cpu":
        raise
    raise ImportError(
        f"quake_jax's compiled module _quake_jax_cpu is not installed: {_REINSTALL}"
    ) from error


def source_digest(root: pathlib.Path) -> str:
    """Return the digest of the kernel sources below `root`, as the build computes it.

    It covers CMakeLists.txt and every .h and .cc file of cpu_kernels/ but those of its tests.
    """
    kernels = root / "cpu_kernels"
    sources = [
        path
        for path in kernels.rglob("*")
        if path.suffix in (".h", ".cc") and kernels / "tests" not in path.parents
    ]
    names = {path.relative_to(root).as_posix(): path for path in sources}
    names["CMakeLists.txt"] = root / "CMakeLists.txt"
    digest = hashlib.sha256()
    for name in sorted(names):
        content = hashlib.sha256(names[name].read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def _refuse_stale_build() -> None:
    """Raise ImportError if the package runs from a checkout whose kernels have since changed."""
    root = pathlib.Path(__file__).resolve().parent.parent.parent
    if not (root / "cpu_kernels").is_dir():
        return
    if source_digest(root) != _cpu.source_digest():
        raise ImportError(
            "quake_jax's compiled module is stale: it was built from other sources than those in "
            f"cpu_kernels/; {_REINSTALL}"
        )


_refuse_stale_build()

targets = tuple(sorted(_cpu.registrations()))
for _name, _handler in _cpu.registrations().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")
    # The leading num_batch_dims axes of a call may be split over devices: see primitive.py.
    jax.ffi.register_ffi_target_as_batch_partitionable(_name)


def version() -> str:
    """Return the version of quake_jax."""
    return _cpu.version()


def isa() -> str:
    """Return the instruction set in use.

    On x86-64 "baseline", "avx2", "avx2vnni", "avx512", "avx512vnni", "avx512bf16" or
    "avx512bf16amx"; on aarch64 "neon", "neondot" (products of bytes) or "neonbf16" (and of
    bfloat16 pairs). The best that the CPU has is chosen when quake_jax is imported; the
    environment variable QUAKE_JAX_ISA forces another.

    Example:
      >>> import quake_jax
      >>> name = quake_jax.isa()
    """
    return _cpu.isa()


def supported_isas() -> list[str]:
    """Return the instruction sets that this CPU and this build support, the best last.

    Example:
      >>> import quake_jax
      >>> quake_jax.isa() in quake_jax.supported_isas()
      True
    """
    return list(_cpu.supported_isas())


def disabled_export_checks() -> list:
    """Return the `disabled_checks` with which `jax.export.export` accepts quake_jax's kernels.

    Exporting refuses custom calls whose stability it does not know; this names those of quake_jax.

    Example:
      >>> import jax, jax.export, jax.numpy as jnp, quake_jax
      >>> exported = jax.export.export(
      ...     jax.jit(quake_jax.softmax), disabled_checks=quake_jax.disabled_export_checks()
      ... )(jnp.zeros((2, 3)))
    """
    from jax import export  # not imported with jax, and few programs need it

    return [export.DisabledSafetyCheck.custom_call(name) for name in targets]
