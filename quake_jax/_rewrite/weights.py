"""Where values that depend on parameters alone go in a program: into the programs inside
equations, and, by `lifted`, the packing of weights out of these again; and which of these one call
reads together.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

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


def read_together(jaxpr, labels: Sequence[Hashable | None]) -> Iterator[tuple]:
    """For each call of dense in a program with several packed weights: their labels, in order.

    `labels` are those of the inputs: of the packed weight that one is a leaf of, or None.
    """
    known = dict(zip(jaxpr.invars, labels, strict=True))
    for equation in jaxpr.eqns:
        read = tuple(None if hasattr(v, "val") else known.get(v) for v in equation.invars)
        found = tuple(dict.fromkeys(label for label in read if label is not None))
        if equation.primitive.name == "quake_dense" and len(found) > 1:
            yield found
        if len(found) == 1 and None not in read:  # a leaf that is arranged
            known.update((v, *found) for v in equation.outvars)
        is_rule = equation.primitive.name == "custom_jvp_call"
        for name, parameter in equation.params.items():
            inside = read if is_rule else origins_inside(equation, name, read)
            several = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
            for inner in several if inside and found else ():
                if hasattr(inner, "eqns"):
                    yield from read_together(getattr(inner, "jaxpr", inner), inside)
