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

EPSILON = {"gpt2": 1e-5, "bert": 1e-12, "vit": 1e-6}


def _tensors(tree: Any) -> Any:
    return jax.tree.map(lambda array: peers.torch_tensor(np.array(array)), tree)


class _Linear:
    """A layer whose weights have torch's layout, (outputs, inputs); several side by side."""

    def __init__(self, *layers: dict[str, torch.Tensor], inputs: int):
        kernels = [layer["kernel"].reshape(inputs, -1) for layer in layers]
        self._kernel = torch.cat(kernels, dim=1).T.contiguous()
        self._bias = torch.cat([layer["bias"].reshape(-1) for layer in layers])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._kernel, self._bias)


def _norm(x: torch.Tensor, weights: dict[str, torch.Tensor], epsilon: float) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights["scale"], weights["bias"], epsilon)


class _Block:
    """A layer, with the norms before its parts (GPT-2, ViT) or after them (BERT)."""

    def __init__(self, case: Case, weights: dict[str, Any], cache: dict[str, Any]):
        self._case, self._norms = case, [weights[f"LayerNorm_{i}"] for i in (0, 1)]
        name, width = "MultiHeadDotProductAttention_0", case.sizes.width
        parts = [weights[name][part] for part in ("query", "key", "value")]
        self._project = _Linear(*parts, inputs=width)
        self._out = _Linear(weights[name]["out"], inputs=width)
        self._hidden = _Linear(weights["Mlp_0"]["Dense_0"], inputs=width)
        self._last = _Linear(weights["Mlp_0"]["Dense_1"], inputs=4 * width)
        cached = [cache[name][f"cached_{part}"] for part in ("key", "value")] if cache else []
        self._cache = [x.transpose(1, 2).contiguous() for x in cached]

    def __call__(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        (first, second), epsilon = self._norms, EPSILON[self._case.family]
        if self._case.family == "bert":
            x = _norm(x + self._attention(x, mask), first, epsilon)
            return _norm(x + self._mlp(x, "none"), second, epsilon)
        x = x + self._attention(_norm(x, first, epsilon), mask)
        return x + self._mlp(_norm(x, second, epsilon), "tanh")

    def _attention(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Of all positions to all, or with a cache of the last to those before it."""
        batch, length, width = x.shape
        split = self._project(x).view(batch, length, 3, self._case.sizes.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind()
        for kept, new in zip(self._cache, (key, value), strict=False):
            kept[:, :, -length:] = new
        key, value = self._cache or (key, value)
        causal = self._case.family == "gpt2" and not self._cache
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        )
        return self._out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _mlp(self, x: torch.Tensor, form: str) -> torch.Tensor:
        return self._last(functional.gelu(self._hidden(x), approximate=form))


class _Model:
    """A whole model: called, it gives the result of the Flax one."""

    def __init__(self, setting: Setting):
        case = self._case = setting.case
        weights, cache = _tensors(setting.parameters), _tensors(setting.cache)
        prefix = "PostNormBlock" if case.family == "bert" else "PreNormBlock"
        names = [f"{prefix}_{i}" for i in range(case.sizes.layers)]
        self._blocks = [_Block(case, weights.pop(name), cache.get(name, {})) for name in names]
        self._weights, self._inputs = weights, list(_tensors(setting.inputs))
        if case.family == "vit":
            patches = weights["patches"]
            patches["kernel"] = patches["kernel"].permute(3, 2, 0, 1).contiguous()
            self._inputs = [self._inputs[0].permute(0, 3, 1, 2).contiguous()]
            self._head = _Linear(weights["head"], inputs=case.sizes.width)
        else:
            self._inputs[0] = self._inputs[0].long()

    def __call__(self) -> torch.Tensor:
        return {"gpt2": self._gpt2, "bert": self._bert, "vit": self._vit}[self._case.family]()

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return _norm(x, self._weights["LayerNorm_0"], EPSILON[self._case.family])

    def _gpt2(self) -> torch.Tensor:
        tokens, positions = self._inputs
        words, places = (self._weights[name]["embedding"] for name in ("words", "places"))
        x = words[tokens] + places[positions.long()]
        for block in self._blocks:
            x = block(x)
        return functional.linear(self._normed(x[:, -1]), words)

    def _bert(self) -> torch.Tensor:
        tokens, is_token = self._inputs
        embeddings = (self._weights[name]["embedding"] for name in ("words", "places", "segments"))
        words, places, segments = embeddings
        x = self._normed(words[tokens] + places[: tokens.shape[1]] + segments[0])
        for block in self._blocks:
            x = block(x, is_token[:, None, None, :])
        if not self._case.pools:
            return x
        kept = is_token[..., None].to(x.dtype)
        return functional.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)

    def _vit(self) -> torch.Tensor:
        patches = self._weights["patches"]
        x = functional.conv2d(
            *self._inputs, patches["kernel"], patches["bias"], self._case.sizes.patch
        )
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self._weights["class"].expand(len(x), -1, -1), x], dim=1)
        x = x + self._weights["places"]
        for block in self._blocks:
            x = block(x)
        return self._head(self._normed(x[:, 0]))


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
