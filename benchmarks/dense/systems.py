"""The layer that all contestants compute, its copies, and the contestants in JAX.

Importing this module imports JAX: `environment.prepare` comes first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.dense import cases
from benchmarks.dense.cases import FORMATS, GPT2, NORM_SHAPE, Shape
from benchmarks.harness import buffers, peers, timing
from benchmarks.harness.errors import BenchmarkError, quake_jax
from benchmarks.harness.timing import Contestant
from benchmarks.ops.operators import OPERATORS

# Results are checked on so many rows, spread over all.
CHECKED_ROWS = 9
# A reading takes so many times what starting its program does, which grows with the copies.
STARTS = 20
EPSILON = 1e-5


def last_level_cache() -> int:
    """Bytes of the largest cache of a core; 32 MB where nobody tells."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((1024 * int(p.read_text().strip().rstrip("K")) for p in found), default=32 << 20)


@dataclass
class Layer:
    """One layer and what it needs: operands, results in float64, and copies of weights.

    A call of a contestant multiplies with every copy once; the last one is the weight that the
    result is checked with.
    """

    shape: Shape
    walked: int = 0  # bytes that all copies of a format have, if there are few rows; 0 for none
    _buffers: dict[tuple[str, str], Buffers] = field(default_factory=dict)
    _copies: dict[str, list] = field(default_factory=dict)

    def __post_init__(self):
        m, k, n = self.shape.m, self.shape.k, self.shape.n
        normal = _normal()
        self._made = _of_layer(k, n)
        self.x, self.bias, self.weight = normal(m, k), normal(n), self._made[""]
        self.scale, self.offset, self.residual = normal(k), normal(k), normal(m, n)

    def count(self, bytes_of_weight: float) -> int:
        """How many copies a format needs whose weights have so many bytes."""
        if not (self.shape.walks and self.walked):
            return 1
        wanted = self.walked / (bytes_of_weight * self.shape.k * self.shape.n)
        return min(math.ceil(wanted), cases.MOST_COPIES)

    def copies(self, name: str, bytes_of_weight: float, make: Callable[[], Any]) -> list:
        """The copies of a format by its name: pytrees of JAX arrays like the one made."""
        if name not in self._copies:
            if name not in self._made:
                self._made[name] = make()
            made, count = self._made[name], self.count(bytes_of_weight)
            more = (jax.tree.map(jnp.copy, made) for _ in range(count - 1))
            self._copies[name] = [*more, made]
        return self._copies[name]

    def codes(self, name: str) -> list[np.ndarray]:
        """The memory of copies that were made before."""
        return [np.from_dlpack(copy.codes) for copy in self._copies[name]]

    def buffers(self, dtype: str, out_dtype: str) -> Buffers:
        """x in one dtype, bias and output in another."""
        if (dtype, out_dtype) not in self._buffers:
            operands = jnp.array(self.x, dtype), jnp.array(self.bias, out_dtype)
            shape = self.shape.m, self.shape.n
            self._buffers[dtype, out_dtype] = Buffers(operands, shape, out_dtype)
        return self._buffers[dtype, out_dtype]

    def error(self, form: str, result: np.ndarray, erf: bool) -> float:
        """The largest error of some rows of a result, relative to their largest element; `erf` says
        which GELU it has.
        """
        rows, wanted = self._exact[form, erf]
        difference = np.abs(result[rows].astype(np.float64) - wanted)
        return float(difference.max() / np.abs(wanted).max())

    @functools.cached_property
    def _exact(self) -> dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]]:
        rows = np.unique(np.linspace(0, self.shape.m - 1, CHECKED_ROWS).astype(int))
        x = self.x[rows].astype(np.float64)
        normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPSILON)
        normed = normed * self.scale + self.offset
        weight = self.weight.astype(np.float64)
        bare, all_ = (v @ weight + self.bias for v in (x, normed))
        found = {}
        for erf, name in ((False, "gelu_tanh"), (True, "gelu_erf")):
            gelu = OPERATORS[name].exact
            results = {"bias": bare, "gelu": gelu(bare), "all": gelu(all_) + self.residual[rows]}
            found |= {(form, erf): (rows, result) for form, result in results.items()}
        return found


def _normal() -> Callable[..., np.ndarray]:
    random = np.random.default_rng(0)
    return lambda *size: random.standard_normal(size, dtype=np.float32)


@functools.lru_cache(maxsize=1)
def _of_layer(k: int, n: int) -> dict[str, Any]:
    """The weight, and by the names of formats what was made of it: for all rows of a layer, which
    come one after another.
    """
    return {"": _normal()(k, n) / math.sqrt(k)}


class Buffers(buffers.Buffers):
    """x, bias and output; weights come to it."""

    def walker(self, operator: Callable, copies: list) -> Callable[[int], None]:
        """Compile `operator` of x, weight and bias so that a call of the result with n walks n
        times through all copies of the weight; `start` of it starts the program for nothing.

        The copies are arguments of the loop, which chooses between them without copying one.
        """

        def step(i, operands, weights):
            x, bias = operands
            branches = [lambda x, w=w: operator(x, w, bias) for w in weights]
            return lax.switch(i % len(weights), branches, x)

        products = self.looped(step, tuple(copies))

        def run(calls: int) -> None:
            products(calls * len(copies))

        run.start = functools.partial(products, 0)
        return run


@dataclass
class Entry:
    """A contestant of a form of a layer."""

    contestant: Contestant
    format: str  # which of ours has the same precision
    copies: int  # products of a call
    weight_bytes: float
    result: Callable[[], np.ndarray]  # gives the last one
    erf: bool = False  # its GELU is the exact one, and not the tanh form


def in_jax(layer: Layer, form: str, target: float, threads: int) -> Iterator[Entry]:
    """Ours and XLA's contestants; the time to start a program is found by readings of `target`
    seconds, and subtracted.
    """

    def entry(name, format_, copies, operator, dtypes) -> Entry:
        held = layer.buffers(*dtypes)
        run = held.walker(operator, copies)
        start = peers.call_seconds(peers.repeat(run.start, held), target, threads)
        short = len(copies) * layer.shape.flops <= cases.LONG_FLOPS * threads
        calls = timing.calibrate(run, max(target, STARTS * start)) if short else 1
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(copies[-1]))
        contestant = Contestant(name, run, overhead=start / calls, calls=calls)
        return Entry(contestant, format_, len(copies), size, lambda: held.target)

    yield from _ours(layer, form, entry)
    if form != "all":
        yield from _xla(layer, form, entry)


def _ours(layer: Layer, form: str, entry: Callable[..., Entry]) -> Iterator[Entry]:
    module = quake_jax("pack_weight")
    extra = {} if form == "bias" else {"activation": "gelu"}
    if form == "all":
        scale, offset, extra["residual"] = map(
            jnp.array, (layer.scale, layer.offset, layer.residual)
        )
        extra["norm"] = module.LayerNorm(scale, offset, EPSILON)
    for name, arguments in FORMATS.items():
        dtype = cases.X_DTYPES.get(name, "float32")
        if cases.fits(name, layer.shape) and (form != "all" or dtype == "float32"):
            pack = functools.partial(module.pack_weight, layer.weight, **arguments)
            copies = layer.copies(f"quake {name}", cases.bytes_of(name), pack)

            def operator(x, w, bias):
                return module.dense(x, w, bias, **extra)

            yield entry(f"quake {name}", name, copies, operator, (dtype, dtype))


def _xla(layer: Layer, form: str, entry: Callable[..., Entry]) -> Iterator[Entry]:
    activation = jax.nn.gelu if form == "gelu" else lambda y: y
    for dtype, out in (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")):

        def operator(x, w, bias, out=out):
            w = w.array if isinstance(w, _Constant) else w
            return activation(jnp.dot(x, w, preferred_element_type=out) + bias)

        size = 4 if dtype == "float32" else 2
        make = functools.partial(jnp.array, layer.weight, dtype)
        copies = layer.copies(f"XLA {dtype}", size, make)
        name = f"XLA {dtype}" if dtype == out else f"XLA {dtype} → {out}"
        yield entry(name, dtype, copies, operator, (dtype, out))
        if out == "float32" and layer.shape.m in cases.CONSTANT_ROWS:
            constants = [_Constant(w) for w in distinct(copies[-1], len(copies))]
            made = entry(f"{name} constants", dtype, constants, operator, (dtype, out))
            made.weight_bytes = constants[0].array.nbytes
            yield made


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Constant:
    """A weight that is known when the program is made: an argument without arrays of JAX."""

    array: np.ndarray


def distinct(array: np.ndarray | jax.Array, count: int) -> Iterator[np.ndarray]:
    """So many copies of an array, of which no two are equal, so that nobody keeps one for all; the
    last one is as it was.
    """
    for i in reversed(range(count)):
        copy = np.array(array)
        if i:
            copy.flat[0] = i % 100
            copy.flat[1] = i // 100
        yield copy


# --- What is no layer


def norm(name: str, dtype: str) -> tuple[Contestant, Contestant]:
    """Ours, and what Flax's module of that norm traces to."""
    normal, module = _normal(), quake_jax(name)
    operands = [jnp.array(normal(*NORM_SHAPE), dtype)]
    operands += [jnp.array(normal(NORM_SHAPE[-1])) for _ in range(2 if name == "layer_norm" else 1)]

    def flax(x, scale, offset=0.0):
        wide = x.astype(jnp.float32)
        mean = wide.mean(-1, keepdims=True) if name == "layer_norm" else 0.0
        variance = jnp.maximum((wide * wide).mean(-1, keepdims=True) - mean * mean, 0)
        return ((wide - mean) * (lax.rsqrt(variance + EPSILON) * scale) + offset).astype(dtype)

    ours = functools.partial(getattr(module, name), epsilon=EPSILON)
    held = buffers.Buffers(operands, NORM_SHAPE, dtype)
    runs = [held.runner(operator) for operator in (ours, flax)]
    results = []
    for run in runs:
        run(1)
        results.append(held.target.astype(np.float32))
    if not np.allclose(*results, rtol=0.02, atol=0.02):
        raise BenchmarkError(f"{name} is wrong in {dtype}")
    systems = zip(("quake", "XLA"), runs, strict=True)
    return tuple(Contestant(f"{system} {name} {dtype}", run) for system, run in systems)


def packing(format_: str) -> Contestant:
    """Packing the weights of a model, from arrays in NumPy."""
    pack = functools.partial(quake_jax("pack_weight").pack_weight, **FORMATS[format_])
    normal = _normal()
    weights = [w for (k, n), count in GPT2.items() for w in [normal(k, n)] * count]

    def call() -> None:
        for weight in weights:
            jax.block_until_ready(pack(weight))

    return Contestant(f"packing {format_}", peers.repeat(call, weights), calls=1)
