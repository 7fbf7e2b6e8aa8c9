"""Other people's models on the kernels: results, gradients, and the kernels that they get.

Not among the tests that run by default: `pytest -m models tests/models`. kernels.json has what is
found in each model; `pytest -m models tests/models -k kernels --record` writes it anew.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import EXPONENTIALS, equations

import quake_jax
import quake_jax.linen
from models.cases import CASES

pytestmark = pytest.mark.models
# Compiles several times faster; the kernels are the same.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
made = functools.cache(lambda name: CASES[name].make())


def accelerated(fun):
    return quake_jax.accelerate(fun, order=5)


def substituted(fun):
    """`fun` with Linen's modules intercepted: another function, so that no cache knows it."""

    def intercepted(*arguments):
        with quake_jax.linen.substitute(5):
            return fun(*arguments)

    return intercepted


WAYS = {"accelerate": accelerated, "substitute": substituted, None: lambda fun: fun}
RUNS = [
    (name, way)
    for name, case in CASES.items()
    for way in ("accelerate", "substitute")[: 1 + case.is_linen]
]
parametrize_runs = pytest.mark.parametrize("name, way", RUNS, ids=map(" by ".join, RUNS))


@functools.cache
def outputs(name: str, way: str | None = None):
    fun, *arguments = made(name)
    return jit(WAYS[way](fun))(*arguments)


@functools.cache
def gradient(name: str, way: str | None = None):
    fun, parameters, *inputs = made(name)
    fun = WAYS[way](fun)

    def loss(parameters):
        outputs = jax.tree.leaves(fun(parameters, *inputs))
        # Other weights for each output: the mean of a normalised output, say, is constant.
        weights = (jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(outputs))
        return sum(jnp.vdot(x, w) for x, w in zip(outputs, weights, strict=True))

    return jit(jax.grad(loss, allow_int=True))(parameters)


def assert_near(actual, expected, tolerance: float) -> None:
    """Assert that arrays differ by at most `tolerance` of the largest entry of each.

    A gradient that is zero but for rounding, such as that of a key's bias, is measured by a
    hundredth of the largest of all.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = [x for x in jax.tree.leaves(expected) if x.dtype != jax.dtypes.float0]
    largest = [float(jnp.max(jnp.abs(x))) for x in leaves]
    assert max(largest) > 0
    for a, e, scale in zip(
        (x for x in jax.tree.leaves(actual) if x.dtype != jax.dtypes.float0),
        leaves,
        largest,
        strict=True,
    ):
        np.testing.assert_allclose(a, e, 0, tolerance * max(scale, max(largest) / 100))


@parametrize_runs
def test_outputs(name, way):
    assert_near(outputs(name, way), outputs(name), CASES[name].tolerance)


@parametrize_runs
def test_gradients(name, way):
    assert_near(gradient(name, way), gradient(name), CASES[name].tolerance)


def kernels_in(fun, *arguments) -> dict[str, int]:
    """How often each kernel is in a program.

    And what is left: exponentials, and products of 8 bits, which must survive.
    """
    counts = Counter()
    for eqn in equations(fun, *arguments):
        if eqn.primitive.name.startswith("quake_"):
            counts[eqn.primitive.name.removeprefix("quake_")] += 1
        elif eqn.primitive.name == "dot_general" and eqn.invars[0].aval.dtype == jnp.int8:
            counts["left: int8 dot_general"] += 1
        elif eqn.primitive.name in EXPONENTIALS:
            counts[f"left: {eqn.primitive.name}"] += 1
    return dict(sorted(counts.items()))


@parametrize_runs
def test_kernels(name, way, recorded):
    """What was found once stays found, and `explain` counts the same."""
    fun, *arguments = made(name)
    kernels = kernels_in(WAYS[way](fun), *arguments)
    recorded(f"{name} by {way}", kernels)
    if way == "accelerate":
        report = quake_jax.explain(fun, *arguments)
        replaced = sum(n for kernel, n in kernels.items() if not kernel.startswith("left"))
        assert sum(record.count for record in report.replaced) == replaced, report
