"""What the caller of a rewrite may choose, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from quake_jax import _config

# What is replaced by default, and what only on request: their exactness may matter where they
# stand alone (temperatures, position encodings, losses).
DEFAULT_NAMES = frozenset(
    (
        "attention",
        "softmax",
        "log_softmax",
        "gelu",
        "quick_gelu",
        "silu",
        "sigmoid",
        "log_sigmoid",
        "softplus",
        "tanh",
        "mish",
        "elu",
        "celu",
        "selu",
        "glu",
    )
)
BARE_NAMES = frozenset(("exp", "exp2", "expm1"))
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to rewrite.

    Attributes:
      order: of every replacement, or None for the default of each.
      only: the names of what is replaced.
    """

    order: _config.Order | None = None
    only: frozenset[str] = DEFAULT_NAMES

    @property
    def does_nothing(self) -> bool:
        """Whether everything is to stay exact, by order or by QUAKE_JAX_DISABLE."""
        return _config.resolved_order(self.order, "softmax") == _config.EXACT


def checked_options(order, only, function: str = "accelerate") -> Options:
    """Return the Options that two arguments mean; raise TypeError or ValueError for others."""
    order = _config.checked_order(order)
    if only is None:
        return Options(order)
    allowed = sorted(DEFAULT_NAMES | BARE_NAMES)
    wanted = (
        f'None, "{ALL}", or a set of names, as in only={{"softmax", "gelu"}}; the names are '
        f"{', '.join(allowed)}"
    )
    if isinstance(only, str):
        if only == ALL:
            return Options(order, DEFAULT_NAMES | BARE_NAMES)
        only = (only,)
    names = list(only) if isinstance(only, Iterable) else [only]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"quake_jax.{function}: only must be {wanted}; got {only!r}")
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise ValueError(f"quake_jax.{function}: only must be {wanted}; got {', '.join(unknown)}")
    return Options(order, frozenset(names))
