"""Tests of the tables of NN-LUT as kernels: they are fitted well, and the kernels compute them."""

import numpy as np
import pytest

from benchmarks.approximations import nn_lut
from benchmarks.harness.errors import BenchmarkError

# About twice the errors of 16 entries in docs/approximations.md. Of chords half as long they are a
# quarter, of tables with twice the entries somewhat more: where the table ends changes too.
LARGEST = {("exp", nn_lut.own): 2.6e-3, ("gelu", nn_lut.own): 6e-3}
LARGEST |= {("exp", nn_lut.by_bits): 6.4e-3, ("gelu", nn_lut.by_bits): 5.4e-3}


@pytest.mark.parametrize(("function", "make"), LARGEST)
@pytest.mark.parametrize("entries", [16, 32])
def test_tables_are_near_their_functions(function, make, entries):
    x = nn_lut.points(function)
    errors = np.abs(make(function, entries).at(function, x) - nn_lut.EXACT[function](x))
    assert errors.max() < LARGEST[function, make] * (16 / entries) ** 1.7


def test_the_kernels_are_what_their_tables_say():
    try:
        kernels = nn_lut.kernels()
    except BenchmarkError as error:
        pytest.skip(str(error))
    x = (4 + 2 * np.sin(0.1 * np.arange(1003) ** 2)).astype(np.float32)
    for kernel in kernels:
        kernel.check()
        if kernel.function != "softmax":
            np.testing.assert_array_equal(kernel(np.float32([-np.inf, np.nan])), [0, np.nan])
        elif kernel.table is not None:
            weights = kernel.table.at("exp", x - x.max())
            np.testing.assert_allclose(kernel(x) * weights.sum(), weights, atol=1e-5)
