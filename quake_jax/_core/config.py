"""Which order a call uses: its `order` argument, the default in force, or "exact".

The default takes part in JAX's jit cache key, so a change of it retraces compiled functions.
"""

from __future__ import annotations

import contextlib
import operator

import numpy as np

from quake_jax._core import switches
from quake_jax._core.jax_names import make_user_context

EXACT = "exact"
ORDERS = (1, 2, 3, 4, 5)

Order = int | str

# Its error (1e-4) is below what bfloat16 can represent (4e-3).
DEFAULT_ORDER = 3
# Functions with another default, which they state where they are defined.
DEFAULT_ORDERS: dict[str, Order] = {}

_default_order = make_user_context(None)


def checked_order(order, argument: str = "order") -> Order | None:
    """Return `order` as None, an int from 1 to 5, or "exact"; raise for anything else."""
    if order is None or (isinstance(order, str) and order == EXACT):
        return order
    # bool is an int in Python, but order=True is a slip, not order 1.
    if not isinstance(order, (bool, np.bool_, str, float, np.floating)):
        try:
            number = operator.index(order)
        except TypeError:
            pass
        else:
            if number in ORDERS:
                return number
            raise ValueError(_order_message(order, argument))
    elif isinstance(order, str):
        raise ValueError(_order_message(order, argument))
    raise TypeError(_order_message(order, argument))


def _order_message(order, argument: str) -> str:
    return f'{argument} must be None, an integer from 1 to 5, or "exact"; got {order!r}'


def resolved_order(order, function: str) -> Order:
    """Return the order that a call of `function` uses: an int from 1 to 5, or "exact".

    This is called before tracing starts, because a differentiation rule may be traced where
    another default is in force than where its primal was.
    """
    order = checked_order(order)
    if switches.DISABLED:
        return EXACT
    if order is None:
        order = _default_order.value
    return DEFAULT_ORDERS.get(function, DEFAULT_ORDER) if order is None else order


@contextlib.contextmanager
def _default_order_set(order):
    with _default_order(order):
        yield


def default_order(order: int | str | None):
    """Context manager: the order of calls inside it that give none, in this thread.

    Functions compiled outside are compiled again inside, and the other way round, because the
    default is part of JAX's jit cache key.

    Args:
      order: an integer from 1 to 5, "exact", or None for each function's own default.

    Returns:
      A context manager, which also serves as a decorator.

    Raises:
      TypeError, ValueError: if order is none of these.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> with quake_jax.default_order(5):
      ...     y = quake_jax.exp(jnp.arange(3.0))
    """
    return _default_order_set(checked_order(order))


def set_default_order(order: int | str | None) -> None:
    """Set the order of calls that give none, in all threads of this process.

    A `default_order` context takes precedence over it.

    Args:
      order: an integer from 1 to 5, "exact", or None to go back to each function's own default.

    Raises:
      TypeError, ValueError: if order is none of these.

    Example:
      >>> import quake_jax
      >>> quake_jax.set_default_order(5)
      >>> quake_jax.set_default_order(None)
    """
    _default_order.set_global(checked_order(order))
