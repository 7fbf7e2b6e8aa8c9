"""Bad arguments of dense layers and packing: the error's type and what its text names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_oracle import pack

import quake_jax

F32 = jnp.float32
X = jax.ShapeDtypeStruct((3, 64), F32)
W = jnp.ones((64, 16))


def _packed(format="int8", k=64, n=16):
    return jax.eval_shape(lambda w: pack(w, format), jax.ShapeDtypeStruct((k, n), F32))


def _int8(k, **keywords):
    return jax.eval_shape(
        lambda w: quake_jax.pack_weight(w, "int8", **keywords), jax.ShapeDtypeStruct((k, 16), F32)
    )


def _array(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


BAD_CALLS = {
    "depth": (
        ValueError,
        "weight must be of shape (32, N), as x has shape (3, 32)",
        [_array(3, 32), _packed()],
        {},
    ),
    "plain depth": (ValueError, "weight must be of shape (32, N)", [_array(3, 32), W], {}),
    "scalar": (ValueError, "x must be of shape (…, K); got a scalar", [_array(), _packed()], {}),
    "int x": (
        TypeError,
        "x for a packed weight must be one of float32, bfloat16, float16; got dtype int32",
        [_array(3, 64, dtype=jnp.int32), _packed()],
        {},
    ),
    "complex x": (
        TypeError,
        "got dtype complex64",
        [_array(3, 64, dtype=jnp.complex64), _packed("float32")],
        {},
    ),
    "activation": (
        ValueError,
        "activation must be None or one of celu, elu, exp",
        [X, _packed()],
        {"activation": "relu"},
    ),
    "activation kind": (
        ValueError,
        "got <function",
        [X, _packed()],
        {"activation": quake_jax.silu},
    ),
    "order": (ValueError, "order must be None", [X, _packed()], {"order": 7}),
    "stacked": (
        ValueError,
        "use jax.vmap, jax.lax.scan or indexing for stacked ones; got shape (2, 64, 16)",
        [X, jax.eval_shape(lambda w: pack(w, "int8"), _array(2, 64, 16))],
        {},
    ),
    "plain stacked": (
        ValueError,
        "weight must be of shape (K, N); use jax.vmap",
        [X, jnp.ones((2, 64, 16))],
        {},
    ),
    "bias": (
        ValueError,
        "bias must be of shape (16,), as weight has shape (64, 16); got shape (15,)",
        [X, _packed(), _array(15)],
        {},
    ),
    "bias of many axes": (
        ValueError,
        "bias must be of shape (16,)",
        [X, _packed(), _array(1, 16)],
        {},
    ),
    "gate": (
        ValueError,
        "gate must be of the shape of weight, (64, 16); got shape (64, 17)",
        [X, _packed()],
        {"gate": _packed(n=17)},
    ),
    "gate format": (
        ValueError,
        "gate must be of the format of weight, PackedWeight(shape=(64, 16), dtype=",
        [X, _packed()],
        {"gate": _packed("bfloat16")},
    ),
    "gate kind": (ValueError, "gate must be packed if weight is", [X, _packed()], {"gate": W}),
    "gate bias": (
        ValueError,
        "gate_bias must be of shape (16,), as gate has",
        [X, _packed()],
        {"gate": _packed(), "gate_bias": _array(3)},
    ),
    "gate bias alone": (
        ValueError,
        "gate_bias must be None without a gate",
        [X, _packed()],
        {"gate_bias": _array(16)},
    ),
    "residual": (
        ValueError,
        "residual must be of the result's shape, (3, 16); got shape (16,)",
        [X, _packed()],
        {"residual": _array(16)},
    ),
    "residual dtype": (
        TypeError,
        "residual must be a floating-point array",
        [X, _packed()],
        {"residual": _array(3, 16, dtype=jnp.int32)},
    ),
    "norm": (
        TypeError,
        "norm must be None, a LayerNorm or an RMSNorm; got 'layer'",
        [X, _packed()],
        {"norm": "layer"},
    ),
    "norm scale": (
        ValueError,
        "norm.scale must be of shape (64,); got shape (16,)",
        [X, _packed()],
        {"norm": quake_jax.RMSNorm(_array(16))},
    ),
    "norm offset": (
        ValueError,
        "norm.offset must be of shape (64,)",
        [X, _packed()],
        {"norm": quake_jax.LayerNorm(_array(64), _array(1))},
    ),
    "epsilon": (
        TypeError,
        "norm.epsilon must be a non-negative number",
        [X, _packed()],
        {"norm": quake_jax.RMSNorm(_array(64), None)},
    ),
    "negative epsilon": (
        ValueError,
        "norm.epsilon must be a non-negative number; got -1.0",
        [X, _packed()],
        {"norm": quake_jax.RMSNorm(_array(64), -1.0)},
    ),
    "dtype": (
        TypeError,
        "one of float32, bfloat16, float16 for packed weights; got int32",
        [X, _packed()],
        {"preferred_element_type": "int32"},
    ),
    "no dtype": (
        TypeError,
        "preferred_element_type must be a dtype; got 'wide'",
        [X, _packed()],
        {"preferred_element_type": "wide"},
    ),
    "sum": (
        ValueError,
        "weight must be of at most 66311 rows",
        [_array(1, 66_312), _int8(66_312)],
        {},
    ),
    "sum of groups": (
        ValueError,
        "weight must be of at most 131072 rows",
        [_array(1, 131_104), _int8(131_104, group_size=32)],
        {},
    ),
    "no weight": (
        ValueError,
        "weight must be an array, or a sequence of at least one",
        [X, []],
        {},
    ),
    "biases": (
        ValueError,
        "bias must be None or a sequence of 2, as weight is; got a sequence of 1",
        [X, [_packed()] * 2, [None]],
        {},
    ),
    "bias of several": (
        ValueError,
        "bias must be None or a sequence of 2",
        [X, [_packed()] * 2, _array(16)],
        {},
    ),
    "one of biases": (
        ValueError,
        "bias[1] must be of shape (16,), as weight[1] has",
        [X, [_packed()] * 2, [None, _array(3)]],
        {},
    ),
    "one of weights": (
        ValueError,
        "weight[1] must be of shape (64, N)",
        [X, [_packed(), _packed(k=32)]],
        {},
    ),
    "gate of several": (
        ValueError,
        "gate must be None where weight is a sequence",
        [X, [_packed()]],
        {"gate": _packed()},
    ),
    "residual of several": (
        ValueError,
        "residual must be None where weight is a sequence",
        [X, [_packed()]],
        {"residual": _array(3, 16)},
    ),
    "leaf": (
        ValueError,
        "weight.codes must be of shape (1, 16, 16, 4) and dtype int8; got shape (3,)",
        [X, jax.tree.map(lambda _: _array(3), _packed())],
        {},
    ),
    "no leaf": (
        TypeError,
        "weight.scales must be an array; got None",
        [X, quake_jax.PackedWeight(_packed().codes, *[None] * 6, 64, 16, "int8", None, None)],
        {},
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls(case):
    error, text, arguments, keywords = BAD_CALLS[case]
    # What is an array is traced: the error comes before anything is computed.
    is_array = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)  # noqa: E731
    leaves, tree = jax.tree.flatten((arguments, keywords))
    arrays = [leaf for leaf in leaves if is_array(leaf)]

    def call(*arrays):
        rest = iter(arrays)
        filled = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
        arguments, keywords = jax.tree.unflatten(tree, filled)
        return quake_jax.dense(*arguments, **keywords)

    with pytest.raises(error, match=re.escape(text)) as raised:
        jax.eval_shape(call, *arrays)
    assert case == "order" or str(raised.value).startswith("quake_jax.dense: ")


@pytest.mark.parametrize(
    "bad", [None, "x", object(), {"a": 1}], ids=["None", "text", "object", "dict"]
)
def test_no_arrays(bad):
    packed = pack(W, "int8")
    with pytest.raises(TypeError, match="quake_jax.dense: x must be an array"):
        quake_jax.dense(bad, packed)
    with pytest.raises(TypeError, match="quake_jax.dense: weight must be an array"):
        quake_jax.dense(jnp.ones((3, 64)), bad)
    if bad is not None:
        for argument in ("bias", "residual"):
            with pytest.raises(TypeError, match=f"quake_jax.dense: {argument} must be an array"):
                quake_jax.dense(jnp.ones((3, 64)), packed, **{argument: bad})


def test_double_precision():
    with jax.enable_x64(True):
        for format in ("float32", "int8", "int4"):
            with pytest.raises(TypeError, match="must be one of float32, bfloat16, float16; got d"):
                quake_jax.dense(np.ones((3, 64)), pack(W, format))
        # Packing takes it, and plain arrays stay what they are.
        assert pack(W.astype(jnp.float64), "int8").scales.dtype == jnp.float32
        assert quake_jax.dense(np.ones((3, 64)), W).dtype == jnp.float64


def test_traced_epsilon():
    norm = quake_jax.RMSNorm(jnp.ones(64))
    with pytest.raises(TypeError, match="norm.epsilon must be a non-negative number, known when"):
        jax.jit(lambda e: quake_jax.dense(jnp.ones((3, 64)), W, norm=type(norm)(norm.scale, e)))(
            1.0
        )


BAD_PACKING = {
    "dtype": (
        ValueError,
        "dtype must be one of float32, bfloat16, int8, int4; got 'fp8'",
        W,
        "fp8",
        {},
    ),
    "dtype kind": (ValueError, "dtype must be one of", W, None, {}),
    "weight": (TypeError, "weight must be an array; got None", None, "int8", {}),
    "weight dtype": (
        TypeError,
        "weight must be a floating-point array; got an array of dtype int32",
        np.ones((4, 4), np.int32),
        "int8",
        {},
    ),
    "complex": (
        TypeError,
        "got an array of dtype complex64",
        np.ones((4, 4), np.complex64),
        "int8",
        {},
    ),
    "axes": (ValueError, "weight must be of shape (…, K, N); got shape (64,)", W[:, 0], "int8", {}),
    "group": (
        ValueError,
        "group_size must be a multiple of 32 that divides K = 64; got 48",
        W,
        "int8",
        {"group_size": 48},
    ),
    "group of K": (ValueError, "divides K = 64; got 128", W, "int4", {"group_size": 128}),
    "zero": (ValueError, "got 0", W, "int4", {"group_size": 0}),
    "int4": (
        ValueError,
        "group_size must be a multiple of 32 that divides K = 33; got 32",
        jnp.ones((33, 2)),
        "int4",
        {},
    ),
    "group kind": (
        TypeError,
        "group_size must be an integer or None; got 32.0",
        W,
        "int4",
        {"group_size": 32.0},
    ),
    "float groups": (
        ValueError,
        'group_size must be None for dtype "float32"; got 32',
        W,
        "float32",
        {"group_size": 32},
    ),
    "activations": (
        ValueError,
        'activations must be None, "int8" or "auto"; got \'int4\'',
        W,
        "int8",
        {"activations": "int4"},
    ),
    "float activations": (
        ValueError,
        "activations must be None for dtype \"bfloat16\"; got 'int8'",
        W,
        "bfloat16",
        {"activations": "int8"},
    ),
    "method": (
        ValueError,
        'scale_method must be "max" or "mse"; got \'gptq\'',
        W,
        "int8",
        {"scale_method": "gptq"},
    ),
}


@pytest.mark.parametrize("case", BAD_PACKING)
def test_packing(case):
    error, text, weight, dtype, keywords = BAD_PACKING[case]
    with pytest.raises(error, match=re.escape(text)) as raised:
        quake_jax.pack_weight(weight, dtype, **keywords)
    assert str(raised.value).startswith("quake_jax.pack_weight: ")


CODES, SCALES = np.zeros((64, 16), np.int8), np.ones((2, 16), np.float32)
BAD_CODES = {
    "dtype": (ValueError, 'dtype must be "int8" or "int4"', (CODES, SCALES, "bfloat16"), {}),
    "codes": (TypeError, "codes must be integers; got dtype float32", (SCALES, SCALES, "int8"), {}),
    "range": (
        ValueError,
        "codes must be integers from 0 to 15; got -1 at (0, 0)",
        (CODES - 1, SCALES, "int4"),
        {},
    ),
    "range by column": (
        ValueError,
        "codes must be integers from -127 to 127; got -128 at (0, 0)",
        (np.full((65_794, 1), -128), np.ones(1), "int8"),
        {},
    ),
    "scales": (
        ValueError,
        "of shape (16,) or (G, 16), G dividing K = 64; got shape (3, 16)",
        (CODES, np.ones((3, 16)), "int8"),
        {},
    ),
    "int4 scales": (
        ValueError,
        "scales must be of shape (G, 16), G dividing K = 64; got shape (16,)",
        (CODES, SCALES[0], "int4"),
        {},
    ),
    "group": (
        ValueError,
        "K / G must be a multiple of 32 that divides K = 64; got 16",
        (CODES, np.ones((4, 16)), "int4"),
        {},
    ),
    "offsets": (
        ValueError,
        "offsets must be of shape (2, 16); got shape (16,)",
        (CODES, SCALES, "int4"),
        {"offsets": SCALES[0]},
    ),
    "offsets by column": (
        ValueError,
        "offsets must be None without groups",
        (CODES, SCALES[0], "int8"),
        {"offsets": SCALES[0]},
    ),
    "table of int8": (
        ValueError,
        'table must be None but for "int4"',
        (CODES, SCALES, "int8"),
        {"table": np.ones(16)},
    ),
    "table shape": (
        ValueError,
        "table must be of shape (16,); got shape (8,)",
        (CODES, SCALES, "int4"),
        {"table": np.ones(8)},
    ),
    "table": (
        ValueError,
        "table must be integers from -128 to 127; got 0.5 at (0,)",
        (CODES, SCALES, "int4"),
        {"table": np.full(16, 0.5)},
    ),
    "permutation": (
        ValueError,
        "permutation must be one of 0 to 63; got",
        (CODES, SCALES, "int4"),
        {"permutation": np.zeros(64, int)},
    ),
    "permutation shape": (
        ValueError,
        "permutation must be of shape (64,); got shape (2,)",
        (CODES, SCALES, "int4"),
        {"permutation": [1, 0]},
    ),
}


@pytest.mark.parametrize("case", BAD_CODES)
def test_codes(case):
    error, text, arguments, keywords = BAD_CODES[case]
    with pytest.raises(error, match=re.escape(text)):
        quake_jax.PackedWeight.from_codes(*arguments, **keywords)
