"""The same operators in torch and onnxruntime, writing to a given output; both are optional.

Their time for a call from Python at 16 elements is taken as the cost of the call itself and
subtracted, because the operators in JAX are timed inside one compiled program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.systems import Buffers
from benchmarks.timing import Contestant

PEERS = ("torch", "onnxruntime")
OVERHEAD_SHAPE = (16,)
# With several threads, how long the idle ones go on spinning after a call (measured, and rounded
# up: 4 ms for torch's OpenMP, 30 ms for onnxruntime).
SETTLE_SECONDS = {"torch": 0.01, "onnxruntime": 0.05}


class Peers:
    """Makes the contestants of the libraries that are installed.

    Attributes:
        left_out: Why libraries, or single operators of them, take no part: text by name.
    """

    def __init__(self, threads: int, wanted: Sequence[str] = PEERS):
        self._threads = threads
        self._overheads: dict[tuple[str, str, str], float] = {}
        self.left_out: dict[str, str] = {}
        self._makers: dict[str, Callable[[Case, Buffers], Callable[[], None] | None]] = {}
        needed = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}
        for name in wanted:
            missing = [m for m in needed[name] if importlib.util.find_spec(m) is None]
            if missing:
                self.left_out[name] = f"{' and '.join(missing)} not installed"
            else:
                make = _torch_maker if name == "torch" else _onnxruntime_maker
                self._makers[name] = make(threads)

    def contestants(self, case: Case, buffers: Buffers, target: float) -> list[Contestant]:
        """Make the contestants of one case.

        Args:
            case: The case.
            buffers: Its memory.
            target: Length of the readings for the cost of a call, seconds.

        Returns:
            One contestant for each library that has the operator for the dtype.
        """
        result = []
        for name in self._makers:
            run = self._runner(name, case, buffers)
            if run is not None:
                settle = SETTLE_SECONDS[name] if self._threads > 1 else 0.0
                overhead = self._overhead(name, case, target)
                result.append(Contestant(name, run, overhead, settle))
        return result

    def copy(self, buffers: Buffers) -> list[Contestant]:
        """torch's copy, which uses several threads where NumPy's does not."""
        if "torch" not in self._makers:
            return []
        source, target = _torch_tensor(buffers.source), _torch_tensor(buffers.target)
        settle = SETTLE_SECONDS["torch"] if self._threads > 1 else 0.0
        return [
            Contestant("copy (torch)", _repeat(lambda: target.copy_(source), buffers), 0.0, settle)
        ]

    def _runner(self, name: str, case: Case, buffers: Buffers) -> Callable[[int], None] | None:
        call = self._makers[name](case, buffers)
        if call is None:
            self.left_out[f"{name}, {case.function} {case.dtype}"] = "not implemented there"
            return None
        return _repeat(call, buffers)

    def _overhead(self, name: str, case: Case, target: float) -> float:
        key = (name, case.function, case.dtype)
        if key not in self._overheads:
            small = Case(case.function, OVERHEAD_SHAPE, case.dtype)
            call = Contestant(name, self._runner(name, small, Buffers(small)))
            series = timing.measure([call], rounds=9, target=target, threads=self._threads)
            # The least, for a busy machine only ever adds to it.
            self._overheads[key] = min(series[name].times)
        return self._overheads[key]


def _repeat(call: Callable[[], object], buffers: Buffers) -> Callable[[int], None]:
    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    run.buffers = buffers  # the call knows only addresses: this keeps the memory alive
    return run


def _torch_tensor(array):
    import torch

    if array.dtype.name == "bfloat16":  # torch does not know NumPy's extension type
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_maker(threads: int):
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    aten = torch.ops.aten

    def make(case: Case, buffers: Buffers) -> Callable[[], None]:
        x, out = _torch_tensor(buffers.source), _torch_tensor(buffers.target)
        return {
            "softmax": lambda: aten._softmax.out(x, -1, False, out=out),
            "exp": lambda: torch.exp(x, out=out),
            "sigmoid": lambda: torch.sigmoid(x, out=out),
            "silu": lambda: aten.silu.out(x, out=out),
            "tanh": lambda: torch.tanh(x, out=out),
            "gelu_tanh": lambda: aten.gelu.out(x, approximate="tanh", out=out),
            "gelu_erf": lambda: aten.gelu.out(x, approximate="none", out=out),
        }[case.function]

    return make


def _onnxruntime_maker(threads: int):
    import onnx
    import onnxruntime
    from onnx import helper

    nodes = {
        "softmax": [helper.make_node("Softmax", ["x"], ["y"], axis=-1)],
        "exp": [helper.make_node("Exp", ["x"], ["y"])],
        "sigmoid": [helper.make_node("Sigmoid", ["x"], ["y"])],
        # onnxruntime fuses the two into its QuickGelu.
        "silu": [
            helper.make_node("Sigmoid", ["x"], ["s"]),
            helper.make_node("Mul", ["x", "s"], ["y"]),
        ],
        "tanh": [helper.make_node("Tanh", ["x"], ["y"])],
        "gelu_tanh": [helper.make_node("Gelu", ["x"], ["y"], approximate="tanh")],
        "gelu_erf": [helper.make_node("Gelu", ["x"], ["y"])],
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4

    def make(case: Case, buffers: Buffers) -> Callable[[], None] | None:
        dtype = getattr(onnx.TensorProto, {"float32": "FLOAT"}.get(case.dtype, case.dtype.upper()))
        x, y = (helper.make_tensor_value_info(name, dtype, case.shape) for name in "xy")
        graph = helper.make_graph(nodes[case.function], case.function, [x], [y])
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exception classes are not public
            if "NOT_IMPLEMENTED" in str(error):
                return None
            raise
        binding = session.io_binding()
        address = buffers.source.ctypes.data, buffers.target.ctypes.data
        binding.bind_input("x", "cpu", 0, dtype, case.shape, address[0])
        binding.bind_output("y", "cpu", 0, dtype, case.shape, address[1])
        return lambda: session.run_with_iobinding(binding)

    return make
