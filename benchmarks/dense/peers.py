"""The layers of libraries outside JAX, each in its best form. GELU is the exact one: that is the
faster one in torch, and onnxruntime fuses it with the bias.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks.dense.cases import LONG_FLOPS, PEERS, Shape
from benchmarks.dense.systems import Entry, Layer, distinct
from benchmarks.harness import peers

SMALL = Shape(1, 128, 16)  # its call is what a call from Python costs
# Of a layer in a form: what multiplies with every copy once, the result, the number of copies.
Made = tuple[Callable[[], object], Callable[[], np.ndarray], int]
Make = Callable[[Layer, str], Made]


class Peers(peers.Libraries):
    """Makes the contestants of the libraries that are installed; a call from Python, by readings
    of `target` seconds, is subtracted from them.
    """

    def __init__(self, threads: int, target: float):
        libraries = {
            peers.TORCH: _torch,
            peers.ONNXRUNTIME: _onnxruntime,
            peers.OPENVINO: _openvino,
        }
        super().__init__(threads, tuple(libraries))
        self._target = target
        makes = (libraries[name](threads).items() for name in self.names)
        self._makes: dict[str, Make] = dict(make for of_library in makes for make in of_library)
        if not peers.cpu_has(*peers.BFLOAT16_FLAGS):
            which = "bfloat16 in torch beyond small layers, and in OpenVINO"
            self.left_out[which] = peers.NO_BFLOAT16

    def entries(self, layer: Layer, form: str) -> Iterator[Entry]:
        """The contestants of one form of a layer."""
        shape = layer.shape
        for name, make in self._makes.items():
            slow = name == "torch bfloat16" and not peers.cpu_has(*peers.BFLOAT16_FLAGS)
            if form == "all" or shape.k % _block(name) or slow and shape.flops > LONG_FLOPS:
                continue
            library = name.split()[0]
            # That of float32, the first: quantising is no overhead.
            overhead = self.overhead(library, partial(_small, make), self._target)
            call, result, copies = make(layer, form)
            # One call of onnxruntime and OpenVINO is a walk through all copies.
            calls = copies if library == peers.TORCH else 1
            run = peers.repeat(call, layer)
            contestant = self._contestant(name, run, calls * overhead, library)
            bytes_ = _bytes(name) * shape.k * shape.n
            yield Entry(contestant, PEERS[name], copies, bytes_, result, erf=True)


def _small(make: Make) -> Callable[[int], None]:
    layer = Layer(SMALL)
    return peers.repeat(make(layer, "bias")[0], layer)


def _block(name: str) -> int:
    """How many rows of a column share a scale."""
    return int(name.partition("/")[2] or 1)


def _bytes(name: str) -> float:
    """Bytes of a weight, scales included."""
    known = {"float32": 4, "bfloat16": 2, "int8": 1, "8 bits/32": 1.125}
    return known.get(name.partition(" ")[2], 0.5 + 4 / _block(name))


def _quantized(layer: Layer, steps: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes (K, N) of the weight, and the scales of its columns."""
    scales = np.abs(layer.weight).max(0) / steps
    return np.rint(layer.weight / scales).astype(np.int8), scales.astype(np.float32)


# --- torch


def _torch(threads: int) -> dict[str, Make]:
    torch = peers.torch(threads)
    # The faster of torch's libraries for int8: few rows are 2 to 4 times faster in fbgemm on a CPU
    # without VNNI, and many rows as fast.
    engine = "fbgemm" if peers.saturates() else "onednn"

    def make(name: str, layer: Layer, form: str) -> Made:
        dtype = torch.bfloat16 if name == "torch bfloat16" else torch.float32
        x, bias = (torch.from_numpy(a).to(dtype) for a in (layer.x, layer.bias))
        count = layer.count(_bytes(name))
        if name == "torch int8":
            _, scales = _quantized(layer)
            torch.backends.quantized.engine = engine
            with warnings.catch_warnings():  # deprecated, and there is nothing else in torch
                warnings.simplefilter("ignore")
                quantized = torch.quantize_per_channel(
                    torch.from_numpy(layer.weight.T.copy()),
                    *(torch.from_numpy(scales), torch.zeros(len(scales), dtype=torch.int64)),
                    *(0, torch.qint8),
                )
            prepack = torch.ops.quantized.linear_prepack
            weights = [prepack(quantized, bias) for _ in range(count)]

            def multiply(w):
                return torch.ops.quantized.linear_dynamic(x, w, peers.saturates())
        else:
            weight = torch.from_numpy(layer.weight.T.copy()).to(dtype)
            weights = [weight.clone() for _ in range(count)]

            def multiply(w):
                return torch.nn.functional.linear(x, w, bias)

        gelu = form == "gelu"

        def call():
            for w in weights:
                y = multiply(w)
                if gelu:
                    y = torch.nn.functional.gelu(y)
            call.out = y

        return call, lambda: call.out.float().numpy(), count

    names = ["torch float32", "torch bfloat16"]
    if engine in torch.backends.quantized.supported_engines:
        names.append("torch int8")
    return {name: partial(make, name) for name in names}


# --- onnxruntime and OpenVINO: one model has a product for every copy of the weight


def _model(name: str, layer: Layer, form: str) -> tuple[bytes, int]:
    """A model in ONNX of x that gives a result for each copy, and the number of these."""
    from onnx import helper, numpy_helper

    k, n = layer.shape.k, layer.shape.n
    count, bits = layer.count(_bytes(name)), name.partition(" ")[2]
    arrays, nodes = {"bias": layer.bias}, []
    static = name == "OpenVINO int8"
    operator, inputs, attributes, domain = "Gemm", "x w bias", {}, "com.microsoft"
    if bits in ("float32", "bfloat16"):  # of OpenVINO, an option of the same model
        weight, domain = layer.weight, ""
    elif bits == "int8":
        weight, scales = _quantized(layer, 63 if peers.saturates() else 127)
        arrays |= {"scales": scales, "zeros": np.zeros(n, np.int8)}
        if static:  # it has no other int8: the range of x is known beforehand
            weight = np.ascontiguousarray(weight.T)
            low, high = min(0, layer.x.min()), max(0, layer.x.max())
            arrays["step"] = np.float32((high - low) / 255)
            arrays["zero"] = np.uint8(np.rint(-low / arrays["step"]))
            steps = "QuantizeLinear x step zero > q; DequantizeLinear q step zero > v"
            nodes += peers.onnx_nodes(steps)
        operator, inputs = "DynamicQuantizeMatMul", "x w scales zeros bias"
    else:
        block, width = _block(name), int(bits[0])
        weight, arrays["scales"] = peers.onnx_blocks(layer.weight, block, width)
        attributes = {"K": k, "N": n, "bits": width, "block_size": block, "accuracy_level": 4}
        operator, inputs = "MatMulNBits", "x w scales   bias"
    for i, copy in enumerate(distinct(weight, count)):
        arrays[f"w{i}"], out = copy, f"out{i}"
        product = f"y{i}" if form == "gelu" else out
        if static:
            nodes += peers.onnx_nodes(
                f"DequantizeLinear w{i} scales zeros > f{i}; Gemm v f{i} bias > {product}",
                {"DequantizeLinear": {"axis": 0}, "Gemm": {"transB": 1}},
            )
        else:
            given = [f"w{i}" if word == "w" else word for word in inputs.split(" ")]
            nodes.append(helper.make_node(operator, given, [product], domain=domain, **attributes))
        if form == "gelu":
            nodes += peers.onnx_nodes(f"Gelu {product} > {out}")
    constants = [numpy_helper.from_array(np.asarray(array), key) for key, array in arrays.items()]
    outputs = {f"out{i}": layer.residual for i in range(count)}  # such as the results are
    return peers.onnx_model(nodes, {"x": layer.x, **outputs}, constants), count


def _onnxruntime(threads: int) -> dict[str, Make]:
    def make(name: str, layer: Layer, form: str) -> Made:
        model, count = _model(name, layer, form)
        held = layer.buffers("float32", "float32")
        spare = np.empty_like(held.target)  # the order of the products is onnxruntime's
        arrays = {f"out{i}": held.target if i == count - 1 else spare for i in range(count)}
        arrays["x"] = held.sources[0]
        call = peers.onnxruntime_call(model, threads, arrays)
        return call, lambda: held.target, count

    return {name: partial(make, name) for name in PEERS if name.startswith("onnxruntime")}


def _openvino(threads: int) -> dict[str, Make]:
    import openvino

    def make(name: str, layer: Layer, form: str) -> Made:
        precision = name.partition(" ")[2]
        model, count = _model(name, layer, form)
        options = peers.openvino_options(threads, "bf16" if precision == "bfloat16" else "f32")
        core = openvino.Core()
        request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
        request.set_input_tensor(openvino.Tensor(layer.x, shared_memory=True))
        last = partial(request.get_output_tensor, count - 1)
        return request.infer, lambda: last().data, count

    names = [name for name in PEERS if name.startswith("OpenVINO")]
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        names.remove("OpenVINO bfloat16")  # it would be float32
    return {name: partial(make, name) for name in names}
