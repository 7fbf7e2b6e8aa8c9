"""The systems that run a model in JAX: as it is, with quake_jax's kernels, and with the work of
the kernels left out, which nothing that only replaces that work can be faster than.

Importing this module imports JAX: `environment.prepare` comes first.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np

from benchmarks.harness.errors import quake_jax
from benchmarks.models import cases, flax_models, memory
from benchmarks.models.cases import (
    ACCELERATE,
    ATTENTION,
    CALIBRATED,
    CEILING,
    FLAX,
    FLAX_BFLOAT16,
    INTERCEPTOR,
    PACKED,
    PARTS,
    PEERS,
    STATIC,
    Case,
)

PARTS_REPLACED = ("softmax", "gelu")
# What a product of normally distributed numbers loses at most, relative to its result, by the
# weight's format: the weight's error, which pack's report gives, and as much for rows in 8 bits.
PRODUCT_ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 0.015, "int4": 0.13}
# Of others, which have one scale for all rows, the weight in 7 bits without VNNI, or scales from
# before: so many times as much. Their bfloat16 is that of every step, not of products alone.
PEER_ERROR = PRODUCT_ERROR | {"bfloat16": 0.0, "int8": 0.02, "int4": 0.16, "static": 0.05}
PRODUCTS = 6  # of a layer
# Small, and has all that the others have.
_WARM_UP_MODEL = "minilm-32x128"


class Setting:
    """A case with its weights, what a decoding model remembers, and the inputs, which all systems
    share.
    """

    def __init__(self, case: Case):
        self.case = case
        self.parameters, self.cache = flax_models.variables(case)
        self.inputs = flax_models.inputs(case)
        self._model = flax_models.module(case)
        self.cache_dtype: str | None = None  # of a `KVCache`; None is Flax's own cache

    @property
    def arguments(self) -> tuple:
        """Those of the function of `forward`, with a cache that may be donated."""
        return self.parameters, jax.tree.map(lambda x: x.copy(), self.cache), *self.inputs

    def with_cache(self, dtype: str) -> Setting:
        """The same with keys and values in `quake_jax.KVCache`s of a dtype."""
        kv_cache = quake_jax("kv_cache").kv_cache

        def stored(cached: dict) -> dict:
            if "cached_key" not in cached:
                return {name: stored(value) for name, value in cached.items()}
            key, value = cached["cached_key"], cached["cached_value"]
            empty = kv_cache.init(*key.shape, dtype=dtype)
            length = int(cached["cache_index"])
            return {"kv_cache": kv_cache.append(empty, key[:, :length], value[:, :length])}

        made = copy.copy(self)
        made.cache, made.cache_dtype = stored(self.cache), dtype
        return made

    @property
    def parameter_count(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.parameters))

    @property
    def result_shape(self) -> tuple[int, ...]:
        return jax.eval_shape(self.forward(), *self.arguments)[0].shape

    def forward(self) -> Callable[..., tuple[jax.Array, dict]]:
        """A new function of parameters, cache and inputs: the result, and the cache after it.

        Always new, so that no cache of JAX takes what one system traced for another's.
        """
        model = self._model

        def forward(parameters, cache, *inputs):
            if not cache:
                return model.apply({"params": parameters}, *inputs), cache
            variables = {"params": parameters, "cache": cache}
            with self._caching():
                result, changed = model.apply(variables, *inputs, mutable="cache")
            return result, jax.tree.map_with_path(_full, changed["cache"])

        return forward

    def _caching(self):
        if self.cache_dtype is None:
            return contextlib.nullcontext()
        return quake_jax("linen").linen.substitute(only="attention", kv_cache=self.cache_dtype)


def _full(path, cached: jax.Array) -> jax.Array:
    """What a cache that is full keeps: the next token takes the place of the last one. Flax's does
    so by itself."""
    return cached - 1 if getattr(path[-1], "name", None) == "length" else cached


def _accelerated(**options) -> Callable[[Callable], Callable]:
    return lambda forward: quake_jax("accelerate").accelerate(forward, **options)


def _inside(context: Callable[[], Any]) -> Callable[[Callable], Callable]:
    def transform(forward: Callable) -> Callable:
        def inside(*arguments):
            with context():
                return forward(*arguments)

        return inside

    return transform


@contextlib.contextmanager
def _work_left_out() -> Iterator[None]:
    """Models traced inside have no attention and no GELU; all their products stay."""

    def without_attention(call, args, kwargs, context):
        if context.method_name == "__call__" and hasattr(context.module, "attention_fn"):
            # A module that is about to be called refuses a change; this one serves for one call.
            object.__setattr__(context.module, "attention_fn", _sum)
        return call(*args, **kwargs)

    without_gelu = mock.patch.object(nn, "gelu", lambda x, approximate=True: x)
    with nn.intercept_methods(without_attention), without_gelu:
        yield


def _sum(query, key, value, **_):
    # The sum of all three: a projection that nothing needs would be left out as well.
    return query + (key + value)[:, : query.shape[1]]


TRANSFORMS: dict[str, Callable[[Callable], Callable]] = {
    FLAX: lambda forward: forward,
    PARTS: _accelerated(only=set(PARTS_REPLACED)),
    ACCELERATE: _accelerated(),
    INTERCEPTOR: _inside(lambda: quake_jax("linen").linen.substitute()),
    CEILING: _inside(_work_left_out),
    FLAX_BFLOAT16: lambda forward: forward,  # of another setting
}


@dataclass
class System:
    """A model that is ready to run, one of `cases.SYSTEMS`."""

    name: str
    run: Callable[[int], None]  # runs it so many times and returns when all are done
    result: np.ndarray  # of the first run, in float32
    memory: int | None = None  # bytes that it took on top of weights and inputs, if somebody tells
    trace_seconds: float | None = None  # of the CPU, in JAX
    compile_seconds: float | None = None
    program: Any = None  # JAX's compiled one
    difference: dict[str, float] = field(default_factory=dict)  # from Flax's, as of `checked`


def warm_up(names: list[str], dtype: str) -> None:
    """Load what is loaded once, so that no system's tracing and compiling pays for it."""
    (case,) = cases.choose([_WARM_UP_MODEL], dtype, quick=True)
    setting = Setting(case)
    for name in names:
        if name in TRANSFORMS or name in PACKED:
            build(setting, name)


def build(setting: Setting, name: str) -> System:
    """Compile a system of JAX, a key of `TRANSFORMS` or `PACKED`, and run it once."""
    if name == FLAX_BFLOAT16:
        setting = Setting(dataclasses.replace(setting.case, dtype="bfloat16"))
    if name in ATTENTION and setting.case.decodes:
        setting = setting.with_cache(ATTENTION[name])
    if name in PACKED:
        pack = quake_jax("pack").pack
        calibrate = setting.arguments[1:] if name == CALIBRATED else None
        function, parameters = pack(
            setting.forward(),
            *setting.arguments,
            weights=PACKED[name],
            calibrate=calibrate,
            attention=ATTENTION.get(name),
        )
    else:
        function, parameters = TRANSFORMS[name](setting.forward()), setting.parameters
    _, cache, *inputs = setting.arguments
    function = jax.jit(function, donate_argnums=1)
    jax.clear_caches()  # nothing that another system traced or compiled shortens this
    # CPU time: no reading can be repeated that another process disturbed.
    start = time.process_time()
    lowered = function.lower(parameters, cache, *inputs)
    traced = time.process_time()
    program = lowered.compile()
    trace_seconds, compile_seconds = traced - start, time.process_time() - traced

    def first_run():
        return jax.block_until_ready(program(parameters, cache, *inputs))

    (first, cache), grown = memory.growth(first_run)

    def run(calls: int) -> None:
        nonlocal cache
        for _ in range(calls):
            out, cache = program(parameters, cache, *inputs)
        out.block_until_ready()

    result = np.asarray(first, np.float32)
    return System(name, run, result, grown, trace_seconds, compile_seconds, program)


def explained(setting: Setting) -> dict[str, dict[str, int]]:
    """How many calls of which functions `accelerate` puts into the model, and what it leaves."""
    report = quake_jax("accelerate").explain(setting.forward(), *setting.arguments)
    replaced, left = Counter(), Counter()
    for record in report.replaced:
        function = record.replacement.removeprefix("quake_jax.").partition("(")[0]
        replaced[function] += record.count
    for record in report.left:
        left[record.name] += record.count
    return {"replaced": dict(replaced), "left": dict(left)}


def tolerance(case: Case, name: str) -> float:
    """How far a system's result may be from the model's, relative to that, both taken as one long
    vector: by the bounds of what it replaced.

    A layer adds the relative errors of its attention and of its GELU; what is computed in another
    order differs by rounding on top.
    """
    from quake_jax import accuracy

    peer = PEERS.get(name)
    dtype = "bfloat16" if peer == "bfloat16" else case.dtype
    eps = float(jax.numpy.finfo(dtype).eps)
    rounding = 8 * eps if dtype == "float32" else eps
    gelu = "gelu_erf" if case.family == "bert" else "gelu_tanh"
    bounds = {  # of the functions' default orders
        **dict.fromkeys(PEERS, 0.0),
        PARTS: accuracy.bound("softmax", 3, case.dtype) + accuracy.bound(gelu, 3, case.dtype),
    }
    both = accuracy.bound("softmax", 5, case.dtype) + accuracy.bound(gelu, 3, case.dtype)
    packing = PEER_ERROR[peer] if peer else PRODUCT_ERROR[PACKED.get(name, "float32")]
    if name in (CALIBRATED, STATIC):
        packing = PEER_ERROR["static"]
    if name in ATTENTION:
        rounding += PRODUCT_ERROR[ATTENTION[name]]
    # Errors of weights are independent of each other: their squares add up.
    products = packing * (PRODUCTS * case.sizes.layers) ** 0.5
    return case.sizes.layers * (bounds.get(name, both) + rounding) + products


def difference(result: np.ndarray, wanted: np.ndarray) -> float:
    """Length of the difference of two results, relative to the length of the second."""
    gap = result.astype(np.float64) - wanted
    return float(np.linalg.norm(gap) / np.linalg.norm(wanted.astype(np.float64)))
