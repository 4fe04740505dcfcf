"""Feistel permutation: a pseudo-random permutation of {0, ..., n-1}, evaluated index by index.

The cost does not depend on n, because no array of length n exists. The permutation is a Feistel
network over Z_a x Z_b, where a and b are near the square root of n (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains"):

    l <- l + F_1(r) mod a,  r <- r + F_2(l) mod b,  l <- l + F_3(r) mod a, ...

An image of n or more goes through the network again until it is below n (cycle walking, section
4.3 of arXiv:2406.17298). The round functions are the pseudo-random function of the key, the one
that `jax.random.fold_in` computes. The permutation is therefore as strong as the kind of key.

An index is evaluated 1/p times on average, with p = n / (a b). A network over a power of two would
have p as low as 1/2. Here a b - n < a, so p > 1 - 1/sqrt(n): fewer than 1.05 evaluations for every
n that uses the network. Up to 512 elements are sorted by 64-bit random numbers instead, which is
an exact uniform permutation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from dpoptax import _validate
from dpoptax.random._allowed_keys import allowed_key

# NIST SP 800-38G asks for ten rounds with halves as small as ours. More rounds only cost time.
NUM_ROUNDS = 12
# Up to this many elements, all of them are sorted. A small network is the weakest one, since it has
# few bits per half; a sort of this size is cheap.
MAX_SORTED = 512


def permute(
    key: PRNGKeyArray, indices: Int[Array, "*shape"], num_examples: int
) -> Int[Array, "*shape"]:
    """Returns the images of `indices` under the permutation of `key`.

    Args:
        key: one typed PRNG key, for this permutation and nothing else.
        indices: whole numbers from 0 to num_examples - 1; other numbers have no image.
        num_examples: how many elements there are, at most 2**31; a Python int.

    Returns:
        Images as int32, in the shape of `indices`; distinct indices have distinct images.

    Raises:
        TypeError: a key that is not a typed Threefry or ChaCha key, or a count that is not a
            whole number.
        ValueError: a count that is not from 1 to 2**31.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> images = permute(jax.random.key(0), jnp.arange(5), 10**9)
        >>> bool(jnp.all((images >= 0) & (images < 10**9))), len(set(images.tolist()))
        (True, 5)
        >>> invert(jax.random.key(0), images, 10**9)
        Array([0, 1, 2, 3, 4], dtype=int32)

    Reference: arXiv:2406.17298, section 4.3; Black and Rogaway 2002.
    """
    return _walk(key, indices, num_examples, forward=True)


def invert(
    key: PRNGKeyArray, images: Int[Array, "*shape"], num_examples: int
) -> Int[Array, "*shape"]:
    """Returns the inverse of `permute`: the indices that `permute` maps to `images`.

    Args:
        key: as in `permute`.
        images: whole numbers from 0 to num_examples - 1.
        num_examples: as in `permute`.

    Returns:
        Indices as int32, in the shape of `images`.

    Raises:
        TypeError: as in `permute`.
        ValueError: as in `permute`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> invert(jax.random.key(0), permute(jax.random.key(0), jnp.arange(3), 100), 100)
        Array([0, 1, 2], dtype=int32)
    """
    return _walk(key, images, num_examples, forward=False)


def _walk(key: PRNGKeyArray, values: Array, num_examples: int, *, forward: bool) -> Array:
    """Applies the permutation or its inverse."""
    key = allowed_key("key", key)
    size = _validate.count("num_examples", num_examples)
    if size > 2**31:
        raise ValueError(
            f"num_examples must be at most 2**31, because indices are int32; got {size}. Permute "
            "fewer elements."
        )
    if size <= MAX_SORTED:
        order = _sorted_order(key, size)
        return (order if forward else jnp.argsort(order).astype(jnp.int32))[values]
    start = values.reshape(values.size).astype(jnp.uint32)
    sizes = (jnp.uint32(number) for number in (size, *_halves(size)))
    return _cycle(key, start, *sizes, forward=forward).astype(jnp.int32).reshape(values.shape)


def _halves(size: int) -> tuple[int, int]:
    """Returns a and b, the sizes of the two halves: a * b is at least `size`, by less than a."""
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a)


# Jitted here with traced sizes, so that callers outside of jit compile it once for all sizes.
@functools.partial(jax.jit, static_argnames="forward")
def _cycle(
    key: PRNGKeyArray,
    x: UInt32[Array, " many"],
    size: UInt32[Array, ""],
    a: UInt32[Array, ""],
    b: UInt32[Array, ""],
    *,
    forward: bool,
) -> UInt32[Array, " many"]:
    """Applies the network, and again to images of `size` or more (cycle walking)."""

    def again(x: Array) -> Array:
        return jnp.where(x >= size, _network(key, x, a, b, forward=forward), x)

    images = _network(key, x, a, b, forward=forward)
    return jax.lax.while_loop(lambda x: jnp.any(x >= size), again, images)


def _sorted_order(key: PRNGKeyArray, size: int) -> Int[Array, " size"]:
    """Sorts by 64 random bits; two of them are equal with probability below 2**-46."""
    high, low = jax.random.bits(key, (2, size), jnp.uint32)
    return jax.lax.sort((high, low, jnp.arange(size, dtype=jnp.int32)), num_keys=2)[2]


def _network(
    key: PRNGKeyArray,
    x: UInt32[Array, " many"],
    a: UInt32[Array, ""],
    b: UInt32[Array, ""],
    *,
    forward: bool,
) -> UInt32[Array, " many"]:
    """Applies all rounds, or undoes them in reverse order."""

    def two_rounds(halves: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        left, right = halves
        if forward:
            left = (left + _round_function(key, 2 * number, right, a)) % a
            right = (right + _round_function(key, 2 * number + 1, left, b)) % b
        else:  # adding b and a first keeps the unsigned differences from wrapping
            right = (right + b - _round_function(key, 2 * number + 1, left, b)) % b
            left = (left + a - _round_function(key, 2 * number, right, a)) % a
        return (left, right), None

    numbers = jnp.arange(NUM_ROUNDS // 2, dtype=jnp.uint32)
    (left, right), _ = jax.lax.scan(two_rounds, (x % a, x // a), numbers, reverse=not forward)
    return left + a * right


def _round_function(
    key: PRNGKeyArray,
    number: UInt32[Array, ""],
    half: UInt32[Array, " many"],
    size: UInt32[Array, ""],
) -> UInt32[Array, " many"]:
    """Returns 64 pseudo-random bits modulo `size`, which follow from the round and the half."""
    # A half is below 2**16, so round and half fit into the 32 bits that `fold_in` takes.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, (number << 16) | half)
    words = jax.random.key_data(keys)
    # (word_0 * 2**32 + word_1) modulo size, in 32-bit arithmetic: all factors are below 2**16.
    power = (jnp.uint32(2**32 - 1) % size + 1) % size
    return ((words[:, 0] % size) * power + words[:, 1] % size) % size
