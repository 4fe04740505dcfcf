"""Exact binomial draws below a limit: the size of a Poisson batch.

JAX's own `jax.random.binomial` is a floating-point approximation. The privacy guarantee needs the
binomial distribution itself, so we invert a table of its cumulative probabilities with 64 bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

# A batch of any size exceeds the default maximum size with at most this probability. A smaller
# probability would only make batches longer.
OVERFLOW_PROBABILITY = 1e-14


def default_max_batch_size(num_examples: int, rate: float) -> int:
    """Returns the size that a batch exceeds with at most OVERFLOW_PROBABILITY."""
    if rate == 1:
        return num_examples
    return max(1, int(scipy.stats.binom.isf(OVERFLOW_PROBABILITY, num_examples, rate)))


def limited_binomial(
    key: PRNGKeyArray, num_examples: int, rate: float, max_size: int
) -> Int[Array, ""]:
    """Draws b ~ Binomial(num_examples, rate), given that b <= max_size, from 64 random bits."""
    return _invert(key, *_cumulative_table(num_examples, rate, max_size))


# The table is a constant of the compiled program; a program that is traced again, or a schedule of
# a few samplers, finds it here.
@functools.lru_cache(maxsize=32)
def _cumulative_table(
    num_examples: int, rate: float, max_size: int
) -> tuple[UInt32[np.ndarray, " max_size"], UInt32[np.ndarray, " max_size"]]:
    """Returns P(b <= j | b <= max_size) * 2**64 for j < max_size, as upper and lower 32 bits."""
    binomial = scipy.stats.binom(num_examples, rate)
    if max_size == num_examples:
        sizes = np.arange(max_size)
        below, above = binomial.cdf(sizes), binomial.sf(sizes)
    else:
        # From logarithms, because P(b <= max_size) may be tiny.
        logs = binomial.logpmf(np.arange(max_size + 1))
        probs = np.exp(logs - logs.max())
        probs /= probs.sum()
        below, above = np.cumsum(probs)[:-1], np.cumsum(probs[:0:-1])[::-1]
    # float64 is fine near zero and coarse near one. We therefore round P(b <= j) up to one half
    # and P(b > j) from there on.
    rounded_below = np.ldexp(np.minimum(below, 0.5), 64).astype(np.uint64)
    # ~x + 1 is 2**64 - x in wrapping arithmetic. A tail below 2**-64 counts as 2**-64, because
    # 2**64 itself does not fit.
    rounded_above = ~np.maximum(np.ldexp(np.minimum(above, 0.5), 64), 1).astype(np.uint64) + 1
    table = np.where(below <= 0.5, rounded_below, rounded_above)
    return (table >> np.uint64(32)).astype(np.uint32), table.astype(np.uint32)


def _invert(
    key: PRNGKeyArray,
    upper: UInt32[np.ndarray, " max_size"],
    lower: UInt32[np.ndarray, " max_size"],
) -> Int[Array, ""]:
    """Returns how many entries of the table are at most a uniform 64-bit integer."""
    # JAX has no 64-bit integers by default: compare the upper halves, then the lower ones.
    high, low = jax.random.bits(key, (2,), jnp.uint32)
    reached = (upper < high) | ((upper == high) & (lower <= low))
    return jnp.sum(reached, dtype=jnp.int32)
