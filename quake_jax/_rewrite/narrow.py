"""Results that are rounded to bfloat16 wherever they are read, so that they may be given so.

A dense layer in bfloat16 rounds its rows, attention in bfloat16 its operands. If nothing else reads
what a layer or attention gives, it writes bfloat16, half of the bytes. Layers compute the same
from that. So does attention where it multiplies bfloat16; where it does not (the CPU cannot, or it
has few queries), its operands and its result are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp

from quake_jax._rewrite import arrangement, dense
from quake_jax._rewrite.graph import Group, Node, Value, closed_around
from quake_jax._rewrite.match import Match

# What moves numbers, whatever their type.
_MOVES = frozenset(("reshape", "transpose", "squeeze", "expand_dims"))


def narrowed(top: Group, matches: Sequence[Match], compute_dtype: str | None) -> dict[Match, Match]:
    """The matches that may give bfloat16, and what then takes their place.

    Also makes the values between them bfloat16. Attention multiplies in `compute_dtype`; its
    operands and its result have one dtype, so it is among them with what gives its operands.
    """
    given = {m: dense.in_bfloat16(m) for m in matches}
    if compute_dtype == "bfloat16":
        given |= {m: arrangement.in_bfloat16(m) for m in matches if m.name == "attention"}
    # A call that stays takes its operands as they were, those that it does not use too.
    passed = {id(v) for group in _closed(top) for v in group.inputs}
    chosen = {
        m: new
        for m, new in given.items()
        if new is not None and not any(id(v) in passed for root in m.roots for v in _moved(root))
    }
    readers = {node: m for m in matches for node in m.nodes}
    while True:
        roots = {id(root.output) for m in chosen for root in m.roots}
        stay = {m: new for m, new in chosen.items() if _may_be(m, chosen, readers, roots)}
        if len(stay) == len(chosen):
            break
        chosen = stay
    for value in (v for match in chosen for root in match.roots for v in _moved(root)):
        value.aval = value.aval.update(dtype=jnp.dtype(jnp.bfloat16))
        value.variable = None
    return chosen


def _closed(group: Group) -> Iterator[Group]:
    """The calls that stay in the rewritten program, not those inside of them."""
    for item in group.items:
        if isinstance(item, Group):
            if item.is_open:
                yield from _closed(item)
            else:
                yield item


def _moved(node: Node) -> Iterator[Value]:
    """The result of a node, and that with its numbers moved."""
    yield node.output
    for use in node.output.uses:
        if use.match is None and use.primitive in _MOVES:
            yield from _moved(use)


def _may_be(match: Match, chosen, readers: Mapping[Node, Match], roots: set[int]) -> bool:
    if match.name == "attention":
        operands = map(_moved_from, arrangement.operands(match))
        if not all(id(v) in roots for v in operands):
            return False
    return all(_is_rounded(root.output, chosen, readers) for root in match.roots)


def _moved_from(value: Value) -> Value:
    while value.node is not None and value.node.match is None and value.primitive in _MOVES:
        value = value.node.inputs[0]
    return value


def _is_rounded(value: Value, chosen, readers: Mapping[Node, Match]) -> bool:
    """Whether all that reads a float32 value rounds it to bfloat16."""
    if value.is_output or value.dtype != jnp.float32 or not value.uses:
        return False
    for use in value.uses:
        match = readers.get(use)
        if any(closed_around(use)):
            return False
        if match is None:
            if use.primitive not in _MOVES or not _is_rounded(use.output, chosen, readers):
                return False
        elif match.name == "attention":
            rest = match.inputs[len(arrangement.operands(match)) :]
            if match not in chosen or any(v is value for v in rest):
                return False
        elif not dense.rounds_rows(match) or any(v is value for v in match.inputs[1:]):
            return False
    return True
