"""The table of the measured operators: what each one is in quake_jax, in jax.nn, exactly, and in
the other libraries, and where it is measured. To add one, add a row.

Nothing is imported before it is called: the process is pinned before JAX and NumPy start.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

CELU_ALPHA = 1.3  # with 1 it would be elu
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
QUICK_GELU_SLOPE = 1.702


class _Later:
    """A module that is imported when something of it is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


jax, jnp, np, special = map(_Later, ("jax", "jax.numpy", "numpy", "scipy.special"))

# Kinds of operators by their operands: what they reduce, one array, two, an array and a bias of its
# last axis, a gate and a value, or both of these as the halves of one array.
REDUCTION, UNARY, BINARY = "reduction", "unary", "binary"
BIASED, GATED, HALVED = "biased", "gated", "halved"


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        name: What it is called here, on the command line and in JSON.
        kind: Of its operands.
        jax_nn: In jax.nn or jax.numpy.
        exact: In NumPy and SciPy, of arrays of float64.
        torch: One call in torch, from torch, its operands x and y (or, where there is only one,
            memory of its size to work in) and the output. Where torch has no kernel for the whole,
            as many as eager code would run, in place after the first.
        onnx: Steps `Operator inputs > output`, of which x and y are the operands and out is the
            result; empty where ONNX has no such operator.
        attributes: Those of the steps of ONNX that have any, by the operator.
        functor: The template argument of its kernel, where that is one loop.
        in_l3, in_dram: Whether it is measured beyond the second-level cache. There the arithmetic
            hides behind memory, for all functions alike.
        quake: Its name in quake_jax, if that is another.
        options: Its keywords in quake_jax.
    """

    name: str
    kind: str
    jax_nn: Callable
    exact: Callable
    torch: Callable
    onnx: str = ""
    attributes: dict[str, dict] = field(default_factory=dict)
    functor: str = ""
    in_l3: bool = False
    in_dram: bool = False
    quake: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def of_quake_jax(self, order: int) -> Callable:
        """The operator of quake_jax at one order.

        Raises:
            BenchmarkError: quake_jax cannot be imported.
        """
        from benchmarks.harness.errors import quake_jax

        name = self.quake or self.name
        return partial(getattr(quake_jax(name), name), order=order, **self.options)


def _silu(x):
    return x * special.expit(x)


def _gelu_tanh(x):
    return x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def _softplus(x):
    return np.logaddexp(x, 0)


def _elu(x, alpha=1.0, width=1.0):
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) / width))


def _glu(x):
    value, gate = np.split(x, 2, axis=-1)
    return value * special.expit(gate)


def _torch_elu(alpha: float, scale: float, slope: float) -> Callable:
    """torch's ELU with alpha, scale, and the factor of the exponential's argument."""
    return lambda torch, x, y, out: torch.ops.aten.elu.out(x, alpha, scale, slope, out=out)


_TANH_FORM = {"Gelu": {"approximate": "tanh"}}

_ALL = (
    Operator(
        name="softmax",
        kind=REDUCTION,
        jax_nn=lambda x: jax.nn.softmax(x),
        exact=lambda x: special.softmax(x, axis=-1),
        torch=lambda torch, x, y, out: torch.ops.aten._softmax.out(x, -1, False, out=out),
        onnx="Softmax x > out",
        attributes={"Softmax": {"axis": -1}},
        in_l3=True,
        in_dram=True,
    ),
    Operator(
        name="log_softmax",
        kind=REDUCTION,
        jax_nn=lambda x: jax.nn.log_softmax(x),
        exact=lambda x: special.log_softmax(x, axis=-1),
        torch=lambda torch, x, y, out: torch.ops.aten._log_softmax.out(x, -1, False, out=out),
        onnx="LogSoftmax x > out",
        attributes={"LogSoftmax": {"axis": -1}},
        in_l3=True,
        in_dram=True,
    ),
    Operator(
        name="logsumexp",
        kind=REDUCTION,
        jax_nn=lambda x: jax.nn.logsumexp(x, axis=-1),
        exact=lambda x: special.logsumexp(x, axis=-1, keepdims=True),
        torch=lambda torch, x, y, out: torch.logsumexp(x, -1, out=out),
        onnx="ReduceLogSumExp x last > out",
        attributes={"ReduceLogSumExp": {"keepdims": 0}},
        options={"axis": -1},
    ),
    Operator(
        name="exp",
        kind=UNARY,
        jax_nn=lambda x: jnp.exp(x),
        exact=lambda x: np.exp(x),
        torch=lambda torch, x, y, out: torch.exp(x, out=out),
        onnx="Exp x > out",
        functor="Exp",
        in_l3=True,
        in_dram=True,
    ),
    # ONNX has no exp2 and no expm1: exp(x) - 1 is not expm1 near 0.
    Operator(
        name="exp2",
        kind=UNARY,
        jax_nn=lambda x: jnp.exp2(x),
        exact=lambda x: np.exp2(x),
        torch=lambda torch, x, y, out: torch.exp2(x, out=out),
        functor="Exp2",
    ),
    Operator(
        name="expm1",
        kind=UNARY,
        jax_nn=lambda x: jnp.expm1(x),
        exact=lambda x: np.expm1(x),
        torch=lambda torch, x, y, out: torch.expm1(x, out=out),
        functor="Expm1",
    ),
    Operator(
        name="sigmoid",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.sigmoid(x),
        exact=lambda x: special.expit(x),
        torch=lambda torch, x, y, out: torch.sigmoid(x, out=out),
        onnx="Sigmoid x > out",
        functor="Sigmoid",
        in_l3=True,
    ),
    Operator(
        name="log_sigmoid",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.log_sigmoid(x),
        exact=lambda x: -_softplus(-x),
        torch=lambda torch, x, y, out: torch.ops.aten.log_sigmoid_forward.output(
            x, output=out, buffer=y
        ),
        onnx="Neg x > n; Softplus n > s; Neg s > out",
        functor="LogSigmoid",
    ),
    Operator(
        name="silu",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.silu(x),
        exact=_silu,
        torch=lambda torch, x, y, out: torch.ops.aten.silu.out(x, out=out),
        onnx="Sigmoid x > s; Mul x s > out",  # onnxruntime fuses the two into its QuickGelu
        functor="Silu",
        in_l3=True,
        in_dram=True,
    ),
    Operator(
        name="tanh",
        kind=UNARY,
        jax_nn=lambda x: jnp.tanh(x),
        exact=lambda x: np.tanh(x),
        torch=lambda torch, x, y, out: torch.tanh(x, out=out),
        onnx="Tanh x > out",
        functor="Tanh",
        in_l3=True,
    ),
    Operator(
        name="softplus",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.softplus(x),
        exact=_softplus,
        torch=lambda torch, x, y, out: torch.ops.aten.softplus.out(x, out=out),
        onnx="Softplus x > out",
        functor="Softplus",
    ),
    Operator(
        name="gelu_tanh",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.gelu(x),
        exact=_gelu_tanh,
        torch=lambda torch, x, y, out: torch.ops.aten.gelu.out(x, approximate="tanh", out=out),
        onnx="Gelu x > out",
        attributes=_TANH_FORM,
        functor="GeluTanh",
        in_l3=True,
        in_dram=True,
        quake="gelu",
        options={"approximate": True},
    ),
    Operator(
        name="gelu_erf",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.gelu(x, approximate=False),
        exact=lambda x: x * special.ndtr(x),
        torch=lambda torch, x, y, out: torch.ops.aten.gelu.out(x, approximate="none", out=out),
        onnx="Gelu x > out",
        functor="GeluErf",
        in_l3=True,
        in_dram=True,
        quake="gelu",
        options={"approximate": False},
    ),
    Operator(
        name="quick_gelu",
        kind=UNARY,
        jax_nn=lambda x: x * jax.nn.sigmoid(QUICK_GELU_SLOPE * x),
        exact=lambda x: x * special.expit(QUICK_GELU_SLOPE * x),
        torch=lambda torch, x, y, out: torch.mul(x, QUICK_GELU_SLOPE, out=out).sigmoid_().mul_(x),
        onnx="Mul x slope > t; Sigmoid t > s; Mul x s > out",
        functor="QuickGelu",
    ),
    Operator(
        name="mish",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.mish(x),
        exact=lambda x: x * np.tanh(_softplus(x)),
        torch=lambda torch, x, y, out: torch.ops.aten.mish.out(x, out=out),
        onnx="Mish x > out",
        functor="Mish",
    ),
    Operator(
        name="elu",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.elu(x),
        exact=_elu,
        torch=_torch_elu(1.0, 1.0, 1.0),
        onnx="Elu x > out",
        functor="Elu",
    ),
    Operator(
        name="selu",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.selu(x),
        exact=lambda x: SELU_SCALE * _elu(x, SELU_ALPHA),
        torch=_torch_elu(SELU_ALPHA, SELU_SCALE, 1.0),
        onnx="Selu x > out",
        functor="Selu",
    ),
    Operator(  # several kernels, by alpha
        name="celu",
        kind=UNARY,
        jax_nn=lambda x: jax.nn.celu(x, alpha=CELU_ALPHA),
        exact=lambda x: _elu(x, CELU_ALPHA, CELU_ALPHA),
        torch=_torch_elu(CELU_ALPHA, 1.0, 1 / CELU_ALPHA),
        onnx="Celu x > out",
        attributes={"Celu": {"alpha": CELU_ALPHA}},
        options={"alpha": CELU_ALPHA},
    ),
    Operator(
        name="logaddexp",
        kind=BINARY,
        jax_nn=lambda x, y: jnp.logaddexp(x, y),
        exact=lambda x, y: np.logaddexp(x, y),
        torch=lambda torch, x, y, out: torch.logaddexp(x, y, out=out),
        onnx="Sub x y > d; Softplus d > s; Add s y > out",  # y + softplus(x - y)
        functor="LogAddExp",
    ),
    Operator(
        name="bias_gelu",
        kind=BIASED,
        jax_nn=lambda x, bias: jax.nn.gelu(x + bias),
        exact=lambda x, bias: _gelu_tanh(x + bias),
        torch=lambda torch, x, y, out: torch.ops.aten.gelu_(
            torch.add(x, y, out=out), approximate="tanh"
        ),
        onnx="Add x y > t; Gelu t > out",
        attributes=_TANH_FORM,
        functor="Biased<GeluTanh>",
        in_l3=True,
    ),
    Operator(
        name="bias_silu",
        kind=BIASED,
        jax_nn=lambda x, bias: jax.nn.silu(x + bias),
        exact=lambda x, bias: _silu(x + bias),
        torch=lambda torch, x, y, out: torch.ops.aten.silu_(torch.add(x, y, out=out)),
        onnx="Add x y > t; Sigmoid t > s; Mul t s > out",
        functor="Biased<Silu>",
        in_l3=True,
    ),
    Operator(  # of the gated ones the form that torch and jax.nn have as a function
        name="glu",
        kind=HALVED,
        jax_nn=lambda x: jax.nn.glu(x),
        exact=_glu,
        torch=lambda torch, x, y, out: torch.ops.aten.glu.out(x, -1, out=out),
        onnx="Split x > value gate; Sigmoid gate > s; Mul value s > out",
        attributes={"Split": {"axis": -1, "num_outputs": 2}},
        functor="Gated<Sigmoid>",
        in_l3=True,
    ),
    Operator(
        name="swiglu",
        kind=GATED,
        jax_nn=lambda gate, value: jax.nn.silu(gate) * value,
        exact=lambda gate, value: _silu(gate) * value,
        torch=lambda torch, x, y, out: torch.ops.aten.silu.out(x, out=out).mul_(y),
        onnx="Sigmoid x > s; Mul x s > a; Mul a y > out",
        functor="Gated<Silu>",
        in_l3=True,
    ),
    Operator(
        name="geglu",
        kind=GATED,
        jax_nn=lambda gate, value: jax.nn.gelu(gate) * value,
        exact=lambda gate, value: _gelu_tanh(gate) * value,
        torch=lambda torch, x, y, out: torch.ops.aten.gelu.out(x, approximate="tanh", out=out).mul_(
            y
        ),
        onnx="Gelu x > a; Mul a y > out",
        attributes=_TANH_FORM,
        functor="Gated<GeluTanh>",
        in_l3=True,
    ),
)
OPERATORS = {operator.name: operator for operator in _ALL}
FUNCTIONS = tuple(OPERATORS)
