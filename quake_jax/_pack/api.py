"""`pack`: a function of parameters and other arguments becomes one of packed parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from quake_jax import _rewrite
from quake_jax._core import jax_names
from quake_jax._core.config import Order
from quake_jax._core.drop_in import refusal
from quake_jax._pack import calibrate as calibration
from quake_jax._pack.plan import Plan
from quake_jax._pack.report import PackReport
from quake_jax._pack.rules import checked_rules
from quake_jax._rewrite import calls, jaxprs
from quake_jax._rewrite.lift import lifted
from quake_jax._rewrite.weights import read_together


class PackedFunction:
    """A function of packed parameters: what `quake_jax.pack` returns.

    `fast(packed, *args, **kwargs)` is `fun(params, *args, **kwargs)` with packed weights. It
    composes with jit, grad in the other arguments, vmap and scan.

    Attributes:
      report: the `PackReport` of the call of `pack`.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> def layer(w, x):
      ...     return x @ w
      >>> x = jnp.ones((1, 64))
      >>> fast, packed = quake_jax.pack(layer, jnp.ones((64, 64)), x, weights="int8")
      >>> y = fast(fast.repack(jnp.zeros((64, 64))), x)
    """

    def __init__(self, fun: Callable, plan: Plan, options: _rewrite.Options):
        functools.update_wrapper(self, fun, updated=())
        self._fun = fun
        self._plan = plan
        self._options = options
        self.report: PackReport | None = None
        self._compiled = jax.jit(
            jaxprs.name_like(lambda static, *rest: self._call(static, *rest), fun),
            static_argnums=0,
            inline=jax_names.INLINE,
        )

    def __call__(self, packed, *args, **kwargs):
        entries = self._plan.entries(packed)
        arrays, static = calls.split(args, kwargs)
        call = self._compiled if static.is_key() else self._call
        return call(static, entries, arrays)

    def repack(self, params):
        """Return the packed parameters of others of the same shapes, without tracing anything."""
        return self._plan.packed(params)[0]

    def _explained(self, packed, *args, **kwargs) -> _rewrite.Report:
        """What `explain` says of a call."""
        self._plan.entries(packed)
        return self.program(args, kwargs)[1]

    def _call(self, static, entries, arrays):
        args, kwargs = calls.joined(arrays, static)
        program, _ = self.program(args, kwargs)
        return program.run(entries, arrays)

    def program(self, args, kwargs) -> tuple[_Program, _rewrite.Report]:
        """The program of a call, and what was replaced in it."""
        arrays, static = calls.split((self._plan.params, *args), kwargs)
        closed, tree = calls.traced(self._fun, static, arrays)
        origins = self._plan.origins
        origins = (*origins, *[None] * (len(arrays) - len(origins)))
        new, report = _rewrite.rewrite(closed, self._options, origins)
        return _Program(self._plan, new, tree, [x is not None for x in origins]), report


class _Program:
    """The program of a call whose weights have been lifted out."""

    def __init__(self, plan: Plan, closed, tree, is_parameter: Sequence[bool]):
        program, found = lifted(closed, is_parameter)
        self._plan, self._tree = plan, tree
        self._slots = [plan.slot(made, inputs) for made, inputs in found]
        program, consts = program.jaxpr, program.consts
        leaves = [slot for slot in self._slots for _ in jax.tree.leaves(slot.static)]
        labels = [*[None] * (len(program.invars) - len(leaves)), *leaves]
        #: the packed weights that calls of dense read together
        self.together = [*read_together(program, labels)]
        program, is_used = jax_names.without_dead_code(program)
        self._closed = jaxprs.closed(program, consts)
        self._is_used = is_used
        self._parameters = sum(is_parameter)
        #: which arrays of the parameters it reads as they are
        self.reads = [i for i in range(self._parameters) if is_used[i]]

    def run(self, entries, arrays):
        operands = [None] * self._parameters
        for i in self.reads:
            operands[i] = self._plan.array(entries, i)
        operands += arrays
        for slot in self._slots:
            operands += self._plan.weight(entries, slot)
        used = [x for x, is_used in zip(operands, self._is_used, strict=True) if is_used]
        used = [*map(jax_names.varying_as, used, self._closed.in_avals)]
        results = jax_names.jaxpr_as_fun(self._closed)(*used)
        return jax.tree.unflatten(self._tree, results)


def pack(
    fun: Callable | Sequence[tuple[Callable, tuple]],
    params: Any,
    /,
    *args,
    weights: str,
    activations: str | None = "auto",
    group_size: int | None = None,
    rules: Sequence[tuple[str, str | None]] | None = None,
    scale_method: str = "max",
    calibrate: Any = None,
    attention: str | None = None,
    order: Order | None = None,
    **kwargs,
):
    """Pack the weights of a model: return a fast function, and the parameters that it takes.

    `fun(params, *args, **kwargs)` is traced, as by `accelerate`, which also says what else is
    replaced. Where the program multiplies an activation by something that depends on the parameters
    alone, `dense` takes the product's place, with the bias, activation, gate and residual that
    follow it; query, key and value of the same rows are one call. The weights of these are packed
    once, here; loops, branches, remat and vmap inside are no obstacle, but what has a derivative
    rule of its own and shard_map are left as they are. Weights that are made of codes and scales,
    such as those of qwix's `QArray`, keep these where the format that they get has them too.

    Args:
      fun: function of parameters and other arguments; or a sequence of (function, arguments), such
        as prefill and decoding step, that are to share the packed parameters: `arguments` is the
        tuple of those after the parameters.
      params: pytree of arrays, or of `jax.ShapeDtypeStruct`, in which case packed parameters are
        abstract too.
      *args, **kwargs: what else `fun` takes. Arrays may be `jax.ShapeDtypeStruct`; only shapes and
        dtypes count. Keyword arguments of `fun` whose names are those below: `functools.partial`.
      weights: "float32", "bfloat16", "int8" or "int4", as in `pack_weight`. Under "int4" weights
        with fewer than 64 inputs or outputs, or 8 times more outputs than inputs (a vocabulary), or
        whose inputs no group divides, are packed as "int8" without groups.
      activations, group_size, scale_method: as in `pack_weight`, for the integer formats.
      rules: pairs of a regular expression and one of these dtypes, or None for weights that are
        left alone. The first one counts whose expression matches the path of a parameter, joined by
        "/", as a whole. The exceptions of "int4" are not made for what a rule names, and a tied
        embedding that a rule packs in bfloat16 is not kept for its rows. The parts of a `QArray`
        have its path, and its groups of rows that share a scale if they are multiples of 32.
      calibrate: None, each row that an int8 weight multiplies is quantised by its own largest
        element; or batches of inputs, on which `fun` is run here. Then int8 weights without groups
        get an `activation_range` (see `PackedWeight`), the least and the largest element of their
        rows in all batches. So no row is searched, and where a layer's result goes into another
        one and nowhere else, as in feed-forward blocks, it is written as int8. That is less exact:
        what is beyond the range is clipped. A batch is a tuple of the arguments after
        params, or the only one of them, if that is no tuple or list; batches are an iterable of
        such. For a sequence of functions, calibrate is one too, with the batches of each, or None.
      attention: None, or what attention multiplies: "float32", "bfloat16" or "int8", the
        `compute_dtype` of `dot_product_attention`.
      order: accuracy of activations and attention, as in `accelerate`.

    Returns:
      (fast, packed), where `fast(packed, *args, **kwargs)` takes arguments of any shape; for a
      sequence of functions, fast is a tuple. `packed` has the structure of params, with a
      `PackedWeight` for each parameter that is packed, None for one that nothing needs any more,
      and a `PackedLeaf` where a parameter is packed more than once or needed besides. (The rows of
      a tied embedding are read from the packed weight in float32, or in bfloat16 if the program
      reads it so.) `fast.report` says what was done; `fast.repack(params)` packs other parameters
      of the same shapes, with the same ranges.

    Raises:
      TypeError: if fun is neither a function nor pairs of one and a tuple; if rules are no pairs;
        if calibrate is no batches.
      ValueError: if weights, activations, group_size, scale_method, rules, attention or order is
        none of these; if a weight has NaN or an infinity; if calibrate is given for no int8 weights
        without groups or for abstract params, if it does not reach one of them, or reaches it with
        NaN.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax
      >>> def layer(params, x):
      ...     return jax.nn.gelu(x @ params["w"] + params["b"])
      >>> params = {"w": jnp.ones((64, 128)), "b": jnp.zeros(128)}
      >>> x = jnp.ones((4, 64))
      >>> fast, packed = quake_jax.pack(layer, params, x, weights="int8")
      >>> packed["w"]
      PackedWeight(shape=(64, 128), dtype='int8', group_size=None, activations='int8')
      >>> y = jax.jit(fast)(packed, x)
    """
    is_calibrated = calibrate is not None
    checked = checked_rules(
        weights, activations, group_size, scale_method, rules, calibrated=is_calibrated
    )
    options = _rewrite.checked_options(order, None, "pack", attention=attention)
    is_one = callable(fun)
    pairs = ((fun, args),) if is_one else _checked_pairs(fun, args)
    plan = Plan(params, checked)

    def traced():
        functions = [PackedFunction(f, plan, options) for f, _ in pairs]
        given = (given for _, given in pairs)
        return functions, [f.program(x, kwargs) for f, x in zip(functions, given, strict=True)]

    plan.is_measured = is_calibrated
    functions, programs = traced()
    for program, _ in programs:
        for index in program.reads:
            plan.keep(index)
    plan.finish()
    if is_calibrated:
        calibration.check(plan, params, calibrate, None if is_one else len(functions))
        with calibration.measuring(plan):
            packed, layers = plan.packed(params)
            each = [calibrate] if is_one else calibrate
            for function, batches in zip(functions, each, strict=True):
                calibration.run(function, packed, batches, kwargs)
        packed = plan.ranged(packed)
        plan.is_measured = False
        functions, programs = traced()
    else:
        packed, layers = plan.packed(params)
    reports = [report for _, report in programs]
    together = dict.fromkeys(slots for program, _ in programs for slots in program.together)
    named = [tuple(plan.name(slot) for slot in slots) for slots in together]
    report = PackReport(layers, plan.kept(), plan.dropped(), reports, named)
    for function in functions:
        function.report = report
    return (functions[0] if is_one else tuple(functions)), packed


def _checked_pairs(fun, args) -> list[tuple[Callable, tuple]]:
    expected = "a function, or pairs of one and a tuple of its arguments after params"
    if not isinstance(fun, Sequence) or isinstance(fun, str) or not fun:
        raise refusal("pack", "fun", expected, repr(fun), TypeError)
    for pair in fun:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and callable(pair[0])):
            raise refusal("pack", "fun", expected, repr(pair), TypeError)
        if not isinstance(pair[1], tuple):
            raise refusal("pack", "fun", expected, repr(pair), TypeError)
    if args:
        raise refusal(
            "pack", "args", "left out where fun is pairs", f"{len(args)} of them", TypeError
        )
    return list(fun)
