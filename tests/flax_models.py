"""What the tests of the Flax side share."""

import contextlib
import types
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


def rounding(einsum, equation, *operands, **keywords):
    """A product of rounded operands, as a quantised one."""
    return einsum(equation, *(jnp.round(256 * x) / 256 for x in operands), **keywords)


def passing(einsum, *args, **keywords):
    return einsum(*args, **keywords)


_EINSUM = types.FunctionType(jnp.einsum.__code__, jnp.einsum.__globals__, "einsum")
_EINSUM.__defaults__, _EINSUM.__kwdefaults__ = jnp.einsum.__defaults__, jnp.einsum.__kwdefaults__


@contextlib.contextmanager
def changed_einsum(change, how: str):
    """`jnp.einsum` becomes `change`: as an attribute, or, as qwix does, by its code."""
    global _change
    _change = change
    owner, name = (jnp, "einsum") if how == "attribute" else (jnp.einsum, "__code__")
    before = getattr(owner, name)
    setattr(owner, name, _changed if how == "attribute" else _changed.__code__)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _changed(*args, **keywords):
    import flax_models

    return flax_models._change(flax_models._EINSUM, *args, **keywords)
