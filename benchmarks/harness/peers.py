"""What taking part in a round needs from libraries outside JAX: torch, onnxruntime, OpenVINO."""

import platform
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

from benchmarks.harness import environment, timing
from benchmarks.harness.errors import missing
from benchmarks.harness.timing import Contestant

TORCH, ONNXRUNTIME, OPENVINO = "torch", "onnxruntime", "openvino"
PEERS = (TORCH, ONNXRUNTIME)
_PACKAGES = {TORCH: (TORCH,), ONNXRUNTIME: (ONNXRUNTIME, "onnx"), OPENVINO: (OPENVINO, "onnx")}
# A CPU without them: torch emulates products of bfloat16, OpenVINO's are float32.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
NO_BFLOAT16 = "emulated or float32 without instructions for it"
# With several threads, how long the idle ones go on spinning after a call (measured, and rounded
# up: 4 ms for torch's OpenMP, 30 ms for onnxruntime).
_SETTLE_SECONDS = {TORCH: 0.01, ONNXRUNTIME: 0.05}


class Libraries:
    """Makes the contestants of the libraries that are installed, the `names`; `left_out` says why
    others take no part.
    """

    def __init__(self, threads: int, wanted: Sequence[str]):
        self._threads = threads
        self._overheads: dict[Hashable, float] = {}
        absent = {name: missing(*_PACKAGES[name]) for name in wanted}
        self.names = [name for name in wanted if not absent[name]]
        self.left_out = {
            name: f"{' and '.join(lacking)} not installed"
            for name, lacking in absent.items()
            if lacking
        }

    def overhead(self, key: Hashable, make: Callable[[], Callable], target: float) -> float:
        """The cost of a call from Python, by readings of `target` seconds of a run on arrays of a
        few elements, which `make` makes for each key once.

        It is subtracted from the library's times, because the operators in JAX are timed inside one
        compiled program.
        """
        if key not in self._overheads:
            self._overheads[key] = call_seconds(make(), target, self._threads)
        return self._overheads[key]

    def _contestant(
        self, name: str, run: Callable, overhead: float = 0.0, library: str = ""
    ) -> Contestant:
        """A contestant of a library, by default that of its name."""
        return Contestant(name, run, overhead, settle(library or name, self._threads))


def cpu_has(*flags: str) -> bool:
    """Whether the CPU has one of these extensions; unknown ones are taken to be there."""
    known = platform.machine() in ("x86_64", "AMD64")
    return not known or bool(set(flags) & set(environment.cpu_flags()))


def saturates() -> bool:
    """Whether sums of two products of 8 bits saturate in other libraries, as they do without VNNI:
    torch then takes x in 7 bits, the others the weight, as their documents recommend.
    """
    return not cpu_has("avx512_vnni", "avx_vnni")


def openvino_options(threads: int, precision: str = "f32") -> dict[str, Any]:
    """How OpenVINO computes results alone on so many threads."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
    }


def settle(name: str, threads: int) -> float:
    """Seconds during which a library's idle threads still spin after a run."""
    return _SETTLE_SECONDS.get(name, 0.0) if threads > 1 else 0.0


def repeat(call: Callable[[], Any], buffers: Any) -> Callable[[int], None]:
    """A function that calls so many times; it keeps the memory alive whose addresses `call` has."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    run.buffers = buffers
    return run


def call_seconds(run: Callable[[int], None], target: float, threads: int) -> float:
    """The least seconds of a call, by readings of `target` seconds: a busy machine only adds."""
    contestants = [Contestant("a call", run)]
    (series,) = timing.measure(contestants, rounds=9, target=target, threads=threads).values()
    return min(series.times)


def torch(threads: int) -> ModuleType:
    """The module torch, set to compute results alone on so many threads."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return torch


def torch_tensor(array):
    """The same memory as a tensor of torch."""
    import torch

    if array.dtype.name == "bfloat16":  # torch does not know NumPy's extension type
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def onnx_nodes(steps: str, attributes: dict[str, dict] | None = None) -> list:
    """The nodes of steps `Operator inputs > outputs` of ONNX, separated by semicolons, with the
    attributes of those operators that have any.
    """
    from onnx import helper

    nodes = []
    for step in steps.split(";"):
        inputs, outputs = step.split(">")
        name, *inputs = inputs.split()
        own = (attributes or {}).get(name, {})
        nodes.append(helper.make_node(name, inputs, outputs.split(), **own))
    return nodes


def onnx_model(nodes: list, arrays: dict[str, Any], constants: list, opset: int = 20) -> bytes:
    """A model in ONNX for such arrays as these; the outputs' names begin with "out"."""
    from onnx import helper

    inputs, outputs = [], []
    for name, array in arrays.items():
        info = helper.make_tensor_value_info(name, onnx_type(array.dtype.name), array.shape)
        (outputs if name.startswith("out") else inputs).append(info)
    graph = helper.make_graph(nodes, "model", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def onnx_type(dtype: str) -> int:
    """The number that ONNX has for a dtype."""
    from onnx import TensorProto

    return getattr(TensorProto, {"float32": "FLOAT"}.get(dtype, dtype.upper()))


def onnx_blocks(weight: Any, block: int, bits: int) -> tuple[Any, Any]:
    """The codes of MatMulNBits (N, blocks, bytes) and the scales (N · blocks) of its blocks."""
    import numpy as np

    columns = weight.T.reshape(weight.shape[1], -1, block)
    half = 1 << (bits - 1)
    scales = np.abs(columns).max(-1, keepdims=True) / (half - 1)
    codes = (np.rint(columns / scales) + half).astype(np.uint8)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    return np.ascontiguousarray(codes), scales.astype(np.float32).reshape(-1)


def onnxruntime_call(
    model: bytes | str, threads: int, arrays: dict[str, Any]
) -> Callable[[], None]:
    """A call of a model, or of that in a file, in onnxruntime on the arrays of `onnx_model`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.arrays = arrays  # keeps the memory alive
    for name, array in arrays.items():
        bind = binding.bind_output if name.startswith("out") else binding.bind_input
        bind(name, "cpu", 0, onnx_type(array.dtype.name), array.shape, array.ctypes.data)
    return lambda: session.run_with_iobinding(binding)
