"""Running one module call as a rewritten program: the lifting that nn.remat does, around a rewrite
of the jaxpr.

Flax's names for this are not public; no other file of the package uses such names of Linen.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from quake_jax._core.jax_names import jaxpr_as_fun

# Leaves of a result that need no tracing; what else is no array may hold tracers.
_PLAIN = (bool, int, float, complex, str, bytes, np.ndarray, np.generic, np.dtype, type)


class NotTraceableError(Exception):
    """A module call returns what cannot leave a traced program, for instance a module."""


def inner_interceptors(interceptor: Callable) -> list[Callable]:
    """Return the interceptors that were entered after `interceptor`, the last one first."""
    from flax.linen.module import _global_interceptor_stack

    inner = []
    for other in _global_interceptor_stack:
        if other is interceptor:
            break
        inner.append(other)
    return inner


def current_module():
    """The module whose method is running in this thread."""
    from flax.linen.module import _context

    return _context.module_stack[-1]


def call_rewritten(
    interceptor: Callable,
    context,
    args: tuple,
    kwargs: dict,
    *,
    around: Callable[[Any], contextlib.AbstractContextManager],
    rewrite: Callable,
) -> Any:
    """Call the intercepted method as a program that has passed through `rewrite`.

    The method runs once, on a copy of the module whose variables are tracers. What it does to
    variables and random number counters happens to the module; inner interceptors see the copy.

    Args:
      interceptor: the one that asks.
      context: the `flax.linen.module.InterceptorContext`.
      args, kwargs: the method's arguments.
      around: makes the context that the method runs in from the module that it runs on.
      rewrite: from a closed jaxpr to one of the same inputs and outputs.

    Returns:
      What the method returns.

    Raises:
      NotTraceableError: if that holds something other than arrays and plain values; and what the
        method raises. The module is then as it was before.
    """
    from flax.core import lift
    from flax.linen.transforms import get_module_scopes, set_module_scopes

    module, inner = context.module, inner_interceptors(interceptor)

    if module.scope is None:

        def run_unbound(args, kwargs):
            with around(module):
                return _run(module, context, inner, args, kwargs)

        return _call_traced(run_unbound, rewrite, args, kwargs)

    counters_before_setup = module.__dict__.get(_COUNTERS)
    state = module._state.export()

    def lifted(scope_fn, repack_fn, variables, rngs, args, kwargs):
        def run_bound(variables, rngs, args, kwargs):
            scopes = scope_fn(variables, rngs)
            copied, args, kwargs = set_module_scopes(module, args, kwargs, scopes)
            object.__setattr__(copied, "_state", state)
            _set_up(copied, counters_before_setup)
            with around(copied):
                y = _run(copied, context, inner, args, kwargs)
            return y, repack_fn(scopes)

        return _call_traced(run_bound, rewrite, variables, rngs, args, kwargs)

    scopes, args, kwargs = get_module_scopes(module, args, kwargs)
    everything = ((True,),) * 3  # collections in, collections out, random number sequences
    with _counters_restored_on_error(scopes):
        y = lift.pack(lifted, *everything)(scopes, args, kwargs)
    module._state.reimport(state)
    return y


def _run(module, context, inner: list[Callable], args, kwargs) -> Any:
    """Run the method on `module` within `inner` interceptors, as Module._call_wrapped_method does.

    The method called is Flax's wrapper's inside, because the wrapper's other work (capturing
    intermediates, tables, outer interceptors) is already being done for the original.
    """
    from flax.linen import module as linen_module

    function = functools.partial(context.orig_method.func, module)
    inner_context = linen_module.InterceptorContext(module, context.method_name, function)
    for interceptor in inner:
        function = functools.partial(_intercepted, interceptor, function, inner_context)
    stack = linen_module._context.module_stack
    stack.append(module)
    try:
        return function(*args, **kwargs)
    finally:
        stack.pop()


def _intercepted(interceptor, function, context, *args, **kwargs):
    return interceptor(function, args, kwargs, context)


# A module's setup has run before its method is intercepted, and runs again on each copy. It must
# draw the same random numbers then, so its counters go back for it.

_COUNTERS = "_quake_jax_counters_before_setup"


def note_setup(module) -> None:
    """Remember the random number counters of a module whose setup is about to run."""
    object.__setattr__(module, _COUNTERS, copy.deepcopy(module.scope.rng_counters))


def _set_up(copied, counters_before: dict | None) -> None:
    counters = copied.scope.rng_counters
    after = copy.deepcopy(counters)
    if counters_before is not None:
        _set_counters(counters, counters_before)
    copied._try_setup()
    if counters_before is not None:
        _set_counters(counters, after)


def _set_counters(counters: dict, values: dict) -> None:
    """Set nested counters in place, because scopes share them; those not in `values` to 0."""
    for name, value in counters.items():
        if isinstance(value, dict):
            _set_counters(value, values.get(name, {}))
        else:
            counters[name] = values.get(name, 0)


@contextlib.contextmanager
def _counters_restored_on_error(scopes: list) -> Iterator[None]:
    before = [copy.deepcopy(scope.rng_counters) for scope in scopes]
    try:
        yield
    except BaseException:
        for scope, counters in zip(scopes, before, strict=True):
            _set_counters(scope.rng_counters, counters)
        raise


# Tracing


def _call_traced(function: Callable, rewrite: Callable, *operands) -> Any:
    """Call function(*operands), pytrees with arrays among other leaves, as a rewritten program."""
    leaves, structure = jax.tree.flatten(operands)
    arrays, rest = _partition(leaves)
    result: list = []

    def on_arrays(*arrays):
        tree = function(*jax.tree.unflatten(structure, _merge(arrays, rest)))
        leaves, out_structure = jax.tree.flatten(tree)
        arrays, out_rest = _partition(leaves)
        for leaf in out_rest:
            if leaf is not _ARRAY and not isinstance(leaf, _PLAIN):
                raise NotTraceableError(f"it returns an object of {type(leaf)}")
        result[:] = out_rest, out_structure
        return arrays

    jaxpr = rewrite(jax.make_jaxpr(on_arrays)(*arrays))
    arrays = jaxpr_as_fun(jaxpr)(*arrays)
    out_rest, out_structure = result
    return jax.tree.unflatten(out_structure, _merge(arrays, out_rest))


_ARRAY = object()


def _partition(leaves: list) -> tuple[list, list]:
    """Split leaves into arrays of JAX and a list with _ARRAY in the place of each."""
    # Arrays of numpy and Python numbers stay what they are to the module's own code.
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    return arrays, [_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in leaves]


def _merge(arrays, rest: list) -> list:
    remaining = iter(arrays)
    return [next(remaining) if leaf is _ARRAY else leaf for leaf in rest]
