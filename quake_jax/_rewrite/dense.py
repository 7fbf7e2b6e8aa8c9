"""Dense layers: products of an activation with something that depends on parameters alone.

A convolution whose windows lie side by side, as that of an image's patches, is one too.

The graph knows what depends on parameters alone, and in which formats these are to be packed
(`Value.origins`). A product is replaced by `dense` of a weight that the program packs itself;
`quake_jax.pack` lifts the packing out. What stands behind a product is fused: a bias, an activation
that was found before, a gate, a residual. Products of the same rows become one call, which takes in
a norm before them that nothing else reads. Rows of a tied embedding are columns of such a weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._dense import layout, pack_primitive
from quake_jax._dense.api import LONGEST, dense
from quake_jax._dense.call import chained as chained_layers
from quake_jax._dense.layout import GROUP_MULTIPLE, LARGEST, ROWS
from quake_jax._dense.packed import PackedWeight
from quake_jax._rewrite import activations, norms, views
from quake_jax._rewrite.graph import Node, Value, has_jaxpr
from quake_jax._rewrite.match import Match, Reject
from quake_jax._rewrite.observe import observe

NAME = "dense"
# With fewer inputs or outputs a weight keeps 8 bits at least, and so does one with so many times
# more outputs than inputs: the projection to a vocabulary.
_SMALL = 64
_VOCABULARY = 8
# Rows from which packing in each call takes less time than the product saves: the medians of the
# table in docs/results/dense.md, with AVX2.
PAYS_FROM = {"float32": 700, "bfloat16": 1000, "int8": 350, "int4": 350}


@dataclasses.dataclass(frozen=True)
class Format:
    """How the weights that depend on a parameter are packed; dtype None: they are left alone.

    `is_rule` says that a rule of the caller names it, so that defaults which are more exact do not
    apply; `in_call` that the program packs them itself; `calibrated` that rows have a range for
    all, where weights have one scale a column; `measured` that calibration runs the program, so
    that nothing in it is quantised before it has been seen.
    """

    dtype: str | None
    group_size: int | None = None
    activations: str | None = "auto"
    scale_method: str = "max"
    is_rule: bool = False
    in_call: bool = False
    calibrated: bool = False
    measured: bool = False

    def of_weight(self, k: int, n: int) -> dict:
        """The arguments of `pack_weight` for a weight (k, n)."""
        dtype, size = self.dtype, self.group_size
        vocabulary = n >= _VOCABULARY * k
        if dtype == "int4" and not self.is_rule and (min(k, n) < _SMALL or vocabulary):
            dtype, size = "int8", None
        if dtype == "int4":
            size = size or GROUP_MULTIPLE
        if dtype not in LARGEST:
            size = None
        if size is not None and k % size:
            if self.is_rule:
                raise Reject(f"groups of {size} do not divide its {k} rows", NAME)
            dtype, size = "int8", None
        quantized = "int8" if dtype in LARGEST and self.activations == "auto" else self.activations
        if dtype not in LARGEST or k > LONGEST[size is not None]:
            quantized = None
        return {
            "dtype": dtype,
            "group_size": size,
            "activations": quantized,
            "scale_method": self.scale_method,
        }

    def packing(self, k: int, n: int) -> dict:
        """Those of the equation that packs it in a program."""
        made = self.of_weight(k, n)
        is_ranged = made["activations"] is not None and made["group_size"] is None
        return made | {"calibrated": self.calibrated and is_ranged}


# Of parameters that have no say in how the weights are packed that are made of them too.
_ANY = Format(None)


def origin(parameter, chosen: Format) -> frozenset[Format]:
    """The formats of an array of the parameters: that chosen for it, if it can be a weight."""
    is_float = jnp.issubdtype(parameter.dtype, jnp.floating)
    return frozenset((chosen if is_float or chosen.is_rule else _ANY,))


@dataclasses.dataclass(frozen=True)
class Product:
    """A dot_general of rows and a weight: which axes are what.

    Attributes:
      rows_first: whether the rows are its first operand.
      x_order, w_order: the axes of the operands as (stack, rows, K) and (stack, K, N).
      stack: the sizes of the axes that both have, such as experts.
      rows, columns: the sizes of those that x and the weight have alone.
      packing: the parameters of the packing.
      dtype: of the result.
      in_call: whether the weight is packed in each call.
      range: of its rows: "" if each has its own, "known", or "measured" by calibration.
      windows: the shape of x with each axis that a convolution goes over cut into windows, to which
        x_order refers then; else ().
    """

    rows_first: bool
    x_order: tuple[int, ...]
    w_order: tuple[int, ...]
    stack: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    k: int
    packing: tuple[tuple[str, object], ...]
    dtype: str
    in_call: bool
    range: str
    windows: tuple[int, ...] = ()

    def packed(self, w):
        w = jnp.transpose(w, self.w_order)
        # Stacked weights have one axis in front.
        lead = (math.prod(self.stack),) if self.stack else ()
        w = w.reshape(*lead, self.k, math.prod(self.columns))
        return pack_primitive.pack(w, **dict(self.packing))

    def operand(self, x):
        """x as (stack, …, K)."""
        lead = (math.prod(self.stack),) if self.stack else ()
        x = x.reshape(self.windows) if self.windows else x
        return jnp.transpose(x, self.x_order).reshape(*lead, *self.rows, self.k)

    def result(self, y):
        """The result of dense, (stack, …, N), as dot_general has it."""
        y = y.reshape(*self.stack, *self.rows, *self.columns)
        if self.rows_first:
            return y
        s, r, c = len(self.stack), len(self.rows), len(self.columns)
        return jnp.transpose(y, (*range(s), *range(s + r, s + r + c), *range(s, s + r)))

    @property
    def format(self) -> str:
        """Of the weight, for the report."""
        dtype = dict(self.packing)["dtype"]
        if not self.in_call:
            return dtype
        rows = math.prod(self.rows)
        return f"{dtype} packed in each call for {rows} rows: pays from about {PAYS_FROM[dtype]}"

    @property
    def shared(self) -> tuple:
        """What the products that one call computes agree in, but for the rows."""
        call = {name: value for name, value in self.packing if name != "scale_method"}
        return self.windows, self.x_order, self.stack, self.k, tuple(call.items()), self.dtype

    @property
    def has_its_order(self) -> bool:
        """Whether dense's rows are those of the program, but for their shape."""
        return not self.stack and self.x_order == (*range(len(self.x_order)),)

    @property
    def is_plain(self) -> bool:
        """Whether the axes of the result are those of dense's, so that more can be fused."""
        return self.rows_first and not self.stack


def find(node: Node) -> tuple[Product, Value, Value] | None:
    """The product that a node is, its rows and its weight; None if it is none with a weight.

    Raises:
      Reject: if it is one that must stay.
    """
    if node.primitive == "conv_general_dilated":
        return _find_windows(node)
    if node.primitive != "dot_general":
        return None
    left, right = node.inputs
    if (left.origins is None) == (right.origins is None):
        return None
    rows_first = left.origins is None
    x, w = (left, right) if rows_first else (right, left)
    contracted, stacked = node.params["dimension_numbers"]
    if not rows_first:
        contracted, stacked = contracted[::-1], stacked[::-1]
    x_contracted, w_contracted = contracted
    x_stacked, w_stacked = stacked
    x_rest = [d for d in range(x.ndim) if d not in (*x_contracted, *x_stacked)]
    w_rest = [d for d in range(w.ndim) if d not in (*w_contracted, *w_stacked)]
    # The rows of a weight stay in the order in which they lie.
    pairs = sorted(zip(w_contracted, x_contracted, strict=True))
    return _product(
        node,
        (x, w),
        rows_first=rows_first,
        x_order=(*x_stacked, *x_rest, *(a for _, a in pairs)),
        w_axes=(w_stacked, [a for a, _ in pairs], w_rest),
        rows=tuple(x.shape[a] for a in x_rest),
    )


def _find_windows(node: Node) -> tuple[Product, Value, Value] | None:
    """As `find`, of a convolution whose windows neither overlap nor leave anything out."""
    x, w = node.inputs
    if x.origins is not None or w.origins is None:
        return None
    p = node.params
    (batch, feature, *space), (out, into, *over), result = p["dimension_numbers"]
    sizes = [w.shape[a] for a in over]
    is_dense = (
        all(isinstance(n, int) for n in x.shape)
        and p["feature_group_count"] == p["batch_group_count"] == 1
        and tuple(p["window_strides"]) == tuple(sizes)
        and all(pair == (0, 0) for pair in p["padding"])
        and {*p["lhs_dilation"], *p["rhs_dilation"]} <= {1}
        and all(x.shape[a] % n == 0 for a, n in zip(space, sizes, strict=True))
        and result == (0, x.ndim - 1, *range(1, x.ndim - 1))
    )
    if not is_dense:
        return None
    windows, places = [], {}
    for a, n in enumerate(x.shape):
        places[a] = len(windows)
        size = sizes[space.index(a)] if a in space else 0
        windows += [n // size, size] if size else [n]
    inside = {over[i]: places[a] + 1 for i, a in enumerate(space)} | {into: places[feature]}
    w_rows = sorted(inside)
    x_rest = [places[a] for a in (batch, *space)]
    return _product(
        node,
        (x, w),
        rows_first=True,
        x_order=(*x_rest, *(inside[a] for a in w_rows)),
        w_axes=((), w_rows, [out]),
        rows=tuple(windows[a] for a in x_rest),
        windows=tuple(windows),
    )


def _product(node: Node, operands: tuple[Value, Value], *, w_axes, **arrangement):
    """The product of x and a weight, (stack, K, N) of which are `w_axes`, as `find` gives it."""
    x, w = operands
    if not w.origins:
        return None  # it depends on constants alone
    result = node.output
    if not all(views.is_float(v) for v in (x, w, result)):
        raise Reject(f"operands of dtype {x.dtype} and {w.dtype}", NAME)
    for what, value in (("rows", x), ("a result", result)):
        if value.dtype not in KERNEL_DTYPES:
            raise Reject(f"{what} of dtype {value.dtype}", NAME)
    if not all(isinstance(n, int) for n in w.shape):
        raise Reject("a weight of unknown shape", NAME)
    stack, contracted, columns = (tuple(w.shape[a] for a in axes) for axes in w_axes)
    k, n = math.prod(contracted), math.prod(columns)
    if not k or not n or not math.prod(w.shape):
        raise Reject(f"an empty weight of shape {w.shape}", NAME)
    chosen = _format(w)
    if chosen.dtype is None:
        raise Reject("a rule leaves it alone", NAME)
    packing = chosen.packing(k, n)
    product = Product(
        w_order=tuple(a for axes in w_axes for a in axes),
        stack=stack,
        columns=columns,
        k=k,
        packing=tuple(packing.items()),
        dtype=result.dtype.name,
        in_call=chosen.in_call,
        range=("measured" if chosen.measured else "known") if packing["calibrated"] else "",
        **arrangement,
    )
    return product, x, w


def _format(w: Value) -> Format:
    """The most exact format of the parameters that a weight is made of."""
    exactness = [None, *ROWS]
    formats = w.origins - {_ANY}
    if not formats:
        raise Reject("it is made of integers alone, and no rule names them", NAME)
    return min(formats, key=lambda f: (exactness.index(f.dtype), repr(f)))


def candidates(node: Node, matches: list[Match]) -> Iterator[tuple[Match, tuple[Match, ...]]]:
    """The replacements of a product with what stands behind it, those that take more in first.

    With each come the matches of activations that it takes the place of.

    Raises:
      Reject: if the product must stay.
    """
    found = find(node)
    if found is None:
        return
    product, x, w = found
    step = _Chain(product, x, w, node)
    chain = [step]
    while product.is_plain and (step := step.widened(matches)) is not None:
        chain.append(step)
    for step in reversed(chain):
        yield _match([step]), step.absorbed


@dataclasses.dataclass(eq=False)
class _Layers(Match):
    """A call of `dense`."""

    chains: tuple[_Chain, ...] = ()


def of_same_rows(nodes: Sequence[Node], matches: Sequence[Match]) -> list[list[_Layers]]:
    """The calls of dense that may become one each, in the order of the program; also lone ones.

    Products move to where the first of them is, but not from behind what multiplies their results
    twice, as attention does: a decoder would hold the keys and values of all its layers at once.
    """
    groups: dict = {}
    for match in sorted(matches, key=lambda m: m.root.index):
        if isinstance(match, _Layers):
            (chain,) = match.chains
            joins = chain.gate is None and chain.residual is None
            key = (chain.x, chain.product.shared, chain.activation)
            groups.setdefault(key if joins else match, []).append(match)
    found = []
    for group in groups.values():
        while group:
            found.append(_near_first(nodes, group) if group[1:] else group)
            group = [m for m in group if m not in found[-1]]
    return found


def _near_first(nodes: Sequence[Node], group: list[_Layers]) -> list[_Layers]:
    root = group[0].root
    # How many products, one behind the other, have made a value of the results.
    joined, products = [group[0]], {id(root.output): 0}
    for node in nodes:
        if node.removed or node.index <= root.index:
            continue
        if node.match in group and all(_is_known_at(root, v) for v in node.match.inputs[1:]):
            joined.append(node.match)
            count = 0
        else:
            count = max((products.get(id(v), -1) for v in node.needs), default=-1)
            if count < 0:
                continue
            count += _products(node)
        if count > 1:
            break
        products.update((id(v), count) for v in node.outputs)
    return joined


def _products(node: Node) -> int:
    """How many products, one behind the other, a node of the new program is at least."""
    if node.match is not None:
        return {NAME: 1, "attention": 2}.get(node.match.name, 0)
    return 2 * any(map(has_jaxpr, node.params.values())) or node.primitive == "dot_general"


def _is_known_at(root: Node, value: Value) -> bool:
    """Whether a value can be computed before a node."""
    is_before = value.node is None or value.node.index < root.index
    return is_before or value.origins is not None


def joined(matches: Sequence[_Layers]) -> Iterator[tuple[Match, tuple[Match, ...]]]:
    """One call in the place of some, those that take more in first, as `candidates`."""
    chains = [chain for match in matches for chain in match.chains]
    x, behind = chains[0].x, frozenset().union(*(c.everything for c in chains))
    norm = None if x.node is None else x.node.match
    if norms.is_norm(norm) and not x.is_output and all(use in behind for use in x.uses):
        yield _match(chains, norm), (*matches, norm)
    if len(chains) > 1:
        yield _match(chains), tuple(matches)


def chained(match: Match, matches: Sequence[Match]) -> Iterator[tuple[Match, tuple[Match, ...]]]:
    """A layer whose rows have a range and are the result of another one, as one replacement.

    Then the other one gives codes. Nothing else may need its result.
    """
    if match not in matches or not isinstance(match, _Layers) or len(match.chains) > 1:
        return  # it may be a part of another replacement by now
    (chain,), x = match.chains, match.inputs[0]
    before = None if x.node is None else x.node.match
    is_known = chain.product.range == "known" and chain.product.has_its_order
    if not is_known or before not in matches:
        return
    if not isinstance(before, _Layers) or len(before.chains) > 1:
        return
    (first,) = before.chains
    fits = first.product.is_plain and first.product.rows == chain.product.rows
    is_alone = not x.is_output and all(use in chain.everything for use in x.uses)
    is_split = any(any(v.aval.sharding.spec) for v in (*before.inputs, *match.inputs))
    is_normed = dict(match.static)["norm"] is not None
    if not fits or not is_alone or first.residual is not None or is_normed or is_split:
        return
    yield (
        _Layers(
            NAME,
            f"{before.replacement} → int8 → {match.replacement}",
            match.root,
            before.nodes | match.nodes,
            (*before.inputs, *match.inputs[1:]),
            _call_chained,
            (("first", before.static), ("second", match.static), ("count", len(before.inputs) - 1)),
            chains=(first, chain),
        ),
        (before, match),
    )


def rounds_rows(match: Match) -> bool:
    """Whether a match is a layer that rounds its rows to bfloat16 before anything else."""
    if match.function is not _call:
        return False
    static = dict(match.static)
    dtypes = {dict(product.packing)["dtype"] for product in static["products"]}
    return dtypes == {"bfloat16"} and static["norm"] is None


def in_bfloat16(match: Match) -> Match | None:
    """A layer that gives float32, giving the same rounded to bfloat16; None if there is none."""
    if match.function is not _call:
        return None
    static = dict(match.static)
    given = {product.dtype for product in static["products"]}
    if given != {"float32"} or any("residual" in names for names in static["extras"]):
        return None
    static["products"] = tuple(
        dataclasses.replace(product, dtype="bfloat16") for product in static["products"]
    )
    replacement = f"{match.replacement} → bfloat16"
    return dataclasses.replace(match, replacement=replacement, static=tuple(static.items()))


def rows(node: Node, matches: Sequence[Match]) -> Match | None:
    """The rows of a tied embedding, from the weight that a product packs of it.

    A product with all rows of a table has them as the columns of its weight. So the table itself is
    not needed, if those are what it holds.

    Raises:
      Reject: if they are not.
    """
    mode = _taking(node)
    if mode is None:
        return None
    table = _uncast(node.inputs[0])
    chains = (chain for match in matches if isinstance(match, _Layers) for chain in match.chains)
    chain = next((c for c in chains if _has_rows_as_columns(c, table)), None)
    if chain is None or any(any(v.aval.sharding.spec) for v in node.inputs):
        return None
    product = chain.product
    dtype = dict(product.packing)["dtype"]
    as_bfloat16 = table.dtype == jnp.bfloat16 or _format(table).is_rule
    if dtype != "float32" and not (dtype == "bfloat16" and as_bfloat16):
        reason = f"rows of an embedding that is packed in {dtype} are read as they were"
        raise Reject(reason, NAME, (chain.last,))
    return Match(
        NAME,
        f"rows of the packed embedding ({dtype})",
        node,
        frozenset((node,)),
        (table, node.inputs[1]),
        _rows,
        (("product", product), ("mode", mode)),
    )


def _uncast(value: Value) -> Value:
    """What a value is before casts that only say along which axes of a mesh it varies."""
    while value.primitive in views.IDENTITIES:
        value = value.node.inputs[0]
    return value


def _has_rows_as_columns(chain: _Chain, table: Value) -> bool:
    product, w = chain.product, _uncast(chain.w)
    if table.ndim != 2 or product.stack or product.in_call:
        return False
    if w is table:
        return product.w_order == (1, 0)
    turned = w.primitive == "transpose" and _uncast(w.node.inputs[0]) is table
    return turned and w.ndim == 2 and product.w_order == (0, 1)


def _taking(node: Node) -> str | None:
    """What becomes of indices outside where a node takes rows of a matrix; None if it does not."""
    if node.primitive not in ("gather", "dynamic_slice") or node.inputs[0].ndim != 2:
        return None
    p, (_, width) = node.params, node.inputs[0].shape
    if p["slice_sizes"] != (1, width):
        return None
    if node.primitive == "dynamic_slice":
        return "clip"
    dims = p["dimension_numbers"]
    places = dims.offset_dims, dims.collapsed_slice_dims, dims.start_index_map
    if places != ((node.output.ndim - 1,), (0,), (0,)):
        return None
    fills = p["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if fills and p["fill_value"] is not None and p["fill_value"] == p["fill_value"]:
        return None
    return "fill" if fills else "clip"


def _rows(table, indices, *, product, mode, order):
    count, width = table.shape
    indices = indices[..., 0] if indices.ndim else indices[None]
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)
    inside = (indices >= 0) & (indices < count)
    near = jnp.clip(indices, 0, count - 1)
    packed = product.packed(jnp.transpose(table) if product.w_order == (0, 1) else table)
    found = layout.columns(packed.codes, near, packed.dtype, width).astype(table.dtype)
    return jnp.where(inside[..., None], found, jnp.nan) if mode == "fill" else found


@dataclasses.dataclass(frozen=True)
class _Chain:
    """A product and what has been found behind it so far."""

    product: Product
    x: Value
    w: Value
    last: Node
    nodes: frozenset[Node] = frozenset()
    bias: Value | None = None
    activation: str = ""
    gate: Value | None = None  # the weight of one
    gate_bias: Value | None = None
    residual: Value | None = None
    absorbed: tuple[Match, ...] = ()

    @property
    def everything(self) -> frozenset[Node]:
        return self.nodes | {self.last}

    @property
    def extras(self) -> dict[str, Value]:
        names = ("bias", "gate", "gate_bias", "residual")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _with(self, last: Node, more=(), **changes) -> _Chain:
        nodes = self.nodes | {self.last, *more}
        return dataclasses.replace(self, last=last, nodes=nodes, **changes)

    def widened(self, matches: list[Match]) -> _Chain | None:
        """With the next thing behind it, or None if that is nothing that dense knows."""
        value = self.last.output
        if value.is_output or not value.uses or self.residual is not None:
            return None
        behind = self._activated(value, matches)
        if behind is not None:
            return behind
        if len(value.uses) != 1:
            return None
        (use,) = value.uses
        if use.removed or use.match is not None:
            return None
        if use.primitive == "mul" and use.output.dtype == value.dtype:
            return self._multiplied(use, matches)
        result = use.output
        if use.primitive != "add" or (result.shape, result.dtype) != (value.shape, value.dtype):
            return None
        (other,) = [v for v in use.inputs if v is not value] or [value]
        if other is value:
            return None
        if self.bias is None and not self.activation:
            source = views.repeated_rows(other, len(self.product.columns), value.shape)
            if source is not None:
                return self._with(use, bias=source)
        if other.shape == value.shape and views.is_float(other):
            return self._with(use, residual=other)
        return None

    def _activated(self, value: Value, matches: list[Match]) -> _Chain | None:
        """With the activation, of those found already, that is applied to the result."""
        if self.activation:
            return None
        taking = [m for m in matches if any(v is value for v in m.inputs)]
        if len(taking) != 1:
            return None
        (match,) = taking
        if not all(use in match.nodes for use in value.uses):
            return None
        row, kind = activations.row_and_kind(match)
        changes = {"activation": row, "absorbed": (match,)}
        if kind == "gated":
            return self._gated(match, changes)
        if kind == "biased":
            bias = match.inputs[1]
            fits = self.bias is None and match.inputs[0] is value
            if not fits or math.prod(bias.shape) != math.prod(self.product.columns):
                return None
            changes["bias"] = bias
        return self._with(match.root, match.nodes, **changes) if row else None

    def _gated(self, match: Match, changes: dict) -> _Chain | None:
        """activation(x·gate) · (x·weight), found as one already."""
        gate, main = (_linear(v) for v in match.inputs)
        if any(v.is_output or any(u not in match.nodes for u in v.uses) for v in match.inputs):
            return None
        return _with_gate(gate, main, match.root, nodes=match.nodes, **changes)

    def _multiplied(self, product: Node, matches: list[Match]) -> _Chain | None:
        """activation(x·gate) · (x·weight), if this is one of the factors."""
        if self.gate is not None:
            return None
        (other,) = [v for v in product.inputs if v is not self.last.output] or [None]
        if other is None or other.is_output or other.uses != [product]:
            return None
        if self.activation:
            changes = {"activation": self.activation, "absorbed": self.absorbed}
            return _with_gate(self, _linear(other), product, **changes)
        for match in matches:
            row, kind = activations.row_and_kind(match)
            if match.root is other.node and kind in ("plain", "biased"):
                gate = _linear(match.inputs[0])
                if gate is None or any(u not in match.nodes for u in match.inputs[0].uses):
                    return None
                gate = gate._activated(match.inputs[0], [match])
                changes = {"activation": row, "absorbed": (match,)}
                return _with_gate(gate, self, product, **changes)
        return None


def _match(chains: Sequence[_Chain], norm: Match | None = None) -> _Layers:
    first = chains[0]
    x, *arrays = (first.x,) if norm is None else norm.inputs
    parts = [
        first.product.format,
        f"{len(chains)} weights" if len(chains) > 1 else "",
        "" if norm is None else norm.name,
        first.activation,
        *dict.fromkeys(name for c in chains for name in c.extras),
    ]
    nodes = [c.everything for c in chains] + ([] if norm is None else [norm.nodes])
    extras = [value for c in chains for value in c.extras.values()]
    return _Layers(
        NAME,
        f"quake_jax.dense({', '.join(filter(None, parts))})",
        first.last,
        frozenset().union(*nodes),
        (x, *(c.w for c in chains), *extras, *arrays),
        _call,
        (
            ("products", tuple(c.product for c in chains)),
            ("extras", tuple(tuple(c.extras) for c in chains)),
            ("activation", first.activation or None),
            ("norm", None if norm is None else norm.static),
        ),
        tuple(c.last for c in chains[1:]),
        chains=tuple(chains),
    )


def _with_gate(gate: _Chain | None, main: _Chain | None, root: Node, nodes=(), **changes):
    """activation(x·gate) · (x·weight), if both are products of the same rows."""
    if gate is None or main is None or gate.product != main.product:
        return None
    if gate.x is not main.x or gate.w is main.w:
        return None
    nodes = frozenset(nodes) | gate.nodes | main.nodes | {gate.last, main.last, root}
    return dataclasses.replace(
        main, last=root, nodes=nodes, gate=gate.w, gate_bias=gate.bias, **changes
    )


def _linear(value: Value) -> _Chain | None:
    """A product and its bias whose result is a value."""
    node = value.node
    if node is None or node.removed or node.match is not None:
        return None
    sides = [(node, None)]
    if node.primitive == "add":
        sides = [(v.node, other) for v, other in zip(node.inputs, node.inputs[::-1], strict=True)]
    for last, bias in sides:
        if last is None or last.primitive != "dot_general" or last.match or last.removed:
            continue
        found = find(last)
        if found is None or not found[0].is_plain:
            continue
        chain = _Chain(*found, last)
        if bias is None:
            return chain
        source = views.repeated_rows(bias, len(chain.product.columns), last.output.shape)
        if source is not None and not last.output.is_output and last.output.uses == [node]:
            return chain._with(node, bias=source)
    return None


def _given(arrays, products, extras, activation, norm, order) -> tuple[list, list, dict]:
    """The weights of a call of dense, what each has beside it, and what they share."""
    rest = iter(arrays)
    weights = [product.packed(next(rest)) for product in products]
    given = [
        {name: _operand(name, next(rest), product) for name in names}
        for names, product in zip(extras, products, strict=True)
    ]
    keywords = {
        "activation": activation,
        "norm": None if norm is None else norms.of_dense(rest, **dict(norm)),
        "order": order,
        "preferred_element_type": products[0].dtype,
    }
    return weights, given, keywords


def _call_chained(x, *arrays, first, second, count, order):
    (weight,), (given,), shared = _given(arrays[:count], **dict(first), order=order)
    layer = {"weight": weight, **given, **shared}
    (weight,), (given,), shared = _given(arrays[count:], **dict(second), order=order)
    (product,) = dict(first)["products"]
    (last,) = dict(second)["products"]
    y = chained_layers(product.operand(x), layer, {"weight": weight, **given, **shared})
    return last.result(y.reshape(*last.rows, y.shape[-1]))


def _call(x, *arrays, products, extras, activation, norm, order):
    weights, given, keywords = _given(arrays, products, extras, activation, norm, order)

    def layer(x, weights, gates):
        if products[0].range == "measured":
            names = [w.activation_range for w in (*weights, *gates)]
            x = observe(x, norms.applied(keywords["norm"], x), names)
            weights, gates = _without_ranges(weights), _without_ranges(gates)
        rest = dict(given[0], gate=gates[0] if gates else None)
        if len(weights) == 1:
            return [dense(x, weights[0], **rest, **keywords)]
        return dense(x, weights, [names.get("bias") for names in given], **keywords)

    x = products[0].operand(x)
    gates = [g for names in given if (g := names.get("gate")) is not None]
    results = (jax.vmap(layer) if products[0].stack else layer)(x, weights, gates)
    results = [product.result(y) for product, y in zip(products, results, strict=True)]
    return results if len(results) > 1 else results[0]


def _without_ranges(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    return [dataclasses.replace(w, activation_range=None) for w in weights]


def _operand(name: str, value, product: Product):
    """Something beside the product as dense takes it."""
    if name == "gate":
        return product.packed(value)
    if name == "residual":
        return value.reshape(*product.rows, math.prod(product.columns))
    return value.reshape(-1)
