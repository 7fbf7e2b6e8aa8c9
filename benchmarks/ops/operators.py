"""The table of the measured operators: what each one is in quake_jax, in jax.nn, exactly, and in
the other libraries, and where it is measured. To add one, add a row.

Nothing is imported before it is called: the process is pinned before JAX and NumPy start.
"""

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


jax, jnp, np, special, table = map(
    _Later, ("jax", "jax.numpy", "numpy", "scipy.special", "quake_jax._elementwise.table")
)

# Kinds of operators by their operands: what they reduce, one array, two, an array and a bias of its
# last axis, a gate and a value, or both of these as the halves of one array.
REDUCTION, UNARY, BINARY = "reduction", "unary", "binary"
BIASED, GATED, HALVED = "biased", "gated", "halved"


@dataclass(frozen=True)
class Operator:
    """A row of the table.

    Attributes:
        name: What it is called here, on the command line and in JSON. Of a function of one array
            the row of quake_jax's own table, which gives what is not stated of the next two.
        jax_nn: In jax.nn or jax.numpy; by default what has its name in jax.nn.
        exact: In NumPy and SciPy, of arrays of float64; by default what has its name in NumPy.
        torch: One call in torch, from torch, its operands x and y (or, where there is only one,
            memory of its size to work in) and the output; by default what has its name in
            torch.ops.aten. Where torch has no kernel for the whole, as many as eager code would
            run, in place after the first.
        onnx: Steps `Operator inputs > output`, of which x and y are the operands and out is the
            result; empty where ONNX has no such operator.
        attributes: Those of the steps of ONNX that have any, by the operator.
        functor: The template argument of its kernel, where that is one loop; by default that of
            a row.
        beyond: Where else it is measured than in the second-level cache. There the arithmetic
            hides behind memory, for all functions alike.
        quake: Its name in quake_jax, if it has one array and is no row of the table there.
        options: Its keywords in quake_jax.
    """

    name: str
    kind: str = UNARY
    functor: str = ""
    jax_nn: Callable = None
    exact: Callable = None
    torch: Callable = None
    onnx: str = ""
    attributes: dict[str, dict] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()
    quake: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        name, fill = self.name, partial(object.__setattr__, self)
        if self.is_row:
            fill("jax_nn", self.jax_nn or (lambda x: table.FUNCTIONS[name].exact(x)))
            fill("exact", self.exact or _exact(name))
            fill("functor", self.functor or "".join(map(str.capitalize, name.split("_"))))
        fill("jax_nn", self.jax_nn or (lambda *x: getattr(jax.nn, name)(*x)))
        fill("exact", self.exact or (lambda *x: getattr(np, name)(*x)))
        fill("torch", self.torch or _aten(name))

    @property
    def is_row(self) -> bool:
        """Whether quake_jax's own table has it."""
        return self.kind == UNARY and not self.quake

    def of_quake_jax(self, order: int) -> Callable:
        """The operator of quake_jax at one order; BenchmarkError where there is no quake_jax."""
        from benchmarks.harness.errors import quake_jax

        name = self.quake or self.name
        if self.is_row:
            quake_jax("accelerate")  # an error of one line where there is none
            function = table.FUNCTIONS[name].quake
        else:
            function = getattr(quake_jax(name), name)
        return partial(function, order=order, **self.options)


def _aten(name: str, **options) -> Callable:
    """What has that name among torch's operators."""
    return lambda torch, x, y, out: getattr(torch.ops.aten, name).out(x, out=out, **options)


def _exact(row: str) -> Callable:
    """What a row of quake_jax's table is, of arrays of float64."""
    return lambda x: table.in_float64(table.FUNCTIONS[row], x)


def _glu(x):
    value, gate = np.split(x, 2, axis=-1)
    return value * special.expit(gate)


def _gelu_(torch, x):
    return torch.ops.aten.gelu_(x, approximate="tanh")


def _aten_elu(alpha: float, scale: float, slope: float) -> Callable:
    """torch's ELU with alpha, scale, and the factor of the exponential's argument."""
    return lambda torch, x, y, out: torch.ops.aten.elu.out(x, alpha, scale, slope, out=out)


_TANH_FORM = {"Gelu": {"approximate": "tanh"}}

BOTH = ("L3", "DRAM")  # beyond the second-level cache
_ALL = (
    Operator(
        "softmax",
        kind=REDUCTION,
        exact=lambda x: special.softmax(x, axis=-1),
        torch=lambda torch, x, y, out: torch.ops.aten._softmax.out(x, -1, False, out=out),
        onnx="Softmax x > out",
        attributes={"Softmax": {"axis": -1}},
        beyond=BOTH,
    ),
    Operator(
        "log_softmax",
        kind=REDUCTION,
        exact=lambda x: special.log_softmax(x, axis=-1),
        torch=lambda torch, x, y, out: torch.ops.aten._log_softmax.out(x, -1, False, out=out),
        onnx="LogSoftmax x > out",
        attributes={"LogSoftmax": {"axis": -1}},
        beyond=BOTH,
    ),
    Operator(
        "logsumexp",
        kind=REDUCTION,
        jax_nn=lambda x: jax.nn.logsumexp(x, axis=-1),
        exact=lambda x: special.logsumexp(x, axis=-1, keepdims=True),
        torch=lambda torch, x, y, out: torch.logsumexp(x, -1, out=out),
        onnx="ReduceLogSumExp x last > out",
        attributes={"ReduceLogSumExp": {"keepdims": 0}},
        options={"axis": -1},
    ),
    Operator("exp", onnx="Exp x > out", beyond=BOTH),
    # ONNX has no exp2 and no expm1: exp(x) - 1 is not expm1 near 0.
    Operator("exp2"),
    Operator("expm1"),
    Operator("sigmoid", onnx="Sigmoid x > out", beyond=("L3",)),
    Operator(
        "log_sigmoid",
        torch=lambda torch, x, y, out: torch.ops.aten.log_sigmoid_forward.output(
            x, output=out, buffer=y
        ),
        onnx="Neg x > n; Softplus n > s; Neg s > out",
    ),
    # onnxruntime fuses the two into its QuickGelu.
    Operator("silu", onnx="Sigmoid x > s; Mul x s > out", beyond=BOTH),
    Operator("tanh", onnx="Tanh x > out", beyond=("L3",)),
    Operator("softplus", onnx="Softplus x > out"),
    Operator(
        "gelu_tanh",
        torch=_aten("gelu", approximate="tanh"),
        onnx="Gelu x > out",
        attributes=_TANH_FORM,
        beyond=BOTH,
    ),
    Operator("gelu_erf", torch=_aten("gelu", approximate="none"), onnx="Gelu x > out", beyond=BOTH),
    Operator(
        "quick_gelu",
        torch=lambda torch, x, y, out: torch.mul(x, QUICK_GELU_SLOPE, out=out).sigmoid_().mul_(x),
        onnx="Mul x slope > t; Sigmoid t > s; Mul x s > out",
    ),
    Operator("mish", onnx="Mish x > out"),
    Operator("elu", torch=_aten_elu(1.0, 1.0, 1.0), onnx="Elu x > out"),
    Operator("selu", torch=_aten_elu(SELU_ALPHA, SELU_SCALE, 1.0), onnx="Selu x > out"),
    Operator(  # several kernels, by alpha
        "celu",
        quake="celu",
        jax_nn=lambda x: jax.nn.celu(x, alpha=CELU_ALPHA),
        exact=lambda x: np.where(x > 0, x, CELU_ALPHA * np.expm1(np.minimum(x, 0) / CELU_ALPHA)),
        torch=_aten_elu(CELU_ALPHA, 1.0, 1 / CELU_ALPHA),
        onnx="Celu x > out",
        attributes={"Celu": {"alpha": CELU_ALPHA}},
        options={"alpha": CELU_ALPHA},
    ),
    Operator(
        "logaddexp",
        kind=BINARY,
        functor="LogAddExp",
        jax_nn=lambda x, y: jnp.logaddexp(x, y),
        torch=lambda torch, x, y, out: torch.logaddexp(x, y, out=out),
        onnx="Sub x y > d; Softplus d > s; Add s y > out",  # y + softplus(x - y)
    ),
    Operator(
        "bias_gelu",
        kind=BIASED,
        functor="Biased<GeluTanh>",
        jax_nn=lambda x, bias: jax.nn.gelu(x + bias),
        exact=lambda x, bias: _exact("gelu_tanh")(x + bias),
        torch=lambda torch, x, y, out: _gelu_(torch, torch.add(x, y, out=out)),
        onnx="Add x y > t; Gelu t > out",
        attributes=_TANH_FORM,
        beyond=("L3",),
    ),
    Operator(
        "bias_silu",
        kind=BIASED,
        functor="Biased<Silu>",
        jax_nn=lambda x, bias: jax.nn.silu(x + bias),
        exact=lambda x, bias: _exact("silu")(x + bias),
        torch=lambda torch, x, y, out: torch.ops.aten.silu_(torch.add(x, y, out=out)),
        onnx="Add x y > t; Sigmoid t > s; Mul t s > out",
        beyond=("L3",),
    ),
    Operator(  # of the gated ones the form that torch and jax.nn have as a function
        "glu",
        kind=HALVED,
        functor="Gated<Sigmoid>",
        exact=_glu,
        torch=lambda torch, x, y, out: torch.ops.aten.glu.out(x, -1, out=out),
        onnx="Split x > value gate; Sigmoid gate > s; Mul value s > out",
        attributes={"Split": {"axis": -1, "num_outputs": 2}},
        beyond=("L3",),
    ),
    Operator(
        "swiglu",
        kind=GATED,
        functor="Gated<Silu>",
        jax_nn=lambda gate, value: jax.nn.silu(gate) * value,
        exact=lambda gate, value: _exact("silu")(gate) * value,
        torch=lambda torch, x, y, out: torch.ops.aten.silu.out(x, out=out).mul_(y),
        onnx="Sigmoid x > s; Mul x s > a; Mul a y > out",
        beyond=("L3",),
    ),
    Operator(
        "geglu",
        kind=GATED,
        functor="Gated<GeluTanh>",
        jax_nn=lambda gate, value: jax.nn.gelu(gate) * value,
        exact=lambda gate, value: _exact("gelu_tanh")(gate) * value,
        torch=lambda torch, x, y, out: _aten("gelu", approximate="tanh")(torch, x, y, out).mul_(y),
        onnx="Gelu x > a; Mul a y > out",
        attributes=_TANH_FORM,
        beyond=("L3",),
    ),
)
OPERATORS = {operator.name: operator for operator in _ALL}
FUNCTIONS = tuple(OPERATORS)
