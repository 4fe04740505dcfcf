"""A Threefry key in, the same key with a faster way to the same numbers out.

On a processor JAX runs the rounds of its default generator in a loop. Written out, they melt into
whatever uses the words: a large draw takes a third of the time, and to derive a key costs next to
nothing. Every word depends on its own index alone, so that a sharded draw needs no communication.

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
# And of a key written out.
TAG = "fryw"


def unrolled(key: PRNGKeyArray) -> PRNGKeyArray:
    """Returns a key that gives the numbers of a Threefry key; other keys return as they are.

    Args:
        key: of any type.

    Returns:
        A key for `bits`, `split` and `fold_in`, and for what rests on them, with the numbers that
        JAX gives under its default setting `jax_threefry_partitionable`.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> bool((jax.random.normal(unrolled(key), (9,)) == jax.random.normal(key, (9,))).all())
        True
    """
    if str(jax.random.key_impl(key)) != THREEFRY:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=WRITTEN_OUT)


def is_threefry(key: PRNGKeyArray) -> bool:
    """Whether a key is of JAX's default type, written out or not.

    Args:
        key: of any type.

    Returns:
        True for both spellings of Threefry.

    Example:
        >>> import jax
        >>> is_threefry(unrolled(jax.random.key(0)))
        True
    """
    return str(jax.random.key_impl(key)) in (THREEFRY, TAG)


@jax.jit  # without it, the rounds go one by one where a release is not compiled
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
    high, low = counted_words(key, shape)
    if bit_width == 32:
        return high ^ low
    return (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)


def counted_words(
    key: UInt32[Array, "2"], shape: tuple[int, ...]
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Two words for every place of an array, from the index of the place.

    Args:
        key: two words.
        shape: of fewer than 2**32 places.

    Returns:
        Two arrays of that shape.

    Example:
        >>> import jax.numpy as jnp
        >>> high, low = counted_words(jnp.zeros(2, jnp.uint32), (3,))
        >>> hex(int(high[0]))
        '0x6b200159'
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index, stride = index + place * np.uint32(stride), stride * shape[axis]
    return mix(key, jnp.zeros(shape, jnp.uint32), index)


def _keys(words: tuple[Array, Array]) -> Array:
    # A barrier, lest a draw repeat the derivation of its key for each of its numbers: that compiles
    # many times as long.
    return jax.lax.optimization_barrier(jnp.stack(words, axis=-1))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return _keys(counted_words(key, shape))


def _fold_in(key: Array, data: Any) -> Array:
    datum = jnp.asarray(data, jnp.uint32)
    return _keys(mix(key, jnp.zeros_like(datum), datum))


def _no_seed(seed: Any) -> NoReturn:
    raise TypeError(f"a key is made by jax.random.key({seed}), and then written out.")


WRITTEN_OUT = jax.extend.random.define_prng_impl(
    key_shape=(2,),
    seed=_no_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32 written out",
    tag=TAG,
)
