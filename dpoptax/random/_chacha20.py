"""ChaCha20 as a JAX key type: 256-bit keys for every `jax.random` function.

The keys work under `jit`, `vmap` and `shard_map`. A cipher block is a function of the key, a block
counter and a nonce. The nonce separates three uses of one key, so that their outputs never overlap:

    bits:     blocks 0, 1, ... under nonce (0, 0, 0)
    split:    the first half of block j under nonce (1, 0, 0) is the key of child j
    fold_in:  the first half of block d under nonce (2, 0, 0) is the key of datum d

A block has 64 bytes and the counter has 32 bits, so one key gives 256 GiB.

Reference: RFC 8439; Bernstein 2008.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from dpoptax._jax_compat import define_prng_impl, register_prng_impl

# "expand 32-byte k" as four little-endian words (RFC 8439, section 2.3).
CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
BITS, SPLIT, FOLD_IN, SEED = (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)
MAX_BLOCKS = 2**32
# The name of the key type in `str(jax.random.key_impl(key))`, whether JAX knows it or not.
CHACHA20_TAG = "chacha20"
# The states of 2**16 blocks take 4 MiB. More blocks at a time fall out of a CPU's cache and run
# slower; fewer pay the overhead of the loop more often.
CPU_CHUNK = 2**16


def blocks(
    key: UInt32[Array, "8"], counters: UInt32[Array, " blocks"], nonce: tuple[int, int, int]
) -> UInt32[Array, "blocks 16"]:
    """Returns the sixteen words of each block of the key stream (RFC 8439, section 2.3)."""
    if counters.size <= CPU_CHUNK:
        return _blocks(key, counters, nonce)
    num_chunks = -(-counters.size // CPU_CHUNK)
    chunk = -(-counters.size // num_chunks)

    def in_chunks(key: Array, counters: Array) -> Array:
        padded = jnp.pad(counters, (0, num_chunks * chunk - counters.size))
        stream = jax.lax.map(
            lambda counters: _blocks(key, counters, nonce), padded.reshape(num_chunks, chunk)
        )
        return stream.reshape(-1, 16)[: counters.size]

    def at_once(key: Array, counters: Array) -> Array:
        return _blocks(key, counters, nonce)

    # The words are the same either way. Chunks help the cache of a CPU and would only serialise
    # an accelerator.
    return jax.lax.platform_dependent(key, counters, cpu=in_chunks, default=at_once)


def _blocks(key: Array, counters: Array, nonce: tuple[int, int, int]) -> Array:
    # The state of a block is a 4x4 matrix of words: constants, key, key, counter and nonce. We keep
    # the four rows of all blocks as four arrays of shape (4, blocks), so that an operation on a row
    # is one large operation.
    fixed = (jnp.array(CONSTANTS, jnp.uint32), key[:4], key[4:])
    start = [jnp.broadcast_to(row[:, None], (4, *counters.shape)) for row in fixed]
    start.append(jnp.stack([counters, *(jnp.full_like(counters, word) for word in nonce)]))
    # Twenty rounds. A loop compiles ten times faster than ten unrolled copies, and runs as fast.
    mixed = jax.lax.fori_loop(0, 10, _double_round, start)
    # Adding the first state makes the function one-way: the rounds alone can be inverted.
    words = [word for a, b in zip(mixed, start, strict=True) for word in a + b]
    return jnp.stack(words, axis=-1)


def _double_round(_: Any, rows: list[Array]) -> list[Array]:
    # Section 2.3: four quarter rounds on the columns, then four on the diagonals. Rotating row i
    # by i places turns the diagonals into columns; the last line rotates back.
    a, b, c, d = quarter_round(*rows)
    a, b, c, d = quarter_round(a, _rotate_row(b, 1), _rotate_row(c, 2), _rotate_row(d, 3))
    return [a, _rotate_row(b, 3), _rotate_row(c, 2), _rotate_row(d, 1)]


def _rotate_row(row: Array, places: int) -> Array:
    return jnp.concatenate([row[places:], row[:places]])


def quarter_round(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    """Mixes four uint32 words, or arrays of them (RFC 8439, section 2.1)."""
    a = a + b
    d = _rotate_left(d ^ a, 16)
    c = c + d
    b = _rotate_left(b ^ c, 12)
    a = a + b
    d = _rotate_left(d ^ a, 8)
    c = c + d
    return a, _rotate_left(b ^ c, 7), c, d


def _rotate_left(word: Array, bits: int) -> Array:
    return (word << np.uint32(bits)) | (word >> np.uint32(32 - bits))


def _seed(seed: Array) -> Array:
    """Returns the key of a seed of at most 64 bits, which is not a secret."""
    seed = jnp.asarray(seed)
    low = seed.astype(jnp.uint32)
    high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize == 8 else jnp.zeros_like(low)
    key = jnp.concatenate([jnp.stack([low, high]), jnp.zeros(6, jnp.uint32)])
    # One block under a separate nonce, so that a seed is never itself a key.
    return blocks(key, jnp.zeros(1, jnp.uint32), SEED)[0, :8]


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    _check_counter("split into", count)
    children = blocks(key, jnp.arange(count, dtype=jnp.uint32), SPLIT)[:, :8]
    return children.reshape(*shape, 8)


def _fold_in(key: Array, data: Any) -> Array:
    return blocks(key, jnp.asarray(data, jnp.uint32).reshape(1), FOLD_IN)[0, :8]


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape)
    num_words = -(-size * bit_width // 32)
    num_blocks = -(-num_words // 16)
    _check_counter("draw blocks of 64 bytes:", num_blocks)
    stream = blocks(key, jnp.arange(num_blocks, dtype=jnp.uint32), BITS)
    words = stream.reshape(-1)[:num_words]
    if bit_width == 32:
        return words.reshape(shape)
    # RFC 8439 serialises words in little-endian order, so the first word is the low half of 64
    # bits, and the lowest bits of a word are its first 8 or 16.
    if bit_width == 64:
        pairs = words.reshape(-1, 2).astype(jnp.uint64)
        return (pairs[:, 0] | (pairs[:, 1] << np.uint64(32))).reshape(shape)
    shifts = jnp.arange(32 // bit_width, dtype=jnp.uint32) * np.uint32(bit_width)
    narrow = (words[:, None] >> shifts).astype({8: jnp.uint8, 16: jnp.uint16}[bit_width])
    return narrow.reshape(-1)[:size].reshape(shape)


def _check_counter(what: str, count: int) -> None:
    # A larger counter would wrap around and repeat the stream.
    if count > MAX_BLOCKS:
        raise ValueError(
            f"one ChaCha20 key counts to 2**32; asked to {what} {count}. Split the key first and "
            "draw a part from each."
        )


CHACHA20 = define_prng_impl(
    key_shape=(8,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name=CHACHA20_TAG,
    tag=CHACHA20_TAG,
)
register_prng_impl(CHACHA20)
