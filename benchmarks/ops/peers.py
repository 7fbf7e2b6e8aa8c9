"""The same operators in torch and onnxruntime, writing to a given output; both are optional.

Their time for a call from Python at 16 elements is taken as the cost of the call itself and
subtracted, because the operators in JAX are timed inside one compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.harness import peers
from benchmarks.harness.errors import missing
from benchmarks.harness.peers import ONNXRUNTIME, PEERS, TORCH, torch_tensor
from benchmarks.harness.timing import Contestant
from benchmarks.ops.cases import Case
from benchmarks.ops.operators import QUICK_GELU_SLOPE
from benchmarks.ops.systems import Buffers

OVERHEAD_SHAPE = (1, 16)
_PACKAGES = {TORCH: ("torch",), ONNXRUNTIME: ("onnxruntime", "onnx")}


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
        makers = {TORCH: _torch_maker, ONNXRUNTIME: _onnxruntime_maker}
        for name in wanted:
            absent = missing(*_PACKAGES[name])
            if absent:
                self.left_out[name] = f"{' and '.join(absent)} not installed"
            else:
                self._makers[name] = makers[name](threads)

    def contestants(self, buffers: Buffers, target: float) -> list[Contestant]:
        """One contestant for each library that has the operator of a case for its dtype; the cost
        of a call is found by readings of `target` seconds.
        """
        result = []
        for name in self._makers:
            run = self._runner(name, buffers)
            if run is not None:
                overhead = self._overhead(name, buffers.case, target)
                settle = peers.settle(name, self._threads)
                result.append(Contestant(name, run, overhead, settle))
        return result

    def copy(self, buffers: Buffers) -> list[Contestant]:
        """torch's copy, which uses several threads where NumPy's does not."""
        if TORCH not in self._makers:
            return []
        source, target = torch_tensor(buffers.sources[0]), torch_tensor(buffers.target)
        run = peers.repeat(lambda: target.copy_(source), buffers)
        return [Contestant("copy (torch)", run, settle=peers.settle(TORCH, self._threads))]

    def _runner(self, name: str, buffers: Buffers) -> Callable[[int], None] | None:
        call = self._makers[name](buffers)
        if call is None:
            lacking = self.lacking.setdefault(name, [])
            label = f"{buffers.case.function} {buffers.case.dtype}"
            if label not in lacking:
                lacking.append(label)
            return None
        return peers.repeat(call, buffers)

    def _overhead(self, name: str, case: Case, target: float) -> float:
        key = (name, case.function, case.dtype)
        if key not in self._overheads:
            small = Buffers(Case(case.function, OVERHEAD_SHAPE, case.dtype))
            self._overheads[key] = peers.call_seconds(
                self._runner(name, small), target, self._threads
            )
        return self._overheads[key]


def _torch_maker(threads: int):
    torch = peers.torch(threads)

    def make(buffers: Buffers) -> Callable[[], object] | None:
        x, *second = map(torch_tensor, buffers.sources)
        y = second[0] if second else torch.empty_like(x)
        call = partial(buffers.case.operator.torch, torch, x, y, torch_tensor(buffers.target))
        try:
            call()
        except RuntimeError as error:
            if "not implemented" in str(error):
                return None
            raise
        return call

    return make


def _onnxruntime_maker(threads: int):
    import onnxruntime
    from onnx import TensorProto, helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4

    def make(buffers: Buffers) -> Callable[[], object] | None:
        case = buffers.case
        if not case.operator.onnx:
            return None
        dtype = getattr(TensorProto, {"float32": "FLOAT"}.get(case.dtype, case.dtype.upper()))
        operands = dict(zip("xy", buffers.sources, strict=False))
        arrays = {**operands, "out": buffers.target}
        described = {
            name: helper.make_tensor_value_info(name, dtype, array.shape)
            for name, array in arrays.items()
        }
        nodes = peers.onnx_nodes(case.operator.onnx, case.operator.attributes)
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
