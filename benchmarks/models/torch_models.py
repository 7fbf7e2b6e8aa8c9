"""The same models in eager torch, on the weights of the Flax ones, as torch's users write them:
one product for query, key and value, scaled_dot_product_attention, torch's layouts.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

from benchmarks.harness import peers
from benchmarks.harness.peers import TORCH
from benchmarks.models import memory
from benchmarks.models.cases import Case
from benchmarks.models.systems import Setting, System


def _tensor(array: jax.Array) -> torch.Tensor:
    return peers.torch_tensor(np.array(array))


class _Linear:
    """A layer whose weights have torch's layout: (outputs, inputs)."""

    def __init__(self, kernel: torch.Tensor, bias: torch.Tensor):
        self._kernel, self._bias = kernel.T.contiguous(), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._kernel, self._bias)


class _Norm:
    """A LayerNorm."""

    def __init__(self, weights: dict[str, Any], epsilon: float):
        self._scale, self._bias, self._epsilon = weights["scale"], weights["bias"], epsilon

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self._scale.shape, self._scale, self._bias, self._epsilon)


class _Attention:
    """Attention of all positions to all, or with a cache of the last to those before it."""

    def __init__(self, weights: dict[str, Any], cache: dict[str, Any] | None):
        parts = [weights[name] for name in ("query", "key", "value")]
        width, self._heads, self._head_size = parts[0]["kernel"].shape
        self._project = _Linear(
            torch.cat([part["kernel"].reshape(width, -1) for part in parts], dim=1),
            torch.cat([part["bias"].reshape(-1) for part in parts]),
        )
        self._out = _Linear(weights["out"]["kernel"].reshape(-1, width), weights["out"]["bias"])
        self._cache = None
        if cache is not None:
            cached = (cache["cached_key"], cache["cached_value"])
            self._cache = [x.transpose(1, 2).contiguous() for x in cached]

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
        batch, length, width = x.shape
        split = self._project(x).view(batch, length, 3, self._heads, self._head_size)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        if self._cache is not None:
            for kept, new in zip(self._cache, (key, value), strict=True):
                kept[:, :, -length:] = new
            (key, value), causal = self._cache, False
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        )
        return self._out(mixed.transpose(1, 2).reshape(batch, length, width))


class _Block:
    """A layer, with the norms before its parts (GPT-2, ViT) or after them (BERT)."""

    def __init__(self, case: Case, weights: dict[str, Any], cache: dict[str, Any] | None):
        self._after = case.family == "bert"
        self._causal = case.family == "gpt2"
        epsilon = {"gpt2": 1e-5, "bert": 1e-12, "vit": 1e-6}[case.family]
        name = "MultiHeadDotProductAttention_0"
        self._attention = _Attention(weights[name], None if cache is None else cache[name])
        self._norms = [_Norm(weights[f"LayerNorm_{i}"], epsilon) for i in (0, 1)]
        mlp = [weights["Mlp_0"][f"Dense_{i}"] for i in (0, 1)]
        self._dense = [_Linear(layer["kernel"], layer["bias"]) for layer in mlp]

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        first, second = self._norms
        if self._after:
            x = first(x + self._attention(x, mask, self._causal))
            return second(x + self._mlp(x))
        x = x + self._attention(first(x), mask, self._causal)
        return x + self._mlp(second(x))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        form = "none" if self._after else "tanh"
        return self._dense[1](functional.gelu(self._dense[0](x), approximate=form))


class _Model:
    """A whole model: called, it gives the result of the Flax one."""

    def __init__(self, setting: Setting):
        case = self._case = setting.case
        self._weights = jax.tree.map(_tensor, setting.parameters)
        cache = jax.tree.map(_tensor, setting.cache)
        prefix = "PostNormBlock" if case.family == "bert" else "PreNormBlock"
        names = [f"{prefix}_{i}" for i in range(case.sizes.layers)]
        self._blocks = [
            _Block(case, self._weights.pop(name), cache[name] if cache else None) for name in names
        ]
        self._inputs = list(map(_tensor, setting.inputs))
        if case.family == "vit":
            layer = self._weights["patches"]
            layer["kernel"] = layer["kernel"].permute(3, 2, 0, 1).contiguous()
            self._inputs = [self._inputs[0].permute(0, 3, 1, 2).contiguous()]
            self._head = _Linear(*(self._weights["head"][name] for name in ("kernel", "bias")))
        else:
            self._inputs[0] = self._inputs[0].long()

    def __call__(self) -> torch.Tensor:
        return {"gpt2": self._gpt2, "bert": self._bert, "vit": self._vit}[self._case.family]()

    def _norm(self, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        return _Norm(self._weights["LayerNorm_0"], epsilon)(x)

    def _gpt2(self) -> torch.Tensor:
        tokens, positions = self._inputs
        words, places = (self._weights[name]["embedding"] for name in ("words", "places"))
        x = words[tokens] + places[positions.long()]
        for block in self._blocks:
            x = block(x, None)
        return functional.linear(self._norm(x[:, -1], 1e-5), words)

    def _bert(self) -> torch.Tensor:
        tokens, is_token = self._inputs
        embeddings = (self._weights[name]["embedding"] for name in ("words", "places", "segments"))
        words, places, segments = embeddings
        x = words[tokens] + places[: tokens.shape[1]] + segments[0]
        x = self._norm(x, 1e-12)
        for block in self._blocks:
            x = block(x, is_token[:, None, None, :])
        if not self._case.pools:
            return x
        kept = is_token[..., None].to(x.dtype)
        return functional.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)

    def _vit(self) -> torch.Tensor:
        (images,) = self._inputs
        layer = self._weights["patches"]
        x = functional.conv2d(images, layer["kernel"], layer["bias"], self._case.sizes.patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self._weights["class"].expand(len(x), -1, -1), x], dim=1)
        x = x + self._weights["places"]
        for block in self._blocks:
            x = block(x, None)
        return self._head(self._norm(x[:, 0], 1e-6))


def build(setting: Setting, threads: int) -> System:
    """Convert the weights and run the model once."""
    torch.set_num_threads(threads)
    model = _Model(setting)

    def run(calls: int) -> None:
        with torch.inference_mode():
            for _ in range(calls):
                model()

    with torch.inference_mode():
        model()  # torch loads its code when it needs it: that memory is not the model's
        first, grown = memory.growth(model)
    return System(TORCH, run, first.float().numpy(), grown)
