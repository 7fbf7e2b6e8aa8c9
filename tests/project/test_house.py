"""The rooms of the house (docs/design.md): their arrows, in both languages; that the table of
functions and the registry of kernels have the same ones; and the width of comments in C++."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import _quake_jax_cpu as cpu
import pytest
from support import KERNELS, ROOT

SOURCES = [p for p in sorted((ROOT / "cpu_kernels").rglob("*")) if p.suffix in (".h", ".cc")]


def lint_imports(root: pathlib.Path) -> subprocess.CompletedProcess:
    """Check the contracts of a root's pyproject.toml."""
    pytest.importorskip("importlinter")
    command = "import sys; from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=root, capture_output=True, text=True
    )


def test_no_arrow_goes_back_in_python():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_arrow_back_is_found(tmp_path):
    shutil.copytree(ROOT / "quake_jax", tmp_path / "quake_jax")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "quake_jax" / "_core" / "axes.py", "a") as file:
        file.write("import quake_jax._rows.api\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1 and "quake_jax._core is not allowed to import" in result.stdout


@pytest.fixture(scope="module")
def check_house():
    spec = importlib.util.spec_from_file_location("check_house", ROOT / "tools" / "check_house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_arrow_goes_back_in_cpp(check_house):
    assert check_house.wrong_includes() == []


def test_an_arrow_back_in_cpp_is_found(check_house, tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.h").write_text('#include "attention/driver.h"\n')
    (tmp_path / "b.h").touch()
    assert check_house.wrong_includes(tmp_path) == [
        "cpu_kernels/b.h belongs to no room of tools/check_house.py",
        "cpu_kernels/core/a.h must not include attention/driver.h",
    ]


def test_the_table_and_the_registry_have_the_same_kernels():
    assert set(cpu.elementwise_functions()) == {f.name for f in KERNELS}


def test_comments_in_cpp_are_at_most_112_columns_wide():
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 112 and "//" in line
    ]
    assert SOURCES and wide == []
