"""Tests of the tables of NN-LUT as kernels: they are fitted well, and the kernels compute them."""

import numpy as np
import pytest

from benchmarks.approximations import nn_lut
from benchmarks.harness.errors import BenchmarkError

# About twice the errors of 16 entries in docs/approximations.md. Of chords half as long they are a
# quarter, of tables with twice the entries somewhat more: where the table ends changes too.
LARGEST = {("exp", nn_lut.own): 2.6e-3, ("gelu", nn_lut.own): 6e-3}
LARGEST |= {("exp", nn_lut.by_bits): 6.4e-3, ("gelu", nn_lut.by_bits): 5.4e-3}


def from_table(table, function, x):
    """The function of a table, read entry by entry."""
    z = np.minimum(np.abs(x), abs(table.end)) if table.scale else x.astype(np.float64)
    k = np.searchsorted(table.breakpoints.astype(np.float32), z, side="right")
    z = np.copysign(z, table.end) if table.scale else z
    rest = np.maximum(x, 0) if table.scale and function == "gelu" else 0
    return table.slopes[k] * z + table.intercepts[k] + rest


@pytest.mark.parametrize(("function", "make"), LARGEST)
@pytest.mark.parametrize("entries", [16, 32])
def test_tables_are_near_their_functions(function, make, entries):
    x = nn_lut.points(function)
    errors = np.abs(from_table(make(function, entries), function, x) - nn_lut.EXACT[function](x))
    assert errors.max() < LARGEST[function, make] * (16 / entries) ** 1.7


def test_the_kernels_are_what_their_tables_say():
    try:
        kernels = nn_lut.kernels()
    except BenchmarkError as error:
        pytest.skip(str(error))
    logits = (4 + 2 * np.sin(0.1 * np.arange(1003) ** 2)).astype(np.float32)
    for kernel in kernels:
        if kernel.function != "softmax":
            np.testing.assert_array_equal(kernel(np.float32([-np.inf, np.nan])), [0, np.nan])
        if kernel.table is None:
            continue
        if kernel.function == "softmax":
            weights = from_table(kernel.table, "exp", logits - logits.max())
            np.testing.assert_allclose(kernel(logits) * weights.sum(), weights, atol=1e-5)
            continue
        x = nn_lut.points(kernel.function)
        # At a breakpoint a rounded sum may give the segment beside it, which meets it there.
        allowed = 2.0**-20 * np.maximum(1, np.abs(x))
        wanted = from_table(kernel.table, kernel.function, x)
        assert np.all(np.abs(kernel(x) - wanted) <= allowed), (kernel.function, kernel.name)
