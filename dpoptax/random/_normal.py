"""Normal draws by the Box-Muller method: two draws from two uniform words.

`jax.random.normal` inverts the error function, once per draw, and uses one of the two words that
Threefry computes for it. Here one word is the radius and the other the angle of a point in the
plane, and the two coordinates of the point are two draws. On a CPU this takes about half the time
(docs/randomness.md). The tails end at 6.8 standard deviations instead of 5.4. The operations are
in float32, so the result can differ in the last bit between compiled programs.
`Gaussian(jax_random=True)` draws with `jax.random.normal` instead.

From a Threefry key a draw depends only on its own index, so a sharded draw needs no communication.

Reference: Box and Muller 1958, "A note on the generation of random normal deviates".
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Complex64, Float, PRNGKeyArray, UInt32

from dpoptax.random._threefry_unrolled import counted_words, is_threefry, unrolled

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


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Draws from N(0, 1): float32 by Box-Muller, float64 as `jax.random.normal` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> draws = normal(jax.random.key(0), (100_000,), jnp.float32)
        >>> 0.99 < float(draws.std()) < 1.01
        True
    """
    if dtype != jnp.float32 or math.prod(shape) >= 2**32:
        return jax.random.normal(unrolled(key), shape, dtype)
    return _from_counters(key, shape) if is_threefry(key) else _from_stream(key, shape)


def _from_counters(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws from Threefry; the two draws of a point lie half an axis apart."""
    # The first axis with two equal halves; without one, the first axis is one draw too long, and is
    # cut at the end.
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


def _from_stream(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws from any other key; the two draws of a point are neighbours, as its two words are."""
    # Neighbours, so that a device needs only its own part of the stream of words.
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2), 2), jnp.uint32)
    points = from_words(words[:, 0], words[:, 1])
    return jnp.stack([points.real, points.imag], axis=-1).reshape(-1)[:size].reshape(shape)


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
    bits = jax.lax.bitcast_convert_type(angle << np.uint32(1), jnp.int32)
    t = bits.astype(jnp.float32) * np.float32(2**-32)
    size, square, two = jnp.sqrt(_exponential(radius)), t * t, np.float32(2)
    cosine = (1 - two * t) * (1 + two * t) * _polynomial(COSINE, square)
    cosine = jnp.where(angle < SIGN, cosine, -cosine)
    sine = t * _polynomial(SINE, square)
    divisor = _polynomial(DIVISOR, square)
    # End with a complex division, which XLA does not duplicate. After a last addition or
    # multiplication, XLA fuses the whole draw into every consumer and computes it again: with Adam
    # it did so three times.
    point = jax.lax.complex(size * cosine, size * sine)
    return point / jax.lax.complex(divisor, jnp.zeros_like(divisor))


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
