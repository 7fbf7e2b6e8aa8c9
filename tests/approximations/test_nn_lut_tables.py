"""Checks that the tables of the NN-LUT kernels are what benchmarks/studies/nn_lut fits.

The kernels are checked against the tables there, and their errors measured.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from quake_jax import approximations
from quake_jax.approximations import _nn_lut

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def tool():
    name = "_nn_lut_tables_under_test"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "benchmarks" / "studies" / "nn_lut" / "make_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fitted(tool):
    return tool.tables()


def test_the_tables_are_what_the_tool_fits(tool, fitted, monkeypatch):
    monkeypatch.setattr(tool, "tables", lambda: fitted)
    assert tool.main(["--check"]) == 0


def test_a_changed_number_is_no_table_of_the_tool(tool, fitted):
    """Of either kind of table, scalars, breakpoints, slopes and intercepts."""
    assert tool.same(tool.render(fitted), fitted)
    for k, t in enumerate(fitted[:3]):
        fields = ("breakpoints", "slopes", "intercepts") + ("upper", "scale") * bool(t.upper)
        for field in fields:
            value = np.array(getattr(t, field))
            value[(len(value) // 2,) if value.ndim else ()] *= 1.01
            changed = dataclasses.replace(t, **{field: value})
            text = tool.render([*fitted[:k], changed, *fitted[k + 1 :]])
            assert not tool.same(text, fitted), (t.name, field)
    assert not tool.same(tool.render(fitted).replace("kUniform", "kOther"), fitted)


def test_rounding_errors_do_not_make_another_table(tool, fitted):
    """The tables of functions whose values are off by up to an ulp, as other CPUs' are."""
    random = np.random.default_rng(0)
    for t in fitted:
        if "kSearch" not in t.name:
            continue
        name = "gelu" if "kGelu" in t.name else "exp"
        exact, lower, upper, left, right, _ = _nn_lut._FUNCTIONS[name]
        network = approximations.fit_relu_network(
            lambda x, exact=exact: exact(x) * (1 + 2.0**-52 * random.integers(-1, 2, x.shape)),
            lower,
            upper,
            len(t.slopes),
            left=left,
            right=right,
        )
        table = approximations.lookup_table(network, lower, upper)
        assert tool.alike(tool.Table(t.name, *dataclasses.astuple(table)), t)
