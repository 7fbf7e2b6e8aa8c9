"""The same models for onnxruntime, on the weights of the Flax ones: the graph that its optimizer
for Transformers makes of an exported one, written down. Attention, GELU with its bias, and norms
with their residuals are each one operator; the weights are in 32, 8 or 4 bits.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from onnx import helper, numpy_helper

from benchmarks.harness import peers
from benchmarks.models import memory
from benchmarks.models.cases import EPSILON
from benchmarks.models.systems import Setting, System

OWN = (  # operators of onnxruntime's own
    *("Attention", "BiasGelu", "FastGelu", "GroupQueryAttention"),
    *("MatMulNBits", "SkipLayerNormalization"),
)
BLOCK = 32  # values that share a scale in 4 bits


class _Graph:
    """A graph that grows by calls: of an operator, inputs by name or as constants. Each gives the
    name of its result.
    """

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def __call__(
        self, operator: str, *inputs: Any, also: tuple[str, ...] = (), **attributes
    ) -> str:
        """`also` names the results after the first one, with "" for those not wanted."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        result = f"x{len(self.nodes)}"
        domain = "com.microsoft" if operator in OWN else ""
        node = helper.make_node(operator, names, [result, *also], domain=domain, **attributes)
        self.nodes.append(node)
        return result


class _Model:
    """The graph of a model, and the arrays of its inputs and outputs."""

    def __init__(self, setting: Setting, name: str):
        self.case, self.graph, self._in_blocks = setting.case, _Graph(), "int4" in name
        weights, self._cache = (
            jax.tree.map(np.asarray, tree) for tree in (setting.parameters, setting.cache)
        )
        self._weights, self._epsilon = weights, EPSILON[self.case.family]
        self.arrays: dict[str, np.ndarray] = {}
        inputs = [np.asarray(x) for x in setting.inputs]
        result = {"gpt2": self._gpt2, "bert": self._bert, "vit": self._vit}[self.case.family]
        self.graph.nodes.append(helper.make_node("Identity", [result(*inputs)], ["out"]))

    def _input(self, name: str, array: np.ndarray) -> str:
        self.arrays[name] = np.ascontiguousarray(array)
        return name

    def _norm(self, x: str, norm: dict, *residual: Any, total: str = "") -> str:
        """The norm of x, or of its sum with a residual and a bias; `total` names that sum."""
        operator = "SkipLayerNormalization" if residual else "LayerNormalization"
        inputs = [x, *residual[:1], norm["scale"], norm["bias"], *residual[1:]]
        also = ("", "", total) if total else ()
        return self.graph(operator, *inputs, also=also, epsilon=self._epsilon)

    def _blocks(self, x: str, mask: str = "", last: dict | None = None) -> str:
        """All layers; with a last norm these come before the parts of a layer, else after them."""
        case, width = self.case, self.case.sizes.width
        blocks = [self._weights[f"TransformerBlock_{i}"] for i in range(case.sizes.layers)]
        norms = [block[f"LayerNorm_{i}"] for block in blocks for i in (0, 1)]
        y = x
        if last is not None:  # each norm is fused with the sum before it
            y, norms = self._norm(x, norms[0]), [*norms[1:], last]
        for i, block in enumerate(blocks):
            attention, mlp = block["MultiHeadDotProductAttention_0"], block["Mlp_0"]
            first, second = mlp["Dense_0"], mlp["Dense_1"]
            mixed = self._attention(y, i, attention, mask)
            x, y = self._sum(x, y, mixed, attention["out"], width, norms[2 * i])
            hidden = self._product(y, first["kernel"], width)
            hidden = self.graph("BiasGelu" if last is None else "FastGelu", hidden, first["bias"])
            x, y = self._sum(x, y, hidden, second, 4 * width, norms[2 * i + 1])
        return y

    def _sum(self, x: str, y: str, part: str, layer: dict, inputs: int, norm: dict):
        """The residual after the last layer of a part, and its norm, which is the residual itself
        where norms come last.
        """
        product = self._product(part, layer["kernel"], inputs)
        total = "" if x == y else f"sum{len(self.graph.nodes)}"
        made = self._norm(product, norm, x, layer["bias"], total=total)
        return total or made, made

    def _product(self, x: str, kernel: np.ndarray, inputs: int, bits: int = 4) -> str:
        kernel = kernel.reshape(inputs, -1)
        if not self._in_blocks:
            return self.graph("MatMul", x, kernel)
        sizes = dict(zip("KN", kernel.shape, strict=True), bits=bits, block_size=BLOCK)
        blocks = peers.onnx_blocks(kernel, BLOCK, bits)
        return self.graph("MatMulNBits", x, *blocks, **sizes, accuracy_level=4)

    def _attention(self, x: str, i: int, weights: dict, mask: str) -> str:
        case, width = self.case, self.case.sizes.width
        parts = [weights[part] for part in ("query", "key", "value")]
        kernel = np.concatenate([p["kernel"].reshape(width, -1) for p in parts], axis=1)
        bias = np.concatenate([p["bias"].reshape(-1) for p in parts])
        heads = {"num_heads": case.sizes.heads}
        if not case.decodes:
            causal = int(case.family == "gpt2")
            return self.graph("Attention", x, kernel, bias, mask, **heads, unidirectional=causal)
        projected = self.graph("Add", self._product(x, kernel, width), bias)
        cached = self._cache[f"TransformerBlock_{i}"]["MultiHeadDotProductAttention_0"]
        pasts = []
        for part in ("key", "value"):  # the new one is written into the same memory
            past = np.moveaxis(cached[f"cached_{part}"], 1, 2)
            pasts.append(self._input(f"{part}{i}", past))
            self.arrays[f"out_{part}{i}"] = self.arrays[f"{part}{i}"]
        sizes = np.full(case.batch, case.length - 1, np.int32), np.int32(case.length)
        also = (f"out_key{i}", f"out_value{i}")
        inputs = (projected, "", "", *pasts, *sizes)
        heads["kv_num_heads"] = case.sizes.heads
        return self.graph("GroupQueryAttention", *inputs, also=also, **heads)

    def _gpt2(self, tokens: np.ndarray, positions: np.ndarray) -> str:
        words, places = (self._weights[name]["embedding"] for name in ("words", "places"))
        x = self.graph("Gather", words, self._input("tokens", tokens))
        x = self.graph("Add", x, places[positions])
        y = self._blocks(x, last=self._weights["LayerNorm_0"])
        y = self.graph("Gather", y, np.int64(-1), axis=1)
        return self._product(y, words.T, self.case.sizes.width, bits=8)

    def _bert(self, tokens: np.ndarray, is_token: np.ndarray) -> str:
        words, places, segments = (
            self._weights[name]["embedding"] for name in ("words", "places", "segments")
        )
        x = self.graph("Gather", words, self._input("tokens", tokens))
        x = self.graph("Add", x, places[: tokens.shape[1]] + segments[0])
        x = self._norm(x, self._weights["LayerNorm_0"])
        x = self._blocks(x, self._input("mask", is_token.astype(np.int32)))
        if not self.case.pools:
            return x
        kept = self.graph("Unsqueeze", self.graph("Cast", "mask", to=1), np.array([2]))
        total = self.graph("ReduceSum", self.graph("Mul", x, kept), np.array([1]), keepdims=0)
        return self.graph("LpNormalization", total, axis=-1)  # that of the mean is the same

    def _vit(self, images: np.ndarray) -> str:
        sizes, patches = self.case.sizes, self._weights["patches"]
        kernel, shape = np.moveaxis(patches["kernel"], (3, 2), (0, 1)), (0, sizes.width, -1)
        x = self._input("images", np.moveaxis(images, 3, 1))
        steps = [sizes.patch] * 2
        x = self.graph("Conv", x, np.ascontiguousarray(kernel), patches["bias"], strides=steps)
        x = self.graph("Transpose", self.graph("Reshape", x, np.array(shape)), perm=[0, 2, 1])
        first = np.repeat(self._weights["class"], len(images), axis=0)
        x = self.graph("Add", self.graph("Concat", first, x, axis=1), self._weights["places"])
        y = self._blocks(x, last=self._weights["LayerNorm_0"])
        y = self.graph("Gather", y, np.int64(0), axis=1)
        head = self._weights["head"]
        return self.graph("Add", self._product(y, head["kernel"], sizes.width), head["bias"])


def build(setting: Setting, name: str, threads: int) -> System:
    """Make the graph, quantise its weights if the name says so, and run it once."""
    model = _Model(setting, name)
    arrays = model.arrays | {"out": np.empty(setting.result_shape, np.float32)}
    made = peers.onnx_model(model.graph.nodes, arrays, model.graph.constants)
    with tempfile.TemporaryDirectory() as folder:
        made = _in_8_bits(made, Path(folder) / "model.onnx") if "int8" in name else made
        call = peers.onnxruntime_call(made, threads, arrays)
    _, grown = memory.growth(call)
    return System(name, peers.repeat(call, arrays), arrays["out"].copy(), grown)


def _in_8_bits(model: bytes, path: Path) -> str:
    """Write the model to a file with the weights of its products in 8 bits: the file's name."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        onnx.load_from_string(model),
        str(path),
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        reduce_range=peers.saturates(),
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": peers.onnx_type("float32")},
    )
    return str(path)
