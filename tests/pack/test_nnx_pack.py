"""`quake_jax.nnx.pack`: which layers of an NNX model it packs, and what these compute then."""

import copy
import functools
import pickle
import re

import dense_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quake_jax
import quake_jax.nnx

nnx = pytest.importorskip("flax.nnx")

WIDTH, HEADS, VOCABULARY = 64, 4, 80


def normal(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X = normal(3, 5, WIDTH)


def linear(*sizes, kind=nnx.Linear, **keywords):
    """A layer whose bias is not 0."""
    return kind(*sizes, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0), **keywords)


general = functools.partial(linear, kind=nnx.LinearGeneral)


def pack(model, weights="float32", **keywords):
    return quake_jax.nnx.pack(model, weights=weights, **keywords)


def replaced(report):
    return {r.where: r.replacement for r in report.programs[0].replaced}


def left(report):
    return {r.where: r.reason for r in report.programs[0].left}


def close(got, wanted, terms=WIDTH):
    """Whether results agree that differ by the order of float32 sums, or the rounding of 16 bits
    at three places: the product, its sum with the bias, and the one of ours.
    """
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    unit = float(jnp.finfo(got.dtype).eps) / 2
    tolerance = 3 * unit + 2 * terms * 2.0**-24
    got, wanted = np.float64(got), np.float64(wanted)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# A layer, its inputs, and the dtype that these are converted to.
LAYERS = {
    "Linear": (lambda: linear(WIDTH, 72), X, "float32"),
    "without bias": (lambda: linear(WIDTH, 72, use_bias=False), X, "float32"),
    "one row": (lambda: linear(WIDTH, 72), X[0, 0], "float32"),
    "heads": (lambda: general(WIDTH, (HEADS, 18)), X, "float32"),
    "of heads": (
        lambda: general((HEADS, 16), 72, axis=(-2, -1)),
        X.reshape(3, 5, HEADS, 16),
        "float32",
    ),
    "other axes": (
        lambda: general((HEADS, 16), (9, 8), axis=(-1, 0)),
        normal(HEADS, 3, 16),
        "float32",
    ),
    "bfloat16": (lambda: linear(WIDTH, 72, dtype="bfloat16"), X, "bfloat16"),
    "parameters in 16 bits": (lambda: linear(WIDTH, 72, param_dtype="bfloat16"), X, "float32"),
    "rows in 16 bits": (lambda: linear(WIDTH, 72), X.astype("bfloat16"), "float32"),
    "kernel in 32 bits, rest in 16": (
        lambda: linear(WIDTH, 72, use_bias=False),
        X.astype("bfloat16"),
        "float32",
    ),
    "all in float16": (
        lambda: general(WIDTH, 72, param_dtype="float16"),
        X.astype("float16"),
        "float16",
    ),
    "wider results": (
        lambda: linear(WIDTH, 72, dtype="bfloat16", preferred_element_type=jnp.float32),
        X,
        "bfloat16",
    ),
    "narrower results": (
        lambda: linear(WIDTH, 72, preferred_element_type="bfloat16", use_bias=False),
        X,
        "float32",
    ),
    "narrower products": (
        lambda: linear(WIDTH, 72, preferred_element_type="bfloat16"),
        X,
        "float32",
    ),
    "integers": (lambda: linear(WIDTH, 72), jnp.arange(2 * WIDTH).reshape(2, WIDTH), "float32"),
}


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, weights):
    make, x, dtype = LAYERS[name]
    layer = make()
    wanted = layer(x)
    report = pack(layer, weights)
    bias = "" if layer.bias is None else ", bias"
    assert replaced(report) == {"kernel": f"quake_jax.dense({weights}{bias})"}
    got = layer(x)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    if weights == "float32" and name != "narrower products":  # where Flax rounds before the sum
        close(got, wanted)
    axes = sorted(a % x.ndim for a in getattr(layer, "axis", (-1,)))
    rows = jnp.moveaxis(x.astype(dtype), axes, range(-len(axes), 0))
    rows = rows.reshape(*rows.shape[: x.ndim - len(axes)], WIDTH)
    bias = None if layer.bias is None else layer.bias[...].astype(dtype).reshape(-1)
    expected = oracle.dense(rows, layer.kernel.get_value(), bias)
    oracle.assert_close(got.reshape(*rows.shape[:-1], 72), expected)


def test_kernels_are_those_of_pack():
    """A kernel is rounded to the dtype that the layer computes in, and then packed."""
    layer = linear(WIDTH, 72, dtype="bfloat16")
    weight = layer.kernel[...].astype("bfloat16")
    (packed,) = pack(layer, "int4", group_size=64, scale_method="mse", activations=None).layers
    weight = quake_jax.pack_weight(
        weight, "int4", group_size=64, scale_method="mse", activations=None
    )
    jax.tree.map(np.testing.assert_array_equal, layer.kernel.get_value(), weight)
    assert packed.bytes_before == 4 * WIDTH * 72
    assert packed.bytes_after == sum(x.nbytes for x in jax.tree.leaves(weight))
    assert 0 < packed.error < 0.2


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs),
            nnx.gelu,
            nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nnx.Module):
    """Layers in lists, dicts and twice in the model."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.more = nnx.data({"linear": nnx.Linear(WIDTH, WIDTH, rngs=rngs)})
        self.twice = self.blocks[1].mlp.layers[2]
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.dropout(self.more["linear"](self.twice(jnp.tile(x, 2))))
        return self.embed.attend(x)


def model(weights=None, **keywords):
    made = Model(nnx.Rngs(0))
    if weights is not None:
        pack(made, weights, **keywords)
    return made


KERNELS = {
    *(
        f"blocks/{i}/attention/{name}"
        for i in range(2)
        for name in ("query", "key", "value", "out")
    ),
    *("blocks/0/mlp/layers/0", "blocks/0/mlp/layers/2", "blocks/1/mlp/layers/0"),
    *("blocks/1/mlp/layers/2", "more/linear"),
}
KERNELS = {f"{path}/kernel" for path in KERNELS}


def test_a_model():
    exact, fast = model(), model()
    report = pack(fast)
    assert {path for layer in report.layers for path in layer.paths} == set(replaced(report))
    assert set(replaced(report)) == KERNELS
    assert left(report) == {
        "embed/embedding": "Embed.embedding is no kernel of nnx.Linear or nnx.LinearGeneral"
    }
    assert "embed/embedding" in {x.path for x in report.kept}
    assert len(report.kept) == len(KERNELS) + 2 * 2 + 1  # biases, norms, the embedding
    assert report.bytes_before == sum(
        x.nbytes for x in jax.tree.leaves(nnx.state(exact, nnx.Param))
    )
    variables = jax.tree.leaves(nnx.state(fast, nnx.Not(nnx.RngState)))
    assert report.bytes_after == sum(x.nbytes for x in variables)
    assert fast.twice is fast.blocks[1].mlp.layers[2]
    assert "PackedWeight" in repr(fast.more["linear"])
    wanted = exact(X)
    definition, state = nnx.split(fast)
    for f in (
        fast,
        functools.partial(nnx.jit(lambda model, x: model(x)), fast),
        nnx.merge(definition, state),
        jax.jit(lambda x: nnx.merge(definition, state)(x)),
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        nnx.clone(fast),
    ):
        # Some tens of layers one after the other.
        np.testing.assert_allclose(f(X), wanted, rtol=1e-4, atol=1e-4)
    again = pack(fast)
    assert not again.layers and left(again)["more/linear/kernel"] == "it is packed already"
    assert again.bytes_before == again.bytes_after == report.bytes_after


def test_derivatives():
    exact, fast = (Block(nnx.Rngs(0)) for _ in range(2))
    pack(fast)

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    of_x = nnx.grad(loss, argnums=1)
    np.testing.assert_allclose(of_x(fast, X), of_x(exact, X), rtol=1e-4, atol=1e-5)
    got, wanted = nnx.grad(loss)(fast, X), nnx.grad(loss)(exact, X)
    flat, wanted = (dict(nnx.to_flat_state(state)) for state in (got, wanted))
    assert ("mlp", "layers", 0, "bias") in flat and ("mlp", "layers", 0, "kernel") not in flat
    for path, gradient in flat.items():
        np.testing.assert_allclose(gradient[...], wanted[path][...], rtol=1e-3, atol=1e-5)


def test_rules():
    fast = model()
    rules = [("more/.*", None), (".*/mlp/layers/[02]/kernel", "int4"), (".*out/kernel", "int8")]
    report = pack(fast, "bfloat16", rules=rules)
    formats = {layer.paths[0]: layer.dtype for layer in report.layers}
    assert set(formats) == KERNELS - {"more/linear/kernel"}
    for path, dtype in formats.items():
        wanted = "int4" if "mlp" in path else "int8" if "out" in path else "bfloat16"
        assert dtype == wanted, path
    assert left(report)["more/linear/kernel"] == "a rule leaves it alone"
    assert isinstance(fast.more["linear"].kernel, nnx.Param)
    np.testing.assert_array_equal(fast.more["linear"](X), model().more["linear"](X))
    layer = linear(96, WIDTH)
    message = "groups of 64 do not divide its 96 rows"
    assert left(pack(layer, "int8", rules=[("kernel", "int4")], group_size=64))["kernel"] == message


@pytest.mark.parametrize(
    ("outputs", "dtype"), [(48, "int8"), (72, "int4"), (8 * WIDTH, "int8")], ids=str
)
def test_int4_spares_some_weights(outputs, dtype):
    layer = linear(WIDTH, outputs)
    assert pack(layer, "int4").layers[0].dtype == layer.kernel.get_value().dtype == dtype


class Subclass(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) ** 2


def doubled(*args, out_sharding=None, **keywords):
    return 2 * lax.dot_general(*args, **keywords)


def promoted(arrays, *, dtype):
    return tuple(None if x is None else x.astype("bfloat16") for x in arrays)


def stacked(axis=0, layers=3, width=WIDTH):
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=axis)
    def make(rngs):
        return nnx.Linear(width, width, use_bias=axis == 0, rngs=rngs)

    return make(nnx.Rngs(0))


def weight_of_integers():
    layer = linear(WIDTH, WIDTH)
    layer.kernel.set_value(jnp.ones((WIDTH, WIDTH), jnp.int8))
    return layer


LEFT = {
    "subclass": (lambda: Subclass(WIDTH, 72, rngs=nnx.Rngs(0)), "Subclass.kernel is no kernel"),
    "LoRA": (lambda: nnx.LoRALinear(WIDTH, 72, lora_rank=2, rngs=nnx.Rngs(0)), "LoRALinear.kern"),
    "einsum": (
        lambda: nnx.Einsum("abd,de->abe", (WIDTH, 72), rngs=nnx.Rngs(0)),
        "Einsum.kernel is no kernel",
    ),
    "convolution": (lambda: nnx.Conv(WIDTH, 72, 3, rngs=nnx.Rngs(0)), "Conv.kernel is no kernel"),
    "dot_general": (lambda: linear(WIDTH, 72, dot_general=doubled), "a dot_general of its own"),
    "dot_general, general": (
        lambda: general(WIDTH, 72, dot_general=doubled),
        "a dot_general of its own",
    ),
    "dot_general_cls": (
        lambda: general(WIDTH, 72, dot_general_cls=lambda: doubled),
        "a dot_general of its own",
    ),
    "promote_dtype": (lambda: linear(WIDTH, 72, promote_dtype=promoted), "a promote_dtype of its"),
    "batch axes": (
        lambda: general(WIDTH, 72, batch_axis={0: 3}),
        "it has batch axes",
    ),
    "complex": (lambda: linear(WIDTH, 72, dtype="complex64"), "it computes in complex64"),
    "results of another dtype": (
        lambda: linear(WIDTH, 72, preferred_element_type="complex64", use_bias=False),
        "it computes in complex64",
    ),
    "integers": (weight_of_integers, "its kernel is no array of floating-point numbers"),
    "weight norm": (
        lambda: nnx.WeightNorm(linear(WIDTH, 72), rngs=nnx.Rngs(0)),
        "nnx.WeightNorm changes it in each call",
    ),
    "weight norm of a model": (
        lambda: nnx.WeightNorm(nnx.Sequential(linear(WIDTH, 72)), rngs=nnx.Rngs(0)),
        "nnx.WeightNorm changes it in each call",
    ),
    "spectral norm": (
        lambda: nnx.SpectralNorm(linear(WIDTH, 72), update_stats=False, rngs=nnx.Rngs(0)),
        "nnx.SpectralNorm changes it in each call",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name):
    make, reason = LEFT[name]
    layer, original = make(), make()
    report = pack(layer, "int8")
    assert not report.layers
    (told,) = (r for where, r in left(report).items() if where.endswith("kernel"))
    assert reason in told
    if name != "results of another dtype":
        np.testing.assert_array_equal(layer(X), original(X))
    assert [x.path for x in report.kept if x.path.endswith("kernel")]


def test_shared_kernels_are_packed_once():
    pair = nnx.List([linear(WIDTH, WIDTH), linear(WIDTH, WIDTH), linear(WIDTH, WIDTH)])
    pair[1].kernel = pair[0].kernel
    wanted = [layer(X) for layer in pair]
    report = pack(pair)
    assert [layer.paths for layer in report.layers] == [("0/kernel",), ("2/kernel",)]
    assert set(replaced(report)) == {"0/kernel", "1/kernel", "2/kernel"}
    assert pair[1].kernel is pair[0].kernel is not pair[2].kernel
    copied = nnx.merge(*nnx.split(pair))
    assert copied[1].kernel is copied[0].kernel
    for layer, y in zip(pair, wanted, strict=True):
        close(layer(X), y)


def test_kernels_that_are_shared_in_other_shapes_are_packed_for_each():
    pair = nnx.List([linear(WIDTH, WIDTH), linear(WIDTH, WIDTH, dtype="bfloat16")])
    pair[1].kernel = pair[0].kernel
    wanted = [layer(X) for layer in pair]
    report = pack(pair)
    assert [x.bytes_before for x in report.layers] == [4 * WIDTH**2, 0]
    for layer, y in zip(pair, wanted, strict=True):
        close(layer(X), y)


def test_a_kernel_that_something_else_needs_stays():
    tied = nnx.Dict(embed=nnx.Embed(WIDTH, 72, rngs=nnx.Rngs(0)), linear=linear(WIDTH, 72))
    tied.linear.kernel = tied.embed.embedding
    wanted = tied.linear(X)
    report = pack(tied, "int8")
    assert not report.layers
    assert left(report)["linear/kernel"] == "it is shared with embed/embedding"
    np.testing.assert_array_equal(tied.linear(X), wanted)
    assert tied.linear.kernel is tied.embed.embedding


def test_stacked_layers():
    layers = stacked()

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def chain(layer, x):
        return layer(x)

    each = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
    wanted = chain(layers, X), each(layers, X)
    report = pack(layers)
    assert report.layers[0].shape == layers.kernel.get_value().shape == (3, WIDTH, WIDTH)
    for f, y in zip((chain, each), wanted, strict=True):
        close(f(layers, X), y, 3 * WIDTH)
    with pytest.raises(ValueError, match="weight must be one weight"):
        layers(X)


@pytest.mark.parametrize(
    ("axis", "layers", "reason"),
    [
        (1, 3, r"shape \(64, 3, 64\) is not \(…, 64, 64\)"),
        (2, 3, r"shape \(64, 64, 3\) is not"),
        (1, WIDTH, r"the axis of stacked layers in \(64, 64, 64\) is not certain"),
    ],
)
def test_stacks_along_other_axes_stay(axis, layers, reason):
    report = pack(stacked(axis, layers))
    assert not report.layers
    assert re.search(reason, left(report)["kernel"])


def test_recurrent_layers():
    make = lambda: nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=nnx.Rngs(0)))  # noqa: E731
    fast = make()
    assert set(replaced(pack(fast))) == {"cell/dense_h/kernel", "cell/dense_i/kernel"}
    close(fast(X), make()(X), 5 * WIDTH)


def test_decoding():
    attention, exact = (
        nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=nnx.Rngs(0)) for _ in range(2)
    )
    pack(attention)
    for layer in (attention, exact):
        layer.init_cache(X.shape)
    for i in range(2):
        got, wanted = (layer(X[:, i : i + 1]) for layer in (attention, exact))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_saved_and_abstract(tmp_path):
    def parameters(model):
        return nnx.state(model, nnx.Not(nnx.RngState))

    fast = model("int8")
    quake_jax.save_packed(tmp_path / "model", jax.tree.leaves(parameters(fast)))
    other = nnx.eval_shape(model)
    report = pack(other, "int8")
    assert all(layer.error is None for layer in report.layers)
    leaves = quake_jax.load_packed(tmp_path / "model")
    nnx.update(other, jax.tree.unflatten(jax.tree.structure(parameters(other)), leaves))
    other.dropout.rngs = nnx.Rngs(0).fork()
    np.testing.assert_array_equal(other(X), fast(X))


def test_packs_in_a_program():
    fast = nnx.jit(lambda: model("int8"))()
    np.testing.assert_allclose(fast(X), model("int8")(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"weights": "int3"}, ValueError, "weights must be one of 'float32', 'bfloat16', 'int8'"),
        ({"activations": "int4"}, ValueError, 'activations must be "auto"'),
        ({"group_size": 33}, ValueError, "group_size must be None or a posit"),
        ({"scale_method": "min"}, ValueError, 'scale_method must be "max"'),
        ({"rules": ["w"]}, TypeError, r"rules\[0\] must be a pair"),
        ({"rules": [("w", "x")]}, ValueError, r"rules\[0\]\[1\] must be one of"),
        ({"model": None}, TypeError, "model must be a flax.nnx.Module, as in pack(model, weig"),
        ({"model": nnx.gelu}, TypeError, "got function"),
    ],
)
def test_bad_arguments(keywords, error, message):
    with pytest.raises(error, match="quake_jax.nnx.pack: ") as raised:
        quake_jax.nnx.pack(**{"model": linear(WIDTH, 72), "weights": "int8", **keywords})
    assert message.replace("\\", "") in str(raised.value)


def test_a_failure_leaves_the_model_as_it_was():
    layers = nnx.List([linear(WIDTH, 72), linear(WIDTH, 72)])
    layers[1].kernel[...] = layers[1].kernel[...].at[3, 4].set(jnp.nan)
    with pytest.raises(ValueError, match=r"quake_jax.nnx.pack: 1/kernel: .* got nan at row 3"):
        pack(layers, "int8")
    assert all(type(layer) is nnx.Linear for layer in layers)
    assert all(isinstance(layer.kernel, nnx.Param) for layer in layers)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (linear(WIDTH, 72), (2, WIDTH + 1)),
        (linear(WIDTH, 72), ()),
        # As many numbers, and other axes.
        (general((HEADS, 16), 72, axis=(-2, -1)), (16, HEADS)),
        (general((HEADS, 16), 72, axis=(-2, -1)), (HEADS * 16,)),
    ],
)
def test_inputs_of_other_shapes(layer, shape):
    pack(layer, "int8")
    with pytest.raises(ValueError, match=r"inputs must have the sizes .* along the axes"):
        layer(jnp.ones(shape))


def test_takes_no_sharding():
    layer = linear(WIDTH, 72)
    pack(layer, "int8")
    with pytest.raises(ValueError, match="takes no out_sharding"):
        layer(X, out_sharding=jax.sharding.PartitionSpec())
