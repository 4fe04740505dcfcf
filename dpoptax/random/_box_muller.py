"""The formula of Box and Muller: two uniform words are the radius and the angle of a point.

The two coordinates of the point are two independent normal draws. The operations are in float32, so
a result can differ in the last bit between compiled programs.

Reference: Box and Muller 1958, "A note on the generation of random normal deviates".
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex64, Float, UInt32

# -2 log(1 + m) = m (p_0 + p_1 m + ...) for sqrt(1/2) <= 1 + m < sqrt(2): a minimax fit with an
# error of at most 3.5e-8. XLA's own logarithm spends much of its time on zero, infinity and NaN,
# which cannot occur here.
LOGARITHM = (
    *(-2.0, 0.999999821, -0.666679025, 0.500035107, -0.399241388),
    *(0.331410617, -0.298360676, 0.286147386, -0.174689576),
)
SQRT_HALF = np.float32(math.sqrt(0.5)).view(np.int32)
# For |t| <= 1/2, with the common divisor D = 1 + d t^2, minimax fits with errors of at most 6e-8:
# sin(pi t) = t (s_0 + s_1 t^2 + ...) / D, cos(pi t) = (1 - 2 t)(1 + 2 t)(c_0 + c_1 t^2 + ...) / D.
DIVISOR = (1.0, 0.14133812)
SINE = (math.pi, -4.72368765, 1.81982058, -0.239390816)
COSINE = (1.00000005, -0.793470411, 0.187505802, -0.0129075869)
SIGN = np.uint32(1 << 31)


def from_words(
    radius: UInt32[Array, "..."], angle: UInt32[Array, "..."]
) -> Complex64[Array, "..."]:
    """Returns complex numbers whose two parts are independent N(0, 1), at most 6.77 in size.

    The distance from zero is sqrt(-2 log u) with u = (radius + 1/2) / 2**32. The first bit of
    `angle` is the sign of the real part; the other 31 bits are pi t, |t| <= 1/2, the angle from
    the real axis.

    Example:
        >>> import jax.numpy as jnp
        >>> f"{complex(from_words(jnp.uint32(0), jnp.uint32(2**29))):.3f}"  # t = 1/4
        '4.783+4.783j'
    """
    size = jnp.sqrt(_exponential(radius))
    cosine, sine, divisor = _angle(angle)
    # End with a complex division, which XLA does not duplicate. After a last addition or
    # multiplication, XLA fuses the whole draw into every consumer and computes it again: with Adam
    # it did so three times.
    point = jax.lax.complex(size * cosine, size * sine)
    return point / jax.lax.complex(divisor, jnp.zeros_like(divisor))


def polar(
    radius: UInt32[Array, "..."], angle: UInt32[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Returns a size, a cosine and a sine; size times each is a part of `from_words`, rounded."""
    cosine, sine, divisor = _angle(angle)
    return jnp.sqrt(_exponential(radius)) / divisor, cosine, sine


def _angle(word: UInt32[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Returns the cosine and the sine of an angle times a divisor, and the divisor."""
    bits = jax.lax.bitcast_convert_type(word << np.uint32(1), jnp.int32)
    t = bits.astype(jnp.float32) * np.float32(2**-32)
    square, two = t * t, np.float32(2)
    cosine = (1 - two * t) * (1 + two * t) * _polynomial(COSINE, square)
    cosine = jnp.where(word < SIGN, cosine, -cosine)
    return cosine, t * _polynomial(SINE, square), _polynomial(DIVISOR, square)


def _exponential(word: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Returns -2 log((word + 1/2) / 2**32), from the exponent and the mantissa of a float."""
    bits = jax.lax.bitcast_convert_type(word.astype(jnp.float32) + np.float32(0.5), jnp.int32)
    # Subtracting the bits of sqrt(1/2) first rounds the exponent so that the mantissa 1 + m lies in
    # the interval of the fit, around 1.
    exponent = (bits - SQRT_HALF) & np.int32(-(2**23))
    m = jax.lax.bitcast_convert_type(bits - exponent, jnp.float32) - np.float32(1)
    whole = (exponent - np.int32(32 * 2**23)).astype(jnp.float32)
    return np.float32(-2 * math.log(2) / 2**23) * whole + m * _polynomial(LOGARITHM, m)


def _polynomial(coefficients: tuple[float, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    result = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + np.float32(coefficient)
    return result
