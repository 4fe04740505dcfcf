"""Inclusion tables of samplers, and p-values under the distribution that they claim."""

import functools
import math

import jax
import numpy as np
import scipy.stats

# A correct sampler fails a test at this level once in ten thousand keys; the keys are fixed.
LEVEL = 1e-4


@functools.lru_cache
def draw(sampler, num_batches, seed=0):
    """Draws batches in one run; returns their inclusion table, (num_batches, num_examples)."""

    def step(state, _):
        state, batch = sampler.sample(state)
        return state, batch

    _, batches = jax.jit(
        lambda key: jax.lax.scan(step, sampler.init(key), None, length=num_batches)
    )(jax.random.key(seed))
    return inclusions(batches, sampler.num_examples)


def inclusions(batches, num_examples):
    """Returns the inclusion table of stacked batches: True where an example is in a batch."""
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
    binomial = scipy.stats.binom(num_examples, rate)
    edges, mass = [-1], 0.0
    for size in range(num_examples + 1):
        mass += binomial.pmf(size)
        if mass * num_batches >= 10 and binomial.sf(size) * num_batches >= 10:
            edges.append(size)
            mass = 0.0
    edges.append(num_examples)
    observed = np.histogram(sizes, np.array(edges) + 0.5)[0]
    expected = np.diff(binomial.cdf(edges)) * num_batches
    return scipy.stats.chisquare(observed, expected).pvalue


def single_p_value(table, rate):
    """Chi-square of how often each example takes part."""
    num_batches, num_examples = table.shape
    statistic = np.sum((table.sum(0) - num_batches * rate) ** 2) / (num_batches * rate * (1 - rate))
    return scipy.stats.chi2.sf(statistic, num_examples)


def pair_p_value(table, rate):
    """Chi-square of how often each pair takes part together."""
    num_batches, num_examples = table.shape
    pairs = (table.T.astype(np.float32) @ table.astype(np.float32))[
        np.triu_indices(num_examples, 1)
    ]
    expected = num_batches * rate**2
    # Pairs overlap, so the sum is not exactly chi-square; the largest deviation, with a union
    # bound, needs no independence.
    worst = np.abs(pairs - expected).max() / math.sqrt(expected * (1 - rate**2))
    return min(1.0, 2 * len(pairs) * scipy.stats.norm.sf(worst))


def succession_p_value(table, rate):
    """Whether being in a batch changes the probability of being in the next one."""
    both = np.sum(table[1:] & table[:-1])
    trials = table[1:].size
    spread = math.sqrt(trials * rate**2 * (1 - rate**2) * (1 + 2 * rate / (1 + rate)))
    return 2 * scipy.stats.norm.sf(abs(both - trials * rate**2) / spread)
