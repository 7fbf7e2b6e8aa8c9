"""Dense layers in double precision, with a bound of what float32 arithmetic may differ by; and the
formats that the tests go through."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from support import ELEMENTWISE, on_device

import quake_jax
from quake_jax._dense import layout

# What `pack_weight` is called with, by name.
FORMATS = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "int8": ("int8", {}),
    "int8_weight_only": ("int8", {"activations": None}),
    "int8_groups": ("int8", {"group_size": 32}),
    "int8_groups_weight_only": ("int8", {"group_size": 64, "activations": None}),
    "int4": ("int4", {}),
    "int4_groups_of_64": ("int4", {"group_size": 64}),
    "int4_weight_only": ("int4", {"activations": None}),
}
# Rows, columns and depth: tails of tiles, panels, words and vectors.
SHAPES = ((1, 1, 1), (2, 17, 33), (5, 48, 64), (7, 15, 130), (16, 33, 96), (37, 70, 257))
# Half the distance between neighbouring float32 values, relative to them.
U = 2.0**-24
_FUNCTIONS = {f.name: f for f in ELEMENTWISE}
# One program for each weight, and not one for each of its operations.
_unpack = jax.jit(quake_jax.PackedWeight.unpack)


def depth(format: str, k: int) -> int:
    """The next multiple of what a format's K has to be a multiple of."""
    dtype, keywords = FORMATS[format]
    group = keywords.get("group_size") or (32 if dtype == "int4" else 1)
    return -(-k // group) * group


def pack(weight, format: str) -> quake_jax.PackedWeight:
    dtype, keywords = FORMATS[format]
    return quake_jax.pack_weight(weight, dtype, **keywords)


def normal(shape, seed: int = 0, dtype="float32"):
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return on_device(values, dtype)


class Bounded(NamedTuple):
    """Values in double precision, and how far from them float32 arithmetic may be."""

    value: np.ndarray
    error: np.ndarray

    def plus(self, other) -> Bounded:
        other = np.asarray(other, np.float64)
        value = self.value + other
        return Bounded(value, self.error + U * (np.abs(value) + self.error))

    def times(self, other: Bounded) -> Bounded:
        value = self.value * other.value
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        error += self.error * other.error
        return Bounded(value, error + U * (np.abs(value) + error))

    def through(self, activation: str | None, order: int) -> Bounded:
        if activation is None:
            return self
        function = _FUNCTIONS[activation]
        # No slope is above 1.2.
        value = function.formula(self.value)
        error = 1.2 * self.error
        return Bounded(value, error + function.bound(order) * (np.abs(value) + error) + 2.0**-126)


def float64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float32).astype(np.float64)


def rows(x, norm=None) -> Bounded:
    """The rows that are multiplied."""
    x = float64(x)
    if norm is None:
        return Bounded(x, np.zeros_like(x))
    k = x.shape[-1]
    scale, magnitude = float64(norm.scale), np.abs(x)
    offset = 0.0
    if isinstance(norm, quake_jax.LayerNorm):
        offset = float64(norm.offset)
        magnitude = magnitude + np.mean(magnitude, -1, keepdims=True)
        x = x - np.mean(x, -1, keepdims=True)
    inverse = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + norm.epsilon)
    error = (2 * k + 16) * U * (magnitude * inverse * np.abs(scale) + np.abs(offset))
    return Bounded(x * inverse * scale + offset, error)


def product(v: Bounded, packed: quake_jax.PackedWeight) -> Bounded:
    """v · W: the rounding of float32 sums in any order; and of quantised rows, half a step."""
    weight = float64(_unpack(packed))
    value, error, k = v.value, v.error, weight.shape[0]
    if packed.dtype == "bfloat16":
        value = float64(v.value.astype(np.float32).astype(jnp.bfloat16))
        # Where v itself is not known exactly, it may be rounded to a neighbour.
        error = error + np.where(v.error > 0, np.abs(value) * 2.0**-8, 0)
    if packed.activations == "int8":
        of_row = step(value, packed.group_size is None)
        if packed.activation_range is not None:
            low, high = limits(packed.activation_range)
            value, of_row = np.clip(value, low, high), (high - low) / 254
        # Half a step, where v times the reciprocal of the step is rounded before.
        error = error + (0.5 + 2.0**-14) * of_row
    magnitude = np.abs(weight)
    if packed.offsets is not None:
        by_group = layout.columns_from_panels(packed.offsets, packed.n, groups=True)
        by_group = np.repeat(np.abs(float64(by_group)), packed.group_size, 0)
        # scale · code and offset, which are summed up each on its own.
        magnitude = magnitude + 2 * (by_group if packed.permutation is None else by_group.max())
    bound = error @ magnitude + (k + 8) * U * ((np.abs(value) + error) @ magnitude)
    return Bounded(value @ weight, bound)


def step(v: np.ndarray, zero_point: bool) -> np.ndarray:
    """The scales (…, 1) of quantised rows."""
    if not zero_point:
        return np.abs(v).max(-1, keepdims=True, initial=0) / 127
    return (v.max(-1, keepdims=True, initial=0) - v.min(-1, keepdims=True, initial=0)) / 255


def limits(activation_range) -> tuple:
    low, high = np.asarray(activation_range)
    return np.minimum(low, 0), np.maximum(high, 0)


def in_range(x: np.ndarray, activation_range):
    """As `quantized`, of rows that have a range."""
    low, high = limits(activation_range)
    scale = np.maximum(high / np.float32(254) - low / np.float32(254), np.float32(2**-118))
    inverse = 1 / scale
    zero = np.rint(-low * inverse) - 127
    q = np.clip(np.rint(np.asarray(x, np.float32) * inverse) + zero, -127, 127)
    return q.astype(np.int64), scale, zero.astype(np.int64)


def quantized(x: np.ndarray, zero_point: bool):
    """q, scale and zero point of rows of float32, step by step as the kernel has them."""
    x = np.asarray(x, np.float32)
    if not zero_point:
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(2**-118))
        return np.clip(np.rint(x * (1 / scale)), -127, 127).astype(np.int64), scale, 0
    high = np.maximum(x.max(-1, keepdims=True), 0) / np.float32(255)
    low = np.minimum(x.min(-1, keepdims=True), 0)
    scale = np.maximum(high - low / np.float32(255), np.float32(2**-118))
    inverse = 1 / scale
    zero = np.rint(-low * inverse) - 128
    q = np.clip(np.rint(x * inverse) + zero, -128, 127)
    return q.astype(np.int64), scale, zero.astype(np.int64)


def dense(
    x,
    packed,
    bias=None,
    *,
    activation=None,
    gate=None,
    gate_bias=None,
    residual=None,
    norm=None,
    order=5,
) -> Bounded:
    """What `quake_jax.dense` of a packed weight is, before it is rounded to its dtype."""
    v = rows(x, norm)

    def affine(packed, bias):
        y = product(v, packed)
        return y if bias is None else y.plus(float64(bias))

    y = affine(packed, bias)
    if gate is None:
        y = y.through(activation, order)
    else:
        y = affine(gate, gate_bias).through(activation, order).times(y)
    return y if residual is None else y.plus(float64(residual))


def assert_close(actual, expected: Bounded) -> None:
    """Assert that a result differs by no more than the bound and its own rounding."""
    store = 0.0 if actual.dtype == jnp.float32 else float(jnp.finfo(actual.dtype).eps) / 2
    bound = expected.error + store * (np.abs(expected.value) + expected.error) + 2.0**-24 * store
    distance = np.abs(float64(actual) - expected.value)
    worst = np.unravel_index(np.argmax(distance - bound), distance.shape) if distance.size else ()
    assert (distance <= bound).all(), (
        f"at {worst}: {float64(actual)[worst]}, expected {expected.value[worst]} "
        f"within {bound[worst]}"
    )
