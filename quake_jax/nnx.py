"""Flax NNX on quake_jax's kernels: `substitute` and `pack` for models as they are, and
`attention_fn`, which attention modules take by that name.

Flax is imported when a function is called, so this module can be imported without it.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._core.config import EXACT, Order, resolved_order
from quake_jax._core.drop_in import KERNEL_DTYPES, as_array, optional_array, static_bool
from quake_jax._flax import substitutes
from quake_jax._flax.attention import attention, check_others
from quake_jax._pack.report import PackReport
from quake_jax._pack.rules import checked_rules
from quake_jax._rewrite import Report, checked_options

__all__ = ["attention_fn", "pack", "substitute"]


def _without_batch_axis(x):
    """Drop a batch axis of one: jax.nn.dot_product_attention allows it beside unbatched arrays."""
    x = None if x is None else jnp.asarray(x)
    return x[0] if x is not None and x.ndim == 4 and x.shape[0] == 1 else x


def attention_fn(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable | None = None,
    is_causal: bool = False,
    *,
    order: Order | None = None,
) -> jax.Array:
    """Attention for NNX: `flax.nnx.dot_product_attention` with QuAKE (arXiv 2412.00408).

    It calls `quake_jax.dot_product_attention`, which never holds all the weights. Where they are
    needed (dropout, `module`, a bias or mask that gives the result more axes), or another library
    has changed JAX's products (qwix, in a model that it has quantised), it computes as Flax does,
    with `quake_jax.softmax`.

    Args:
      query: array of shape [batch..., queries, heads, depth], with any number of batch axes.
      key: array of shape [batch..., keys, key heads, depth]. The number of heads is a multiple of
        the number of key heads, each of which serves as many heads in a row.
      value: array of shape [batch..., keys, key heads, value depth].
      bias: array that broadcasts with [batch..., heads, queries, keys] and is added to the logits,
        or None.
      mask: array that broadcasts with the same, or None. A query attends to the keys where it is
        true (or not 0), or to all alike if there are none.
      broadcast_dropout: whether all batch axes and heads drop the same weights.
      dropout_rng: key for dropout; the same key drops the same weights as in Flax.
      dropout_rate: probability that a weight is dropped.
      deterministic: True turns dropout off.
      dtype: dtype that query, key and value are converted to; None promotes them to a common one.
        float32, bfloat16 and float16 use kernels; others get Flax's function.
      precision: of the products outside the kernel, as in `jax.numpy.einsum`. The kernel's are
        float32.
      module: a `flax.nnx.Module`, which sows the weights as `nnx.Intermediate` into its attribute
        "attention_weights", or None.
      promote_dtype: what converts (query, key, value), given them and `dtype`; None is Flax's.
      is_causal: whether query i attends to the keys up to i only.
      order: accuracy. 1 to 5 is the degree of the polynomial in the exponential (see `exp`);
        "exact" is Flax's function. None is the default in force (see `default_order`), in all cases
        that of `dot_product_attention`.

    Returns:
      An array of shape [batch..., queries, heads, value depth].

    Raises:
      ImportError: if Flax is not installed.
      TypeError, ValueError: if order is not allowed.
      ValueError: if shapes do not fit; if dropout lacks its key.

    Example:
      >>> from flax import nnx
      >>> import functools, jax.numpy as jnp
      >>> from quake_jax.nnx import attention_fn
      >>> fast = functools.partial(attention_fn, order=3)
      >>> layer = nnx.MultiHeadAttention(
      ...     2, 16, attention_fn=fast, decode=False, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((1, 8, 16)))
    """
    substitutes.require_flax("quake_jax.nnx")
    from flax import nnx
    from flax.nnx.nn import dtypes

    order = resolved_order(order, "dot_product_attention")
    arrays = {"query": query, "key": key, "value": value}
    query, key, value = (as_array(x, "nnx.attention_fn", name) for name, x in arrays.items())
    bias = optional_array(bias, "nnx.attention_fn", "bias")
    mask = optional_array(mask, "nnx.attention_fn", "mask")
    is_causal = static_bool(is_causal, "nnx.attention_fn", "is_causal")
    check_others("nnx.attention_fn", dtype, dropout_rng, dropout_rate, module)
    promote_dtype = promote_dtype or dtypes.promote_dtype
    promoted = promote_dtype((query, key, value), dtype=dtype)
    if order == EXACT or promoted[0].dtype not in KERNEL_DTYPES:
        return nnx.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=module,
            promote_dtype=promote_dtype,
            is_causal=is_causal,
        )
    if promoted[0].ndim == 3:
        bias, mask = _without_batch_axis(bias), _without_batch_axis(mask)
    sow = None
    if module is not None:
        sow = functools.partial(module.sow, nnx.Intermediate, "attention_weights")
    return attention(
        *promoted,
        bias,
        mask,
        function="nnx.attention_fn",
        order=order,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        sow=sow,
        precision=precision,
        grouped=True,
        is_causal=is_causal,
    )


def substitute(
    model: Any, order: Order | None = None, only: Collection[str] | str | None = None
) -> Report:
    """Exchange the functions that an NNX model holds for those of quake_jax, in place.

    That is `flax.nnx.dot_product_attention` in attention modules, and activations and softmax in
    any attribute of any module of the model: by themselves, in a functools.partial, a list, a tuple
    or a dict. The model then works as before under `nnx.jit`, `nnx.grad` and the like. Functions
    that a module calls by name (`jax.nn.gelu(x)` in its `__call__`) stay, and the report says which
    were seen; `quake_jax.accelerate` reaches those.

    A second call with another order changes the order, and with "exact" puts the first functions
    back.

    Args:
      model: a `flax.nnx.Module`.
      order: accuracy of what is put in, from 1 to 5; None is each function's default at the time of
        the call.
      only: what to replace, as in `quake_jax.accelerate`; None is all.

    Returns:
      A report, as `explain` gives: `replaced` has what the model now holds, by attribute; `left`
      the functions that methods of its modules mention by name.

    Raises:
      ImportError: if Flax is not installed.
      TypeError: if model is no NNX module.
      TypeError, ValueError: if order or only is not allowed.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, quake_jax.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(16, 64, rngs=rngs), nnx.gelu)
      >>> report = quake_jax.nnx.substitute(model)  # printed, it is a table
      >>> y = nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 16)))
    """
    substitutes.require_flax("quake_jax.nnx")
    from flax import nnx

    _check_model(model, "substitute", "order=3")
    options = checked_options(order, only, "nnx.substitute")
    functions = substitutes.table({nnx.dot_product_attention: attention_fn}, options.only)
    modules = [x for x in nnx.iter_graph(model) if isinstance(x[1], nnx.Pytree)]
    report = Report()
    for path, module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, (nnx.Pytree, nnx.Variable)):
                continue  # a module of its own, perhaps with the interface of a list or a dict
            new = substitutes.substitute_of(value, functions, options.order)
            if new is not value:
                setattr(module, name, new)
            for held in jax.tree.leaves(new, is_leaf=callable):
                if isinstance(held, substitutes.Substitute):
                    where = ".".join(map(str, (*path, name)))
                    report.add(held.name, held.func.__name__, "", where)
    if options.order != EXACT:
        called = {id(function): substitutes.name_of(function) for function in functions}
        if "attention" in called.values():
            called[id(jax.nn.dot_product_attention)] = "attention"
        for cls in dict.fromkeys(type(module) for _, module in modules):
            for name, where in _mentioned(cls, called):
                report.add(name, None, "called by name: quake_jax.accelerate reaches it", where)
    return report


def pack(
    model: Any,
    *,
    weights: str,
    activations: str | None = "auto",
    group_size: int | None = None,
    rules: Sequence[tuple[str, str | None]] | None = None,
    scale_method: str = "max",
) -> PackReport:
    """Pack the kernels of an NNX model's dense layers, in place.

    Every `flax.nnx.Linear` and `flax.nnx.LinearGeneral`, those of attention modules included,
    computes by `quake_jax.dense` from then on: it becomes a subclass of its own type, and its
    `kernel` a variable that holds a `PackedWeight`. It stays the same object, so all who hold it
    have the packed layer; kernels that layers share are packed once. The model works as before
    under `nnx.jit`, `nnx.split`, `nnx.vmap` and the like; but these cannot pack a model that they
    were given. A stack of layers, as `nnx.vmap` makes it, is packed as one if its axis is the
    first. Packed layers compute in the dtype that Flax's do, which must be float32, bfloat16 or
    float16, and take no `out_sharding`.

    A packed kernel is no `nnx.Param`: `nnx.grad` differentiates with respect to the inputs and to
    the parameters that are left, biases and norms. Make optimizers after packing.

    Activations, norms and attention stay as they are: `substitute` exchanges these, and
    `quake_jax.pack`, of a function of the state that `nnx.split` gives, also fuses them.

    Args:
      model: a `flax.nnx.Module`, such as a single `nnx.Linear`. Of an abstract one, by
        `nnx.eval_shape`, packed weights are abstract too.
      weights, activations, group_size, rules, scale_method: as in `quake_jax.pack`. Rules see paths
        such as "blocks/0/mlp/kernel", for what is shared the first one.

    Returns:
      The report: `layers` and `kept` as of `quake_jax.pack`; `programs` is one `Report` with the
      layers that are replaced, and all kernels that are left and why: those of subclasses and
      other modules, of layers with a dot_general or promote_dtype of their own, and what is shared
      with any of these, such as an embedding.

    Raises:
      ImportError: if Flax is not installed.
      TypeError: if model is no NNX module; if rules are no pairs.
      ValueError: if weights, activations, group_size, scale_method or rules is none of these; if a
        kernel has NaN or an infinity. The model is as it was then.

    Example:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, quake_jax.nnx
      >>> model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.gelu)
      >>> report = quake_jax.nnx.pack(model, weights="int8")  # printed, it is a table
      >>> model.layers[0].kernel.get_value()
      PackedWeight(shape=(64, 128), dtype='int8', group_size=None, activations='int8')
      >>> y = nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 64)))
    """
    substitutes.require_flax("quake_jax.nnx")
    from quake_jax._flax import packed

    _check_model(model, "pack", 'weights="int8"')
    chosen = checked_rules(weights, activations, group_size, scale_method, rules, "nnx.pack")
    return packed.pack(model, chosen)


def _check_model(model, function: str, example: str) -> None:
    from flax import nnx

    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            f"quake_jax.nnx.{function}: model must be a flax.nnx.Module, as in "
            f"{function}(model, {example}); got {type(model).__name__}"
        )


def _mentioned(cls: type, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """(name, place) of the functions, given by id, that the methods of a class mention."""
    from flax import nnx

    bases = [base for base in cls.__mro__ if not issubclass(nnx.Module, base)]
    methods = {name: method for base in reversed(bases) for name, method in vars(base).items()}
    methods.pop("__init__", None)  # what is put into attributes there is found in them
    for method in methods.values():
        function = inspect.unwrap(getattr(method, "__func__", method))
        if inspect.isfunction(function):
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            full = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}
            yield from _mentioned_in(function.__code__, {**function.__globals__, **full}, names)


def _mentioned_in(code: types.CodeType, scope: Mapping[str, Any], names: Mapping[int, str]):
    value = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            value = scope.get(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            is_module = isinstance(value, types.ModuleType)
            value = getattr(value, step.argval, None) if is_module else None
        else:
            value = None
        if id(value) in names:
            place = f"{code.co_filename}:{step.positions.lineno} ({code.co_name})"
            yield names[id(value)], place
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _mentioned_in(inner, scope, names)
