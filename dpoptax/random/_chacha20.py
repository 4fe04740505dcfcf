"""ChaCha20 as a JAX key type: a key of 256 bits in, words of its key stream out.

Every `jax.random` function accepts its keys, also under `jit` and `vmap`. Nothing but the key is
secret or remembered: the nonce names one of three domains, which never meet.

    bits:     blocks 0, 1, ... under nonce (0, 0, 0)
    split:    the first half of block j under nonce (1, 0, 0) is the key of child j
    fold_in:  the first half of block d under nonce (2, 0, 0) is the key of datum d

A block has 64 bytes and a counter of 32 bits, so one key gives 256 GiB.

Reference: RFC 8439; Bernstein 2008.
"""

import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

# "expand 32-byte k", little-endian.
CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
BITS, SPLIT, FOLD_IN, SEED = (0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)
MOST_BLOCKS = 2**32
# What `str(jax.random.key_impl(key))` says of a key.
CHACHA20_TAG = "cc20"
# More blocks at a time than these leave the cache of a processor.
CPU_CHUNK = 2**16


def blocks(
    key: UInt32[Array, "8"], counters: UInt32[Array, " blocks"], nonce: tuple[int, int, int]
) -> UInt32[Array, "blocks 16"]:
    """Returns blocks of the key stream (RFC 8439, section 2.3).

    Args:
        key: eight words.
        counters: which blocks.
        nonce: three words.

    Returns:
        Sixteen words for each block.
    """
    if counters.size <= CPU_CHUNK:
        return _blocks(key, counters, nonce)
    chunks = -(-counters.size // CPU_CHUNK)
    chunk = -(-counters.size // chunks)

    def in_chunks(key: Array, counters: Array) -> Array:
        padded = jnp.pad(counters, (0, chunks * chunk - counters.size)).reshape(chunks, chunk)
        stream = jax.lax.map(lambda counters: _blocks(key, counters, nonce), padded)
        return stream.reshape(-1, 16)[: counters.size]

    def at_once(key: Array, counters: Array) -> Array:
        return _blocks(key, counters, nonce)

    return jax.lax.platform_dependent(key, counters, cpu=in_chunks, default=at_once)


def _blocks(key: Array, counters: Array, nonce: tuple[int, int, int]) -> Array:
    """All blocks side by side, as the four rows of their states: fewer and larger operations."""
    same = (jnp.array(CONSTANTS, jnp.uint32), key[:4], key[4:])
    start = [jnp.broadcast_to(row[:, None], (4, *counters.shape)) for row in same]
    start.append(jnp.stack([counters, *(jnp.full_like(counters, word) for word in nonce)]))
    # A loop, rather than ten copies, compiles ten times faster and runs as fast.
    mixed = jax.lax.fori_loop(0, 10, _double_round, start)
    words = [word for a, b in zip(mixed, start, strict=True) for word in a + b]
    return jnp.stack(words, axis=-1)


def _double_round(_: Any, rows: list[Array]) -> list[Array]:
    a, b, c, d = quarter_round(*rows)  # of the columns, then of the diagonals
    a, b, c, d = quarter_round(a, _from(b, 1), _from(c, 2), _from(d, 3))
    return [a, _from(b, 3), _from(c, 2), _from(d, 1)]


def _from(row: Array, place: int) -> Array:
    return jnp.concatenate([row[place:], row[:place]])


def quarter_round(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    """Mixes four words (RFC 8439, section 2.1).

    Args:
        a: uint32, as are the others.
        b: see a.
        c: see a.
        d: see a.

    Returns:
        Four words.
    """
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    return a, _rotated(b ^ c, 7), c, d


def _rotated(word: Array, bits: int) -> Array:
    return (word << np.uint32(bits)) | (word >> np.uint32(32 - bits))


def _seed(seed: Array) -> Array:
    """The key of a seed of at most 64 bits: no secret."""
    seed = jnp.asarray(seed)
    low = seed.astype(jnp.uint32)
    high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize == 8 else jnp.zeros_like(low)
    key = jnp.concatenate([jnp.stack([low, high]), jnp.zeros(6, jnp.uint32)])
    return blocks(key, jnp.zeros(1, jnp.uint32), SEED)[0, :8]


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    count = math.prod(shape)
    _check("split into", count)
    children = blocks(key, jnp.arange(count, dtype=jnp.uint32), SPLIT)[:, :8]
    return children.reshape(*shape, 8)


def _fold_in(key: Array, data: Any) -> Array:
    return blocks(key, jnp.asarray(data, jnp.uint32).reshape(1), FOLD_IN)[0, :8]


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape)
    num_words = -(-size * bit_width // 32)
    num_blocks = -(-num_words // 16)
    _check("draw blocks of 64 bytes:", num_blocks)
    stream = blocks(key, jnp.arange(num_blocks, dtype=jnp.uint32), BITS)
    words = stream.reshape(-1)[:num_words]
    if bit_width == 32:
        return words.reshape(shape)
    if bit_width == 64:
        pairs = words.reshape(-1, 2).astype(jnp.uint64)
        return (pairs[:, 0] | (pairs[:, 1] << np.uint64(32))).reshape(shape)
    parts = jnp.arange(32 // bit_width, dtype=jnp.uint32) * np.uint32(bit_width)
    narrow = (words[:, None] >> parts).astype({8: jnp.uint8, 16: jnp.uint16}[bit_width])
    return narrow.reshape(-1)[:size].reshape(shape)


def _check(what: str, count: int) -> None:
    if count > MOST_BLOCKS:
        raise ValueError(
            f"one ChaCha20 key counts to 2**32; asked to {what} {count}. Split the key first and "
            "draw a part from each."
        )


CHACHA20 = jax.extend.random.define_prng_impl(
    key_shape=(8,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag=CHACHA20_TAG,
)
