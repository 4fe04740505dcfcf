"""Poisson sampling: every example takes part in a step independently, with one probability.

Drawn as a batch size b ~ Binomial(num_examples, sampling_rate), then b examples without
replacement from a fresh permutation: the same law as independent inclusion (Lemma 1 of
arXiv:2406.17298), in arrays of static shape.
"""

import dataclasses
import functools
from typing import ClassVar

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from dpoptax import _validate
from dpoptax.relations import Relation
from dpoptax.samplers import feistel
from dpoptax.samplers._base import Batch, SamplerState, composed, start
from dpoptax.schedules import Scheduled

# The default capacity is exceeded by a batch with at most this probability, so that truncation
# costs less than a thousandth of delta for delta >= 1e-6 and 100,000 steps.
DEFAULT_OVERFLOW = 1e-14


@dataclasses.dataclass(frozen=True)
class Poisson:
    """Poisson sampling with batches padded to a static size.

    A batch of more than `max_batch_size` examples is cut to a uniform random subset of that size,
    and the cut is part of the accounted law (arXiv:2508.15089). The default capacity is so large
    that this never happens in practice (probability at most 1e-14 per step); a smaller one saves
    time and costs epsilon: the expected size plus 4.2 of its square roots costs about 1 % at
    10,000 steps, the expected size alone about six times epsilon.

    Attributes:
        num_examples: how many examples there are.
        expected_batch_size: sampling_rate * num_examples, in examples; need not be whole.
        max_batch_size: the padded size of every batch; None for the default described above.

    Raises:
        TypeError: a size that is not a number, a count that is not whole.
        ValueError: a size out of range; a rate given where a size is expected.

    Example:
        >>> import jax
        >>> sampler = Poisson(num_examples=1000, expected_batch_size=50, max_batch_size=80)
        >>> state = sampler.init(jax.random.key(0))
        >>> state, batch = jax.jit(sampler.sample)(state)
        >>> batch.indices.shape, batch.mask.dtype
        ((80,), dtype('bool'))

    Reference: Lemma 1 of arXiv:2406.17298 for the construction.
    """

    num_examples: int
    expected_batch_size: float
    max_batch_size: int | None = None

    unit: ClassVar[str] = "example"
    relation: ClassVar[str] = "add_or_remove_one"

    def __post_init__(self) -> None:
        num_examples = _validate.num_examples(self.num_examples)
        expected = _validate.size_of_batch(
            "expected_batch_size", self.expected_batch_size, num_examples
        )
        capacity = self.max_batch_size
        if capacity is None:
            capacity = default_capacity(num_examples, expected / num_examples)
        capacity = min(_validate.count("max_batch_size", capacity), num_examples)
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "expected_batch_size", expected)
        object.__setattr__(self, "max_batch_size", capacity)

    @property
    def sampling_rate(self) -> float:
        """The probability that an example is in a batch."""
        return self.expected_batch_size / self.num_examples

    def init(self, key: PRNGKeyArray, step: int = 0) -> SamplerState:
        """Returns the state before batch number `step`.

        `key` must serve sampling and nothing else.
        """
        return start(key, step)

    def sample(self, state: SamplerState) -> tuple[SamplerState, Batch]:
        """Returns the next state and the next batch, drawn independently of all others."""
        return state.advanced(), draw(state, self.num_examples, self.sampling_rate, self.capacity)

    def event(
        self, noise_multiplier: Scheduled, num_steps: int, relation: Relation = "add_or_remove_one"
    ) -> dp_accounting.DpEvent:
        """Returns the event of `num_steps` noisy sums over batches of this sampler.

        The law is the same under every relation; a capacity below num_examples makes it the
        truncated one.
        """
        del relation
        one_step = functools.partial(law, self.num_examples, self.sampling_rate, self.capacity)
        return composed(one_step, noise_multiplier, num_steps)

    @property
    def capacity(self) -> int:
        """`max_batch_size`, also where none was given."""
        assert self.max_batch_size is not None  # __post_init__ has filled it in
        return self.max_batch_size


def default_capacity(num_examples: int, rate: float) -> int:
    """The size that a batch exceeds with a probability of at most DEFAULT_OVERFLOW."""
    if rate == 1:
        return num_examples
    return max(1, int(scipy.stats.binom.isf(DEFAULT_OVERFLOW, num_examples, rate)))


def draw(state: SamplerState, num_examples: int, rate: float, capacity: int) -> Batch:
    """Draws the batch of a state; see `Poisson`."""
    size_key, permutation_key = state.keys(2)
    size = binomial(size_key, num_examples, rate, capacity)
    places = jnp.arange(capacity, dtype=jnp.int32)
    mask = places < size
    if 4 * capacity <= num_examples <= feistel.EXACT:
        order = _subset(permutation_key, size, num_examples, capacity)
    else:
        order = feistel.permute(permutation_key, places, num_examples)
    return Batch(jnp.where(mask, order, 0), mask)


def _subset(
    key: PRNGKeyArray, size: Int[Array, ""], num_examples: int, capacity: int
) -> Int[Array, " capacity"]:
    """Draws `size` different numbers below num_examples, every set of them alike; the rest is -1.

    As quick as the set is small: Floyd's algorithm (Bentley and Floyd 1987).
    """
    high, low = jax.random.bits(key, (2, capacity), jnp.uint32)

    def insert(count: Int[Array, ""], chosen: Array) -> Array:
        top = num_examples - size + count
        modulus = (top + 1).astype(jnp.uint32)
        power = (jnp.uint32(2**32 - 1) % modulus + 1) % modulus  # 2**32 modulo the modulus
        drawn = ((high[count] % modulus) * power + low[count] % modulus) % modulus
        drawn = drawn.astype(jnp.int32)
        return chosen.at[count].set(jnp.where(jnp.any(chosen == drawn), top, drawn))

    return jax.lax.fori_loop(0, size, insert, jnp.full(capacity, -1, jnp.int32))


def law(
    num_examples: int, rate: float, capacity: int, noise_multiplier: float
) -> dp_accounting.DpEvent:
    """The event of one noisy sum over such a batch."""
    if capacity == num_examples:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        return dp_accounting.PoissonSampledDpEvent(rate, gaussian)
    return dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        dataset_size=num_examples,
        sampling_probability=rate,
        truncated_batch_size=capacity,
        noise_multiplier=noise_multiplier,
    )


def binomial(key: PRNGKeyArray, num_examples: int, rate: float, capacity: int) -> Int[Array, ""]:
    """Draws min(b, capacity) with b ~ Binomial(num_examples, rate), by 64 random bits."""
    return _invert(key, *_size_table(num_examples, rate, capacity))


@functools.lru_cache(maxsize=32)
def _size_table(
    num_examples: int, rate: float, capacity: int
) -> tuple[UInt32[np.ndarray, " capacity"], UInt32[np.ndarray, " capacity"]]:
    """Returns P(size <= j) for j < capacity as 64-bit fractions, in upper and lower halves.

    Above one half the fraction is taken from the upper tail, where float64 is finer.
    """
    sizes = np.arange(capacity)
    below = scipy.stats.binom.cdf(sizes, num_examples, rate)
    above = scipy.stats.binom.sf(sizes, num_examples, rate)
    rounded_below = np.ldexp(np.minimum(below, 0.5), 64).astype(np.uint64)
    # 2**64 - x in wrapping arithmetic; a tail below 2**-64 is rounded up to that.
    rounded_above = ~np.maximum(np.ldexp(np.minimum(above, 0.5), 64), 1).astype(np.uint64) + 1
    table = np.where(below <= 0.5, rounded_below, rounded_above)
    return (table >> np.uint64(32)).astype(np.uint32), table.astype(np.uint32)


def _invert(
    key: PRNGKeyArray,
    upper: UInt32[np.ndarray, " capacity"],
    lower: UInt32[np.ndarray, " capacity"],
) -> Int[Array, ""]:
    """Inverts the table at 64 random bits: the number of entries that the bits reach."""
    high, low = jax.random.bits(key, (2,), jnp.uint32)
    reached = (upper < high) | ((upper == high) & (lower <= low))
    return jnp.sum(reached, dtype=jnp.int32)
