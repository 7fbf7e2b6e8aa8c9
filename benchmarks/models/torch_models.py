"""The same models in torch, on the weights of the Flax ones, as torch's users write them: one
product for query, key and value, scaled_dot_product_attention, torch's layouts. Eager or compiled,
or converted for OpenVINO, with the weights in 32, 16, 8 or 4 bits.
"""

import contextlib
import io
import logging
from types import ModuleType
from typing import Any

import jax
import numpy as np
import torch
from torch.nn import functional

from benchmarks.harness import peers
from benchmarks.harness.peers import TORCH
from benchmarks.models import memory
from benchmarks.models.cases import EPSILON, Case
from benchmarks.models.systems import Setting, System


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def _tensors(tree: Any, dtype: torch.dtype) -> Any:
    """A tree of arrays as tensors: floating point in one dtype."""

    def tensor(array):
        made = peers.torch_tensor(np.array(array))
        return made.to(dtype) if made.is_floating_point() else made

    return jax.tree.map(tensor, tree)


def _module(tree: Any) -> torch.nn.Module:
    """A tree of tensors as a module: compilers take what modules have for constants."""
    made = torch.nn.ParameterDict()
    for name, value in tree.items():
        made[name] = _module(value) if isinstance(value, dict) else _frozen(value)
    return made


class _Linear(torch.nn.Module):
    """A layer whose weights have torch's layout, (outputs, inputs); several side by side."""

    def __init__(self, *layers: dict[str, torch.Tensor], inputs: int):
        super().__init__()
        kernels = [layer["kernel"].reshape(inputs, -1) for layer in layers]
        self._kernel = _frozen(torch.cat(kernels, dim=1).T.contiguous())
        self._bias = _frozen(torch.cat([layer["bias"].reshape(-1) for layer in layers]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._kernel, self._bias)


def _norm(x: torch.Tensor, weights: dict[str, torch.Tensor], epsilon: float) -> torch.Tensor:
    return functional.layer_norm(x, x.shape[-1:], weights["scale"], weights["bias"], epsilon)


class _Block(torch.nn.Module):
    """A layer, with the norms before its parts (GPT-2, ViT) or after them (BERT)."""

    def __init__(self, case: Case, weights: dict[str, Any], cache: dict[str, Any]):
        super().__init__()
        self._case = case
        self._norms = torch.nn.ModuleList(_module(weights[f"LayerNorm_{i}"]) for i in (0, 1))
        name, width = "MultiHeadDotProductAttention_0", case.sizes.width
        parts = [weights[name][part] for part in ("query", "key", "value")]
        self._project = _Linear(*parts, inputs=width)
        self._out = _Linear(weights[name]["out"], inputs=width)
        self._hidden = _Linear(weights["Mlp_0"]["Dense_0"], inputs=width)
        self._last = _Linear(weights["Mlp_0"]["Dense_1"], inputs=4 * width)
        cached = [cache[name][f"cached_{part}"] for part in ("key", "value")] if cache else []
        self.cache = [x.transpose(1, 2).contiguous() for x in cached]
        self.order: torch.Tensor | None = None  # of the rows of a cache that grows, else it is full

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
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
        if self.order is not None:
            past = [kept.index_select(0, self.order) for kept in self.cache]
            self.cache = [torch.cat(x, dim=2) for x in zip(past, (key, value), strict=True)]
        else:
            for kept, new in zip(self.cache, (key, value), strict=False):
                kept[:, :, -length:] = new
        key, value = self.cache or (key, value)
        causal = self._case.family == "gpt2" and not self.cache
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        )
        return self._out(mixed.transpose(1, 2).reshape(batch, length, width))

    def _mlp(self, x: torch.Tensor, form: str) -> torch.Tensor:
        return self._last(functional.gelu(self._hidden(x), approximate=form))


class _Model(torch.nn.Module):
    """A whole model: called with `inputs`, it gives the result of the Flax one."""

    def __init__(self, setting: Setting, dtype: torch.dtype):
        super().__init__()
        case = self._case = setting.case
        weights = _tensors(setting.parameters, dtype)
        cache = _tensors(setting.cache, dtype)
        names = [f"TransformerBlock_{i}" for i in range(case.sizes.layers)]
        blocks = (_Block(case, weights.pop(name), cache.get(name, {})) for name in names)
        self.blocks = torch.nn.ModuleList(blocks)
        self.inputs = list(_tensors(setting.inputs, dtype))
        if case.family == "vit":
            patches = weights["patches"]
            patches["kernel"] = patches["kernel"].permute(3, 2, 0, 1).contiguous()
            self.inputs = [self.inputs[0].permute(0, 3, 1, 2).contiguous()]
            self._head = _Linear(weights.pop("head"), inputs=case.sizes.width)
        else:
            self.inputs = [x if x.dtype == torch.bool else x.long() for x in self.inputs]
        self._weights = _module(weights)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        form = {"gpt2": self._gpt2, "bert": self._bert, "vit": self._vit}[self._case.family]
        return form(*inputs)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return _norm(x, self._weights["LayerNorm_0"], EPSILON[self._case.family])

    def _gpt2(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        words, places = (self._weights[name]["embedding"] for name in ("words", "places"))
        x = words[tokens] + places[positions]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self._normed(x[:, -1]), words)

    def _bert(self, tokens: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
        embeddings = (self._weights[name]["embedding"] for name in ("words", "places", "segments"))
        words, places, segments = embeddings
        x = self._normed(words[tokens] + places[: tokens.shape[1]] + segments[0])
        for block in self.blocks:
            x = block(x, is_token[:, None, None, :])
        if not self._case.pools:
            return x
        kept = is_token[..., None].to(x.dtype)
        return functional.normalize((x * kept).sum(1) / kept.sum(1), dim=-1)

    def _vit(self, images: torch.Tensor) -> torch.Tensor:
        patches = self._weights["patches"]
        x = functional.conv2d(images, patches["kernel"], patches["bias"], self._case.sizes.patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self._weights["class"].expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self._weights["places"]
        for block in self.blocks:
            x = block(x)
        return self._head(self._normed(x[:, 0]))


_compiled: list[Case] = []  # of which models are compiled


def build(setting: Setting, name: str, threads: int) -> System:
    """Convert the weights and run the model once, eager or compiled."""
    torch.set_num_threads(threads)
    precision = "bfloat16" if "bfloat16" in name else setting.case.dtype
    model = _Model(setting, getattr(torch, precision))
    inputs = model.inputs
    if name not in (TORCH, "torch-bfloat16"):
        from torch._inductor import config

        if _compiled != [setting.case]:  # few recompilations are allowed, and they keep weights
            torch._dynamo.reset()
            _compiled[:] = [setting.case]
        config.freezing = True
        backend = "zentorch" if name.startswith("zentorch") else "inductor"
        model = torch.compile(model, backend=backend)

    def run(calls: int) -> None:
        with torch.inference_mode():
            for _ in range(calls):
                model(*inputs)

    run(1)  # torch loads its code when it needs it: that memory is not the model's
    with torch.inference_mode():
        first, grown = memory.growth(lambda: model(*inputs))
    return System(name, run, first.float().numpy(), grown)


# --- OpenVINO


class _Growing(torch.nn.Module):
    """A decoding model as OpenVINO takes it: its cache comes and goes, one token longer."""

    def __init__(self, model: _Model):
        super().__init__()
        self._model = model

    def forward(self, tokens, positions, order, *cache):
        blocks = self._model.blocks
        for i, block in enumerate(blocks):
            block.order, block.cache = order, list(cache[2 * i : 2 * i + 2])
        return (self._model(tokens, positions), *(x for block in blocks for x in block.cache))


# After so many tokens the cache starts over, half of them shorter than the case says.
DECODED = 32


def build_openvino(setting: Setting, name: str, threads: int) -> System:
    """Convert the model for OpenVINO, and its weights by NNCF, and run it once."""
    import openvino

    model = _Model(setting, torch.float32)
    inputs, caches = [x.numpy() for x in model.inputs], []
    if setting.case.decodes:
        caches = [x[:, :, :-1] for block in model.blocks for x in block.cache]
        given = [*model.inputs, torch.zeros(len(model.inputs[0]), dtype=torch.int32), *caches]
        inputs.append(given[2].numpy())
        converted = _with_state(openvino, _Growing(model), given)
    else:
        converted = openvino.convert_model(model, example_input=tuple(model.inputs))
        converted.reshape(
            {x: array.shape for x, array in zip(converted.inputs, inputs, strict=True)}
        )
    converted = _compressed(converted, name, inputs)
    precision = "bf16" if "bfloat16" in name else "f32"
    options = peers.openvino_options(threads, precision) | {
        # Its default is 8 bits, which GPT-2's decoding does not bear.
        "KV_CACHE_PRECISION": precision,
        # As large as makes a whole number of groups of every layer here, and of the weights' own.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if "int4" in name else 64,
    }
    request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
    for i, array in enumerate(inputs):
        request.set_input_tensor(i, openvino.Tensor(np.ascontiguousarray(array)))

    def start(length: int) -> None:
        states = {state.name: state for state in request.query_state()}
        for i, cache in enumerate(caches):
            kept = openvino.Tensor(cache[:, :, :length].contiguous().numpy())
            states[f"cache{i}grown{i}"].state = kept

    decoded = 0

    def run(calls: int) -> None:
        nonlocal decoded
        # The stopwatch makes one call before each reading: there is time to start over.
        if calls == 1 and decoded > DECODED:
            start(setting.case.length - 1 - DECODED // 2)
            decoded = 0
        for _ in range(calls):
            request.infer()
        decoded += calls

    start(setting.case.length - 1)
    _, grown = memory.growth(request.infer)
    return System(name, run, np.array(request.get_output_tensor(0).data), grown)


def _with_state(openvino: ModuleType, module: _Growing, given: list[torch.Tensor]) -> Any:
    """A model of OpenVINO that remembers its cache, in the form for which it has a kernel."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    converted = openvino.convert_model(module, example_input=tuple(given))
    shapes, names = {}, {}
    for i, (tensor, x) in enumerate(zip(given, converted.inputs, strict=True)):
        shapes[x] = openvino.PartialShape(list(tensor.shape))
        if i >= 3:
            shapes[x][2] = -1
            x.get_tensor().set_names({f"cache{i - 3}"})
            converted.outputs[i - 2].get_tensor().set_names({f"grown{i - 3}"})
            names[f"cache{i - 3}"] = f"grown{i - 3}"
    converted.reshape(shapes)
    apply_make_stateful_transformation(converted, names)
    batch, heads, _, size = given[-1].shape
    empty = openvino.opset13.constant(np.empty((batch, heads, 0, size), np.float32))
    for node in converted.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])
    converted.validate_nodes_and_infer_types()
    return converted


def _compressed(converted: Any, name: str, inputs: list[np.ndarray]) -> Any:
    """The model with its weights in 8 or 4 bits, if its name says so."""
    if "int" not in name:
        return converted
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # it shows its progress
        if name.endswith("static"):
            data, kind = nncf.Dataset([tuple(inputs)]), nncf.ModelType.TRANSFORMER
            return nncf.quantize(converted, data, model_type=kind, subset_size=1)
        if "int4" in name:
            mode = nncf.CompressWeightsMode.INT4_SYM
            return nncf.compress_weights(converted, mode=mode, group_size=32)
        return nncf.compress_weights(converted, mode=nncf.CompressWeightsMode.INT8_SYM)
