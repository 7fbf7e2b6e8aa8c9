"""What taking part in a round needs from libraries outside JAX: torch, onnxruntime, OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any

from benchmarks.harness import timing
from benchmarks.harness.errors import missing
from benchmarks.harness.timing import Contestant

TORCH, ONNXRUNTIME, OPENVINO = "torch", "onnxruntime", "openvino"
PEERS = (TORCH, ONNXRUNTIME)
_PACKAGES = {TORCH: (TORCH,), ONNXRUNTIME: (ONNXRUNTIME, "onnx"), OPENVINO: (OPENVINO, "onnx")}
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


def onnx_model(
    nodes: list, inputs: dict[str, tuple], outputs: dict[str, tuple], constants: list, dtype: str
) -> bytes:
    """A model in ONNX, with the shapes of its inputs and outputs, which have one dtype."""
    from onnx import helper

    of = onnx_type(dtype)
    described = (
        [helper.make_tensor_value_info(name, of, shape) for name, shape in shapes.items()]
        for shapes in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "model", *described, constants)
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return model.SerializeToString()


def onnx_type(dtype: str) -> int:
    """The number that ONNX has for a dtype."""
    from onnx import TensorProto

    return getattr(TensorProto, {"float32": "FLOAT"}.get(dtype, dtype.upper()))


def onnxruntime_call(
    model: bytes, threads: int, arrays: dict[str, Any], dtype: str
) -> Callable[[], None]:
    """A call of a model in onnxruntime on these arrays, the outputs' names beginning with "out"."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.arrays = arrays  # keeps the memory alive
    for name, array in arrays.items():
        bind = binding.bind_output if name.startswith("out") else binding.bind_input
        bind(name, "cpu", 0, onnx_type(dtype), array.shape, array.ctypes.data)
    return lambda: session.run_with_iobinding(binding)
