"""A key in, normal draws out, two of them made of two uniform words.

JAX makes a draw of one word, by inverting the error function, and that word of two that Threefry
gives. Here one word is the radius and one the angle of a point in the plane, whose two coordinates
are two draws: a fraction of the time, and the tails end at 6.8 standard deviations, not at 5.4.
From a Threefry key a draw depends on its own index alone, so that a sharded draw needs no
communication.

Reference: Box and Muller 1958, "A note on the generation of random normal deviates".
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex64, Float, PRNGKeyArray, UInt32

from dpoptax.random._threefry_unrolled import counted_words, is_threefry, unrolled

# -2 log(1 + m) = m (p_0 + p_1 m + ...) for sqrt(1/2) <= 1 + m < sqrt(2), a minimax fit, at most
# 3.5e-8 of it off. XLA's own logarithm spends much of its time on zero, infinity and NaN.
LOGARITHM = (
    *(-2.0, 0.999999821, -0.666679025, 0.500035107, -0.399241388),
    *(0.331410617, -0.298360676, 0.286147386, -0.174689576),
)
SQRT_HALF = np.float32(math.sqrt(0.5)).view(np.int32)
# For |t| <= 1/2, with one divisor D = 1 + d t^2: minimax fits, at most 6e-8 of them off.
# sin(pi t) = t (s_0 + s_1 t^2 + ...) / D, cos(pi t) = (1 - 2 t)(1 + 2 t)(c_0 + c_1 t^2 + ...) / D.
DIVISOR = (1.0, 0.14133812)
SINE = (math.pi, -4.72368765, 1.81982058, -0.239390816)
COSINE = (1.00000005, -0.793470411, 0.187505802, -0.0129075869)
SIGN = np.uint32(1 << 31)


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Draws from N(0, 1): in float32 by Box and Muller, in float64 as JAX does.

    Args:
        key: of any type.
        shape: of the draw.
        dtype: float32 or wider.

    Returns:
        Independent draws.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> draws = normal(jax.random.key(0), (100_000,), jnp.float32)
        >>> 0.99 < float(draws.std()) < 1.01
        True
    """
    if dtype != jnp.float32 or math.prod(shape) >= 2**32:
        return jax.random.normal(unrolled(key), shape, dtype)
    return _of_counters(key, shape) if is_threefry(key) else _of_stream(key, shape)


def _of_counters(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Two draws lie half an axis apart, on the first axis that has two equal halves."""
    sides = shape or (1,)
    axis = next((axis for axis, side in enumerate(sides) if side % 2 == 0), 0)
    before, side, after = sides[:axis], sides[axis], sides[axis + 1 :]
    half = (*before, -(-side // 2), *after)
    points = from_words(*counted_words(jax.random.key_data(key), half))
    points = jnp.expand_dims(points, axis)
    first = jax.lax.broadcasted_iota(jnp.int32, (*before, 2, *half[axis:]), axis) == 0
    both = jnp.where(first, points.real, points.imag)
    draws = both.reshape(*before, 2 * half[axis], *after)
    return jax.lax.slice_in_dim(draws, 0, side, axis=axis).reshape(shape)


def _of_stream(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Two draws lie side by side, as their words do: a device needs only its part of the stream."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2), 2), jnp.uint32)
    points = from_words(words[:, 0], words[:, 1])
    return jnp.stack([points.real, points.imag], axis=-1).reshape(-1)[:size].reshape(shape)


def from_words(
    radius: UInt32[Array, "..."], angle: UInt32[Array, "..."]
) -> Complex64[Array, "..."]:
    """Makes two normal draws of two uniform words: a point of the plane.

    Args:
        radius: of the point, sqrt(-2 log u) at u = (radius + 1/2) / 2**32.
        angle: the sign of the real part, and 31 bits of pi t with |t| <= 1/2, from the real axis.

    Returns:
        Complex numbers; either part has the law N(0, 1), and is at most 6.77 in size.

    Example:
        >>> import jax.numpy as jnp
        >>> f"{complex(from_words(jnp.uint32(0), jnp.uint32(2**29))):.3f}"  # t = 1/4
        '4.783+4.783j'
    """
    bits = jax.lax.bitcast_convert_type(angle << np.uint32(1), jnp.int32)
    t = bits.astype(jnp.float32) * np.float32(2**-32)
    size, square, two = jnp.sqrt(_exponential(radius)), t * t, np.float32(2)
    cosine = (1 - two * t) * (1 + two * t) * _polynomial(COSINE, square)
    cosine = jnp.where(angle < SIGN, cosine, -cosine)
    sine = t * _polynomial(SINE, square)
    divisor = _polynomial(DIVISOR, square)
    # A quotient of complex numbers, as the last thing, XLA computes once. Sums and products it
    # repeats, and all that they are made of, for either part and for each array that an optimizer
    # makes of a release.
    point = jax.lax.complex(size * cosine, size * sine)
    return point / jax.lax.complex(divisor, jnp.zeros_like(divisor))


def _exponential(word: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """-2 log((word + 1/2) / 2**32), by the exponent and the mantissa of a float."""
    bits = jax.lax.bitcast_convert_type(word.astype(jnp.float32) + np.float32(0.5), jnp.int32)
    exponent = (bits - SQRT_HALF) & np.int32(-(2**23))
    m = jax.lax.bitcast_convert_type(bits - exponent, jnp.float32) - np.float32(1)
    whole = (exponent - np.int32(32 * 2**23)).astype(jnp.float32)
    return np.float32(-2 * math.log(2) / 2**23) * whole + m * _polynomial(LOGARITHM, m)


def _polynomial(coefficients: tuple[float, ...], x: Float[Array, "..."]) -> Float[Array, "..."]:
    total = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + np.float32(coefficient)
    return total
