"""The list of all approximations, by kind and name, for substitution, benchmarks and docs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from quake_jax.approximations import (
    _exponentials,
    _fqvit,
    _gemmlowp,
    _ibert,
    _int_attention,
    _ivit,
    _lut_softmax,
    _nn_lut,
    _sole,
)
from quake_jax.approximations._front import softmax_from_exp

KINDS = ("softmax", "gelu", "layernorm", "exp", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Approximation:
    """One entry of the registry.

    Attributes:
      kind: "softmax", "gelu", "layernorm", "exp" or "sigmoid".
      name: unique within a kind.
      function: of float arrays, with the uniform call of its kind: f(x, axis=-1, where=None) for
        softmax; f(x, scale=None, bias=None, axis=-1, epsilon=1e-6) for layernorm; f(x) for the
        others. The result has x's dtype, and the derivative of the exact function. Functions of
        kind exp may be for x <= 0 alone, and then give NaN above 0 (`negative_only`).
      paper: authors, title, and where it appeared.
      year: of the publication, or None where there is none.
      integer: the function of the same method for integers with a scale, if there is one.
      emulated: whether the method is one of integer or table hardware, which jax.numpy emulates:
        its time says nothing about the method.
      derived: whether we put it together from the paper's parts: the softmax of an exponential.
      negative_only: of kind exp, whether it is for x <= 0 alone.

    Example:
      >>> from quake_jax import approximations
      >>> approximations.find("gelu", "shiftgelu").year
      2023
    """

    kind: str
    name: str
    function: Callable
    paper: str
    year: int | None
    integer: Callable | None = None
    emulated: bool = True
    derived: bool = False
    negative_only: bool = False


_SOLE = ("Wang et al., SOLE, ICCAD 2023, arXiv 2510.17189", 2023)
_LUT = ("Vasyltsov and Chang, arXiv 2111.10770, 2021", 2021)
_NN_LUT = ("Yu et al., NN-LUT, DAC 2022, arXiv 2112.02191", 2022)
_IVIT = ("Li and Gu, I-ViT, ICCV 2023, arXiv 2207.01405", 2023)
_FQVIT = ("Lin et al., FQ-ViT, IJCAI 2022, arXiv 2111.13824", 2022)
_IBERT = ("Kim et al., I-BERT, ICML 2021, arXiv 2101.01321", 2021)
_INT_ATTENTION = ("Zhong et al., IntAttention, arXiv 2511.21513, 2025", 2025)
_GEMMLOWP = ("Jacob et al., CVPR 2018, arXiv 1712.05877 (gemmlowp)", 2018)
_SCHRAUDOLPH = ("Schraudolph, Neural Computation 11(4), 1999", 1999)
_RATIO = ("known from forums and code; Schraudolph's exponential twice", None)
_MALOSSI = ("Malossi et al., WAPCO 2015", 2015)
_FLASH_ATTENTION4 = ("Zadouri et al., FlashAttention-4, arXiv 2603.05451, 2026", 2026)


def _rows():
    yield "softmax", "e2softmax", _sole.e2softmax, _SOLE, {"integer": _sole.e2softmax_int}
    yield (
        "softmax",
        "rexp_softmax",
        _lut_softmax.rexp_softmax,
        _LUT,
        {"integer": _lut_softmax.rexp_softmax_int},
    )
    yield (
        "softmax",
        "lut2d_softmax",
        _lut_softmax.lut2d_softmax,
        _LUT,
        {"integer": _lut_softmax.lut2d_softmax_int},
    )
    shiftmax = {"integer": _ivit.shiftmax_int}
    yield "softmax", "shiftmax", _ivit.shiftmax, _IVIT, shiftmax
    yield "softmax", "shiftmax_16bit", _with(_ivit.shiftmax, output_bit=16), _IVIT, shiftmax
    yield (
        "softmax",
        "log_int_softmax",
        _fqvit.log_int_softmax,
        _FQVIT,
        {"integer": _fqvit.log_int_softmax_int},
    )
    i_softmax = {"integer": _ibert.i_softmax_int}
    yield "softmax", "i_softmax", _ibert.i_softmax, _IBERT, i_softmax
    yield "softmax", "i_softmax_8bit", _with(_ibert.i_softmax, output_bit=8), _IBERT, i_softmax
    index_softmax = {"integer": _int_attention.index_softmax_int}
    index_softmax_8bit = _with(_int_attention.index_softmax, integer_output=True)
    yield "softmax", "index_softmax", _int_attention.index_softmax, _INT_ATTENTION, index_softmax
    yield "softmax", "index_softmax_8bit", index_softmax_8bit, _INT_ATTENTION, index_softmax

    yield "gelu", "shiftgelu", _ivit.shiftgelu, _IVIT, {"integer": _ivit.shiftgelu_int}
    yield "gelu", "i_gelu", _ibert.i_gelu, _IBERT, {"integer": _ibert.i_gelu_int}

    yield "layernorm", "ailayernorm", _sole.ailayernorm, _SOLE, {"integer": _sole.ailayernorm_int}
    yield "layernorm", "i_layernorm", _ivit.i_layernorm, _IVIT, {"integer": _ivit.i_layernorm_int}
    yield (
        "layernorm",
        "ptf_layernorm",
        _fqvit.ptf_layernorm,
        _FQVIT,
        {"integer": _fqvit.ptf_layernorm_int},
    )

    for suffix, entries in (("", 16), ("_32", 32)):
        for kind, function in (
            ("softmax", _nn_lut.nn_lut_softmax),
            ("gelu", _nn_lut.nn_lut_gelu),
            ("layernorm", _nn_lut.nn_lut_layernorm),
        ):
            of_size = function if not suffix else _with(function, entries=entries)
            yield kind, f"nn_lut_{kind}{suffix}", of_size, _NN_LUT, {}

    negative = {"negative_only": True}
    exponentials = [
        ("i_exp", _ibert.i_exp, _IBERT, negative | {"integer": _ibert.i_exp_int}),
        ("shift_exp", _ivit.shift_exp, _IVIT, negative | {"integer": _ivit.shift_exp_int}),
        (
            "gemmlowp",
            _gemmlowp.gemmlowp_exp,
            _GEMMLOWP,
            negative | {"integer": _gemmlowp.gemmlowp_exp_int},
        ),
        *(
            (
                f"schraudolph_{C}",
                _with(_exponentials.schraudolph_exp, C=C),
                _SCHRAUDOLPH,
                {"emulated": False},
            )
            for C in _exponentials.SCHRAUDOLPH_C
        ),
        ("ratio", _exponentials.ratio_exp, _RATIO, {"emulated": False}),
        *(
            (
                f"malossi{degree}",
                _with(_exponentials.malossi_exp, degree=degree),
                _MALOSSI,
                {"emulated": False},
            )
            for degree in _exponentials.MALOSSI_COEFFICIENTS
        ),
        (
            "flash_attention4",
            _exponentials.flash_attention4_exp,
            _FLASH_ATTENTION4,
            {"emulated": False},
        ),
    ]
    for name, function, paper, more in exponentials:
        yield "exp", name, function, paper, more
    # Those with a softmax of their own are above.
    for name, function, paper, more in exponentials[2:]:
        emulated = more.get("emulated", True)
        softmax = softmax_from_exp(function)
        yield "softmax", name, softmax, paper, {"derived": True, "emulated": emulated}

    yield (
        "sigmoid",
        "gemmlowp",
        _gemmlowp.gemmlowp_logistic,
        _GEMMLOWP,
        {"integer": _gemmlowp.gemmlowp_logistic_int},
    )


def _with(function: Callable, **parameters) -> Callable:
    """function with other defaults, and with its name and documentation."""
    return functools.update_wrapper(functools.partial(function, **parameters), function)


@functools.lru_cache
def _registry() -> dict[tuple[str, str], Approximation]:
    entries = {}
    for kind, name, function, (paper, year), more in _rows():
        entries[kind, name] = Approximation(kind, name, function, paper, year, **more)
    return entries


def registry(kind: str | None = None) -> tuple[Approximation, ...]:
    """All registered approximations, or those of one kind.

    Args:
      kind: "softmax", "gelu", "layernorm", "exp", "sigmoid", or None for all.

    Returns:
      A tuple of `Approximation`, in a fixed order, kinds together.

    Raises:
      ValueError: if kind is unknown.

    Example:
      >>> from quake_jax import approximations
      >>> [a.name for a in approximations.registry("sigmoid")]
      ['gemmlowp']
    """
    if kind is not None:
        _check_kind(kind, "registry")
    kinds = KINDS if kind is None else (kind,)
    return tuple(a for k in kinds for a in _registry().values() if a.kind == k)


def find(kind: str, name: str) -> Approximation:
    """The registered approximation of a kind and name.

    Args:
      kind: "softmax", "gelu", "layernorm", "exp" or "sigmoid".
      name: as in `registry`.

    Returns:
      An `Approximation`.

    Raises:
      ValueError: if kind is unknown, or has no approximation of that name; the message names
        those that there are.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> softmax = approximations.find("softmax", "e2softmax").function
      >>> y = softmax(jnp.array([1.0, 2.0, 3.0]))
    """
    _check_kind(kind, "find")
    if not isinstance(name, str) or (kind, name) not in _registry():
        names = ", ".join(a.name for a in registry(kind))
        raise ValueError(
            f"quake_jax.approximations.find: no approximation of kind {kind} has the name "
            f"{name!r}; there are {names}"
        )
    return _registry()[kind, name]


def _check_kind(kind, function: str) -> None:
    if kind not in KINDS:
        raise ValueError(
            f"quake_jax.approximations.{function}: kind must be one of {', '.join(KINDS)}; "
            f"got {kind!r}"
        )
