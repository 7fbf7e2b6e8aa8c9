"""`quake_jax.linen.interceptor` and `substitute` on Linen models: what they replace, and that
nothing else about a model changes.
"""

import functools
import pickle
import threading
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import (
    assert_close,
    assert_identical,
    changed_einsum,
    exponentials,
    key,
    passing,
    primitives,
    rounding,
    variables_of,
)
from support import on_device

import quake_jax
import quake_jax.linen
from quake_jax._core import switches

nn = pytest.importorskip("flax.linen")

# Order 5 is within a few roundings of the exact functions; these models have up to three layers.
TOLERANCE = 2e-5
BATCH, LENGTH, WIDTH, HEADS = 2, 16, 32, 2  # large enough for the rewriter to replace activations


def inputs(*shape: int) -> jax.Array:
    shape = shape or (BATCH, LENGTH, WIDTH)
    return on_device(np.random.default_rng(0).normal(size=shape), "float32")


def intercepted(order=5, **keywords):
    return nn.intercept_methods(quake_jax.linen.interceptor(order, **keywords))


class Block(nn.Module):
    """Everything that has state or random numbers, and calls of functions."""

    dropout: float = 0.1

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=self.dropout)(
            nn.LayerNorm()(x), deterministic=not train
        )
        x = x + nn.Dropout(0.2)(y, deterministic=not train)
        y = nn.gelu(nn.Dense(2 * WIDTH)(x), approximate=False)
        self.sow("intermediates", "hidden", y)
        y = nn.BatchNorm(use_running_average=not train)(y)
        return x + nn.Dense(WIDTH)(y)


class ScanBlock(Block):
    @nn.compact
    def __call__(self, x, train):
        return super().__call__(x, train), None


AXES = {"params": 0, "batch_stats": 0, "intermediates": 0}
RNGS = {"params": True, "dropout": True}
LAYERS = {
    "plain": Block,
    "remat": nn.remat(Block, static_argnums=(2,)),
    "jit": nn.jit(Block, static_argnums=(2,)),
    "vmap": nn.vmap(Block, variable_axes=AXES, split_rngs=RNGS, axis_size=1, in_axes=(0, None)),
    "scan": nn.scan(ScanBlock, variable_axes=AXES, split_rngs=RNGS, length=2, in_axes=nn.broadcast),
}


class Model(nn.Module):
    """One or two blocks under a transformation, and state that is made in setup."""

    kind: str

    def setup(self):
        self.block = LAYERS[self.kind]()
        self.scale = self.param("scale", nn.initializers.normal(), (WIDTH,))
        self.noise = 0.0
        if self.has_rng("dropout"):
            self.noise = jax.random.uniform(self.make_rng("dropout"))

    def __call__(self, x, train=False):
        if self.kind == "vmap":
            y = self.block(x[None], train)[0]
        else:
            y = self.block(x, train)
            y = y[0] if self.kind == "scan" else y
        if self.has_rng("dropout"):
            y = y + jax.random.uniform(self.make_rng("dropout")) * self.noise
        return {"y": nn.tanh(y * (1 + self.scale)), "kind": self.kind, "n": (3, None)}


TRAINING = {"train": True, "rngs": {"dropout": key(3)}}
STATE = ["batch_stats", "intermediates"]
CALLS = {
    "inference": {},
    "training": {**TRAINING, "mutable": STATE},
    "captured": {"mutable": ["intermediates"], "capture_intermediates": True},
}


RNGS_OF_INIT = {"params": key(0), "dropout": key(1)}


@functools.cache
def model_and_variables(kind):
    model = Model(kind)
    return model, variables_of(lambda rngs, x: strip(model.init(rngs, x)), RNGS_OF_INIT, inputs())


def strip(variables):
    return {name: variables[name] for name in ("params", "batch_stats")}


@pytest.mark.parametrize(
    "kind, call",
    (
        *(("plain", call) for call in CALLS),
        *((kind, "training") for kind in LAYERS if kind != "plain"),
    ),
)
def test_models_under_transformations(kind, call):
    model, variables = model_and_variables(kind)
    keywords = CALLS[call]

    def apply(variables, x):
        result = model.apply(variables, x, **keywords)
        kinds.append(result[0].pop("kind") if "mutable" in keywords else result.pop("kind"))
        return result

    kinds = []
    expected = jax.jit(apply)(variables, inputs())
    # Without substitute(), so without a jit that has been called outside.
    with intercepted():
        actual = jax.jit(lambda *args: apply(*args))(variables, inputs())
        counts = primitives(lambda *args: apply(*args), variables, inputs())
    assert_close(actual, expected, TOLERANCE)
    assert set(kinds) == {kind}
    # Dropped weights are needed; then the softmax alone is replaced.
    attention = "softmax" if call == "training" else "dot_product_attention"
    assert counts[f"quake_{attention}"] == counts["quake_tanh"] == 1
    assert sum(n for name, n in counts.items() if "gelu" in name) == 1
    assert not exponentials(counts)


@pytest.mark.parametrize("kind", ("plain", "scan"))
def test_initialisation_is_the_same(kind):
    model, x = Model(kind), inputs()
    expected = jax.jit(model.init)(RNGS_OF_INIT, x)
    with quake_jax.linen.substitute(5):
        # What is sown is no initial value.
        assert_identical(strip(jax.jit(model.init)(RNGS_OF_INIT, x)), strip(expected))


def test_eager_calls():
    class Eager(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("intermediates", "x", x)
            x = nn.Dropout(0.5, deterministic=False)(nn.sigmoid(nn.Dense(WIDTH)(x)))
            calls = self.variable("counts", "calls", lambda: jnp.int32(0))
            calls.value += 1
            return x, "not an array"

    def run():
        rngs = {"params": key(0), "dropout": key(1)}
        variables = Eager().init(rngs, x)
        return variables, Eager().apply(
            {"params": variables["params"]}, x, mutable=True, rngs={"dropout": key(2)}
        )

    x = inputs()
    expected = run()
    with intercepted():
        assert_close(run(), expected, TOLERANCE)


# What is replaced.


class FunctionalGPT(nn.Module):
    """A block that calls functions only, its attention written with einsum."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((HEADS, WIDTH // HEADS))(x) for _ in range(3))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -1e9)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v).reshape(x.shape)
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(x)))
        gate, value = jnp.split(nn.Dense(4 * WIDTH)(x), 2, -1)
        return jax.nn.log_softmax(nn.Dense(WIDTH)(jax.nn.silu(gate) * value))


class FunctionalViT(nn.Module):
    """Patches, a class token and a block whose attention is jax.nn's, heads first."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (4, 4), (4, 4))(images).reshape(images.shape[0], -1, WIDTH)
        token = self.param("token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, WIDTH)), x], 1)
        qkv = nn.Dense(3 * WIDTH)(nn.LayerNorm()(x))
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
        x = x + nn.Dense(WIDTH)(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)), approximate=False)
        return nn.softmax(nn.Dense(1024)((x + nn.Dense(WIDTH)(y))[:, 0]))


def check(model, x, expected: dict[str, int], **keywords):
    """Apply a model with and without; `expected` are the kernels in its program."""
    variables = variables_of(model.init, key(0), x)
    with quake_jax.linen.substitute(5, **keywords):
        counts = primitives(model.apply, variables, x)
        actual = jax.jit(model.apply)(variables, x)
    assert_close(actual, jax.jit(model.apply)(variables, x), TOLERANCE)
    kernels = {name: n for name, n in counts.items() if name.startswith("quake_")}
    assert kernels == {f"quake_{name}": n for name, n in expected.items()}
    return exponentials(counts)


def test_functions_called_by_modules():
    kernels = {"dot_product_attention": 1, "bias_gelu_tanh": 1, "swiglu_split": 1, "log_softmax": 1}
    assert not check(FunctionalGPT(), inputs(), kernels)
    left = check(FunctionalGPT(), inputs(), {"dot_product_attention": 1}, only={"attention"})
    assert left == {"tanh", "logistic", "exp"}
    kernels = {"dot_product_attention": 1, "bias_gelu_erf": 1, "softmax": 1}
    assert not check(FunctionalViT(), inputs(BATCH, 16, 16, 3), kernels)


class Holder(nn.Module):
    activation: object

    @nn.compact
    def __call__(self, x):
        return self.activation(x)


@pytest.mark.parametrize(
    "activation, kernel",
    (
        (nn.gelu, "gelu_tanh"),
        (functools.partial(nn.gelu, approximate=False), "gelu_erf"),
        (lambda x: nn.sigmoid(x), "sigmoid"),
        (functools.partial(nn.softmax, axis=1), "softmax"),
    ),
)
def test_functions_held_in_fields(activation, kernel):
    assert not check(Holder(activation), inputs(), {kernel: 1})


@pytest.mark.parametrize("cell", (nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell))
def test_recurrent_cells(cell):
    model, x = nn.RNN(cell(64)), inputs(16, 3, 8)
    variables = variables_of(model.init, key(0), x)
    with quake_jax.linen.substitute(5):
        counts = primitives(model.apply, variables, x)
        actual = jax.jit(model.apply)(variables, x)
    assert_close(actual, jax.jit(model.apply)(variables, x), TOLERANCE)
    assert counts["quake_sigmoid"] >= 1 and counts["quake_tanh"] >= 1
    assert not exponentials(counts)


def test_attention_modules_keep_the_meaning_of_their_arguments():
    layer, x = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=0.3), inputs()
    variables = {"params": layer.init(key(0), x, deterministic=True)["params"]}
    mask = nn.make_causal_mask(x[..., 0])
    for kernel, keywords in (
        ("dot_product_attention", {"mask": mask, "deterministic": True}),
        ("softmax", {"deterministic": False, "rngs": {"dropout": key(1)}}),
        (
            "softmax",
            {"deterministic": True, "sow_weights": True, "mutable": ["intermediates"]},
        ),
    ):

        def apply(variables, x, keywords=keywords):
            return layer.apply(variables, x, **keywords)

        expected = jax.jit(apply)(variables, x)
        with quake_jax.linen.substitute(5):
            assert_close(jax.jit(apply)(variables, x), expected, TOLERANCE)
            assert primitives(apply, variables, x)[f"quake_{kernel}"] == 1


class Changed(nn.Module):
    """Attention in which another library has changed the products, as qwix does."""

    change: Callable

    @nn.compact
    def __call__(self, x):
        with changed_einsum(self.change, "code"):
            return nn.MultiHeadDotProductAttention(HEADS)(x)


@pytest.mark.parametrize("change", (rounding, passing))
def test_products_that_another_library_has_changed_stay_so(change):
    layer, x = Changed(change), inputs()
    variables = variables_of(layer.init, key(0), x)
    expected = primitives(layer.apply, variables, x)
    with quake_jax.linen.substitute(5):
        counts = primitives(layer.apply, variables, x)
    kernel = "softmax" if change is rounding else "dot_product_attention"
    assert counts[f"quake_{kernel}"] == 1
    assert counts.get("round") == expected.get("round") == (4 if change is rounding else None)


def test_decoding_with_a_cache():
    layer, x = nn.MultiHeadDotProductAttention(HEADS, decode=True), inputs()
    variables = variables_of(layer.init, key(0), x)
    parameters, caches = {"params": variables["params"]}, [variables["cache"]] * 2

    def step(cache, token):
        y, changed = layer.apply(parameters | {"cache": cache}, token, mutable=["cache"])
        return y, changed["cache"]

    plain, fast = jax.jit(step), jax.jit(lambda *args: step(*args))
    for t in range(3):
        token = x[:, t : t + 1]
        expected, caches[0] = plain(caches[0], token)
        with intercepted():
            actual, caches[1] = fast(caches[1], token)
        assert_close([actual, caches[1]], [expected, caches[0]], TOLERANCE)
    assert int(caches[1]["cache_index"]) == 3
    with intercepted():
        counts = primitives(lambda *args: step(*args), caches[1], x[:, :1])
    assert counts["quake_dot_product_attention"] == 1


def test_gradients_and_vmap():
    model, x = FunctionalGPT(), inputs()
    variables = variables_of(model.init, key(0), x)

    def gradient(variables, x):
        return jax.grad(lambda v: jnp.mean(model.apply(v, x) ** 2))(variables)

    expected = jax.jit(gradient)(variables, x)
    mapped = jax.vmap(model.apply, (None, 0))
    rows = jax.jit(mapped)(variables, x[:, None])
    with quake_jax.linen.substitute(5):
        assert_close(jax.jit(gradient)(variables, x), expected, 1e-4)
        assert_close(jax.jit(mapped)(variables, x[:, None]), rows, TOLERANCE)


def test_collectives_in_modules():
    model = nn.BatchNorm(use_running_average=False, axis_name="batch")
    x = inputs()
    variables = model.init(key(0), x[0])

    def apply(x):
        return jax.vmap(
            lambda x: model.apply(variables, x, mutable=["batch_stats"]), axis_name="batch"
        )(x)

    expected = jax.jit(apply)(x)
    with quake_jax.linen.substitute():
        assert_close(jax.jit(apply)(x), expected, 1e-6)


# The order.


def test_order():
    model, x = Holder(nn.sigmoid), inputs()

    def apply(*args, **keywords):
        with intercepted(*args, **keywords):
            return model.apply({}, x)

    for order in (1, 3, 5):
        assert_identical(apply(order), quake_jax.sigmoid(x, order=order))
    with quake_jax.default_order(2):
        assert_identical(apply(None), quake_jax.sigmoid(x, order=2))


@pytest.mark.parametrize("how", ("order", "default", "switch"))
def test_exact_is_the_model_itself(how, monkeypatch):
    model, variables = model_and_variables("plain")
    order, default = ("exact", None) if how == "order" else (None, None)
    if how == "default":
        default = "exact"
    if how == "switch":
        monkeypatch.setattr(switches, "DISABLED", True)
    expected = primitives(lambda v, x: model.apply(v, x)["y"], variables, inputs())
    with quake_jax.default_order(default), quake_jax.linen.substitute(order):
        counts = primitives(lambda v, x: model.apply(v, x)["y"], variables, inputs())
    assert counts == expected and not any("quake" in name for name in counts)


# Inside and outside.


def test_caches_of_jit_tell_inside_from_outside():
    model, x = Holder(nn.sigmoid), inputs()
    traces = []

    @jax.jit
    def apply(x):
        traces.append(None)
        return model.apply({}, x)

    exact = apply(x)
    for _ in range(2):
        with quake_jax.linen.substitute(1):
            assert_identical(apply(x), quake_jax.sigmoid(x, order=1))
        with quake_jax.linen.substitute(3):
            assert_identical(apply(x), quake_jax.sigmoid(x, order=3))
        assert_identical(apply(x), exact)
    assert len(traces) == 3


def test_a_function_jitted_inside_a_module_is_not_mistaken_for_one_called_alone():
    inner, x = Holder(nn.sigmoid), inputs()
    function = jax.jit(lambda x: inner.apply({}, x))
    with quake_jax.linen.substitute(1):
        for call in (lambda: Holder(function).apply({}, x), lambda: function(x)) * 2:
            assert_identical(call(), quake_jax.sigmoid(x, order=1))


def test_nn_jit_tells_inside_from_outside():
    # The interceptor alone does it here: what nn.jit compiles is called inside a module call.
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.jit(nn.MultiHeadDotProductAttention)(HEADS)(x)

    model, x = Outer(), inputs()
    variables = variables_of(model.init, key(0), x)
    for _ in range(2):
        assert "quake_dot_product_attention" not in primitives(model.apply, variables, x)
        with intercepted():
            assert "quake_dot_product_attention" in primitives(model.apply, variables, x)


def test_leaving_restores_everything_also_after_an_exception():
    def failing(*_):
        raise KeyError("no kernel")

    class Model(nn.Module):
        attention: nn.Module

        def __call__(self, x):
            return self.attention(x)

    attention = nn.MultiHeadDotProductAttention(HEADS, out_kernel_init=failing)
    model, holder, x = Model(attention), Holder(nn.sigmoid), inputs()
    exact = holder.apply({}, x)
    with pytest.raises(KeyError, match="no kernel"), quake_jax.linen.substitute(1):
        model.init(key(0), x)
    assert model.attention.attention_fn is attention.attention_fn is nn.dot_product_attention
    assert_identical(holder.apply({}, x), exact)
    with quake_jax.linen.substitute(1):  # not taken to be inside a call
        assert_identical(holder.apply({}, x), quake_jax.sigmoid(x, order=1))


def test_other_threads_are_untouched():
    model, x, results = Holder(nn.sigmoid), inputs(), []
    function = jax.jit(lambda x: model.apply({}, x))
    with quake_jax.linen.substitute(1):
        assert_identical(function(x), quake_jax.sigmoid(x, order=1))
        thread = threading.Thread(target=lambda: results.append(function(x)))
        thread.start()
        thread.join()
    assert_identical(results[0], jax.jit(nn.sigmoid)(x))


def test_interceptors_can_be_pickled_and_used_again():
    interceptor = quake_jax.linen.interceptor(1, only=["sigmoid"])
    model, x = Holder(nn.sigmoid), inputs()
    for same in (interceptor, pickle.loads(pickle.dumps(interceptor)), interceptor):
        assert same == interceptor and hash(same) == hash(interceptor)
        with nn.intercept_methods(same), nn.intercept_methods(same):
            assert_identical(model.apply({}, x), quake_jax.sigmoid(x, order=1))


# Beside other interceptors and Flax's own observers of calls.


def test_other_interceptors_run_once_for_each_call():
    model, variables = model_and_variables("plain")
    calls: list = []

    def recorder(name):
        def intercept(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            if context.method_name == "__call__":
                assert context.module.variables is not None
                calls.append((name, type(context.module).__name__))
            return y if name != "inner" else jax.tree.map(_doubled, y)

        return nn.intercept_methods(intercept)

    def _doubled(leaf):
        return 2 * leaf if isinstance(leaf, jax.Array) else leaf

    def apply():
        calls.clear()
        return model.apply(variables, inputs(), mutable=["intermediates"])

    with recorder("outer"), recorder("inner"):
        expected, expected_calls = apply(), list(calls)
    with recorder("outer"), intercepted(), recorder("inner"):
        assert_close(apply(), expected, 1e-3)
    assert calls == expected_calls


def test_the_inner_of_two_counts():
    model, x = Holder(nn.sigmoid), inputs()
    with intercepted(1), intercepted(3):
        assert_identical(model.apply({}, x), quake_jax.sigmoid(x, order=3))
    with intercepted(1), intercepted("exact"):
        assert_identical(model.apply({}, x), nn.sigmoid(x))


def test_tabulate():
    model, x = Holder(nn.Dense(3)), inputs()

    def table():
        return model.tabulate(key(0), x, compute_flops=True, console_kwargs={"width": 200})

    expected = table()
    with intercepted():
        assert table() == expected


# Other ways to call a module.


class Methods(nn.Module):
    def setup(self):
        self.encoder, self.decoder = nn.Dense(64), nn.Dense(8)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return nn.sigmoid(self.encoder(x))

    def decode(self, x):
        return self.decoder(x)

    def encoder_of(self):
        return self.encoder

    def shared(self, module, variable, x):
        return nn.sigmoid(module(x)) + variable.value


class Parent(nn.Module):
    """Hands a module and a variable of its own to a module."""

    @nn.compact
    def __call__(self, x):
        dense, variable = nn.Dense(64), self.variable("state", "a", jnp.ones, ())
        return Methods().shared(dense, variable, x)


def test_methods_bound_modules_and_functions():
    model, x = Methods(), inputs()
    variables = variables_of(model.init, key(0), x)
    bound = model.bind(variables)

    def both(module, x):
        return module.decode(module.encode(x))

    parent_variables = Parent().init(key(0), x)
    for call in (
        lambda: model.apply(variables, x, method="encode"),
        lambda: model.apply(variables, x, method=Methods.encode),
        lambda: bound.encode(x),
        lambda: nn.sigmoid(bound.encoder(x)),
        lambda: nn.apply(both, model)(variables, x),
        lambda: Parent().apply(parent_variables, x),
        lambda: bound(x) + bound(x),
    ):
        expected = call()
        with intercepted():
            assert_close(call(), expected, TOLERANCE)
        assert_identical(call(), expected)


def test_random_numbers_of_a_bound_module():
    class Noisy(nn.Module):
        def setup(self):
            self.noise = jax.random.uniform(self.make_rng("noise"))

        def __call__(self, x):
            return nn.sigmoid(x) + self.noise * jax.random.uniform(self.make_rng("noise"))

    def run():
        module = Noisy().bind({}, rngs={"noise": key(0)})
        return [module(inputs()) for _ in range(2)]

    expected = run()
    with intercepted():
        assert_close(run(), expected, TOLERANCE)


def test_a_module_and_a_variable_as_arguments():
    class Doubling(nn.Module):
        def __call__(self, module, variable, x):
            y = nn.sigmoid(module(x)) * variable.value
            variable.value = 2 * variable.value
            return y

    class Scope(nn.Module):
        def setup(self):
            self.dense, self.doubling = nn.Dense(64), Doubling()
            self.state = self.variable("state", "a", jnp.ones, ())

        def __call__(self, x):
            return self.doubling(self.dense, self.state, x)

    def run(module, x):
        # The call from outside is that of `doubling`, with what belongs to its parent.
        return module.doubling(module.dense, module.state, x), module.state.value

    x = inputs()
    variables = Scope().init(key(0), x)
    call = nn.apply(run, Scope(), mutable=["state"])
    expected = call(variables, x)
    with intercepted():
        assert_close(call(variables, x), expected, TOLERANCE)
    assert expected[0][1] == 4


def test_modules_without_variables():
    class Plain(nn.Module):
        def __call__(self, x):
            return nn.sigmoid(x)

    with intercepted(1):  # not bound
        assert_identical(Plain()(inputs()), quake_jax.sigmoid(inputs(), order=1))


def test_arguments_that_are_no_arrays():
    class Reader(nn.Module):
        @nn.compact
        def __call__(self, x, flag, table, scale, *, name):
            assert flag is True and type(table) is np.ndarray and type(scale) is float
            return nn.sigmoid(x) * table.sum() * scale, name, np.float32(2), flag

    x = inputs()
    args = (x, True, np.ones(2), 0.5)
    expected = Reader().apply({}, *args, name="a")
    with intercepted():
        assert_close(Reader().apply({}, *args, name="a"), expected, TOLERANCE)


# Models that cannot be traced.


class Reading(nn.Module):
    """Asks for the value of an array."""

    activation: object

    @nn.compact
    def __call__(self, x):
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        x = self.activation(x + noise) if x.sum() > -1e9 else x
        return x + self.param("a", nn.initializers.normal(), (1,))


def test_a_model_that_cannot_be_traced_runs_with_its_fields_replaced():
    x, rngs = inputs(), {"params": key(0), "noise": key(1)}
    expected = [Reading(nn.sigmoid).init_with_output(rngs, x) for _ in range(2)]
    with intercepted(), pytest.warns(UserWarning, match="Reading.__call__ cannot be traced"):
        actual = [Reading(nn.sigmoid).init_with_output(rngs, x) for _ in range(2)]
    assert_close(actual, expected, TOLERANCE)
    model = Reading(nn.sigmoid)
    fast = Reading(functools.partial(quake_jax.sigmoid, order=1))
    variables = expected[0][1]
    with intercepted(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        actual = model.apply(variables, x, rngs=rngs)
    assert_identical(actual, fast.apply(variables, x, rngs=rngs))
    assert model.activation is nn.sigmoid


def test_modules_in_a_model_that_cannot_be_traced_are_treated_one_by_one():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = Holder(lambda x: nn.sigmoid(x))(x)
            return nn.tanh(y) if float(y.sum()) > 0 else y

    x = inputs()
    with intercepted(1), pytest.warns(UserWarning, match="Outer.__call__ cannot be traced"):
        actual = Outer().apply({}, x)
    assert_identical(actual, nn.tanh(quake_jax.sigmoid(x, order=1)))


def test_a_method_may_return_a_module():
    model, x = Methods(), inputs()
    variables = variables_of(model.init, key(0), x)

    def encode(module, x):
        return module.encoder_of()(x)

    expected = nn.apply(encode, model)(variables, x)
    with intercepted(), pytest.warns(UserWarning, match="encoder_of cannot be traced"):
        assert_close(nn.apply(encode, model)(variables, x), expected, TOLERANCE)


def test_an_error_of_the_model_is_its_own():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x) + nn.Dense(4)(x)

    with intercepted(), pytest.raises(TypeError, match="add got incompatible shapes"):
        Wrong().init(key(0), inputs())


# Errors.


@pytest.mark.parametrize("function", ("interceptor", "substitute"))
@pytest.mark.parametrize(
    "keywords, error, message",
    (
        ({"order": 9}, ValueError, "order must be"),
        ({"order": 2.0}, TypeError, "order must be"),
        ({"only": {"gleu"}}, ValueError, "gleu"),
        ({"only": 3}, TypeError, "only must be"),
    ),
)
def test_errors(function, keywords, error, message):
    with pytest.raises(error, match=message):
        getattr(quake_jax.linen, function)(**keywords)


def test_an_interceptor_is_no_context_manager():
    with pytest.raises(TypeError, match=r"with flax.linen.intercept_methods\(quake_jax.linen"):
        with quake_jax.linen.interceptor():
            pass
