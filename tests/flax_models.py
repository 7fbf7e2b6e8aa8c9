"""What the tests of the Flax side share."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

# Primitives that the kernels replace.
EXPONENTIALS = {"exp", "exp2", "tanh", "logistic", "erf", "erfc"}


def primitives(function, *args) -> dict[str, int]:
    """How often each primitive is in a program, at any depth."""
    return dict(Counter(eqn.primitive.name for eqn in equations(function, *args)))


def equations(function, *args) -> list:
    """The equations of a program, at any depth."""
    found = []

    def collect(jaxpr):
        for eqn in jaxpr.eqns:
            found.append(eqn)
            for value in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    collect(inner)

    collect(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="rbg")  # compiles faster than the default


def variables_of(init, *args):
    """Variables of the shapes that `init` makes, with other values: faster than compiling it."""
    return values_of(jax.eval_shape(init, *args))


def values_of(shapes):
    """Variables of these shapes, so large that a wrong function shows in the outputs."""
    rng = np.random.default_rng(1)

    def filled(path, shape):
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.zeros(shape.shape, shape.dtype)
        low = 0.1 if "var" in str(path[-1]) else -0.3  # a variance is positive
        return jnp.asarray(rng.uniform(low, 0.3, shape.shape), shape.dtype)

    return jax.tree_util.tree_map_with_path(filled, shapes)


def exponentials(counts: dict[str, int]) -> set[str]:
    return EXPONENTIALS & counts.keys()


def assert_close(actual, expected, tolerance: float) -> None:
    """Compare pytrees: structure, types of leaves, dtypes, weak types and values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if isinstance(e, jax.Array):
            assert isinstance(a, jax.Array) and a.aval == e.aval
            np.testing.assert_allclose(
                np.asarray(a, np.float64), np.asarray(e, np.float64), tolerance, tolerance
            )
        else:
            assert type(a) is type(e) and np.all(a == e)


def assert_identical(actual, expected) -> None:
    assert_close(actual, expected, 0.0)
