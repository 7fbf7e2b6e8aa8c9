"""Where values that depend on parameters alone go in a program: into the programs inside
equations, and, by `lifted`, the packing of weights out of these again.
"""

from __future__ import annotations

from quake_jax._core import jax_names

Origins = tuple[frozenset | None, ...]

# Equations whose operands are, one by one, the inputs of their inner program.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


def origins_inside(equation, name: str, origins: Origins | None) -> Origins | None:
    """The origins of the inputs of an inner program, the parameter `name` of an equation."""
    if origins is None:
        return None
    kind, params = equation.primitive.name, equation.params
    if kind in CALLS:
        return origins
    if kind == "scan":
        consts, carry = jax_names.scan_counts(equation)
        return (*origins[:consts], *[None] * carry, *origins[consts + carry :])
    if kind == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        known = origins[:cond] if name == "cond_jaxpr" else origins[cond : cond + body]
        return (*known, *[None] * (len(origins) - cond - body))
    if kind == "cond":
        return origins[1:]
    # A derivative rule, or a mesh, has a word in what else the inputs are: nothing is packed.
    return None
