"""Normal draws by the Box-Muller method: two draws from two uniform words.

`jax.random.normal` inverts the error function, once per draw, and uses one of the two words that
Threefry computes for it. Here one word is the radius and the other the angle of a point in the
plane, and the two coordinates of the point are two draws. On a CPU this takes about half the time
(docs/randomness.md). The tails end at 6.8 standard deviations instead of 5.4. The operations are
in float32, so the result can differ in the last bit between compiled programs.
`Gaussian(jax_random=True)` draws with `jax.random.normal` instead.

From a Threefry key a draw depends only on its own index, so a sharded draw needs no communication.
`_chacha_normal.py` has the draws from ChaCha keys.

Reference: Box and Muller 1958, "A note on the generation of random normal deviates".
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from dpoptax.random._box_muller import from_words
from dpoptax.random._chacha import rounds_of
from dpoptax.random._chacha_normal import normals
from dpoptax.random._threefry_unrolled import counted_words, is_threefry, unrolled


def normal(key: PRNGKeyArray, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Draws from N(0, 1): float32 by Box-Muller, float64 as `jax.random.normal` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> draws = normal(jax.random.key(0), (100_000,), jnp.float32)
        >>> 0.99 < float(draws.std()) < 1.01
        True
    """
    known = is_threefry(key) or rounds_of(key) is not None
    if dtype != jnp.float32 or math.prod(shape) >= 2**32 or not known:
        return jax.random.normal(unrolled(key), shape, dtype)
    if rounds_of(key) is not None:
        return normals(key, [shape])[0]
    return _from_counters(key, shape)


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
