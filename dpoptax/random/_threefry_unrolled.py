"""Threefry with unrolled rounds: the numbers of JAX's default PRNG, faster on a CPU.

On a CPU, JAX runs the rounds of its default PRNG in a loop. With the rounds unrolled, XLA fuses
them into the code that uses the words. A large draw then takes a third of the time, and deriving a
key costs almost nothing. The words are identical to JAX's, which the tests check. Together with
`_normal.py` this brings the noise for 688,884 parameters from 3.7 ms to 1.6 ms on two cores, in a
private step of 5.8 ms (docs/randomness.md and docs/benchmarks.md). `Gaussian(jax_random=True)`
draws with JAX's own code instead.

Each word depends only on its own index, so a sharded draw needs no communication.

Reference: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

from dpoptax._jax_compat import define_prng_impl

# Threefry-2x32 with 20 rounds: five times four rounds, each four followed by a key word.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
# The name of JAX's default key type in `str(jax.random.key_impl(key))`, and of the unrolled one.
THREEFRY = "threefry2x32"
UNROLLED_TAG = "fryw"


def unrolled(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a key with the numbers of a Threefry key, faster; returns other keys unchanged.

    The numbers are those of JAX with `jax_threefry_partitionable`, its default.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> bool((jax.random.normal(unrolled(key), (9,)) == jax.random.normal(key, (9,))).all())
        True
    """
    if str(jax.random.key_impl(key)) != THREEFRY:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=UNROLLED)


def rolled(key: PRNGKeyArray) -> PRNGKeyArray:
    """Undoes `unrolled`: returns a key that JAX's own code draws from."""
    if str(jax.random.key_impl(key)) != UNROLLED_TAG:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=THREEFRY)


def is_threefry(key: PRNGKeyArray) -> bool:
    """Whether a key is a Threefry key, unrolled or not."""
    return str(jax.random.key_impl(key)) in (THREEFRY, UNROLLED_TAG)


@jax.jit  # an eager update would otherwise dispatch some eighty operations one by one
def mix(
    key: UInt32[Array, "2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Returns the two output words for a key and a counter, both of two words (section 4.2)."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(PARITY))
    high, low = high + schedule[0], low + schedule[1]
    for turn in range(1, 6):
        for bits in ROTATIONS[(turn - 1) % 2]:
            high = high + low
            low = high ^ ((low << np.uint32(bits)) | (low >> np.uint32(32 - bits)))
        high = high + schedule[turn % 3]
        low = low + schedule[(turn + 1) % 3] + np.uint32(turn)
    return high, low


def counted_words(
    key: UInt32[Array, "2"], shape: tuple[int, ...]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Returns two words for each element of an array of fewer than 2**32, from its flat index."""
    # Not `arange(size).reshape(shape)`: an iota per axis lets each device compute its own indices.
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index, stride = index + place * np.uint32(stride), stride * shape[axis]
    return mix(key, jnp.zeros(shape, jnp.uint32), index)


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    # JAX's own code handles the rare cases: narrow words, and indices of more than 32 bits.
    if bit_width not in (32, 64) or math.prod(shape) >= 2**32:
        own = jax.random.wrap_key_data(key, impl=THREEFRY)
        return jax.random.bits(own, shape, jnp.dtype(f"uint{bit_width}"))
    high, low = counted_words(key, shape)
    if bit_width == 32:
        return high ^ low
    return (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)


def _as_key(words: tuple[Array, Array]) -> Array:
    # Without the barrier XLA fuses the derivation of a key into the draw, and repeats it for each
    # number. That is slower and takes many times as long to compile.
    return jax.lax.optimization_barrier(jnp.stack(words, axis=-1))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return _as_key(counted_words(key, shape))


def _fold_in(key: Array, data: Any) -> Array:
    datum = jnp.asarray(data, jnp.uint32)
    return _as_key(mix(key, jnp.zeros_like(datum), datum))


def _no_seed(seed: Any) -> NoReturn:
    raise TypeError(
        f"an unrolled key is made from another key: unrolled(jax.random.key({seed})); got a seed."
    )


UNROLLED = define_prng_impl(
    key_shape=(2,),
    seed=_no_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32 unrolled",
    tag=UNROLLED_TAG,
)
