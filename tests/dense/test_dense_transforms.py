"""Dense layers under JAX's transformations: derivatives, vmap, control flow, several devices."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import depth, normal, pack

import quake_jax
from quake_jax._dense import reference

K, N = 64, 24
# One of each way to the product.
SOME = ("float32", "bfloat16", "int8", "int8_groups", "int4_weight_only")
formats = pytest.mark.parametrize("format", SOME)


@functools.cache
def weight(format: str, seed: int = 1):
    return pack(normal((K, N), seed) / 8, format)


def operands() -> dict:
    return {
        "x": normal((5, K)),
        "bias": normal(N, 2),
        "gate_bias": normal(N, 3),
        "residual": normal((5, N), 4),
        "scale": 1 + normal(K, 5) / 4,
        "offset": normal(K, 6),
    }


def layer(operands: dict, weight, gate, *, activation="silu", order=5):
    """All that has derivatives."""
    rest = dict(operands)
    norm = quake_jax.LayerNorm(rest.pop("scale"), rest.pop("offset"), 1e-3)
    if gate is None:
        del rest["gate_bias"]
    return quake_jax.dense(
        weight=weight, gate=gate, norm=norm, activation=activation, order=order, **rest
    )


def plain(operands: dict, weight, gate, *, activation=jax.nn.silu):
    """The same by jax.numpy, of unpacked weights."""
    x = reference.normalized(operands["x"], "layer", operands["scale"], operands["offset"], 1e-3)
    y = x @ weight.unpack() + operands["bias"]
    if gate is None:
        y = activation(y)
    else:
        y = activation(x @ gate.unpack() + operands["gate_bias"]) * y
    return y + operands["residual"]


def assert_trees_close(actual, expected, rtol=1e-4):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * float(jnp.abs(e).max()))


# Derivatives.


@formats
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
def test_derivatives_are_those_of_the_unpacked_product(format, gated):
    """In everything that has one, in both modes. What is rounded in between is not seen."""
    w, gate, x = weight(format), weight(format, 7) if gated else None, operands()
    weights = (w, gate)
    loss = [lambda x, f=f: jnp.sum(jnp.sin(jnp.arange(N)) * f(x, *weights)) for f in (layer, plain)]
    assert_trees_close(*(jax.jit(jax.grad(f))(x) for f in loss))
    directions = jax.tree.map(jnp.cos, x)
    tangents = [
        jax.jvp(lambda x, f=f: f(x, *weights), (x,), (directions,))[1] for f in (layer, plain)
    ]
    assert_trees_close(*tangents)


@pytest.mark.parametrize("wrt", list(operands()))
def test_derivatives_in_one_operand(wrt):
    w, gate, x = weight("int8"), weight("int8", 7), operands()

    def loss(f, value):
        return jnp.sum(f(x | {wrt: value}, w, gate))

    actual, expected = (jax.grad(functools.partial(loss, f))(x[wrt]) for f in (layer, plain))
    assert_trees_close(actual, expected)


@pytest.mark.parametrize("activation", ["gelu_erf", None])
@pytest.mark.parametrize("order", [2, "exact"])
def test_derivatives_at_other_orders(activation, order):
    x, w = operands(), weight("int4_weight_only")
    f = functools.partial(layer, weight=w, gate=None, activation=activation, order=order)
    exact = {"gelu_erf": lambda y: jax.nn.gelu(y, approximate=False), None: lambda y: y}[activation]
    g = functools.partial(plain, weight=w, gate=None, activation=exact)
    gradients = [jax.grad(lambda x, f=f: jnp.sum(f(x) ** 2))(x) for f in (f, g)]
    assert_trees_close(*gradients, rtol=2e-2 if order == 2 else 1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_derivatives_of_16_bits(dtype):
    x, w = normal((5, K), dtype=dtype), weight("int8")
    gradient = jax.grad(lambda x: jnp.sum(quake_jax.dense(x, w).astype(jnp.float32)))(x)
    assert gradient.dtype == dtype
    expected = jnp.broadcast_to(w.unpack().sum(1), x.shape)
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)


def test_derivatives_of_several_weights():
    x, weights = normal((5, K)), [weight("int8"), weight("int8", 7)]

    def loss(x, biases):
        y, z = quake_jax.dense(x, weights, biases)
        return jnp.sum(y * jnp.sin(z))

    def expected(x, biases):
        y, z = (x @ w.unpack() + b for w, b in zip(weights, biases, strict=True))
        return jnp.sum(y * jnp.sin(z))

    arguments = (x, [normal(N, 8), normal(N, 9)])
    # The products themselves are those of quantised rows.
    assert_trees_close(*(jax.grad(f, (0, 1))(*arguments) for f in (loss, expected)), rtol=0.05)


def test_second_derivatives():
    w, x = weight("float32"), normal((2, K)) / 4

    def loss(f, x):
        return jnp.sum(f(x) ** 2)

    ours = functools.partial(quake_jax.dense, weight=w, activation="gelu", order=5)
    exact = lambda x: jax.nn.gelu(x @ w.unpack())  # noqa: E731
    actual, expected = (jax.hessian(functools.partial(loss, f))(x) for f in (ours, exact))
    assert_trees_close(actual, expected, rtol=1e-3)


def test_control_flow():
    """grad through jit, scan over stacked layers, remat and cond."""
    stacked = pack(normal((3, K, K), 1) / 8, "int8")

    def block(x, w):
        return jax.lax.cond(
            x.sum() > -1e9, lambda x: x + quake_jax.dense(x, w, activation="silu"), jnp.sin, x
        )

    def of_scan(x, checkpoint):
        f = jax.checkpoint(block) if checkpoint else block
        return jnp.sum(jax.lax.scan(lambda x, w: (f(x, w), None), x, stacked)[0] ** 2)

    def in_python(x):
        for i in range(3):
            x = block(x, stacked[i])
        return jnp.sum(x**2)

    x = normal((4, K))
    expected = jax.grad(in_python)(x)
    for checkpoint in (False, True):
        assert_trees_close(jax.jit(jax.grad(of_scan), static_argnums=1)(x, checkpoint), expected)


@pytest.mark.parametrize("format", ["float32", "int8", "int4_weight_only"])
def test_packed_weights_are_constants(format):
    x, w = normal((5, K)), weight(format)
    floats, tree = jax.tree.flatten(w)
    at = next(i for i, leaf in enumerate(floats) if leaf.dtype in (jnp.float32, jnp.float16))

    def loss(leaf):
        leaves = [leaf if i == at else x for i, x in enumerate(floats)]
        return jnp.sum(quake_jax.dense(x, jax.tree.unflatten(tree, leaves)))

    for f in (loss, jax.jit(loss)):
        with pytest.raises(TypeError, match="packed weight is a constant"):
            jax.grad(f)(floats[at])
    # In a tree of parameters too, whose other leaves have derivatives.
    if format == "float32":
        with pytest.raises(TypeError, match="packed weight is a constant"):
            jax.grad(lambda p: jnp.sum(quake_jax.dense(x, p["w"], p["b"])))(
                {"w": w, "b": jnp.ones(N)}
            )


def test_a_gradient_keeps_the_packed_weight():
    """And not the float32 array that it stands for."""
    w = weight("int4_weight_only")
    _, pullback = jax.vjp(lambda x: quake_jax.dense(x, w, activation="silu"), normal((5, K)))
    assert all(leaf.shape != (K, N) for leaf in jax.tree.leaves(pullback))


# vmap.


@formats
def test_vmap_of_rows(format):
    w, x, residual = weight(format), normal((3, 4, 5, K)), normal((3, 4, 5, N), 1)
    expected = quake_jax.dense(x, w, residual=residual)

    def f(x, residual):
        return quake_jax.dense(x, w, residual=residual)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(jax.vmap(f)(x, residual), expected)
    close(jax.vmap(jax.vmap(f), (1, 1), 1)(x, residual), expected)
    close(jax.vmap(f, (-1, None), -1)(jnp.moveaxis(x, 0, -1), residual[0])[..., 0], expected[0])
    close(jax.vmap(f, (None, 0))(x[0], residual)[0], expected[0])
    # One call for all rows: the weight is read once.
    assert str(jax.make_jaxpr(jax.vmap(f))(x, residual)).count("quake_dense") == 1


@formats
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
def test_vmap_of_weights(format, gated):
    """Experts, each with its rows; and stacks of stacks."""
    k = depth(format, K)
    packed, gates = (pack(normal((2, 3, k, N), seed) / 8, format) for seed in (1, 2))
    x, bias = normal((2, 3, 5, k)), normal((2, 3, N), 3)
    norm = quake_jax.RMSNorm(1 + normal((2, 3, k), 4) / 4, 1e-3)

    def f(x, w, bias, gate, norm):
        gate = gate if gated else None
        return quake_jax.dense(x, w, bias, gate=gate, activation="silu", norm=norm)

    arguments = (x, packed, bias, gates, norm)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], arguments)
        expected = jnp.stack([f(*jax.tree.map(lambda leaf, j=j: leaf[j], one)) for j in range(3)])
        actual = jax.jit(jax.vmap(f))(*one)
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)
    nested = jax.jit(jax.vmap(jax.vmap(f)))(*arguments)
    np.testing.assert_allclose(nested[1], expected, rtol=2e-4, atol=2e-4)
    # Rows that are shared, and a bias alone.
    shared = jax.vmap(f, (None, 0, 0, 0, None))(x[0, 0], *one[1:4], quake_jax.RMSNorm())
    assert shared.shape == (3, 5, N)
    biased = jax.vmap(lambda b: quake_jax.dense(x[0, 0], packed[0, 0], b))(bias[0])
    expected = quake_jax.dense(x[0, 0], packed[0, 0]) + bias[0][:, None]
    np.testing.assert_allclose(biased, expected, rtol=1e-5, atol=1e-5)


def test_vmap_of_a_gradient():
    w, x = pack(normal((3, K, N)), "int8"), normal((3, 5, K), 1)
    gradients = jax.vmap(jax.grad(lambda x, w: jnp.sum(jnp.sin(quake_jax.dense(x, w)))))(x, w)
    one = jax.grad(lambda x, w: jnp.sum(jnp.sin(quake_jax.dense(x, w))))(x[2], w[2])
    np.testing.assert_allclose(gradients[2], one, rtol=1e-4, atol=1e-4)


# What a program shows.


def test_the_program_is_one_call():
    """With all that is fused, and its parameters in the text."""
    w = weight("int8")
    f = functools.partial(layer, weight=w, gate=weight("int8", 7), order=2)
    jaxpr = str(jax.make_jaxpr(f)(operands()))
    assert jaxpr.count("quake_dense[") == 1 and "order=2" in jaxpr
    assert re.findall(r"\b(dot_general|exp|logistic|rsqrt)\b", jaxpr) == []


def test_the_call_is_told_what_is_static():
    """Numbers as 32 bits, and the activation as text."""
    w = weight("int8")
    lowered = jax.jit(lambda x: quake_jax.dense(x, w, activation="silu", order=2)).lower(
        normal((5, K))
    )
    call = re.search(r"custom_call @quake_jax_dense.*", lowered.as_text())
    if call is None:  # the kernel is not what this platform has
        pytest.skip("no custom call")
    for attribute in ('activation = "silu"', "order = 2 : i32", "epsilon = 0.000000e+00 : f32"):
        assert attribute in call[0]
