"""`quake_jax.nnx.substitute` on models of Flax NNX."""

import functools
import inspect
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import changed_einsum, exponentials, primitives, rounding
from support import run_python

import quake_jax
import quake_jax.nnx
from quake_jax._core.constants import MAX_REL_ERROR

silu = jax.nn.silu
nnx = pytest.importorskip("flax.nnx")

WIDTH, HEADS, LENGTH = 16, 2, 6


class Block(nnx.Module):
    """A ViT's encoder block, its activation in an attribute."""

    def __init__(self, *, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.activation = functools.partial(nnx.gelu, approximate=False)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class ViT(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(2)])
        self.head = nnx.Sequential(nnx.Linear(WIDTH, 8, rngs=rngs), jnp.tanh, nnx.relu)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-2))


def vit(order=None, **keywords):
    model = ViT(rngs=nnx.Rngs(0))
    if order is not None:
        assert quake_jax.nnx.substitute(model, order, **keywords).replaced
    return model


def images(length=LENGTH):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, length, WIDTH)), jnp.float32)


def test_a_vit_runs_on_the_kernels():
    x, exact, fast = images(), vit(), vit(order=5)
    counts = primitives(fast, x)
    assert counts["quake_dot_product_attention"] == counts["quake_gelu_erf"] == 2
    assert counts["quake_tanh"] == 1
    assert not exponentials(counts)
    expected = exact(x)
    for actual in (fast(x), nnx.jit(lambda model, x: model(x))(fast, x)):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


class FunctionalBlock(Block):
    """The same block, written with functions that `substitute` cannot see."""

    def __call__(self, x):
        y = self.norm1(x)
        q, k, v = (f(y) for f in (self.attention.query, self.attention.key, self.attention.value))
        x = x + self.attention.out(nnx.dot_product_attention(q, k, v))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class CallingByName(nnx.Module):
    def __init__(self):
        self.held = [functools.partial(nnx.gelu, approximate=False), nnx.relu]
        self.inner = nnx.List([Holder()])

    def __call__(self, x):
        return self.helper(jax.nn.gelu(self.held[0](x)) + jax.nn.gelu(x))

    @nnx.jit
    def helper(self, x):
        return jax.vmap(lambda y: jnp.tanh(y) + silu(y))(x)


def test_the_report_names_what_is_called_by_name():
    report = quake_jax.nnx.substitute(CallingByName())
    assert ("gelu", "gelu", "held") in {(r.name, r.replacement, r.where) for r in report.replaced}
    assert any(r.where.startswith("inner.0.") for r in report.replaced)
    left = {r.name: r for r in report.left}
    assert {name: r.count for name, r in left.items()} == {"gelu": 2, "tanh": 1, "silu": 1}
    line = inspect.getsourcelines(CallingByName.__call__)[1] + 1
    assert left["gelu"].where == f"{__file__}:{line} (__call__)"
    assert "quake_jax.accelerate" in left["gelu"].reason
    report = quake_jax.nnx.substitute(CallingByName(), only="tanh")
    assert [r.name for r in report.left] == ["tanh"]
    assert not quake_jax.nnx.substitute(CallingByName(), "exact").left


def test_accelerate_reaches_functional_calls():
    x, model = images(16), vit()  # accelerate leaves what is too small to gain
    expected = model(x)
    model.blocks = nnx.List([FunctionalBlock(rngs=nnx.Rngs(0)) for _ in range(2)])
    nnx.update(model, nnx.state(vit()))
    graph, state = nnx.split(model)

    def call(state, x):
        return nnx.merge(graph, state)(x)

    fast = quake_jax.accelerate(call, order=5)
    counts = primitives(fast, state, x)
    assert counts["quake_dot_product_attention"] == counts["quake_bias_gelu_erf"] == 2
    np.testing.assert_allclose(jax.jit(fast)(state, x), expected, rtol=1e-4, atol=1e-5)


def test_products_that_another_library_has_changed_stay_so():
    model, x = vit(order=5), images()
    with changed_einsum(rounding, "code"):
        counts = primitives(model, x)
    assert counts["round"] == primitives(vit(), x).get("round", 0) + 2 * 4
    assert counts["quake_softmax"] == 2 and "quake_dot_product_attention" not in counts


class Changing(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm, self.drop = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(jax.nn.gelu(self.norm(x)))


def call(model, x):
    return model(x)


@pytest.mark.parametrize(
    "how",
    (
        lambda: nnx.jit(quake_jax.accelerate(call)),
        lambda: quake_jax.accelerate(nnx.jit(call)),
        lambda: quake_jax.accelerate(lambda models, x: call(models["one"], x)),
        lambda: quake_jax.accelerate(nnx.remat(call)),
    ),
    ids=("nnx.jit outside", "nnx.jit inside", "in a dict", "remat"),
)
def test_a_warning_where_changes_of_a_model_are_lost(how, request):
    x, model, function = images(), Changing(), how()
    argument = {"one": model} if "dict" in request.node.name else model
    with jax.enable_checks(), pytest.warns(UserWarning, match=r"changes NNX.*norm\.mean.*lost"):
        function(argument, x)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(function(argument, x), model(x), 1e-3, 1e-3)


def test_no_warning_where_the_state_is_returned():
    definition, state = nnx.split(Changing())
    before = state

    @quake_jax.accelerate
    def step(state, x):
        model = nnx.merge(definition, state)
        return model(x), nnx.state(model)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, state = step(state, images())
    assert not np.array_equal(state["norm"]["mean"][...], before["norm"]["mean"][...])


def test_gradients_under_nnx_transforms():
    x = images()

    @nnx.jit
    def gradient(model):
        return nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)

    actual, expected = gradient(vit(order=5)), gradient(vit())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), actual, expected
    )


def test_the_model_stays_a_model():
    """It can be split, merged and cloned, and equal models share a compiled program."""
    model, other = (nnx.Sequential(nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(0)), nnx.gelu) for _ in "ab")
    x, traces = images(), []
    quake_jax.nnx.substitute(model, 3)

    @nnx.jit
    def call(model, x):
        traces.append(None)
        return model(x)

    y = call(model, x)
    for same in (nnx.merge(*nnx.split(model)), nnx.clone(model)):
        np.testing.assert_array_equal(call(same, x), y)
    exact = call(other, x)
    assert len(traces) == 2 and np.any(exact != y)
    quake_jax.nnx.substitute(other, 3)
    np.testing.assert_array_equal(call(other, x), y)
    assert len(traces) == 2
    quake_jax.nnx.substitute(other, 1)
    assert np.any(call(other, x) != y)


def test_what_is_put_in_can_be_pickled():
    holder = Holder()
    quake_jax.nnx.substitute(holder, 3)
    copied = pickle.loads(pickle.dumps(holder.partial))
    assert copied.func is quake_jax.softmax and copied.original.func is nnx.softmax
    np.testing.assert_array_equal(copied(images()), holder.partial(images()))


class Holder(nnx.Module):
    """Functions in all the ways that a module may hold them."""

    def __init__(self):
        self.plain = nnx.silu
        self.partial = functools.partial(nnx.softmax, axis=0)
        self.tuple = (nnx.sigmoid, nnx.relu)
        self.list = nnx.List([nnx.softplus, abs])
        self.dict = nnx.Dict(a=nnx.elu)
        self.own = functools.partial(quake_jax.gelu, order=1)
        self.other = functools.partial(abs)

    def functions(self):
        return [
            self.plain,
            self.partial,
            *self.tuple,
            *self.list,
            self.dict["a"],
            self.own,
            self.other,
        ]


QUAKE = ["silu", "softmax", "sigmoid", None, "softplus", None, "elu", None, None]


def test_where_functions_are_found():
    holder = Holder()
    originals = holder.functions()
    quake_jax.nnx.substitute(holder)
    x = images()
    for name, function, original in zip(QUAKE, holder.functions(), originals, strict=True):
        if name is None:
            assert function is original
        else:
            assert function.func is getattr(quake_jax, name)
            np.testing.assert_allclose(function(x), original(x), rtol=1e-3, atol=1e-6)
    assert type(holder.tuple) is tuple
    assert type(holder.list) is nnx.List and type(holder.dict) is nnx.Dict


def test_recurrent_cells():
    x, carry = jnp.ones((2, 3)), (jnp.ones((2, 4)), jnp.ones((2, 4)))
    cells = [nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)) for _ in range(2)]
    quake_jax.nnx.substitute(cells[0], order=5)
    counts = primitives(lambda x: cells[0](carry, x), x)
    assert counts["quake_sigmoid"] == 3 and counts["quake_tanh"] == 2
    assert not exponentials(counts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        cells[0](carry, x),
        cells[1](carry, x),
    )


def test_order_can_be_changed_and_taken_back():
    x, holder = images(), Holder()
    originals = holder.functions()
    for order in (1, 5):
        quake_jax.nnx.substitute(holder, order)
        np.testing.assert_array_equal(holder.plain(x), quake_jax.silu(x, order=order))
    quake_jax.nnx.substitute(holder)
    with quake_jax.default_order(2):
        np.testing.assert_array_equal(holder.plain(x), quake_jax.silu(x, order=2))
    quake_jax.nnx.substitute(holder, "exact")
    assert all(a is b for a, b in zip(holder.functions(), originals, strict=True))
    quake_jax.nnx.substitute(holder, "exact")  # nothing to take back
    assert all(a is b for a, b in zip(holder.functions(), originals, strict=True))


def test_only():
    model, x = vit(order=3, only={"attention"}), images()
    counts = primitives(model, x)
    assert counts["quake_dot_product_attention"] == 2 and counts["erfc"] == 2
    quake_jax.nnx.substitute(model, 5, only={"gelu"})
    assert model.blocks[0].attention.attention_fn.keywords == {"order": 3}
    assert model.blocks[0].activation.keywords == {"approximate": False, "order": 5}
    quake_jax.nnx.substitute(model, "exact", only=["gelu"])
    assert primitives(model, x) == counts


def test_an_approximate_model_is_within_the_bound_of_its_order():
    # One function, whose bound carries over as it is.
    model = nnx.Sequential(nnx.sigmoid)
    expected = model(images())
    for order in (1, 2, 3):
        quake_jax.nnx.substitute(model, order)
        error = np.max(np.abs(model(images()) / expected - 1))
        assert MAX_REL_ERROR["sigmoid"][order] >= error > 0


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ((nnx.gelu,), TypeError, r"model must be a flax.nnx.Module, as in substitute\(model"),
        ((None,), TypeError, "got NoneType"),
        ((nnx.Sequential(), 7), ValueError, "order must be"),
        ((nnx.Sequential(), None, {"gleu"}), ValueError, "gleu"),
    ),
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        quake_jax.nnx.substitute(*arguments)


def test_without_flax(tmp_path):
    code = """
import sys
sys.modules["flax"] = None  # as if it were not installed
import quake_jax.linen, quake_jax.nnx
linen = quake_jax.linen
calls = (
    lambda: quake_jax.nnx.substitute(None),
    lambda: quake_jax.nnx.attention_fn(1, 2, 3),
    linen.interceptor,
    linen.substitute,
    lambda: linen.attention_fn(1, 2, 3),
    lambda: linen.MlpBlock,
)
for call in calls:
    try:
        call()
    except ImportError as error:
        print("pip install 'quake_jax[flax]'" in str(error))
"""
    assert run_python(code, tmp_path).stdout == "True\n" * 6
