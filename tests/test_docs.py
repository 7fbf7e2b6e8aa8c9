"""The examples in docstrings, README and docs run as they stand."""

import doctest
import importlib
import pathlib
import re
import types

import pytest

import quake_jax

ROOT = pathlib.Path(__file__).parents[1]
# Figures and design; everything else must have examples that run.
PAGES = ("README.md", "docs/substitution.md", "docs/approximations.md")


def documented():
    """The names of public functions and classes with examples."""
    for module in (quake_jax, *map(importlib.import_module, ("quake_jax.linen", "quake_jax.nnx"))):
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


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
