"""Attention of libraries outside JAX, each in its best form and layout."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks.attention.cases import Case, Shape
from benchmarks.attention.systems import Buffers
from benchmarks.harness import peers, timing
from benchmarks.harness.peers import ONNXRUNTIME, OPENVINO, TORCH
from benchmarks.harness.timing import Contestant

OVERHEAD_SHAPE = Shape(1, 1, 1, 1, 1, 16)
MASKED = -1e30  # the logit of a key that a mask leaves out, where there is no operator for it
READINGS = 3  # of each of onnxruntime's operators, to take the fastest
# Computes a case so many times. What `result` returns, if there is such an attribute, is the
# output (batch, length, heads, size); without one that is the buffers' target.
Run = Callable[[int], None]


class Peers(peers.Libraries):
    """Makes the contestants of the libraries that are installed."""

    def __init__(self, threads: int, wanted: Sequence[str] = (TORCH, ONNXRUNTIME, OPENVINO)):
        super().__init__(threads, wanted)
        self._runs = {TORCH: _torch, ONNXRUNTIME: _onnxruntime, OPENVINO: _openvino}
        self._lacking = []
        if ONNXRUNTIME in self.names:
            self._lacking.append((ONNXRUNTIME, "bfloat16"))
            self.left_out["onnxruntime bfloat16"] = "it has no such attention on CPUs"
        if OPENVINO in self.names and not _openvino_has_bfloat16():
            self._lacking.append((OPENVINO, "bfloat16"))
            self.left_out["openvino bfloat16"] = peers.NO_BFLOAT16

    def contestants(self, buffers: Buffers, target: float) -> Iterator[Contestant]:
        """Those of one case. Their overhead is a call from Python with one query and one key, found
        by readings of `target` seconds.
        """
        dtype = buffers.case.dtype
        for name in self.names:
            if (name, dtype) not in self._lacking:
                make = partial(self._runs[name], self._threads)
                small = partial(_small, make, dtype)
                overhead = self.overhead((name, dtype), small, target)
                yield self._contestant(name, make(buffers), overhead)


def _small(make: Callable[[Buffers], Run], dtype: str) -> Run:
    return make(Buffers(Case(OVERHEAD_SHAPE, "none", dtype)))


def _kept(case: Case, given: list[np.ndarray]) -> np.ndarray | None:
    """Where a mask that is no bias keeps keys, (batch or 1, 1, queries or 1, keys)."""
    if case.mask == "padding":  # a mask is all that they take
        return np.arange(case.shape.keys) < given[0][:, None, None, None]
    return given[0] if case.mask == "causal array" else None


def _torch(threads: int, buffers: Buffers) -> Run:
    torch, case = peers.torch(threads), buffers.case
    query, key, value = (
        peers.torch_tensor(x).transpose(1, 2).contiguous() for x in buffers.sources[:3]
    )
    given = buffers.sources[3:]
    mask = given[0] if case.mask == "bias" else _kept(case, given)
    call = partial(
        torch.nn.functional.scaled_dot_product_attention,
        *(query, key, value),
        attn_mask=None if mask is None else peers.torch_tensor(mask),
        is_causal=case.mask == "causal",
        enable_gqa=case.shape.heads != case.shape.kv_heads,
    )

    def run(calls: int) -> None:
        for _ in range(calls):
            out = call()
        run.out = out

    run.result = lambda: run.out.transpose(1, 2).float().numpy()
    return run


# --- onnxruntime: (batch, length, heads · size) is how the operands lie


def _onnxruntime(threads: int, buffers: Buffers) -> Run:
    """The fastest of its operators for a case: which one that is depends on mask and length."""
    case, shape, given = buffers.case, buffers.case.shape, buffers.sources[3:]
    flat = (*buffers.sources[:3], buffers.target)
    arrays = dict(
        zip(("q", "k", "v", "out"), (x.reshape(*x.shape[:2], -1) for x in flat), strict=True)
    )
    heads = {"q_num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
    mask = given[0] if case.mask == "bias" else _kept(case, given)
    if mask is not None:  # it wants all queries, but neither all rows nor all heads
        of = (*mask.shape[:2], shape.queries, shape.keys)
        mask = np.ascontiguousarray(np.broadcast_to(mask, of))
    models = [
        _onnx(
            *("Attention", "q k v" if mask is None else "q k v m"),
            arrays if mask is None else arrays | {"m": mask},
            **heads,
            is_causal=int(case.mask == "causal"),
        )
    ]
    if case.mask == "none" and shape.heads == shape.kv_heads:  # by tiles, as ours
        models.append(_onnx("MultiHeadAttention", "q k v", arrays, num_heads=shape.heads))
    if case.mask == "causal" and shape.queries == shape.keys:
        of = shape.batch, shape.kv_heads, shape.keys, shape.head_size
        lengths = {
            "last": np.full(shape.batch, shape.keys - 1, np.int32),
            "all": np.array(shape.keys, np.int32),
            **{name: np.empty(of, np.float32) for name in ("out_k", "out_v")},
        }
        heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
        models.append(_onnx("GroupQueryAttention", "q k v   last all", arrays | lengths, **heads))
    runs = [peers.repeat(peers.onnxruntime_call(m, threads, a), buffers) for m, a in models]
    if len(runs) == 1:
        return runs[0]
    for run in runs:
        run(1)
    return min(runs, key=lambda run: min(timing.read(run, 1).wall for _ in range(READINGS)))


def _onnx(operator: str, inputs: str, arrays: dict[str, np.ndarray], **attributes):
    """A model of one operator, and its arrays."""
    from onnx import helper

    outputs = [name for name in arrays if name.startswith("out")]
    domain = "" if operator == "Attention" else "com.microsoft"
    node = helper.make_node(operator, inputs.split(" "), outputs, domain=domain, **attributes)
    return peers.onnx_model([node], arrays, [], opset=23), arrays


# --- OpenVINO


def _openvino_has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino(threads: int, buffers: Buffers) -> Run:
    """Products and a softmax, which it compiles to one kernel (a `Subgraph`).

    Its scaled_dot_product_attention becomes the same with a transposition of the keys before. The
    heads that share a key are an axis to which the keys are broadcast.
    """
    import openvino
    from openvino import opset13 as ops

    case, shape = buffers.case, buffers.case.shape
    bfloat16, outer = case.dtype == "bfloat16", shape.batch * shape.kv_heads
    dtype = openvino.Type.bf16 if bfloat16 else openvino.Type.f32
    arrays, parameters = [], []

    def given(array: np.ndarray, dtype: openvino.Type = dtype):
        arrays.append(np.ascontiguousarray(array))
        parameters.append(ops.parameter(array.shape, dtype))
        return parameters[-1]

    def number(x: float):
        return ops.convert(ops.constant(np.float32(x)), dtype.get_type_name())

    query, key, value = (
        given(x.transpose(0, 2, 1, 3).reshape(outer, -1, x.shape[1], shape.head_size))
        for x in buffers.sources[:3]
    )
    scaled = ops.multiply(query, number(shape.head_size**-0.5))
    logits = ops.matmul(scaled, key, transpose_a=False, transpose_b=True)
    kept = _kept(case, buffers.sources[3:])
    if case.mask == "bias":
        logits = ops.add(logits, given(buffers.sources[3]))
    elif case.mask == "causal":
        tri = np.tri(shape.queries, shape.keys, dtype=bool)
        logits = ops.select(ops.constant(tri[None, None]), logits, number(MASKED))
    elif kept is not None:
        if len(kept) > 1:
            kept = np.repeat(kept, shape.kv_heads, axis=0)
        logits = ops.select(given(kept, openvino.Type.boolean), logits, number(MASKED))
    result = ops.matmul(ops.softmax(logits, 3), value, transpose_a=False, transpose_b=False)
    options = peers.openvino_options(threads, "bf16" if bfloat16 else "f32")
    model = openvino.Model([result], parameters, "attention")
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    for i, (array, parameter) in enumerate(zip(arrays, parameters, strict=True)):
        array = array.view(np.int16) if array.dtype.name == "bfloat16" else array
        tensor = openvino.Tensor(array, array.shape, parameter.get_element_type())
        request.set_input_tensor(i, tensor)
    run = peers.repeat(request.infer, arrays)

    def output() -> np.ndarray:
        out = request.get_output_tensor(0).data
        out = out.view(buffers.target.dtype).reshape(shape.batch, shape.heads, shape.queries, -1)
        return out.transpose(0, 2, 1, 3)

    run.result = output
    return run
