"""What taking part in a round needs from libraries outside JAX: torch and onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from benchmarks.harness import timing
from benchmarks.harness.timing import Contestant

TORCH, ONNXRUNTIME = "torch", "onnxruntime"
PEERS = (TORCH, ONNXRUNTIME)
# With several threads, how long the idle ones go on spinning after a call (measured, and rounded
# up: 4 ms for torch's OpenMP, 30 ms for onnxruntime).
_SETTLE_SECONDS = {TORCH: 0.01, ONNXRUNTIME: 0.05}


def settle(name: str, threads: int) -> float:
    """Seconds during which a library's idle threads still spin after a run."""
    return _SETTLE_SECONDS.get(name, 0.0) if threads > 1 else 0.0


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


def repeat(call: Callable[[], Any], buffers: Any) -> Callable[[int], None]:
    """A function that calls so many times; it keeps the memory alive whose addresses `call` has."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    run.buffers = buffers
    return run


def call_seconds(run: Callable[[int], None], target: float, threads: int) -> float:
    """The cost of a call from Python, by readings of `target` seconds of a run on arrays of a few
    elements.

    It is subtracted from the library's times, because the operators in JAX are timed inside one
    compiled program.
    """
    (series,) = timing.measure(
        [Contestant("a call", run)], rounds=9, target=target, threads=threads
    ).values()
    return min(series.times)  # the least, for a busy machine only ever adds to it
