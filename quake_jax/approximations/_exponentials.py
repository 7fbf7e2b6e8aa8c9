"""Exponentials in floating point: Schraudolph's, the ratio form, Malossi's and FlashAttention-4's.

All write e^x = 2^n 2^f, with n = ⌊x log2 e⌋ in the exponent field of a float32. Published for
double precision or for vector units, they are float32 here.
"""

from __future__ import annotations

import numbers

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from quake_jax.approximations import _arguments
from quake_jax.approximations._front import exp_front

_LOG2E = 1.4426950408889634
# ln 2 in two parts; n times the first is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444005469057
_FRACTION_BITS = 23
_BIAS = 127

# The C of float32: 2^3 times the c of the paper's table, which is for 2^20, where it is there; the
# three of five or six digits are finer values in circulation, within 6 of that.
SCHRAUDOLPH_C = {
    "upper": 0,  # never below e^x; c = -1 in the paper, for the rounding of an integer
    "minimax": 366392,  # smallest largest relative error, c = 45799
    "rms": 486411,  # smallest root mean square error, c = 60801
    "mean": 545947,  # smallest mean error, c = 68243
    "lower": 722019,  # never above e^x, c = 90253
}


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """n (float32, -127…128) and f in [0, 1) with x = (n + f) ln 2, as far as n is in range."""
    # Beyond, results are 0 or inf, and inf - inf is avoided.
    x = jnp.clip(x, -100.0, 100.0)
    n = jnp.floor(x * _LOG2E)
    f = ((x - n * _LN2_HIGH) - n * _LN2_LOW) * _LOG2E
    return n, jnp.clip(f, 0.0, 1.0)


def _float_of_bits(bits: jax.Array, n: jax.Array) -> jax.Array:
    """float32 of int32 bits: 0 below the normal range, inf where n is 128 or more."""
    bits = jnp.where(bits < 1 << _FRACTION_BITS, 0, bits)
    return jnp.where(n >= 128, jnp.inf, lax.bitcast_convert_type(bits, jnp.float32))


def _piecewise_linear(x: jax.Array, c: int) -> jax.Array:
    n, f = _split(x)
    exponent = (jnp.clip(n, -_BIAS, 127).astype(jnp.int32) + _BIAS) << _FRACTION_BITS
    return _float_of_bits(exponent + jnp.floor(f * 2.0**_FRACTION_BITS).astype(jnp.int32) - c, n)


_schraudolph_call = exp_front("schraudolph_exp", lambda x, *, C: _piecewise_linear(x, C))


def schraudolph_exp(x: ArrayLike, *, C: str | int = "rms") -> jax.Array:
    """Schraudolph's exponential: the bits ⌊2^23 (x / ln 2 + 127)⌋ - C, read as a float32.

    Schraudolph, "A Fast, Compact Approximation of the Exponential Function", Neural Computation
    11(4), 1999. Published for the upper half of a double, 2^20 (x / ln 2 + 1023) - c; C = 8 c.
    Largest relative error: 6.2e-2 for C = 0 ("upper") and 5.8e-2 for 722019 ("lower"), which bound
    e^x from above and below; 3.0e-2 for 366392 ("minimax"); 3.9e-2 and 4.4e-2 for 486411 ("rms",
    smallest root mean square) and 545947 ("mean").

    Args:
      x: array of any shape and floating-point dtype; arithmetic is float32.
      C: a name from above, or an integer from 0 to 2^23.

    Returns:
      An array of x's shape and dtype: inf for x of at least 128 ln 2; 0 where the result would
      not be a normal float32; NaN for NaN. The derivative is exp's.

    Raises:
      TypeError: if x has no floating-point dtype; if C is neither a name nor an integer.
      ValueError: if C is out of range, or an unknown name.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.schraudolph_exp(jnp.array([0.0]), C="upper").tolist()
      [1.0]
    """
    name = "schraudolph_exp"
    if isinstance(C, str):
        C = SCHRAUDOLPH_C[_arguments.choice(C, name, "C", tuple(SCHRAUDOLPH_C))]
    elif not isinstance(C, numbers.Integral):
        raise TypeError(
            f"quake_jax.approximations.{name}: C must be an integer or one of "
            f"{', '.join(map(repr, SCHRAUDOLPH_C))}; got {C!r}"
        )
    return _schraudolph_call(x, C=_arguments.integer(C, name, "C", 0, 2**23))


def _ratio(x):
    # Beyond 127 ln 2 the quotient overflows or underflows as it should.
    half = jnp.clip(x / 2, -80.0, 80.0)
    y = _piecewise_linear(half, 0) / _piecewise_linear(-half, 0)
    return jnp.where(y < 2.0**-126, 0, y)


_ratio_call = exp_front("ratio_exp", _ratio)


def ratio_exp(x: ArrayLike) -> jax.Array:
    """The ratio form of Schraudolph's exponential: exp(x / 2) / exp(-x / 2), both with C = 0.

    Largest relative error 1.05e-2: the errors of the two partly cancel, so that a division buys
    two bits. It is known from forums and code, not from a paper that we know of. With another
    constant, the same in both, the error is larger: C moves the seams.

    Args:
      x: array of any shape and floating-point dtype; arithmetic is float32.

    Returns:
      An array of x's shape and dtype: inf and 0 where float32 ends; NaN for NaN. The derivative
      is exp's.

    Raises:
      TypeError: if x has no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> approximations.ratio_exp(jnp.array([0.0])).tolist()
      [1.0]
    """
    return _ratio_call(x)


# K(f) ≈ 1 + f - 2^f on [0, 1), lowest degree first.
MALOSSI_COEFFICIENTS = {
    2: (-2.47142816509723700e-3, 3.48943001636461247e-1, -3.44000145306266492e-1),
    3: (
        1.06906116358144185e-4,
        3.03543677780836241e-1,
        -2.24339532327269442e-1,
        -7.92041454535668682e-2,
    ),
    4: (
        -3.70138142771437267e-6,
        3.07033820309224326e-1,
        -2.41638288055762540e-1,
        -5.16904731562965389e-2,
        -1.36976563343097994e-2,
    ),
}


def _horner(coefficients, f):
    y = jnp.full_like(f, coefficients[-1])
    for c in coefficients[-2::-1]:
        y = y * f + c
    return y


def _malossi(x, *, degree):
    n, f = _split(x)
    exponent = (jnp.clip(n, -_BIAS, 127).astype(jnp.int32) + _BIAS) << _FRACTION_BITS
    fraction = (f - _horner(MALOSSI_COEFFICIENTS[degree], f)) * 2.0**_FRACTION_BITS
    return _float_of_bits(exponent + jnp.floor(fraction).astype(jnp.int32), n)


_malossi_call = exp_front("malossi_exp", _malossi)


def malossi_exp(x: ArrayLike, *, degree: int = 3) -> jax.Array:
    """Malossi's exponential: Schraudolph's with a polynomial that corrects the fraction.

    Malossi, Ineichen, Bekas, Curioni, "Fast Exponential Computation on SIMD Architectures", WAPCO
    (workshop of HiPEAC), 2015: the bits 2^23 (t - K(t - ⌊t⌋) + 127), t = x log2 e, with
    K(f) ≈ 1 + f - 2^f a polynomial. Published for doubles and degrees up to 11. Largest relative
    error 2.5e-3, 1.1e-4, 4e-6 for degrees 2, 3, 4.

    Uncertain: the coefficients are those of Inastemp's implementation of the paper, also found
    elsewhere as the paper's; we have not seen the paper's own table.

    Args:
      x: array of any shape and floating-point dtype; arithmetic is float32.
      degree: 2, 3 or 4.

    Returns:
      An array of x's shape and dtype: inf for x of at least 128 ln 2; 0 where the result would
      not be a normal float32; NaN for NaN. The derivative is exp's.

    Raises:
      TypeError: if x has no floating-point dtype, or degree is no integer.
      ValueError: if degree is not 2, 3 or 4.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.malossi_exp(jnp.array([1.0]), degree=4)
      >>> bool(abs(y[0] - 2.7182818) < 2e-5)
      True
    """
    return _malossi_call(x, degree=_arguments.integer(degree, "malossi_exp", "degree", 2, 4))


# 2^f on [0, 1), lowest degree first.
FLASH_ATTENTION4_COEFFICIENTS = (1.0, 0.6951461434, 0.2275643945, 0.0771190897)


def _flash_attention4(x):
    n, f = _split(x)
    y = jnp.ldexp(
        _horner(FLASH_ATTENTION4_COEFFICIENTS, f), jnp.clip(n, -_BIAS, 127).astype(jnp.int32)
    )
    return jnp.where(n >= 128, jnp.inf, jnp.where(y < 2.0**-126, 0, y))


_flash_attention4_call = exp_front("flash_attention4_exp", _flash_attention4)


def flash_attention4_exp(x: ArrayLike) -> jax.Array:
    """FlashAttention-4's exponential on multiply-add units: a cubic for 2^f.

    Zadouri, Hoehnerbach, Shah, Liu, Thakkar, Dao, "FlashAttention-4: Algorithm and Kernel
    Pipelining Co-Design for Asymmetric Hardware Scaling", arXiv 2603.05451, 2026:
    2^f ≈ ((0.0771190897 f + 0.2275643945) f + 0.6951461434) f + 1. Largest relative error 9e-5.
    There, t = x log2 e is made by the caller, in float32; here f is what the exact n leaves.

    Args:
      x: array of any shape and floating-point dtype; arithmetic is float32.

    Returns:
      An array of x's shape and dtype: inf for x of at least 128 ln 2; 0 where the result would
      not be a normal float32; NaN for NaN. The derivative is exp's.

    Raises:
      TypeError: if x has no floating-point dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from quake_jax import approximations
      >>> y = approximations.flash_attention4_exp(jnp.array([0.0, 1.0]))
      >>> bool(abs(y[1] - 2.71828) < 3e-4)
      True
    """
    return _flash_attention4_call(x)
