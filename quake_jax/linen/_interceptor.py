"""Linen models on quake_jax's kernels without a change: `interceptor` and `substitute`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from quake_jax._core.config import Order
from quake_jax._core.jax_names import make_user_context
from quake_jax._flax import substitutes
from quake_jax._flax.attention import products_are_changed
from quake_jax._rewrite import Options, checked_options, rewrite
from quake_jax.linen._attention_fn import attention_fn

# Part of JAX's jit cache key: what a program was substituted by, and whether it was traced inside
# a module call that is being rewritten as a whole.
_trace_context = make_user_context(None)


class _Local(threading.local):
    rewriting = False  # whether this thread is inside a module call that will be rewritten


_local = _Local()


@functools.wraps(attention_fn)
def _attention_in_program(*args, order: Order | None = None, **kwargs) -> jax.Array:
    """`attention_fn`, or Flax's own function if its products may be another library's.

    The rewriter finds attention in the program then if the products are JAX's after all.
    """
    import flax.linen

    if products_are_changed():
        return flax.linen.dot_product_attention(*args, **kwargs)
    return attention_fn(*args, order=order, **kwargs)


@functools.cache
def _functions(names: frozenset[str], attention: Callable) -> dict[Callable, Callable]:
    """What is replaced where a field holds it."""
    import flax.linen

    return substitutes.table({flax.linen.dot_product_attention: attention}, names)


@contextlib.contextmanager
def _substituted_fields(module, functions, order: Order | None) -> Iterator[None]:
    """Exchange the functions that a module's fields hold, until the context is left."""
    changed = {}
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name") or field.name not in module.__dict__:
            continue
        value = module.__dict__[field.name]
        new = substitutes.substitute_of(value, functions, order)
        if new is not value:
            changed[field.name] = value
            # A bound module refuses a change; this one ends with the call.
            object.__setattr__(module, field.name, new)
    try:
        yield
    finally:
        for name, value in changed.items():
            object.__setattr__(module, name, value)


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """What `interceptor` returns: a method interceptor for `flax.linen.intercept_methods`."""

    options: Options = Options()

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context) -> Any:
        if self.options.does_nothing:
            return next_fun(*args, **kwargs)
        from quake_jax.linen import _lift

        module = context.module
        if any(isinstance(other, Interceptor) for other in _lift.inner_interceptors(self)):
            return next_fun(*args, **kwargs)  # that one counts
        if _local.rewriting:
            with self._attention_of(module):
                return next_fun(*args, **kwargs)
        if context.method_name == "setup":
            _lift.note_setup(module)
            return next_fun(*args, **kwargs)
        try:
            return self._rewritten(args, kwargs, context)
        except _not_traceable() as error:
            reason = error
        with self._trace_context("fields"), self._fields_of(module, self.options.kernels):
            y = next_fun(*args, **kwargs)
        _warn_not_traceable(context, reason)
        return y

    def _rewritten(self, args: tuple, kwargs: dict, context) -> Any:
        from quake_jax.linen import _lift

        _local.rewriting = True
        try:
            with self._trace_context("rewriting"):
                return _lift.call_rewritten(
                    self, context, args, kwargs, around=self._attention_of, rewrite=self._rewrite
                )
        finally:
            _local.rewriting = False

    def _rewrite(self, jaxpr):
        return rewrite(jaxpr, self.options)[0]

    def _attention_of(self, module):
        # Attention first, because its dropout and its sown weights have a meaning here that the
        # program has lost; the activations in the program, with the biases beside them.
        return self._fields_of(module, self.options.kernels & {"attention"}, _attention_in_program)

    def _fields_of(self, module, names: frozenset[str], attention: Callable = attention_fn):
        return _substituted_fields(module, _functions(names, attention), self.options.order)

    def _trace_context(self, state: str):
        return _trace_context((self, state))

    def __enter__(self):
        raise TypeError(
            "quake_jax.linen.interceptor(...) is no context manager: write `with "
            "flax.linen.intercept_methods(quake_jax.linen.interceptor()):` or `with "
            "quake_jax.linen.substitute():`"
        )

    def __exit__(self, *_):
        """Never called: `with` looks for it before it calls `__enter__`."""


def _not_traceable() -> tuple[type[Exception], ...]:
    """What a module call raises that works outside a traced program only."""
    import flax.errors

    from quake_jax.linen import _lift

    return (
        _lift.NotTraceableError,
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
        flax.errors.JaxTransformError,
    )


def _warn_not_traceable(context, reason: Exception) -> None:
    lines = str(reason).strip().splitlines()
    message = lines[0] if lines else ""
    warnings.warn(
        f"quake_jax.linen: {type(context.module).__name__}.{context.method_name} cannot be traced "
        f"({type(reason).__name__}: {message}). Of its own code, only functions that it holds in "
        "fields were replaced; modules that it calls were treated one by one",
        stacklevel=3,
    )


def interceptor(
    order: Order | None = None,
    only: Collection[str] | str | None = None,
    *,
    softmax: str | None = None,
    gelu: str | None = None,
) -> Interceptor:
    """Return an interceptor for `flax.linen.intercept_methods` that runs a model on the kernels.

    It replaces, in each call of a module from outside (`init`, `apply`, a method of a bound
    module), what `quake_jax.accelerate` replaces in a function: attention, softmax and the
    activations, wherever the modules call them from. A module that has an `attention_fn` gets
    `quake_jax.linen.attention_fn` instead of Flax's. Parameters, mutable variables and random
    numbers are what they are without it.

    The call is traced, as under `jax.jit`, and `setup` runs twice, as under `flax.linen.remat`.
    Where a module cannot be traced (its code asks for the values of arrays, or it returns a
    module), its own code stays, but for functions that it holds in fields, and the modules that it
    calls are treated one by one; a warning says so. Called outside `jax.jit`, a model is traced
    anew each time.

    JAX does not know of interceptors: a function that was jitted and called outside stays what it
    is when it is called inside, and the other way round. The same holds for a model that is itself
    the result of `flax.linen.jit`. `substitute` has no such trap.

    Other interceptors work beside it. Of two of its kind the inner one counts. Threads other than
    the one that entered it are untouched.

    Args:
      order: accuracy, as in `quake_jax.accelerate`. "exact" replaces nothing.
      only: what to replace, as in `quake_jax.accelerate`.
      softmax, gelu: names in `quake_jax.approximations`, as in `quake_jax.accelerate`.

    Returns:
      A callable that can be pickled and entered any number of times.

    Raises:
      ImportError: if Flax is not installed.
      TypeError, ValueError: if an argument is not allowed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, quake_jax.linen
      >>> model = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(8)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((32, 16)))
      >>> with nn.intercept_methods(quake_jax.linen.interceptor()):
      ...     y = model.apply(variables, jnp.ones((32, 16)))
    """
    substitutes.require_flax("quake_jax.linen")
    return Interceptor(
        checked_options(order, only, "linen.interceptor", softmax=softmax, gelu=gelu)
    )


@contextlib.contextmanager
def _substituting(intercept: Interceptor) -> Iterator[None]:
    import flax.linen

    with _trace_context((intercept, "entered")), flax.linen.intercept_methods(intercept):
        yield


def substitute(
    order: Order | None = None,
    only: Collection[str] | str | None = None,
    *,
    softmax: str | None = None,
    gelu: str | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Context manager: Linen models called inside run on the kernels, in this thread.

    It enters `interceptor`, and a part of JAX's jit cache key: a function that was compiled
    outside is compiled again inside, and the other way round.

    Args:
      order: accuracy, as in `quake_jax.accelerate`. "exact" replaces nothing.
      only: what to replace, as in `quake_jax.accelerate`.
      softmax, gelu: names in `quake_jax.approximations`, as in `quake_jax.accelerate`.

    Returns:
      A context manager for one use, which also serves as a decorator.

    Raises:
      ImportError: if Flax is not installed.
      TypeError, ValueError: if an argument is not allowed.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, quake_jax.linen
      >>> model = nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(8)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((32, 16)))
      >>> with quake_jax.linen.substitute():
      ...     y = jax.jit(model.apply)(variables, jnp.ones((32, 16)))
    """
    substitutes.require_flax("quake_jax.linen")
    options = checked_options(order, only, "linen.substitute", softmax=softmax, gelu=gelu)
    return _substituting(Interceptor(options))
