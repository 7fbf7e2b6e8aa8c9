"""The rewriter: finds the patterns in a jaxpr, replaces them, and goes into the jaxprs inside."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from quake_jax._core import jax_names
from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._elementwise.table import FUNCTIONS
from quake_jax._rewrite import (
    activations,
    attention,
    dense,
    expressions,
    jaxprs,
    logsumexp,
    narrow,
    norms,
    softmax,
    weights,
)
from quake_jax._rewrite.graph import JIT, Graph, Group, Node, Value, Writer
from quake_jax._rewrite.match import Match, Reject
from quake_jax._rewrite.options import Options
from quake_jax._rewrite.report import Report, place
from quake_jax._rewrite.weights import Origins

# Below so many elements a call of a kernel costs as much as it saves (docs/results/small_arrays.md,
# with AVX2); of those functions or rows of the table that save more, below these.
SMALLEST_ARRAY = 1024
SMALLEST_OF = {
    **dict.fromkeys(("softmax", "log_softmax", "log_sigmoid", "softplus", "mish", "elu"), 256),
    **dict.fromkeys(("gelu_erf", "selu"), 512),
}

# Why a bare exponential stays that a kernel would not make faster.
FUSED = "XLA computes it in one loop with what is around it"

# Whether a failure of a pattern on a program that it does not understand is raised: for tests.
# Otherwise the program stays as it is there, and the report says so; if it fails when patterns have
# been found, a warning too.
RAISE_FAILURES = False

# The parameters of a primitive that hold jaxprs which may be rewritten. A custom derivative rule
# stays: its primal computation alone is rewritten, which is what runs when nothing differentiates.
# So does a custom rule of vmap.
_INNER = {
    **dict.fromkeys(
        (*JIT, "closed_call", "core_call", "remat", "remat2", "checkpoint", "scan"), ("jaxpr",)
    ),
    "shard_map": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "custom_vjp_call_jaxpr": ("call_jaxpr", "fun_jaxpr"),
    "custom_vmap_call": ("call",),
}
_BARE = {name: row.public for name, row in FUNCTIONS.items() if row.on_request}
# What the report calls a primitive that stays.
_NAMES = {"logistic": "sigmoid"}


# Jaxprs that have been rewritten, as long as they live: what a program calls is the same object in
# each of its traces, and JAX compiles it once only if its rewritten form is too. By jaxpr and what
# else a rewrite depends on: the new jaxpr, or None if it stays as it is, and the report.
_rewritten: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Rewriter:
    """Rewrites jaxprs with the same options; a jaxpr that occurs twice is rewritten once."""

    def __init__(self, options: Options):
        self._options = options
        self._has_warned = False

    def rewrite(self, jaxpr, origins: Origins | None = None) -> tuple[object, Report]:
        """The rewritten jaxpr, of the same kind and types, and what was done.

        If nothing is replaced it is the jaxpr itself. `origins` are those of its inputs (see
        `Value`); None if no weight is packed.
        """
        key = (self._options, jax_names.trace_context(), origins)
        known = _rewritten.setdefault(jaxpr, {})
        if key not in known:
            new, report = self._attempt(jaxpr, origins)
            known[key] = (None if new is jaxpr else new, report)
        new, report = known[key]
        return jaxpr if new is None else new, report

    def _attempt(self, jaxpr, origins) -> tuple[object, Report]:
        """As `rewrite`; a jaxpr for which this fails in an unforeseen way stays as it is."""
        try:
            return _Level(self, jaxpr, origins).result()
        except Exception as error:
            if RAISE_FAILURES:
                raise
            reason = f"{type(error).__name__}: {error}"
            where = next((place(e.source_info) for e in jaxpr.eqns), "")
            if not self._has_warned:
                self._has_warned = True
                at = where or "a program"
                warnings.warn(
                    f"quake_jax cannot rewrite what begins at {at} ({reason}) and leaves it as it "
                    "is. This is a fault of quake_jax: please report it with this message",
                    stacklevel=2,
                )
            report = Report()
            report.add("program", None, f"it is not understood: {reason}", where)
            return jaxpr, report

    def rewrite_called(self, jaxpr):
        """A jaxpr with the jaxprs that its equations call rewritten, and nothing else."""
        equations = [self.with_inner(e) for e in jaxpr.eqns]
        return jaxprs.with_equations(jaxpr, equations, jaxpr.outvars)

    def with_inner(self, equation, origins: Origins | None = None):
        """An equation with the jaxprs inside it rewritten; itself if that changes nothing."""
        changed = {}
        for name in _INNER.get(equation.primitive.name, ()):
            inner = equation.params.get(name)
            several = isinstance(inner, (tuple, list))
            old = list(inner) if several else [inner]
            inside = weights.origins_inside(equation, name, origins)
            new = [self.rewrite(j, inside)[0] if hasattr(j, "eqns") else j for j in old]
            if any(a is not b for a, b in zip(new, old, strict=True)):
                changed[name] = type(inner)(new) if several else new[0]
        return equation.replace(params={**equation.params, **changed}) if changed else equation

    @property
    def options(self) -> Options:
        return self._options

    def trace(self, match: Match):
        """The jaxpr of the function of a match, without constants; None if it has no such."""
        avals = tuple(v.aval for v in match.inputs)
        static = match.static
        if match.name == "attention":
            static = (*static, ("compute_dtype", self._options.attention))
        with jax_names.equation_context(match.root.equation):
            return _traced(
                match.function,
                static,
                avals,
                tuple(root.output.aval for root in match.roots),
                self._options.order,
                jax_names.trace_context(),
            )


@functools.lru_cache(maxsize=1024)
def _traced(function, static, avals, results, order, context):
    """The jaxpr of a function, as `Rewriter.trace`; `context` is that of JAX, for the cache."""
    function = functools.partial(function, order=order, **dict(static))

    def typed(y, result):
        y = jax_names.with_weak_type(y, result.weak_type)
        # Under jax.set_mesh an array of no mesh becomes one of it where it meets a constant.
        is_of_no_mesh = jax.typeof(y).sharding.mesh.empty and not result.sharding.mesh.empty
        return jax.sharding.reshard(y, result.sharding.spec) if is_of_no_mesh else y

    def flat(*arrays):
        y = function(*arrays)
        return [*map(typed, y if len(results) > 1 else (y,), results)]

    closed = jax.make_jaxpr(flat)(*avals)
    inner = jaxprs.without_constants(closed)
    if inner is None or inner.effects:
        return None
    return inner if tuple(v.aval for v in inner.outvars) == results else None


class _Level:
    """The rewriting of one jaxpr."""

    def __init__(self, rewriter: Rewriter, jaxpr, origins: Origins | None):
        self._rewriter = rewriter
        self._packs = origins is not None
        self._options = rewriter.options
        self._names = rewriter.options.names
        self._jaxpr = jaxpr
        self._graph = Graph(jaxpr)
        if origins is not None:
            self._graph.trace_origins(origins)
        self._matches: list[Match] = []
        # Why a node stays: (name, reason, what else of the pattern stays).
        self._reasons: dict[Node, tuple[str, str, tuple[Node, ...]]] = {}
        self._staying: set[Node] = set()
        self._report = Report()
        self._changed_inside = False

    def result(self) -> tuple[object, Report]:
        self._find()
        self._decide_calls()
        if self._packs:
            chosen = narrow.narrowed(self._graph.top, self._matches, self._options.attention)
            for old, new in chosen.items():
                self._replace(new, (old,))
        self._add_records()
        writer = Writer(self._graph, self._rewriter.trace, self._with_inner)
        equations = writer.equations()
        self._add_inner_records(writer)
        if not self._matches and not self._changed_inside:
            return self._jaxpr, self._report
        outputs = [writer.variable(v) for v in self._graph.outputs]
        _check_bound(self._jaxpr, equations, outputs)
        return jaxprs.with_equations(self._jaxpr, equations, outputs), self._report

    # Finding.

    def _find(self) -> None:
        # What reaches farther comes first: attention holds a softmax, and may hold a tanh.
        if self._options.approximation("softmax") is None:
            for node in self._graph.nodes:
                self._try(node, attention.find)
        for node in reversed(self._graph.nodes):
            self._try(node, softmax.find)
        for node in reversed(self._graph.nodes):  # what is no log_softmax
            self._try(node, logsumexp.find)
        near = self._near_transcendental()
        for node in reversed(self._graph.nodes):
            if node in near:
                self._try(node, activations.find, (activations.with_bias, activations.with_gate))
        if self._packs:
            for node in reversed(self._graph.nodes):
                self._try_norm(node)
            for node in self._graph.nodes:
                self._try_dense(node)
            self._join_dense()
            for match in [*self._matches]:
                with self._failures(match.root):
                    self._take_first(dense.chained(match, self._matches))
            for node in self._graph.nodes:
                self._try_rows(node)
            for match in [*self._matches]:
                if too_small := self._too_small(match):
                    self._put_back(match)
                    self._leave(match, too_small)
        for node in self._graph.nodes:
            if node.primitive in _BARE and node.primitive in self._names:
                self._try(node, _bare)

    def _try(self, node: Node, find: Callable, widenings: Sequence[Callable] = ()) -> None:
        if self._is_taken(node) or len(node.outputs) != 1:
            return
        with self._failures(node):
            match = find(node)
            if match is not None and not any(self._is_taken(n) for n in match.nodes):
                self._accept(match, widenings)

    def _is_taken(self, node: Node) -> bool:
        return node.removed or node.match is not None or node in self._staying

    @contextlib.contextmanager
    def _failures(self, node: Node) -> Iterator[None]:
        try:
            yield
        except Reject as reason:
            self._note(node, reason.name, str(reason), reason.nodes)
        except Exception as error:
            self._note(node, None, _failure(error))

    def _note(self, node: Node, name: str | None, reason: str, nodes=()) -> None:
        self._reasons.setdefault(node, (name or node.primitive, reason, tuple(nodes)))
        for inner in nodes:
            self._reasons.setdefault(inner, ("", "", ()))

    def _accept(self, match: Match, widenings: Sequence[Callable]) -> None:
        approximation = self._options.approximation(match.name)
        if approximation is not None:
            match, widenings = _approximated(match, *approximation), ()
        too_small = self._too_small(match)
        if too_small and not self._packs:  # dense layers may take it in
            self._leave(match, too_small)
            return
        reason = "not in only"
        # A candidate that fails does not keep the narrower ones from being tried.
        for widen in (*widenings, None):
            try:
                candidate = match if widen is None else widen(match)
                if candidate is match and widen is not None:
                    continue
                if candidate.name not in self._names:
                    continue
                if any(self._is_taken(n) for n in candidate.nodes):
                    continue
                candidate = _without_shared(candidate)
                obstacle = self._obstacle(candidate)
            except Exception as error:
                obstacle = _failure(error)
            if obstacle is None:
                self._replace(candidate)
                return
            reason = obstacle
        self._leave(match, reason)

    def _too_small(self, match: Match) -> str:
        """Why the call of a kernel would cost what it saves, or ""."""
        of_its_own = match.name in ("attention", dense.NAME) or norms.is_norm(match)
        if of_its_own or self._options.approximation(match.name) is not None:
            return ""
        row, _ = activations.row_and_kind(match)
        return _too_small(match.inputs[0], SMALLEST_OF.get(row or match.name, SMALLEST_ARRAY))

    def _try_norm(self, node: Node) -> None:
        if self._is_taken(node) or len(node.outputs) != 1:
            return
        with self._failures(node):
            match = norms.find(node)
            if match is not None and not any(self._is_taken(n) for n in match.nodes):
                match = _without_shared(match)
                if self._obstacle(match) is None:
                    self._replace(match)

    def _try_dense(self, node: Node) -> None:
        """Replace a product with a weight, together with activations that were found behind it."""
        if self._is_taken(node) or len(node.outputs) != 1:
            return
        with self._failures(node):
            self._take_first(dense.candidates(node, self._matches))

    def _try_rows(self, node: Node) -> None:
        """Take the rows of a tied embedding from the weight that a product packs of it."""
        if self._is_taken(node):
            return
        with self._failures(node):
            match = dense.rows(node, self._matches)
            if match is not None:
                self._take_first([(match, ())])

    def _join_dense(self) -> None:
        """Make one call of the products of the same rows, and of the norm before them."""
        for matches in dense.of_same_rows(self._graph.nodes, self._matches):
            with self._failures(matches[0].root):
                self._take_first(dense.joined(matches))

    def _take_first(self, candidates: Iterator[tuple[Match, Sequence[Match]]]) -> None:
        """Replace the first of some matches that can be, and what it takes the place of."""
        obstacle = None
        for candidate, absorbed in candidates:
            own = {n for match in absorbed for n in match.nodes}
            if any(self._is_taken(n) for n in candidate.nodes - own):
                continue
            obstacle = self._obstacle(candidate)
            if obstacle is None and _without_shared(candidate).nodes == candidate.nodes:
                self._replace(candidate, absorbed)
                return
        if obstacle is not None:
            raise Reject(obstacle, dense.NAME)

    def _replace(self, match: Match, absorbed: Sequence[Match] = ()) -> None:
        for other in absorbed:
            self._put_back(other)
        self._matches.append(match)
        for node in match.nodes:
            node.removed = node not in match.roots
        for root in match.roots:
            root.match = match

    def _put_back(self, match: Match) -> None:
        self._matches.remove(match)
        for root in match.roots:
            root.match = None
        for node in match.nodes:
            node.removed = False

    def _obstacle(self, match: Match) -> str | None:
        """Why a match cannot be put into the program, or None."""
        if any(v.node in match.nodes for v in match.inputs):
            return "its intermediate results are used twice"
        for group in _rules_around(match):
            results = {id(v) for v in group.outputs if v.uses or v.is_output}
            made = {id(v) for n in match.nodes for v in n.outputs}
            if not results <= made:
                return "it is a part of a function with a derivative of its own"
        if self._rewriter.trace(match) is None:
            return "its replacement has another type"
        return None

    def _leave(self, match: Match, reason: str) -> None:
        """Let a match stay, and the patterns inside it too, but for the softmax of attention."""
        if match.name == "attention":
            self._note(match.root, match.name, reason)
        else:
            self._note(match.root, match.name, reason, match.nodes)
            self._staying |= match.nodes

    def _near_transcendental(self) -> set[Node]:
        """The nodes that may be the last of an activation: few steps behind a transcendental."""
        distance: dict[Node, int] = {}
        for node in self._graph.nodes:
            if node.primitive in expressions.TRANSCENDENTAL:
                distance[node] = 0
            elif node.primitive in expressions.ELEMENTWISE:
                steps = [distance[v.node] for v in node.inputs if v.node in distance]
                if steps and min(steps) < 10:
                    distance[node] = min(steps) + 1
        return set(distance)

    # Calls that were opened.

    def _decide_calls(self) -> None:
        hidden: set[Group] = set()
        while True:
            self._open_calls(hidden)
            more = {g for m in self._matches for g in _hiding(m)} - hidden
            if not more:
                return
            hidden |= more

    def _open_calls(self, hidden: set[Group]) -> None:
        """Open the calls that a match goes across, and those that hide an input of one."""
        touched = {g for m in self._matches for n in m.nodes for g in _around(n)} | hidden
        for group in sorted(touched, key=lambda g: len(list(_around_group(g)))):
            if group.parent is not None and group.parent.is_open:
                group.is_open = group.keeps_rule or group in hidden or not self._stays_a_call(group)

    def _stays_a_call(self, group: Group) -> bool:
        """Whether everything that is replaced inside can be so by rewriting what is called."""
        own = set(group.nodes())
        inside = [m for m in self._matches if m.nodes & own]
        if any(not m.nodes <= own for m in inside):
            return False
        _, report = self._rewriter.rewrite(
            group.equation.params["jaxpr"], self._origins(group.inputs)
        )
        found = sorted(r.replacement for r in report.replaced for _ in range(r.count))
        return found == sorted(m.replacement for m in inside)

    # Writing.

    def _origins(self, values: Sequence[Value]) -> Origins | None:
        return tuple(v.known_origins for v in values) if self._packs else None

    def _with_inner(self, equation, values: Sequence[Value]):
        new = self._rewriter.with_inner(equation, self._origins(values))
        self._changed_inside |= new is not equation
        return new

    # The report.

    def _add_records(self) -> None:
        consumed = {n for m in self._matches for n in m.nodes}
        for match in sorted(self._matches, key=lambda m: m.root.index):
            if _call_around(match.root) is None:
                self._report.add(match.name, match.replacement, "", _place(match.root))
        for node in self._graph.nodes:
            if node in consumed or not node.outputs:
                continue
            name, reason, nodes = self._reasons.get(node, (None, None, ()))
            call = _call_around(node)
            if call is not None and all(_call_around(n) is call for n in nodes):
                continue  # it is in the report of what is called
            if name is None:
                if node.primitive not in expressions.TRANSCENDENTAL or _is_scalar(node):
                    continue
                name, reason = node.primitive, self._why_bare(node)
            if reason:
                where = _place(node)
                self._report.add(_NAMES.get(name, name), None, reason, where)

    def _why_bare(self, node: Node) -> str:
        value = node.output
        if value.dtype not in KERNEL_DTYPES:
            return f"dtype {value.dtype}"
        if too_small := _too_small(value):
            return too_small
        if node.primitive in _BARE and _is_fused_by_xla(node):
            return FUSED
        if node.primitive in _BARE:
            return f'a bare {node.primitive}: only="all"'
        return "in no known pattern"

    def _add_inner_records(self, writer: Writer) -> None:
        for equation, values in writer.kept:
            origins = self._origins(values)
            names = _INNER.get(equation.primitive.name)
            inside = [j for p in equation.params.values() for j in _jaxprs(p)]
            where = place(equation.source_info)
            if names is None and inside:
                self._report.add(equation.primitive.name, None, "what is inside it stays", where)
            for name in names or ():
                inside_of_it = weights.origins_inside(equation, name, origins)
                for inner in _jaxprs(equation.params.get(name)):
                    self._report.update(self._rewriter.rewrite(inner, inside_of_it)[1], where)
                    if origins is not None and inside_of_it is None and any(origins):
                        self._add_unpacked(equation, inner, origins, where)

    def _add_unpacked(self, equation, inner, origins: Origins, where: str) -> None:
        """Say which products with weights there are where nothing is packed."""
        if len(inner.invars) != len(origins):
            return
        _, report = self._rewriter.rewrite(inner, origins)
        is_mesh = equation.primitive.name == "shard_map"
        inside = "a shard_map" if is_mesh else "a function with a rule of its own"
        reason = f"no weight is packed in {inside}"
        for record in report.replaced:
            for _ in range(record.count if record.name == dense.NAME else 0):
                self._report.add(dense.NAME, None, reason, record.where or where)


def _jaxprs(parameter) -> list:
    parameters = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
    return [p for p in parameters if hasattr(p, "eqns")]


def _too_small(value: Value, smallest: int = SMALLEST_ARRAY) -> str:
    elements = math.prod(value.shape)
    is_small = isinstance(elements, int) and elements < smallest
    return f"too small ({elements} elements)" if is_small else ""


def _is_scalar(node: Node) -> bool:
    return all(isinstance(n, int) and n == 1 for n in node.output.shape)


def _around(node: Node) -> Iterator[Group]:
    return _around_group(node.group)


def _call_around(node: Node) -> Group | None:
    """The call in the rewritten program that a node is inside of, or None if it stands there."""
    closed = [group for group in _around(node) if not group.is_open]
    return closed[-1] if closed else None


def _place(node: Node) -> str:
    """Where a node is in the user's source: for one of JAX's own, where that was called."""
    equations = (node.equation, *(g.equation for g in _around(node) if g.equation is not None))
    return next(filter(None, (place(e.source_info) for e in equations)), "")


def _around_group(group: Group | None) -> Iterator[Group]:
    while group is not None:
        yield group
        group = group.parent


def _failure(error: Exception) -> str:
    """What the report says of a pattern that fails on a program; the error itself in tests."""
    if RAISE_FAILURES:
        raise error
    return f"it is not understood: {type(error).__name__}: {error}"


def _without_shared(match: Match) -> Match:
    """The match without those nodes, before its last, whose results the program goes on to need."""
    nodes = set(match.nodes)
    shared: set[Node] = set()
    while True:
        nodes -= shared
        made = [(n, v) for n in nodes.difference(match.roots) for v in n.outputs]
        shared = {n for n, v in made if v.is_output or any(use not in nodes for use in v.uses)}
        if not shared:
            return dataclasses.replace(match, nodes=frozenset(nodes))


def _approximated(match: Match, name: str, function: Callable) -> Match:
    """The match with a function of `quake_jax.approximations` in the kernel's place."""
    static = tuple((k, function if k == "function" else v) for k, v in match.static)
    return dataclasses.replace(match, replacement=f"quake_jax.approximations.{name}", static=static)


def _rules_around(match: Match) -> set[Group]:
    groups = {g for n in match.nodes for g in _around(n)}
    groups.update(g for v in match.inputs for g in _inside(v))
    return {g for g in groups if g.keeps_rule}


def _inside(value: Value) -> list[Group]:
    """The calls that a value does not leave."""
    around = () if value.node is None else _around(value.node)
    return [g for g in around if g.parent is not None and all(v is not value for v in g.outputs)]


def _hiding(match: Match) -> set[Group]:
    """The calls that have yet to be opened so that a match has its inputs."""
    if not all(g.is_open for g in _around(match.root)):
        return set()  # it is replaced where the call's own program is rewritten
    groups = {g for v in match.inputs for g in _inside(v)}
    groups.update(g for n in match.moved() for g in _around(n))
    return {g for g in groups if not g.is_open}


def _check_bound(jaxpr, equations, outputs) -> None:
    """Raise ValueError if a program reads what none of its equations computes."""
    known = {*jaxpr.invars, *jaxpr.constvars}
    for equation in equations:
        _check_known(equation.primitive, equation.invars, known)
        known.update(equation.outvars)
    _check_known("the result", outputs, known)


def _check_known(reader, atoms, known: set) -> None:
    if any(not hasattr(v, "val") and v not in known for v in atoms):
        raise ValueError(f"{reader} of the new program reads what nothing computes")


# What XLA computes in one loop with an exponential before or after it.
_FUSED = expressions.ELEMENTWISE | {
    *("and", "or", "not", "eq", "sign", "floor", "ceil", "round", "clamp", "is_finite", "rem"),
    *("sqrt", "rsqrt", "sin", "cos", "log1p", "stop_gradient", "broadcast_in_dim", "iota"),
}
_SUMS = frozenset(f"reduce_{name}" for name in ("sum", "max", "min", "prod"))


def _is_fused(value: Value) -> bool:
    """Whether XLA never stores a value, but makes it where element-wise equations need it."""
    makes = value.node is not None and value.node.match is None and value.primitive in _FUSED
    return makes and not value.is_output and all(_fuses(use) for use in value.uses)


def _fuses(use: Node) -> bool:
    return not use.removed and use.match is None and use.primitive in _FUSED | _SUMS


def _is_fused_by_xla(node: Node) -> bool:
    """Whether a bare exponential is faster where it is, fused with what is before or after it.

    Storing what XLA need not store costs more than the kernel saves, but in 16 bits, where XLA's
    exponential is slow, as its expm1 is. A sum of exponentials of what is stored is no loss.
    """
    value = node.output
    if value.dtype != jnp.float32 or node.primitive == "expm1":
        return False
    summed = all(use.primitive in _SUMS for use in value.uses)
    return _is_fused(node.inputs[0]) or (_is_fused(value) and not summed)


def _bare(node: Node) -> Match | None:
    value = node.output
    if value.dtype not in KERNEL_DTYPES:
        return None
    if _is_fused_by_xla(node):
        raise Reject(FUSED)
    function = _BARE[node.primitive]
    return Match(
        node.primitive,
        f"quake_jax.{node.primitive}",
        node,
        frozenset((node,)),
        (node.inputs[0],),
        _call_bare,
        (("function", function),),
    )


def _call_bare(x, *, function, order):
    return function(x, order=order)
