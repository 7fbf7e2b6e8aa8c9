"""THE table of element-wise functions, which have the signatures of those in jax.numpy and jax.nn
that they replace: a row is a public function, with what there is to know of it above it.

Each is one kernel call in the forward direction. A new function is one more here, one in
cpu_kernels/elementwise, and its error bounds in tools/derive_constants.py.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from quake_jax._core.config import Order, resolved_order
from quake_jax._core.drop_in import drop_in, static_bool
from quake_jax._core.exports import defined_in
from quake_jax._elementwise import derivative
from quake_jax._elementwise.reference import SELU_ALPHA, SELU_SCALE
from quake_jax._elementwise.table import FUNCTIONS, Kernel, apply, elementwise

_INF = math.inf
_LN2 = math.log(2)


def _log1p_of_exp(m, x):
    return m.where(x > 0, x, 0) + m.log1p(m.exp(-abs(x)))


def _elu_formula(m, x, alpha=1):
    return m.where(x > 0, x, alpha * m.expm1(m.where(x > 0, 0, x)))


@elementwise(
    Kernel(lambda m, x: m.exp(x), (1, _INF, 0), lambda x, y, order: y),
    replaces=jnp.exp,
    on_request=True,
)
def exp(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """Exponential, e^x: `jax.numpy.exp` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape. float32, bfloat16 and float16 use the kernel; integers and bool
        are promoted as by `jax.numpy.exp`; other floating-point dtypes get the exact function.
      order: accuracy. 1 to 5 is the degree of the polynomial for 2^f on [0, 1); the largest
        relative error is 3e-2, 2.7e-3, 1.1e-4, 3.6e-6, 2.5e-7. "exact" is `jax.numpy.exp`. None
        is the default in force (see `default_order`).

    Returns:
      An array of x's shape and (promoted) dtype. Results below the smallest normal float32 are 0.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is none of these.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.exp(jnp.array([0.0, 1.0]), order=5)
    """
    return apply("exp", order, x)


@elementwise(
    Kernel(lambda m, x: 2.0**x, (1, _INF, 0), lambda x, y, order: _LN2 * y),
    replaces=jnp.exp2,
    on_request=True,
)
def exp2(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """Power of two, 2^x: `jax.numpy.exp2` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.numpy.exp2`.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and (promoted) dtype. Results below the smallest normal float32 are 0.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.exp2(jnp.array([0.0, 0.5, 1.0]))
    """
    return apply("exp2", order, x)


@elementwise(
    Kernel(lambda m, x: m.expm1(x), (0, _INF, -1), lambda x, y, order: y + 1),
    replaces=jnp.expm1,
    on_request=True,
)
def expm1(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """e^x - 1, accurate near 0 too: `jax.numpy.expm1` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.numpy.expm1`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of x's shape and (promoted) dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.expm1(jnp.array([1e-6, 1.0]))
    """
    return apply("expm1", order, x)


@elementwise(
    Kernel(
        lambda m, x: 1 / (1 + m.exp(-x)),
        (0.5, 1, 0),
        derivative.sigmoid,
        forms=(lambda x: 0.5 * (1 + jnp.tanh(x / 2)),),
    ),
    replaces=jax.nn.sigmoid,
)
def sigmoid(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Logistic function, 1 / (1 + e^-x): `jax.nn.sigmoid` with QuAKE (arXiv 2412.00408).

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and dtype, with values from 0 to 1.

    Raises:
      TypeError: if x is complex, integer or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.sigmoid(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("sigmoid", order, x)


@elementwise(
    Kernel(
        lambda m, x: -_log1p_of_exp(m, -x),
        (-_LN2, 0, -_INF),
        lambda x, y, order: derivative.KERNELS["sigmoid"](-x, order=order),
    ),
    replaces=jax.nn.log_sigmoid,
)
def log_sigmoid(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """log(sigmoid(x)) = -log(1 + e^-x): `jax.nn.log_sigmoid` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers are promoted as by `jax.nn.log_sigmoid`.
      order: accuracy, as in `exp`. The relative error is of that size in both tails too.

    Returns:
      An array of x's shape and (promoted) dtype, with values of at most 0.

    Raises:
      TypeError: if x is complex, boolean or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.log_sigmoid(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("log_sigmoid", order, x)


@elementwise(
    Kernel(
        _log1p_of_exp,
        (_LN2, _INF, 0),
        lambda x, y, order: derivative.KERNELS["sigmoid"](x, order=order),
        forms=(
            lambda x: jnp.log1p(jnp.exp(x)),
            lambda x: jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))),
        ),
    ),
    replaces=jax.nn.softplus,
)
def softplus(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """log(1 + e^x): `jax.nn.softplus` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.softplus`.
      order: accuracy, as in `exp`. The relative error is of that size in both tails too.

    Returns:
      An array of x's shape and (promoted) dtype, with values of at least 0.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.softplus(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("softplus", order, x)


@elementwise(
    Kernel(
        lambda m, x: x / (1 + m.exp(-x)),
        (0, _INF, 0),
        derivative.silu,
        forms=(lambda x: x * jax.nn.sigmoid(x),),
    ),
    replaces=jax.nn.silu,
)
def silu(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """SiLU or swish, x · sigmoid(x): `jax.nn.silu` with QuAKE (arXiv 2412.00408).

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is complex, integer or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.silu(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("silu", order, x)


swish = silu


@elementwise(
    Kernel(
        lambda m, x: x * m.tanh(_log1p_of_exp(m, x)),
        (0, _INF, 0),
        derivative.mish,
        forms=(lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),),
    ),
    replaces=jax.nn.mish,
    default_order=4,
)
def mish(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Mish, x · tanh(softplus(x)): `jax.nn.mish` with QuAKE (arXiv 2412.00408).

    Misra, arXiv 1908.08681.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.mish`.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and (promoted) dtype; 0 at -inf, where `jax.nn.mish` gives NaN.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.mish(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("mish", order, x)


@elementwise(
    Kernel(
        lambda m, x: x / (1 + m.exp(-1.702 * x)),
        (0, _INF, 0),
        derivative.quick_gelu,
        exact=lambda x: x * jax.nn.sigmoid(1.702 * x),
    ),
)
def quick_gelu(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """GELU's sigmoid form, x · sigmoid(1.702 x), with QuAKE (arXiv 2412.00408).

    Hendrycks and Gimpel, arXiv 1606.08415, section 2. CLIP uses it; jax.nn has no name for it.

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`. "exact" is `x * jax.nn.sigmoid(1.702 * x)`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.quick_gelu(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("quick_gelu", order, x)


def _is_one(alpha) -> bool:
    """Whether alpha is the Python number 1, for which there is a kernel."""
    return isinstance(alpha, (int, float)) and alpha == 1


@elementwise(
    Kernel(
        _elu_formula,
        (0, _INF, -1),
        lambda x, y, order: jnp.where(x > 0, 1.0, y + 1),
        alpha_forms=(
            jax.nn.elu,
            lambda x, alpha: jnp.where(x > 0, x, alpha * jnp.expm1(x)),
            lambda x, alpha: jnp.where(x >= 0, x, alpha * jnp.expm1(x)),
            lambda x, alpha: jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0))),
            # celu, if alpha is 1
            lambda x, alpha: jnp.maximum(x, 0) + alpha * jnp.expm1(jnp.minimum(x, 0)),
            lambda x, alpha: jnp.maximum(x, 0) + jnp.minimum(alpha * jnp.expm1(x), 0),
        ),
    ),
    replaces=jax.nn.elu,
)
def elu(x: ArrayLike, alpha: ArrayLike = 1.0, *, order: Order | None = None) -> jax.Array:
    """Exponential linear unit, x or alpha · (e^x - 1): `jax.nn.elu` with QuAKE (arXiv 2412.00408).

    Clevert et al., arXiv 1511.07289.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.elu`.
      alpha: a number or an array that broadcasts with x. The number 1 has a kernel of its own;
        others use that of `expm1`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of the broadcast shape and promoted dtype of x and alpha.

    Raises:
      TypeError: if x or alpha is complex or no array.
      ValueError: if x and alpha do not broadcast.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.elu(jnp.array([-1.0, 0.0, 1.0]), 0.5)
    """
    if _is_one(alpha):
        return apply("elu", order, x)
    return _elu_alpha_call(resolved_order(order, "elu"), x, alpha)


@elementwise(
    Kernel(_elu_formula, (0, _INF, -1), alpha_forms=(jax.nn.celu,), shares="elu"),
    replaces=jax.nn.celu,
)
def celu(x: ArrayLike, alpha: ArrayLike = 1.0, *, order: Order | None = None) -> jax.Array:
    """max(x, 0) + alpha · (e^(min(x, 0)/alpha) - 1): `jax.nn.celu` with QuAKE (arXiv 2412.00408).

    Barron, arXiv 1704.07483.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.celu`.
      alpha: a number or an array that broadcasts with x. The number 1 has a kernel of its own;
        others use that of `expm1`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of the broadcast shape and promoted dtype of x and alpha.

    Raises:
      TypeError: if x or alpha is complex or no array.
      ValueError: if x and alpha do not broadcast.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.celu(jnp.array([-1.0, 0.0, 1.0]), 0.5)
    """
    if _is_one(alpha):
        return apply("celu", order, x)
    return _celu_alpha_call(resolved_order(order, "celu"), x, alpha)


def _elu_of_any_alpha(x, alpha, *, order):
    x, alpha, dtype = x.astype(jnp.float32), alpha.astype(jnp.float32), x.dtype
    # The kernel sees no large x, whose result would be inf and its derivative inf · 0.
    low = FUNCTIONS["expm1"].differentiable(jnp.where(x > 0, 0.0, x), order=order)
    return jnp.where(x > 0, x, alpha * low).astype(dtype)


def _celu_of_any_alpha(x, alpha, *, order):
    x, alpha, dtype = x.astype(jnp.float32), alpha.astype(jnp.float32), x.dtype
    low = FUNCTIONS["expm1"].differentiable(jnp.where(x > 0, 0.0, x) / alpha, order=order)
    return jnp.where(x > 0, x, alpha * low).astype(dtype)


_elu_alpha_call = drop_in("elu", _elu_of_any_alpha, jax.nn.elu, arrays=["x", "alpha"])
_celu_alpha_call = drop_in("celu", _celu_of_any_alpha, jax.nn.celu, arrays=["x", "alpha"])


@elementwise(
    Kernel(
        lambda m, x: SELU_SCALE * _elu_formula(m, x, SELU_ALPHA),
        (0, _INF, -SELU_SCALE * SELU_ALPHA),
        lambda x, y, order: jnp.where(x > 0, SELU_SCALE, y + SELU_SCALE * SELU_ALPHA),
    ),
    replaces=jax.nn.selu,
)
def selu(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Scaled exponential linear unit: `jax.nn.selu` with QuAKE (arXiv 2412.00408).

    Klambauer et al., arXiv 1706.02515.

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.selu`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of x's shape and (promoted) dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.selu(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("selu", order, x)


@elementwise(
    Kernel(lambda m, x: m.tanh(x), (0, 1, -1), lambda x, y, order: (1 - y) * (1 + y)),
    replaces=jnp.tanh,
)
def tanh(x: ArrayLike, /, *, order: Order | None = None) -> jax.Array:
    """Hyperbolic tangent: `jax.numpy.tanh` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.numpy.tanh`.
      order: accuracy, as in `exp`. The relative error is of that size near 0 too.

    Returns:
      An array of x's shape and (promoted) dtype, with values from -1 to 1.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.tanh(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("tanh", order, x)


@elementwise(
    Kernel(
        # 1 + tanh(v) is 2·sigmoid(2v), which does not cancel in the left tail.
        lambda m, x: x / (1 + m.exp(-m.sqrt(8 / m.pi) * (x + 0.044715 * x**3))),
        (0, _INF, 0),
        derivative.gelu_tanh,
        forms=(lambda x: x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),),
        name="gelu_tanh",
    ),
    Kernel(
        lambda m, x: x * m.erfc(-x / m.sqrt(2)) / 2,
        (0, _INF, 0),
        derivative.gelu_erf,
        forms=(lambda x: 0.5 * x * (1 + jax.scipy.special.erf(x / 2**0.5)),),
        name="gelu_erf",
        keywords={"approximate": False},
        exact=lambda x: jax.nn.gelu(x, approximate=False),
    ),
    replaces=jax.nn.gelu,
)
def gelu(x: ArrayLike, approximate: bool = True, *, order: Order | None = None) -> jax.Array:
    """Gaussian error linear unit: `jax.nn.gelu` with QuAKE (arXiv 2412.00408).

    Args:
      x: real array of any shape; integers and bool are promoted as by `jax.nn.gelu`.
      approximate: True for the tanh form x · sigmoid(√(8/π)·(x + 0.044715·x³)), False for x · Φ(x)
        with Φ the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415).
      order: accuracy with which the chosen form is computed, as in `exp`.

    Returns:
      An array of x's shape and (promoted) dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.gelu(jnp.array([-1.0, 0.0, 1.0]), approximate=False)
    """
    approximate = static_bool(approximate, "gelu", "approximate")
    return apply("gelu_tanh" if approximate else "gelu_erf", order, x)


__all__ = defined_in(globals())
