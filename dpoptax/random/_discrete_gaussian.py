"""Exact sampling from the discrete Gaussian, on integers only.

No logarithm, exponential or rounding decides an outcome. If the random bits are uniform, the
distribution is exactly the stated one, far into the tails. The standard deviation is a power of
two, so every comparison is one of 32-bit integers.

The sampler is rejection sampling, and candidates need different numbers of random trials. Many
lanes run in parallel. Each lane makes the same number of samples, one after the other, and the loop
ends when the slowest lane is done. Collecting whatever is ready first would favour samples that
need few trials, which are the small ones, and so bias the distribution.

Reference: Karney 2016, "Sampling exactly from the normal distribution", algorithm D
(arXiv:1303.6257); Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential
privacy" (arXiv:2004.00010).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, PRNGKeyArray, UInt32

from dpoptax import _validate
from dpoptax.random._allowed_keys import allowed_key

# With 24 bits a sample of up to 128 standard deviations fits into an int32.
MAX_BITS = 24
# Waiting for the slowest lane costs little if each lane makes many samples; parallel hardware is
# better filled if each lane makes few.
SAMPLES_PER_LANE = 48


class _Lanes(NamedTuple):
    """The state of every lane: its candidate, and the tests that the candidate must still pass.

    The candidate is sign * (k + x) * stddev with x = j / stddev in [0, 1). The tests come in four
    stages. Stage 0 draws k, with probability proportional to exp(-k / 2). Stage 1 accepts k with
    probability exp(-k (k - 1) / 2). Stage 2 accepts x with probability exp(-k x), and stage 3 with
    probability exp(-x**2 / 2). The product is proportional to exp(-(k + x)**2 / 2).
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
    """Draws integers n with probability proportional to exp(-n**2 / (2 * 4**bits)).

    Args:
        key: used for nothing else.
        shape: of the result.
        bits: the standard deviation is 2**bits; from 1 to 24.

    Returns:
        Independent int32 numbers. A number of 2**31 or more, which is at least 128 standard
        deviations, would wrap around.

    Raises:
        TypeError: a key that is not a typed Threefry or ChaCha key, or bits that are not a whole
            number.
        ValueError: bits out of range.

    Example:
        >>> import jax
        >>> draws = discrete_gaussian(jax.random.key(0), (10_000,), bits=3)
        >>> draws.dtype, 7.8 < float(draws.std()) < 8.2
        (dtype('int32'), True)

    Reference: Karney 2016, arXiv:1303.6257, algorithm D.
    """
    key = allowed_key("key", key)
    bits = _validate.count("bits", bits)
    if bits > MAX_BITS:
        raise ValueError(f"bits must be at most {MAX_BITS}; got {bits}.")
    size = math.prod(shape)
    if size == 0:
        return jnp.zeros(shape, jnp.int32)
    return _draw(key, size, bits).reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: PRNGKeyArray, size: int, bits: int) -> Array:
    num_lanes = -(-size // SAMPLES_PER_LANE)
    quota = -(-size // num_lanes)
    start = _Lanes(
        stage=jnp.zeros(num_lanes, jnp.int32),
        k=jnp.zeros(num_lanes, jnp.int32),
        j=jnp.zeros(num_lanes, jnp.uint32),
        negative=jnp.zeros(num_lanes, bool),
        tests_left=jnp.zeros(num_lanes, jnp.int32),
        trial=jnp.ones(num_lanes, jnp.uint32),
    )
    made = jnp.zeros(num_lanes, jnp.int32)
    samples = jnp.zeros((quota, num_lanes), jnp.int32)

    def unfinished(carry: tuple[Array, _Lanes, Array, Array]) -> Array:
        return jnp.any(carry[2] < quota)

    def advance(
        carry: tuple[Array, _Lanes, Array, Array],
    ) -> tuple[Array, _Lanes, Array, Array]:
        turn, lanes, made, samples = carry
        words = jax.random.bits(jax.random.fold_in(key, turn), (3, num_lanes), jnp.uint32)
        lanes, done, sample = _one_trial(lanes, words, bits)
        # A lane that has its quota keeps running; its further samples are written out of bounds,
        # where `mode="drop"` discards them.
        row = jnp.where(done, made, quota)
        samples = samples.at[row, jnp.arange(num_lanes)].set(sample, mode="drop")
        return turn + 1, lanes, made + done.astype(jnp.int32), samples

    turn = jnp.zeros((), jnp.int32)
    *_, samples = jax.lax.while_loop(unfinished, advance, (turn, start, made, samples))
    return samples.reshape(-1)[:size]


def _one_trial(lanes: _Lanes, words: Array, bits: int) -> tuple[_Lanes, Array, Array]:
    """Runs one trial in every lane; returns the lanes, which of them have a sample, and it."""
    passed, missed, trial = _exponential_test(lanes, words, bits)
    second = words[1]
    stage, k, left = lanes.stage, lanes.k, lanes.tests_left

    # Stage 0: k is the number of passed tests of probability exp(-1/2) before the first miss.
    k = k + ((stage == 0) & passed).astype(jnp.int32)
    counted = (stage == 0) & missed
    # In later stages one miss rejects the candidate. Stage 1 needs k (k - 1) passed tests.
    rejected = (stage > 0) & missed
    left = jnp.where(counted, k * (k - 1), left - ((stage > 0) & passed).astype(jnp.int32))
    stage = jnp.where(counted, 1, stage)

    # Stage 2 begins: draw j and the sign. Their bits come from the second word, which stages 0 and
    # 1 have not looked at, so they are independent of the outcome so far. The candidates +0 and -0
    # are the same number, so we reject one of them.
    begins = (stage == 1) & (left == 0) & ~rejected
    j = jnp.where(begins, second & np.uint32(2**bits - 1), lanes.j)
    negative = jnp.where(begins, (second >> np.uint32(31)) == 1, lanes.negative)
    rejected = rejected | (begins & negative & (k == 0) & (j == 0))
    # It needs k passed tests of probability exp(-x).
    stage, left = jnp.where(begins, 2, stage), jnp.where(begins, k, left)

    # Stage 3 needs one passed test of probability exp(-x**2 / 2).
    begins = (stage == 2) & (left == 0) & ~rejected
    stage, left = jnp.where(begins, 3, stage), jnp.where(begins, 1, left)
    done = (stage == 3) & (left == 0) & ~rejected

    size = (k << bits) + j.astype(jnp.int32)
    sample = jnp.where(negative, -size, size)
    over = done | rejected
    lanes = _Lanes(
        stage=jnp.where(over, 0, stage),
        k=jnp.where(over, 0, k),
        j=j,
        negative=negative,
        tests_left=jnp.where(over, 0, left),
        trial=trial,
    )
    return lanes, done, sample


def _exponential_test(lanes: _Lanes, words: Array, bits: int) -> tuple[Array, Array, Array]:
    """Makes one trial of a test of probability exp(-c); returns passed, missed and next trial.

    Canonne, Kamath and Steinke, algorithm 1: make trials n = 1, 2, ... of probability c / n until
    one fails. The test passes if the number of the failed trial is odd.
    """
    first, second, third = words
    low = np.uint32(2**bits - 1)
    # Events of probability 1/2 and, twice and independently, x = j / 2**bits.
    half = (first >> np.uint32(31)) == 0
    below = (first & low) < lanes.j
    below_too = (second & low) < lanes.j
    # c is 1/2 in stages 0 and 1, x in stage 2, and x**2 / 2 in stage 3.
    with_probability_c = jnp.where(
        lanes.stage < 2, half, below & jnp.where(lanes.stage == 2, True, below_too & half)
    )
    # Probability exactly 1/n by rejection: split the 2**32 values of a word into n equal shares,
    # and repeat the trial if the word falls on the remainder. The share is computed in float32 to
    # avoid an integer division. Any share with n * share <= 2**32 is exact, and the margin of 2**20
    # covers the rounding.
    share = (np.float32(2**32 - 2**20) / lanes.trial.astype(jnp.float32)).astype(jnp.uint32)
    decided = third < share * lanes.trial
    succeeded = with_probability_c & (third < share)
    failed = decided & ~succeeded
    passed = failed & (lanes.trial & 1 == 1)
    trial = jnp.where(failed, 1, lanes.trial + (decided & succeeded).astype(jnp.uint32))
    return passed, failed & ~passed, trial
