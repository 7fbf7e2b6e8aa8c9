"""Element-wise programs of one variable in a normal form, in which algebraic variants are equal.

An expression is a polynomial in atoms: the variable x, or a function of other expressions such as
tanh(…). Sums are expanded, constants folded and signs pulled out of odd functions, so that
0.5·x·(1 + tanh u), x·(0.5·(tanh u + 1)) and x/2 + tanh(u)·x/2 are the same. Two expressions belong
to one function if they have the same structure and nearly the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from quake_jax._rewrite import views
from quake_jax._rewrite.graph import Node, Value

# A polynomial is a sorted tuple of (monomial, coefficient); a monomial a sorted tuple of
# (atom, power); an atom X or (function, polynomial, …).
X = ("x",)
Poly = tuple
_MOST_TERMS = 24


class NoExpression(Exception):
    """A node has no normal form."""


def _poly(terms: dict) -> Poly:
    terms = {m: c for m, c in terms.items() if c != 0}
    if len(terms) > _MOST_TERMS:
        raise NoExpression
    return tuple(sorted(terms.items(), key=repr))


def number(c: float) -> Poly:
    return _poly({(): float(c)})


def _of_atom(atom) -> Poly:
    return (((((atom, 1),)), 1.0),)


VARIABLE: Poly = _of_atom(X)


def _as_number(p: Poly) -> float | None:
    if not p:
        return 0.0
    return p[0][1] if len(p) == 1 and p[0][0] == () else None


def _add(p: Poly, q: Poly) -> Poly:
    terms = dict(p)
    for m, c in q:
        terms[m] = terms.get(m, 0.0) + c
    return _poly(terms)


def _times_monomial(m, n):
    powers = dict(m)
    for atom, power in n:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(((a, k) for a, k in powers.items() if k), key=repr))


def _multiply(p: Poly, q: Poly) -> Poly:
    terms: dict = {}
    for m, c in p:
        for n, d in q:
            product = _times_monomial(m, n)
            terms[product] = terms.get(product, 0.0) + c * d
    return _poly(terms)


def _scaled(p: Poly, c: float) -> Poly:
    return _multiply(p, number(c))


def _power(p: Poly, k: int) -> Poly:
    if not 0 <= k <= 4:
        raise NoExpression
    result = number(1)
    for _ in range(k):
        result = _multiply(result, p)
    return result


def _inverse(p: Poly) -> Poly:
    if len(p) == 1:
        ((monomial, c),) = p
        return _poly({tuple((a, -k) for a, k in monomial): 1 / c})
    terms = dict(p)
    if len(p) == 2 and terms.get(()) == 1.0:
        ((monomial, c),) = ((m, c) for m, c in p if m != ())
        if c == 1.0 and len(monomial) == 1 and monomial[0][0][0] == "exp" and monomial[0][1] == 1:
            return _of_atom(("logistic", _scaled(monomial[0][0][1], -1)))  # 1/(1 + e^u)
    return _of_atom(("inverse", p))


def _sign(p: Poly) -> float:
    """-1 if the first term of p, in an order in which coefficients do not count, is negative."""
    return -1.0 if p and min(p, key=lambda t: repr(_structure_of_monomial(t[0])))[1] < 0 else 1.0


def _odd(name: str, p: Poly) -> Poly:
    sign = _sign(p)
    return _scaled(_of_atom((name, _scaled(p, sign))), sign)


def _pair(name: str, p: Poly, q: Poly) -> Poly:
    return _of_atom((name, *sorted((p, q), key=repr)))


_ONE = number(1)
_FUNCTIONS = {
    "exp": lambda u: _of_atom(("exp", u)),
    "exp2": lambda u: _of_atom(("exp2", u)),
    "expm1": lambda u: _add(_of_atom(("exp", u)), number(-1)),
    "log": lambda u: _of_atom(("log", u)),
    "log1p": lambda u: _of_atom(("log", _add(_ONE, u))),
    "logistic": lambda u: _of_atom(("logistic", u)),
    "tanh": lambda u: _odd("tanh", u),
    "erf": lambda u: _odd("erf", u),
    "erfc": lambda u: _add(_ONE, _scaled(_odd("erf", u), -1)),
    "abs": lambda u: _of_atom(("abs", _scaled(u, _sign(u)))),
    "neg": lambda u: _scaled(u, -1),
    "square": lambda u: _power(u, 2),
    "add": _add,
    "add_any": _add,
    "sub": lambda u, v: _add(u, _scaled(v, -1)),
    "mul": _multiply,
    "div": lambda u, v: _multiply(u, _inverse(v)),
    "max": lambda u, v: _pair("max", u, v),
    "min": lambda u, v: _scaled(_pair("max", _scaled(u, -1), _scaled(v, -1)), -1),
    "gt": lambda u, v: _of_atom(("gt", u, v)),
    "lt": lambda u, v: _of_atom(("gt", v, u)),
    "ge": lambda u, v: _of_atom(("ge", u, v)),
    "le": lambda u, v: _of_atom(("ge", v, u)),
    "ne": lambda u, v: _of_atom(("ne", u, v)),
    "select_n": lambda which, u, v: _of_atom(("select", which, u, v)),
    "convert_element_type": lambda u: u,
    **{name: (lambda u: u) for name in views.IDENTITIES},
}
# Those that make an expression worth matching.
TRANSCENDENTAL = ("exp", "exp2", "expm1", "logistic", "tanh", "erf", "erfc")
ELEMENTWISE = frozenset((*_FUNCTIONS, "integer_pow", "pow"))


def _apply(node: Node, arguments: Sequence[Poly]) -> Poly:
    if node.primitive == "integer_pow":
        return _power(arguments[0], node.params["y"])
    if node.primitive == "pow":
        exponent = _as_number(arguments[1])
        if exponent is None or exponent != int(exponent):
            raise NoExpression
        return _power(arguments[0], int(exponent))
    if node.primitive == "select_n" and len(arguments) != 3:
        raise NoExpression
    return _FUNCTIONS[node.primitive](*arguments)


def expression(root: Value, variable: Value) -> tuple[Poly, set[Node]]:
    """The expression of `root` in `variable`, and the nodes between them.

    Raises:
      NoExpression: if root is none, or depends on more than the variable.
    """
    found: dict[Value, Poly] = {variable: VARIABLE}
    nodes: set[Node] = set()

    def visit(value: Value) -> Poly:
        if value in found:
            return found[value]
        c = views.uniform(value)
        if c is not None:
            if not math.isfinite(c):
                raise NoExpression
            result = number(c)
        else:
            node = value.node
            if node is None or node.primitive not in ELEMENTWISE or value.shape != variable.shape:
                raise NoExpression
            if len(nodes) > _MOST_TERMS:
                raise NoExpression
            nodes.add(node)
            result = _apply(node, [visit(v) for v in node.inputs])
        found[value] = result
        return result

    try:
        return visit(root), nodes
    except (ZeroDivisionError, OverflowError) as error:
        raise NoExpression from error


# Structure and constants.


def _structure_of_monomial(monomial):
    return tuple((atom[0], power, *(split(p)[0] for p in atom[1:])) for atom, power in monomial)


def _constants_of_monomial(monomial):
    return tuple(c for atom, _ in monomial for p in atom[1:] for c in split(p)[1])


def split(p: Poly) -> tuple[tuple, tuple[float, ...]]:
    """What an expression is without its constants, and the constants, in a fixed order."""
    terms = sorted(
        ((_structure_of_monomial(m), (c, *_constants_of_monomial(m))) for m, c in p),
        key=lambda term: (repr(term[0]), term[1]),
    )
    return tuple(s for s, _ in terms), tuple(c for _, constants in terms for c in constants)
