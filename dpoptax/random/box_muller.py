"""A key in, normal draws out, each made of the two words of one Threefry counter.

JAX inverts the error function, and uses half of what Threefry gives. Here a word is the radius and
a word is the angle, at half the time, and the tails end at 6.8 standard deviations, not at 5.4. A
draw depends on its own index alone, so that a sharded draw needs no communication.

Reference: Box and Muller 1958, "A note on the generation of random normal deviates".
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from dpoptax.random.threefry import counted_words, is_threefry, written_out

# -2 log(1 + m) = m (p_0 + p_1 m + ...) for sqrt(1/2) <= 1 + m < sqrt(2), a minimax fit, at most
# 3.5e-8 of it off. XLA's own logarithm spends much of its time on zero, infinity and NaN.
LOGARITHM = (
    *(-2.0, 0.999999821, -0.666679025, 0.500035107, -0.399241388),
    *(0.331410617, -0.298360676, 0.286147386, -0.174689576),
)
SQRT_HALF = np.float32(math.sqrt(0.5)).view(np.int32)
# sin(pi t) = t (p_0 + p_1 t^2 + ...): Taylor's series, 7e-10 off at t = 1/2.
SINE = tuple((-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(7))


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Draws from N(0, 1): by Box and Muller in float32 from Threefry keys, else as JAX does.

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
    if not is_threefry(key) or dtype != jnp.float32 or math.prod(shape) >= 2**32:
        return jax.random.normal(written_out(key), shape, dtype)
    return from_words(*counted_words(jax.random.key_data(key), shape))


def from_words(radius: UInt32[Array, "..."], angle: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """Makes a normal draw of two uniform words: sqrt(-2 log u) sin(pi t), |t| <= 1/2.

    The sine of an angle in the right half plane has the law of the sine of any angle.

    Args:
        radius: u = (radius + 1/2) / 2**32.
        angle: as a signed number, t = angle / 2**32.

    Returns:
        Float32, at most 6.77 in size.

    Example:
        >>> import jax.numpy as jnp
        >>> quarter = jnp.uint32(2**30)  # t = 1/4
        >>> f"{float(from_words(jnp.uint32(0), quarter)):.3f}"
        '4.783'
    """
    turn = jax.lax.bitcast_convert_type(angle, jnp.int32).astype(jnp.float32) * np.float32(2**-32)
    sine = turn * _polynomial(SINE, turn * turn)
    return jnp.sqrt(_exponential(radius)) * sine


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
