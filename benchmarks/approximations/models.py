"""The examples' models with one function exchanged: softmax, GELU or layer normalisation."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import flax.linen as nn

import quake_jax.linen
from benchmarks.approximations.cases import Candidate


@contextlib.contextmanager
def substituting(candidate: Candidate) -> Iterator[None]:
    """Exchange one function in the Linen models that the examples compile inside.

    The models enter `quake_jax.linen.substitute(order)` themselves, and of two substitutions the
    inner one counts. So theirs is given what is to change: the kernel of this kind alone for QuAKE
    (`only`), the registered name for softmax and GELU. Layer normalisation has no kernel: an
    interceptor of flax.linen.LayerNorm exchanges it. The exact candidate changes nothing.
    """
    if candidate.is_exact:
        yield
    elif candidate.kind == "layernorm":
        with nn.intercept_methods(layer_norm_interceptor(candidate.entry.function)):
            yield
    else:
        if candidate.order is not None:
            choice = {"only": {candidate.kind}}
        else:
            choice = {candidate.kind: candidate.entry.name}
        chosen = functools.partial(quake_jax.linen.substitute, **choice)
        with mock.patch.object(quake_jax.linen, "substitute", chosen):
            yield


def layer_norm_interceptor(function: Callable) -> Callable:
    """An interceptor that calls `function`, f(x, scale, bias, axis, epsilon), where a
    flax.linen.LayerNorm is called.
    """

    def intercept(next_fun: Callable, args: tuple, kwargs: dict, context) -> Any:
        module = context.module
        if not isinstance(module, nn.LayerNorm) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if (module.reduction_axes, module.feature_axes) != (-1, -1) or kwargs or len(args) != 1:
            raise NotImplementedError(f"layer normalisation in another form: {module}")
        if module.is_initializing():
            return next_fun(*args, **kwargs)  # which makes the parameters
        (x,) = args
        scale = module.get_variable("params", "scale") if module.use_scale else None
        bias = module.get_variable("params", "bias") if module.use_bias else None
        return function(x, scale, bias, axis=-1, epsilon=module.epsilon)

    return intercept
