"""Bad input to every public function: the text of its error; and input that is only extreme: sizes
of 0, sizes that no machine holds, arrays full of NaN and infinities.

The table has rows for every parameter of every public function; a new one without rows fails.
"""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import (
    assert_between,
    exact_pointwise,
    exact_row,
    in_double,
    in_double_precision,
    pointwise_error,
    row_error,
)
from support import DTYPES, FAMILIES, FUNCTIONS, ORDERS, ROWS, parametrize_functions

import quake_jax
from quake_jax import accuracy, approximations
from quake_jax._elementwise import table

ROW = np.ones(4, np.float32)
MATRIX = np.ones((3, 4), np.float32)
QUERY = np.ones((2, 7, 4, 8), np.float32)
# Of 7 positions, with room for one more.
CACHE = quake_jax.kv_cache.append(quake_jax.kv_cache.init(2, 8, 4, 8), QUERY, QUERY)
INTEGERS = np.arange(-4, 0, dtype=np.int32)


class _Model(nnx.Module):
    pass


def public(name: str):
    """The public function of a name, which may have a module's in front."""
    return functools.reduce(getattr, name.split("."), quake_jax)


def parameters(name: str):
    return inspect.signature(public(name)).parameters


def publics(kind: str) -> list[str]:
    """The public functions with kernels of a kind of fusion."""
    return list(dict.fromkeys(f.public.__name__ for f in table.FUSED.values() if f.kind == kind))


OF_ONE_ARRAY = {f.public.__name__: f.exact for f in table.FUNCTIONS.values()}
OF_ONE_ARRAY |= {"swish": jax.nn.swish, "glu": jax.nn.glu}
NORMALIZATIONS = ["softmax", "log_softmax"]
BIASED, GATED = publics("biased"), publics("gated")
# A valid call of every public function, by the names of its parameters.
VALID = {
    **{name: {"x": ROW} for name in (*OF_ONE_ARRAY, *NORMALIZATIONS)},
    **{name: {"x": MATRIX, "bias": ROW} for name in BIASED},
    **{name: {"gate": ROW, "value": ROW} for name in GATED},
    "logaddexp": {"x1": ROW, "x2": ROW},
    "logsumexp": {"a": MATRIX},
    "layer_norm": {"x": MATRIX, "scale": ROW, "offset": ROW},
    "rms_norm": {"x": MATRIX, "scale": ROW},
    "dot_product_attention": {"query": QUERY, "key": QUERY, "value": QUERY},
    "packed_dot_product_attention": {"qkv": np.ones((2, 7, 3, 4, 8), np.float32)},
    "kv_cache.init": {"batch": 2, "max_length": 8, "kv_heads": 4, "head_size": 8},
    "kv_cache.append": {"cache": CACHE, "key": QUERY, "value": QUERY},
    "kv_cache.attend": {"query": QUERY, "cache": CACHE},
    "accelerate": {"fun": jnp.exp},
    "explain": {"fun": jnp.exp},
    "default_order": {"order": 3},
    "set_default_order": {"order": None},
    "linen.attention_fn": {"query": QUERY, "key": QUERY, "value": QUERY},
    "linen.interceptor": {},
    "linen.substitute": {},
    "nnx.attention_fn": {"query": QUERY, "key": QUERY, "value": QUERY},
    "nnx.substitute": {"model": _Model()},
}
# Of packed weights: tests/dense/test_dense_errors.py and tests/pack.
OF_DENSE_LAYERS = {"dense", "pack_weight", "pack", "nnx.pack", "save_packed", "load_packed"} | {
    "packed_shardings"
}
ACTIVATIONS = [name for name, keywords in VALID.items() if list(keywords) == ["x"]]

# What takes no arguments, or takes any: how products and dropout are computed is Flax's affair, and
# what is explained is given to a function of the user's.
WITHOUT_ARGUMENTS = {"isa", "supported_isas", "disabled_export_checks"}
UNCHECKED = {
    ("explain", "args"),
    ("explain", "kwargs"),
    *(
        (f"{flax}.attention_fn", name)
        for flax in ("linen", "nnx")
        for name in (
            "broadcast_dropout",
            "deterministic",
            "force_fp32_for_softmax",
            "precision",
            "promote_dtype",
        )
    ),
}

# Rows: functions, parameter, bad value, type of the error, its text. "…" in a text stands for
# "quake_jax.<function>: <parameter>"; a text is to be found in the error as it is.

KEY = jax.random.key(0)
NO_ARRAYS = (
    ([1.0, 2.0], "list"),
    ((1.0,), "tuple"),
    ({"a": 1.0}, "dict"),
    ("text", "'text'"),
    (object(), "object"),
    (np.float32, "type"),
    (np.array(["a"]), "an array of dtype <U1"),
    (np.array([None]), "an array of dtype object"),
    (np.zeros(2, [("a", "f4")]), "an array of dtype [('a', '<f4')]"),
    (np.array(["2020-01-01"], "datetime64[D]"), "an array of dtype datetime64[D]"),
    (KEY, "an array of dtype key<fry>"),
)
NOT_REAL = np.ones(4, np.complex64)
ORDER = 'order must be None, an integer from 1 to 5, or "exact"; got '
STATIC = "… must be True or False, known when the function is traced; got "
ATTENTION = ["dot_product_attention", "packed_dot_product_attention"]
FLAX_ATTENTION = ["linen.attention_fn", "nnx.attention_fn"]
ONLY = '… must be None, "all", or a set of names, as in only={"softmax", "gelu"}; the names '


def has_order(name: str) -> bool:
    return "order" in parameters(name)


def _orders():
    with_order = [name for name in VALID if has_order(name)]
    for order, error in ((0, ValueError), (6, ValueError), ("3", ValueError), (3.0, TypeError)):
        yield with_order, "order", order, error, f"{ORDER}{order!r}"


ARRAYS = {
    "x": [*ACTIVATIONS, *BIASED],
    "alpha": [name for name in OF_ONE_ARRAY if "alpha" in parameters(name)],
    "bias": BIASED,
    "gate": GATED,
    "value": GATED,
    "x1": ["logaddexp"],
    "x2": ["logaddexp"],
    "a": ["logsumexp"],
    "b": ["logsumexp"],
}


def _arrays():
    for name, functions in ARRAYS.items():
        for bad, got in NO_ARRAYS:
            yield functions, name, bad, TypeError, f"… must be an array or a number; got {got}"
        wanted = "… must be real; got an array of dtype complex64"
        yield functions, name, NOT_REAL, TypeError, wanted
        # Without these there are functions of the others alone.
        if name not in ("value", "b"):
            yield functions, name, None, TypeError, "… must be an array or a number; got None"
        wanted = "… must be within the range of int32; got 1000000000000"
        yield functions, name, 10**12, OverflowError, wanted


def _dtypes():
    refusing = 0
    for dtype in (np.int32, np.bool_):
        bad = np.ones(4, dtype)
        for name, exact in OF_ONE_ARRAY.items():
            try:
                jax.eval_shape(exact, bad)
            except TypeError as error:
                wanted = f"cannot take x of shape (4,) and dtype {bad.dtype}: {str(error)[:25]}"
                yield [name], "x", bad, TypeError, wanted
                refusing += 1
    assert refusing >= 9  # sigmoid, silu, swish and glu of both, log_sigmoid of bool
    wanted = "cannot take gate of shape (4,) and dtype int32 and value of shape (4,) and dtype"
    yield ["swiglu"], "gate", np.ones(4, np.int32), TypeError, wanted
    wanted = "… must be real; got an array of dtype bool"
    yield NORMALIZATIONS, "x", np.ones(4, bool), TypeError, wanted

    eight_bits, promotion = jnp.ones(4, jnp.float8_e4m3fn), jax.dtypes.TypePromotionError
    wanted = "a of dtype float32 and b of dtype float8_e4m3fn have no common dtype: "
    yield ["logsumexp"], "b", eight_bits, promotion, wanted
    wanted = "cannot take x1 of shape (4,) and dtype float32 and x2 of shape (4,) and dtype float8"
    yield ["logaddexp"], "x2", eight_bits, promotion, wanted


def _shapes():
    wide = np.ones(5, np.float32)
    wanted = "x of shape (4,) and alpha of shape (5,) do not broadcast"
    yield ARRAYS["alpha"], "alpha", wide, ValueError, wanted
    wanted = "x1 of shape (4,) and x2 of shape (5,) do not broadcast"
    yield ["logaddexp"], "x2", wide, ValueError, wanted
    wanted = "… must have shape (4,), for the last axis of x of shape (3, 4); got (5,)"
    yield BIASED, "bias", wide, ValueError, wanted
    wanted = "… must have an axis for the bias; got a scalar"
    yield BIASED, "x", np.float32(1), ValueError, wanted
    wanted = "gate of shape (4,) and value of shape (5,) do not broadcast"
    yield GATED, "value", wide, ValueError, wanted
    wanted = "b of shape (5,) does not broadcast with a of shape (3, 4)"
    yield ["logsumexp"], "b", wide, ValueError, wanted


def _axes_and_masks():
    rows = [f.name for f in ROWS]
    for axis in (1.0, "rows", (0, None), np.float32(1)):
        wanted = f"… must be an integer, a sequence of integers or None; got {axis!r}"
        yield rows, "axis", axis, TypeError, wanted
    yield rows, "axis", (-1, -1), ValueError, "… (-1, -1) names the same axis of "
    for axis in (7, -7, (0, 7), 2**31, 2**63):
        yield rows, "axis", axis, ValueError, f"… {axis} is out of bounds for "
    for axis in (None, 1.0, (0,)):
        yield ["glu"], "axis", axis, TypeError, f"… must be an integer; got {axis!r}"
    wanted = "… 7 is out of bounds for x of 1 dimensions; allowed: from -1 to 0"
    yield ["glu"], "axis", 7, ValueError, wanted

    for bad in ([True] * 4, "text", object()):
        got = repr(bad) if isinstance(bad, str) else type(bad).__name__
        yield rows, "where", bad, TypeError, f"… must be None or a boolean array; got {got}"
    wanted = "… must be None or a boolean array; got an array of dtype"
    yield rows, "where", np.ones(4), ValueError, f"{wanted} float32"
    yield rows, "where", np.ones(4, np.int8), ValueError, f"{wanted} int8"
    yield rows, "where", np.ones(5, bool), ValueError, "… of shape (5,) does not broadcast with "


def _norms():
    names = ["layer_norm", "rms_norm"]
    arrays = {"x": names, "scale": names, "offset": names[:1], "residual": names}
    for name, functions in arrays.items():
        for bad, got in NO_ARRAYS:
            yield functions, name, bad, TypeError, f"… must be an array or a number; got {got}"
        for dtype in ("int32", "bool", "complex64"):
            bad = np.ones((3, 4) if name in ("x", "residual") else 4, dtype)
            wanted = f"… must have a floating-point dtype; got {dtype}"
            yield functions, name, bad, TypeError, wanted
    yield names, "x", None, TypeError, "… must be an array or a number; got None"
    yield names, "x", np.float32(1), ValueError, "… must have at least one axis; got a scalar"
    for name in ("scale", "offset"):
        for shape in ((5,), (1,), (), (1, 4), (3, 4)):
            wanted = (
                f"… must have shape (4,), for the last axis of x of shape (3, 4); got shape {shape}"
            )
            yield arrays[name], name, np.ones(shape, np.float32), ValueError, wanted
    wanted = "… must have x's shape (3, 4) and dtype float32; got shape"
    yield names, "residual", ROW, ValueError, f"{wanted} (4,) and dtype float32"
    half = MATRIX.astype(np.float16)
    yield names, "residual", half, ValueError, f"{wanted} (3, 4) and dtype float16"
    wanted = "… must be a non-negative number"
    for bad in (-1, -1e-9, np.float32(-1), np.inf, np.nan):
        yield names, "epsilon", bad, ValueError, f"{wanted}; got {bad!r}"
    for bad in (None, True, np.bool_(True), "1e-6", 1j, [1e-6], np.ones(2)):
        known = f"{wanted}, known when the function is traced; got {bad!r}"
        yield names, "epsilon", bad, TypeError, known


def _booleans():
    booleans = {
        "approximate": ["gelu", "bias_gelu", "geglu"],
        "gate_first": ["swiglu", "geglu"],
        "keepdims": ["logsumexp"],
        "return_sign": ["logsumexp"],
        "is_causal": ATTENTION,
        "return_residual": ATTENTION,
    }
    for name, functions in booleans.items():
        for bad in ("none", np.ones(3, bool), [True], 0.5):
            yield functions, name, bad, TypeError, f"{STATIC}{bad!r}"


def _arrays_of_attention():
    arrays = {
        "query": ATTENTION[:1],
        "key": ATTENTION[:1],
        "value": ATTENTION[:1],
        "qkv": ATTENTION[1:],
        "bias": ATTENTION,
        "mask": ATTENTION,
        "query_seq_lengths": ATTENTION,
        "key_value_seq_lengths": ATTENTION,
        "query_segment_ids": ATTENTION,
        "key_value_segment_ids": ATTENTION,
    }
    flax = {name: FLAX_ATTENTION for name in ("query", "key", "value", "bias", "mask")}
    for name, functions in [*arrays.items(), *flax.items()]:
        for bad, got in NO_ARRAYS[3:]:
            if isinstance(bad, np.ndarray | jax.Array):
                yield functions, name, bad, TypeError, f"… must be an array of numbers; got {got}"
            else:
                yield functions, name, bad, TypeError, f"… must be an array; got {bad!r}"
        if name in ("query", "key", "value", "qkv"):
            yield functions, name, None, TypeError, "… must be an array; got None"
        if functions is not FLAX_ATTENTION:  # Flax's functions take complex arrays
            bad = np.ones((2, 7, 3, 4, 8) if name == "qkv" else (2, 7, 4, 8), np.complex64)
            wanted = "must be real; got an array of dtype complex64"
            yield functions, name, bad, TypeError, wanted


def _shapes_of_attention():
    one = ATTENTION[:1]
    for shape in ((9,), (2, 7, 4, 8, 1)):
        got = f"got shape {(1,) * (4 - len(shape)) + shape} and dtype float32"
        bad = np.ones(shape, np.float32)
        if len(shape) > 4:
            for name in ("query", "key", "value"):
                wanted = f"… must have 3 or 4 axes, (batch,) length, heads and size; {got}"
                yield one, name, bad, ValueError, wanted
        yield (
            ATTENTION,
            "bias",
            bad,
            ValueError,
            ("… must have a shape that broadcasts to the logits' (2, 4, 7, 7); " + got),
        )
    half, batch = QUERY.astype(np.float16), np.ones((3, 7, 4, 8), np.float32)
    wanted = "must have the dtype of key, float32; got shape (2, 7, 4, 8) and dtype float16"
    yield one, "query", half, ValueError, f"… {wanted}"
    yield one, "value", half, ValueError, f"… {wanted}"
    wanted = "value must have the dtype of key, float16; got shape (2, 7, 4, 8) and dtype float32"
    yield one, "key", half, ValueError, wanted
    wanted = "… must have the batch 2 and the head size 8 of key; got shape (3, 7, 4, 8)"
    yield one, "query", batch, ValueError, wanted
    wanted = "… must have the batch, length and heads of key, (2, 7, 4); got shape (3, 7, 4, 8)"
    yield one, "value", batch, ValueError, wanted
    wanted = "… must have a multiple of key's 4 heads; got shape (2, 7, 3, 8)"
    yield one, "query", np.ones((2, 7, 3, 8), np.float32), ValueError, wanted
    wanted = "… must have dtype bool; got shape (1, 1, 7, 7) and dtype float32"
    yield ATTENTION, "mask", np.ones((7, 7), np.float32), ValueError, wanted
    wanted = (
        "… must have a shape that broadcasts to the logits' (2, 4, 7, 7); got shape (1, 1, 7, 9)"
    )
    yield ATTENTION, "mask", np.ones((7, 9), bool), ValueError, wanted
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        wanted = "… must have shape (2,) and dtype int32; got shape"
        yield ATTENTION, name, np.ones(3, np.int32), ValueError, f"{wanted} (3,) and dtype int32"
        yield (
            ATTENTION,
            name,
            np.ones(2, np.float32),
            ValueError,
            f"{wanted} (2,) and dtype float32",
        )
        yield ATTENTION, name, 7, ValueError, f"{wanted} () and dtype int32"
    for name in ("query_segment_ids", "key_value_segment_ids"):
        wanted = "… must have shape (2, 7) and dtype int32; got shape"
        bad = np.ones(7, np.int32)
        yield ATTENTION, name, bad, ValueError, f"{wanted} (7,) and dtype int32"
        bad = np.ones((2, 7), np.float32)
        yield ATTENTION, name, bad, ValueError, f"{wanted} (2, 7) and dtype float32"
    wanted = "… must have query_segment_ids beside it, with 7 queries and 7 keys; got shape (2, 7)"
    yield ATTENTION, "key_value_segment_ids", np.ones((2, 7), np.int32), ValueError, wanted
    for shape in ((2, 7, 4, 4, 8), (7, 3)):
        yield (
            ATTENTION[1:],
            "qkv",
            np.ones(shape, np.float32),
            ValueError,
            f"and shape {shape}"
            if (len(shape) == 5)
            else f"… must have 5 axes, or 4 without a batch; got shape {shape}",
        )
    yield ATTENTION[1:], "qkv_axis", 1.5, TypeError, "… must be an integer; got 1.5"
    wanted = "… must be -3 or -2, and that axis of qkv have size 3; got "
    for axis in (-2, 0, 7):
        yield (
            ATTENTION[1:],
            "qkv_axis",
            axis,
            ValueError,
            f"{wanted}{axis} and shape (2, 7, 3, 4, 8)",
        )


def _options_of_attention():
    with_cache = [*ATTENTION, "kv_cache.attend"]
    yield with_cache, "scale", ROW, ValueError, f"… must be one number, not an array; got {ROW!r}"
    for bad in ("text", 1j, [1.0]):
        yield with_cache, "scale", bad, TypeError, f"… must be a real number; got {bad!r}"
    for bad in ("text", 1.5, (1, 2, 3), (1.0, 2), np.ones(3)):
        wanted = f"… must be an integer or two, (left, right); got {bad!r}"
        yield with_cache, "local_window_size", bad, TypeError, wanted
    for bad in ("cuda", 3, ["xla"], np.ones(2)):
        wanted = f'… must be None, "quake", "xla" or "cudnn"; got {bad!r}'
        yield ATTENTION, "implementation", bad, ValueError, wanted
    for bad in ("text", ROW, 1j, [1.0]):
        wanted = f"… must be a static number; got {bad!r}"
        yield with_cache, "logits_soft_cap", bad, TypeError, wanted
    for bad in (0, -1.0, np.inf, np.nan):
        wanted = f"… must be None, or positive and finite; got {float(bad)!r}"
        yield with_cache, "logits_soft_cap", bad, ValueError, wanted
    for bad in ("int4", "float16", jnp.float16, 3, "text"):
        wanted = f"… must be None or one of 'float32', 'bfloat16', 'int8'; got {bad!r}"
        yield ATTENTION, "compute_dtype", bad, ValueError, wanted


def _caches():
    init, append, attend = ([f"kv_cache.{name}"] for name in ("init", "append", "attend"))
    for name in ("batch", "max_length", "kv_heads", "head_size", "value_size"):
        for bad in (1.5, "text", ROW):
            yield init, name, bad, TypeError, f"… must be an integer; got {bad!r}"
        for bad in (0, -1):
            yield init, name, bad, ValueError, f"… must be positive; got {bad}"
    wanted = "… must be one of 'float32', 'bfloat16', 'float16', 'int8'; got "
    for bad in ("int4", jnp.float64, "text", 3):
        yield init, "dtype", bad, ValueError, f"{wanted}{bad!r}"
    for bad, got in ((None, "None"), (QUERY, "an array of dtype float32"), ((QUERY,), "tuple")):
        wanted = f"… must be a KVCache; got {got}"
        yield [*append, *attend], "cache", bad, TypeError, wanted
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), CACHE)
    wanted = "… must be of one kind of sequences, with keys of 4 axes, inside jax.vmap or"
    yield [*append, *attend], "cache", stacked, ValueError, wanted
    for name, functions in (("key", append), ("value", append), ("query", attend)):
        wanted = "… must be of real numbers; got dtype "
        for bad in (QUERY.astype(np.int32), QUERY.astype(np.complex64), QUERY > 0):
            yield functions, name, bad, TypeError, f"{wanted}{bad.dtype}"
        yield functions, name, "text", TypeError, "… must be an array; got 'text'"
        yield functions, name, None, TypeError, "… must be an array; got None"
    for name in ("key", "value"):
        for shape in ((3, 1, 4, 8), (2, 1, 3, 8), (2, 1, 4, 7), (1, 4, 8), (8,)):
            wanted = f"… must be of shape (2, T, 4, 8); got {shape}"
            yield append, name, np.ones(shape, np.float32), ValueError, wanted
    wanted = "… must be of key's length 7; got shape (2, 1, 4, 8)"
    yield append, "value", QUERY[:, :1], ValueError, wanted
    # Of 2 positions beside values of 2 there is no room for a second.
    wanted = "key must be of at most 1 positions, the room of a cache of length 7 of 8; got 7"
    yield append, "cache", CACHE, ValueError, wanted
    yield attend, "query", QUERY[0], ValueError, "… must be of shape (B, T, N, H); got shape (7, 4"
    wanted = "… must have the batch 2 and the head size 8 of key; got shape (2, 7, 4, 9)"
    yield attend, "query", np.ones((2, 7, 4, 9), np.float32), ValueError, wanted
    wanted = "… must have a multiple of key's 4 heads; got shape (2, 7, 3, 8)"
    yield attend, "query", QUERY[:, :, :3], ValueError, wanted
    wanted = (
        "… must have a shape that broadcasts to the logits' (2, 4, 7, 8); got shape (1, 1, 7, 7)"
    )
    yield attend, "bias", np.ones((7, 7), np.float32), ValueError, wanted
    yield attend, "mask", np.ones((7, 7), bool), ValueError, wanted
    wanted = "… must have dtype bool; got shape (1, 1, 7, 8) and dtype float32"
    yield attend, "mask", np.ones((7, 8), np.float32), ValueError, wanted


def _attention_of_flax():
    flax = FLAX_ATTENTION
    wanted = "… must have the axes [batch..., length, heads, depth]; got shapes query (3, 4)"
    yield flax, "query", MATRIX, ValueError, wanted
    wanted = "must have the batch axes of query; got shapes"
    yield flax, "key", QUERY[:1], ValueError, f"… {wanted} key (1, 7, 4, 8), query (2, 7, 4, 8)"
    yield flax, "value", QUERY[:1], ValueError, f"… {wanted} value (1, 7, 4, 8), query (2, 7, 4, 8)"
    yield flax, "key", QUERY[..., :5], ValueError, "… must have the depth of query; got shapes key"
    wanted = "value must have the length and heads of key; got shapes value (2, 7, 4, 8), key"
    yield flax, "key", QUERY[:, :5], ValueError, wanted
    for name in ("bias", "mask"):
        wanted = "must broadcast to [batch..., heads, queries, keys] = (2, 4, 7, 7); got shapes"
        yield flax, name, np.ones(9, np.float32), ValueError, f"… {wanted} {name} (9,)"
    for rate in (-0.1, 1.5, "half", np.nan, None):
        yield (
            flax,
            "dropout_rate",
            rate,
            ValueError,
            f"… must be a number from 0 to 1; got {rate!r}",
        )
    yield flax, "is_causal", "no", TypeError, f"{STATIC}'no'"
    yield flax, "dtype", "float99", TypeError, "… must be None or a dtype; got 'float99'"
    yield (
        flax,
        "module",
        3,
        TypeError,
        "… must be None or a module of Flax, which sows the weights; got 3",
    )
    yield flax, "dropout_rng", 3.5, TypeError, "… must be None or a key; got 3.5"
    for name in ("qk_attn_weights_einsum", "attn_weights_value_einsum", "einsum_dot_general"):
        wanted = "… must be None or a function; got 'ij,jk'"
        yield flax[:1], name, "ij,jk", TypeError, wanted


def _models():
    for name in ("accelerate", "explain"):
        for bad in (3, None, "softmax"):
            wanted = f"… must be a function of arrays, as in {name}(fun"
            yield [name], "fun", bad, TypeError, wanted
    models = ["accelerate", "linen.interceptor", "linen.substitute", "nnx.substitute"]
    for bad, error in (
        ({"gleu"}, ValueError),
        ("gleu", ValueError),
        (3, TypeError),
        ([3], TypeError),
    ):
        yield models, "only", bad, error, ONLY
    for bad in ("int3", 8):
        wanted = f"… must be one of None, 'float32', 'bfloat16', 'int8', 'int4'; got {bad!r}"
        yield ["accelerate"], "weights", bad, ValueError, wanted
    for bad in ("int4", jnp.int16, 16):
        wanted = f"… must be None or one of 'float32', 'bfloat16', 'int8'; got {bad!r}"
        yield ["accelerate"], "attention", bad, ValueError, wanted
    for bad in ("x", 1.0, True, (), ("x",), None):
        wanted = "… must be the number of a positional argument, or a tuple of them"
        yield ["accelerate"], "params_argnums", bad, TypeError, wanted
    for kind in ("softmax", "gelu"):
        for bad, error in (("softmix", ValueError), (3, TypeError)):
            wanted = "… must be None or the name of an approximation in quake_jax.approximations ("
            yield models[:3], kind, bad, error, wanted
            yield models[:3], kind, bad, error, f"; got {bad!r}"
    for bad in ("int4", jnp.int8, 8):
        wanted = "… must be None or one of 'float32', 'bfloat16', 'float16', 'int8'; got " + repr(
            bad
        )
        yield models[1:3], "kv_cache", bad, ValueError, wanted
    for bad in (None, nnx.gelu, 3):
        wanted = "… must be a flax.nnx.Module, as in substitute(model, order=3); got "
        yield ["nnx.substitute"], "model", bad, TypeError, wanted + type(bad).__name__


ROWS_OF_TABLE = [
    row
    for rows in (
        _orders,
        _arrays,
        _dtypes,
        _shapes,
        _axes_and_masks,
        _norms,
        _booleans,
        _arrays_of_attention,
        _shapes_of_attention,
        _options_of_attention,
        _caches,
        _attention_of_flax,
        _models,
    )
    for row in rows()
]


def call(name: str, keywords: dict):
    """Call a public function by the names of its parameters."""
    function, keywords = public(name), dict(keywords)
    only_positional = [
        keywords.pop(p.name)
        for p in inspect.signature(function).parameters.values()
        if p.kind == p.POSITIONAL_ONLY and p.name in keywords
    ]
    return function(*only_positional, **keywords)


def is_traceable(value) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc"


@pytest.mark.parametrize(
    ("functions", "parameter", "bad", "error", "text"),
    ROWS_OF_TABLE,
    ids=[f"{parameter} {row}" for row, (_, parameter, *_) in enumerate(ROWS_OF_TABLE)],
)
def test_error(functions, parameter, bad, error, text):
    for name in functions:
        keywords = {**VALID[name], parameter: bad}
        wanted = text.replace("…", f"quake_jax.{name}: {parameter}").replace("swish: ", "silu: ")
        with pytest.raises(error) as raised:
            call(name, keywords)
        assert wanted in str(raised.value), name
        if parameter == "order" or not is_traceable(bad):
            continue
        # Inside a program; at "exact" too, but that of Flax's attention is Flax's function.
        static = {k: v for k, v in keywords.items() if not is_traceable(v)}
        arrays = {k: v for k, v in keywords.items() if is_traceable(v)}
        wanted = wanted.split("; got array(")[0]  # the bad value, which is traced then
        orders = [{"order": order} for order in (None, "exact")] if has_order(name) else [{}]
        for order in orders[:1] if name in FLAX_ATTENTION else orders:

            def program(arrays, name=name, static=static, order=order):
                return call(name, {**static, **arrays, **order})

            with pytest.raises(error) as raised:
                jax.eval_shape(program, arrays)
            assert wanted in str(raised.value), name


def public_names():
    for module, prefix in (
        (quake_jax, ""),
        (quake_jax.kv_cache, "kv_cache."),
        (quake_jax.linen, "linen."),
        (quake_jax.nnx, "nnx."),
    ):
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            if name[0] != "_" and callable(value) and not inspect.isclass(value):
                yield prefix + name


def test_the_table_has_every_public_function_and_parameter():
    names = set(public_names()) - OF_DENSE_LAYERS
    assert names - WITHOUT_ARGUMENTS == set(VALID) | {
        name for name in names if name.endswith("require_flax")
    }
    has_rows = {(name, row[1]) for row in ROWS_OF_TABLE for name in row[0]}
    for name in VALID:
        for parameter in parameters(name):
            assert ((name, parameter) in has_rows) != ((name, parameter) in UNCHECKED), (
                f"{name} has no row for a bad value of {parameter}"
            )
    for name in WITHOUT_ARGUMENTS:
        assert not parameters(name)


# Linen's modules check what is theirs; the rest is Flax's.

MODULES = {
    "MlpBlock": {"mlp_dim": 8},
    "TransformerEncoderBlock": {"num_heads": 2, "mlp_dim": 8},
    "TransformerDecoderBlock": {"num_heads": 2, "mlp_dim": 8},
}


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated")
@pytest.mark.parametrize("name", [n for n in quake_jax.linen.__all__ if n[0].isupper()])
def test_modules(name):
    module, x = getattr(quake_jax.linen, name), jnp.ones((2, 3, 4))
    if name in MODULES:
        with pytest.raises(ValueError, match="order must be None.*got 9"):
            module(**MODULES[name], order=9).init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="deterministic"):
            module(**MODULES[name], dropout_rate=0.5).init(jax.random.key(0), x)
    else:  # with Flax's __call__
        fast = functools.partial(quake_jax.linen.attention_fn, order=9)
        with pytest.raises(ValueError, match="order must be None.*got 9"):
            module(num_heads=2, attention_fn=fast).init(jax.random.key(0), x)
    if name != "MlpBlock":
        with pytest.raises((ValueError, AssertionError), match="divisible by number of heads"):
            module(**{**MODULES.get(name, {}), "num_heads": 3}).init(jax.random.key(0), x)


# quake_jax.reference: names and checks of the kernels.


@parametrize_functions([f for f in FUNCTIONS if hasattr(quake_jax.reference, f.name)])
def test_reference(function):
    reference = getattr(quake_jax.reference, function.name)
    x = function.inputs((2, 4))
    if function.name.endswith("_split"):
        reference = functools.partial(reference, gate_first=1)
    with pytest.raises(ValueError, match="order must be an integer from 1 to 5; got 6"):
        reference(*x, order=6)
    with pytest.raises(TypeError, match="must be float32, bfloat16 or float16; got int32"):
        reference(*(a.astype(jnp.int32) for a in x), order=3)


# The approximations: a bad value of each parameter, by its name.

APPROXIMATIONS = "quake_jax.approximations"
BAD_PARAMETERS = {
    "axis": ((9, ValueError), (1.5, TypeError)),
    "where": ((np.ones(4, np.int32), ValueError), (np.ones(9, bool), ValueError)),
    "scale": ((-1.0, ValueError), ("text", TypeError)),
    "alpha": ((np.ones(9, np.int32), ValueError), ("text", TypeError)),
    "zero_point": ((np.ones(9, np.int32), ValueError), ("text", TypeError)),
    "bias": ((np.ones(9, np.float32), ValueError),),
    "epsilon": ((-1.0, ValueError), ("text", TypeError)),
    "input_scale": ((0.0, ValueError), ("text", TypeError)),
    "output_scale": ((0.0, ValueError), ("text", TypeError)),
    "rounding": (("up", ValueError),),
    "online": ((3.5, TypeError),),
    "integer_output": ((3.5, TypeError),),
    "c": ((-1.0, ValueError), ("text", TypeError)),
    "C": (("best", ValueError), (1.5, TypeError)),
    # Numbers of bits, of entries, degrees.
    None: ((10**6, ValueError), (1.5, TypeError)),
}


def _approximation_rows():
    for name, function in sorted(vars(approximations).items()):
        if name[0] == "_" or not inspect.isfunction(function):
            continue
        parameters = inspect.signature(function).parameters
        if next(iter(parameters)) != "x":
            continue  # test_approximations.py has these
        for parameter in list(parameters)[1:]:
            is_vector = parameter == "scale" and "bias" in parameters  # of a layer norm
            bad = (
                BAD_PARAMETERS["bias" if is_vector else parameter]
                if (is_vector or parameter in BAD_PARAMETERS)
                else BAD_PARAMETERS[None]
            )
            for value, error in bad:
                yield pytest.param(
                    name, parameter, value, error, id=f"{name} {parameter} {error.__name__}"
                )
        for value, error in (
            ([1.0], TypeError),
            ("text", TypeError),
            (None, TypeError),
            (KEY, TypeError),
        ):
            yield pytest.param(name, "x", value, error, id=f"{name} x {type(value).__name__}")
        kind = np.float32 if name.endswith("_int") else np.int32
        yield pytest.param(name, "x", np.ones(4, kind), TypeError, id=f"{name} x {kind.__name__}")


def valid_approximation(name: str) -> dict:
    function = getattr(approximations, name)
    is_integer = name.endswith("_int")
    keywords = {"x": np.arange(-4, 0).astype(np.int8 if is_integer else np.float32)}
    other = {"ailayernorm_int": np.uint8, "gemmlowp_exp_int": np.int32}
    other["gemmlowp_logistic_int"] = np.int32
    keywords["x"] = keywords["x"].astype(other.get(name, keywords["x"].dtype))
    for p in inspect.signature(function).parameters.values():
        if p.default is p.empty and p.name != "x":
            channel = {"alpha": np.zeros(4, np.int32), "zero_point": np.int32(3)}
            keywords[p.name] = channel.get(p.name, 0.1)
    return keywords


@pytest.mark.parametrize(("name", "parameter", "value", "error"), list(_approximation_rows()))
def test_approximations(name, parameter, value, error):
    with pytest.raises(error) as raised:
        getattr(approximations, name)(**{**valid_approximation(name), parameter: value})
    text = str(raised.value)
    assert text.startswith(f"{APPROXIMATIONS}.{name}: {parameter}"), text


# What takes no array; test_approximations.py has more of them.
OTHERS = (
    ("find", ("softmax", "softmix"), "no approximation of kind softmax has the name 'softmix'"),
    ("find", ("softmax", ["e2softmax"]), "no approximation of kind softmax has the name ['e2"),
    ("find", ("relu", "e2softmax"), "kind must be one of softmax, gelu, layernorm, exp, sigmoid"),
    ("find", (["softmax"], "e2softmax"), "kind must be one of softmax, gelu, layernorm, exp, si"),
    ("registry", ("relu",), "kind must be one of softmax, gelu, layernorm, exp, sigmoid; got 'r"),
    ("registry", (3,), "kind must be one of softmax, gelu, layernorm, exp, sigmoid; got 3"),
    ("softmax_from_exp", ("exp",), "exp must be a function; got str"),
    ("fit_relu_network", (np.exp, 1.0, 1.0), "lower must be less than upper"),
    ("lookup_table", (np.exp, 0, 1), "network must be a ReluNetwork"),
    ("nn_lut_table", ("tanh",), "function must be one of"),
)


@pytest.mark.parametrize(("name", "arguments", "text"), OTHERS)
def test_other_functions_of_approximations(name, arguments, text):
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(approximations, name)(*arguments)
    assert text in str(raised.value)
    assert str(raised.value).startswith(APPROXIMATIONS)


def test_the_tables_have_every_approximation():
    functions = {
        n for n, f in vars(approximations).items() if n[0] != "_" and inspect.isfunction(f)
    }
    others = {
        n for n in functions if "x" not in inspect.signature(getattr(approximations, n)).parameters
    }
    assert others == {name for name, *_ in OTHERS}
    for entry in approximations.registry():  # with the defaults of the registry
        with pytest.raises(TypeError, match=r"x must have a floating-point dtype; got int32"):
            entry.function(np.ones(4, np.int32))


# Command lines.


@pytest.mark.parametrize(
    ("module", "arguments", "text"),
    [
        ("quake_jax", ["--fast"], "unrecognized arguments: --fast"),
        ("quake_jax", ["softmax"], "unrecognized arguments: softmax"),
        ("quake_jax.accuracy", ["--fast"], "unrecognized arguments: --fast"),
        (
            "quake_jax.accuracy",
            ["--order", "6"],
            "argument --order: invalid choice: 6 (choose from",
        ),
        ("quake_jax.accuracy", ["--order", "x"], "argument --order: invalid int value: 'x'"),
        ("quake_jax.accuracy", ["--order"], "argument --order: expected one argument"),
        (
            "quake_jax.accuracy",
            ["--function", "relu"],
            "argument --function: invalid choice: 'relu'",
        ),
        ("quake_jax.accuracy", ["--isa", "sse9"], "argument --isa: invalid choice: 'sse9'"),
        ("quake_jax.accuracy", ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (
            "quake_jax.accuracy",
            ["--threads", "0"],
            "argument --threads: '0' is not a positive number",
        ),
        ("quake_jax.accuracy", ["--threads", "-1"], "argument --threads: '-1' is not a positive"),
        (
            "quake_jax.accuracy",
            ["--json", "/no/folder/x"],
            "argument --json: cannot write /no/folder",
        ),
        ("quake_jax.accuracy", ["--markdown", "/"], "argument --markdown: cannot write /"),
    ],
)
def test_command_lines(module, arguments, text, capsys):
    from quake_jax import __main__ as check

    with pytest.raises(SystemExit) as exit_info:
        (check if module == "quake_jax" else accuracy).main(arguments)
    assert exit_info.value.code == 2
    output = capsys.readouterr()
    assert text in output.err and not output.out


# Sizes of 0.


def results_and_gradients(function):
    """A program of a call, its gradient by every operand, and the call of a batch of 3."""

    def program(*x):
        gradient = jax.grad(lambda *a: jnp.sum(function(*a)), tuple(range(len(x))))
        batched = jax.vmap(function)(*(jnp.stack([a] * 3) for a in x))
        empty = jax.vmap(function)(*(jnp.ones((0, *a.shape)) for a in x))
        return function(*x), gradient(*x), batched, empty

    return program


def assert_same(quake, exact, *x, what=None) -> None:
    """Assert the same shapes, dtypes and, where there are any, values; jitted and not."""
    wanted = jax.jit(exact)(*x)
    for results in (jax.jit(quake)(*x), quake(*x)):
        for y, z in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
            assert (y.shape, y.dtype) == (z.shape, z.dtype), what
            np.testing.assert_array_equal(y, z, str(what))
        exact_structure = jax.tree.structure(wanted)
        assert jax.tree.structure(results) == exact_structure


@parametrize_functions()
def test_empty_arrays(function):
    quake = functools.partial(function.quake, order=3)
    for shape in ((0,), (3, 0), (2, 0, 4)):
        x = [np.ones(s, np.float32) for s in function.operands(shape)]
        wanted = jax.eval_shape(results_and_gradients(function.exact), *x)
        found = jax.jit(results_and_gradients(quake))(*x)
        for y, z in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert (y.shape, y.dtype) == (z.shape, z.dtype), shape
        quake(*x)


@pytest.mark.parametrize("axis", [0, -1, None, (0, 1), ()])
def test_empty_reductions(axis):
    for name, exact in (
        ("softmax", jax.nn.softmax),
        ("log_softmax", jax.nn.log_softmax),
        ("logsumexp", jax.nn.logsumexp),
    ):
        for shape in ((0, 4), (3, 0)):
            x = np.ones(shape, np.float32)
            for where in (None, np.ones(shape, bool)):
                keywords = {"axis": axis, "where": where}
                quake = functools.partial(getattr(quake_jax, name), **keywords, order=3)
                assert_same(quake, functools.partial(exact, **keywords), x, what=(name, shape))


@pytest.mark.filterwarnings("ignore:divide by zero")  # jax.nn's, of a size of 0
@pytest.mark.parametrize("empty", ["batch", "queries", "keys", "size"])
def test_empty_attention(empty):
    n = {"batch": 2, "queries": 3, "keys": 5, "heads": 2, "size": 8, empty: 0}
    query, key = (
        np.ones((n["batch"], n[length], n["heads"], n["size"]), np.float32)
        for length in ("queries", "keys")
    )
    for keywords in ({}, {"is_causal": True}):
        programs = [
            results_and_gradients(functools.partial(f, **keywords))
            for f in (quake_jax.dot_product_attention, jax.nn.dot_product_attention)
        ]
        wanted = jax.jit(programs[1])(query, key, key)
        found = jax.jit(programs[0])(query, key, key)
        for y, z in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert (y.shape, y.dtype) == (z.shape, z.dtype), keywords
            np.testing.assert_array_equal(y, z)


def test_empty_values_and_heads():
    # jax.nn has values of the keys' size alone, and divides by their heads.
    none = np.ones((2, 3, 0, 8), np.float32)
    for order in (3, "exact"):
        f = functools.partial(quake_jax.dot_product_attention, order=order)
        assert jax.jit(f)(none, none, none).shape == none.shape
        out, residual = f(none, none, none, return_residual=True, is_causal=True)
        assert (out.shape, residual.shape) == (none.shape, none.shape[:3])
        assert jax.grad(lambda x, f=f: jnp.sum(f(x, none, none)))(none).shape == none.shape
    query, value = np.ones((2, 3, 4, 8), np.float32), np.ones((2, 3, 4, 0), np.float32)
    for f in (quake_jax.dot_product_attention, jax.jit(quake_jax.dot_product_attention)):
        assert f(query, query, value).shape == value.shape
    key = np.ones((2, 3, 0, 8), np.float32)
    with pytest.raises(ValueError, match="query must have a multiple of key's 0 heads; got shape"):
        quake_jax.dot_product_attention(query, key, key)


# Sizes that no machine holds: shape arithmetic and lowering, which allocate nothing.

HUGE = (2**31 - 1, 2**31, 2**33 + 6)


def lowered(function, *shapes, dtype="float32"):
    """The shapes of the results of a program, and the integers that its kernels are given."""
    x = [jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for s in shapes]
    program = jax.jit(function).lower(*x)
    text = program.as_text()
    calls = [line for line in text.splitlines() if "custom_call @quake_jax" in line]
    integers = [
        int(n)
        for line in calls
        for n in re.findall(r"= (-?\d+) : i\d+", line.split("operand_l")[0])
    ]
    shapes = jax.tree.map(lambda y: y.shape, program.out_info)
    return shapes, integers, len(calls)


@parametrize_functions()
def test_huge_arrays(function):
    quake = functools.partial(function.quake, order=3)
    derivative = jax.grad(lambda *a: jnp.sum(quake(*a).astype(jnp.float32)))
    for n in HUGE if function in FAMILIES else HUGE[-1:]:
        for shape in ((2, n), (n, 2)):
            operands, result = function.operands(shape), function.result_shape(shape)
            found, integers, calls = lowered(quake, *operands)
            assert found == result and calls == 1
            assert all(abs(i) < 8 for i in integers), integers  # orders and axes, no sizes
            x = [jax.ShapeDtypeStruct(s, jnp.float32) for s in operands]
            assert jax.eval_shape(derivative, *x).shape == operands[0]
            batched = [(3, *s) for s in operands]
            assert lowered(jax.vmap(quake), *batched)[0] == (3, *result)


def test_huge_reductions_of_all_axes():
    for f, wanted in (
        (quake_jax.softmax, (2**17, 2**17)),
        (quake_jax.log_softmax, (2**17, 2**17)),
        (quake_jax.logsumexp, ()),
    ):
        f = functools.partial(f, axis=None)
        assert lowered(f, (2**17, 2**17))[::2] == (wanted, 1)
        masked = lowered(lambda x, f=f: f(x, where=x > 0), (2**17, 2**17))
        assert masked[::2] == (wanted, 1)


@pytest.mark.parametrize("n", HUGE)
def test_huge_attention(n):
    quake = functools.partial(quake_jax.dot_product_attention, order=3)
    for query, key in (
        ((1, n, 2, 8), (1, 7, 2, 8)),
        ((1, 7, 2, 8), (1, n, 2, 8)),
        ((n, 7, 2, 8), (n, 7, 2, 8)),
        ((1, 7, n, 8), (1, 7, n, 8)),
        ((1, 2**18, 64, 64), (1, 2**18, 64, 64)),  # 2^42 weights
    ):
        found, integers, calls = lowered(quake, query, key, key)
        assert found == query and calls == 1
        assert all(-1 <= i < 8 for i in integers)
        found = lowered(jax.grad(lambda *a: jnp.sum(quake(*a)), (0, 1, 2)), query, key, key)[0]
        assert found == (query, key, key)
        mapped = [(3, *s) for s in (query, key, key)]
        assert lowered(jax.vmap(quake), *mapped)[0] == mapped[0]
    packed = (1, n, 3, 2, 8)
    assert lowered(quake_jax.packed_dot_product_attention, packed)[0] == (1, n, 2, 8)


def test_positions_that_int32_does_not_hold():
    window = functools.partial(quake_jax.dot_product_attention, local_window_size=(2**40, 2**62))
    shape = (1, 2**30, 1, 8)
    _, integers, _ = lowered(window, shape, shape, shape)
    assert max(integers) == 2**30  # no limit, and a position fits beside it
    longer = (1, 2**30 + 1, 1, 8)
    text = (
        "quake_jax.dot_product_attention: query and key must have a length of at most 1073741824 "
        "where results depend on positions; got 1073741825 and 1073741824"
    )
    for keywords in (
        {"local_window_size": 3},
        {"is_causal": True},
        {"key_value_seq_lengths": np.ones(1, np.int32)},
        {"query_seq_lengths": np.ones(1, np.int32)},
    ):
        masked = functools.partial(quake_jax.dot_product_attention, **keywords)
        with pytest.raises(ValueError, match=re.escape(text)):
            lowered(masked, longer, shape, shape)


# Floods of NaN and infinities.

NAN, INF = np.nan, np.inf
FLOODS = {
    "NaN": [NAN],
    "inf": [INF],
    "-inf": [-INF],
    "infinities": [INF, -INF],
    "largest": [3e38, -3e38, 1.0],
    "everything": [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40],
    "one NaN": [*[0.5] * 30, NAN],
    "one inf": [*[0.5] * 30, INF],
    "one -inf": [*[0.5] * 30, -INF],
}


def flood(shape, values, seed):
    """An array full of these values, of which rare ones come once in a row of 37."""
    count = int(np.prod(shape))
    return np.random.default_rng(seed).permutation(np.resize(values, count)).reshape(shape)


def assert_no_trace_of_kernels():
    """NumPy has its denormals and its warnings: kernels leave no floating-point mode behind."""
    smallest = np.float32(2.0**-149)
    assert np.array([smallest, smallest]).sum() == 2.0**-148
    assert np.array(smallest) * np.array(np.float32(1)) != 0
    with np.errstate(all="raise"):
        assert (np.arange(5.0) / 2 + 1).sum() == 10
        with pytest.raises(FloatingPointError):
            np.array([1.0]) / np.array([0.0])
    with np.errstate(divide="ignore"):
        assert np.isinf(np.array([1.0]) / np.array([0.0])).all()


@parametrize_functions()
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floods(function):
    shape = (3, 37)

    @jax.jit
    def call(by_dtype):
        return [[function.quake(*x, order=n) for n in ORDERS] for x in by_dtype]

    before = np.geterr()
    for seed, (name, special) in enumerate(FLOODS.items()):
        x = [flood(s, special, [seed, k]) for k, s in enumerate(function.operands(shape))]
        by_dtype = [[a.astype(jnp.dtype(dtype)) for a in x] for dtype in DTYPES]
        for given, results in zip(by_dtype, call(by_dtype), strict=True):
            wide = in_double_precision(given)
            is_row = function in ROWS
            if is_row:
                expected, slack = exact_row(function.name, wide[0], -1), None
            else:
                expected, slack = exact_pointwise(function.name, wide)
            for order, y in zip(ORDERS, results, strict=True):
                if is_row:
                    error = row_error(function.name, expected, wide[0], None, None, -1, order)
                else:
                    error = pointwise_error(function.name, expected, slack, order)
                what = (function.name, y.dtype, order, name)
                assert_between(y, np.asarray(expected), error, what)
        assert_no_trace_of_kernels()
    assert np.geterr() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_floods_of_attention(dtype, keywords):
    @jax.jit
    def call(q, k, v):
        return [quake_jax.dot_product_attention(q, k, v, **keywords, order=n) for n in ORDERS]

    x = [np.random.default_rng(k).standard_normal((1, 9, 2, 8)) for k in range(3)]
    for which, special in itertools.product(range(3), (NAN, INF, -INF)):
        for whole in (False, True):
            bad = [a.astype(jnp.dtype(dtype)) for a in x]
            bad[which][(0, slice(None) if whole else 4, 0)] = special
            expected = in_double(*bad, **keywords)[0]
            for order, out in zip(ORDERS, call(*bad), strict=True):
                got = np.asarray(out, np.float64)
                what = (which, special, whole, order)
                if which == 2 and keywords:
                    # Whether a masked value that is NaN has an effect depends on its tile.
                    assert not np.isfinite(got[0, 4:, 0]).any(), what
                    continue
                np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), str(what))
                np.testing.assert_array_equal(
                    got[np.isinf(expected)], expected[np.isinf(expected)], str(what)
                )
    assert_no_trace_of_kernels()
