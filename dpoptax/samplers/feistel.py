"""A pseudo-random permutation of {0, ..., n-1}, evaluated where it is asked for.

A key and any indices in; their images out, at a cost that does not depend on n: no array of
length n exists. The permutation is a Feistel network over Z_a x Z_b, where a and b are near the
square root of n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"),

    l <- l + F_1(r) mod a,  r <- r + F_2(l) mod b,  l <- l + F_3(r) mod a, ...

and an image at or beyond n is sent through it again until it falls below n (cycle walking, as in
section 4.3 of arXiv:2406.17298). A round function is the key's own pseudo-random function, that
which `jax.random.fold_in` computes, so it is as good as the kind of key: pass a key that serves
this permutation and nothing else.

An index is evaluated 1/p times on average, p = n / (a b). In a power of two above n, p may be as
low as 1/2; here a b - n < a, so p > 1 - 1/sqrt(n): fewer than 1.05 evaluations for every n that
takes a network. Up to 512 elements take none: there the order of 64-bit random numbers is an exact
permutation.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from dpoptax import _validate

__all__ = ["permute", "invert"]

# NIST SP 800-38G asks for ten, with halves as small as these.
NUM_ROUNDS = 12
# So few elements are sorted.
EXACT = 512


def permute(
    key: PRNGKeyArray, indices: Int[Array, "*shape"], num_examples: int
) -> Int[Array, "*shape"]:
    """Returns the images of `indices` under the permutation of `key`.

    Args:
        key: one typed PRNG key, for this permutation and nothing else.
        indices: whole numbers from 0 to num_examples - 1; others have no image.
        num_examples: how many elements there are, at most 2**31; a Python int.

    Returns:
        Int32, shaped like `indices`; distinct where those are.

    Raises:
        TypeError: an old-style key, a count that is not whole.
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
    """Returns the indices whose images under `permute` are `images`.

    Args:
        key: as in `permute`.
        images: whole numbers from 0 to num_examples - 1.
        num_examples: as in `permute`.

    Returns:
        Int32, shaped like `images`.

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
    key = _validate.typed_key("key", key)
    size = _validate.num_examples(num_examples)
    if size <= EXACT:
        order = _sorted_order(key, size)
        return (order if forward else jnp.argsort(order).astype(jnp.int32))[values]
    start = values.reshape(values.size).astype(jnp.uint32)
    sizes = (jnp.uint32(number) for number in (size, *_halves(size)))
    return _cycle(key, start, *sizes, forward=forward).astype(jnp.int32).reshape(values.shape)


def _halves(size: int) -> tuple[int, int]:
    """The a and b of Z_a x Z_b."""
    a = math.isqrt(size - 1) + 1
    return a, -(-size // a)


# Compiled once for all sizes, also for callers that are not.
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
    """Sends all through the network, and again those that came out at or beyond `size`."""

    def again(x: Array) -> Array:
        return jnp.where(x >= size, _network(key, x, a, b, forward=forward), x)

    images = _network(key, x, a, b, forward=forward)
    return jax.lax.while_loop(lambda x: jnp.any(x >= size), again, images)


def _sorted_order(key: PRNGKeyArray, size: int) -> Int[Array, " size"]:
    """An order by 64 random bits: two of them are equal with probability below 2^-46."""
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
    def two_rounds(halves: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
        left, right = halves
        if forward:
            left = (left + _round_function(key, 2 * number, right, a)) % a
            right = (right + _round_function(key, 2 * number + 1, left, b)) % b
        else:
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
    """64 pseudo-random bits of the round and the half, which has 16 bits at most, modulo `size`."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, (number << 16) | half)
    words = jax.random.key_data(keys)
    power = (jnp.uint32(2**32 - 1) % size + 1) % size  # 2**32 modulo size
    return ((words[:, 0] % size) * power + words[:, 1] % size) % size
