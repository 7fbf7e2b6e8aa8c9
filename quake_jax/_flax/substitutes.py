"""Which functions of JAX and Flax have a substitute in quake_jax, where a module holds them.

Linen's interceptor and `quake_jax.nnx.substitute` exchange what they find in fields and attributes
by this table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from quake_jax._core.config import EXACT, Order
from quake_jax._elementwise.gated import glu
from quake_jax._elementwise.table import FUNCTIONS
from quake_jax._rows.api import log_softmax, softmax


def require_flax(user: str) -> None:
    """Raise ImportError with advice if Flax is not installed."""
    try:
        import flax  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{user} needs Flax, which is not installed: run `pip install 'quake_jax[flax]'`"
        ) from error


# By the names that `only` knows them by. These functions take the arguments of what they replace.
_FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "glu": (jax.nn.glu, glu),
    "log_softmax": (jax.nn.log_softmax, log_softmax),
    "softmax": (jax.nn.softmax, softmax),
    **{
        row.public.__name__: (row.replaces, row.public)
        for row in FUNCTIONS.values()
        if row.replaces is not None and not row.on_request
    },
}


def name_of(original: Callable) -> str:
    """By which `only` knows a function that `table` has."""
    return next((name for name, (other, _) in _FUNCTIONS.items() if other is original), "attention")


class Substitute(functools.partial):
    """A function of quake_jax that a module holds in place of `original`, at some order.

    Substitutes of one original at one order are equal, so that the caches of nn.jit and nnx.jit,
    which compare what modules hold, know them again.
    """

    original: Callable
    order: Order | None

    @property
    def name(self) -> str:
        return name_of(self.original.func if _is_partial(self.original) else self.original)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Substitute):
            return NotImplemented
        return self.original == other.original and self.order == other.order

    def __hash__(self) -> int:
        return hash((self.original, self.order))


def table(
    attention: Mapping[Callable, Callable], names: frozenset[str] | None
) -> dict[Callable, Callable]:
    """Return {original: function of quake_jax} for what `names` allows; None allows all.

    `attention` is that of the Flax library at hand.
    """
    found = dict(attention) if names is None or "attention" in names else {}
    for name, (original, function) in _FUNCTIONS.items():
        if names is None or name in names:
            found[original] = function
    return found


def substitute_of(value: Any, functions: Mapping[Callable, Callable], order: Order | None) -> Any:
    """Return what takes the place of a field's value: itself, unless it holds one of `functions`.

    A functools.partial of one of them and a list, tuple or dict with one count too, and so does a
    `Substitute` for one: it is replaced by that of this order, or for "exact" by its original.
    """
    if isinstance(value, (list, tuple)):
        # type() also knows lists of Flax; a named tuple takes its items one by one.
        new = [substitute_of(item, functions, order) for item in value]
        if all(a is b for a, b in zip(new, value, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if isinstance(value, Mapping):
        new = {name: substitute_of(item, functions, order) for name, item in value.items()}
        return type(value)(new) if any(new[name] is not value[name] for name in new) else value
    original = value.original if isinstance(value, Substitute) else value
    function = _function_for(original, functions)
    if function is None:
        return value
    if order == EXACT:
        return original
    arguments, keywords = (original.args, original.keywords) if _is_partial(original) else ((), {})
    substitute = Substitute(function, *arguments, **{**keywords, "order": order})
    substitute.original, substitute.order = original, order
    return substitute


def _is_partial(value) -> bool:
    return isinstance(value, functools.partial)


def _function_for(value, functions: Mapping[Callable, Callable]) -> Callable | None:
    if not callable(value):
        return None
    try:
        return functions.get(value.func if _is_partial(value) else value)
    except TypeError:  # not hashable
        return None
