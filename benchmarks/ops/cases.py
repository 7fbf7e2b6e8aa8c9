"""Which operators, dtypes and shapes are measured; the names used on the command line and in JSON.

The shapes sit in the second-level cache, about in the third-level cache, and in main memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ops.operators import BIASED, BINARY, GATED, HALVED, OPERATORS, REDUCTION, Operator

DTYPES = ("float32", "bfloat16", "float16")
ORDERS = (1, 2, 3, 4, 5)
DEFAULT_ORDERS = (1, 2, 3, 5)
SUBJECT_ORDER = 3  # the one that tables and most bars are about

L2_SHAPE = (128, 1024)
L2_SHAPE_OF_TWO = (64, 1024)  # two arrays in and one out
VIT_SHAPE = (8, 12, 197, 197)  # attention weights of ViT-B/16, batch 8
VOCABULARY_SHAPE = (64, 50257)  # logits of GPT-2
GPT_SHAPE = (4, 12, 1024, 1024)  # attention weights of GPT-2 small, batch 4
QUICK_SHAPE = (16, 256)

# By the bytes of float32, in and out; L2 (1 MB a core) depends on the function: `l2_shape`.
LEVELS = {VIT_SHAPE: "L3", VOCABULARY_SHAPE: "L3", GPT_SHAPE: "DRAM"}

ROUNDS = 15
# A reading of main memory is one call of up to a fifth of a second.
DRAM_ROUNDS = 7
DRAM_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Case:
    """One operator at one shape: that of its result, or what logsumexp reduces."""

    function: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def operator(self) -> Operator:
        return OPERATORS[self.function]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        kind = self.operator.kind
        if kind == HALVED:
            return ((*self.shape[:-1], 2 * self.shape[-1]),)
        if kind == BIASED:
            return self.shape, self.shape[-1:]
        if kind in (GATED, BINARY):
            return self.shape, self.shape
        return (self.shape,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.shape[:-1] if self.function == "logsumexp" else self.shape

    @property
    def traffic(self) -> float:
        """Elements read and written, relative to a copy of an array of `shape`."""
        arrays = (*self.operand_shapes, self.out_shape)
        return sum(math.prod(shape) for shape in arrays) / (2 * self.elements)

    @property
    def level(self) -> str:
        """Where the arrays sit; empty for a shape of the user's."""
        return "L2" if self.shape == l2_shape(self.function) else LEVELS.get(self.shape, "")

    def __str__(self) -> str:
        return f"{self.function} {'×'.join(map(str, self.shape))} {self.dtype}"

    def described(self) -> dict:
        """What a result says of it."""
        return {"function": self.function, "shape": list(self.shape), "dtype": self.dtype}


def l2_shape(function: str) -> tuple[int, ...]:
    """The shape at which a function's arrays fill the second-level cache."""
    of_two = OPERATORS[function].kind in (GATED, HALVED, BINARY)
    return L2_SHAPE_OF_TWO if of_two else L2_SHAPE


def choose(
    functions: Sequence[str], dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]] | None
) -> list[Case]:
    """List the cases of a run; without shapes, each function has its own."""
    return [
        Case(function, tuple(shape), dtype)
        for dtype in dtypes
        for function in functions
        for shape in shapes or _shapes(function)
    ]


def _shapes(function: str) -> list[tuple[int, ...]]:
    operator = OPERATORS[function]
    return [
        l2_shape(function),
        *([VIT_SHAPE] if "L3" in operator.beyond else []),
        *([VOCABULARY_SHAPE] if operator.kind == REDUCTION else []),
        *([GPT_SHAPE] if "DRAM" in operator.beyond else []),
    ]


def orders(case: Case) -> tuple[int, ...]:
    """The orders measured by default; all of them where the default order is decided."""
    return ORDERS if decides(case.function, case.shape, case.dtype) else DEFAULT_ORDERS


def decides(function: str, shape: Sequence[int], dtype: str) -> bool:
    """Whether a case decides the default order of its function (`defaults`)."""
    return dtype == "float32" and tuple(shape) == l2_shape(function)


def rounds(case: Case) -> int:
    """The number of interleaved rounds by default."""
    return DRAM_ROUNDS if case.elements >= DRAM_ELEMENTS else ROUNDS
