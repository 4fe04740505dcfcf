"""Uniform samples without replacement: independent draws, of which repetitions are left out.

The first `count` different values of a sequence of independent uniform draws, in the order in which
they came, are a uniform sample without replacement: nothing depends on the names of the examples.
The number of draws is fixed. Should they contain too few different values, all of them are drawn
again. This does not depend on the names either, so the distribution stays uniform.

Each value comes from 64 random bits, so its probability is off by less than 2**-33 of itself.

For a secure key this is much faster than the permutation of `_feistel.py`, which encrypts every
index about 36 times: on one core of a CPU, 1,112 of 60,000 examples take 0.1 ms instead of 5 ms.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from dpoptax.random._chacha import rounds_of
from dpoptax.random._threefry_unrolled import unrolled
from dpoptax.samplers import _feistel

# The draws suffice with so many standard deviations to spare, of how many are needed. More are
# needed at most once in a million batches.
_SPARE = 6.0
# Up to this product of examples and draws, a value and its place fit into 32 bits.
_PACKED = 2**32


def sample_without_replacement(
    key: PRNGKeyArray, num_examples: int, count: int
) -> Int[Array, " count"]:
    """Returns `count` different indices below num_examples, in random order.

    Example:
        >>> import jax
        >>> indices = sample_without_replacement(jax.random.key(0), 10**9, 5)
        >>> len(set(indices.tolist()))
        5
    """
    draws = _num_draws(num_examples, count) if 2 * count <= num_examples else 0
    # Many draws would be repetitions, or two arrays would have to be sorted. The latter takes
    # longer than the permutation for JAX's default keys, whose cipher is fast.
    if not draws or (num_examples * draws > _PACKED and rounds_of(key) is None):
        return _feistel.permute(key, jnp.arange(count, dtype=jnp.int32), num_examples)
    key = unrolled(key)

    def draw(tried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        number, *_ = tried
        values = _uniform(jax.random.fold_in(key, number), num_examples, draws)
        chosen, num_different = _first_different(values, num_examples, count)
        return number + 1, chosen, num_different

    # Zeros that follow from the key: inside `shard_map` they differ by device where the key does.
    zero = jax.random.key_data(key).reshape(-1)[0].astype(jnp.int32) * 0
    nothing = zero, jnp.zeros(count, jnp.int32) + zero, zero
    return jax.lax.while_loop(lambda tried: tried[2] < count, draw, nothing)[1]


@functools.lru_cache(maxsize=128)
def _num_draws(num_examples: int, count: int) -> int:
    """Returns how many draws have `count` different values, up to a tiny probability."""
    # With i different values at hand, the next draw is a new one with probability 1 - i / n.
    new = 1 - np.arange(count) / num_examples
    mean, variance = np.sum(1 / new), np.sum((1 - new) / new**2)
    # The last term is for few repetitions, whose number has a longer tail than a normal one.
    return math.ceil(mean + _SPARE * math.sqrt(variance) + _SPARE)


def _uniform(key: PRNGKeyArray, size: int, count: int) -> UInt32[Array, " count"]:
    """Returns floor(size * u / 2**64) for random 64-bit numbers u, in 32-bit arithmetic."""
    high, low = jax.random.bits(key, (2, count), jnp.uint32)
    upper, lower = _product(high, size)
    carry, _ = _product(low, size)
    total = lower + carry
    return upper + (total < lower).astype(jnp.uint32)


def _product(word: UInt32[Array, " count"], size: int) -> tuple[Array, Array]:
    """Returns the upper and the lower 32 bits of word * size."""
    low, high = word & np.uint32(0xFFFF), word >> np.uint32(16)
    low_size, high_size = np.uint32(size & 0xFFFF), np.uint32(size >> 16)
    # No sum wraps: (2**16 - 1)**2 + 2 (2**16 - 1) is 2**32 - 1.
    inner = high * low_size + ((low * low_size) >> np.uint32(16))
    outer = low * high_size + (inner & np.uint32(0xFFFF))
    upper = high * high_size + (inner >> np.uint32(16)) + (outer >> np.uint32(16))
    return upper, word * np.uint32(size)


def _first_different(
    values: UInt32[Array, " draws"], size: int, count: int
) -> tuple[Int[Array, " count"], Int[Array, ""]]:
    """Returns the first `count` different values in order, and how many different ones there are.

    If there are fewer, the rest of the result is zero.
    """
    draws = len(values)
    place = jnp.arange(draws, dtype=jnp.uint32)
    if size * draws <= _PACKED:
        # Value and place in one number: XLA sorts one array five times as fast as two.
        both = jax.lax.sort(values * np.uint32(draws) + place, is_stable=False)
        ordered, places = both // np.uint32(draws), both % np.uint32(draws)
    else:
        ordered, places = jax.lax.sort((values, place), num_keys=2, is_stable=False)
    is_new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    is_new = jnp.zeros(draws, bool).at[places].set(is_new, unique_indices=True)
    rank = jnp.cumsum(is_new, dtype=jnp.int32)
    slot = jnp.where(is_new, rank - 1, count)
    chosen = jnp.zeros(count, jnp.int32).at[slot].set(values.astype(jnp.int32), mode="drop")
    return chosen, rank[-1]
