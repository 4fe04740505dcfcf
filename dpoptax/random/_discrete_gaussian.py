"""Uniform bits in, whole numbers of the discrete Gaussian law out, exactly.

No logarithm, no exponential and no rounding decides an outcome: if the bits are uniform, the law
is the one stated, to the last digit and in the farthest tail. The standard deviation is a power of
two, so that every comparison is one of whole numbers of 32 bits.

Every lane makes the same number of samples, one after the other, and all lanes go on until the
slowest has made its own: what would bias the law, taking first what is ready first, never happens.

Reference: Karney 2016, "Sampling exactly from the normal distribution", algorithm D
(arXiv:1303.6257); Canonne, Kamath and Steinke 2020, arXiv:2004.00010, for its place in privacy.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, PRNGKeyArray, UInt32

from dpoptax import _validate

MOST_BITS = 24
# Long enough that waiting for the slowest lane costs little, short enough to fill the lanes.
SAMPLES_PER_LANE = 48


class _Lanes(NamedTuple):
    """What every lane is at: a candidate sign * (k + j / stddev) * stddev, and its tests.

    Tests come in stages: 0 counts k; 1 accepts k with probability exp(-k (k - 1) / 2); 2 and 3
    accept x = j / stddev with probability exp(-k x) and exp(-x**2 / 2).
    """

    stage: Int32[Array, " lanes"]
    k: Int32[Array, " lanes"]
    j: UInt32[Array, " lanes"]
    negative: Bool[Array, " lanes"]
    tests_left: Int32[Array, " lanes"]
    trial: UInt32[Array, " lanes"]


def discrete_gaussian(
    key: PRNGKeyArray, shape: tuple[int, ...], *, bits: int
) -> Int32[Array, "..."]:
    """Draws whole numbers n with probability proportional to exp(-n**2 / (2 * 4**bits)).

    Args:
        key: used for nothing else.
        shape: of the result.
        bits: the standard deviation is 2**bits; from 1 to 24.

    Returns:
        Independent int32 numbers; one beyond 2**31, which is 128 standard deviations or more,
        would wrap.

    Raises:
        TypeError: an old-style key, bits that are not whole.
        ValueError: bits out of range.

    Example:
        >>> import jax
        >>> draws = discrete_gaussian(jax.random.key(0), (10_000,), bits=3)
        >>> draws.dtype, 7.8 < float(draws.std()) < 8.2
        (dtype('int32'), True)

    Reference: Karney 2016, arXiv:1303.6257, algorithm D.
    """
    key = _validate.typed_key("key", key)
    bits = _validate.count("bits", bits)
    if bits > MOST_BITS:
        raise ValueError(f"bits must be at most {MOST_BITS}; got {bits}.")
    size = math.prod(shape)
    if size == 0:
        return jnp.zeros(shape, jnp.int32)
    return _draw(key, size, bits).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: PRNGKeyArray, size: int, bits: int) -> Array:
    lanes = -(-size // SAMPLES_PER_LANE)
    quota = -(-size // lanes)
    start = _Lanes(
        stage=jnp.zeros(lanes, jnp.int32),
        k=jnp.zeros(lanes, jnp.int32),
        j=jnp.zeros(lanes, jnp.uint32),
        negative=jnp.zeros(lanes, bool),
        tests_left=jnp.zeros(lanes, jnp.int32),
        trial=jnp.ones(lanes, jnp.uint32),
    )
    made = jnp.zeros(lanes, jnp.int32)
    samples = jnp.zeros((quota, lanes), jnp.int32)

    def unfinished(carry: tuple[Array, _Lanes, Array, Array]) -> Array:
        return jnp.any(carry[2] < quota)

    def advance(
        carry: tuple[Array, _Lanes, Array, Array],
    ) -> tuple[Array, _Lanes, Array, Array]:
        turn, state, made, samples = carry
        words = jax.random.bits(jax.random.fold_in(key, turn), (3, lanes), jnp.uint32)
        state, done, sample = _turn(state, words, bits)
        # A lane that has made its own goes on, and what it makes falls outside.
        place = jnp.where(done, made, quota)
        samples = samples.at[place, jnp.arange(lanes)].set(sample, mode="drop")
        return turn + 1, state, made + done.astype(jnp.int32), samples

    turn = jnp.zeros((), jnp.int32)
    *_, samples = jax.lax.while_loop(unfinished, advance, (turn, start, made, samples))
    return samples.reshape(-1)[:size]


def _turn(state: _Lanes, words: Array, bits: int) -> tuple[_Lanes, Array, Array]:
    """One trial in every lane; returns the lanes, which of them finished a sample, and it.

    A test of probability exp(-c) counts trials n = 1, 2, ... of probability c / n until one fails,
    and passes if that one's number is odd (Canonne, Kamath and Steinke, algorithm 1).
    """
    first, second, third = words
    low = np.uint32(2**bits - 1)
    half = (first >> np.uint32(31)) == 0
    below = (first & low) < state.j  # with probability x
    below_too = (second & low) < state.j
    chance = jnp.where(
        state.stage < 2, half, below & jnp.where(state.stage == 2, True, below_too & half)
    )
    # 1 / n: the words that n equal shares leave over decide nothing, and the trial is repeated.
    # Any share of which n fit into 32 bits is exact; this one takes no division of integers.
    share = (np.float32(2**32 - 2**20) / state.trial.astype(jnp.float32)).astype(jnp.uint32)
    decided = third < share * state.trial
    went_on = chance & (third < share)
    failed = decided & ~went_on
    passed = failed & (state.trial & 1 == 1)
    missed = failed & ~passed
    trial = jnp.where(failed, 1, state.trial + (decided & went_on).astype(jnp.uint32))

    stage, k, left = state.stage, state.k, state.tests_left
    k = k + ((stage == 0) & passed).astype(jnp.int32)
    counted = (stage == 0) & missed
    rejected = (stage > 0) & missed
    left = jnp.where(counted, k * (k - 1), left - ((stage > 0) & passed).astype(jnp.int32))
    stage = jnp.where(counted, 1, stage)
    # Whole j and the sign come from a word that stages 0 and 1 have not looked at.
    begins = (stage == 1) & (left == 0) & ~rejected
    j = jnp.where(begins, second & low, state.j)
    negative = jnp.where(begins, (second >> np.uint32(31)) == 1, state.negative)
    rejected = rejected | (begins & negative & (k == 0) & (j == 0))  # zero has one sign
    stage, left = jnp.where(begins, 2, stage), jnp.where(begins, k, left)
    begins = (stage == 2) & (left == 0) & ~rejected
    stage, left = jnp.where(begins, 3, stage), jnp.where(begins, 1, left)
    done = (stage == 3) & (left == 0) & ~rejected

    size = (k << bits) + j.astype(jnp.int32)
    sample = jnp.where(negative, -size, size)
    over = done | rejected
    state = _Lanes(
        stage=jnp.where(over, 0, stage),
        k=jnp.where(over, 0, k),
        j=j,
        negative=negative,
        tests_left=jnp.where(over, 0, left),
        trial=trial,
    )
    return state, done, sample
