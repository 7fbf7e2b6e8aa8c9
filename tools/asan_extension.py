"""Runs Python tests against the compiled module, built with the address and undefined sanitizers.

    pip install cmake ninja nanobind
    python tools/asan_extension.py                # minutes to build, minutes to test
    python tools/asan_extension.py -k attention   # other arguments go to pytest

XLA's buffers come from the sanitizer's allocator, so a kernel that leaves an operand is reported
with its stack. The tests run with the first instruction set and with the best one. GCC does not
instrument the masked loads and stores with which AVX2 and AVX-512 treat the last elements of a row:
the baseline's element-wise ones stand in for them here, guard pages in cpu_kernels/tests see them.
A control comes first: a read beyond an array, which must be reported. Needs GCC on Linux; nothing
is installed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Every family of kernels, from many threads.
LOAD = ("tests/core/load_worker.py", "--calls", "20", "--round", "10")
# What reaches the compiled module in the most ways.
TESTS = (
    "tests/functions/test_errors.py",
    "tests/core/test_threads.py",
    "tests/attention/test_attention.py",
)
# Of pytest's options, those whose value is the next argument.
WITH_VALUE = "-c -k -m -n -o -p -r -W --deselect --ignore --rootdir".split()
# An array that may say that it is larger than its memory. JAX takes aligned memory as it is.
CONTROL = """
import ctypes, sys
import jax, jax.numpy as jnp, numpy as np
import quake_jax

count = int(sys.argv[1])
libc = ctypes.CDLL(None)
libc.aligned_alloc.restype = ctypes.c_void_p
libc.aligned_alloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
memory = libc.aligned_alloc(64, 64 * 4)
ctypes.memset(memory, 0, 64 * 4)
array = np.ctypeslib.as_array((ctypes.c_float * count).from_address(memory))
x = jnp.from_dlpack(array)
assert x.unsafe_buffer_pointer() == memory, "JAX has copied the array"
assert (np.asarray(jax.jit(quake_jax.exp)(x)) == 1).all()
"""


def build(folder: pathlib.Path, jobs: int) -> None:
    """Build the module with the sanitizers into `folder`."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    options = {
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",  # nanobind strips the symbols of a Release
        "QUAKE_SANITIZE": "ON",
        "Python_EXECUTABLE": sys.executable,
        "SKBUILD_PROJECT_VERSION": version,
    }
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    subprocess.run(command + [f"-D{name}={value}" for name, value in options.items()], check=True)
    target = ["--target", "_quake_jax_cpu", "--parallel", str(jobs)]
    subprocess.run(["cmake", "--build", str(folder), *target], check=True)


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Return the environment in which Python loads the module from `folder`."""
    # libstdc++ beside libasan, which looks for __cxa_throw when it starts.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # Python and XLA keep memory until the process ends: leaks are tests/core/test_load.py's.
        # The programs that LLVM compiles are not instrumented, and need no shadow of their own.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:abort_on_error=0:exitcode=86"
        ":allocator_may_return_null=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=86",
        "PYTHONMALLOC": "malloc",  # so that Python's own objects have red zones too
        "PJRT_NPROC": "4",  # threads in the pool that kernels share, on any machine
        "PYTHONPATH": os.pathsep.join(paths),
    }


def instruction_sets(variables: dict[str, str]) -> list[str]:
    """Return the first and the last of those that this machine supports."""
    code = "import quake_jax; print(*quake_jax.supported_isas())"
    names = subprocess.check_output([sys.executable, "-c", code], env=variables, text=True).split()
    return sorted({names[0], names[-1]}, key=names.index)


def check_control(variables: dict[str, str]) -> None:
    """Raise RuntimeError unless a read of a vector too many is reported, and nothing else."""
    for count, reported in ((64, False), (80, True)):
        result = subprocess.run(
            [sys.executable, "-c", CONTROL, str(count)],
            env=variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        found = "heap-buffer-overflow" in result.stderr and "quake" in result.stderr
        if found != reported or (result.returncode == 0) == reported:
            raise RuntimeError(f"control with {count} of 64 elements:\n{result.stderr}")
    print("control: a read of a vector too many is reported", flush=True)


def names_tests(arguments: list[str]) -> bool:
    """Return whether pytest's `arguments` name tests; the values of its options are none."""
    return any(
        (ROOT / argument.split("::")[0]).exists()
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if not argument.startswith("-") and before not in WITH_VALUE
    )


def main() -> int:
    """Build, then check the control and run the tests; return the worst exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build" / "asan")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once; 2 GB each")
    parser.add_argument("--build-only", action="store_true")
    options, pytest_arguments = parser.parse_known_args()
    folder = options.build.resolve()
    build(folder, options.jobs)
    if options.build_only:
        return 0
    if not names_tests(pytest_arguments):
        pytest_arguments += TESTS
    commands = (
        [sys.executable, *LOAD],
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *pytest_arguments],
    )
    variables, worst = environment(folder), 0
    for isa in instruction_sets(variables):
        print(f"== {isa}", flush=True)
        variables["QUAKE_JAX_ISA"] = isa
        check_control(variables)
        for command in commands:
            worst = max(worst, abs(subprocess.run(command, env=variables, cwd=ROOT).returncode))
    return worst


if __name__ == "__main__":
    sys.exit(main())
