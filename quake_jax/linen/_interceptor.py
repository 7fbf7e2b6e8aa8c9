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
from quake_jax._rewrite import Options, checked_options, rewrite
from quake_jax.linen._attention_fn import attention_fn, attention_in_program
from quake_jax.linen._cache import check_dtype, fields_for_cache

# Part of JAX's jit cache key: what a program was substituted by, and whether it was traced inside
# a module call that is being rewritten as a whole.
_trace_context = make_user_context(None)


class _Local(threading.local):
    rewriting = False  # whether this thread is inside a module call that will be rewritten


_local = _Local()


@functools.cache
def _functions(names: frozenset[str], attention: Callable) -> dict[Callable, Callable]:
    """What is replaced where a field holds it."""
    import flax.linen

    return substitutes.table({flax.linen.dot_product_attention: attention}, names)


def _substituted_fields(module, functions, order: Order | None) -> dict[str, Any]:
    """What takes the place of the functions that a module's fields hold."""
    new = {}
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name") or field.name not in module.__dict__:
            continue
        value = module.__dict__[field.name]
        substitute = substitutes.substitute_of(value, functions, order)
        if substitute is not value:
            new[field.name] = substitute
    return new


@contextlib.contextmanager
def _exchanged(module, new: dict[str, Any]) -> Iterator[None]:
    """Exchange fields of a module, until the context is left."""
    old = {name: getattr(module, name) for name in new}

    def exchange(values):
        for name, value in values.items():
            # A bound module refuses a change; this one ends with the call.
            object.__setattr__(module, name, value)

    exchange(new)
    try:
        yield
    finally:
        exchange(old)


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """What `interceptor` returns: a method interceptor for `flax.linen.intercept_methods`."""

    options: Options = Options()
    kv_cache: str | None = None

    def __call__(self, next_fun: Callable, args: tuple, kwargs: dict, context) -> Any:
        if self.options.does_nothing and self.kv_cache is None:
            return next_fun(*args, **kwargs)
        from quake_jax.linen import _lift

        module = context.module
        if any(isinstance(other, Interceptor) for other in _lift.inner_interceptors(self)):
            return next_fun(*args, **kwargs)  # that one counts
        if _local.rewriting:
            with self._attention_of(context, module):
                return next_fun(*args, **kwargs)
        if context.method_name == "setup":
            _lift.note_setup(module)
            return next_fun(*args, **kwargs)
        try:
            return self._rewritten(args, kwargs, context)
        except _not_traceable() as error:
            reason = error
        with (
            self._trace_context("fields"),
            self._fields_of(context, module, self.options.kernels, attention_fn),
        ):
            y = next_fun(*args, **kwargs)
        _warn_not_traceable(context, reason)
        return y

    def _rewritten(self, args: tuple, kwargs: dict, context) -> Any:
        from quake_jax.linen import _lift

        around = functools.partial(self._attention_of, context)
        _local.rewriting = True
        try:
            with self._trace_context("rewriting"):
                return _lift.call_rewritten(
                    self, context, args, kwargs, around=around, rewrite=self._rewrite
                )
        finally:
            _local.rewriting = False

    def _rewrite(self, jaxpr):
        return rewrite(jaxpr, self.options)[0]

    def _attention_of(self, context, module):
        # Attention first, because its dropout and its sown weights have a meaning here that the
        # program has lost; the activations in the program, with the biases beside them.
        names = self.options.kernels & {"attention"}
        return self._fields_of(context, module, names, attention_in_program)

    def _fields_of(self, context, module, names: frozenset[str], attention: Callable):
        """Exchange fields for the intercepted method, on its module or a copy."""
        new = _substituted_fields(module, _functions(names, attention), self.options.order)
        method = context.orig_method.func
        return _exchanged(module, new | fields_for_cache(module, method, new, self.kv_cache))

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


def _checked(function: str, order, only, softmax, gelu, kv_cache) -> Interceptor:
    substitutes.require_flax("quake_jax.linen")
    check_dtype(kv_cache, function)
    return Interceptor(checked_options(order, only, function, softmax=softmax, gelu=gelu), kv_cache)


def interceptor(
    order: Order | None = None,
    only: Collection[str] | str | None = None,
    *,
    softmax: str | None = None,
    gelu: str | None = None,
    kv_cache: str | None = None,
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
      kv_cache: "float32", "bfloat16", "float16" or "int8": where Flax's attention modules decode
        (`decode=True`), keys and values are kept as such in a `quake_jax.kv_cache.KVCache`, the
        variable "kv_cache" of the collection "cache", in place of Flax's three. As there, `init`
        makes it, with room for the positions of its input, and each later call appends; but also
        several positions, of which each sees those up to itself, so that a prompt is one call. More
        than there is room for give NaN. The interceptor must be the same in `init` and all calls.
        Attention that cannot be fused (dropout, sown weights, an einsum or `attention_fn` of one's
        own, or which `only` leaves alone) reads the whole cache in its own dtype first.
        None leaves Flax's cache.

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
    return _checked("linen.interceptor", order, only, softmax, gelu, kv_cache)


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
    kv_cache: str | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Context manager: Linen models called inside run on the kernels, in this thread.

    It enters `interceptor`, and a part of JAX's jit cache key: a function that was compiled
    outside is compiled again inside, and the other way round.

    Args:
      order: accuracy, as in `quake_jax.accelerate`. "exact" replaces nothing.
      only: what to replace, as in `quake_jax.accelerate`.
      softmax, gelu: names in `quake_jax.approximations`, as in `quake_jax.accelerate`.
      kv_cache: what keys and values are stored as in decoding, or None, as in `interceptor`.

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

      Decoding, of a prompt of 5 positions and the next:

      >>> layer, x = nn.MultiHeadDotProductAttention(2, decode=True), jnp.ones((1, 64, 16))
      >>> with quake_jax.linen.substitute(kv_cache="int8"):
      ...     variables = layer.init(jax.random.key(0), x)
      ...     for tokens in (x[:, :5], x[:, 5:6]):
      ...         y, changed = layer.apply(variables, tokens, mutable=["cache"])
      ...         variables = variables | changed
      >>> int(variables["cache"]["kv_cache"].length)
      6
    """
    return _substituting(_checked("linen.substitute", order, only, softmax, gelu, kv_cache))
