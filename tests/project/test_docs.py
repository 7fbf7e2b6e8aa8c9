"""The examples in docstrings and documents run as they stand.

The documents' commands name files, modules and options of the repository that exist, and their
links lead somewhere.
"""

import doctest
import functools
import importlib
import os
import pathlib
import re
import shlex
import tomllib
import types
from unittest import mock

import pytest

import quake_jax

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
]
# Their examples must not get lost.
WITH_EXAMPLES = {
    "README.md",
    "docs/index.md",
    "docs/substitution.md",
    "docs/approximations.md",
    "docs/scaling.md",
}


# Public ones, whose functions have examples.
MODULES = ("quake_jax.kv_cache", "quake_jax.linen", "quake_jax.nnx")


def documented():
    """The names of public functions and classes with examples."""
    for module in (quake_jax, *map(importlib.import_module, MODULES)):
        for name in sorted(getattr(module, "__all__", vars(module))):
            value = getattr(module, name)
            own = getattr(value, "__module__", "").startswith("quake_jax")
            if name[0] != "_" and own and not isinstance(value, types.ModuleType):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("function", list(documented()))
def test_docstring(function):
    tests = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert sum(len(test.examples) for test in tests), "no example"
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
        assert result.failed == 0


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_pages_have_their_examples():
    assert {page for page in PAGES if _blocks(page, "python")} >= WITH_EXAMPLES


@pytest.mark.parametrize("page", [page for page in PAGES if _blocks(page, "python")])
def test_page(page, tmp_path, monkeypatch):
    names: dict = {}
    # What a page writes here and there does not outlive it.
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(os.environ):
        for block in _blocks(page, "python"):
            exec(compile(block, page, "exec"), names)


def _commands(page: str) -> list[list[str]]:
    """The commands in a page's blocks of shell, and those of Python in its text, as words."""
    text = (ROOT / page).read_text()
    lines = [
        line for block in _blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`((?:[A-Z_]+=\S+ )*python [^`\n]+)`", text)
    commands = []
    for line in lines:
        # Not within double quotes: an even number of them follows.
        for command in re.split(r'(?:&&|\|\||[|;])(?=(?:[^"]*"[^"]*")*[^"]*$)', line):
            # What [--option VALUE] may be left out is checked all the same.
            words = shlex.split(command.replace("[--", "--").replace("] ", " "), comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                commands.append([word.rstrip("]") if word[:2] == "--" else word for word in words])
    return commands


@functools.cache
def _sources(place: pathlib.Path) -> str:
    """The text of a script and what lies beside it, where its options may be declared."""
    folder = place if place.is_dir() else place.parent
    return "".join(path.read_text() for path in sorted(folder.rglob("*.py")))


def _python_program(words: list[str]) -> tuple[pathlib.Path | None, list[str]]:
    """The file or package of this repository that `python WORDS` runs, and its arguments."""
    if words[:1] == ["-m"]:
        path = ROOT.joinpath(*words[1].split("."))
        if (ROOT / path.relative_to(ROOT).parts[0]).exists():
            return (path if path.is_dir() else path.with_suffix(".py")), words[2:]
    elif words and words[0].endswith(".py"):
        return ROOT / words[0], words[1:]
    return None, []


def _faults(words: list[str]) -> list[str]:
    """What a command names that is not in the repository."""
    program, arguments = words[0], words[1:]
    faults = [
        word
        for word in words
        if re.fullmatch(r"(\./)?(\.ci|tests|tools|examples|cpu_kernels|benchmarks)/[\w./-]+", word)
        and not (ROOT / word).exists()
        and not word.startswith(".ci/")  # not in an sdist
    ]
    if re.fullmatch(r"python[\d.]*", program):
        path, arguments = _python_program(arguments)
        if path is not None:
            if not path.exists():
                return [*faults, str(path)]
            options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            # Some are declared in a loop over their names, f"--{name}".
            faults += [
                option
                for option in options - {"--help"}
                if not re.search(f'"(--)?{option[2:]}"', _sources(path))
            ]
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = re.findall(r"\.\[([\w,]+)\]", " ".join(words))
        named = {name for extra in extras for name in extra.split(",")}
        faults += named - set(project["optional-dependencies"])
    elif program == "pytest":
        markers = (ROOT / "pyproject.toml").read_text()
        named = [words[k + 1] for k, word in enumerate(words) if word == "-m"]
        faults += [name for name in named if f'"{name}: ' not in markers]
    elif program == "cmake":
        files = [ROOT / "CMakeLists.txt", ROOT / "cpu_kernels/tests/CMakeLists.txt"]
        text = "".join(path.read_text() for path in files)
        options = re.findall(r"-D(QUAKE_\w+)=", " ".join(words))
        faults += [o for o in options if f"option({o} " not in text and f"set({o} " not in text]
    return faults


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python tools/no_such_file.py", "no_such_file.py"),
        ("python -m benchmarks.no_such_module", "no_such_module.py"),
        ("python -m benchmarks ops --no-such-option", "--no-such-option"),
        ("pip install '.[test,no_such_extra]'", "no_such_extra"),
        ("pytest -m no_such_marker", "no_such_marker"),
        ("cmake -S . -DQUAKE_NO_SUCH=ON", "QUAKE_NO_SUCH"),
    ],
)
def test_faulty_commands_are_found(command, fault):
    assert any(fault in found for found in _faults(shlex.split(command)))


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page)])
def test_commands_name_what_exists(page):
    found = {" ".join(words): _faults(words) for words in _commands(page)}
    assert {command: faults for command, faults in found.items() if faults} == {}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def _tables(page: str) -> dict[str, set[str]]:
    """The rows of a page's tables, by heading."""
    found: dict[str, set[str]] = {}
    head = None
    for line in (ROOT / page).read_text().splitlines():
        if not line.startswith("|"):
            head = None
        elif head is None:
            head = line
            found.setdefault(head, set())
        elif not re.fullmatch(r"[|: -]+", line):
            found[head].add(line)
    return found


def test_figures_on_pages_are_those_of_the_results():
    """A page's table with the heading of one of the generated tables consists of rows of those."""
    results: dict[str, set[str]] = {}
    quoted: dict[str, list[set[str]]] = {}
    for page in sorted(PAGES, key=lambda page: not page.startswith("docs/results/")):
        for head, rows in _tables(page).items():
            if page.startswith("docs/results/"):
                results.setdefault(head, set()).update(rows)
            elif head in results:
                quoted.setdefault(page, []).append(rows - results[head])
    assert quoted.keys() >= {"docs/benchmarks.md", "docs/quality.md", "docs/accuracy.md"}
    assert not set().union(*(rows for tables in quoted.values() for rows in tables))


def test_the_accuracy_page_has_the_worst_of_all_instruction_sets():
    """Of each function and order in float32, as in the generated table."""
    worst: dict[str, list[str]] = {}
    table = (ROOT / "docs/results/accuracy.md").read_text().partition("\n## float32\n")[2]
    for line in table.partition("\n## ")[0].splitlines():
        if re.match(r"\| \w+ \| \d \|", line):
            function, _, _, *errors = line.strip("| ").split(" | ")
            largest = max((error.split()[0] for error in errors), key=float)
            worst.setdefault(function, []).append(largest)
    page = (ROOT / "docs/accuracy.md").read_text()
    missing = [f for f, errors in worst.items() if f"| {f} | {' | '.join(errors)} |" not in page]
    assert len(worst) > 10 and not missing


def test_environment_variables_exist():
    """Every QUAKE_… that a document names is read somewhere."""
    folders = ("quake_jax", "cpu_kernels", "benchmarks", "tests", "tools", "examples")
    files = [ROOT / "CMakeLists.txt", ROOT / "mkdocs.yml"]
    for folder in folders:
        files += [path for path in (ROOT / folder).rglob("*.*") if path.suffix in _SOURCES]
    text = "".join(path.read_text() for path in files)
    known = set(re.findall(r"QUAKE_[A-Z_]+", text))
    for page in PAGES:
        assert set(re.findall(r"QUAKE_[A-Z_]+", (ROOT / page).read_text())) <= known, page


_SOURCES = (".py", ".cc", ".h", ".txt", ".cmake", ".sh")


def test_every_public_function_is_in_the_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: quake_jax\.([\w.]+)$", pages, re.M))
    for parameter in documented():
        name = f"{parameter.values[0].__module__}.{parameter.values[0].__name__}"
        assert name.removeprefix("quake_jax.") in listed, parameter.id
