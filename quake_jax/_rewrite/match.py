"""What the patterns produce: a match, which says what is replaced by what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from quake_jax._rewrite.graph import Node, Value


class Reject(Exception):
    """A pattern was found, but must stay as it is; the message says why.

    `name` is the pattern's, as `only` takes it; `nodes` are those that this explains.
    """

    def __init__(self, reason: str, name: str | None = None, nodes: Iterable[Node] = ()):
        super().__init__(reason)
        self.name = name
        self.nodes = tuple(nodes)


@dataclasses.dataclass(eq=False)
class Match:
    """Equations and the function call that takes their place.

    Attributes:
      name: of the pattern, one of those that `only` takes.
      replacement: the public function that is called, for the report.
      root: the node whose result is replaced.
      nodes: what is no longer needed, the root among it.
      inputs: the arguments of `function`.
      function: of arrays, with `static` and `order` as keywords; gives the arrays that replace the
        results of the roots, or for a root alone the one that replaces its result.
      static: hashable.
      others: further nodes behind the root whose results are replaced, from where the root is on.
    """

    name: str
    replacement: str
    root: Node
    nodes: frozenset[Node]
    inputs: tuple[Value, ...]
    function: Callable
    static: tuple[tuple[str, object], ...] = ()
    others: tuple[Node, ...] = ()

    @property
    def roots(self) -> tuple[Node, ...]:
        return (self.root, *self.others)

    def moved(self) -> set[Node]:
        """What stands behind the root though the inputs need it: it has to come before it."""
        found: set[Node] = set()
        front = [v.node for v in self.inputs]
        while front:
            node = front.pop()
            if node is not None and node.index > self.root.index and node not in found:
                found.add(node)
                front += [v.node for v in node.needs]
        return found


def check_unused(nodes: Iterable[Node], root: Node) -> None:
    """Raise Reject if something else needs what these nodes, the root apart, compute."""
    nodes = set(nodes)
    for node in nodes - {root}:
        for value in node.outputs:
            if value.is_output:
                raise Reject(f"its {node.primitive} is a result of the function too")
            if any(use not in nodes for use in value.uses):
                raise Reject(f"its {node.primitive} is used elsewhere too")
