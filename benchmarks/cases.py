"""Which operators, dtypes and shapes are measured; the names used on the command line and in JSON.

The shapes sit in the second-level cache, about in the third-level cache, and in main memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FUNCTIONS = ("softmax", "exp", "sigmoid", "silu", "tanh", "gelu_tanh", "gelu_erf")
DTYPES = ("float32", "bfloat16", "float16")
ORDERS = (1, 2, 3, 4, 5)
DEFAULT_ORDERS = (1, 2, 3, 5)

L2_SHAPE = (128, 1024)
VIT_SHAPE = (8, 12, 197, 197)  # attention weights of ViT-B/16, batch 8
GPT_SHAPE = (4, 12, 1024, 1024)  # attention weights of GPT-2 small, batch 4
QUICK_SHAPE = (16, 256)


@dataclass(frozen=True)
class Case:
    """One operator on one array."""

    function: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        return f"{self.function} {'×'.join(map(str, self.shape))} {self.dtype}"


def choose(
    functions: Sequence[str], dtypes: Sequence[str], shapes: Sequence[tuple[int, ...]] | None
) -> list[Case]:
    """List the cases of a run; without shapes, the large one is measured for softmax only."""
    cases = []
    for dtype in dtypes:
        for function in functions:
            large = (GPT_SHAPE,) if function == "softmax" else ()
            for shape in shapes or (L2_SHAPE, VIT_SHAPE, *large):
                cases.append(Case(function, tuple(shape), dtype))
    return cases
