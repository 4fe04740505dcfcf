"""The law of Poisson batches, against the exact one, with fixed keys."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dpoptax.samplers import Batch, Poisson

# A correct sampler fails a test at this level once in ten thousand keys; the keys are fixed.
LEVEL = 1e-4


@functools.lru_cache
def draw(sampler, num_batches, seed=0):
    """Returns an inclusion table: bool (num_batches, num_examples)."""

    def step(state, _):
        state, batch = sampler.sample(state)
        return state, batch

    _, batches = jax.jit(
        lambda key: jax.lax.scan(step, sampler.init(key), None, length=num_batches)
    )(jax.random.key(seed))
    return inclusions(batches, sampler.num_examples)


def inclusions(batches, num_examples):
    table = np.zeros((len(batches.mask), num_examples), bool)
    steps, slots = np.nonzero(np.asarray(batches.mask))
    columns = np.asarray(batches.indices)[steps, slots]
    assert columns.min(initial=0) >= 0
    assert columns.max(initial=0) < num_examples
    np.add.at(counts := np.zeros(table.shape, int), (steps, columns), 1)
    assert counts.max() <= 1, "an example is twice in one batch"
    return counts.astype(bool)


def size_p_value(table, rate):
    """Chi-square of the batch sizes against the exact binomial, cells pooled to 10 expected."""
    num_batches, num_examples = table.shape
    sizes = table.sum(1)
    law = scipy.stats.binom(num_examples, rate)
    edges, mass = [-1], 0.0
    for size in range(num_examples + 1):
        mass += law.pmf(size)
        if mass * num_batches >= 10 and law.sf(size) * num_batches >= 10:
            edges.append(size)
            mass = 0.0
    edges.append(num_examples)
    observed = np.histogram(sizes, np.array(edges) + 0.5)[0]
    expected = np.diff(law.cdf(edges)) * num_batches
    return scipy.stats.chisquare(observed, expected).pvalue


def single_p_value(table, rate):
    """Chi-square of how often each example takes part."""
    num_batches, num_examples = table.shape
    statistic = np.sum((table.sum(0) - num_batches * rate) ** 2) / (num_batches * rate * (1 - rate))
    return scipy.stats.chi2.sf(statistic, num_examples)


def pair_p_value(table, rate):
    """Chi-square of how often each pair takes part together."""
    num_batches, num_examples = table.shape
    pairs = (table.T.astype(int) @ table.astype(int))[np.triu_indices(num_examples, 1)]
    expected = num_batches * rate**2
    # Pairs overlap, so the sum is not exactly chi-square; the largest deviation, with a union
    # bound, needs no independence.
    worst = np.abs(pairs - expected).max() / math.sqrt(expected * (1 - rate**2))
    return min(1.0, 2 * len(pairs) * scipy.stats.norm.sf(worst))


def succession_p_value(table, rate):
    """Whether being drawn changes the chance to be drawn in the next step."""
    both = np.sum(table[1:] & table[:-1])
    trials = table[1:].size
    spread = math.sqrt(trials * rate**2 * (1 - rate**2) * (1 + 2 * rate / (1 + rate)))
    return 2 * scipy.stats.norm.sf(abs(both - trials * rate**2) / spread)


P_VALUES = {
    "sizes": size_p_value,
    "singles": single_p_value,
    "pairs": pair_p_value,
    "succession": succession_p_value,
}


@pytest.mark.parametrize("p_value", P_VALUES.values(), ids=P_VALUES)
@pytest.mark.parametrize(("num_examples", "expected"), [(2, 1), (3, 1), (10, 2.5), (100, 8)])
def test_the_law_is_independent_inclusion(p_value, num_examples, expected):
    sampler = Poisson(num_examples, expected, max_batch_size=num_examples)
    table = draw(sampler, 20_000)
    assert p_value(table, sampler.sampling_rate) > LEVEL


def test_the_default_capacity_changes_nothing():
    sampler = Poisson(1000, 20)
    table = draw(sampler, 5_000)
    assert 20 < sampler.max_batch_size < 100
    assert table.sum(1).max() < sampler.max_batch_size
    assert size_p_value(table, 0.02) > LEVEL
    assert single_p_value(table, 0.02) > LEVEL


def test_truncation_keeps_a_uniform_subset():
    sampler = Poisson(20, 6, max_batch_size=4)
    table = draw(sampler, 20_000)
    sizes = table.sum(1)
    law = scipy.stats.binom(20, 0.3)
    assert sizes.max() == 4
    assert abs(np.mean(sizes == 4) - law.sf(3)) < 4 * math.sqrt(law.sf(3) * law.cdf(3) / 20_000)
    assert single_p_value(table, sizes.mean() / 20) > LEVEL


def test_a_sampler_that_drops_the_highest_rows_would_fail():
    """The tests above have power: the commonest mistakes do not pass them."""
    rng = np.random.default_rng(0)
    independent = rng.random((20_000, 20)) < 0.3
    lowest = independent & (np.cumsum(independent, 1) <= 4)
    assert single_p_value(lowest, lowest.mean()) < 1e-12
    fixed_size = np.argsort(rng.random((20_000, 20)), 1) < 6
    assert size_p_value(fixed_size, 0.3) < 1e-12
    assert pair_p_value(np.repeat(independent[:, :10], 2, 1), 0.3) < 1e-12
    assert succession_p_value(np.repeat(independent[::2], 2, 0), 0.3) < 1e-12
    off_by_5_percent = rng.random((20_000, 20)) < 0.315
    assert single_p_value(off_by_5_percent, 0.3) < LEVEL
    assert size_p_value(off_by_5_percent, 0.3) < LEVEL


def test_everyone_takes_part_at_rate_one():
    sampler = Poisson(7, 7)
    assert sampler.max_batch_size == 7
    assert draw(sampler, 50).all()


def test_jit_equals_eager_scan_equals_loop_vmap_equals_loop():
    sampler = Poisson(50, 5)
    state = sampler.init(jax.random.key(1))
    eager = []
    for _ in range(4):
        state, batch = sampler.sample(state)
        eager.append(batch)
    eager = jax.tree.map(lambda *leaves: jnp.stack(leaves), *eager)
    _, scanned = jax.lax.scan(
        lambda s, _: sampler.sample(s), sampler.init(jax.random.key(1)), None, length=4
    )
    keys = jax.random.split(jax.random.key(2), 3)
    mapped = jax.vmap(lambda key: sampler.sample(sampler.init(key))[1])(keys)
    looped = [sampler.sample(sampler.init(key))[1] for key in keys]
    looped = jax.tree.map(lambda *leaves: jnp.stack(leaves), *looped)
    for batch, other in ((eager, scanned), (mapped, looped)):
        assert isinstance(batch, Batch)
        jax.tree.map(np.testing.assert_array_equal, batch, other)
