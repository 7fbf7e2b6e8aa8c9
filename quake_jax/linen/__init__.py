"""Flax Linen on quake_jax's kernels: an interceptor for models as they are, `attention_fn` for
attention modules, and modules with the parameter trees of Flax's.

Importing this imports no Flax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quake_jax._flax.substitutes import require_flax
from quake_jax.linen._attention_fn import attention_fn as attention_fn
from quake_jax.linen._interceptor import interceptor as interceptor
from quake_jax.linen._interceptor import substitute as substitute

if TYPE_CHECKING:
    from quake_jax.linen._modules import MlpBlock as MlpBlock
    from quake_jax.linen._modules import MultiHeadAttention as MultiHeadAttention
    from quake_jax.linen._modules import (
        MultiHeadDotProductAttention as MultiHeadDotProductAttention,
    )
    from quake_jax.linen._modules import SelfAttention as SelfAttention
    from quake_jax.linen._modules import TransformerDecoderBlock as TransformerDecoderBlock
    from quake_jax.linen._modules import TransformerEncoderBlock as TransformerEncoderBlock

# Subclasses of Flax's modules, which take Flax to define.
_MODULES = (
    "MlpBlock",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "TransformerDecoderBlock",
    "TransformerEncoderBlock",
)

__all__ = ["attention_fn", "interceptor", "substitute", *_MODULES]


def __getattr__(name: str):
    if name in _MODULES:
        require_flax(f"quake_jax.linen.{name}")
        from quake_jax.linen import _modules

        return getattr(_modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
