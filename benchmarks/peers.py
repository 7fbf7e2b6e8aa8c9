"""The same operators in torch and onnxruntime, writing to a given output; both are optional.

Their time for a call from Python at 16 elements is taken as the cost of the call itself and
subtracted, because the operators in JAX are timed inside one compiled program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from benchmarks import timing
from benchmarks.cases import CELU_ALPHA, Case
from benchmarks.operators import QUICK_GELU_SLOPE, SELU_ALPHA, SELU_SCALE
from benchmarks.systems import Buffers
from benchmarks.timing import Contestant

PEERS = ("torch", "onnxruntime")
OVERHEAD_SHAPE = (1, 16)
# With several threads, how long the idle ones go on spinning after a call (measured, and rounded
# up: 4 ms for torch's OpenMP, 30 ms for onnxruntime).
SETTLE_SECONDS = {"torch": 0.01, "onnxruntime": 0.05}


class Peers:
    """Makes the contestants of the libraries that are installed.

    Attributes:
        left_out: Why libraries take no part: text by name.
        lacking: Labels `function dtype` of what the others do not have, by name.
    """

    def __init__(self, threads: int, wanted: Sequence[str] = PEERS):
        self._threads = threads
        self._overheads: dict[tuple[str, str, str], float] = {}
        self.left_out: dict[str, str] = {}
        self.lacking: dict[str, list[str]] = {}
        self._makers: dict[str, Callable[[Buffers], Callable[[], object] | None]] = {}
        needed = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}
        for name in wanted:
            missing = [m for m in needed[name] if importlib.util.find_spec(m) is None]
            if missing:
                self.left_out[name] = f"{' and '.join(missing)} not installed"
            else:
                make = _torch_maker if name == "torch" else _onnxruntime_maker
                self._makers[name] = make(threads)

    def contestants(self, buffers: Buffers, target: float) -> list[Contestant]:
        """Make the contestants of one case.

        Args:
            buffers: The memory of the case.
            target: Length of the readings for the cost of a call, seconds.

        Returns:
            One contestant for each library that has the operator for the dtype.
        """
        result = []
        for name in self._makers:
            run = self._runner(name, buffers)
            if run is not None:
                settle = SETTLE_SECONDS[name] if self._threads > 1 else 0.0
                overhead = self._overhead(name, buffers.case, target)
                result.append(Contestant(name, run, overhead, settle))
        return result

    def copy(self, buffers: Buffers) -> list[Contestant]:
        """torch's copy, which uses several threads where NumPy's does not."""
        if "torch" not in self._makers:
            return []
        source, target = torch_tensor(buffers.sources[0]), torch_tensor(buffers.target)
        settle = SETTLE_SECONDS["torch"] if self._threads > 1 else 0.0
        return [
            Contestant("copy (torch)", _repeat(lambda: target.copy_(source), buffers), 0.0, settle)
        ]

    def _runner(self, name: str, buffers: Buffers) -> Callable[[int], None] | None:
        call = self._makers[name](buffers)
        if call is None:
            lacking = self.lacking.setdefault(name, [])
            label = f"{buffers.case.function} {buffers.case.dtype}"
            if label not in lacking:
                lacking.append(label)
            return None
        return _repeat(call, buffers)

    def _overhead(self, name: str, case: Case, target: float) -> float:
        key = (name, case.function, case.dtype)
        if key not in self._overheads:
            small = Case(case.function, OVERHEAD_SHAPE, case.dtype)
            call = Contestant(name, self._runner(name, Buffers(small)))
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


def torch_tensor(array):
    """The same memory as a tensor of torch."""
    import torch

    if array.dtype.name == "bfloat16":  # torch does not know NumPy's extension type
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def _torch_maker(threads: int):
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    aten = torch.ops.aten

    def make(buffers: Buffers) -> Callable[[], object] | None:
        function = buffers.case.function
        x, *second = map(torch_tensor, buffers.sources)
        y, out = second[0] if second else None, torch_tensor(buffers.target)
        scratch = torch.empty_like(x) if function == "log_sigmoid" else None
        # Without a kernel for the whole, as many as eager code would run, in place after the first.
        call = {
            "softmax": lambda: aten._softmax.out(x, -1, False, out=out),
            "log_softmax": lambda: aten._log_softmax.out(x, -1, False, out=out),
            "logsumexp": lambda: torch.logsumexp(x, -1, out=out),
            "exp": lambda: torch.exp(x, out=out),
            "exp2": lambda: torch.exp2(x, out=out),
            "expm1": lambda: torch.expm1(x, out=out),
            "sigmoid": lambda: torch.sigmoid(x, out=out),
            "log_sigmoid": lambda: aten.log_sigmoid_forward.output(x, output=out, buffer=scratch),
            "silu": lambda: aten.silu.out(x, out=out),
            "tanh": lambda: torch.tanh(x, out=out),
            "softplus": lambda: aten.softplus.out(x, out=out),
            "gelu_tanh": lambda: aten.gelu.out(x, approximate="tanh", out=out),
            "gelu_erf": lambda: aten.gelu.out(x, approximate="none", out=out),
            "quick_gelu": lambda: torch.mul(x, QUICK_GELU_SLOPE, out=out).sigmoid_().mul_(x),
            "mish": lambda: aten.mish.out(x, out=out),
            # alpha, scale, and the factor of the exponential's argument
            "elu": lambda: aten.elu.out(x, 1.0, 1.0, 1.0, out=out),
            "selu": lambda: aten.elu.out(x, SELU_ALPHA, SELU_SCALE, 1.0, out=out),
            "celu": lambda: aten.elu.out(x, CELU_ALPHA, 1.0, 1 / CELU_ALPHA, out=out),
            "logaddexp": lambda: torch.logaddexp(x, y, out=out),
            "bias_gelu": lambda: aten.gelu_(torch.add(x, y, out=out), approximate="tanh"),
            "bias_silu": lambda: aten.silu_(torch.add(x, y, out=out)),
            # The halves of one array: the one form that torch and jax.nn have as a function.
            "glu": lambda: aten.glu.out(x, -1, out=out),
            "swiglu": lambda: aten.silu.out(x, out=out).mul_(y),
            "geglu": lambda: aten.gelu.out(x, approximate="tanh", out=out).mul_(y),
        }[function]
        try:
            call()
        except RuntimeError as error:
            if "not implemented" in str(error):
                return None
            raise
        return call

    return make


# Operators of ONNX: name, inputs, outputs, attributes. x and y are the operands, out is the result.
# No exp2 and no expm1: there is no such operator, and exp(x) - 1 is not expm1 near 0.
_NODES = {
    "softmax": [("Softmax", "x", "out", {"axis": -1})],
    "log_softmax": [("LogSoftmax", "x", "out", {"axis": -1})],
    "logsumexp": [("ReduceLogSumExp", "x last", "out", {"keepdims": 0})],
    "exp": [("Exp", "x", "out", {})],
    "sigmoid": [("Sigmoid", "x", "out", {})],
    "log_sigmoid": [("Neg", "x", "n", {}), ("Softplus", "n", "s", {}), ("Neg", "s", "out", {})],
    # onnxruntime fuses the two into its QuickGelu.
    "silu": [("Sigmoid", "x", "s", {}), ("Mul", "x s", "out", {})],
    "tanh": [("Tanh", "x", "out", {})],
    "softplus": [("Softplus", "x", "out", {})],
    "gelu_tanh": [("Gelu", "x", "out", {"approximate": "tanh"})],
    "gelu_erf": [("Gelu", "x", "out", {})],
    "quick_gelu": [
        ("Mul", "x slope", "t", {}),
        ("Sigmoid", "t", "s", {}),
        ("Mul", "x s", "out", {}),
    ],
    "mish": [("Mish", "x", "out", {})],
    "elu": [("Elu", "x", "out", {})],
    "selu": [("Selu", "x", "out", {})],
    "celu": [("Celu", "x", "out", {"alpha": CELU_ALPHA})],
    # y + softplus(x - y)
    "logaddexp": [
        ("Sub", "x y", "d", {}),
        ("Softplus", "d", "s", {}),
        ("Add", "s y", "out", {}),
    ],
    "bias_gelu": [("Add", "x y", "t", {}), ("Gelu", "t", "out", {"approximate": "tanh"})],
    "bias_silu": [
        ("Add", "x y", "t", {}),
        ("Sigmoid", "t", "s", {}),
        ("Mul", "t s", "out", {}),
    ],
    "glu": [
        ("Split", "x", "value gate", {"axis": -1, "num_outputs": 2}),
        ("Sigmoid", "gate", "s", {}),
        ("Mul", "value s", "out", {}),
    ],
    "swiglu": [
        ("Sigmoid", "x", "s", {}),
        ("Mul", "x s", "a", {}),
        ("Mul", "a y", "out", {}),
    ],
    "geglu": [("Gelu", "x", "a", {"approximate": "tanh"}), ("Mul", "a y", "out", {})],
}


def _onnxruntime_maker(threads: int):
    import onnxruntime
    from onnx import TensorProto, helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4

    def make(buffers: Buffers) -> Callable[[], object] | None:
        case = buffers.case
        if case.function not in _NODES:
            return None
        dtype = getattr(TensorProto, {"float32": "FLOAT"}.get(case.dtype, case.dtype.upper()))
        operands = dict(zip("xy", buffers.sources, strict=False))
        arrays = {**operands, "out": buffers.target}
        described = {
            name: helper.make_tensor_value_info(name, dtype, array.shape)
            for name, array in arrays.items()
        }
        nodes = [
            helper.make_node(name, inputs.split(), outputs.split(), **attributes)
            for name, inputs, outputs, attributes in _NODES[case.function]
        ]
        constants = [
            helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
            helper.make_tensor("slope", dtype, [], [QUICK_GELU_SLOPE]),
        ]
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            case.function,
            [described[name] for name in operands],
            [described["out"]],
            [constant for constant in constants if constant.name in read],
        )
        opset = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exception classes are not public
            # Celu exists for float32 only: elsewhere the graph itself is refused.
            if "NOT_IMPLEMENTED" in str(error) or "INVALID_GRAPH" in str(error):
                return None
            raise
        binding = session.io_binding()
        for name, array in arrays.items():
            bind = binding.bind_output if name == "out" else binding.bind_input
            bind(name, "cpu", 0, dtype, array.shape, array.ctypes.data)
        return lambda: session.run_with_iobinding(binding)

    return make
