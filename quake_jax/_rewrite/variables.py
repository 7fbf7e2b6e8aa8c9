"""What a traced function changes in models of Flax NNX that it is given: a program has no place for
it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping

import jax

from quake_jax._rewrite import jaxprs


def of_models(args, kwargs) -> dict[str, object]:
    """The arrays in models of Flax NNX among the arguments, by path."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return {}

    def is_model(x) -> bool:
        return isinstance(x, (nnx.Pytree, nnx.Variable))

    nodes, _ = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_model)
    return {
        jax.tree_util.keystr(path[1:] + inner, simple=True, separator="."): leaf
        for path, node in nodes
        if is_model(node)
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node)
    }


def without_changes(closed, results: int, origins: Mapping[str, int | None]):
    """A program without its results after the first `results`, and the names of those it loses.

    These are the changed variables in the order of their names; `origins` has for each the
    argument that held it before, or None. One that is that argument still, or is a result too, is
    not lost.
    """
    jaxpr = closed.jaxpr
    returned = jaxpr.outvars[:results]

    def is_lost(name, variable) -> bool:
        place = origins[name]
        same = place is not None and _source(jaxpr, variable) is jaxpr.invars[place]
        return not same and variable not in returned

    changed = zip(sorted(origins), jaxpr.outvars[results:], strict=True)
    lost = [name for name, variable in changed if is_lost(name, variable)]
    return jaxprs.with_equations(closed, jaxpr.eqns, returned), lost


def _source(jaxpr, variable):
    """The variable that `variable` is a copy of, made by calls that hand it through."""
    for equation in jaxpr.eqns:
        if variable in equation.outvars:
            called = equation.params.get("jaxpr")
            called = getattr(called, "jaxpr", called)
            if called is None or len(called.outvars) != len(equation.outvars):
                return variable
            inner = _source(called, called.outvars[equation.outvars.index(variable)])
            if inner not in called.invars:
                return variable
            return _source(jaxpr, equation.invars[called.invars.index(inner)])
    return variable


def warn_of_changes(fun: Callable, names: list[str]) -> None:
    # Copies were changed, made for a trace. nnx.jit would bring that to the caller's model.
    more = ", ..." if len(names) > 3 else ""
    warnings.warn(
        f"quake_jax.accelerate: {getattr(fun, '__name__', fun)} changes NNX variables of its "
        f"arguments ({', '.join(names[:3])}{more}), and the changes are lost, as under jax.jit. "
        "Use quake_jax.nnx.substitute(model) and nnx.jit, or return nnx.state(model)",
        stacklevel=2,
    )
