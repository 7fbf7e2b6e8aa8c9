"""Which shapes, masks and dtypes of attention are measured, and the work that each one needs.

A shape is written `B,T,N,H`: batch, length, heads and head size; `1-4096` for T is one query
against 4096 keys, and `32/8` for N is 32 query heads that share 8 key/value heads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# "causal array" is the causal mask as an array of booleans.
MASKS = ("none", "causal", "padding", "bias", "causal array")
# One query against a cache of `quake_jax.kv_cache`, in the place of a mask: the cache's dtype.
CACHES = {f"{dtype} cache": dtype for dtype in ("float32", "bfloat16", "int8")}
# No float16: jax.nn.dot_product_attention refuses it on CPU.
DTYPES = ("float32", "bfloat16")
ORDERS = (1, 2, 3, 4, 5)
DEFAULT_ORDERS = (3, 5)
SUBJECT_ORDER = 5  # the default, which tables and bars are about
# Ours of float32 with a compute_dtype, and the default order of that.
PRODUCTS = {f"{dtype} products": dtype for dtype in ("bfloat16", "int8")}

ROUNDS = 9
# Above this much work one call is a reading: at 300 GFLOP/s it takes at least 7 ms.
LONG_FLOPS = 2e9
# XLA takes seconds for one call of this much: see `rounds`.
HUGE_FLOPS, HUGE_ROUNDS = 2e10, 3
MOST_GFLOPS = 300  # no core is faster: gives the shortest time that a call can take


@dataclass(frozen=True)
class Shape:
    """The lengths of one attention, as in `jax.nn.dot_product_attention` (BTNH, BSKH)."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_size: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `B,T,N,H`, `B,T-S,N,H` or `B,T,N/K,H`; ValueError if the text is none of these, a
        number is 0, or K does not divide N.
        """
        found = re.fullmatch(r"(\d+),(\d+)(?:-(\d+))?,(\d+)(?:/(\d+))?,(\d+)", text)
        if not found:
            raise ValueError(text)
        batch, queries, keys, heads, kv_heads, head_size = found.groups()
        numbers = batch, queries, keys or queries, heads, kv_heads or heads, head_size
        shape = cls(*map(int, numbers))
        if min(map(int, numbers)) < 1 or shape.heads % shape.kv_heads:
            raise ValueError(text)
        return shape

    @property
    def text(self) -> str:
        keys = f"-{self.keys}" if self.keys != self.queries else ""
        shared = f"/{self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{self.batch},{self.queries}{keys},{self.heads}{shared},{self.head_size}"

    @property
    def decodes(self) -> bool:
        """Whether reading the keys and values is the work."""
        return self.queries == 1

    @property
    def query_shape(self) -> tuple[int, ...]:
        return self.batch, self.queries, self.heads, self.head_size

    @property
    def key_shape(self) -> tuple[int, ...]:
        return self.batch, self.keys, self.kv_heads, self.head_size

    @property
    def flops(self) -> float:
        """Additions and multiplications of both products, without a mask."""
        pairs = self.batch * self.heads * self.queries * self.keys
        return 4.0 * pairs * self.head_size


VIT, VIT_BATCH = Shape.parse("1,197,12,64"), Shape.parse("8,197,12,64")
BERT = Shape.parse("8,384,12,64")
GPT, LONG = Shape.parse("1,1024,12,64"), Shape.parse("1,4096,12,64")
SMALL = Shape.parse("32,128,12,32")
GROUPED = Shape.parse("1,2048,32/8,128")
DECODE = Shape.parse("1,1-4096,12,64")
SHAPES = (VIT, VIT_BATCH, BERT, GPT, LONG, SMALL, GROUPED, DECODE)
QUICK_SHAPE = Shape.parse("2,48,4/2,32")


@dataclass(frozen=True)
class Case:
    """Attention at one shape with one kind of mask."""

    shape: Shape
    mask: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape.text} {self.dtype} {self.mask}"

    def described(self) -> dict[str, str]:
        """What a result says of it."""
        return {"shape": self.shape.text, "mask": self.mask, "dtype": self.dtype}

    @property
    def key_lengths(self) -> list[int]:
        """With padding, how many keys count in each row of the batch: from half to all of them."""
        keys, batch = self.shape.keys, self.shape.batch
        if batch == 1:
            return [max(1, 3 * keys // 4)]
        return [max(1, keys // 2 + (keys - keys // 2) * b // (batch - 1)) for b in range(batch)]

    @property
    def flops(self) -> float:
        """Additions and multiplications of the products that the mask leaves."""
        shape = self.shape
        pairs = shape.batch * shape.queries * shape.keys
        if self.mask == "padding":
            pairs = shape.queries * sum(self.key_lengths)
        elif self.mask.startswith("causal"):
            pairs = shape.batch * sum(min(t + 1, shape.keys) for t in range(shape.queries))
        return 4.0 * shape.heads * shape.head_size * pairs

    @property
    def bytes_read(self) -> float:
        """Bytes of the keys and values, and of the scales of int8."""
        shape = self.shape
        size = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / shape.head_size}[self.stored]
        rows = sum(self.key_lengths) if self.mask == "padding" else shape.batch * shape.keys
        return 2.0 * size * rows * shape.kv_heads * shape.head_size

    @property
    def stored(self) -> str:
        """The dtype of keys and values."""
        return CACHES.get(self.mask, self.dtype)

    @property
    def references(self) -> dict[str, Case]:
        """The cases to whose time that of this one is compared, by the key in the result."""
        found = {"none": replace(self, mask="none")} if self.mask != "none" else {}
        if self.mask == "causal array":
            found["causal"] = replace(self, mask="causal")
        if self.dtype != "float32":
            found["float32"] = replace(self, dtype="float32")
        return found


def masks(shape: Shape) -> tuple[str, ...]:
    """The masks measured by default: with one query, causal would leave it the first key alone."""
    if shape.decodes:
        return *(mask for mask in MASKS if not mask.startswith("causal")), *CACHES
    # What an array costs over is_causal is asked of the long ones.
    return MASKS if shape in (GPT, LONG) else MASKS[:-1]


def choose(shape: Shape, dtypes: list[str], wanted: list[str] | None) -> list[Case]:
    """The cases of one shape, which are measured in the same rounds."""
    chosen = [mask for mask in (*MASKS, *CACHES) if mask in (wanted or masks(shape))]
    dtypes = [dtype for dtype in DTYPES if dtype in dtypes]
    return [Case(shape, mask, d) for d in dtypes for mask in chosen if _makes_sense(shape, mask, d)]


def _makes_sense(shape: Shape, mask: str, dtype: str) -> bool:
    """Whether a case is one: a cache is decoded from, and has queries of float32 here."""
    if shape.decodes:
        return dtype == "float32" if mask in CACHES else not mask.startswith("causal")
    return mask not in CACHES


def rounds(shape: Shape) -> int:
    """The number of interleaved rounds by default."""
    return HUGE_ROUNDS if shape.flops > HUGE_FLOPS else ROUNDS
