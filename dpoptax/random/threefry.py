"""A Threefry key in, the same key with a faster way to the same words out.

JAX draws the words of its default keys in a loop of rounds, to spare the compiler. Written out, the
rounds melt into whatever uses the words, and a draw on a processor takes a third of the time; every
word depends on its own index alone, so that a sharded draw needs no communication.

Reference: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
from typing import Any, NoReturn

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

# Of Threefry-2x32 with 20 rounds: four rounds, then a key word is added, five times.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
# What `str(jax.random.key_impl(key))` says of a key of JAX's default type.
THREEFRY = "threefry2x32"


def written_out(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a key for one large draw of 32 or 64 bits a number; other keys return as they are.

    Args:
        key: of any type.

    Returns:
        A key that gives the numbers of `key` (with JAX's default `jax_threefry_partitionable`); it
        cannot be split.
    """
    if str(jax.random.key_impl(key)) != THREEFRY:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=WRITTEN_OUT)


def mix(
    key: UInt32[Array, "2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Mixes a counter of two words (section 4.2).

    Args:
        key: two words.
        high: of the counter.
        low: of the counter.

    Returns:
        Two words.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(PARITY))
    high, low = high + schedule[0], low + schedule[1]
    for turn in range(1, 6):
        for bits in ROTATIONS[(turn - 1) % 2]:
            high = high + low
            low = high ^ ((low << np.uint32(bits)) | (low >> np.uint32(32 - bits)))
        high = high + schedule[turn % 3]
        low = low + schedule[(turn + 1) % 3] + np.uint32(turn)
    return high, low


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    if bit_width not in (32, 64) or math.prod(shape) >= 2**32:
        plain = jax.random.wrap_key_data(key, impl=THREEFRY)
        return jax.random.bits(plain, shape, jnp.dtype(f"uint{bit_width}"))
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index, stride = index + place * np.uint32(stride), stride * shape[axis]
    high, low = mix(key, jnp.zeros(shape, jnp.uint32), index)
    if bit_width == 32:
        return high ^ low
    return (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)


def _draws_only(*_: Any) -> NoReturn:
    raise TypeError("a key of `written_out` is for one draw. Split the key that it was made of.")


WRITTEN_OUT = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=_draws_only,
    split=_draws_only,
    random_bits=_random_bits,
    fold_in=_draws_only,
    name="threefry2x32 written out",
    tag="fryw",
)
