"""Normal draws from ChaCha keys, laid out so that blocks are computed side by side.

A block of sixteen words gives sixteen draws: eight words are radii and eight are angles of the
Box-Muller method. The draws of a block do not follow one another. Its word `i` is draw `i` of an
array of shape `(groups, 16, lanes)`, and its block `lane` of the group. So each operation runs over
lanes that are next to each other in memory, and nothing is transposed. All arrays of one call are
drawn from one stream: each has a range of blocks that no other has.

Reference: Bernstein 2008, "ChaCha, a variant of Salsa20".
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from dpoptax.random._box_muller import from_words, polar
from dpoptax.random._chacha import NORMALS, check_counter, rounds_of, rows

# Arrays of up to 65,536 numbers share one draw: 4,096 blocks, for which the fixed cost of a draw
# still matters. Larger arrays are worth a draw each, and may be sharded.
MAX_SHARED = 2**16
# Eight vectors of AVX-512: of fewer lanes, the loops of a CPU lose time at their ends.
LANES = 128
# More lanes would make the parts of an array that is sharded too coarse.
MAX_LANES = 2**12
# Blocks that a CPU works on together: their states take 2 MiB. XLA shares each operation among the
# cores, which costs more than the operation if it is small. Measured on two cores against 2**12
# blocks: 0.6 of the time for 784 x 400 and 400 x 784 numbers, 0.7 for 1,024 x 4,096. On one core it
# is 1.1 to 1.2 times. With 2**16 blocks, 688,884 numbers take twice the time of one core, because
# they are drawn without a loop and what follows computes them again.
CPU_CHUNK = 2**15
# Up to so many blocks the draws keep their own axes.
FEW_BLOCKS = 2**12


class Layout(NamedTuple):
    """Where the draws of each block lie.

    Attributes:
        grid: the shape of the array of blocks.
        axis: the place of the axis of sixteen draws in the array of draws.
    """

    grid: tuple[int, ...]
    axis: int

    def counters(self, first: int) -> UInt32[Array, "..."]:
        """Returns the number of each block, from the first one."""
        index, stride = jnp.full(self.grid, np.uint32(first)), 1
        # An iota per axis lets each device compute its own indices.
        for axis in reversed(range(len(self.grid))):
            place = jax.lax.broadcasted_iota(jnp.uint32, self.grid, axis)
            # The place on an axis of one block is zero, and its stride may be 2**32.
            index, stride = index + place * np.uint32(stride % 2**32), stride * self.grid[axis]
        return index


def normals(key: PRNGKeyArray, shapes: Sequence[tuple[int, ...]]) -> list[Float[Array, "..."]]:
    """Draws float32 arrays from N(0, 1), independent of each other.

    Raises:
        ValueError: the draws need more blocks than a key has.

    Example:
        >>> import dpoptax
        >>> draws = normals(dpoptax.random.insecure_key(0), [(3, 5), (100_000,)])
        >>> draws[0].shape, bool(0.99 < draws[1].std() < 1.01)
        ((3, 5), True)
    """
    sizes = [math.prod(shape) for shape in shapes]
    large = [shape for shape, size in zip(shapes, sizes, strict=True) if size > MAX_SHARED]
    shared = sum(size for size in sizes if size <= MAX_SHARED)
    first, found = 0, []
    for shape in [(shared,), *large]:
        layout = layout_of(shape)
        check_counter("draw blocks of 64 bytes:", first + math.prod(layout.grid))
        found.append(_draw(key, layout, first, shape))
        first += math.prod(layout.grid)
    flat, *rest = found
    apart, start, draws = iter(rest), 0, []
    for shape, size in zip(shapes, sizes, strict=True):
        if size > MAX_SHARED:
            draws.append(next(apart))
        else:
            draws.append(flat[start : start + size].reshape(shape))
            start += size
    return draws


def layout_of(shape: tuple[int, ...]) -> Layout:
    """Returns the layout of the draws of an array, which depends on its shape alone.

    An axis of `16 a c` numbers becomes three, of which the middle one is that of the draws of a
    block. So an array that is sharded on any axis is drawn in its parts, without communication, if
    the parts of that axis have a multiple of `16 c` numbers. An array without such an axis is drawn
    as a flat one, and its end is cut off.
    """
    for place, side in enumerate(shape):
        after = math.prod(shape[place + 1 :])
        groups = side // 16
        for lanes in range(1, min(groups, LANES) + 1):
            if side % 16 == 0 and groups % lanes == 0 and LANES <= lanes * after <= MAX_LANES:
                grid = (*shape[:place], groups // lanes, lanes, *shape[place + 1 :])
                return Layout(grid, place + 1)
    size = math.prod(shape)
    groups = max(1, -(-size // (16 * LANES)))
    lanes = -(-size // (16 * groups))
    # One group has as few lanes as it needs; of several, each has a multiple of eight.
    return Layout((groups, lanes if groups == 1 else 8 * -(-lanes // 8)), 1)


def _draw(key: PRNGKeyArray, layout: Layout, first: int, shape: tuple[int, ...]) -> Array:
    rounds, words = rounds_of(key), jax.random.key_data(key)
    assert rounds is not None

    def at_once(words: Array) -> Array:
        return drawn_at_once(words, layout, first, rounds)

    def in_chunks(words: Array) -> Array:
        return drawn_in_chunks(words, layout, first, rounds)

    # Chunks keep the cipher in the cache of a CPU. A loop over them would only serialise
    # an accelerator, and gather the parts of an array that is sharded.
    if math.prod(layout.grid) <= FEW_BLOCKS or jax.device_count() > 1:
        draws = at_once(words)
    else:
        draws = jax.lax.platform_dependent(words, cpu=in_chunks, default=at_once)
    if draws.size == math.prod(shape):
        return draws.reshape(shape)
    return draws.reshape(-1)[: math.prod(shape)].reshape(shape)


def drawn_at_once(
    key: UInt32[Array, "8"], layout: Layout, first: int, rounds: int
) -> Float[Array, "..."]:
    """Returns the draws of all blocks, with the axis of sixteen draws."""
    axis = layout.axis
    a, b, c, d = rows(key, layout.counters(first), NORMALS, rounds, axis=axis)
    left, right = from_words(a, c), from_words(b, d)
    return jnp.concatenate([left.real, right.real, left.imag, right.imag], axis)


def drawn_in_chunks(
    key: UInt32[Array, "8"], layout: Layout, first: int, rounds: int
) -> Float[Array, "..."]:
    """Returns the same numbers as `drawn_at_once`, but for roundings, a part of them at a time."""
    groups, lanes = math.prod(layout.grid[: layout.axis]), math.prod(layout.grid[layout.axis :])
    turns = -(-groups * lanes // CPU_CHUNK)
    per_turn = -(-groups // turns)
    turns = -(-groups // per_turn)
    # One axis of lanes, however many the array has: a short last axis would not fill vectors.
    part = Layout((per_turn, lanes), 1)

    def draw(turn: Array) -> Array:
        counters = part.counters(first) + turn * np.uint32(per_turn * lanes)
        a, b, c, d = rows(key, counters, NORMALS, rounds, axis=1)
        radius, angle = jnp.stack([a, b], 1), jnp.stack([c, d], 1)
        size, cosine, sine = polar(radius, angle)
        # With several turns, the loop writes the draws to memory, so that nothing after it computes
        # them again.
        return jnp.stack([size * cosine, size * sine], 1).reshape(per_turn, 16, lanes)

    if turns == 1:
        draws = draw(jnp.zeros((), jnp.uint32))
    else:
        draws = jax.lax.map(draw, jnp.arange(turns, dtype=jnp.uint32)).reshape(-1, 16, lanes)
    return draws[:groups].reshape(*layout.grid[: layout.axis], 16, *layout.grid[layout.axis :])
