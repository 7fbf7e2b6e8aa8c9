"""Dense layers of Flax NNX whose kernels are packed weights: what `quake_jax.nnx.pack` makes.

This module imports Flax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from quake_jax._core import jax_names
from quake_jax._core.drop_in import KERNEL_DTYPES
from quake_jax._core.progress import progress
from quake_jax._dense.api import dense
from quake_jax._dense.packed import PackedWeight, pack_weight
from quake_jax._pack.plan import bytes_of, relative_error
from quake_jax._pack.report import Kept, Layer, PackReport
from quake_jax._pack.rules import Rules
from quake_jax._rewrite import Report
from quake_jax._rewrite.dense import NAME
from quake_jax._rewrite.match import Reject


class PackedKernel(nnx.Variable):
    """A `PackedWeight`: no `nnx.Param`, so what differentiates or updates these leaves it out."""


def _product(self, inputs, out_sharding=None):
    """What a layer computes whose kernel is a `PackedKernel`; `param_dtype` is what it was."""
    if out_sharding is not None:
        raise ValueError(
            f"quake_jax.nnx.pack: a packed layer takes no out_sharding; got {out_sharding!r}"
        )
    in_features, out_features, axis = _features(self)
    bias = None if self.bias is None else self.bias.get_value()
    # The kernel's own values are rounded already, but its dtype takes part in the promotion.
    like = jnp.zeros((), self.param_dtype)
    x, _, bias = self.promote_dtype((inputs, like, bias), dtype=self.dtype)
    # In the order of their place in x, as Flax has it.
    summed = sorted(a % x.ndim for a in axis if -x.ndim <= a < x.ndim)
    if tuple(x.shape[a] for a in summed) != in_features:
        raise ValueError(
            f"quake_jax.nnx.pack: inputs must have the sizes {in_features} along the axes {axis}; "
            f"got shape {x.shape}"
        )
    rest = [a for a in range(x.ndim) if a not in summed]
    lead = [x.shape[a] for a in rest]
    x = jnp.transpose(x, (*rest, *summed)).reshape(*lead, math.prod(in_features))
    dtype = self.preferred_element_type or x.dtype
    if bias is not None:
        dtype = jnp.promote_types(dtype, bias.dtype)
        bias = bias.reshape(-1)
    y = dense(x, self.kernel.get_value(), bias, preferred_element_type=dtype)
    return y.reshape(*lead, *out_features)


# No class between these and Flax's, or modules could not become theirs: see `pack`.
class PackedLinear(nnx.Linear):
    """`flax.nnx.Linear` with a packed kernel."""

    __call__ = _product


class PackedLinearGeneral(nnx.LinearGeneral):
    """`flax.nnx.LinearGeneral` with a packed kernel."""

    __call__ = _product


_PACKED = {nnx.Linear: PackedLinear, nnx.LinearGeneral: PackedLinearGeneral}
_NODES = (nnx.Variable, nnx.Pytree)
# These compute the kernels of the layer in them anew in each call.
_CHANGING = (nnx.WeightNorm, nnx.SpectralNorm)


def _features(module) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The sizes of inputs, of outputs, and the axes of the inputs."""
    if isinstance(module, nnx.LinearGeneral):
        return module.in_features, module.out_features, module.axis
    return (module.in_features,), (module.out_features,), (-1,)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """How a kernel is packed: rounded to `dtype`, of shape (…, K, N), by these parameters."""

    dtype: Any
    shape: tuple[int, ...]
    parameters: tuple[tuple[str, Any], ...]

    def weight(self, kernel):
        return kernel.astype(self.dtype).reshape(self.shape)

    def __call__(self, kernel) -> PackedWeight:
        return pack_weight(self.weight(kernel), **dict(self.parameters))


def _packing(module, attribute: str, path: str, rules: Rules) -> _Packing:
    """How a parameter, the attribute of a module, is packed; rules know it by its path.

    Raises:
      Reject: if it must stay.
    """
    name = type(module).__name__
    if type(module) in _PACKED.values():
        raise Reject("it is packed already", NAME)
    if type(module) not in _PACKED or attribute != "kernel":
        raise Reject(f"{name}.{attribute} is no kernel of nnx.Linear or nnx.LinearGeneral", NAME)
    products = module.dot_general, getattr(module, "dot_general_cls", None)
    if any(f not in (None, lax.dot_general) for f in products):
        raise Reject("it has a dot_general of its own", NAME)
    if module.promote_dtype is not dtypes.promote_dtype:
        raise Reject("it has a promote_dtype of its own", NAME)
    if getattr(module, "batch_axis", None):
        raise Reject("it has batch axes", NAME)
    kernel = module.kernel.get_value()
    if not hasattr(kernel, "dtype") or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise Reject("its kernel is no array of floating-point numbers", NAME)
    # Without a dtype the layer computes in the kernel's or a wider one.
    dtype = kernel.dtype if module.dtype is None else module.dtype
    for given in (dtype, module.preferred_element_type or dtype):
        if jnp.dtype(given) not in KERNEL_DTYPES:
            raise Reject(f"it computes in {jnp.dtype(given).name}", NAME)
    inputs, outputs, _ = _features(module)
    one = (*inputs, *outputs)
    stack = kernel.shape[: max(kernel.ndim - len(one), 0)]
    bias = None if module.bias is None else module.bias.get_value().shape
    if kernel.shape != (*stack, *one) or bias not in (None, (*stack, *outputs)):
        expected = f"(…, {', '.join(map(str, one))})"
        raise Reject(f"shape {kernel.shape} is not {expected} with stacks in front", NAME)
    if one[0] in stack:  # without its second axis it would be a kernel too
        raise Reject(f"the axis of stacked layers in {kernel.shape} is not certain", NAME)
    if not math.prod(kernel.shape):
        raise Reject(f"an empty weight of shape {kernel.shape}", NAME)
    chosen = rules.format_of(path)
    if chosen.dtype is None:
        raise Reject("a rule leaves it alone", NAME)
    k, n = math.prod(inputs), math.prod(outputs)
    return _Packing(jnp.dtype(dtype), (*stack, k, n), tuple(chosen.of_weight(k, n).items()))


def _joined(*path) -> str:
    return "/".join(map(str, path))


def _parameters(model: nnx.Pytree) -> Iterator[tuple[str, nnx.Variable, list]]:
    """(path, parameter, [(path, module, attribute) that holds it]) of all in a model."""
    found = {}
    graph = list(nnx.iter_graph(model))
    paths = {id(x): _joined(*path) for path, x in graph}
    for path, module in graph:
        if not isinstance(module, nnx.Pytree):
            continue
        for name, value in vars(module).items():
            for x in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, _NODES)):
                if isinstance(x, (nnx.Param, PackedKernel)):
                    _, _, holders = found.setdefault(id(x), (paths[id(x)], x, []))
                    holders.append((_joined(*path, name), module, name))
    yield from found.values()


def _layer(path: str, kernel, packing: _Packing, before: int) -> tuple[PackedKernel, Layer]:
    error = None
    if isinstance(kernel, jax.ShapeDtypeStruct):
        made = jax.eval_shape(packing, kernel)
    else:
        try:
            made = packing(kernel)
        except ValueError as failure:
            raise ValueError(f"quake_jax.nnx.pack: {path}: {failure}") from failure
        if not isinstance(kernel, jax_names.Tracer):
            error = relative_error(packing.weight(kernel), made)
    after = sum(map(bytes_of, jax.tree.leaves(made)))
    form = made.dtype, made.group_size, made.activations
    return PackedKernel(made), Layer(
        (path,), packing.shape, *form, False, before, after, error, False
    )


def pack(model: nnx.Pytree, rules: Rules) -> PackReport:
    """Pack the kernels of a model in place."""
    report, layers, kept, new = Report(), [], [], []
    changed = {
        id(x): type(holder).__name__
        for _, holder in nnx.iter_graph(model)
        if isinstance(holder, _CHANGING)
        for _, x in nnx.iter_graph(holder.layer_instance)
    }
    parameters = [*_parameters(model)]
    with progress("packing", len(parameters), after=1.0) as advance:
        for path, variable, holders in parameters:
            advance()
            value = variable.get_value()
            packings, reasons = {}, {}
            for where, module, attribute in holders:
                try:
                    if id(module) in changed:
                        raise Reject(f"nnx.{changed[id(module)]} changes it in each call", NAME)
                    packings[where] = _packing(module, attribute, path, rules)
                except Reject as reject:
                    reasons[where] = str(reject)
            if reasons:
                # Who needs the array keeps it for all.
                shared = f"it is shared with {next(iter(reasons))}"
                reasons |= dict.fromkeys(packings, shared)
                for where, _, attribute in holders:
                    if len(getattr(value, "shape", ())) > 1 and attribute != "bias":
                        report.add(NAME, None, reasons[where], where)
                if hasattr(value, "dtype"):
                    size = sum(map(bytes_of, jax.tree.leaves(value)))
                    kept.append(Kept(path, value.shape, str(value.dtype), size))
                continue
            made = {}
            for where, module, _ in holders:
                packing = packings[where]
                if packing not in made:
                    before = 0 if made else bytes_of(value)
                    made[packing], layer = _layer(path, value, packing, before)
                    layers.append(layer)
                new.append((module, value.dtype, made[packing]))
                parts = [dict(packing.parameters)["dtype"], *["bias"] * (module.bias is not None)]
                report.add(NAME, f"quake_jax.dense({', '.join(parts)})", "", where)
    for module, dtype, kernel in new:  # all or, after an error above, none
        module.kernel, module.param_dtype = kernel, dtype
        # The same object, so that all who hold it have the packed layer. Modules forbid a plain
        # assignment, which they take for that of an attribute.
        object.__setattr__(module, "__class__", _PACKED[type(module)])
    return PackReport(layers, kept, [], [report])
