"""Checks that the tables of the NN-LUT kernels are what tools/nn_lut_tables.py fits.

The kernels are checked against the tables by cpu_kernels/tests/nn_lut, their errors measured there.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_what_the_tool_fits():
    name = "_nn_lut_tables_under_test"
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "nn_lut_tables.py")
    tool = importlib.util.module_from_spec(spec)
    sys.modules[name] = tool  # dataclasses look their module up
    spec.loader.exec_module(tool)
    assert tool.main(["--check"]) == 0
    header = tool.PATH.read_text(encoding="utf-8")
    assert not tool.same(header, header.replace("p+1f", "p+2f", 1))
