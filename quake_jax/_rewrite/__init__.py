"""The rewriter of programs behind `quake_jax.accelerate`, `explain` and the Flax interceptor.

Its interface:

    options = checked_options(order, only)            # raises for bad arguments
    new, report = rewrite(closed_jaxpr, options)

`closed_jaxpr` is what `jax.make_jaxpr(f)(*arguments)` returns. `new` has the same inputs, outputs
and constants, and runs wherever the old one does (`jax.extend.core.jaxpr_as_fun`); if nothing is
replaced it is `closed_jaxpr` itself. `report` is a `Report` with the lists `replaced` and `left`.
The order that replacements without one use is the default in force when `rewrite` is called. What
a program calls is rewritten once, so that JAX compiles it once, however often the program is.

How it works, one file each: `graph` shows a jaxpr as values and nodes, with small jitted functions
opened up; `views` looks through equations that only arrange elements; `expressions` brings
element-wise equations into a normal form; `activations`, `softmax`, `logsumexp` and `attention`
find the patterns (`labels`, `masks`, `packing`, `arrangement` and `attend` belong to the last);
`narrow` makes bfloat16 what only bfloat16 is made of; `engine` chooses among the matches, writes
the new jaxpr, and goes into scan, cond and the like; `options` and `report` are what goes in and
comes out.
"""

from quake_jax._rewrite import views
from quake_jax._rewrite.engine import Rewriter
from quake_jax._rewrite.options import Options, checked_options
from quake_jax._rewrite.report import Record, Report, call_site

__all__ = [
    "Options",
    "Record",
    "Report",
    "call_site",
    "checked_options",
    "rewrite",
    "rewrite_called",
]


def rewrite(closed_jaxpr, options: Options, origins=None) -> tuple[object, Report]:
    """Return a program with its patterns replaced by kernels, and the report of what was done.

    With `origins`, which say for each input the format of the parameter that it is (see `Value`),
    the program packs its weights.
    """
    if options.does_nothing and origins is None:
        return closed_jaxpr, Report()
    try:
        return Rewriter(options).rewrite(closed_jaxpr, origins)
    finally:
        views.forget_constants()


def rewrite_called(closed_jaxpr, options: Options):
    """Return a program with the programs that it calls rewritten, and nothing else."""
    try:
        return Rewriter(options).rewrite_called(closed_jaxpr)
    finally:
        views.forget_constants()
