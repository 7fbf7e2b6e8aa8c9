"""Jaxprs and functions with something about them changed."""

from quake_jax._core import jax_names


def closed(jaxpr, consts):
    """An open jaxpr with the values of its constants."""
    return jax_names.ClosedJaxpr(jaxpr, consts)


def without_constants(jaxpr):
    """The inner jaxpr of an equation's parameter, if all its inputs are arguments; else None."""
    if getattr(jaxpr, "consts", None):
        return None
    open_jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return None if open_jaxpr.constvars else open_jaxpr


def with_equations(jaxpr, equations, outvars):
    """A Jaxpr or ClosedJaxpr with other equations and results, of the same types and names.

    There may be fewer results: the first ones.
    """

    def edited(inner):
        names = inner.debug_info
        if len(outvars) < len(inner.outvars):
            names = names._replace(result_paths=names.result_paths[: len(outvars)])
        return inner.replace(
            eqns=equations,
            outvars=outvars,
            debug_info=names,
            is_high=inner.is_high or jax_names.is_high(equations),
        )

    return jaxpr.map_jaxpr(edited) if hasattr(jaxpr, "consts") else edited(jaxpr)


def name_like(function, original):
    """A function with the name of another, which profiles and printed programs show."""
    name = getattr(original, "__name__", None) or type(original).__name__
    function.__name__ = name
    function.__qualname__ = getattr(original, "__qualname__", name)
    return function
