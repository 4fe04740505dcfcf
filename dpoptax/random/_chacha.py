"""ChaCha with 8, 12 or 20 rounds as JAX key types: 256-bit keys for every `jax.random` function.

The keys work under `jit`, `vmap` and `shard_map`. A cipher block is a function of the key, a block
counter and a nonce. The nonce separates the uses of one key, so that their outputs never overlap:

    bits:     blocks 0, 1, ... under nonce (0, 0, 0)
    split:    the first half of block j under nonce (1, 0, 0) is the key of child j
    fold_in:  the first half of block d under nonce (2, 0, 0) is the key of datum d
    normals:  blocks 0, 1, ... under nonce (4, 0, 0), see `_chacha_normal.py`

A block has 64 bytes and the counter has 32 bits, so one key gives 256 GiB. The number of rounds is
that of bits and normals. Keys are made with twenty rounds by every type: this costs nothing, and
whoever breaks the fewer rounds of one step learns neither its parent key nor other steps.

Reference: RFC 8439; Bernstein 2008.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, UInt32

from dpoptax._jax_compat import define_prng_impl, register_prng_impl

# "expand 32-byte k" as four little-endian words (RFC 8439, section 2.3).
CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
BITS, SPLIT, FOLD_IN, SEED, NORMALS = ((domain, 0, 0) for domain in range(5))
MAX_BLOCKS = 2**32
KEY_ROUNDS = 20
# The states of 4,096 blocks take 256 KiB. Twice as many take 1.2 times as long per block on a CPU
# with a cache of 1 MiB per core, and half as many 1.02 times.
CPU_CHUNK = 2**12


# Compiled once for each size, where a key is derived outside of any compiled function: the start of
# a run derives about twenty keys. Inside of one it leaves no trace.
@functools.partial(jax.jit, static_argnames=("nonce", "rounds"), inline=True)
def blocks(
    key: UInt32[Array, "8"],
    counters: UInt32[Array, " blocks"],
    nonce: tuple[int, int, int],
    rounds: int = KEY_ROUNDS,
) -> UInt32[Array, "blocks 16"]:
    """Returns the sixteen words of each block of the key stream (RFC 8439, section 2.3)."""

    def at_once(key: Array, counters: Array) -> Array:
        return jnp.concatenate(rows(key, counters, nonce, rounds, axis=0)).T

    def in_chunks(key: Array, counters: Array) -> Array:
        padded = jnp.pad(counters, (0, num_chunks * chunk - counters.size))
        stream = jax.lax.map(
            lambda counters: at_once(key, counters), padded.reshape(num_chunks, chunk)
        )
        return stream.reshape(-1, 16)[: counters.size]

    if counters.size <= CPU_CHUNK:
        return at_once(key, counters)
    num_chunks = -(-counters.size // CPU_CHUNK)
    chunk = -(-counters.size // num_chunks)
    # The words are the same either way. Chunks help the cache of a CPU and would only serialise
    # an accelerator.
    return jax.lax.platform_dependent(key, counters, cpu=in_chunks, default=at_once)


def rows(
    key: UInt32[Array, "8"],
    counters: UInt32[Array, "..."],
    nonce: tuple[int, int, int],
    rounds: int,
    *,
    axis: int,
) -> list[UInt32[Array, "..."]]:
    """Returns the words of each block as four arrays with a new axis of four words each.

    The state of a block is a 4x4 matrix of words: constants, key, key, counter and nonce. Its rows
    are four arrays, so that blocks lie side by side and an operation on a row is a large one.
    """
    shape = (*counters.shape[:axis], 4, *counters.shape[axis:])
    fixed = (jnp.array(CONSTANTS, jnp.uint32), key[:4], key[4:])
    start = [jax.lax.broadcast_in_dim(row, shape, (axis,)) for row in fixed]
    words = (counters, *(jnp.full_like(counters, word) for word in nonce))
    start.append(jnp.stack(words, axis=axis))

    def double_round(_: Any, state: list[Array]) -> list[Array]:
        # Section 2.3: four quarter rounds on the columns, then four on the diagonals. Rotating row
        # i by i places turns the diagonals into columns; the last line rotates back.
        a, b, c, d = quarter_round(*state)
        turned = (_rotate_row(row, places, axis) for row, places in ((b, 1), (c, 2), (d, 3)))
        a, b, c, d = quarter_round(a, *turned)
        return [a, *(_rotate_row(row, places, axis) for row, places in ((b, 3), (c, 2), (d, 1)))]

    # A loop, because XLA for CPUs fuses unrolled rounds and computes them many times over.
    mixed = jax.lax.fori_loop(0, rounds // 2, double_round, start)
    # Adding the first state makes the function one-way: the rounds alone can be inverted.
    return [a + b for a, b in zip(mixed, start, strict=True)]


def _rotate_row(row: Array, places: int, axis: int) -> Array:
    parts = (jax.lax.slice_in_dim(row, places, 4, axis=axis),
             jax.lax.slice_in_dim(row, 0, places, axis=axis))  # fmt: skip
    return jnp.concatenate(parts, axis)


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
    check_counter("split into", count)
    children = blocks(key, jnp.arange(count, dtype=jnp.uint32), SPLIT)[:, :8]
    return children.reshape(*shape, 8)


def _fold_in(key: Array, data: Any) -> Array:
    return blocks(key, jnp.asarray(data, jnp.uint32).reshape(1), FOLD_IN)[0, :8]


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...], rounds: int) -> Array:
    size = math.prod(shape)
    num_words = -(-size * bit_width // 32)
    num_blocks = -(-num_words // 16)
    check_counter("draw blocks of 64 bytes:", num_blocks)
    stream = blocks(key, jnp.arange(num_blocks, dtype=jnp.uint32), BITS, rounds)
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


def check_counter(what: str, count: int) -> None:
    """Raises if one key does not have so many blocks."""
    # A larger counter would wrap around and repeat the stream.
    if count > MAX_BLOCKS:
        raise ValueError(
            f"one ChaCha key counts to 2**32; asked to {what} {count}. Split the key first and "
            "draw a part from each."
        )


# JAX compares key types by their functions, so these are functions of the module, not closures.
def _random_bits_8(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    return _random_bits(key, bit_width, shape, 8)


def _random_bits_12(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    return _random_bits(key, bit_width, shape, 12)


def _random_bits_20(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    return _random_bits(key, bit_width, shape, 20)


def _define(name: str, random_bits: Any) -> Any:
    spec = define_prng_impl(
        key_shape=(8,),
        seed=_seed,
        split=_split,
        random_bits=random_bits,
        fold_in=_fold_in,
        name=name,
        tag=name,
    )
    register_prng_impl(spec)
    return spec


# By the name of the type in `str(jax.random.key_impl(key))`, whether JAX knows it or not.
ROUNDS = {"chacha8": 8, "chacha12": 12, "chacha20": 20}
_BITS = {8: _random_bits_8, 12: _random_bits_12, 20: _random_bits_20}
KEY_TYPES = {rounds: _define(name, _BITS[rounds]) for name, rounds in ROUNDS.items()}


def rounds_of(key: PRNGKeyArray) -> int | None:
    """Returns the rounds of a ChaCha key, and None for a key of another type."""
    return ROUNDS.get(str(jax.random.key_impl(key)))
