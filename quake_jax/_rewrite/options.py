"""What the caller of a rewrite may choose, checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from quake_jax._attention.arguments import checked_compute_dtype
from quake_jax._core import config, switches
from quake_jax._core.drop_in import refusal
from quake_jax._dense.layout import CODES
from quake_jax._elementwise.table import FUNCTIONS

# What is replaced by default, and what only on request: their exactness may matter where they
# stand alone (temperatures, position encodings, losses).
DEFAULT_NAMES = frozenset(
    (
        "attention",
        "softmax",
        "log_softmax",
        "logsumexp",
        "glu",
        *(row.public.__name__ for row in FUNCTIONS.values() if not row.on_request),
    )
)
BARE_NAMES = frozenset(row.name for row in FUNCTIONS.values() if row.on_request)
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to rewrite.

    Attributes:
      order: of every replacement, or None for the default of each.
      only: the names of what is replaced.
      approximations: (kind, name) of those of `quake_jax.approximations` that take the place of
        this package's kernels, sorted.
      weights: the format in which each call packs weights, or None.
      attention: the `compute_dtype` of attention, or None.
      params_argnums: the positional arguments whose arrays are weights.
    """

    order: config.Order | None = None
    only: frozenset[str] = DEFAULT_NAMES
    approximations: tuple[tuple[str, str], ...] = ()
    weights: str | None = None
    attention: str | None = None
    params_argnums: tuple[int, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The names of what is replaced now, by a kernel or by an approximation."""
        if switches.DISABLED:
            return frozenset()
        approximated = frozenset(kind for kind, _ in self.approximations)
        if self._is_exact:
            return approximated
        # A fused attention has a softmax of its own.
        fused = self.only - {"attention"} if "softmax" in approximated else self.only
        return fused | approximated

    @property
    def kernels(self) -> frozenset[str]:
        """The names of what a kernel replaces now."""
        return self.names - {kind for kind, _ in self.approximations}

    @property
    def does_nothing(self) -> bool:
        """Whether everything is to stay as it is, by order or by QUAKE_JAX_DISABLE."""
        return not self.names and not self.packs

    @property
    def packs(self) -> bool:
        """Whether weights are packed in each call."""
        return self.weights is not None and not switches.DISABLED

    @property
    def _is_exact(self) -> bool:
        return config.resolved_order(self.order, "softmax") == config.EXACT

    def approximation(self, kind: str) -> tuple[str, Callable] | None:
        """The name of the approximation of a kind, and its function, which ignores `order`."""
        name = dict(self.approximations).get(kind)
        return None if name is None else (name, _without_order(kind, name))


@functools.cache
def _without_order(kind: str, name: str) -> Callable:
    from quake_jax import approximations

    function = approximations.find(kind, name).function

    @functools.wraps(function)
    def without_order(*arrays, order, **keywords):
        return function(*arrays, **keywords)

    return without_order


def checked_options(
    order,
    only,
    function: str = "accelerate",
    *,
    softmax: str | None = None,
    gelu: str | None = None,
    weights: str | None = None,
    attention: str | None = None,
    params_argnums: int | Sequence[int] = 0,
) -> Options:
    """Return the Options that arguments mean; raise TypeError or ValueError for others."""
    check_format(function, "weights", weights, may_be_none=True)
    argnums = _checked_argnums(function, params_argnums)
    return Options(
        config.checked_order(order),
        _checked_names(only, function),
        _checked_approximations(function, softmax, gelu),
        weights,
        checked_compute_dtype(function, "attention", attention),
        () if weights is None else argnums,
    )


def check_format(function: str, argument: str, dtype, *, may_be_none: bool) -> None:
    """Raise ValueError if `dtype` is none that weights are packed in."""
    if dtype is None and may_be_none:
        return
    if not isinstance(dtype, str) or dtype not in CODES:
        allowed = ", ".join(map(repr, (None, *CODES) if may_be_none else CODES))
        raise refusal(function, argument, f"one of {allowed}", repr(dtype))


def _checked_argnums(function: str, argnums) -> tuple[int, ...]:
    given = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    if not given or not all(isinstance(i, int) and not isinstance(i, bool) for i in given):
        expected = "the number of a positional argument, or a tuple of them"
        raise refusal(function, "params_argnums", expected, repr(argnums), TypeError)
    return tuple(given)


def _checked_names(only, function: str) -> frozenset[str]:
    if only is None:
        return DEFAULT_NAMES
    allowed = sorted(DEFAULT_NAMES | BARE_NAMES)
    wanted = (
        f'None, "{ALL}", or a set of names, as in only={{"softmax", "gelu"}}; the names are '
        f"{', '.join(allowed)}"
    )
    if isinstance(only, str):
        if only == ALL:
            return DEFAULT_NAMES | BARE_NAMES
        only = (only,)
    names = list(only) if isinstance(only, Iterable) else [only]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"quake_jax.{function}: only must be {wanted}; got {only!r}")
    unknown = sorted(set(names) - set(allowed))
    if unknown:
        raise ValueError(f"quake_jax.{function}: only must be {wanted}; got {', '.join(unknown)}")
    return frozenset(names)


def _checked_approximations(function: str, softmax, gelu) -> tuple[tuple[str, str], ...]:
    chosen = {"gelu": gelu, "softmax": softmax}
    for kind, name in chosen.items():
        if name is None:
            continue
        from quake_jax import approximations

        names = [a.name for a in approximations.registry(kind)]
        if name not in names:
            error = ValueError if isinstance(name, str) else TypeError
            raise error(
                f"quake_jax.{function}: {kind} must be None or the name of an approximation in "
                f"quake_jax.approximations ({', '.join(names)}); got {name!r}"
            )
    return tuple((kind, name) for kind, name in sorted(chosen.items()) if name is not None)
