"""The same operators in torch and onnxruntime, writing to a given output; both are optional.

Their time for a call from Python at 16 elements is taken as the cost of the call itself.
"""

from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.harness import peers
from benchmarks.harness.peers import ONNXRUNTIME, PEERS, TORCH, torch_tensor
from benchmarks.harness.timing import Contestant
from benchmarks.ops.cases import Case
from benchmarks.ops.operators import QUICK_GELU_SLOPE
from benchmarks.ops.systems import Buffers

OVERHEAD_SHAPE = (1, 16)


class Peers(peers.Libraries):
    """Makes the contestants of the libraries that are installed."""

    def __init__(self, threads: int, wanted: Sequence[str] = PEERS):
        super().__init__(threads, wanted)
        of = {TORCH: _torch, ONNXRUNTIME: _onnxruntime}
        self._makers = {name: partial(of[name], threads) for name in self.names}

    def contestants(self, buffers: Buffers, target: float) -> list[Contestant]:
        """One contestant for each library that has the operator of a case for its dtype; the cost
        of a call is found by readings of `target` seconds.
        """
        made, case = [], buffers.case
        for name in self._makers:
            if run := self._runner(name, buffers):
                key = (name, case.function, case.dtype)
                overhead = self.overhead(key, partial(self._small, *key), target)
                made.append(self._contestant(name, run, overhead))
        return made

    def _small(self, name: str, function: str, dtype: str) -> Callable[[int], None]:
        return self._runner(name, Buffers(Case(function, OVERHEAD_SHAPE, dtype)))

    def copy(self, buffers: Buffers) -> list[Contestant]:
        """torch's copy, which uses several threads where NumPy's does not."""
        if TORCH not in self.names:
            return []
        source, target = torch_tensor(buffers.sources[0]), torch_tensor(buffers.target)
        run = peers.repeat(lambda: target.copy_(source), buffers)
        return [self._contestant("copy (torch)", run, library=TORCH)]

    def _runner(self, name: str, buffers: Buffers) -> Callable[[int], None] | None:
        """None if the library has no such operator."""
        call = self._makers[name](buffers)
        return call and peers.repeat(call, buffers)


def _torch(threads: int, buffers: Buffers) -> Callable[[], object] | None:
    torch = peers.torch(threads)
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


def _onnxruntime(threads: int, buffers: Buffers) -> Callable[[], object] | None:
    from onnx import TensorProto, helper

    case, operator = buffers.case, buffers.case.operator
    if not operator.onnx:
        return None
    arrays = dict(zip("xy", buffers.sources, strict=False)) | {"out": buffers.target}
    nodes = peers.onnx_nodes(operator.onnx, operator.attributes)
    constants = [
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("slope", peers.onnx_type(case.dtype), [], [QUICK_GELU_SLOPE]),
    ]
    read = {name for node in nodes for name in node.input}
    known = [constant for constant in constants if constant.name in read]
    model = peers.onnx_model(nodes, arrays, known)
    try:
        return peers.onnxruntime_call(model, threads, arrays)
    except Exception as error:  # its exception classes are not public
        # Celu exists for float32 only: elsewhere the graph itself is refused.
        if "NOT_IMPLEMENTED" in str(error) or "INVALID_GRAPH" in str(error):
            return None
        raise
