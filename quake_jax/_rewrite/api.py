"""`accelerate` turns a function of JAX into one that runs on the kernels; `explain` says how.

Both trace the function, as jax.jit does, and rewrite the program that comes out.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence

import jax

from quake_jax import _rewrite
from quake_jax._core import jax_names
from quake_jax._core.config import Order
from quake_jax._core.drop_in import refusal
from quake_jax._rewrite import Options, Report, calls, jaxprs
from quake_jax._rewrite.dense import Format, origin
from quake_jax._rewrite.lift import lifted

_ATTRIBUTE = "__quake_jax__"


def _checked(fun, function: str) -> None:
    if not callable(fun):
        raise TypeError(
            f"quake_jax.{function}: fun must be a function of arrays, as in "
            + ("accelerate(fun)(x)" if function == "accelerate" else "explain(fun, x)")
            + f"; got {type(fun).__name__}"
        )


def _is_jitted(fun) -> bool:
    return isinstance(fun, jax.stages.Wrapped)


def accelerate(
    fun: Callable,
    *,
    order: Order | None = None,
    only: str | set[str] | None = None,
    softmax: str | None = None,
    gelu: str | None = None,
    weights: str | None = None,
    attention: str | None = None,
    params_argnums: int | Sequence[int] = 0,
) -> Callable:
    """Return `fun` with attention, softmax and activations computed by this package's kernels.

    The program that `fun` traces to is searched for the forms in which JAX libraries and people
    write these functions; what matches exactly, and whose intermediate results nothing else
    needs, is replaced by a call of the function of `quake_jax`. All else stays as it is. See
    `explain` for what is found.

    Args:
      fun: function of arrays, in any pytrees, that jax.jit could trace. A jitted one keeps its
        name, its shardings and its donated arguments.
      order: accuracy of what is replaced, as in `quake_jax.softmax`; None is the default of each
        function: 5 for attention (2 in int8) and 3 for the others. "exact" replaces nothing.
      only: what to replace: None is attention, softmax, log_softmax, logsumexp and
        the activations (gelu, quick_gelu, silu, sigmoid, log_sigmoid, softplus, tanh, mish, elu,
        celu, selu, glu) of arrays of at least 256 to 1024 elements, by the function, and attention
        of at least 16 weights.
        A set of these names restricts it; "gelu" and "silu" include their forms with a bias or
        a gate. "all" adds the bare exp, exp2 and expm1, which have names too; in float32 an exp or
        exp2 that XLA computes in one loop with what is around it stays, which is faster.
      softmax: name of a published approximation in `quake_jax.approximations`, such as "e2softmax",
        that takes the kernel's place, for studies of quality. Attention is then not fused, so that
        its softmax is replaced too, and no array is too small.
      gelu: the same of GELU, such as "shiftgelu". With order="exact" nothing but these is replaced.
      weights: None, or a format of `pack_weight`: "float32", "bfloat16", "int8" or "int4". Products
        with what depends on parameters alone are then replaced by `dense`, as `pack` does, but each
        call packs the weights first, so that `fun` keeps its parameters. That pays where a weight
        meets many rows; `explain` says how many. Donated arguments are kept.
      attention: None, or the `compute_dtype` of `dot_product_attention`: "float32", "bfloat16" or
        "int8".
      params_argnums: the positional argument of `fun` that holds the parameters, or a tuple of
        them; of no effect without `weights`.

    Returns:
      A function with the signature and name of `fun`. It composes with jit, grad, vmap, shard_map
      and scan; its derivatives are those of the functions of `quake_jax`, but where `fun` has a
      custom_jvp or custom_vjp of its own, whose rule stays. Arguments that are no arrays are
      static: each value of a Python number gives a program of its own. What cannot be hashed, or
      compares by identity and may change (an object with weights that is no pytree, as is the
      `self` of a decorated method), has `fun` traced anew in every call: put jax.jit around the
      whole step. Otherwise, called outside jit, it compiles, once for each set of shapes, dtypes
      and static arguments, as jax.jit does, and shares what it has compiled with other calls of
      `accelerate` for the same function and options. As there, what `fun` reads besides its
      arguments (a mutable model, say) is a constant of the program. What it changes in a model of
      Flax NNX that it is given is lost, as there; a warning says so.

      Results agree to the order's error. Where the original overflows on its way to a finite
      result (e^x / Σ e^x without a maximum, log(1 + e^x)) the replacement gives that result.

      Differentiate it, `jax.grad(accelerate(f))`. In `accelerate(jax.grad(f))` the derivative
      needs the intermediate results, so much less is replaced.

    Raises:
      TypeError: if fun is not callable; if only is no name or set of names; if a derivative is
        taken with respect to weights that are packed.
      ValueError: if only has an unknown name, or softmax or gelu is none of an approximation; if
        weights or attention is no format; if a call has no positional argument of params_argnums.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax
      >>> def layer(x, w):
      ...     return jax.nn.softmax(jax.nn.gelu(x @ w))
      >>> fast = jax.jit(quake_jax.accelerate(layer))
      >>> y = fast(jnp.ones((64, 64)), jnp.ones((64, 64)))
    """
    _checked(fun, "accelerate")
    options = _rewrite.checked_options(
        order,
        only,
        softmax=softmax,
        gelu=gelu,
        weights=weights,
        attention=attention,
        params_argnums=params_argnums,
    )
    programs = _programs_of(fun, options)

    @functools.wraps(fun)
    def accelerated(*args, **kwargs):
        return programs.call(*calls.split(args, kwargs))

    jaxprs.name_like(accelerated, fun)
    # This also keeps fun, which its programs do not.
    setattr(accelerated, _ATTRIBUTE, (accelerated, fun, options))
    return accelerated


# By function, as long as that exists, and options.
_programs: weakref.WeakKeyDictionary[Callable, dict[Options, _Programs]]
_programs = weakref.WeakKeyDictionary()


def _programs_of(fun: Callable, options: Options) -> _Programs:
    """The programs of a function, the same ones for the same function and options."""
    # Not so for methods and other objects, which may be equal and read other things.
    if not (isinstance(fun, types.FunctionType) or _is_jitted(fun)):
        return _Programs(fun, options)
    by_options = _programs.setdefault(fun, {})
    if options not in by_options:
        by_options[options] = _Programs(fun, options)
    return by_options[options]


def _origins(static: calls.Static, arrays, options: Options):
    """The formats of the arrays of a call that are parameters; None if no weight is packed."""
    if not options.packs:
        return None
    try:
        are_parameters = static.arrays_of(options.params_argnums)
    except IndexError:
        count = len(static.tree.children()[0].children())
        expected = f"numbers of positional arguments, of which the call has {count}"
        given = str(options.params_argnums)
        raise refusal("accelerate", "params_argnums", expected, given) from None
    chosen = Format(options.weights, in_call=True)
    return tuple(
        origin(x, chosen) if is_parameter else None
        for x, is_parameter in zip(arrays, are_parameters, strict=True)
    )


class _Programs:
    """The rewritten programs of one function, which somebody else keeps alive."""

    def __init__(self, fun: Callable, options: Options):
        try:
            self._function = weakref.ref(fun)
        except TypeError:
            self._function = lambda: fun
        self._is_jitted = _is_jitted(fun)
        self._options = options
        # Whether a jitted function gives arguments away, by what is not an array in the call:
        # an argument that may be None is given away only where it is an array.
        self._donates: dict[calls.Static, bool] = {}

        def call(static, *arrays):
            closed, tree = calls.traced(self._function(), static, arrays)
            origins = _origins(static, arrays, options)
            new, _ = _rewrite.rewrite(closed, options, origins)
            if origins is not None:
                new, packings = lifted(new, [x is not None for x in origins])
                for packing, inputs in packings:
                    packed = jax_names.jaxpr_as_fun(packing)(*(arrays[i] for i in inputs))
                    arrays = (*arrays, *packed)
            return jax.tree.unflatten(tree, jax_names.jaxpr_as_fun(new)(*arrays))

        self._call = jaxprs.name_like(call, fun)
        # jit's cache knows everything that a program depends on, the default order among it.
        self._compiled = jax.jit(self._call, static_argnums=0, inline=jax_names.INLINE)

    def call(self, arrays, static: calls.Static):
        if not static.is_key():
            return self._call(static, *arrays)
        if self._is_jitted and not self._options.packs and self._donates_in(arrays, static):
            return self._call_jitted(arrays, static)
        return self._compiled(static, *arrays)

    def _donates_in(self, arrays, static: calls.Static) -> bool:
        if static not in self._donates:
            closed, _ = calls.traced(self._function(), static, arrays)
            donated = any(any(e.params.get("donated_invars", ())) for e in closed.eqns)
            self._donates[static] = donated
        return self._donates[static]

    def _call_jitted(self, arrays, static: calls.Static):
        """Run a jitted function in no other jit, which would not give its arguments away."""
        closed, tree = calls.traced(self._function(), static, arrays)
        if not self._options.does_nothing:
            # What is called is the same object in every call, and so is its rewritten form.
            closed = _rewrite.rewrite_called(closed, self._options)
        return jax.tree.unflatten(tree, jax_names.jaxpr_as_fun(closed)(*arrays))


def explain(fun: Callable, /, *args, **kwargs) -> Report:
    """Return a report of what `accelerate` replaces in a call of `fun`, and what it leaves and why.

    Args:
      fun: function, or the result of `accelerate` or `pack`, whose options then count.
      *args, **kwargs: what to call it with. Arrays may be jax.ShapeDtypeStruct; nothing is run.

    Returns:
      A report. Printed it is a table; `replaced` and `left` are lists of records with name,
      replacement, reason, where (file, line and function in your source) and count.

    Raises:
      TypeError: if fun is not callable.

    Example:
      >>> import jax, jax.numpy as jnp, quake_jax
      >>> report = quake_jax.explain(jax.nn.softmax, jnp.ones((64, 64)))
      >>> print(report)  # doctest: +SKIP
    """
    _checked(fun, "explain")
    if hasattr(fun, "_explained"):  # by a call of what `pack` returned
        return fun._explained(*args, **kwargs)
    # functools.wraps copies the attribute to functions that are others.
    accelerated, inner, options = getattr(fun, _ATTRIBUTE, (None, None, None))
    if accelerated is fun:
        fun = inner
    else:
        options = Options()
    arrays, static = calls.split(args, kwargs)
    closed, _ = calls.traced(fun, static, arrays)
    report = Report()
    # JAX knows no frames outside the function that it traces.
    origins = _origins(static, arrays, options)
    report.update(_rewrite.rewrite(closed, options, origins)[1], _rewrite.call_site())
    return report
