"""Who is compared: for each kind the exact function, QuAKE's orders, and the published ones.

Importing this module imports JAX: `environment.prepare` comes first.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.errors import BenchmarkError
from benchmarks.ops.operators import OPERATORS

LAYERNORM_EPSILON = 1e-6


def layer_norm(x: jax.Array) -> jax.Array:
    """Layer normalisation of the last axis, without scale and bias."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + LAYERNORM_EPSILON)


# Of each kind the operator; layer normalisation has no kernels.
OPERATOR_OF = {"softmax": "softmax", "gelu": "gelu_erf", "exp": "exp", "sigmoid": "sigmoid"}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of those compared."""

    kind: str  # of `quake_jax.approximations`
    name: str  # of the row: "exact", "QuAKE 1" to "QuAKE 5", or the registered name
    function: Callable[[jax.Array], jax.Array]  # of float32, over the last axis if there is one
    order: int | None = None  # QuAKE's
    entry: Any = None  # the `quake_jax.approximations.Approximation`

    @property
    def is_exact(self) -> bool:
        return self.order is None and self.entry is None

    def description(self) -> dict:
        """What a result says of it.

        `runs_as` is "XLA" (jax.numpy as it stands), "kernel" (ours), or "emulation" (a method for
        integers or tables, whose time here says nothing about the method).
        """
        described = {"name": self.name, "order": self.order, "derived": False}
        if self.entry is None:
            return described | {"runs_as": "XLA" if self.is_exact else "kernel"}
        return described | {
            "runs_as": "emulation" if self.entry.emulated else "XLA",
            "derived": self.entry.derived,
            "paper": self.entry.paper,
            "year": self.entry.year,
        }


def choose(
    kinds: Sequence[str], orders: Sequence[int], names: Sequence[str] | None
) -> dict[str, list[Candidate]]:
    """By kind the exact function, then QuAKE at the orders, then the registered approximations:
    all, or those of the names. Raise BenchmarkError for a name that is registered in none of the
    kinds.
    """
    from quake_jax import approximations

    entries = {kind: approximations.registry(kind) for kind in kinds}
    known = list(dict.fromkeys(entry.name for of_kind in entries.values() for entry in of_kind))
    for name in names or ():
        if name not in known:
            raise BenchmarkError(f"argument --name: {name!r} is none of {', '.join(known)}")
    chosen = {}
    for kind, of_kind in entries.items():
        chosen[kind] = [Candidate(kind, "exact", exact(kind))]
        if kind in OPERATOR_OF:
            of_order = OPERATORS[OPERATOR_OF[kind]].of_quake_jax
            chosen[kind] += [Candidate(kind, f"QuAKE {n}", of_order(n), order=n) for n in orders]
        for entry in of_kind:
            options = {"epsilon": LAYERNORM_EPSILON} if kind == "layernorm" else {}
            if names is None or entry.name in names:
                function = partial(entry.function, **options)
                chosen[kind].append(Candidate(kind, entry.name, function, entry=entry))
    return chosen


def exact(kind: str) -> Callable[[jax.Array], jax.Array]:
    """The exact function in jax.numpy; GELU is the one with erf."""
    return layer_norm if kind == "layernorm" else OPERATORS[OPERATOR_OF[kind]].jax_nn
