"""The errors of element-wise functions and of attention, measured: `python -m quake_jax.accuracy`.

Compares the kernels of each order, dtype and instruction set with double precision, on a sample of
the inputs or on all, and fails if one exceeds its bound; it writes docs/results/accuracy.md.
"""

from quake_jax.accuracy.command import main as main
from quake_jax.accuracy.elementwise import DTYPES as DTYPES
from quake_jax.accuracy.elementwise import FUNCTIONS as FUNCTIONS
from quake_jax.accuracy.elementwise import Accuracy as Accuracy
from quake_jax.accuracy.elementwise import Program as Program
from quake_jax.accuracy.elementwise import Special as Special
from quake_jax.accuracy.elementwise import bound as bound
from quake_jax.accuracy.elementwise import measure as measure
