"""The error of `quake_jax.dot_product_attention` against attention in float64, and its bound.

`python -m quake_jax.accuracy` prints it; the inputs are named cases, some of them adversarial.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import quake_jax
from quake_jax._core.constants import MAX_REL_ERROR
from quake_jax.reference import MASKED_LOGIT

NAME = "dot_product_attention"
# Of float32 operands, by compute_dtype="int8"; elsewhere a dtype is that of the operands.
INT8 = "int8"
# Lengths and head sizes.
SHAPES = ((197, 64), (1024, 64), (197, 128), (1024, 128))
_HEADS, _KV_HEADS, _FEW_QUERIES = 2, 1, 37
# As docs/results/accuracy.md has it.
_DERIVATION = """\
Largest absolute error of the output against attention in float64 of the same (rounded) operands,
and in parentheses the largest share of its bound that the error of one element has. The bound of an
output o = Σ p v with weights p = w / Σ w:

- A weight has the relative error of the exponential, ε (`MAX_REL_ERROR["exp"]` of the order), and
  that of its logit, δ. Both count twice, in the weight and in the sum of all:
  2ε/(1 − ε) Σ p|v| + Σ p δ|v| + (Σ p δ)(Σ p|v|). The first term is at most 2ε/(1 − ε) max|v|.
- Rounding is float32's, u = 2^-24; n roundings in a row count 4√n u, as if they were random. δ has
  the products of H terms, relative to scale · Σ|q||k|, the sum with the bias, and the difference to
  the maximum, times log2 e. (Sums with ±1e30 and beyond absorb the logit in float64 too.) Both
  sums over S keys have 4√S u, relative to Σ p|v|. Every 64 keys the maximum may have grown, which
  costs the error of order 5 again.
- bfloat16 with AVX512_BF16 multiplies by weights that are rounded to bfloat16: 2^-8 Σ p|v| more.
  The bound of bfloat16 has this term on all machines.
- compute_dtype="int8" rounds query and key less c, the mean of the first 256 keys, to 127ths of
  their largest element, which moves a logit by at most
  γ = scale (max|q| Σ|k − c| + max|k − c| Σ|q| + H max|q| max|k − c| / 254) / 254,
  and a weight to 255ths of the row's largest, by at most 1/255 of that. Of the relative errors
  g = e^γ − 1 of weights and W, the sum of the weights relative to the largest one, the mean
  of the values moves by (Σ p g|v| + |o| Σ p g + (Σ|v| + S|o|)/(255 W)) / (1 − Σ p g − S/(255 W)),
  and never out of the range of the values; these are rounded by max|v|/254 of their column. The
  bound of int8 has these terms on all machines.
- The result is rounded to its dtype: 2^-8 |o| for bfloat16, 2^-11 |o| for float16.

Order 1 is coarse: the ratio of two weights can be wrong by 6 %. The errors of many weights average
out, those of two keys that compete do not. Where all weights are equal every order is exact but
for rounding. With logits of ±80 the rounding of the float32 logits is what counts at orders 4 and
5, as it is in jax.nn."""


@dataclasses.dataclass(frozen=True)
class AttentionAccuracy:
    """What was measured of one case, dtype and order, over all its shapes.

    Attributes:
      case, dtype, order, isa: Which.
      error: The largest absolute error of an output.
      bound: The bound of that output.
      share: The largest error as a share of the bound of the same output.
      shape: (queries, keys, head size) of that one.
      failures: What is wrong, in words; empty if every output keeps its bound.
    """

    case: str
    dtype: str
    order: int
    isa: str
    error: float
    bound: float
    share: float
    shape: tuple[int, int, int]
    failures: list[str]


# Cases: a function of (random generator, queries, keys, head size, dtype) that gives the operands.


def _normal(rng, t, s, h, dtype) -> dict:
    return {
        "query": rng.standard_normal((1, t, _HEADS, h)),
        "key": rng.standard_normal((1, s, _KV_HEADS, h)),
        "value": rng.standard_normal((1, s, _KV_HEADS, h)),
    }


def _large_logits(*arguments) -> dict:
    x = _normal(*arguments)
    logits = np.einsum("btnh,bskh->bnts", x["query"], x["key"]) / math.sqrt(x["query"].shape[-1])
    x["query"] *= 80 / np.abs(logits).max()
    return x


def _dominating_key(*arguments) -> dict:
    x = _normal(*arguments)
    # Ten above the others: these still have some weight.
    x["query"][..., 0] = x["key"][:, 5, :, 0] = math.sqrt(10 * math.sqrt(x["key"].shape[-1]))
    return x


def _peak(*arguments) -> dict:
    """One key has 40 % of the weight, and each of the others less than 1/500 of it."""
    x = _equal_keys(*arguments)
    x["query"][..., 0] = 1
    x["key"][:, 5, :, 0] += 6.5 * math.sqrt(x["key"].shape[-1])
    return x


def _far_keys(*arguments) -> dict:
    """What keys have in common is large beside what they differ by."""
    x = _normal(*arguments)
    x["key"] += 10 * np.cos(np.arange(x["key"].shape[-1]))
    return x


def _equal_keys(*arguments) -> dict:
    x = _normal(*arguments)
    x["key"][:] = x["key"][:, :1]
    return x


def _biased(lowest: Callable[[str], float], whole_row: bool) -> Callable:
    """A third of the biases is the lowest, of one query all if `whole_row`."""

    def case(rng, t, s, h, dtype) -> dict:
        bias = rng.standard_normal((1, _HEADS, t, s))
        bias[rng.random(bias.shape) < 1 / 3] = lowest(dtype)
        bias[..., 0] = 1  # no other row without a key
        if whole_row:
            bias[:, :, t // 2] = lowest(dtype)
        return {**_normal(rng, t, s, h, dtype), "bias": bias}

    return case


def _empty_rows(rng, t, s, h, dtype) -> dict:
    mask = rng.random((1, _HEADS, t, s)) < 0.5
    mask[:, :, ::3] = False
    return {**_normal(rng, t, s, h, dtype), "mask": mask}


def _nan_key(rng, t, s, h, dtype) -> dict:
    x = _normal(rng, t, s, h, dtype)
    x["mask"] = (np.arange(s) != s // 2)[None, None, None]
    x["key"][:, s // 2] = np.nan
    return x


def _nan_value(rng, t, s, h, dtype) -> dict:
    """In whole tiles that are masked."""
    x = _normal(rng, t, s, h, dtype)
    kept = s // 64 * 32
    x["mask"] = (np.arange(s) < kept)[None, None, None]
    x["value"][:, kept:] = np.nan
    return x


CASES: dict[str, Callable[..., dict]] = {
    "N(0, 1)": _normal,
    "logits of ±80": _large_logits,
    "one dominating key": _dominating_key,
    "all keys equal": _equal_keys,
    "one key above equal ones": _peak,
    "keys far from 0": _far_keys,
    "biases of -inf": _biased(lambda dtype: -math.inf, whole_row=False),
    "biases of finfo.min": _biased(lambda dtype: float(jnp.finfo(dtype).min), whole_row=True),
    "a mask with empty rows": _empty_rows,
    "NaN in a masked key": _nan_key,
    "NaN in masked values": _nan_value,
    "one query": lambda rng, t, s, h, dtype: _normal(rng, 1, s, h, dtype),
}


def dtypes(chosen: Sequence[str]) -> tuple[str, ...]:
    """What is measured of attention where the functions are measured in some dtypes."""
    return (*chosen, *((INT8,) if "float32" in chosen else ()))


def _stored(dtype: str) -> str:
    return "float32" if dtype == INT8 else dtype


def operands(case: str, dtype: str, queries: int, keys: int, size: int) -> dict[str, np.ndarray]:
    """The operands of a case, rounded to `dtype` (of INT8 float32); the same at each call."""
    dtype = _stored(dtype)
    seed = zlib.crc32(f"{case} {queries} {keys} {size}".encode())
    x = CASES[case](np.random.default_rng(seed), queries, keys, size, dtype)
    return {
        name: a if a.dtype == bool else np.asarray(a, np.float32).astype(jnp.dtype(dtype))
        for name, a in x.items()
    }


# The exact values and their bound.


def exact_and_bounds(
    x: dict[str, np.ndarray], dtype: str, orders: tuple[int, ...]
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Attention of a case in float64 and by order the bound of each output, (B, T, N, H)."""
    q, k, v = (np.asarray(x[name], np.float64) for name in ("query", "key", "value"))
    (_, _, heads, size), keys = q.shape, k.shape[1]
    k, v = (np.repeat(a, heads // a.shape[2], 2) for a in (k, v))
    scale, u = 1 / math.sqrt(size), 2.0**-24
    dots = scale * np.einsum("btnh,bsnh->bnts", q, k)
    terms = scale * np.einsum("btnh,bsnh->bnts", np.abs(q), np.abs(k))
    logits, kept = dots, np.ones(dots.shape, bool)
    if "bias" in x:
        bias = np.asarray(x["bias"], np.float64)
        logits, kept = dots + bias, np.abs(bias) < 1e30
    if "mask" in x:
        kept = np.broadcast_to(x["mask"], dots.shape)
        logits = np.where(kept, dots, MASKED_LOGIT)
        v = np.where(np.isnan(v), 0, v)  # only where no query keeps it
    largest = logits.max(-1, keepdims=True)
    p = np.exp(logits - largest)
    p /= p.sum(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        delta = 4 * math.sqrt(size + 2) * terms + 2 * np.abs(logits) + 3 * (largest - logits)
    # Where nothing is kept all logits are equal; without weight they do not matter.
    delta = u * np.where(kept & (p > 0), delta, 0)

    def times(weights, values):
        return np.einsum("bnts,bsnh->btnh", weights, values)

    magnitude = times(p, np.abs(v))
    mean_delta = (p * delta).sum(-1).transpose(0, 2, 1)[..., None]
    rounding = times(p * delta, np.abs(v)) + mean_delta * magnitude
    growths = -(-keys // 64) * MAX_REL_ERROR["exp"][5]
    rounding += (8 * math.sqrt(keys) * u + 2 * growths) * magnitude
    if dtype == "bfloat16":
        rounding += 2.0**-8 * magnitude
    exact = times(p, v)
    weights = np.exp(logits - largest).sum(-1)
    coding = _coding(scale * q, k) * (kept & (p > 0)) if dtype == INT8 else None
    dtype = _stored(dtype)
    store = 0.0 if dtype == "float32" else float(jnp.finfo(dtype).eps) / 2
    tiny = float(jnp.finfo(dtype).smallest_subnormal) if dtype == "float16" else 2.0**-126
    bounds = {}
    for order in orders:
        e = MAX_REL_ERROR["exp"][order]
        error = 2 * e / (1 - e) * magnitude + rounding
        if coding is not None:
            moved = _moved_by_codes(p, coding, v, exact, (1 - e) * weights)
            error += (1 + 2 * e / (1 - e)) * moved
        bounds[order] = error + store * (np.abs(exact) + error) + tiny
    return exact, bounds


def _coding(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """By how much int8 moves each logit at most, (B, N, T, S), of scaled queries."""
    q = np.abs(q).transpose(0, 2, 1, 3)[:, :, :, None]
    k = np.where(np.isnan(k), 0, k)
    k = np.abs(k - k[:, :256].mean(1, keepdims=True)).transpose(0, 2, 1, 3)[:, :, None]
    of_query, of_key = q.max(-1) / 254, k.max(-1) / 254
    # The centre and the scales are float32's.
    both = q.shape[-1] * of_query * of_key
    return (1 + 2.0**-16) * (of_query * k.sum(-1) + of_key * q.sum(-1) + both)


def _moved_by_codes(p, coding, v, exact, weights) -> np.ndarray:
    """By how much int8 moves each output, (B, T, N, H)."""
    relative = p * np.expm1(np.minimum(coding, 100))
    rounding = 1 / (255 * weights)  # (B, N, T)
    sums = [x.transpose(0, 2, 1)[..., None] for x in (relative.sum(-1), rounding)]
    of_values = np.abs(v).sum(1)[:, None]
    moved = np.einsum("bnts,bsnh->btnh", relative, np.abs(v)) + np.abs(exact) * sums[0]
    moved += (of_values + v.shape[1] * np.abs(exact)) * sums[1]
    left = 1 - sums[0] - v.shape[1] * sums[1]
    most = np.maximum(v.max(1)[:, None] - exact, exact - v.min(1)[:, None])
    moved = np.where(left > 0, np.minimum(moved / np.where(left > 0, left, 1), most), most)
    return moved + np.abs(v).max(1)[:, None] / 254


def measure(
    case: str, dtype: str, *, orders: tuple[int, ...], shapes: tuple | None = None
) -> list[AttentionAccuracy]:
    """Measure attention of a case with the instruction set in use, by order.

    Args:
      case: One of CASES.
      dtype: "float32", "bfloat16", "float16" or INT8.
      orders: The orders to measure.
      shapes: Pairs of a length and a head size; SHAPES if None.

    Returns:
      One `AttentionAccuracy` for each order.
    """
    worst: dict[int, dict] = {order: {"error": -1.0, "share": -1.0} for order in orders}
    failures: dict[int, list[str]] = {order: [] for order in orders}
    for length, size in SHAPES if shapes is None else shapes:
        for queries in (length, _FEW_QUERIES) if length <= 256 else (length,):
            x = operands(case, dtype, queries, length, size)
            exact, bounds = exact_and_bounds(x, dtype, orders)
            shape = (x["query"].shape[1], length, size)
            for order, y in _results(x, orders, INT8 if dtype == INT8 else None):
                _compare(y, exact, bounds[order], shape, worst[order], failures[order])
    isa = quake_jax.isa()
    return [
        AttentionAccuracy(case, dtype, order, isa, failures=failures[order], **worst[order])
        for order in orders
    ]


def _results(
    x: dict, orders: tuple[int, ...], compute_dtype: str | None
) -> Iterator[tuple[int, np.ndarray]]:
    attend = functools.partial(quake_jax.dot_product_attention, **x, compute_dtype=compute_dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        for order in orders:
            yield order, np.asarray(attend(order=order), np.float64)


def _compare(y, exact, bound, shape, worst: dict, failures: list[str]) -> None:
    error = np.abs(y - exact)
    error[np.isnan(y)] = np.inf
    share = error / bound
    at = np.unravel_index(share.argmax(), share.shape)
    if share[at] > 1:
        failures.append(
            f"T, S, H = {shape}: error {error[at]:.3g} exceeds {bound[at]:.3g}: got {y[at]:.9g}, "
            f"wanted {exact[at]:.9g}"
        )
    if share[at] > worst["share"]:
        worst.update(share=float(share[at]), shape=shape)
    largest = np.unravel_index(error.argmax(), error.shape)
    if error[largest] > worst["error"]:
        worst.update(error=float(error[largest]), bound=float(bound[largest]))


# What is printed.


def summary(results: list[AttentionAccuracy]) -> str:
    """One line for the cases of a dtype and order."""
    worst = max(results, key=lambda r: r.share)
    error = max(r.error for r in results)
    return (
        f"{NAME} {worst.dtype:<8} order {worst.order}: absolute error {error:.3e} in "
        f"{len(results)} cases; {100 * worst.share:.0f} % of the bound at worst: {worst.case}, "
        f"T, S, H = {worst.shape} ({worst.isa})"
    )


def markdown(results: list[AttentionAccuracy]) -> list[str]:
    """The section of docs/results/accuracy.md."""
    isas = ", ".join(dict.fromkeys(r.isa for r in results))
    lengths = ", ".join(f"{t} with {h}" for t, h in SHAPES)
    lines = [
        "## Attention",
        "",
        *_DERIVATION.splitlines(),
        "",
        f"Instruction set: {isas}. Lengths with head sizes: {lengths}; {_FEW_QUERIES} queries of "
        f"the short ones too. {_HEADS} query heads, {_KV_HEADS} key head.",
        "",
    ]
    for dtype in dict.fromkeys(r.dtype for r in results):
        of_dtype = [r for r in results if r.dtype == dtype]
        orders = sorted({r.order for r in of_dtype})
        products = ' with compute_dtype="int8"' if dtype == INT8 else ""
        lines += [f"### {_stored(dtype)}{products}", ""]
        lines.append("| inputs | " + " | ".join(f"order {order}" for order in orders) + " |")
        lines.append("|" + "---|" * (1 + len(orders)))
        for case in dict.fromkeys(r.case for r in of_dtype):
            by_order = {r.order: r for r in of_dtype if r.case == case}
            cells = [_cell(by_order[order]) for order in orders]
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _cell(result: AttentionAccuracy) -> str:
    mark = " **fails**" if result.failures else ""
    return f"{result.error:.2g} ({100 * result.share:.0f} %){mark}"
