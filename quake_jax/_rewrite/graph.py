"""A jaxpr as a graph: values with their uses, and small jitted functions opened up for matching.

Patterns span calls like `jit[name=_where]`. `Graph` shows the equations of such calls in place, in
groups that remember the call, so that calls that no match reaches into come out as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from quake_jax._core import jax_names
from quake_jax._rewrite import jaxprs

# Calls with more equations are rewritten on their own, once for all places that call them.
_LARGEST_OPENED = 64
JIT = ("jit", "pjit")
# Equal ones in a program are one: layers that read the same array may each cast it.
_COPIES = ("convert_element_type", "reshape", "transpose")


class Value:
    """An array in a program: where it comes from and which nodes use it."""

    __slots__ = ("aval", "const", "is_output", "memo", "node", "origins", "uses", "variable")

    def __init__(self, aval, node=None, variable=None, const=None):
        self.aval = aval
        self.node: Node | None = node
        self.variable = variable  # in the rewritten jaxpr: a Var, a Literal, or None until needed
        self.const = const  # if it is known before the program runs
        self.uses: list[Node] = []
        self.is_output = False
        # The formats of the parameters that alone it depends on; None if it depends on more.
        self.origins: frozenset | None = None
        self.memo: dict = {}

    @property
    def shape(self):
        return self.aval.shape

    @property
    def ndim(self):
        return len(self.aval.shape)

    @property
    def dtype(self):
        return self.aval.dtype

    @property
    def known_origins(self) -> frozenset | None:
        return self.origins if self.const is None else frozenset()

    @property
    def primitive(self) -> str | None:
        """The name of the primitive that makes it, or None."""
        return None if self.node is None else self.node.primitive


class Node:
    """An equation, or the inside of an opened call's equation."""

    __slots__ = ("equation", "group", "index", "inputs", "match", "outputs", "primitive", "removed")

    def __init__(self, equation, inputs, group, index):
        self.equation = equation
        # Nothing happens to the array in some: to patterns these are copies.
        is_copy = jax_names.only_names_mesh(equation)
        self.primitive = "copy" if is_copy else equation.primitive.name
        self.inputs: list[Value] = inputs
        self.outputs: list[Value] = []
        self.group: Group = group
        self.index = index
        self.match = None  # if it is replaced: the Match, one of whose roots it is
        self.removed = False

    @property
    def params(self):
        return self.equation.params

    @property
    def output(self) -> Value:
        return self.outputs[0]

    @property
    def needs(self) -> Sequence[Value]:
        """What it reads in the rewritten program."""
        return self.inputs if self.match is None else self.match.inputs

    @property
    def acts(self) -> bool:
        """Whether it may do more than compute its outputs."""
        # Not all equations that write to references say so.
        return bool(self.equation.effects) or any(map(jax_names.is_reference, self.inputs))


class Group:
    """The equations of the program (without a parent) or of a call that has been opened."""

    __slots__ = ("equation", "inputs", "is_open", "items", "outputs", "parent")

    def __init__(self, parent=None, equation=None, inputs=()):
        self.parent: Group | None = parent
        self.equation = equation
        self.inputs: Sequence[Value] = inputs
        self.outputs: list[Value] = []
        self.items: list[Node | Group] = []
        self.is_open = parent is None  # whether its equations stand in the rewritten program

    @property
    def keeps_rule(self) -> bool:
        """Whether it has a differentiation rule of its own."""
        return self.equation is not None and self.equation.primitive.name not in JIT

    def nodes(self) -> Iterator[Node]:
        for item in self.items:
            if isinstance(item, Node):
                yield item
            else:
                yield from item.nodes()


def _size(jaxpr) -> int:
    """The number of equations that opening a jaxpr shows, or infinity if it must stay closed."""
    inner = jaxprs.without_constants(jaxpr)
    if inner is None or inner.effects:
        return 1 << 30
    size = len(inner.eqns)
    for equation in inner.eqns:
        if size > _LARGEST_OPENED:
            break
        called = _called(equation)
        if called is not None:
            size += _size(called)
        elif any(has_jaxpr(p) for p in equation.params.values()):
            return 1 << 30  # a loop and the like is rewritten where it stands
    return size


def has_jaxpr(parameter) -> bool:
    parameters = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
    return any(hasattr(p, "eqns") for p in parameters)


def _called(equation):
    """The jaxpr of an equation that means no more than its body, or None."""
    name, params = equation.primitive.name, equation.params
    if name in JIT:
        plain = (
            all(map(jax_names.is_unspecified, (*params["in_shardings"], *params["out_shardings"])))
            and not any(params["donated_invars"])
            and all(x is None for x in (*params["in_layouts"], *params["out_layouts"]))
            and not params["compiler_options_kvs"]
        )
        return params["jaxpr"] if plain else None
    if name == "custom_jvp_call" and jax_names.is_rule_of_jax(params["jvp_jaxpr_fun"]):
        return params["call_jaxpr"]
    return None


class Graph:
    """The values and nodes of a jaxpr.

    Attributes:
      nodes: in an order in which they can run, with those of opened calls.
      top: the group that holds them.
    """

    def __init__(self, jaxpr):
        self.jaxpr = jaxpr
        self.nodes: list[Node] = []
        self.top = Group()
        environment = {v: Value(v.aval, variable=v) for v in jaxpr.invars}
        consts = getattr(jaxpr, "consts", None) or [None] * len(jaxpr.constvars)
        for v, const in zip(jaxpr.constvars, consts, strict=True):
            is_known = isinstance(const, np.ndarray) or _is_concrete(const)
            environment[v] = Value(v.aval, variable=v, const=const if is_known else None)
        self._inputs = [environment[v] for v in jaxpr.invars]
        self._read(getattr(jaxpr, "jaxpr", jaxpr), environment, self.top)
        self.outputs = [self._value(v, environment) for v in jaxpr.outvars]
        for value in self.outputs:
            value.is_output = True
        self._forget_unused()

    def trace_origins(self, origins: Sequence[frozenset | None]) -> None:
        """Set `origins` of all values from those of the inputs."""
        for value, known in zip(self._inputs, origins, strict=True):
            value.origins = known
        for node in self.nodes:
            known = [v.known_origins for v in node.inputs]
            if not node.acts and None not in known:
                for value in node.outputs:
                    value.origins = frozenset().union(*known)

    def _forget_unused(self) -> None:
        """Drop the nodes whose results nothing needs, so that they do not count as uses."""
        used = []
        # A call that stays reads all of its inputs, whatever of it is needed.
        read: set[int] = set()
        for node in reversed(self.nodes):
            if node.acts or any(v.uses or v.is_output or id(v) in read for v in node.outputs):
                used.append(node)
                group = node.group
                while group is not None:
                    read.update(map(id, group.inputs))
                    group = group.parent
            else:
                node.removed = True
                for value in node.inputs:
                    value.uses.remove(node)
        self.nodes = used[::-1]

    def _value(self, atom, environment) -> Value:
        if hasattr(atom, "val"):
            return Value(atom.aval, variable=atom, const=atom.val)
        return environment[atom]

    def _read(self, jaxpr, environment, group: Group) -> None:
        copies: dict[tuple, list[Value]] = {}
        for equation in jaxpr.eqns:
            inputs = [self._value(v, environment) for v in equation.invars]
            called = _called(equation)
            name = equation.primitive.name
            if name in _COPIES:
                key = (name, *sorted(equation.params.items()), *map(id, inputs))
                outputs = copies.get(key) or self._node(equation, inputs, group)
                copies[key] = outputs
            elif called is not None and _size(called) <= _LARGEST_OPENED:
                outputs = self._open(equation, jaxprs.without_constants(called), inputs, group)
            else:
                outputs = self._node(equation, inputs, group)
            for variable, value in zip(equation.outvars, outputs, strict=True):
                environment[variable] = value
                # The names of the program itself go on; a call may be opened more than once.
                if group is self.top and not isinstance(variable, jax_names.DropVar):
                    if value.node is not None and value not in inputs:
                        value.variable = variable

    def _node(self, equation, inputs, group) -> list[Value]:
        node = Node(equation, inputs, group, len(self.nodes))
        node.outputs = [Value(v.aval, node) for v in equation.outvars]
        for value in inputs:
            value.uses.append(node)
        self.nodes.append(node)
        group.items.append(node)
        return node.outputs

    def _open(self, equation, jaxpr, inputs, parent) -> list[Value]:
        group = Group(parent, equation, inputs)
        environment = dict(zip(jaxpr.invars, inputs, strict=True))
        self._read(jaxpr, environment, group)
        group.outputs = [self._value(v, environment) for v in jaxpr.outvars]
        parent.items.append(group)
        return group.outputs


def _is_concrete(const) -> bool:
    return isinstance(const, (np.generic, int, float, bool)) or (
        isinstance(const, jax.Array) and not isinstance(const, jax_names.Tracer)
    )


def closed_around(node: Node) -> Iterator[Group]:
    """The calls that a node is a part of in the rewritten program."""
    group = node.group
    while group is not None:
        if not group.is_open:
            yield group
        group = group.parent


class Writer:
    """Writes the equations of a graph after its matches have been chosen."""

    def __init__(self, graph: Graph, replacement: Callable, inner: Callable):
        """Make one.

        Args:
          graph: with `match` and `removed` of its nodes and `is_open` of its groups set.
          replacement: gives the jaxpr of a match.
          inner: gives an equation with its inner jaxprs rewritten.
        """
        self._graph = graph
        self._replacement = replacement
        self._inner = inner
        self._equations: list = []
        self._written: set[int] = set()  # indices of nodes
        # Equations of the program that stay, calls among them, and what they read.
        self.kept: list = []

    def equations(self) -> list:
        """The equations of the rewritten program, without those that nothing needs any more."""
        self._used = self._find_used()
        self._write(self._graph.top)
        return self._equations

    def _find_used(self) -> set[int]:
        """The indices of nodes whose results are used, or that act otherwise."""
        used = set()
        front = [v.node for v in self._graph.outputs]
        front += [node for node in self._graph.nodes if node.acts]
        while front:
            node = front.pop()
            if node is None or node.removed or node.index in used:
                continue
            roots = (node,) if node.match is None else node.match.roots
            used.update(root.index for root in roots)
            front += [v.node for v in node.needs]
            front += [v.node for group in closed_around(node) for v in group.inputs]
        return used

    def variable(self, value: Value):
        """The variable or literal that a value is in the new program."""
        if value.variable is None:
            value.variable = jax_names.Var(value.aval)
        return value.variable

    def _write(self, group: Group) -> None:
        for item in group.items:
            if isinstance(item, Group):
                if item.is_open:
                    self._write(item)
                elif any(node.index in self._used for node in item.nodes()):
                    self._write_call(item)
            else:
                self._write_item(item)

    def _write_item(self, node: Node) -> None:
        if node.index not in self._used or node.index in self._written:
            return
        if node.match is None:
            self._written.add(node.index)
            self._write_node(node)
            return
        self._written.update(root.index for root in node.match.roots)
        for moved in sorted(node.match.moved(), key=lambda n: n.index):
            self._write_item(moved)
        self._write_replacement(node.match)

    def _bound(self, equation, values) -> list:
        """The variables that an equation binds: one for each value that is its own."""
        bound, seen = [], set()
        for old, value in zip(equation.outvars, values, strict=True):
            is_first = value is not None and id(value) not in seen
            bound.append(self.variable(value) if is_first else jax_names.Var(old.aval))
            seen.add(id(value))
        return bound

    def _write_node(self, node: Node) -> None:
        self.kept.append((node.equation, node.inputs))
        equation = self._inner(node.equation, node.inputs)
        self._equations.append(
            equation.replace(
                invars=[self.variable(v) for v in node.inputs],
                outvars=self._bound(equation, node.outputs),
            )
        )

    def _write_call(self, group: Group) -> None:
        own = {id(v) for node in group.nodes() for v in node.outputs}
        outputs = [v if id(v) in own else None for v in group.outputs]
        self.kept.append((group.equation, group.inputs))
        equation = self._inner(group.equation, group.inputs)
        self._equations.append(
            equation.replace(
                invars=[self.variable(v) for v in group.inputs],
                outvars=self._bound(equation, outputs),
            )
        )

    def _write_replacement(self, match) -> None:
        jaxpr = self._replacement(match)
        names = dict(zip(jaxpr.invars, (self.variable(v) for v in match.inputs), strict=True))

        def variable(atom):
            if hasattr(atom, "val"):
                return atom
            if atom not in names:
                names[atom] = jax_names.Var(atom.aval)
            return names[atom]

        for result, root in zip(jaxpr.outvars, match.roots, strict=True):
            names[result] = self.variable(root.output)
        for equation in jaxpr.eqns:
            self._equations.append(
                equation.replace(
                    invars=[variable(v) for v in equation.invars],
                    outvars=[variable(v) for v in equation.outvars],
                    source_info=match.root.equation.source_info,
                )
            )
