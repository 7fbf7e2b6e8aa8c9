"""Lifts the packing of weights out of a program, so that it is done once, before the program.

A packing whose weight depends on known inputs alone becomes further inputs of the program that it
is in, and an expression that makes them of its known inputs. That goes on through calls, loops and
branches to the whole program: a weight that a loop goes over is packed as a stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from quake_jax._core import jax_names
from quake_jax._dense import pack_primitive
from quake_jax._rewrite import jaxprs
from quake_jax._rewrite.graph import JIT
from quake_jax._rewrite.weights import CALLS


@dataclasses.dataclass(frozen=True)
class Expression:
    """Equations that end with the packing of a weight, of variables that are given.

    Attributes:
      equations: the packing is the last one.
      free: the variables that they read and do not make.
    """

    equations: tuple
    free: frozenset

    @property
    def packing(self):
        return self.equations[-1]

    @property
    def leaves(self) -> list:
        return self.packing.outvars


def _is_variable(atom) -> bool:
    return not hasattr(atom, "val")


def _is_packing(equation) -> bool:
    return equation.primitive is pack_primitive.primitive


def _expression(equations: Sequence, packing) -> Expression:
    """What of known equations a packing needs."""
    needed, wanted = [packing], {v for v in packing.invars if _is_variable(v)}
    for equation in reversed(equations):
        made = wanted.intersection(equation.outvars)
        if made and equation is not packing:
            needed.append(equation)
            wanted -= made
            wanted |= {v for v in equation.invars if _is_variable(v)}
    return Expression(tuple(needed[::-1]), frozenset(wanted))


def _renamed(expression: Expression, names: dict) -> tuple:
    """The equations with new variables, and those in `names` in place of the free ones."""
    names = dict(names)

    def name(variable):
        if not _is_variable(variable) or isinstance(variable, jax_names.DropVar):
            return variable
        return names.setdefault(variable, jax_names.Var(variable.aval))

    return tuple(
        e.replace(invars=[*map(name, e.invars)], outvars=[*map(name, e.outvars)])
        for e in expression.equations
    )


def with_inputs(jaxpr, inputs: Sequence, equations: Sequence):
    """An open jaxpr with other inputs and equations."""
    names = jaxpr.debug_info
    if names.arg_names is not None:
        names = names._replace(arg_names=("",) * len(inputs))
    return jaxpr.replace(invars=[*inputs], eqns=[*equations], debug_info=names)


class Lifter:
    """Lifts packings; a program that is called twice is lifted once.

    Attributes:
      constants: the values of variables that are constants of the programs inside.
    """

    def __init__(self):
        self.constants: dict = {}
        self._known: dict = {}
        self._kept: list = []  # jaxprs whose id is a key

    def level(self, jaxpr, known: tuple[bool, ...]) -> tuple[object, list[Expression]]:
        """A jaxpr with the leaves of packed weights as further inputs, and how these are made.

        The free variables of the expressions are inputs that are known, or constants.
        """
        key = (id(jaxpr), known)
        if key not in self._known:
            self._kept.append(jaxpr)
            self._known[key] = self._level(jaxpr, known)
        return self._known[key]

    def _level(self, jaxpr, known):
        ready = {v for v, is_known in zip(jaxpr.invars, known, strict=True) if is_known}
        ready |= set(jaxpr.constvars)
        before, packings, equations = [], [], []
        for equation in jaxpr.eqns:
            is_ready = all(not _is_variable(v) or v in ready for v in equation.invars)
            if _is_packing(equation) and is_ready:
                packings.append(equation)
                before.append(equation)
                continue
            equation, lifted = self._inside(equation, ready)
            for expression in lifted:
                before.extend(expression)
                packings.append(expression[-1])
            equations.append(equation)
            if is_ready and not equation.effects and not lifted:
                before.append(equation)
                ready.update(equation.outvars)
        if not packings:
            return jaxpr, []
        inputs = [*jaxpr.invars, *(v for p in packings for v in p.outvars)]
        return with_inputs(jaxpr, inputs, equations), [_expression(before, p) for p in packings]

    def _inside(self, equation, ready: set) -> tuple[object, list[tuple]]:
        """An equation whose inner programs are lifted, and the equations of what was in them."""
        kind = equation.primitive.name
        if kind in CALLS and "jaxpr" in equation.params:
            return self._call(equation, ready)
        if kind == "scan":
            return self._scan(equation, ready)
        if kind == "while":
            return self._while(equation, ready)
        if kind == "cond":
            return self._cond(equation, ready)
        return equation, []

    def _open(self, jaxpr):
        """An inner jaxpr without its constants, which this remembers."""
        if hasattr(jaxpr, "consts"):
            self.constants.update(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
            return jaxpr.jaxpr
        return jaxpr

    def _lifted(self, jaxpr, operands, ready, hidden=range(0)):
        """An inner jaxpr, lifted; the positions in `hidden` are of inputs that change."""
        known = tuple(
            i not in hidden and (not _is_variable(v) or v in ready) for i, v in enumerate(operands)
        )
        return self.level(self._open(jaxpr), known)

    def _inlined(self, expressions: Iterable[Expression], inputs, operands) -> list[tuple]:
        names = dict(zip(inputs, operands, strict=True))
        names.update((v, v) for v in self.constants)
        return [_renamed(e, names) for e in expressions]

    def _call(self, equation, ready):
        params, old = equation.params, equation.params["jaxpr"]
        new, expressions = self._lifted(old, equation.invars, ready)
        if not expressions:
            return equation, []
        lifted = self._inlined(expressions, self._open(old).invars, equation.invars)
        leaves = [v for e in lifted for v in e[-1].outvars]
        changed = {"jaxpr": _closed_like(old, new)}
        if equation.primitive.name in JIT:
            more = len(leaves)
            changed["in_shardings"] = (*params["in_shardings"], *[jax_names.UNSPECIFIED] * more)
            changed["in_layouts"] = (*params["in_layouts"], *[None] * more)
            changed["donated_invars"] = (*params["donated_invars"], *[False] * more)
        return equation.replace(invars=[*equation.invars, *leaves], params=params | changed), lifted

    def _scan(self, equation, ready):
        old = equation.params["jaxpr"]
        consts, carry = jax_names.scan_counts(equation)
        new, expressions = self._lifted(old, equation.invars, ready, range(consts, consts + carry))
        if not expressions:
            return equation, []
        inputs = self._open(old).invars
        outer = dict(zip(inputs, equation.invars, strict=True))
        stacked = set(inputs[consts + carry :])
        fixed, moving, lifted = [], [], []
        for expression in expressions:
            is_stacked = bool(stacked.intersection(expression.free))
            if is_stacked:
                equations = self._stacked(expression, outer, stacked)
            else:
                (equations,) = self._inlined([expression], inputs, equation.invars)
            (moving if is_stacked else fixed).append((expression, equations[-1]))
            lifted.append(equations)
        operands, bodies = equation.invars, inputs
        groups = [[v for _, made in those for v in made.outvars] for those in (fixed, moving)]
        inside = [[v for e, _ in those for v in e.leaves] for those in (fixed, moving)]
        body = with_inputs(
            new,
            [*bodies[:consts], *inside[0], *bodies[consts:], *inside[1]],
            new.eqns,
        )
        params = jax_names.scan_with_more(equation, *map(len, groups))
        return equation.replace(
            invars=[*operands[:consts], *groups[0], *operands[consts:], *groups[1]],
            params=params | {"jaxpr": _closed_like(old, body)},
        ), lifted

    def _stacked(self, expression: Expression, outer: dict, stacked: set) -> tuple:
        """The equations of an expression for all steps of a loop at once."""
        closed = self.closed(expression, outer)
        axes = [0 if v in stacked else None for v in closed.jaxpr.invars]
        operands = [outer[v] for v in closed.jaxpr.invars]
        function = jax.vmap(jax_names.jaxpr_as_fun(closed), in_axes=axes)
        traced = jax.make_jaxpr(function)(*(v.aval for v in operands))
        self.constants.update(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        (at,) = (i for i, e in enumerate(traced.eqns) if _is_packing(e))
        if list(traced.jaxpr.outvars) != list(traced.eqns[at].outvars):
            raise AssertionError("a stack of packed weights that is arranged")
        equations = _expression(traced.eqns, traced.eqns[at])
        (found,) = self._inlined([equations], traced.jaxpr.invars, operands)
        return found

    def _while(self, equation, ready):
        params, old = equation.params, equation.params["body_jaxpr"]
        first = params["cond_nconsts"]
        consts = params["body_nconsts"]
        operands = equation.invars[first:]
        new, expressions = self._lifted(old, operands, ready, range(consts, len(operands)))
        if not expressions:
            return equation, []
        inputs = self._open(old).invars
        lifted = self._inlined(expressions, inputs, operands)
        leaves = [v for e in lifted for v in e[-1].outvars]
        inside = [v for e in expressions for v in e.leaves]
        # JAX drops no constants of a loop that the body does not read, but what has been packed
        # is not to be kept.
        read = {v for e in new.eqns for v in e.invars if _is_variable(v)}.union(
            v for v in new.outvars if _is_variable(v)
        )
        kept = [i for i in range(consts) if inputs[i] in read]
        body = with_inputs(new, [*(inputs[i] for i in kept), *inside, *inputs[consts:]], new.eqns)
        changed = {"body_jaxpr": _closed_like(old, body), "body_nconsts": len(kept) + len(leaves)}
        invars = [*equation.invars[:first], *(operands[i] for i in kept), *leaves]
        invars += operands[consts:]
        return equation.replace(invars=invars, params=params | changed), lifted

    def _cond(self, equation, ready):
        params = equation.params
        operands = equation.invars[1:]
        branches = [self._lifted(b, operands, ready) for b in params["branches"]]
        if not any(expressions for _, expressions in branches):
            return equation, []
        lifted, changed = [], []
        for i, (old, (new, _)) in enumerate(zip(params["branches"], branches, strict=True)):
            inputs = self._open(old).invars
            extra: list = []
            for j, (_, expressions) in enumerate(branches):
                # All branches have the same inputs.
                leaves = [v for e in expressions for v in e.leaves]
                extra += leaves if i == j else [jax_names.Var(v.aval) for v in leaves]
            lifted += self._inlined(branches[i][1], inputs, operands)
            changed.append(_closed_like(old, with_inputs(new, [*inputs, *extra], new.eqns)))
        leaves = [v for e in lifted for v in e[-1].outvars]
        return equation.replace(
            invars=[*equation.invars, *leaves], params=params | {"branches": tuple(changed)}
        ), lifted

    def closed(self, expression: Expression, variables: Iterable):
        """An expression as a jaxpr of those of the variables that it reads, in their order."""
        inputs = [v for v in variables if v in expression.free]
        constants = [v for v in self.constants if v in expression.free]
        jaxpr = jax_names.Jaxpr(
            constants,
            inputs,
            expression.leaves,
            list(expression.equations),
            debug_info=jax_names.unnamed("packing", len(inputs), len(expression.leaves)),
        )
        return jax_names.ClosedJaxpr(jaxpr, [self.constants[v] for v in constants])


def _closed_like(old, new):
    """A lifted open jaxpr as the parameter of an equation that had `old`."""
    return old.replace(jaxpr=new) if hasattr(old, "consts") else new


def _of_no_mesh(program):
    """The program of an expression without its casts in a `jax.shard_map`.

    They say that a weight differs along an axis of the mesh, as the rows do that it is multiplied
    by. Of parameters that do not, the packed weight does not either.
    """
    names: dict = {}
    equations = []
    for equation in program.eqns:
        operands = [names.get(v, v) if _is_variable(v) else v for v in equation.invars]
        if equation.primitive.name in ("pvary", "pcast"):
            names.update(zip(equation.outvars, operands, strict=True))
        else:
            equations.append(equation.replace(invars=operands))
    jaxpr = with_inputs(program.jaxpr, program.jaxpr.invars, equations)
    return jaxprs.closed(jaxpr, program.consts)


def lifted(closed, known: Sequence[bool]):
    """A program without packings, whose leaves are further inputs, and their expressions.

    Returns:
      The program, and for each packed weight, in the order of their leaves among the inputs, the
      closed jaxpr that makes it and the indices of the inputs that this takes.
    """
    lifter = Lifter()
    lifter.constants.update(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    new, expressions = lifter.level(closed.jaxpr, tuple(known))
    index = {v: i for i, v in enumerate(closed.jaxpr.invars)}
    found = []
    for expression in expressions:
        program = _of_no_mesh(lifter.closed(expression, index))
        found.append((program, tuple(index[v] for v in program.jaxpr.invars)))
    return jaxprs.closed(new, closed.consts), found
